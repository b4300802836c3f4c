"""Steps of a generation as text: the tokens that were filled, refined or re-masked, in the paper's colours.

Works on the `history` of a `DiffusionGenerateOutput` and needs `rich` (in the extra `watch`), nothing else of the
package. Shapes: B batch, T whole length.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .tokens import TokenPieces, token_changes, visible

# The colours of the paper's figures: content creation, quality enhancement, error correction.
STYLES = {"filled": "bold green", "refined": "bold blue", "remasked": "bold red"}
LABELS = {"filled": "filled", "refined": "refined", "remasked": "re-masked"}


def step_text(
    before: Tensor, after: Tensor, tokenizer: Any, mask_token_id: int | None, pieces: TokenPieces | None = None
) -> Text:
    """One row, (T,), after a step: changed tokens coloured, holes drawn as a low bar.

    A character made of several tokens has the colour of the first of them that changed. `pieces`, if given, is a cache
    shared between calls.
    """
    pieces = TokenPieces(tokenizer, mask_token_id) if pieces is None else pieces
    kinds = [""] * len(after)
    for kind, mask in token_changes(before, after, mask_token_id)._asdict().items():
        for position in mask.nonzero().flatten().tolist():
            kinds[position] = kind
    ids, text = after.tolist(), Text(overflow="fold")
    for first, last, piece in pieces.units(ids):
        kind = next(filter(None, kinds[first:last]), "")
        text.append(visible(piece), style=STYLES.get(kind) or ("dim" if ids[first] == mask_token_id else ""))
    return text


def history_table(
    history: Sequence[Tensor],
    tokenizer: Any,
    mask_token_id: int | None,
    row: int = 0,
    start: int = 0,
    every: int = 1,
) -> Table:
    """A table with one row per step shown: counts of changes, then the text.

    Args:
        history: (B, T) ids before the first step and after each.
        tokenizer: Anything with `decode(list[int]) -> str`.
        mask_token_id: m, or None.
        row: The row of the batch to show.
        start: First column to show, e.g. the prompt's length.
        every: Show every n-th step; the last one always. Changes of the steps between are shown together.

    Raises:
        ValueError: If `history` holds fewer than two states, or `every` is not positive.
    """
    if len(history) < 2:
        raise ValueError(f"a history of {len(history)} states shows no step; generate with output_history=True.")
    if every < 1:
        raise ValueError(f"every={every} must be positive.")
    table = Table(expand=True, show_lines=True)
    table.add_column("step", justify="right", no_wrap=True)
    for kind, style in STYLES.items():
        table.add_column(kind, justify="right", style=style, no_wrap=True)
    table.add_column("text", ratio=1)
    last = len(history) - 1
    shown = [0, *(i for i in range(1, last) if i % every == 0), last]
    for i, j in zip(shown, shown[1:], strict=False):
        before, after = history[i][row, start:].cpu(), history[j][row, start:].cpu()
        counts = [str(int(mask.sum())) for mask in token_changes(before, after, mask_token_id)]
        table.add_row(str(j), *counts, step_text(before, after, tokenizer, mask_token_id))
    return table


def show_history(history: Sequence[Tensor], tokenizer: Any, mask_token_id: int | None, **options: Any) -> None:
    """Print `history_table` to the terminal; same arguments."""
    Console().print(history_table(history, tokenizer, mask_token_id, **options))
