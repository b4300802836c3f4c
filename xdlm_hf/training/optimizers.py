"""Memory of each optimizer's state, by the names of Transformers' Trainer."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from transformers import TrainingArguments

# bitsandbytes' optimizers in 8 bits: numbers that share a float32 scale, and the smallest tensor that is not float32.
_STATE_BLOCK, _SMALLEST_8_BIT_STATE = 256, 4096


class Optimizer(NamedTuple):
    """State of an optimizer, and memory that its step allocates.

    Args:
        states: Numbers per element.
        in_8_bits: As in bitsandbytes: a byte per number and a float32 scale per block of them. Tensors of fewer than
            4096 elements stay in float32, and so do embeddings, at Transformers' request.
        factored: One number per row and per column of a matrix instead.
        foreach: Bytes per element that a step allocates for all trained tensors at once, for the results of torch's
            foreach kernels, its default on GPUs.
        looped: The same for an optimizer that updates one tensor at a time, so that the largest counts.
        offloads: Whether it can be in main memory. There accelerate replaces any optimizer by DeepSpeed's CPU Adam,
            which only AdamW in 32 bits equals (accelerate 1.15, DeepSpeed 0.19).
    """

    states: int
    in_8_bits: bool = False
    factored: bool = False
    foreach: int = 0
    looped: int = 0
    offloads: bool = False

    @property
    def flat_bytes(self) -> float:
        """Bytes per element in DeepSpeed's flat partitions, without small tensors, embeddings, rows and columns."""
        return self.states * (1 + 4 / _STATE_BLOCK if self.in_8_bits else 4)

    def tensor_bytes(self, shape: Sequence[int], embedding: bool = False) -> int:
        """Bytes of the state of one tensor; a few for its step and norm, and 2 KiB for all tensors, are left out."""
        elements = math.prod(shape)
        if self.factored and len(shape) > 1:
            return 4 * (elements // shape[-1] + elements // shape[-2])
        if self.in_8_bits and not embedding and elements >= _SMALLEST_8_BIT_STATE:
            return self.states * (elements + 4 * math.ceil(elements / _STATE_BLOCK))
        return self.states * 4 * elements


ADAMW, _ADAMW_FUSED = Optimizer(2, foreach=4, offloads=True), Optimizer(2, offloads=True)
_LION = Optimizer(1)
_ADAMW_8BIT, _LION_8BIT = Optimizer(2, in_8_bits=True), Optimizer(1, in_8_bits=True)
# By Transformers' names. Paged states count in full, although they are moved to main memory when a GPU is full.
OPTIMIZERS = {
    "adamw_torch": ADAMW,
    "adamw_torch_fused": _ADAMW_FUSED,
    "paged_adamw_32bit": _ADAMW_FUSED,
    "adamw_8bit": _ADAMW_8BIT,
    "adamw_bnb_8bit": _ADAMW_8BIT,
    "paged_adamw_8bit": _ADAMW_8BIT,
    "lion_32bit": _LION,
    "paged_lion_32bit": _LION,
    "lion_8bit": _LION_8BIT,
    "paged_lion_8bit": _LION_8BIT,
    "adafactor": Optimizer(1, factored=True, looped=8),
    "sgd": Optimizer(0, foreach=4),  # where there is weight decay
}


def optimizer_of(name: str, options: str | None = None) -> Optimizer | None:
    """The optimizer of this name; None if it is not in the table.

    Args:
        name: Transformers' `optim`.
        options: Its `optim_args`, e.g. `momentum=0.9`: with momentum, SGD keeps a number for each element.

    Raises:
        ValueError: If `options` cannot be read.
    """
    try:
        given = dict(option.split("=") for option in (options or "").replace(" ", "").split(",") if option)
        has_momentum = name == "sgd" and float(given.get("momentum", 0)) != 0
    except ValueError as error:
        raise ValueError(
            f"optim_args={options!r} cannot be read: give names and numbers as 'momentum=0.9,nesterov=True'."
        ) from error
    if has_momentum:
        return OPTIMIZERS["sgd"]._replace(states=1)
    return OPTIMIZERS.get(name)


def check_offload(args: TrainingArguments) -> None:
    """Refuse an optimizer in main memory that is not AdamW: accelerate would silently train with another one.

    Raises:
        ValueError: Naming the optimizer.
    """
    config = args.deepspeed_plugin.deepspeed_config if args.deepspeed_plugin is not None else {}
    device = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") or "none"
    replaced = device != "none" and "optimizer" not in config and config.get("zero_force_ds_cpu_optimizer", True)
    known = OPTIMIZERS.get(args.optim)
    if replaced and not (known and known.offloads):
        raise ValueError(
            f"optim={args.optim.value!r} with offload_optimizer to {device}: accelerate would train with "
            "DeepSpeed's CPU Adam in its place. Use optim='adamw_torch', or a configuration that does not offload."
        )
