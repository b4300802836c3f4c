"""Drafts: the canvas of an answer after each denoising step, for requests with `stream_drafts`.

Shapes: B rows of a batch, W columns of a batch's answers, n positions of one answer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..watch.tokens import TokenPieces, token_changes


@dataclass(frozen=True)
class Draft:
    """One answer after a step, on the CPU."""

    index: int  # of the answer
    step: int  # from 1
    before: Tensor  # (n,) ids before the step
    after: Tensor  # (n,) ids
    confidences: Tensor | None  # (n,), NaN where a token has none; None if the sampler has none


class DraftRecorder:
    """The latest state of a batch's answers, from the columns that `generate` passes to a streamer.

    As in `watch.streamers.HistoryStreamer`, columns that are final stay as they were drafted, and the state before the
    first step is taken to be all holes.

    Args:
        mask_token_id: m; None for a model without a mask token, whose first step then changes nothing.
    """

    def __init__(self, mask_token_id: int | None):
        self.mask_token_id = mask_token_id
        self.step = 0
        self.before: Tensor | None = None  # (B, W)
        self.after: Tensor | None = None
        self.confidences: Tensor | None = None

    def add_confidences(self, value: Tensor) -> None:
        """The confidences after a step; called before `add`."""
        self.confidences = _joined(self.confidences, value)

    def add(self, value: Tensor) -> None:
        """The ids after a step, of the columns that are not final yet."""
        self.step += 1
        if self.after is None:
            self.before = value if self.mask_token_id is None else torch.full_like(value, self.mask_token_id)
        else:
            self.before = self.after
        self.after = _joined(self.after, value)

    def draft(self, index: int, row: int, columns: slice) -> Draft:
        """Answer `index` of a job, which these columns of this row of the batch hold."""
        confidences = None if self.confidences is None else self.confidences[row, columns]
        return Draft(index, self.step, self.before[row, columns], self.after[row, columns], confidences)


def _joined(state: Tensor | None, value: Tensor) -> Tensor:
    """The state with its last columns replaced."""
    return value if state is None else torch.cat([state[:, : state.shape[1] - value.shape[1]], value], 1)


def draft_body(draft: Draft, steps: int, pieces: TokenPieces) -> dict[str, Any]:
    """A draft as JSON; docs/serving.md describes it.

    Args:
        draft: The draft.
        steps: Number of steps at most.
        pieces: Texts of tokens, kept from one draft to the next.
    """
    changes = token_changes(draft.before, draft.after, pieces.mask_token_id)
    kind_of = {i: kind for kind, mask in changes._asdict().items() for i in mask.nonzero().flatten().tolist()}
    cells = [_cell(token_id, pieces) for token_id in draft.after.tolist()]
    for i, kind in kind_of.items():
        cells[i]["change"] = kind
    if draft.confidences is not None:
        known = ~draft.confidences.isnan()
        for i, confidence in zip(known.nonzero().flatten().tolist(), draft.confidences[known].tolist(), strict=True):
            cells[i]["confidence"] = round(confidence, 4)
    return {"step": draft.step, "steps": steps, "cells": cells}


def _cell(token_id: int, pieces: TokenPieces) -> dict[str, Any]:
    piece = pieces[token_id]
    cell: dict[str, Any] = {"id": token_id}
    if isinstance(piece, bytes):
        cell |= {"text": "\N{REPLACEMENT CHARACTER}", "bytes": list(piece)}
    else:
        cell["text"] = piece
    if token_id == pieces.mask_token_id:
        cell["mask"] = True
    return cell
