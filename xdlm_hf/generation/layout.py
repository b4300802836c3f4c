"""Batch layout of a generation: fixed, editable and masked positions.

Shapes: B batch, P prompt or given text, T whole length (prompt and answer).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .blocks import num_blocks


@dataclass
class Layout:
    """Fixed, editable and masked positions of a batch."""

    ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), 0 at padding
    generated: Tensor  # (B, T) bool, what may change
    holes: Tensor  # (B, T) bool, what is to be filled
    start: int  # first column that may change
    open_ended: bool  # the answer follows the text: it ends at its end-of-text token

    @property
    def length(self) -> int:
        return self.ids.shape[1] - self.start

    def repeated(self, times: int) -> "Layout":
        """Each row `times` times, one behind the other."""
        names = ("ids", "attention_mask", "generated", "holes")
        return replace(self, **{name: getattr(self, name).repeat_interleave(times, 0) for name in names})


def continuation(input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Layout:
    """Prompt, then `max_new_tokens` holes."""
    start = input_ids.shape[1]
    ids = torch.nn.functional.pad(input_ids, (0, max_new_tokens), value=0)
    attention_mask = torch.nn.functional.pad(attention_mask, (0, max_new_tokens), value=1)
    holes = torch.zeros_like(ids, dtype=torch.bool)
    holes[:, start:] = True
    return Layout(ids, attention_mask, holes, holes, start, open_ended=True)


def default_steps(layout: Layout, block_length: int | None) -> int:
    """One token a step: as many as the row with most holes has, rounded up to spread over the blocks."""
    most = max(int(layout.holes.sum(-1).max()), 1)
    blocks = 1 if block_length is None else num_blocks(layout.length, block_length)
    return min(-(-most // blocks) * blocks, layout.length)
