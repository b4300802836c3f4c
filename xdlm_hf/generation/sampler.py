"""The interface of samplers: `begin` a canvas, then for each step `request`, run the network, `step`.

A sampler owns a `Canvas`, the whole sequence of every row. `request` says where a step needs logits, `step` uses them;
in between the caller runs the network. Everything is vectorised over the batch: no step loops over rows or synchronizes
with the device because of one.

Shapes: B batch, T whole length (prompt and answer), C columns or M positions asked for, N vocabulary.
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
    """What step `i` needs of the network: logits of columns, or of a mask; the other one is None."""

    i: int
    columns: Tensor | None = None  # (C,), or (B, C) for each row: answered by logits (B, C, N)
    valid: Tensor | None = None  # (B, C) bool, columns that count, where some only fill a row up
    mask: Tensor | None = None  # (B, T) bool, M positions: answered by their logits in row-major order, chunks (m, N)
    t: float | None = None  # the time of the step, for networks that take it; None: the sampler knows none
    draw: StepDraw | None = None  # what an ancestral step has drawn already


class Sampler(ABC):
    """Interface: `begin` a canvas, then for each step `request`, run the network, `step`."""

    steps: int
    may_edit = True  # False: no token outside the current block changes any more
    may_remask = False  # True: a token inside it may become a hole again
    adaptive = False  # True: a block may end before its steps are used up, so each step waits for the device

    @abstractmethod
    def begin(self, ids: Tensor, generated: Tensor, holes: Tensor | None = None) -> Canvas:
        """Canvas before the first step; `ids` are (B, T), `generated` (B, T) marks the positions that may change, and
        `holes` those of them to fill, by default all."""

    @abstractmethod
    def request(self, canvas: Canvas, i: int) -> Request:
        """First half of step `i`, from 0: where logits are needed."""

    @abstractmethod
    def step(self, canvas: Canvas, logits: Tensor | Iterable[Tensor], request: Request) -> Canvas:
        """Second half: the logits asked for in, the next canvas out."""

    @abstractmethod
    def block(self, i: int) -> tuple[int, int]:
        """The columns [first, end) that step `i` is about."""

    def first_step(self, canvas: Canvas) -> int:
        """The step to begin with; `steps` when there is nothing to do."""
        return 0

    def next_step(self, before: Canvas, after: Canvas, i: int) -> int:
        """The step that follows `i`, which led from one canvas to the other; `steps` when there is none."""
        return i + 1

    def polishing(self, i: int) -> bool:
        """Whether step `i` comes after the last one that fills."""
        return False

    def settled_rows(self, before: Canvas, after: Canvas, i: int) -> Tensor | None:
        """(B,) bool, the rows that no step after `i` will change; None where that is not known."""
        return None

    def working_rows(self, canvas: Canvas, i: int) -> Tensor:
        """(B,) bool, the rows that step `i` has something to do for; the others wait for them."""
        return torch.ones_like(canvas.num_edits, dtype=torch.bool)

    def block_end(self, i: int, following: int) -> int | None:
        """End column of the block of step `i` when the step `following` it belongs to another, else None."""
        block = self.block(i)
        return block[1] if following >= self.steps or self.block(following) != block else None
