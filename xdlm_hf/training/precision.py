"""Precision of trained weights: float32 master weights are required, and only finite weights are saved.

AdamW changes a weight by about the learning rate. A bfloat16 weight has 8 significant bits, so that an update of less
than 1/512 of its size is rounded away: three steps at 1e-5 change 14 % of a tiny model's bfloat16 weights, and 98 % of
them in float32 (measured; the larger the weights, the fewer change). Trained weights must therefore be float32, with
the passes in bfloat16 by autocast; or DeepSpeed ZeRO must hold float32 copies ("master weights") in its optimizer.
Frozen weights may have any dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a weight that is not a finite number; the message names the step and where."""


def keeps_float32_copies(deepspeed_plugin: Any | None) -> bool:
    """Whether the optimizer holds float32 copies of 16-bit weights: DeepSpeed ZeRO does, unless told otherwise."""
    if deepspeed_plugin is None:
        return False
    config = deepspeed_plugin.deepspeed_config
    in_16_bits = ("bf16", "bf16_master_weights_and_grads"), ("fp16", "fp16_master_weights_and_grads")
    if any((config.get(section) or {}).get(option) for section, option in in_16_bits):
        return False
    return config.get("zero_optimization", {}).get("stage", 0) > 0


def check_trained_dtype(dtype: torch.dtype, deepspeed_plugin: Any | None, where: str = "") -> None:
    """Refuse to train weights in fewer than 32 bits without float32 copies.

    Args:
        dtype: The weights' dtype.
        deepspeed_plugin: accelerate's, `TrainingArguments.deepspeed_plugin`; None without DeepSpeed.
        where: Beginning of the message, such as "option: ".

    Raises:
        ValueError: With the ways to train them.
    """
    if dtype.itemsize >= 4 or not dtype.is_floating_point or keeps_float32_copies(deepspeed_plugin):
        return
    raise ValueError(
        f"{where}the trained weights are {str(dtype).removeprefix('torch.')} and nothing keeps float32 copies of them: "
        "most updates would be rounded away. Load them with dtype float32 (passes still run in bfloat16 with bf16 "
        "true), train with DeepSpeed ZeRO (zero1.yaml to zero3.yaml), or train adapters (lora_rank) on frozen weights."
    )


def check_trained_weights(model: nn.Module, deepspeed_plugin: Any | None) -> None:
    """`check_trained_dtype` for each trained parameter of a model.

    Raises:
        ValueError: Naming the first parameter that must not be trained in its dtype.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            check_trained_dtype(parameter.dtype, deepspeed_plugin, f"{name}: ")


def non_finite_weights(
    model: nn.Module, all_sum: Callable[[Tensor], Tensor] | None = None, trained_only: bool = True
) -> list[str]:
    """Names of the parameters that hold a NaN or an infinity; reads every weight once, without a copy.

    Args:
        model: The unwrapped model.
        all_sum: Sums a tensor over all processes, so that each gets the same names where weights are sharded (by ZeRO-3
            or FSDP) or differ; every process must then call this. By default only this process's part is read.
        trained_only: Leave out frozen parameters.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad or not trained_only}
    flags = [_holds_non_finite(_local_part(p)) for p in parameters.values()]
    if not flags:
        return []
    device = next(iter(parameters.values())).device
    flags = torch.stack([flag.to(device) for flag in flags]).float()
    if all_sum is not None:
        flags = all_sum(flags)
    return [name for name, bad in zip(parameters, flags.tolist(), strict=True) if bad]


def first_of(names: list[str]) -> str:
    """The first of some names for a message, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _local_part(parameter: nn.Parameter) -> Tensor:
    """This process' part of a parameter: all of it, ZeRO-3's partition, or the shard of a DTensor."""
    part = getattr(parameter, "ds_tensor", parameter).detach()
    return part.to_local() if hasattr(part, "to_local") else part


def _holds_non_finite(part: Tensor) -> Tensor:
    if part.numel() == 0 or not part.is_floating_point():
        return torch.zeros((), dtype=torch.bool, device=part.device)
    low, high = part.aminmax()  # a NaN is both; isfinite() would allocate a byte for each weight
    return ~(torch.isfinite(low) & torch.isfinite(high))
