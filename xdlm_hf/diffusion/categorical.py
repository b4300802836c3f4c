"""Exact draws from categorical distributions, without random numbers of the vocabulary's size.

Shapes: M rows, N vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .checks import work_dtype

# Logits converted to float32 at a time: they fit a CPU's cache, and are 64 MB on a GPU.
_BLOCK_ELEMENTS = {"cpu": 2**18, "other": 2**24}


def uniform(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Uniform numbers in [0, 1), by default float64: a float32 draw cannot resolve events rarer than 6e-8.

    Drawn where the generator lives and then moved, so that one CPU seed gives one result on every device.
    """
    source = generator.device if generator is not None else device
    return torch.rand(shape, generator=generator, device=source, dtype=dtype).to(device)


def masked_logits(logits: Tensor, absorbing_ids: Sequence[int]) -> Tensor:
    """A float32-or-wider copy of the logits with the rows of absorbing tokens at -inf (p_m = 0 when k < 1)."""
    logits = logits.to(work_dtype(logits), copy=True)
    for token_id in absorbing_ids:
        logits[..., token_id] = -torch.inf
    return logits


def refuse_undefined(undefined: Tensor) -> None:
    """Raise ValueError if any of the positions has no distribution: logits that are NaN or inf, or -inf throughout.

    Synchronizes with the device; call once per step.
    """
    if undefined.any():
        raise ValueError(
            "cannot draw a token: some logits are NaN or inf, or every token of a position is excluded (-inf). "
            "Weights in float16 may overflow, bfloat16 does not; a logits processor may exclude too much."
        )


def draw_from_weights(weights: Tensor, u: Tensor) -> Tensor:
    """The token at quantile u of each row, by inverting the cumulative sum in float64 on two levels.

    First a group of about sqrt(N) tokens is chosen, then a token of the group. This takes one sum over the vocabulary
    and one random number per row. Probabilities are exact to 1e-7; float32 Gumbel noise would distort rare tokens.

    Args:
        weights: (M, N), not negative, float32 or float64; each row's sum is positive.
        u: (M, 1) float64 in [0, 1).

    Returns:
        Token ids, (M,); never one of weight 0. The id is arbitrary for a row whose sum is NaN: that is not checked
        here, because the check synchronizes with the device (`refuse_undefined`).
    """
    n = weights.shape[-1]
    group = math.isqrt(n - 1) + 1
    whole = n - n % group
    sums = weights[:, :whole].unflatten(-1, (-1, group)).sum(-1)
    if whole < n:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)
    chosen, rest = _invert(sums.double(), u)
    columns = chosen * group + torch.arange(group, device=weights.device)
    inside = torch.where(columns < n, weights.gather(-1, columns.clamp_max(n - 1)), 0.0)
    within, _ = _invert(inside.double(), rest)
    return (chosen * group + within).squeeze(-1).clamp_max(n - 1)  # NaN gives an index out of range


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative weight exceeds u of the total, and where in its own weight u falls; (M, 1) each."""
    cdf = weights.cumsum(-1)
    # Strictly below the total also after rounding, so that an index of weight 0 is never returned.
    target = torch.minimum(u * cdf[:, -1:], torch.nextafter(cdf[:, -1:], torch.zeros_like(u)))
    index = torch.searchsorted(cdf, target, right=True).clamp_max(weights.shape[-1] - 1)  # NaN: out of range
    weight = weights.gather(-1, index)
    return index, ((target - (cdf.gather(-1, index) - weight)) / weight).clamp(0, 1)


def weight_blocks(logits: Tensor, absorbing_ids: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, exp(logit - max)) of logits (M, N), a few rows at a time; 0 at absorbing tokens."""
    for part in row_blocks(len(logits), logits):
        block = masked_logits(logits[part], absorbing_ids)
        yield part, block.sub_(block.amax(-1, keepdim=True)).exp_()


def row_blocks(m: int, logits: Tensor) -> Iterator[slice]:
    """Slices of m rows, each of as many rows of `logits` (..., N) as are converted at a time."""
    return row_slices(m, logits.shape[-1], logits.device, _BLOCK_ELEMENTS)


def row_slices(m: int, vocab_size: int, device: torch.device, elements: Mapping[str, int]) -> Iterator[slice]:
    """Slices of m rows of N numbers, each of about `per_device(elements, device)` numbers."""
    rows = max(1, per_device(elements, device) // vocab_size)
    return (slice(start, min(start + rows, m)) for start in range(0, m, rows))


def per_device(table: Mapping[str, int], device: torch.device) -> int:
    """`table["cpu"]`, or `table["other"]` for any other device."""
    return table["cpu" if device.type == "cpu" else "other"]
