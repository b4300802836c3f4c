"""Batch layout of a generation: fixed, editable and masked positions.

Shapes: B batch, P prompt or given text, T total length (prompt and answer).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .blocks import num_blocks


@dataclass
class Layout:
    """Fixed, editable and masked positions of a batch."""

    ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), 0 at padding
    generated: Tensor  # (B, T) bool, positions that may change
    holes: Tensor  # (B, T) bool, positions to fill
    start: int  # first column that may change
    open_ended: bool  # whether the answer is appended to the text, and ends at its first end-of-text token

    @property
    def length(self) -> int:
        return self.ids.shape[1] - self.start

    def repeated(self, times: int) -> "Layout":
        """The layout with each row repeated `times` times."""
        names = ("ids", "attention_mask", "generated", "holes")
        return replace(self, **{name: getattr(self, name).repeat_interleave(times, 0) for name in names})


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


def default_steps(layout: Layout, block_length: int | None) -> int:
    """One step per token of the row with the most holes, rounded up to a multiple of the number of blocks."""
    most = max(int(layout.holes.sum(-1).max()), 1)
    blocks = 1 if block_length is None else num_blocks(layout.length, block_length)
    return min(-(-most // blocks) * blocks, layout.length)
