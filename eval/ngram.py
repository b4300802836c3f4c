"""An n-gram model of tokens or characters, a judge of text without a large language model.

Interpolated Witten-Bell smoothing: with h' the context h without its first token,

    P(w | h) = [c(h, w) + T(h) P(w | h')] / [c(h) + T(h)],      P(w | h') alone where c(h) = 0,

c(h, w) the number of occurrences, c(h) its sum over w, T(h) the number of different tokens after h. The distribution of
the empty context is interpolated with the uniform one over the N tokens, so that every token has a positive probability
and the probabilities sum to 1. Contexts do not extend over the beginning of a row.

An n-gram is stored as one number, (row of its context in the table of (n - 1)-grams) * N + last token, in a sorted
table for each n, so fitting and scoring are sorts and binary searches of whole arrays. All probabilities are float64.

Shapes: R rows of any length, N tokens.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class _Table(NamedTuple):
    """The n-grams of one n: sorted keys, their counts, and c(h) and T(h) of their contexts."""

    keys: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray


class WittenBell:
    """An n-gram model fitted to rows of token ids.

    Args:
        rows: Rows of ids in [0, N), of any lengths.
        order: The longest n-gram, n.
        vocab_size: N.

    Raises:
        ValueError: If the order is not positive, there is no token, or an id lies outside [0, N).
    """

    def __init__(self, rows: Iterable[Sequence[int]], order: int, vocab_size: int):
        if order < 1:
            raise ValueError(f"order={order}, the length of the longest n-gram, must be at least 1.")
        self.order, self.vocab_size = order, vocab_size
        ids, places = self._joined(rows)
        if len(ids) == 0:
            raise ValueError("the text to fit an n-gram model to is empty; give some.")
        contexts = np.zeros(len(ids), dtype=np.int64)  # the empty context has row 0 of a table of one
        size = 1
        self._tables: list[_Table] = []
        for n in range(1, order + 1):
            inside = places >= n - 1
            keys, inverse, counts = np.unique(
                contexts[inside] * vocab_size + ids[inside], return_inverse=True, return_counts=True
            )
            before = keys // vocab_size
            totals = np.bincount(before, weights=counts, minlength=size)
            self._tables.append(_Table(keys, counts, totals, np.bincount(before, minlength=size)))
            grams = np.zeros(len(ids), dtype=np.int64)
            grams[inside] = inverse
            contexts, size = np.roll(grams, 1), len(keys)

    def _joined(self, rows: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The concatenated ids of all rows, and the position of each in its row."""
        arrays = [np.asarray(row, dtype=np.int64) for row in rows]
        ids = np.concatenate([np.empty(0, dtype=np.int64), *arrays])
        places = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(len(row)) for row in arrays)])
        if len(ids) and not (0 <= ids.min() and ids.max() < self.vocab_size):
            raise ValueError(f"ids {ids.min()} to {ids.max()} do not lie in [0, vocab_size={self.vocab_size}).")
        return ids, places

    def log_probabilities(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """log P of each token given the preceding ones in its row, in nats: for each row (L,) float64.

        Raises:
            ValueError: If an id lies outside [0, N).
        """
        ids, places = self._joined(rows)
        probability = np.full(len(ids), 1 / self.vocab_size)
        contexts = np.zeros(len(ids), dtype=np.int64)
        for n, table in enumerate(self._tables, start=1):
            # A context is unknown (-1) if the row has fewer than n - 1 tokens before, or it did not occur in the text.
            contexts = np.where(places >= n - 1, contexts, -1)
            grams = _find(table.keys, contexts * self.vocab_size + ids, contexts >= 0)
            total, kinds = table.totals[contexts], table.kinds[contexts]
            count = np.where(grams >= 0, table.counts[grams], 0)
            followed = (contexts >= 0) & (total > 0)
            mixed = (count + kinds * probability) / np.maximum(total + kinds, 1)
            probability = np.where(followed, mixed, probability)
            contexts = np.roll(grams, 1)
        return np.split(np.log(probability), np.cumsum([len(row) for row in rows])[:-1])

    def distribution(self, context: Sequence[int]) -> np.ndarray:
        """P of every token after a context, (N,) float64."""
        rows = [[*context, token] for token in range(self.vocab_size)]
        return np.exp([row[-1] for row in self.log_probabilities(rows)])


def _find(table: np.ndarray, keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Indices of keys in a sorted table; -1 if a key is missing or not `known`."""
    places = np.searchsorted(table, keys).clip(max=len(table) - 1)
    return np.where(known & (table[places] == keys), places, -1)
