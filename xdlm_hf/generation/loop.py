"""The loop around a sampler: the network where a step needs it, and which rows are still at work.

`generate` resolves what the user asked for and calls `denoise`. Costs are counted in forward passes.

Shapes: B batch, R <= B rows still at work, T whole length (prompt and answer), N rows of the output layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteriaList

from .canvas import Canvas
from .network import Network
from .sampler import Sampler

# Steps between checks for rows at end-of-text, each of which synchronizes with the device.
_STEPS_BETWEEN_CHECKS = 4


class Finished:
    """Which rows need no more steps, and what becomes of the text after their end.

    Args:
        options: A resolved `XDLMGenerationConfig`.
        criteria: The user's, asked after each block.
        answer: (B, T) bool, where an end-of-text token counts; None: nowhere.
        may_change: Whether a token once filled may still change.

    Raises:
        ValueError: If there are criteria and no padding token for what follows the end.
    """

    def __init__(self, options: Any, criteria: StoppingCriteriaList | None, answer: Tensor | None, may_change: bool):
        self.options, self.answer = options, answer
        self.criteria = StoppingCriteriaList(criteria) if criteria else None
        self.ends: Tensor | None = None  # (B,) column after which a row is padding
        if criteria and options.pad_token_id is None:
            raise ValueError("stopping_criteria need a pad_token_id for what follows the end of a row; pass one.")
        pads = bool(options.end_of_text) and options.pad_token_id is not None
        self.cuts = pads and answer is not None
        # Where tokens may still change, leaving at end-of-text is a choice that can change the text.
        wanted = (not may_change) if options.early_stop is None else options.early_stop
        self.leaves_at_end_of_text = self.cuts and wanted and options.sampler == "confidence"

    def after_block(self, ids: Tensor, rows: Tensor, block_end: int) -> Tensor:
        """Ask the criteria about the batch (B, T) up to `block_end`; (R,) bool, which of `rows` (R,) are done.

        About the whole batch, also when rows have left it: a criterion may know its rows by their place.
        """
        if self.ends is None:
            self.ends = torch.full_like(self.answer[:, 0], ids.shape[1], dtype=torch.long)
        done = self.criteria(self.pad(ids)[:, :block_end], None).to(ids.device)[rows]
        self.ends[rows] = torch.where(done, self.ends[rows].clamp_max(block_end), self.ends[rows])
        return done

    def at_end_of_text(self, before: Canvas, after: Canvas, rows: Tensor) -> Tensor:
        """(R,) bool: rows with an end-of-text token, no hole before it, and nothing before it edited in this step."""
        is_eos = self._is_eos(after.ids, rows) & ~after.holes
        until = is_eos.long().cumsum(-1) == 0
        open_before = (after.holes | (after.generated & (before.ids != after.ids) & ~before.holes)) & until
        return is_eos.any(-1) & ~open_before.any(-1)

    def pad(self, ids: Tensor) -> Tensor:
        """(B, T) ids with padding after the block in which a criterion was met, and after the first end-of-text."""
        after = self._after_end(ids)
        return ids if after is None else torch.where(after, self.options.pad_token_id, ids)

    def num_tokens(self, holes: Tensor, ids: Tensor) -> Tensor:
        """(B,) int64, the holes (B, T) that were filled, up to the row's end."""
        after = self._after_end(ids)
        return (holes if after is None else holes & ~after).sum(-1)

    def _after_end(self, ids: Tensor) -> Tensor | None:
        """(B, T) bool, what follows the end of its row; None while no row can have one."""
        after = None
        if self.ends is not None:
            after = torch.arange(ids.shape[1], device=ids.device) >= self.ends[:, None]
        if self.cuts:
            is_eos = self._is_eos(ids, slice(None))
            behind = (is_eos.cumsum(-1) - is_eos.long() > 0) & self.answer
            after = behind if after is None else after | behind
        return after

    def _is_eos(self, ids: Tensor, rows: Tensor | slice) -> Tensor:
        eos = torch.tensor(self.options.end_of_text, device=ids.device)
        return torch.isin(ids, eos) & self.answer[rows]


@dataclass
class Progress:
    """The whole batch while some of its rows have left: (B, T) ids, (B,) counts."""

    canvas: Canvas
    passes: Tensor  # (B,) int64, forward passes that a row had something to do in
    rows: Tensor  # (R,) int64, the rows still at work

    def update(self, live: Canvas) -> None:
        """Write the state of the live rows back."""
        if len(self.rows) == len(self.passes):
            self.canvas = live
            return
        merged = {name: getattr(self.canvas, name).index_copy(0, self.rows, getattr(live, name)) for name in _PER_ROW}
        self.canvas = replace(self.canvas, **merged)


_PER_ROW = ("ids", "holes", "num_edits", "num_remasked", "undefined")


def denoise(
    network: Network,
    sampler: Sampler,
    canvas: Canvas,
    finished: Finished,
    observe: Callable[[Tensor, int | None], None] | None = None,
) -> Progress:
    """Run a sampler to its end.

    Per step: 1. what the sampler needs, 2. the network there, 3. the sampler, 4. whoever watches, 5. rows that are done
    leave the batch.

    Args:
        network, sampler, finished: The parts.
        canvas: The sampler's first canvas.
        observe: Called after each step with the whole batch's ids (B, T), and with the end column of a block that the
            step completed, else None.
    """
    batch = canvas.ids.shape[0]
    progress = Progress(canvas, torch.zeros_like(canvas.num_edits), torch.arange(batch, device=canvas.ids.device))
    i = sampler.first_step(canvas)
    while i < sampler.steps:
        # 1.
        request = sampler.request(canvas, i)
        before, passes = canvas, network.num_forward_passes
        working = sampler.working_rows(canvas, i)
        # 2.
        if request.mask is None:
            logits, request = network.at_columns(canvas.ids, request, sampler)
        else:
            logits = network.at_mask(canvas.ids, request.mask, request.t)
        # 3.
        canvas = sampler.step(canvas, logits, request)
        progress.passes[progress.rows] += working * (network.num_forward_passes - passes)
        progress.update(canvas)
        following = sampler.next_step(before, canvas, i)
        block_end = sampler.block_end(i, following)
        # 4.
        if observe is not None:
            observe(progress.canvas.ids, block_end)
        # 5.
        done = _done(sampler, finished, before, canvas, progress, block_end, i)
        if done is not None and bool(done.any()):
            if bool(done.all()):
                break
            stay = (~done).nonzero().squeeze(-1)
            progress.rows, canvas = progress.rows[stay], canvas.select(stay)
            network.select(stay)
        i = following
    return progress


def _done(
    sampler: Sampler,
    finished: Finished,
    before: Canvas,
    after: Canvas,
    progress: Progress,
    block_end: int | None,
    i: int,
) -> Tensor | None:
    """(R,) bool, the rows that need no more steps; None where it was not asked."""
    reasons = [sampler.settled_rows(before, after, i)]
    if block_end is not None and finished.criteria:
        reasons.append(finished.after_block(progress.canvas.ids, progress.rows, block_end))
    if finished.leaves_at_end_of_text and (sampler.adaptive or i % _STEPS_BETWEEN_CHECKS == 0 or block_end is not None):
        reasons.append(finished.at_end_of_text(before, after, progress.rows))
    known = [reason for reason in reasons if reason is not None]
    return torch.stack(known).any(0) if known else None
