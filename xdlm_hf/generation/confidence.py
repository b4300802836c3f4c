"""Sampler of Algorithm 1: low-confidence remasking with the refinement branch.

Shapes: B batch, T total length (prompt and answer), C columns or M positions of a step, N vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..diffusion.categorical import draw_from_weights, row_blocks, uniform
from ..diffusion.checks import work_dtype
from ..diffusion.ops.kernels import triton_rows
from .blocks import Blocks, check_blocks
from .canvas import Canvas, StepView
from .refinement import BudgetRefinement, NoRefinement, Refinement, most_confident
from .sampler import Request, Sampler

REMASKING = ("low_confidence", "random")


@dataclass(frozen=True)
class ConfidenceSettings:
    """Settings of a `ConfidenceSampler`.

    Args:
        mask_token_id: m, the id of unfilled positions; never predicted.
        mixing_ratio: k in [0, 1], which sets the default refinement.
        steps: Forward passes that fill, at least one per block and at most the answer's length; 0 to refine only.
        block_length: Columns of a block; blocks are filled from left to right. None: one block.
        temperature: 0 predicts the argmax; above it, a draw from softmax(logits / temperature).
        warp: Filter of the tempered logits before a draw, (M, N) to (M, N), that keeps the largest: top-k, top-p.
        remasking: "low_confidence", or "random" to choose the holes to fill at random.
        refinement: Policy for filled tokens; by default `BudgetRefinement(mixing_ratio)`, none at k = 0.
        polish_steps: Steps after filling that only refine; at temperature 0 they end at a step without a change.
        confidence_threshold: Fill every hole predicted with at least this confidence, and at least a_i holes.
        confidence_factor: Fill the n most confident holes, n the largest with (n + 1) (1 - c_n) < factor, c_n being
            the n-th confidence (Fast-dLLM's rule), and at least a_i holes.
        ends_early: End a block when it has no hole left, also without threshold and factor.

    Raises:
        ValueError: If the temperature is negative, or `remasking` is not known.
    """

    mask_token_id: int
    mixing_ratio: float
    steps: int
    block_length: int | None = None
    temperature: float = 0.0
    warp: Callable[[Tensor], Tensor] | None = None
    remasking: str = "low_confidence"
    refinement: Refinement | None = None
    polish_steps: int = 0
    confidence_threshold: float | None = None
    confidence_factor: float | None = None
    ends_early: bool = False

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must not be negative; 0 takes the most likely token.")
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking={self.remasking!r} is not known; choose one of {list(REMASKING)}.")

    @property
    def policy(self) -> Refinement:
        """`refinement`, or the default for k."""
        if self.refinement is not None:
            return self.refinement
        return BudgetRefinement(self.mixing_ratio) if self.mixing_ratio > 0 else NoRefinement()


class ConfidenceSampler(Sampler):
    """LLaDA's low-confidence remasking with the refinement branch, Algorithm 1 of the paper.

    Step i fills the a_i most confident holes of its block, where a_i is the same for all steps up to a remainder, which
    earlier steps take. A refinement policy then revises filled tokens, by default within XDLM's budget. k = 0 is
    LLaDA's sampler. With a confidence threshold or factor a step may fill more, and a block without holes ends early.

    Args:
        settings: Settings that do not depend on the text.
        start, length: The answer is the columns [start, start + length).
        generator: Source of randomness.

    Raises:
        ValueError: If lengths and steps do not fit each other (`check_blocks`).
    """

    records_confidence = True

    def __init__(self, settings: ConfidenceSettings, start: int, length: int, generator: torch.Generator | None = None):
        self.block_length = length if settings.block_length is None else settings.block_length
        if settings.steps or not settings.polish_steps:
            check_blocks(settings.steps, length, self.block_length)
        self.settings, self.start, self.length, self.generator = settings, start, length, generator
        fills_by_confidence = settings.confidence_threshold is not None or settings.confidence_factor is not None
        self.adaptive = settings.ends_early or fills_by_confidence
        self.refinement = settings.policy
        self.may_edit, self.may_remask = self.refinement.edits, self.refinement.remasks
        self.fill_steps, self.steps = settings.steps, settings.steps + settings.polish_steps
        self.blocks = Blocks(start, length, self.block_length, settings.steps)

    def begin(self, ids: Tensor, generated: Tensor, holes: Tensor | None = None) -> Canvas:
        holes = generated if holes is None else holes
        zeros = torch.zeros_like(ids[:, 0])
        return Canvas(
            torch.where(holes, self.settings.mask_token_id, ids), holes, generated, zeros, zeros, zeros.bool()
        )

    def request(self, canvas: Canvas, i: int) -> Request:
        """The columns that can change: the current block, and with refinement the answer before it."""
        first, end = self.block(i)
        return Request(i, columns=torch.arange(self.start if self.may_edit else first, end, device=canvas.ids.device))

    def step(self, canvas: Canvas, logits: Tensor, request: Request) -> Canvas:
        """1. Predict. 2. Re-mask. 3. Fill the most confident holes. 4. Edit by the policy. 5. Update the canvas."""
        # 1.
        view = self._view(canvas, logits, request)
        # 2.
        remasked = self.refinement.remask(view)
        view = replace(view, editable=view.editable & ~remasked)
        # 3.
        priority = view.conf_predicted
        if self.settings.remasking == "random":
            priority = uniform(priority.shape, self.generator, priority.device)
        fill = most_confident(priority, view.holes, self._fill_count(view) + remasked.sum(-1))
        # 4.
        edit = self.refinement.edit(view, fill)
        view, fill, edit = self._agreeing(view, fill, edit, remasked)
        tokens = torch.where(fill | edit, view.predicted, torch.where(remasked, self.settings.mask_token_id, view.ids))
        # 5.
        holes = canvas.holes.gather(1, view.columns)
        confidence = canvas.confidence
        if confidence is not None:
            kept = confidence.gather(1, view.columns).masked_fill(remasked, torch.nan)
            confidence = view.write(confidence, torch.where(fill | edit, view.conf_predicted.to(kept.dtype), kept))
        return replace(
            canvas,
            ids=view.write(canvas.ids, tokens),
            holes=view.write(canvas.holes, (holes & ~fill) | remasked),
            num_edits=canvas.num_edits + edit.sum(-1),
            num_remasked=canvas.num_remasked + remasked.sum(-1),
            undefined=canvas.undefined | (view.conf_predicted.isnan() & (fill | edit)).any(-1),
            memory=self.refinement.remember(view, fill, edit),
            confidence=confidence,
        )

    def _view(self, canvas: Canvas, logits: Tensor, request: Request) -> StepView:
        i, columns = request.i, request.columns.expand(canvas.ids.shape[0], -1)
        done, steps_per_block = self.blocks.step_in_block(0 if self.polishing(i) else i)
        ids, holes, generated = (x.gather(1, columns) for x in (canvas.ids, canvas.holes, canvas.generated))
        editable = generated & ~holes & self.active_rows(canvas, i)[:, None]
        predicted, conf_predicted, conf_current = self._predictions(logits, ids, holes, editable)
        if request.valid is not None:
            holes, editable = holes & request.valid, editable & request.valid
        return StepView(
            canvas=canvas,
            columns=columns,
            valid=request.valid,
            ids=ids,
            holes=holes,
            editable=editable,
            in_block=columns >= self.block(i)[0],
            predicted=predicted,
            conf_predicted=conf_predicted,
            conf_current=conf_current,
            step=i,
            done=done,
            steps_per_block=steps_per_block,
            fill_steps_left=max(self.fill_steps - i, 0),
            polish_steps_left=self.steps - i if self.polishing(i) else 0,
            generator=self.generator,
        )

    def _predictions(
        self, logits: Tensor, ids: Tensor, holes: Tensor, editable: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `predict`; also gets which columns are holes and which are editable, (B, C) bool each."""
        return self.predict(logits, ids)

    def _agreeing(
        self, view: StepView, fill: Tensor, edit: Tensor, remasked: Tensor
    ) -> tuple[StepView, Tensor, Tensor]:
        """The predictions, fills and edits to commit, if not all of them can be committed together."""
        return view, fill, edit

    def predict(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted ids, and the confidence of predicted and of current ids under the untempered float32 softmax.

        Converts the logits (B, C, N), of any dtype, a few rows at a time, to save memory; on a GPU and at temperature 0
        a Triton kernel reads them once.
        """
        shape, logits, ids = ids.shape, logits.flatten(0, 1), ids.flatten()
        kernels = triton_rows(logits, [self.settings.mask_token_id])
        if kernels is not None and self.settings.temperature == 0:
            predicted, found = kernels.confidences(logits, ids, self.settings.mask_token_id)
            return predicted.view(shape), found[:, 0].view(shape), found[:, 1].view(shape)
        u = uniform((len(ids), 1), self.generator, ids.device) if self.settings.temperature > 0 else None
        predicted, wide = torch.empty_like(ids), work_dtype(logits)
        confidences = torch.empty(2, len(ids), dtype=wide, device=ids.device)
        scratch = None
        for rows in row_blocks(len(ids), logits):
            if scratch is None:  # the first block is the largest
                scratch = torch.empty_like(logits[rows], dtype=wide)
            block = scratch[: rows.stop - rows.start].copy_(logits[rows])
            block[:, self.settings.mask_token_id] = -torch.inf
            top, argmax = block.max(-1, keepdim=True)  # the first of equals, and three times as fast as argmax
            predicted[rows] = argmax.squeeze(-1) if u is None else self._draw(block, top, u[rows])
            both = torch.stack([predicted[rows], ids[rows]])
            # exp(l - max) / sum, not exp(l - logsumexp), which cannot distinguish 1 - 1e-6 from 1.
            exponents = block.gather(-1, both.T).sub_(top)
            confidences[:, rows] = (exponents.exp_() / block.sub_(top).exp_().sum(-1, keepdim=True)).T
        return predicted.view(shape), confidences[0].view(shape), confidences[1].view(shape)

    def _draw(self, logits: Tensor, top: Tensor, u: Tensor) -> Tensor:
        """Tokens at the quantiles u (M, 1) of softmax(warp(logits / temperature)); logits (M, N) with maximum `top`."""
        tempered = (logits - top).div_(self.settings.temperature)  # differences first, so that exp cannot overflow
        tempered = tempered if self.settings.warp is None else self.settings.warp(tempered)
        return draw_from_weights(tempered.exp_(), u)

    def block(self, i: int) -> tuple[int, int]:
        if self.polishing(i):
            return self.start, self.start + self.length
        return self.blocks.columns[self.blocks.block_of(i)]

    @property
    def most_columns(self) -> int:
        """The largest number of columns that a step requests."""
        return self.length if self.may_edit else min(self.block_length, self.length)

    def most_edited(self, i: int) -> int:
        """Upper bound of the tokens before the block of step `i` that one step edits in a row."""
        return min(self.refinement.most_edits(self.length), self.block(i)[0] - self.start)

    def active_rows(self, canvas: Canvas, i: int) -> Tensor:
        """If blocks may end early, the rows whose block has holes, so that a row does not depend on the batch."""
        if not self.adaptive or self.polishing(i):
            return super().active_rows(canvas, i)
        first, end = self.block(i)
        return canvas.holes[:, first:end].any(-1)

    def next_step(self, before: Canvas, after: Canvas, i: int) -> int:
        if self.polishing(i):
            final = self.final_rows(before, after, i)
            return self.steps if final is not None and bool(final.all()) else i + 1
        if self.adaptive and self._is_full(after, i):
            return self._skip_full_blocks(after, self.blocks.next_block(i))
        return self._skip_full_blocks(after, i + 1)

    def polishing(self, i: int) -> bool:
        return i >= self.fill_steps

    def final_rows(self, before: Canvas, after: Canvas, i: int) -> Tensor | None:
        if not self.polishing(i) or self.settings.temperature > 0:
            return None
        return (before.ids == after.ids).all(-1)

    def first_step(self, canvas: Canvas) -> int:
        return self._skip_full_blocks(canvas, 0)

    def _skip_full_blocks(self, canvas: Canvas, i: int) -> int:
        while (
            self.adaptive and i < self.fill_steps and self.blocks.step_in_block(i)[0] == 0 and self._is_full(canvas, i)
        ):
            i = self.blocks.next_block(i)
        return i

    def _is_full(self, canvas: Canvas, i: int) -> bool:
        first, end = self.block(i)
        return not canvas.holes[:, first:end].any()

    def _fill_count(self, view: StepView) -> Tensor:
        """Number of holes that a step fills, (B,): a_i, or more by threshold or factor."""
        count = self._fill_quota(view)
        confidence = torch.where(view.holes, view.conf_predicted, 0.0)
        if self.settings.confidence_threshold is not None:
            count = torch.maximum(count, (view.holes & (confidence >= self.settings.confidence_threshold)).sum(-1))
        if self.settings.confidence_factor is not None:
            falling = confidence.sort(dim=-1, descending=True).values
            n = torch.arange(1, falling.shape[-1] + 1, device=falling.device)
            within_factor = (n + 1) * (1 - falling) < self.settings.confidence_factor
            count = torch.maximum(count, within_factor.long().cumprod(-1).sum(-1))
        return count

    def _fill_quota(self, view: StepView) -> Tensor:
        """a_i, (B,): the block's holes over its remaining steps, rounded up, so earlier steps take the remainder."""
        steps_left = max(view.steps_per_block - view.done, 1)
        return (view.holes.sum(-1) + steps_left - 1) // steps_left
