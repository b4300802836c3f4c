"""Interface of samplers: `begin` a canvas, then for each step `request`, run the network, `step`.

A `Canvas` holds the sequences of all rows. `request` returns the positions whose logits a step needs; the caller runs
the network there, and `step` uses the logits. Steps are vectorised over the batch and do not loop over rows.

Shapes: B batch, T total length (prompt and answer), C columns or M positions of a request, N vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.reverse import StepDraw
from .canvas import Canvas


@dataclass(frozen=True)
class Request:
    """Positions whose logits step `i` needs: either `columns` or `mask`; the other is None."""

    i: int
    columns: Tensor | None = None  # (C,), or (B, C) by row; their logits are (B, C, N)
    valid: Tensor | None = None  # (B, C) bool, False for columns that only pad a row; None: all are valid
    mask: Tensor | None = None  # (B, T) bool, M positions; their logits come in row-major order, in chunks (m, N)
    t: float | None = None  # time of the step, for networks with time conditioning; None if the sampler has no times
    draw: StepDraw | None = None  # random choices that an ancestral step has made


class Sampler(ABC):
    """Interface of samplers, see the module."""

    steps: int
    may_edit = True  # False: no token before the current block changes
    may_remask = False  # True: a token of the current block may become a hole again
    adaptive = False  # True: a block may end before its last step, so each step synchronizes with the device
    records_confidence = False  # True: a step writes its tokens' confidences to `Canvas.confidence`, if there is one

    @abstractmethod
    def begin(self, ids: Tensor, generated: Tensor, holes: Tensor | None = None) -> Canvas:
        """Canvas before the first step.

        Args:
            ids: (B, T).
            generated: (B, T) bool, positions that may change.
            holes: (B, T) bool, those of them to fill; default all.
        """

    @abstractmethod
    def request(self, canvas: Canvas, i: int) -> Request:
        """First half of step `i`, counted from 0: the positions whose logits it needs."""

    @abstractmethod
    def step(self, canvas: Canvas, logits: Tensor | Iterable[Tensor], request: Request) -> Canvas:
        """Second half: the next canvas, from the logits of the request."""

    @abstractmethod
    def block(self, i: int) -> tuple[int, int]:
        """The columns [first, end) of the block of step `i`."""

    def first_step(self, canvas: Canvas) -> int:
        """The first step to run; `steps` if there is none."""
        return 0

    def next_step(self, before: Canvas, after: Canvas, i: int) -> int:
        """The step after `i`, given the canvas before and after `i`; `steps` if there is none."""
        return i + 1

    def polishing(self, i: int) -> bool:
        """Whether step `i` comes after the last one that fills."""
        return False

    def final_rows(self, before: Canvas, after: Canvas, i: int) -> Tensor | None:
        """(B,) bool, the rows that no step after `i` will change; None if unknown."""
        return None

    def active_rows(self, canvas: Canvas, i: int) -> Tensor:
        """(B,) bool, the rows that step `i` may change."""
        return torch.ones_like(canvas.num_edits, dtype=torch.bool)

    def block_end(self, i: int, following: int) -> int | None:
        """End column of the block of step `i` if the next step, `following`, belongs to another block; else None."""
        block = self.block(i)
        return block[1] if following >= self.steps or self.block(following) != block else None
