"""Steps of a generation token by token: what a step changed, and the text of single tokens.

Shapes: T whole length.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

HOLE = "▁"
LONGEST_CHARACTER = 4  # bytes of UTF-8, so at most as many tokens
_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}  # GPT-2's byte-level alphabet


class Changes(NamedTuple):
    """Positions that one step changed, by kind, each (..., T) bool."""

    filled: Tensor
    refined: Tensor
    remasked: Tensor


def token_changes(before: Tensor, after: Tensor, mask_token_id: int | None) -> Changes:
    """Classify every position that a step changed.

    Args:
        before, after: Ids of two successive states, (..., T).
        mask_token_id: m; None for a model without one, whose every change is a refinement.
    """
    changed = before != after
    was_hole, is_hole = before == mask_token_id, after == mask_token_id
    if mask_token_id is None:
        was_hole = is_hole = changed & False
    return Changes(changed & was_hole, changed & ~was_hole & ~is_hole, changed & is_hole)


class TokenPieces:
    """Text of single tokens: a string, or bytes for a token that holds only part of a character.

    Byte-level and byte-fallback vocabularies split characters between tokens, and `decode` of one such token gives
    only U+FFFD; its bytes are read from the token's name.

    Args:
        tokenizer: Anything with `decode(list[int]) -> str`; parts of characters also need `convert_ids_to_tokens`.
        mask_token_id: m, shown as a hole; None for a model without one.
    """

    def __init__(self, tokenizer: Any, mask_token_id: int | None):
        self.tokenizer, self.mask_token_id = tokenizer, mask_token_id
        self._known: dict[int, str | bytes] = {}

    def __getitem__(self, token_id: int) -> str | bytes:
        if token_id not in self._known:
            self._known[token_id] = self._piece(token_id)
        return self._known[token_id]

    def units(self, ids: Sequence[int]) -> Iterator[tuple[int, int, str]]:
        """(start, end, text) of each span that can be shown: one token, or the tokens of one character.

        Bytes that form no character are shown as U+FFFD, token by token.
        """
        first = 0
        while first < len(ids):
            piece = self[ids[first]]
            last, text = first + 1, piece
            if isinstance(piece, bytes):
                last, text = self._character(ids, first)
            yield first, last, text
            first = last

    def _character(self, ids: Sequence[int], first: int) -> tuple[int, str]:
        together = b""
        for last in range(first, min(first + LONGEST_CHARACTER, len(ids))):
            piece = self[ids[last]]
            if isinstance(piece, str):
                break
            together += piece
            try:
                return last + 1, together.decode()
            except UnicodeDecodeError:
                continue
        return first + 1, "\N{REPLACEMENT CHARACTER}"

    def _piece(self, token_id: int) -> str | bytes:
        if token_id == self.mask_token_id:
            return HOLE
        text = self.tokenizer.decode([token_id])
        if "\N{REPLACEMENT CHARACTER}" not in text or not hasattr(self.tokenizer, "convert_ids_to_tokens"):
            return text
        return token_bytes(self.tokenizer.convert_ids_to_tokens(token_id) or "") or text


def token_bytes(token: str) -> bytes | None:
    """Bytes that a token stands for, by its name: `<0xC3>`, or letters of the byte-level alphabet; None for others."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return bytes(_BYTE_OF[letter] for letter in token) if token and set(token) <= _BYTE_OF.keys() else None


def visible(text: str) -> str:
    """`text` on one line, without control characters."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(letter if letter.isprintable() else "·" for letter in text)


def without_controls(text: str) -> str:
    """`text` without control characters other than line breaks and tabs."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "·" for letter in text)
