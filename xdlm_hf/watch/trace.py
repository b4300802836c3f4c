"""Generations as an HTML page with a slider over their steps, and their counts per step as a plot.

The page is self-contained. It stores the state before the first step and the changes of each step, deflated: 256 steps
of 8 rows of 1024 tokens take a few hundred kilobytes when tokens are filled once, some megabytes at k = 1.

Shapes: B batch, T whole length, S steps.
"""

import base64
import html
import io
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from ..atomic import write_whole
from .display import LABELS, STYLES
from .page import RUNS, html_page
from .tokens import TokenPieces, token_changes, visible

SCRIPT = Path(__file__).with_name("trace.js")
BODY = """<p id="note" class="note">Unpacking the trace; this needs a browser of 2023 or newer, with scripts.</p>
$runs<script id="data" type="text/plain">$data</script>
"""
FRAME = """<iframe srcdoc="$page" sandbox="allow-scripts" title="$title" style="width: 100%; height: 640px; border: 0">\
</iframe>"""


def change_counts(history: Sequence[Tensor], mask_token_id: int | None) -> Tensor:
    """How many tokens each step filled, refined and re-masked, (B, S, 3) int64 on the CPU.

    Args:
        history: (B, T) ids before the first step and after each.
        mask_token_id: m; None for a model without one, whose every change is a refinement.

    Raises:
        ValueError: If `history` holds fewer than two states, or states of different shapes.
    """
    if len(history) < 2:
        raise ValueError(f"a history of {len(history)} states shows no step; generate with output_history=True.")
    shapes = {tuple(state.shape) for state in history}
    if len(shapes) > 1 or history[0].ndim != 2:
        raise ValueError(f"the states of a history must all have one shape (B, T), not {sorted(shapes)}.")
    steps = zip(history, history[1:], strict=False)
    counts = [torch.stack([mask.sum(-1) for mask in token_changes(*step, mask_token_id)], -1) for step in steps]
    return torch.stack(counts, 1).cpu()


class Trace:
    """A recorded generation as an HTML page; a notebook shows it as the value of a cell.

    Args:
        history: (B, T) ids before the first step and after each: of a `DiffusionGenerateOutput` or a
            `HistoryStreamer`.
        tokenizer: Anything with `decode(list[int]) -> str`; None for images.
        mask_token_id: m; None for a model without one.
        start: First column of the answers, the prompt's length; columns before it are shown paler.
        title: Heading of the page.
        note: A line below the heading, e.g. the settings.
        images: For tokens of images, their uint8 images (B, C, H, W), e.g. `XDLMImagePipeline.preview`; the page then
            shows the image of each step, with the tokens as its cells.
        grid: Rows and columns of tokens of an image; channels of pixels follow each other.
        confidences: (B, T) for each state of the history, from where it comes too; the page can then colour tokens by
            them. NaN where a token has none; None or empty without any.

    Raises:
        ValueError: As `change_counts`, or if `start` lies outside the sequences, the grid does not fit, or the
            confidences do not have the shapes of the history.
    """

    def __init__(
        self,
        history: Sequence[Tensor],
        tokenizer: Any,
        mask_token_id: int | None,
        start: int = 0,
        title: str = "Generation, step by step",
        note: str = "",
        images: Callable[[Tensor], Tensor] | None = None,
        grid: tuple[int, int] | None = None,
        confidences: Sequence[Tensor] | None = None,
    ):
        counts = change_counts(history, mask_token_id)
        length = history[0].shape[1]
        if (images is None) != (grid is None) or (grid is not None and length % (grid[0] * grid[1])):
            raise ValueError(f"images need a grid that divides {length} tokens, and no other trace; got {grid}.")
        if not 0 <= start <= length:
            raise ValueError(f"start={start} must lie between 0 and the length of the sequences, {length}.")
        if confidences and [state.shape for state in confidences] != [state.shape for state in history]:
            raise ValueError(
                f"confidences of {len(confidences)} states {tuple(confidences[0].shape)} do not fit a history of "
                f"{len(history)} states {tuple(history[0].shape)}; take both from the same generation."
            )
        self.title, self.rows = title, len(counts)
        self.data = _changes_only(history, tokenizer or _IdText, mask_token_id, start, confidences or None)
        if images is not None:
            by_step = [_png(images(state)) for state in history]
            self.data |= {"grid": list(grid), "images": [list(row) for row in zip(*by_step, strict=True)]}
        self.data |= {"start": start, "counts": counts.tolist(), "kinds": list(LABELS.values())}
        self.data |= {"title": title, "note": note, "confident": bool(confidences)}

    def page(self, beside: "Trace | None" = None) -> str:
        """The HTML page.

        Args:
            beside: Another generation, shown beside this one at the same step and row; their titles tell them apart.

        Raises:
            ValueError: If the two differ in the number of rows.
        """
        traces = [self] if beside is None else [self, beside]
        if beside is not None and beside.rows != self.rows:
            raise ValueError(f"{self.rows} rows do not fit {beside.rows} rows beside them; give batches of one size.")
        runs = json.dumps([trace.data for trace in traces], ensure_ascii=False, separators=(",", ":"))
        data = base64.b64encode(zlib.compress(runs.encode(), 9)).decode()
        return html_page(
            " and ".join(dict.fromkeys(trace.title for trace in traces)),
            Template(BODY).substitute(runs=RUNS.read_text(encoding="utf-8"), data=data),
            SCRIPT.read_text(encoding="utf-8"),
        )

    def save(self, path: str | os.PathLike, beside: "Trace | None" = None) -> Path:
        """Write the page; an existing file is replaced, whole or not at all.

        Args:
            path: The file; its folder must exist.
            beside: As for `page`.

        Returns:
            The path written.
        """
        write_whole(path, self.page(beside).encode())
        return Path(path)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks."""
        return Template(FRAME).substitute(page=html.escape(self.page()), title=html.escape(self.title))


def save_trace(path: str | os.PathLike, *arguments: Any, **options: Any) -> Path:
    """`Trace(*arguments, **options).save(path)`."""
    return Trace(*arguments, **options).save(path)


def plot_history(history: Sequence[Tensor], mask_token_id: int | None, row: int | None = None, axes: Any = None) -> Any:
    """Draw how many tokens each step filled, refined and re-masked, as stacked bars; needs matplotlib.

    Args:
        history: (B, T) ids before the first step and after each.
        mask_token_id: m; None for a model without one.
        row: The row of the batch; None adds up all rows.
        axes: Matplotlib axes to draw on, by default those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: As `change_counts`, or if there is no such row.
    """
    counts = change_counts(history, mask_token_id)
    if row is not None and not 0 <= row < len(counts):
        raise ValueError(f"row={row} is not in a batch of {len(counts)}; rows count from 0.")
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(8, 3.5), layout="constrained").subplots()
    shown = counts.sum(0) if row is None else counts[row]
    steps, bottom = torch.arange(1, len(shown) + 1), torch.zeros(len(shown), dtype=torch.long)
    for kind, values in zip(LABELS, shown.unbind(-1), strict=True):
        axes.bar(
            steps.tolist(),
            values.tolist(),
            bottom=bottom.tolist(),
            width=1.0 if len(shown) > 64 else 0.8,
            label=LABELS[kind],
            color=f"tab:{STYLES[kind].split()[-1]}",
        )
        bottom += values
    axes.set(xlabel="step", ylabel="tokens changed")
    axes.legend()
    return axes


def _changes_only(
    history: Sequence[Tensor],
    tokenizer: Any,
    mask_token_id: int | None,
    start: int,
    confidences: Sequence[Tensor] | None,
) -> dict[str, Any]:
    """First state, then per row and step [gaps between the changed positions, their new ids, confidences].

    Ids are renumbered. Confidences are in percent, -1 for none; without any, the third list is left out.
    """
    history = [state.cpu() for state in history]
    percents = [(state.cpu() * 100).nan_to_num(-1).round().int() for state in confidences or ()]
    used = torch.unique(torch.stack(history))
    pieces = TokenPieces(tokenizer, mask_token_id)
    shown = [pieces[token_id] for token_id in used.tolist()]
    renumbered = [torch.searchsorted(used, state) for state in history]
    first = history[0][:, :start]
    rows = []
    for row in range(len(history[0])):
        steps = []
        for number, (before, after) in enumerate(zip(renumbered, renumbered[1:], strict=False), 1):
            positions = (before[row] != after[row]).nonzero().flatten()
            gaps = positions.diff(prepend=positions.new_zeros(1)) if len(positions) else positions
            steps.append([gaps.tolist(), after[row][positions].tolist()])
            if percents:
                steps[-1].append(percents[number][row][positions].tolist())
        rows.append({"first": renumbered[0][row].tolist(), "steps": steps, "padding": _padding(first[row], tokenizer)})
    hole = (used == mask_token_id).nonzero().flatten().tolist() if mask_token_id is not None else []
    return {
        "rows": rows,
        # Bytes as lists of numbers, which the page joins into characters as `TokenPieces.units` does.
        "pieces": [list(piece) if isinstance(piece, bytes) else _lines_kept(piece) for piece in shown],
        "ids": used.tolist(),
        "hole": hole[0] if hole else -1,
    }


class _IdText:
    """Stands in for a tokenizer of image tokens, whose ids are their text."""

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def _png(images: Tensor) -> list[str]:
    """Images (B, C, H, W) as PNG files in base64."""
    from PIL import Image

    files = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG")
        files.append(base64.b64encode(file.getvalue()).decode())
    return files


def _padding(prompt: Tensor, tokenizer: Any) -> int:
    """Number of padding tokens at the start of a prompt (P,), which the page leaves out."""
    pad_token_id = getattr(tokenizer, "pad_token_id", None)
    if pad_token_id is None:
        return 0
    others = (prompt != pad_token_id).nonzero().flatten()
    return int(others[0]) if len(others) else len(prompt)


def _lines_kept(piece: str) -> str:
    """A piece with its line breaks, and with other control characters made visible."""
    return "\n".join(visible(line) for line in piece.split("\n"))
