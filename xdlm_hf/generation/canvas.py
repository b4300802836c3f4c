"""State of a generation, and one step's view of it.

Shapes: B batch, T total length (prompt and answer), C columns of a step.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Canvas:
    """State of a generation, replaced (never modified) by each step."""

    ids: Tensor  # (B, T) int64
    holes: Tensor  # (B, T) bool, positions still to be filled
    generated: Tensor  # (B, T) bool, positions that may change: not the prompt, padding or fixed text
    num_edits: Tensor  # (B,) int64, filled tokens that were replaced by another token
    num_remasked: Tensor | None = None  # (B,) int64, filled tokens that became holes again; None without a policy
    undefined: Tensor | None = None  # (B,) bool, rows where a token with NaN confidence was written
    memory: dict[str, Tensor] = field(default_factory=dict)  # (B, ...) each, state of a policy or sampler
    confidence: Tensor | None = None  # (B, T) float32 when each token was written, NaN elsewhere; None: not recorded

    def select(self, rows: Tensor) -> "Canvas":
        """Some rows of the batch, (rows,)."""
        tensors = {name: x[rows] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors, memory={name: x[rows] for name, x in self.memory.items()})

    def frozen(self, rows: Tensor) -> "Canvas":
        """The canvas with no position left to fill or edit in some rows, (B,) bool."""
        others = ~rows[:, None]
        return replace(self, holes=self.holes & others, generated=self.generated & others)


@dataclass(frozen=True)
class StepView:
    """One step's view of the columns it has predictions for, (B, C) unless stated otherwise."""

    canvas: Canvas
    columns: Tensor  # int64
    valid: Tensor | None  # bool, False where a column repeats the last one as padding. None: all are valid
    ids: Tensor  # int64, current tokens
    holes: Tensor  # bool, holes of the current block
    editable: Tensor  # bool, filled by generation and open to change
    in_block: Tensor  # bool, in the current block
    predicted: Tensor  # int64
    conf_predicted: Tensor
    conf_current: Tensor
    step: int  # of the whole generation, from 0
    done: int  # steps of this block before this one
    steps_per_block: int
    fill_steps_left: int  # of the whole generation, this one included; 0 in a step that only refines
    polish_steps_left: int  # this one included, in a step that only refines; else 0
    generator: torch.Generator | None = None

    @property
    def disagrees(self) -> Tensor:
        """Filled tokens where the prediction is another token of at least the same confidence."""
        return self.editable & (self.predicted != self.ids) & (self.conf_predicted >= self.conf_current)

    def recall(self, name: str, default: int | float) -> Tensor:
        """The memory `name` at the columns, or the default if it is not stored yet."""
        kept = self.canvas.memory.get(name)
        return torch.full_like(self.conf_predicted, default) if kept is None else kept.gather(1, self.columns)

    def write(self, whole: Tensor, values: Tensor) -> Tensor:
        """`whole` (B, T) with the values at the columns; padding columns write the value of the last column."""
        if self.valid is not None:
            values = torch.where(self.valid, values, values[:, -1:])
        return whole.scatter(1, self.columns, values)
