"""Generations as an animated SVG picture: their steps as coloured text, one after the other, forever.

The picture is a file of its own without scripts, so that a README or a slide can show it; it follows the reader's dark
or light setting, and shows the last step alone where motion is not wanted. For a page with a slider see `trace`.
"""

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import Tensor

from ..atomic import write_whole
from .display import LABELS, STYLES, step_text
from .tokens import without_controls

LINE, LETTER, MARGIN = 20, 8.5, 16  # pixels: height of a line, width of a letter, border
HOLD = 4  # how often the last step is shown
KINDS = {style: kind for kind, style in STYLES.items()} | {"dim": "pale"}  # class of a text, by its style in a terminal
# Colours of page.css, light and dark.
COLOURS = {
    "ink": ("#1c2430", "#e5e9f0"),
    "pale": ("#5b6472", "#a3acbb"),
    "page": ("#ffffff", "#1b2029"),
    "filled": ("#106b31", "#6ee7a0"),
    "refined": ("#1d4fd7", "#a5c3ff"),
    "remasked": ("#b01818", "#ffa3a3"),
}


def save_animation(
    path: str | os.PathLike,
    runs: Mapping[str, Sequence[Tensor]],
    tokenizer: Any,
    mask_token_id: int | None,
    start: int = 0,
    row: int = 0,
    width: int = 80,
    seconds: float = 0.8,
) -> Path:
    """Write the steps of generations, one below the other at the same step; an existing file is replaced.

    Args:
        path: The file; its folder must exist.
        runs: For each generation its heading, and its history: (B, T) ids before the first step and after each. One
            with fewer steps waits at its end.
        tokenizer: Anything with `decode(list[int]) -> str`.
        mask_token_id: m; None for a model without one.
        start: First column to show, e.g. the prompt's length.
        row: The row of the batches to show.
        width: Letters in a line.
        seconds: Time of a step.

    Returns:
        The path written.

    Raises:
        ValueError: If there is no run, a history holds fewer than two states, there is no such row or column, or
            `width` or `seconds` is not positive.
    """
    _check(runs, start, row, width, seconds)
    frames = max(map(len, runs.values()))
    body, top = [], MARGIN + LINE
    for title, history in runs.items():
        body.append(f'<text class="title" x="{MARGIN}" y="{top}">{_escaped(title)}</text>')
        states = [state[row, start:].cpu() for state in history]
        states = [states[0], *states, *[states[-1]] * (frames - len(states))]  # before the first step, and waiting
        shown = [
            list(step_text(*pair, tokenizer, mask_token_id).wrap(Console(width=width), width))
            for pair in zip(states, states[1:], strict=False)
        ]
        for number, lines in enumerate(shown):
            spans = "".join(_line(line, top + LINE * place) for place, line in enumerate(lines, 1))
            body.append(f'<text class="frame f{number}">{spans}</text>')
        top += LINE * (max(map(len, shown)) + 2)
    legend = "   ".join(f'<tspan class="{kind}">{LABELS[kind]}</tspan>' for kind in STYLES)
    for number in range(frames):
        step = f"step {number} of {frames - 1}   "
        body.append(f'<text class="frame pale f{number}" x="{MARGIN}" y="{top}">{step}{legend}</text>')
    size = (round(2 * MARGIN + LETTER * width), top + MARGIN)
    picture = _picture(size, "".join(body), _style(frames, seconds), " / ".join(runs))
    write_whole(path, picture.encode())
    return Path(path)


def _check(runs: Mapping[str, Sequence[Tensor]], start: int, row: int, width: int, seconds: float) -> None:
    """As `save_animation` raises."""
    if not runs or min(map(len, runs.values())) < 2:
        raise ValueError(
            f"an animation needs generations of at least one step, got histories of "
            f"{[len(history) for history in runs.values()]} states; generate with output_history=True."
        )
    batch, length = next(iter(runs.values()))[0].shape
    for name, value, limit in (("row", row, batch), ("start", start, length)):
        if not 0 <= value < limit:
            shape = f"the histories are ({batch}, {length})"
            raise ValueError(f"{name}={value} must lie between 0 and {limit - 1}: {shape}.")
    if width < 1 or not seconds > 0:
        raise ValueError(f"width={width} letters and seconds={seconds} of a step must be positive.")


def _escaped(text: str) -> str:
    return html.escape(without_controls(text))  # XML has no control characters


def _line(line: Text, y: int) -> str:
    """A line as spans, each in the colour of what the step did."""
    spans = []
    for segment in line.render(Console()):
        kind = KINDS.get(str(segment.style), "")
        spans.append(
            f'<tspan class="{kind}">{html.escape(segment.text)}</tspan>' if kind else html.escape(segment.text)
        )
    return f'<tspan x="{MARGIN}" y="{y}">{"".join(spans)}</tspan>'


def _style(frames: int, seconds: float) -> str:
    """Style sheet that shows the frames in turn, the last one longer."""
    rounds = frames + HOLD - 1
    rules = [
        "text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}",
        ".title{font-family:system-ui,sans-serif;font-weight:600}",
        ".filled,.refined,.remasked{font-weight:700}",
        f".frame{{visibility:hidden;animation-duration:{rounds * seconds:g}s;animation-iteration-count:infinite;"
        "animation-timing-function:step-end}",
    ]
    for number in range(frames):
        first, last = (f"{100 * n / rounds:.3f}%" for n in (number, number + 1 if number < frames - 1 else rounds))
        hidden = f"{last}{{visibility:hidden}}" if number < frames - 1 else ""
        before = "0%{visibility:hidden}" if number else ""
        rules.append(f"@keyframes f{number}{{{before}{first}{{visibility:visible}}{hidden}}}")
        rules.append(f".f{number}{{animation-name:f{number}}}")
    rules.append(
        f"@media (prefers-reduced-motion:reduce){{.frame{{animation:none}}.f{frames - 1}{{visibility:visible}}}}"
    )
    for scheme, number in (("light", 0), ("dark", 1)):
        fills = "".join(f".{kind}{{fill:{pair[number]}}}" for kind, pair in COLOURS.items())
        colours = f"text{{fill:{COLOURS['ink'][number]}}}{fills}"
        rules.append(colours if scheme == "light" else f"@media (prefers-color-scheme:dark){{{colours}}}")
    return "".join(rules)


def _picture(size: tuple[int, int], body: str, style: str, title: str) -> str:
    width, height = size
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{_escaped(title)}</title><style>{style}</style>'
        f'<rect class="page" width="{width}" height="{height}" rx="10"/>{body}</svg>\n'
    )
