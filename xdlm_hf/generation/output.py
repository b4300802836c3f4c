"""Return value of `generate`, and the observer that feeds its history and streamer.

Shapes: B batch, T total length (prompt and answer).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import TextStreamer
from transformers.utils import ModelOutput

from .canvas import Canvas
from .loop import StoppingRules
from .option_checks import shown
from .options import Options
from .sampler import Sampler


@dataclass
class DiffusionGenerateOutput(ModelOutput):
    """
    Output of [`XDLMGenerationMixin.generate`].

    Args:
        sequences (`torch.LongTensor` of shape `(B, T)`): Prompt and answer.
        num_forward_passes (`int`):
            Network evaluations per row: one for each step, two with guidance, none for an ancestral step that needs no
            logits.
        num_edits (`torch.LongTensor` of shape `(B,)`): Filled tokens that were replaced by another token.
        num_remasked (`torch.LongTensor` of shape `(B,)`): Filled tokens that became holes again.
        row_forward_passes (`torch.LongTensor` of shape `(B,)`):
            Evaluations in which the row was active; fewer than `num_forward_passes` if it was done before others.
        tokens_per_forward (`torch.FloatTensor` of shape `(B,)`):
            Tokens of the answer, up to its end-of-text token, per active evaluation of the row.
        history (`tuple[torch.LongTensor]`, *optional*):
            The `(B, T)` ids before the first step and after each, with `output_history=True`.
        confidences (`tuple[torch.FloatTensor]`, *optional*):
            For each state of the history, `(B, T)`: the probability, without temperature, that the network gave a token
            in the step that wrote it; NaN for holes and given text. None for the ancestral sampler, which has no
            confidences, and with `reference_compat=True`.
    """

    sequences: torch.LongTensor | None = None
    num_forward_passes: int | None = None
    num_edits: torch.LongTensor | None = None
    num_remasked: torch.LongTensor | None = None
    row_forward_passes: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    history: tuple[torch.LongTensor, ...] | None = None
    confidences: tuple[torch.FloatTensor, ...] | None = None


class StepObserver:
    """Passes the canvas of the whole batch to the history and the streamer after each step."""

    def __init__(self, options: Options, streamer: Any, sampler: Sampler, stopping: StoppingRules, start: int):
        if streamer is not None:
            _check_streamer(streamer, options)
        self.streamer, self.stopping = streamer, stopping
        self.num_put = start  # columns that the streamer got by `put`
        # A block is final when it ends, unless a later step may still edit it.
        self.puts_blocks = not sampler.may_edit
        self.history: tuple[Tensor, ...] | None = () if options.output_history else None
        self.confidences = self.history if sampler.records_confidence else None
        self._streams_confidences = sampler.records_confidence and hasattr(streamer, "put_confidences")
        self.wants_confidences = self._streams_confidences or self.confidences is not None

    def begin(self, canvas: Canvas) -> None:
        self._record(canvas)
        if self.streamer is not None:
            self.streamer.put(canvas.ids[:, : self.num_put].cpu())

    def __call__(self, canvas: Canvas, block_end: int | None) -> None:
        self._record(canvas)
        if self.streamer is None:
            return
        ids = canvas.ids
        if self._streams_confidences:
            self.streamer.put_confidences(value=canvas.confidence[:, self.num_put :].cpu())
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(value=ids[:, self.num_put :].cpu())
        if self.puts_blocks and block_end is not None and self.num_put < block_end < ids.shape[1]:
            self._put(self.stopping.pad(ids), block_end)

    def end(self, ids: Tensor) -> None:
        if self.streamer is None:
            return
        if self.num_put < ids.shape[1]:
            self._put(ids, ids.shape[1])
        self.streamer.end()

    def _record(self, canvas: Canvas) -> None:
        if self.history is not None:
            self.history += (canvas.ids,)
        if self.confidences is not None:
            self.confidences += (canvas.confidence,)

    def _put(self, ids: Tensor, end: int) -> None:
        """Pass the columns up to `end` that were not put yet, of the padded ids (B, T)."""
        columns = slice(self.num_put, end)
        self.num_put = end
        new = ids[:, columns].cpu()
        # It prints all it gets, and takes one row only; other streamers get every column.
        after = self.stopping.after_end(ids) if isinstance(self.streamer, TextStreamer) else None
        if after is not None:
            new = new[:, ~after[0, columns].cpu()]
        if new.shape[1]:
            self.streamer.put(new)


def _check_streamer(streamer: Any, options: Options) -> None:
    missing = [name for name in ("put", "end") if not callable(getattr(streamer, name, None))]
    if missing:
        raise ValueError(f"streamer={shown(streamer)} has no method {missing[0]}(); pass a BaseStreamer.")
    if getattr(streamer, "_takes_logits", False):
        raise ValueError(
            f"streamer={shown(streamer)} takes drafts as logits, but drafts are token ids; pass another one."
        )
    if options.reference_compat:
        raise ValueError(
            "reference_compat=True may edit the prompt, which the streamer gets at the start; leave out one of them."
        )
