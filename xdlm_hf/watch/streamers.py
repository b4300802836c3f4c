"""Streamers for `generate(..., streamer=...)`: one that records every step, and one that also draws it live.

`generate` calls `put` with the prompts, `put_confidences` and `put_draft` after every step, `put` with final columns,
and `end`. Unlike Transformers' text streamers these take batches.

Shapes: B batch, P prompt, T whole length (prompt and answer), W columns of the answer that are not final yet.
"""

from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .display import LABELS, STYLES, step_text
from .tokens import TokenPieces, token_changes, without_controls

REPORTS = 10  # lines of progress if the output is no terminal


class HistoryStreamer(BaseStreamer):
    """Records the steps of a generation on the CPU; the next generation replaces them.

    Unlike `output_history=True` it takes no memory on the model's device, and keeps the steps of a generation that was
    stopped.

    Args:
        mask_token_id: m. The state before the first step is not streamed; with m it is taken to be all holes, as in the
            confidence sampler. None for a model without a mask token: its history begins after the first step.

    Attributes:
        history: The (B, T) ids before the first step and after each, on the CPU.
        confidences: (B, T) for each state, as in `DiffusionGenerateOutput`; empty if the sampler has none.
        prompt_length: P.
        sequences: The (B, T) ids as `generate` returned them, padded after the end of a row; None while it runs.
    """

    def __init__(self, mask_token_id: int | None):
        self.mask_token_id = mask_token_id
        self.history: list[Tensor] = []
        self.confidences: list[Tensor] = []
        self.prompt_length = 0
        self.sequences: Tensor | None = None
        self._final: Tensor | None = None  # columns passed to `put`
        self._running = False

    def put(self, value: Tensor) -> None:
        if self._running:
            self._final = torch.cat([self._final, value], 1)
            return
        self.history, self.confidences, self.sequences = [], [], None
        self._final, self._running = value, True
        self.prompt_length = value.shape[1]

    def put_confidences(self, value: Tensor) -> None:
        if not self.confidences:
            before = torch.full(self._final.shape, torch.nan)
            if self.mask_token_id is not None:
                self.confidences.append(torch.cat([before, torch.full_like(value, torch.nan)], 1))
        else:
            before = self.confidences[-1][:, : self._final.shape[1]]
        self.confidences.append(torch.cat([before, value], 1))

    def put_draft(self, value: Tensor) -> None:
        if not self.history and self.mask_token_id is not None:
            self.history.append(torch.cat([self._final, torch.full_like(value, self.mask_token_id)], 1))
        # Final columns as drafted, not as `put`, which pads after the end of a row.
        before = self.history[-1][:, : self._final.shape[1]] if self.history else self._final
        self.history.append(torch.cat([before, value], 1))

    def end(self) -> None:
        self.sequences, self._running = self._final, False

    def abandon(self) -> None:
        """End a generation that was stopped and does not call `end`; the recorded steps are kept."""
        self._running = False

    @property
    def steps(self) -> int:
        """Steps recorded."""
        return max(0, len(self.history) - (self.mask_token_id is not None))


class LiveStreamer(HistoryStreamer):
    """Draws the answers of a batch in the terminal while they are generated, changes in the paper's colours.

    If the output is no terminal, it prints progress and then the answers. Use it as a context
    manager, which restores the terminal when the generation is stopped by an exception:

        with LiveStreamer(tokenizer, model.config.mask_token_id, steps=32) as streamer:
            model.generate(**inputs, steps=32, streamer=streamer)

    Args:
        tokenizer: The model's tokenizer.
        mask_token_id: m, drawn as a low bar; None for a model without one.
        steps: Total number, for the progress bar; by default only the count is shown.
        max_rows: Rows of the batch that are drawn; the others are counted.
        show_result: Whether the answers are printed at the end.
        console: Where to draw, by default the standard output.

    Raises:
        ValueError: If `steps` or `max_rows` is not positive.
    """

    def __init__(
        self,
        tokenizer: Any,
        mask_token_id: int | None,
        steps: int | None = None,
        max_rows: int = 4,
        show_result: bool = True,
        console: Console | None = None,
    ):
        super().__init__(mask_token_id)
        for name, value in (("steps", steps), ("max_rows", max_rows)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be positive.")
        self.tokenizer, self.total, self.max_rows, self.show_result = tokenizer, steps, max_rows, show_result
        self.console = Console() if console is None else console
        self.pieces = TokenPieces(tokenizer, mask_token_id)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def put(self, value: Tensor) -> None:
        beginning = not self._running
        super().put(value)
        if beginning and self.console.is_terminal:
            self._close()
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def put_draft(self, value: Tensor) -> None:
        super().put_draft(value)
        if self._live is not None:
            self._live.update(self.frame(), refresh=True)
        elif not self.console.is_terminal and self._reports():
            self.console.print(self._counter(), highlight=False)

    def end(self) -> None:
        super().end()
        self._close()
        if self.show_result:
            for row in range(len(self.sequences)):
                label = f"[{row}] " if len(self.sequences) > 1 else ""
                self.console.print(Text(label, style="dim"), Text(self.answer(row)), sep="", soft_wrap=True)

    def abandon(self) -> None:
        super().abandon()
        self._close()

    def answer(self, row: int = 0) -> str:
        """Text of one row's answer so far, without special tokens and control characters."""
        ids = (self.history[-1] if self.sequences is None else self.sequences)[row, self.prompt_length :]
        ids = ids[ids != self.mask_token_id] if self.mask_token_id is not None else ids
        return without_controls(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def frame(self) -> RenderableType:
        """The latest step: the rows, cut to the terminal's height, then the counter."""
        before, after = (state[:, self.prompt_length :] for state in (self.history[-2:] * 2)[:2])
        rows = min(self.max_rows, len(after))
        lines = max(1, (self.console.height - 3) // rows)
        parts: list[RenderableType] = [self._row(before, after, row, lines) for row in range(rows)]
        if len(after) > rows:
            parts.append(Text(f"and {len(after) - rows} more", style="dim"))
        return Group(*parts, self._progress())

    def _row(self, before: Tensor, after: Tensor, row: int, most: int) -> RenderableType:
        """A row's text, at most `most` lines, those around its latest change."""
        text = step_text(before[row], after[row], self.tokenizer, self.mask_token_id, self.pieces)
        label = f"{row} " if len(after) > 1 else ""
        lines = text.wrap(self.console, max(1, self.console.width - len(label)), overflow="fold")
        if len(lines) > most:
            changed = [n for n, line in enumerate(lines) if any(span.style in STYLES.values() for span in line.spans)]
            first = min(max(0, max(changed, default=0) - most // 2), len(lines) - most)
            lines = lines[first : first + most]
        indented = [Text.assemble((" " * len(label) if n else label, "dim"), line) for n, line in enumerate(lines)]
        return Text("\n").join(indented)

    def _progress(self) -> RenderableType:
        if self.total is None:
            return self._counter()
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(self.total, min(self.steps, self.total), width=24), self._counter())
        return grid

    def _counter(self) -> Text:
        """`step 3/32: 4 filled, 1 refined, 0 re-masked`, in the colours that the text uses."""
        before, after = (self.history[-2:] * 2)[:2]
        changes = token_changes(before, after, self.mask_token_id)
        text = Text(f"step {self.steps}" + (f"/{self.total}" if self.total else "") + ":")
        for kind, mask in changes._asdict().items():
            text.append(f" {int(mask.sum())} {LABELS[kind]}", style=STYLES[kind])
        return text

    def _reports(self) -> bool:
        every = max(1, self.total // REPORTS) if self.total else REPORTS
        return self.steps % every == 0 or self.steps == self.total

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
