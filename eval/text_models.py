"""Options, loading and description of a model, for the commands that measure models of text and images.

If a checkpoint has `ema.safetensors`, its weights are replaced by that average, unless `--trained_weights` is given.
"""

import argparse
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from xdlm_hf.data.text8 import text8_tokenizer
from xdlm_hf.data.tokenizer import check_tokenizer
from xdlm_hf.data.wrapping import set_boundary_tokens
from xdlm_hf.diffusion.gidd import GIDDProcess
from xdlm_hf.evaluation.manifest import content_sha, hardware, hub_commit
from xdlm_hf.generation.protocol import default_mixing_ratio, length_limit
from xdlm_hf.loading import DTYPES, add_version_option, load_weights, read_config, read_tokenizer
from xdlm_hf.training.averages import EMA_FILE, apply_saved_average


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of `load_text_model`."""
    add = parser.add_argument
    add("--tokenizer", help="folder or Hub name, or text8; default: the model's")
    add("--length", type=int, help="tokens per row; default: the model's limit")
    add_weights_options(parser)


def add_weights_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options of `load_model`, and `--version`."""
    add_version_option(parser)
    add = parser.add_argument
    add("--model", required=required, help="folder or Hub name of a diffusion model")
    add("--mixing_ratio", type=float, help="k of the noise; default: the model's")
    add("--dtype", default="auto", choices=DTYPES, help="of the model's weights")
    add("--device", default="auto", help="auto, cpu, cuda:0, ...")
    add(
        "--trained_weights",
        action="store_true",
        help=f"the trained weights, not their average ({EMA_FILE})",
    )


def device_of(name: str) -> torch.device:
    """A device by name; "auto" is the GPU if there is one.

    Raises:
        ValueError: If the name is unknown to PyTorch.
    """
    try:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not known to PyTorch; use auto, cpu or cuda:0, for example.") from error


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for an option with a value below 1."""
    for name in names:
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise ValueError(f"--{name} {number} must be at least 1.")


def load_text_model(
    options: argparse.Namespace, released: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Model in evaluation mode, tokenizer, and whether the weights are the average of a checkpoint.

    Args:
        options: Including those of `add_model_options`.
        released: As in `set_boundary_tokens`, for a tokenizer without EOS.

    Raises:
        ValueError: If one cannot be read, they do not fit each other, rows are longer than the model's limit, or the
            trained weights are asked of a model that was saved with the average alone.
    """
    config = read_config(options.model)
    check_trained_weights(options, config)
    limit = length_limit(config)
    if (options.length or 0) > limit:
        raise ValueError(f"--length {options.length} exceeds the model's limit of {limit} tokens.")
    source = options.tokenizer or options.model
    tokenizer = text8_tokenizer() if source == "text8" else read_tokenizer(source)
    if tokenizer.eos_token is None:  # BERT's
        set_boundary_tokens(tokenizer, released)
    check_tokenizer(tokenizer, config)
    model, average = load_model(options)
    return model, tokenizer, average


def check_trained_weights(options: argparse.Namespace, config: Any) -> None:
    """Raise ValueError if the trained weights are asked of a model that was saved with the average alone."""
    if options.trained_weights and _decay(config) is not None and not (Path(options.model) / EMA_FILE).is_file():
        raise ValueError(
            f"--trained_weights: the weights of {options.model!r} are an average (ema_decay={_decay(config)}), and the "
            "trained ones were not saved with it; pass a checkpoint-N folder of the run as --model."
        )


def load_model(options: argparse.Namespace) -> tuple[PreTrainedModel, bool]:
    """Model in evaluation mode, and whether the weights are the average of a checkpoint; see `load_text_model`."""
    device = device_of(options.device)
    model = load_weights(options.model, dtype=options.dtype)
    average = not options.trained_weights and apply_saved_average(model, options.model)
    return model.to(device).eval(), average


def _decay(config: Any) -> float | None:
    """The decay of the average that a config's weights are; None for trained weights."""
    return getattr(config, "ema_decay", None)


def identity(options: argparse.Namespace, model: PreTrainedModel, average: bool) -> dict[str, Any]:
    """Description of model and machine, for a report."""
    k = default_mixing_ratio(model.config) if options.mixing_ratio is None else options.mixing_ratio
    saved = "as saved" if _decay(model.config) is None else f"as saved, an average (ema_decay={_decay(model.config)})"
    return {
        "model": options.model,
        "model_sha": content_sha(options.model, hub_commit(options.model, None, "config.json")),
        "weights": f"the average in {EMA_FILE}" if average else saved,
        "row": row_name(model, k),
        "mixing_ratio": k,
        "length": options.length or length_limit(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "hardware": hardware(model.device),
        "versions": {"python": platform.python_version(), "transformers": transformers.__version__},
    }


def row_name(model: Any, k: float) -> str:
    """Name of the model in the paper's tables. Their GIDD has no uniform noise, so that another is named by its own."""
    process = model.noise_process()
    if isinstance(process, GIDDProcess):
        return f"GIDD p_u={process.p_uniform:g}" if process.p_uniform else "GIDD"
    return {0.0: "MDLM", 1.0: "UDLM"}.get(float(k), f"XDLM k={k:g}")


def value_with_error(figures: dict[str, float], name: str, digits: int) -> str:
    """A figure as "value ± standard error", for a table."""
    error = figures.get(f"{name}_standard_error")
    return f"{figures[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
