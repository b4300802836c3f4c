"""Exponential moving average (EMA) of the trained weights, for evaluation and the final model.

After the n-th optimizer step, with d = `ema_decay`,

    average <- d_n average + (1 - d_n) weights,      d_n = min(d, (1 + n) / (10 + n))

in float32, initialised with the initial weights. Steps that a loss scaler skips do not count. Training continues from
the weights, not the average. Evaluation and the final model use the average, and the final config records `ema_decay`.
A checkpoint contains both: the weights as its model, the average in `ema.safetensors`.

Every process has the whole average, so ZeRO-3 and FSDP, which shard the weights, are refused. The average is float32
also for 16-bit weights (of which ZeRO-1 and 2 keep float32 copies).
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .averages import EMA_FILE, fill_weights, read_average, trained_weights

logger = logging.getLogger(__name__)


def check_ema(model: nn.Module, args: TrainingArguments) -> None:
    """Check that `ema_decay`, if set, can be used.

    Raises:
        ValueError: For adapters and for sharded weights.
    """
    decay = getattr(args, "ema_decay", None)
    if decay is None:
        return
    if hasattr(model, "peft_config"):
        raise ValueError(f"ema_decay={decay} averages a whole model, not adapters; leave out one of the two.")
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            f"ema_decay={decay} needs all weights in every process, but ZeRO-3 and FSDP shard them; use zero2.yaml or "
            "plain data parallelism."
        )


class ExponentialMovingAverage(TrainerCallback):
    """The average of a run's trained weights, updated after each optimizer step.

    Args:
        decay: d, in [0, 1).

    Raises:
        ValueError: If `decay` is outside [0, 1).
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay={decay} must lie in [0, 1); the paper's runs use 0.9999.")
        self.decay = decay
        self.reset()

    def reset(self) -> None:
        """Discard the average; the next run starts from its initial weights."""
        self.updates = 0
        self._average: dict[str, Tensor] = {}

    def start(self, model: nn.Module) -> None:
        """Initialise the average with the weights, or move a loaded average to their devices."""
        weights = trained_weights(model)
        if not self._average:
            self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in weights.items()}
        self._average = {name: self._average[name].to(p.device) for name, p in weights.items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average after an optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [parameter.detach().float() for parameter in trained_weights(model).values()]
        torch._foreach_lerp_(list(self._average.values()), weights, 1 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Replace the weights by the average inside the block; they are restored exactly, also after an error.

        Needs memory for a copy of the weights. Before `start` the weights are used.
        """
        if not self._average:
            yield
            return
        weights = trained_weights(model)
        before = {name: parameter.detach().clone() for name, parameter in weights.items()}
        try:
            fill_weights(weights, self._average)
            yield
        finally:
            fill_weights(weights, before)

    def save(self, folder: str | Path) -> None:
        """Write `ema.safetensors`: the average by parameter name, with decay and number of updates."""
        tensors = {name: tensor.contiguous() for name, tensor in self._average.items()}
        save_file(tensors, Path(folder) / EMA_FILE, {"ema_decay": repr(self.decay), "updates": str(self.updates)})

    def load(self, checkpoint: str | Path, model: nn.Module) -> None:
        """Continue from the average of a checkpoint.

        Args:
            checkpoint: Folder of the checkpoint.
            model: The model to train; only names and shapes of its weights are compared.

        Raises:
            ValueError: If the checkpoint has no average, or one of another model.
        """
        average, settings = read_average(Path(checkpoint), trained_weights(model))
        self._average, self.updates = average, int(settings["updates"])

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.start(model)

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        if not getattr(optimizer, "step_was_skipped", False):
            self.update(model)


@contextlib.contextmanager
def named_in_config(config: Any, decay: float) -> Iterator[None]:
    """Record in the config, inside the block, that the weights are an average with this decay."""
    config.ema_decay = decay
    try:
        yield
    finally:
        del config.ema_decay
