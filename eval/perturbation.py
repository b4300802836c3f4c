"""Perturbed logits: Gaussian noise in place of the rounding of another device.

Another device rounds otherwise, but always in the same way: the same text has the same logits there. So the noise of a
row is a function of its text, the seed and the number of the repetition, and every repetition stands for one device. It
does not depend on the batch, the number of processes or earlier steps.

Shapes: R rows, L columns of a forward pass, C columns whose logits are kept, N rows of the output layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xdlm_hf.diffusion.checks import work_dtype
from xdlm_hf.evaluation.likelihood import seeded_generator

_PADDING = torch.iinfo(torch.long).max  # comes after all positions, so that it does not shift their noise


@dataclass(frozen=True)
class Perturbation:
    """The rounding of one simulated device.

    Args:
        repetition: Number of the device.
        noise: Standard deviation of a logit's perturbation; all are independent.
        seed: Seed of the run.
    """

    repetition: int
    noise: float
    seed: int

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Within the context, perturbs the logits of every forward pass of `model`.

        The logits (R, C, N) become float32 or wider. With guidance, each of the two texts has noise of its own.
        """
        hook = model.register_forward_hook(self._perturb, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _perturb(self, model: nn.Module, args: tuple, inputs: dict[str, Any], output: Any) -> Any:
        ids, positions = inputs["input_ids"], _positions(inputs)
        kept = inputs.get("logits_to_keep")
        kept_positions = positions if kept is None else positions[:, kept]
        logits = output.logits.to(work_dtype(output.logits))
        for row in range(len(ids)):
            logits[row] += self._noise(ids[row], positions[row], kept_positions[row], logits)
        output.logits = logits
        return output

    def _noise(self, ids: Tensor, positions: Tensor, kept: Tensor, like: Tensor) -> Tensor:
        """Noise (C, N) at the positions `kept` of a row.

        A forward pass over cached text may compute a position twice, which pads a row to the length of another: the
        text counts it once, and both have the same noise.
        """
        text = sorted({pair for pair in zip(positions.tolist(), ids.tolist(), strict=True) if pair[0] != _PADDING})
        generator = seeded_generator(self.seed, self.repetition, text, device=like.device)
        unique, index = kept.unique(return_inverse=True)
        noise = torch.randn(len(unique), like.shape[-1], generator=generator, device=like.device)
        return noise.mul_(self.noise)[index]


def _positions(inputs: dict[str, Any]) -> Tensor:
    """(R, L) positions of the columns of a forward pass in their texts, `_PADDING` at padding."""
    ids, attention_mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    # With a cache the mask is that of the whole text, and no computed column is padding.
    full = attention_mask is not None and attention_mask.shape == ids.shape
    return positions.masked_fill(attention_mask == 0, _PADDING) if full else positions
