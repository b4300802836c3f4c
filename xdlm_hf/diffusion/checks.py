"""Validation of ids, signal rates and shapes in the public functions, and the dtype of computations.

Shapes: B batch, L length, N vocabulary.
"""

from numbers import Integral

import torch
from torch import Tensor


def work_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 tensors, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def as_column(alpha: Tensor, ids: Tensor) -> Tensor:
    """A signal rate as (B, 1), to broadcast over the (B, L) `ids`; float32 at least.

    Raises:
        ValueError: If `ids` are not (B, L), or `alpha` is neither (), (B,) nor (B, 1).
    """
    alpha = torch.as_tensor(alpha, device=ids.device)
    if alpha.ndim == 1:
        alpha = alpha[:, None]
    if alpha.ndim == 0:
        alpha = alpha[None, None]
    if ids.ndim != 2:
        raise ValueError(f"token ids must be (B, L), got {tuple(ids.shape)}.")
    if alpha.ndim != 2 or alpha.shape[1] != 1 or alpha.shape[0] not in (1, ids.shape[0]):
        raise ValueError(
            f"a signal rate of shape {tuple(alpha.shape)} does not fit ids of shape {tuple(ids.shape)}: "
            f"pass one value per row, ({ids.shape[0]},) or ({ids.shape[0]}, 1)."
        )
    return alpha.to(work_dtype(alpha)).expand(ids.shape[0], 1)


def validate_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError naming the first id outside [0, N)."""
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise ValueError(f"{name} holds token id {ids[outside][0].item()}, outside [0, {vocab_size}).")


def validate_rates(**rates: Tensor) -> None:
    """Raise ValueError naming the first signal rate outside [0, 1]; the names are those of the keywords."""
    for name, alpha in rates.items():
        outside = ~((alpha >= 0) & (alpha <= 1))
        if outside.any():
            raise ValueError(f"{name} holds {alpha[outside][0].item():g}; a signal rate lies in [0, 1].")


def validate_times(t: Tensor) -> None:
    """Raise ValueError naming the first time outside [0, 1]."""
    outside = ~((t >= 0) & (t <= 1))
    if outside.any():
        raise ValueError(f"t holds {t[outside][0].item():g}; a time lies in [0, 1], 0 clean and 1 noise.")


def check_step(values: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Validate one reverse step; returns the rates as (B, 1) columns.

    Raises:
        ValueError: If shapes disagree, an id is not in [0, N), a rate leaves [0, 1], or some alpha_s < alpha_t.
    """
    check_shapes(values, z_t, vocab_size)
    validate_ids("z_t", z_t, vocab_size)
    alpha_s, alpha_t = as_column(alpha_s, z_t), as_column(alpha_t, z_t)
    validate_rates(alpha_s=alpha_s, alpha_t=alpha_t)
    backward = alpha_s < alpha_t
    if backward.any():
        raise ValueError(
            f"alpha_s={alpha_s[backward][0].item():g} < alpha_t={alpha_t[backward][0].item():g}: "
            "s must be the earlier, cleaner time (s < t)."
        )
    return alpha_s, alpha_t


def check_shapes(values: Tensor, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `ids` are (B, L) and `values` (B, L, N)."""
    expected = (*ids.shape, vocab_size)
    if ids.ndim != 2 or tuple(values.shape) != expected:
        raise ValueError(
            f"expected ids (B, L) and logits or probabilities (B, L, {vocab_size}); "
            f"got {tuple(ids.shape)} and {tuple(values.shape)}."
        )


def check_targets(x_0: Tensor, z_t: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless clean and noisy ids are both (B, L) and the clean ones lie in [0, N)."""
    if tuple(x_0.shape) != tuple(z_t.shape) or x_0.ndim != 2:
        raise ValueError(f"x_0 {tuple(x_0.shape)} and z_t {tuple(z_t.shape)} must both be (B, L).")
    validate_ids("x_0", x_0, vocab_size)


def check_positive(**values: int) -> None:
    """Raise ValueError naming the first value that is not a positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer.")
