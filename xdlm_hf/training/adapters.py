"""LoRA adapters, also on weights in 4 bits (QLoRA), and the noise they were trained with, stored beside them.

An adapter may be trained at another k than its base model's config.json says, and peft saves the adapter's weights
alone. `save_noise` therefore writes k and schedule to `xdlm_noise.json` in the adapter's folder, and `load_adapter`
sets them in the model's config. (With a config.json there, Transformers would take the folder for a whole model.) Needs
peft; 4 bits need bitsandbytes.
"""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

if TYPE_CHECKING:  # peft belongs to the extras: importing this module must not need it
    from peft import PeftModel
NOISE_FILE = "xdlm_noise.json"
_NOISE_FIELDS = ("mixing_ratio", "noise_schedule")


def add_adapters(model: PreTrainedModel, rank: int, alpha: float, dropout: float = 0.0) -> "PeftModel":
    """Freeze a model and put trainable adapters on its `lora_targets`; a LLaDA's are all seven projections of a block.

    Args:
        model: A `DiffusionModel`, in any dtype or in 4 bits.
        rank: Rank r of the adapters.
        alpha: Scale of the adapters, times r.
        dropout: Dropout of the adapters' inputs.

    Raises:
        ValueError: If `rank` is not positive.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise ValueError(f"lora_rank={rank} must be at least 1; leave it at 0 to train all weights.")
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=model.lora_targets,
        task_type=None,  # peft's task types wrap generate() in ways that only causal models have
    )
    return get_peft_model(model, lora)


def save_noise(config: PreTrainedConfig, folder: str | Path) -> None:
    """Write the noise of a config beside an adapter: `{"mixing_ratio": k, "noise_schedule": name}`.

    Nothing is written for a config without these fields: its model's noise has no k.
    """
    if not all(hasattr(config, name) for name in _NOISE_FIELDS):
        return
    noise = {name: getattr(config, name) for name in _NOISE_FIELDS}
    Path(folder, NOISE_FILE).write_text(json.dumps(noise, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: PreTrainedModel, adapter: str | Path, **options: Any) -> "PeftModel":
    """Add a saved adapter to a model, and set the noise that it was trained with in the model's config.

    Args:
        model: The base model; the adapter's layers go into it, and its config is changed.
        adapter: Folder or Hub name. Without an `xdlm_noise.json`, as other programs write them, the noise stays the
            base model's.
        options: Further arguments of peft's `PeftModel.from_pretrained`.

    Raises:
        ValueError: If the file holds anything but a mixing ratio and a known schedule, or they do not fit the model,
            which is not changed then.
    """
    from peft import PeftModel

    noise = _stored_noise(adapter, options.get("revision"))
    try:
        model.noise_process(**noise)  # checks the values
    except ValueError as error:
        raise ValueError(f"{adapter}: {NOISE_FILE}: {error}") from error
    adapted = PeftModel.from_pretrained(model, adapter, **options)
    for name, value in noise.items():
        setattr(model.config, name, value)
    return adapted


def _stored_noise(adapter: str | Path, revision: str | None) -> dict[str, Any]:
    found = cached_file(
        str(adapter),
        NOISE_FILE,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        return {}
    noise = json.loads(Path(found).read_text(encoding="utf-8"))
    if not isinstance(noise, dict) or set(noise) != set(_NOISE_FIELDS):
        raise ValueError(f"{adapter}: {NOISE_FILE} must hold {' and '.join(_NOISE_FIELDS)}, not {noise!r:.80}.")
    if isinstance(noise["mixing_ratio"], bool) or not isinstance(noise["mixing_ratio"], int | float):
        raise ValueError(f"{adapter}: {NOISE_FILE}: mixing_ratio={noise['mixing_ratio']!r} must be a number.")
    return noise


def quantization_4bit(device: str | torch.device, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Settings that load the blocks' matrices in 4 bits (NF4, with the scales quantized too), and nothing else.

    The embedding and the output layer keep their dtype: the fused loss reads the latter as a matrix.

    Args:
        device: The model's.
        compute_dtype: Dtype of the products with the weights.

    Raises:
        ValueError: If bitsandbytes is not installed, or cannot work in 4 bits on this device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs bitsandbytes, which is not installed: pip install -e '.[qlora]'.")
    _probe_4bit(torch.device(device))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["model.transformer.ff_out"],
    )


def _probe_4bit(device: torch.device) -> None:
    """Quantize a few numbers: bitsandbytes does not report what a device or a build supports."""
    from bitsandbytes import functional

    try:
        quantized, state = functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        whole = functional.dequantize_4bit(quantized, state)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"load_in_4bit: bitsandbytes cannot quantize on {device} ({type(error).__name__}: {error}); use a CUDA "
            "GPU, another build of bitsandbytes, or leave load_in_4bit out."
        ) from error
    if not torch.allclose(whole, torch.ones_like(whole), atol=1e-2):
        raise ValueError(f"load_in_4bit: bitsandbytes gives wrong numbers on {device}; leave load_in_4bit out.")
