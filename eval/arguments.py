"""Arguments of the lm-eval model `xdlm`, and the checks that need no weights."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Self

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from xdlm_hf.data.tokenizer import check_tokenizer
from xdlm_hf.evaluation.manifest import content_sha, hub_commit
from xdlm_hf.generation.blocks import check_blocks, check_even_blocks
from xdlm_hf.generation.config import XDLMGenerationConfig
from xdlm_hf.generation.options import ACCEPTED, section_names
from xdlm_hf.generation.protocol import length_limit
from xdlm_hf.generation.resolution import draws_with
from xdlm_hf.loading import DTYPES
from xdlm_hf.models.registry import model_class

DEFAULT_MAX_NEW_TOKENS = 256
STABILITY_NOISE = 0.05


# Arguments that are passed on to `generate`: rows of its table of options.
GENERATION = section_names("length", "sampling", "speed", "refinement", "audit")

# For each argument that may name a repository: the argument of its revision, and a file that it must have.
_REVISIONS = {"pretrained": "revision", "tokenizer": "tokenizer_revision", "peft": "peft_revision"}
_FILES = {"pretrained": "config.json", "tokenizer": "tokenizer_config.json", "peft": "adapter_config.json"}


_GenerationArguments = make_dataclass(
    "_GenerationArguments", [(name, Any, field(default=None, kw_only=True)) for name in GENERATION]
)


@dataclass
class Arguments(_GenerationArguments):
    """Arguments of `XDLMEvalModel`, checked without loading anything.

    A setting of `generate` given here wins over the task's, and the task's over the checkpoint's
    generation_config.json; None means "not given". Where run and task disagree, a warning says so once.

    Args:
        pretrained: Folder or Hub name of a checkpoint, or a loaded model.
        tokenizer: Folder, Hub name or tokenizer; by default the one saved with `pretrained`.
        peft: Folder or Hub name of a LoRA adapter; sets the model's k to the one it was trained with.
        revision, tokenizer_revision, peft_revision: Branch, tag or commit of each of the three on the Hub; by default
            its default branch. A tokenizer that is not named is read at `revision`.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16"; a loaded model keeps its own.
        device: Device of the model, by default "cuda"; without a GPU every CUDA device means the CPU.
        batch_size: Rows per forward pass, or "auto": as many as fit, found by halving. Unless `batch_all` is set,
            results depend on it only through the rounding of the device's arithmetic.
        max_batch_size: Where "auto" starts; by default 8 on a CPU and 64 elsewhere.
        max_length: Longest prompt and answer together, in tokens; by default the model's limit.
            Longer prompts lose their beginning, with one warning.
        steps: Denoising steps, that is forward passes per batch.
        max_new_tokens: Length of an answer; 256 if neither the run nor the task says.
        mixing_ratio: k of the sampler and of the noise of likelihood bounds; by default the checkpoint's.
        block_length, sampler, temperature and the rest of `GENERATION`: As in `XDLMGenerationConfig`.
        mc_samples: Draws per likelihood, each one row of a forward pass.
        check_greedy: Whether likelihoods also say if greedy decoding gives the continuation, which takes one forward
            pass per token of it (LAMBADA's accuracy needs that).
        batch_all: Whether to batch also those answers that then depend on their batch, which is faster: drawn
            answers, and all answers of `reference_compat`, whose sampler edits padding. By default each of these is
            made alone, with noise seeded by `seed`, its prompt and the number of earlier repetitions of the request.
        stability: Repetitions of every generated answer with perturbed logits, 2 or more, which tell how the score
            would vary between devices (stability.py); by default none. Greedy answers only.
        stability_noise: Standard deviation of the perturbation of a logit; by default 0.05.
        item_log: JSONL file to which seconds and forward passes of every answer are appended, for eval.table16.
        seed: Seed of all draws; by default that of torch's global generator, which lm-eval sets to its --seed.

    Raises:
        ValueError: On an impossible value.
    """

    pretrained: str | PreTrainedModel
    tokenizer: str | PreTrainedTokenizerBase | None = None
    peft: str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    peft_revision: str | None = None
    dtype: str = "auto"
    device: str | torch.device | None = None
    batch_size: int | str = 1
    max_batch_size: int | None = None
    max_length: int | None = None
    mc_samples: int = 128
    check_greedy: bool = True
    batch_all: bool = False
    stability: int | None = None
    stability_noise: float | None = None
    item_log: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_settings(self.settings)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known: choose one of {', '.join(DTYPES)}")
        for name in ("mc_samples", "max_length", "max_batch_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and not (name == "batch_size" and value == "auto"):
                setattr(self, name, _positive(name, value))
        for name in ("check_greedy", "batch_all"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.seed is not None and not _is_number(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be an integer")
        self._check_stability()
        for name, revision in _REVISIONS.items():
            if getattr(self, revision) is not None:
                setattr(self, revision, str(getattr(self, revision)))  # lm-eval reads a commit of digits as a number
                if not isinstance(getattr(self, name), str):
                    raise ValueError(
                        f"{revision}={getattr(self, revision)!r} needs {name}, the name of a repository on the Hub"
                    )
        self.device = _choose_device(self.device)

    def _check_stability(self) -> None:
        count, noise = self.stability, self.stability_noise
        if noise is not None and count is None:
            raise ValueError(f"stability_noise={noise!r} needs the number of repetitions: add stability=20")
        if noise is not None and not (_is_number(noise, int | float) and 0 < noise < math.inf):
            raise ValueError(f"stability_noise={noise!r} must be a positive number, the deviation of a logit")
        if count is not None:
            if not _is_number(count, int) or count < 2:
                raise ValueError(f"stability={count!r} must be an integer of 2 or more, or be left out")
            self.stability_noise = STABILITY_NOISE if noise is None else noise
            refuse_unrepeatable(XDLMGenerationConfig(), self.settings)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From names and values, refusing unknown names.

        Raises:
            ValueError: As the class, and if a name is unknown or `pretrained` is missing.
        """
        known = [field.name for field in sorted(fields(cls), key=lambda field: field.kw_only)]  # generate's last
        unknown = sorted(set(arguments) - set(known))
        if "trust_remote_code" in unknown:
            raise ValueError("trust_remote_code is neither needed nor accepted: xdlm_hf brings the model's code itself")
        if unknown:
            raise ValueError(f"unknown model arguments {unknown}: xdlm knows {', '.join(known)}")
        if not arguments.get("pretrained"):
            raise ValueError("no checkpoint is named: pass --model_args pretrained=FOLDER_OR_HUB_NAME")
        return cls(**arguments)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments for `generate` that are given."""
        return {name: getattr(self, name) for name in GENERATION if getattr(self, name) is not None}

    @property
    def seed_of_draws(self) -> int:
        """`seed`, or torch's own: lm-eval does not pass its --seed to a model, but seeds torch with it."""
        return torch.initial_seed() if self.seed is None else self.seed

    @property
    def sources(self) -> dict[str, str]:
        """Folders and Hub names among the arguments, by argument."""
        return {name: getattr(self, name) for name in _REVISIONS if isinstance(getattr(self, name), str)}

    def pinned(self) -> Self:
        """A copy whose revisions are the current commits of its Hub names; folders have none.

        Raises:
            ValueError: If a repository or its revision cannot be read, or a folder is to have a revision.
        """
        return dataclasses.replace(self, **{_REVISIONS[name]: self._commit(name) for name in self.sources})

    def shas(self) -> dict[str, str]:
        """`model_sha`, `tokenizer_sha` and `peft_sha` of the sources named; needs `pinned` arguments."""
        return {
            f"{'model' if name == 'pretrained' else name}_sha": content_sha(source, getattr(self, _REVISIONS[name]))
            for name, source in self.sources.items()
        }

    def _commit(self, name: str) -> str | None:
        source, revision = getattr(self, name), getattr(self, _REVISIONS[name])
        try:
            return hub_commit(source, revision, _FILES[name])
        except OSError as error:
            raise _unreadable(name, source, revision, error) from error
        except ValueError as error:
            raise ValueError(f"{_REVISIONS[name]}: {error}") from error


def check_checkpoint(arguments: Arguments, lengths: Mapping[str, int] | None = None) -> PreTrainedTokenizerBase:
    """Checks a checkpoint without reading its weights.

    Args:
        arguments: The result of `Arguments.pinned`.
        lengths: Length of the answers of each task, in tokens, where that is known.

    Returns:
        Its tokenizer.

    Raises:
        ValueError: If checkpoint, tokenizer or adapter cannot be read, or they do not fit each other or the lengths.
    """
    pretrained, loaded = arguments.pretrained, isinstance(arguments.pretrained, PreTrainedModel)
    config = pretrained.config if loaded else _read(AutoConfig, "pretrained", pretrained, arguments.revision)
    try:
        model_class(config)
    except ValueError as error:
        raise ValueError(f"pretrained={pretrained}: {error}") from error
    limit = length_limit(config)
    if arguments.max_length is not None and arguments.max_length > limit:
        raise ValueError(f"max_length={arguments.max_length} is more than the model's limit of {limit}")
    check_room(arguments.max_length or limit, arguments.max_new_tokens or 0)
    for task, length in (lengths or {}).items():
        check_room(arguments.max_length or limit, length, f"{task}: ")
    tokenizer = arguments.tokenizer
    if tokenizer is None or isinstance(tokenizer, str):
        source = tokenizer or (config.name_or_path if loaded else pretrained)
        revision = arguments.tokenizer_revision if tokenizer else arguments.revision
        if not source:
            raise ValueError("the model passed was not loaded from a checkpoint: pass its tokenizer as well")
        tokenizer = _read(AutoTokenizer, "tokenizer", source, revision)
    check_tokenizer(tokenizer, config)
    if arguments.peft is not None:
        from peft import PeftConfig

        _read(PeftConfig, "peft", arguments.peft, arguments.peft_revision)
    return tokenizer


def _read(kind: Any, name: str, source: str, revision: str | None) -> Any:
    """`kind.from_pretrained(source)`, its error named after the argument."""
    try:
        return kind.from_pretrained(source, **at(revision))
    except (OSError, ValueError, TypeError) as error:  # the last two: files that are not what they should be
        raise _unreadable(name, source, revision, error) from error


def at(revision: str | None) -> dict[str, str]:
    """Keyword arguments for `from_pretrained`."""
    return {} if revision is None else {"revision": revision}


def _unreadable(name: str, source: str, revision: str | None, error: Exception) -> ValueError:
    """An error that names the argument, with the first line of the original message."""
    named = f"{name}={source!r}" + ("" if revision is None else f" at revision {revision!r}")
    reason = str(error).strip().partition("\n")[0]
    return ValueError(f"{named} cannot be read, name a folder or a Hub name: {reason}")


def task_settings(generation_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings of `generate` that a task asks for, `max_new_tokens` always among them, and its stop strings."""
    settings = dict(normalize_gen_kwargs(dict(generation_kwargs), DEFAULT_MAX_NEW_TOKENS))
    stops, settings["max_new_tokens"] = settings.pop("until"), settings.pop("max_gen_toks")
    settings.pop("do_sample")  # lm-eval has turned it into a temperature
    return settings, stops


def check_room(max_length: int, max_new_tokens: int, where: str = "") -> None:
    """Raises ValueError, its message opened with `where`, when an answer fills the whole length."""
    if max_new_tokens >= max_length:
        raise ValueError(
            f"{where}max_new_tokens={max_new_tokens} leaves no room for a prompt in max_length={max_length}: shorten it"
        )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses settings of `generate` that are wrong whatever the model; other model arguments are ignored.

    Steps and blocks are checked only where `max_new_tokens` is given.

    Raises:
        ValueError: As `XDLMGenerationConfig`, or if steps, blocks and length do not fit each other.
    """
    # `max_length` is the evaluation's own argument, the limit of prompt and answer together.
    settings = {name: value for name, value in settings.items() if name in ACCEPTED and name != "max_length"}
    XDLMGenerationConfig(**settings)
    length = settings.get("max_new_tokens")
    if length is not None and settings.get("sampler") != "ancestral":
        check = check_even_blocks if settings.get("reference_compat") else check_blocks
        check(settings.get("steps", length), length, settings.get("block_length", length))


def refuse_unrepeatable(config: XDLMGenerationConfig, settings: Mapping[str, Any], where: str = "") -> None:
    """Raises ValueError, opened with `where`, if settings over `config` draw or capture graphs: `stability` needs
    greedy answers, and to change each forward pass.
    """
    if draws_with(config, settings):
        raise ValueError(
            f"{where}stability repeats greedy answers, and these settings draw random numbers (temperature above 0, "
            "ancestral sampler, random remasking): leave out stability, and run several seeds instead (seed=1, seed=2)"
        )
    if settings.get("compile", getattr(config, "compile", None)):
        raise ValueError(
            f"{where}stability perturbs the logits of every forward pass, which a captured graph would not repeat: "
            "remove compile from the checkpoint's generation_config.json"
        )


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _choose_device(device: str | torch.device | None) -> torch.device:
    try:
        wanted = torch.device(device or "cuda")
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not known to PyTorch: use cpu, cuda or cuda:0, for example") from error
    return torch.device("cpu") if wanted.type == "cuda" and not torch.cuda.is_available() else wanted


def _positive(name: str, value: int | str) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        kinds = 'a positive integer or "auto"' if name == "batch_size" else "a positive integer"
        raise ValueError(f"{name}={value!r} must be {kinds}")
    return int(value)
