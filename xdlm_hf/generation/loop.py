"""The denoising loop: sampler and network in turn, until all rows are done.

`generate` resolves the options and calls `denoise`. Costs are counted in forward passes.

Shapes: B batch, R <= B active rows, T total length (prompt and answer).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.generation import StoppingCriteriaList

from .canvas import Canvas
from .compatibility import StopStrings
from .network import Network
from .options import Options
from .sampler import Sampler

# Steps between checks for end-of-text, each of which synchronizes with the device.
_STEPS_BETWEEN_CHECKS = 4


class StoppingRules:
    """Decides which rows are done, and pads what follows the end of a row.

    Args:
        options: The resolved options.
        criteria: The user's stopping criteria, called after each block.
        answer: (B, T) bool, where an end-of-text token ends the row; None: nowhere.
        may_change: Whether a filled token may still change.
        stops: The stop strings, which end a row as an end-of-text token does.

    Raises:
        ValueError: If there are criteria but no padding token.
    """

    def __init__(
        self,
        options: Options,
        criteria: StoppingCriteriaList | None,
        answer: Tensor | None,
        may_change: bool,
        stops: StopStrings | None = None,
    ):
        self.options, self.answer, self.stops = options, answer, stops
        self.criteria = StoppingCriteriaList(criteria) if criteria else None
        self.ends: Tensor | None = None  # (B,) column from which a row is padding
        if criteria and options.pad_token_id is None:
            raise ValueError("stopping_criteria need pad_token_id, to pad what follows the end of a row; pass one.")
        pads = stops is not None or (bool(options.end_of_text) and options.pad_token_id is not None)
        self.pads_after_end_of_text = pads and answer is not None
        # Made once: a copy from the host synchronizes with the device.
        device = None if answer is None else answer.device
        self.end_of_text = torch.tensor(options.end_of_text, device=device, dtype=torch.long)
        # If tokens may still change, stopping at end-of-text can change the text, so it is not the default.
        wanted = (not may_change) if options.early_stop is None else options.early_stop
        self.stops_at_end_of_text = self.pads_after_end_of_text and wanted and options.sampler == "confidence"

    def stopped_after_block(self, ids: Tensor, rows: Tensor, block_end: int) -> Tensor:
        """Call the criteria on the batch (B, T) up to `block_end`; (R,) bool, which of `rows` (R,) are done.

        They get all B rows, also those that are done, because a criterion may depend on a row's index.
        """
        if self.ends is None:
            self.ends = torch.full_like(self.answer[:, 0], ids.shape[1], dtype=torch.long)
        done = self.criteria(self.pad(ids)[:, :block_end], None).to(ids.device)[rows]
        self.ends[rows] = torch.where(done, self.ends[rows].clamp_max(block_end), self.ends[rows])
        return done

    def stopped_at_end_of_text(self, before: Canvas, after: Canvas, rows: Tensor) -> Tensor:
        """(R,) bool: rows that end with an end-of-text token or a stop string, without a hole or an edit of this step
        before it.
        """
        is_eos = self._is_eos(after.ids, rows) & ~after.holes
        before_eos = is_eos.long().cumsum(-1) == 0
        unfinished = (after.holes | (after.generated & (before.ids != after.ids) & ~before.holes)) & before_eos
        return is_eos.any(-1) & ~unfinished.any(-1)

    def pad(self, ids: Tensor) -> Tensor:
        """(B, T) ids with padding after the block in which a criterion was met, and after the first end-of-text or stop
        string.
        """
        after = self.after_end(ids)
        return ids if after is None else torch.where(after, self.options.pad_token_id, ids)

    def num_tokens(self, holes: Tensor, ids: Tensor) -> Tensor:
        """(B,) int64, the number of holes (B, T) before the row's end."""
        after = self.after_end(ids)
        return (holes if after is None else holes & ~after).sum(-1)

    def after_end(self, ids: Tensor) -> Tensor | None:
        """(B, T) bool, positions after the end of their row; None if no row can have an end."""
        after = None
        if self.ends is not None:
            after = torch.arange(ids.shape[1], device=ids.device) >= self.ends[:, None]
        if self.pads_after_end_of_text:
            is_eos = self._is_eos(ids, slice(None))
            after_eos = (is_eos.cumsum(-1) - is_eos.long() > 0) & self.answer
            after = after_eos if after is None else after | after_eos
        return after

    def _is_eos(self, ids: Tensor, rows: Tensor | slice) -> Tensor:
        ends = torch.isin(ids, self.end_of_text)
        if self.stops is not None:
            ends = ends | self.stops.complete_at(ids)
        return ends & self.answer[rows]


@dataclass
class Progress:
    """State of the whole batch, of which only some rows are active."""

    canvas: Canvas  # of all B rows
    passes: Tensor  # (B,) int64, forward passes in which the row was active
    rows: Tensor  # (R,) int64, indices of the active rows
    finished: Tensor | None = None  # (B,) bool, rows that are done but stay in the batch, at fixed shapes

    def update(self, active: Canvas) -> None:
        """Write the canvas of the active rows back."""
        if len(self.rows) == len(self.passes):
            self.canvas = active
            return
        names = _PER_ROW if active.confidence is None else (*_PER_ROW, "confidence")
        merged = {name: getattr(self.canvas, name).index_copy(0, self.rows, getattr(active, name)) for name in names}
        self.canvas = replace(self.canvas, **merged)

    def remove(self, done: Tensor, active: Canvas, network: Network) -> Canvas:
        """The active rows without those that are done, (R,) bool; at fixed shapes these stay and never change."""
        if network.fixed_shapes:
            self.finished = done
            return active.frozen(done)
        stay = (~done).nonzero().squeeze(-1)
        self.rows = self.rows[stay]
        network.select(stay)
        return active.select(stay)


_PER_ROW = ("ids", "holes", "num_edits", "num_remasked", "undefined")


def denoise(
    network: Network,
    sampler: Sampler,
    canvas: Canvas,
    stopping: StoppingRules,
    observe: Callable[[Canvas, int | None], None] | None = None,
) -> Progress:
    """Run all steps of a sampler.

    Per step: 1. the sampler's request, 2. the network, 3. the sampler's step, 4. the observer, 5. removal of the rows
    that are done.

    Args:
        network: Computes logits.
        sampler: Decides what to keep of them.
        canvas: The sampler's first canvas.
        stopping: Decides which rows are done.
        observe: Called after each step with the whole batch's canvas, and with the end column of a block that the step
            completed, else None.
    """
    batch = canvas.ids.shape[0]
    progress = Progress(canvas, torch.zeros_like(canvas.num_edits), torch.arange(batch, device=canvas.ids.device))
    i = sampler.first_step(canvas)
    while i < sampler.steps:
        # 1.
        request = sampler.request(canvas, i)
        before, passes = canvas, network.num_forward_passes
        active = sampler.active_rows(canvas, i)
        if progress.finished is not None:
            active = active & ~progress.finished
        # 2.
        if request.mask is None:
            logits, request = network.at_columns(canvas.ids, request, sampler)
        else:
            logits = network.at_mask(canvas.ids, request.mask, request.t)
        # 3.
        canvas = sampler.step(canvas, logits, request)
        progress.passes[progress.rows] += active * (network.num_forward_passes - passes)
        progress.update(canvas)
        following = sampler.next_step(before, canvas, i)
        block_end = sampler.block_end(i, following)
        # 4.
        if observe is not None:
            observe(progress.canvas, block_end)
        # 5.
        done = _done(sampler, stopping, before, canvas, progress, block_end, i)
        if done is not None and bool(done.any()):
            if bool(done.all()):
                break
            canvas = progress.remove(done, canvas, network)
        i = following
    return progress


def _done(
    sampler: Sampler,
    stopping: StoppingRules,
    before: Canvas,
    after: Canvas,
    progress: Progress,
    block_end: int | None,
    i: int,
) -> Tensor | None:
    """(R,) bool, the rows that need no more steps; None if this was not checked."""
    reasons = [sampler.final_rows(before, after, i)]
    if block_end is not None and stopping.criteria:
        reasons.append(stopping.stopped_after_block(progress.canvas.ids, progress.rows, block_end))
    if stopping.stops_at_end_of_text and (sampler.adaptive or i % _STEPS_BETWEEN_CHECKS == 0 or block_end is not None):
        reasons.append(stopping.stopped_at_end_of_text(before, after, progress.rows))
    known = [reason for reason in reasons if reason is not None]
    if known and progress.finished is not None:
        known.append(progress.finished)
    return torch.stack(known).any(0) if known else None
