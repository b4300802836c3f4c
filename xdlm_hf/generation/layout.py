"""Batch layout of a generation: fixed, editable and masked positions.

Shapes: B batch, P prompt or given text, T total length (prompt and answer).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..diffusion.checks import validate_ids
from .blocks import num_blocks
from .option_checks import shown


@dataclass
class Layout:
    """Fixed, editable and masked positions of a batch."""

    ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), 0 at padding
    generated: Tensor  # (B, T) bool, positions that may change
    holes: Tensor  # (B, T) bool, positions to fill
    start: int  # first column that may change
    open_ended: bool  # whether the answer is appended to the text, and ends at its first end-of-text token
    class_labels: Tensor | None = None  # (B,), for networks with classes; None: the null class

    @property
    def length(self) -> int:
        return self.ids.shape[1] - self.start

    def repeated(self, times: int) -> "Layout":
        """The layout with each row repeated `times` times."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **{name: x.repeat_interleave(times, 0) for name, x in tensors.items()})


def padded(rows: Sequence[Sequence[int]], pad_token_id: int, side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows of ids as one batch: ids and attention mask, (B, P) int64, padded on one side."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return tuple(
        pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
        for tensors, value in ((ids, pad_token_id), (masks, 0))
    )


def continuation(input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Layout:
    """The prompt followed by `max_new_tokens` holes."""
    start = input_ids.shape[1]
    ids = torch.nn.functional.pad(input_ids, (0, max_new_tokens), value=0)
    attention_mask = torch.nn.functional.pad(attention_mask, (0, max_new_tokens), value=1)
    holes = torch.zeros_like(ids, dtype=torch.bool)
    holes[:, start:] = True
    return Layout(ids, attention_mask, holes, holes, start, open_ended=True)


def label_tensor(model: Any, class_labels: Tensor | Sequence[int], rows: int | None) -> Tensor:
    """Class labels of the rows, (B,) int64.

    Args:
        model: A `DiffusionModel`.
        class_labels: B integers, of which `model.num_classes` is the null class.
        rows: B, or None if the labels determine it.

    Raises:
        ValueError: If the model has no classes, or the labels do not fit it or the rows.
    """
    if model.num_classes is None:
        raise ValueError(f"class_labels were given, but {type(model).__name__} has no classes; leave them out.")
    labels = torch.as_tensor(class_labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool or not len(labels):
        raise ValueError(f"class_labels={shown(class_labels)} must be integers of shape (B,) with B >= 1.")
    if rows is not None and len(labels) != rows:
        raise ValueError(f"{len(labels)} class_labels do not fit input_ids of {rows} rows; give one label for each.")
    validate_ids("class_labels", labels, model.num_classes + 1)
    return labels.long()


def check_guidance(model: Any, cfg_scale: float | None, class_labels: Tensor | None) -> None:
    """Raise ValueError for guidance of a network with classes without labels: both sides would be the null class."""
    if cfg_scale and model.num_classes is not None and class_labels is None:
        raise ValueError(
            f"cfg_scale={cfg_scale} guides {type(model).__name__} against its null class and needs class_labels; pass "
            "them, or leave cfg_scale out."
        )


def default_steps(layout: Layout, block_length: int | None) -> int:
    """One step per token of the row with the most holes, rounded up to a multiple of the number of blocks."""
    most = max(int(layout.holes.sum(-1).max()), 1)
    blocks = 1 if block_length is None else num_blocks(layout.length, block_length)
    return min(-(-most // blocks) * blocks, layout.length)
