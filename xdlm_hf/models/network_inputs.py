"""Checks of the arguments of `forward` and other methods of the networks.

Shapes: B batch, L length, D width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import TransformersKwargs, is_tracing

from ..diffusion.checks import validate_ids


def refuse_unknown_arguments(name: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for unknown arguments: a misspelt mask or unused `labels` would silently give wrong results.

    Args:
        name: Name of the model family, for the message.
        kwargs: Keyword arguments that `forward` does not name.
    """
    for argument, value in kwargs.items():
        if argument == "labels" and value is not None:
            raise ValueError(
                "labels are not supported, because the diffusion loss also needs the noise level. "
                "Train with XDLMTrainer, or call xdlm_hf.diffusion_loss on the logits."
            )
        # use_cache=False, past_key_values=None and the like have no effect.
        if argument not in TransformersKwargs.__annotations__ and value is not None and value is not False:
            raise ValueError(f"{name}'s forward has no argument {argument!r}; remove it.")


def check_text(input_ids: Tensor | None, inputs_embeds: Tensor | None, logits_to_keep: int | Tensor = 0) -> None:
    """Raise ValueError unless exactly one of ids (B, L) and embeddings (B, L, D) is given and the count is valid."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids (B, L) and inputs_embeds (B, L, D).")
    if isinstance(logits_to_keep, int) and logits_to_keep < 0:
        raise ValueError(f"logits_to_keep={logits_to_keep} must not be negative; it counts positions from the end.")


def check_conditions(config: Any, rows: int, timesteps: Tensor | None, class_labels: Tensor | None) -> None:
    """Check times and labels of a network whose config has `time_conditioning` and `num_classes`.

    Raises:
        ValueError: If the network does not take one of them, or it does not fit the rows, or needed times are missing.
    """
    timed, classes = config.time_conditioning, config.num_classes
    if timed and timesteps is None:
        raise ValueError(
            "timesteps are missing: this network has time_conditioning=True; pass the noise levels sigma of the rows, "
            "(B,), such as model.timesteps(t)."
        )
    if not timed and timesteps is not None:
        raise ValueError("timesteps were given, but this network has time_conditioning=False; leave them out.")
    if class_labels is not None and classes is None:
        raise ValueError("class_labels were given, but this network has num_classes=None; leave them out.")
    for name, value in (("timesteps", timesteps), ("class_labels", class_labels)):
        if value is not None and value.shape != (rows,):
            raise ValueError(f"{name} of shape {tuple(value.shape)} must be (B,) = ({rows},).")
    if class_labels is not None and not is_tracing():
        validate_ids("class_labels", class_labels, classes + 1)


def text_positions(position_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
    """`position_ids`, or by default 0..L-1 as (1, L)."""
    if position_ids is not None:
        return position_ids
    return torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]


def check_positions(position_ids: Tensor | None, inputs_embeds: Tensor, rows: int) -> None:
    """Refuse positions outside a table of learned position embeddings.

    Args:
        position_ids: Positions, or None for 0..L-1.
        inputs_embeds: (B, L, D).
        rows: Rows of the table.

    Raises:
        ValueError: Naming the length or the position.
    """
    length = inputs_embeds.shape[1]
    if position_ids is None:
        if length > rows:
            raise ValueError(
                f"rows of {length} tokens are longer than the table of position embeddings (model_length={rows}); pass "
                f"at most {rows}."
            )
    elif not is_tracing():
        outside = (position_ids < 0) | (position_ids >= rows)
        if outside.any():
            raise ValueError(
                f"position_ids hold {position_ids[outside][0].item()}, outside the table of position embeddings, "
                f"[0, {rows})."
            )


def kept_positions(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Hidden states at the positions whose logits are wanted.

    Args:
        hidden: (B, L, D).
        logits_to_keep: The last n positions, 0 for all; columns (n,) or, for each row, (B, n); or a bool mask (B, L).

    Returns:
        (B, n, D), or (number selected, D) in row-major order for a mask.
    """
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:]
    if logits_to_keep.ndim == 2 and logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return hidden.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden[:, logits_to_keep]


def check_rows_hold_mask(rows: int | None, mask_token_id: int | None) -> None:
    """Raise ValueError if an embedding with this number of rows (None: unchanged) would have no row for [MASK]."""
    if rows is not None and mask_token_id is not None and rows <= mask_token_id:
        raise ValueError(f"{rows} rows would remove mask_token_id={mask_token_id}; keep at least {mask_token_id + 1}.")
