"""Positions of a text as bool masks, from masks, column spans or character spans.

A span is (first, end), end not included. Shapes: B batch, P length of the text.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Spans = Sequence[tuple[int, int]]


def position_mask(name: str, given: Tensor | Spans, attention_mask: Tensor) -> Tensor:
    """(B, P) bool from a mask of that shape, or from column spans, the same for every row.

    Args:
        name: Name of the argument, for messages.
        given: The mask or the spans.
        attention_mask: (B, P), 0 at padding.

    Raises:
        ValueError: If the mask has another shape or dtype, a span leaves the text or is empty, or includes padding.
    """
    rows, length = attention_mask.shape
    if isinstance(given, Tensor):
        if given.dtype != torch.bool or given.shape != attention_mask.shape:
            raise ValueError(
                f"{name} of shape {tuple(given.shape)} {given.dtype} must be a bool mask of the text's shape, "
                f"{(rows, length)}, or a list of (first, end) columns."
            )
        mask = given.to(attention_mask.device)
    else:
        mask = torch.zeros(rows, length, dtype=torch.bool, device=attention_mask.device)
        for first, end in _checked(name, given, length, "columns"):
            mask[:, first:end] = True
    padded = mask & (attention_mask == 0)
    if padded.any():
        row, column = padded.nonzero()[0].tolist()
        raise ValueError(f"{name} include padding at row {row} column {column}; leave it out.")
    return mask


def text_encoding(texts: Sequence[str], tokenizer: Any) -> Any:
    """Encoding of texts with the characters of each token, for `character_mask`.

    Args:
        texts: Any number of texts.
        tokenizer: A fast tokenizer.

    Raises:
        ValueError: If the tokenizer gives no characters, or does not decode a text to itself.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("revise() of a str needs a fast tokenizer, which gives character offsets; pass tokenizer=.")
    encoding = tokenizer(list(texts), return_offsets_mapping=True, add_special_tokens=False)
    for row, (text, ids) in enumerate(zip(texts, encoding["input_ids"], strict=True)):
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise ValueError(
                f"the tokenizer does not decode text {row} to the same text, so locked characters could change; "
                "change the text, or pass revise() its ids."
            )
    return encoding


def character_mask(
    name: str, spans: Sequence[Spans], texts: Sequence[str], encoding: Any, attention_mask: Tensor
) -> Tensor:
    """(B, P) bool, the tokens that lie wholly inside a character span of their row's text.

    Args:
        name: Name of the argument, for messages.
        spans: A list of spans for each text.
        texts: B texts.
        encoding: Their `text_encoding`.
        attention_mask: (B, P).

    Raises:
        ValueError: If the lists differ in number, or a span leaves its text or is empty.
    """
    if len(spans) != len(texts):
        raise ValueError(f"{name} has {len(spans)} lists of spans for {len(texts)} texts; give a list for each text.")
    mask = torch.zeros(attention_mask.shape, dtype=torch.bool)
    for row, (text, row_spans) in enumerate(zip(texts, spans, strict=True)):
        checked = _checked(name, row_spans, len(text), f"characters of text {row}")
        for column, (start, stop) in enumerate(encoding["offset_mapping"][row]):
            mask[row, column] = stop > start and any(first <= start and stop <= end for first, end in checked)
    return mask.to(attention_mask.device) & (attention_mask != 0)


def check_disjoint(editable: Sequence[Spans], locked: Sequence[Spans]) -> None:
    """Raise ValueError for the first editable span that overlaps a locked one of the same text."""
    for row, (editable_spans, locked_spans) in enumerate(zip(editable, locked, strict=False)):
        for first, end in editable_spans:
            for start, stop in locked_spans:
                if first < stop and start < end:
                    raise ValueError(
                        f"editable span ({first}, {end}) of text {row} overlaps the locked span ({start}, {stop}); "
                        "make one of them smaller."
                    )


def _checked(name: str, spans: Spans, length: int, unit: str) -> list[tuple[int, int]]:
    checked = []
    for span in spans:
        try:
            first, end = (int(x) for x in span)
        except (TypeError, ValueError):
            raise ValueError(f"{name} holds {span!r}; give pairs (first, end).") from None
        if not 0 <= first < end <= length:
            raise ValueError(f"{name} holds ({first}, {end}); a span needs 0 <= first < end <= {length}, in {unit}.")
        checked.append((first, end))
    return checked
