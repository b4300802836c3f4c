"""Rows with boundary tokens, as in the paper's from-scratch text runs: [BOS], L - 2 tokens of text, [EOS].

    d1 d1 d1 <eos> d2 d2 | d2 d2 d2 d2 <eos> d3 | ...     becomes     [BOS] d1 d1 d1 <eos> d2 d2 [EOS] ...

Documents are concatenated, each followed by the end-of-text token with `insert_eos`, and cut every L - 2 tokens.

`released=True` cuts as the released code does: documents are concatenated within batches of 1,000, and the tokens left
over at the end of each batch are dropped, so no row is shorter than L. Unlike the released code, text that spells a
special token is still data (`packing`), and documents of only blanks are left out. That the released code uses [CLS] as
BERT's end-of-text token is reproduced by `set_boundary_tokens`.

Shapes: R rows, L tokens per row.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .packing import DOCUMENTS_PER_CALL, Encoder, PackedDataset
from .stream import PackedStream

if TYPE_CHECKING:  # `datasets` belongs to the `train` extra: importing this module must not need it
    import datasets
logger = logging.getLogger(__name__)
RELEASED_BATCH = 1000  # documents that the released code concatenates, the default batch of `datasets.map`


def set_boundary_tokens(tokenizer: PreTrainedTokenizerBase, released: bool = False) -> PreTrainedTokenizerBase:
    """Set missing BOS and EOS of a tokenizer to its [CLS] and [SEP]; changes the tokenizer and returns it.

    Args:
        tokenizer: The tokenizer.
        released: Set EOS to the first token of the encoded EOS, as the released code does. For BERT that is [CLS],
            which its tokenizer prepends: rows are [CLS] s1 [CLS] s2 ... [CLS], without [SEP].

    Raises:
        ValueError: If there is neither BOS nor [CLS], or neither EOS nor [SEP].
    """
    for name, substitute in (("bos_token", "cls_token"), ("eos_token", "sep_token")):
        if getattr(tokenizer, name) is None:
            if getattr(tokenizer, substitute) is None:
                raise ValueError(
                    f"the tokenizer has neither {name} nor {substitute}, but rows need one at their ends; set "
                    f"tokenizer.{name}."
                )
            setattr(tokenizer, name, getattr(tokenizer, substitute))
    if released:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer.encode(tokenizer.eos_token)[0])
    return tokenizer


def wrap(ids: np.ndarray, length: int, bos: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut tokens into rows with boundary tokens.

    Args:
        ids: Token ids, one dimension.
        length: L, boundary tokens included.
        bos, eos: First and last id of each row.

    Returns:
        Rows (R, L), and the remaining tokens.
    """
    number = len(ids) // (length - 2)
    text, rest = np.split(ids, [number * (length - 2)])
    ends = np.ones((number, 1), dtype=ids.dtype)
    return np.concatenate([ends * bos, text.reshape(number, length - 2), ends * eos], axis=1), rest


def boundary_ids(tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[int, int]:
    """BOS and EOS of the rows.

    Raises:
        ValueError: If the tokenizer has none, or L is less than 3.
    """
    if length < 3:
        raise ValueError(f"row length {length} must be at least 3, for BOS, a token of text and EOS.")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no bos_token or no eos_token; use set_boundary_tokens(tokenizer).")
    return tokenizer.bos_token_id, tokenizer.eos_token_id


class WrappedDataset(PackedDataset):
    """Documents cut into rows with boundary tokens, held in memory: 4 bytes per token.

    Items are those of `PackedDataset`. `counts` has the numbers of `documents`, `text_tokens` (without boundary
    tokens), `dropped_tokens` and `rows`.

    Args:
        documents, tokenizer, text_column, show_progress: As in `PackedDataset`; the tokenizer also needs a BOS.
        length: L, tokens per row, boundary tokens included.
        max_rows: Maximum number of rows.
        insert_eos: Whether each document is followed by EOS.
        boundaries: Whether rows begin with BOS and end with EOS; otherwise they are L tokens of text, as for text8.
        released: Concatenate and drop as the released code does; see the module's docstring.

    Raises:
        ValueError: As `PackedDataset`; if the text is shorter than one row.
    """

    def __init__(
        self,
        documents: "datasets.Dataset | datasets.IterableDataset",
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        text_column: str = "text",
        max_rows: int | None = None,
        show_progress: bool = False,
        insert_eos: bool = True,
        boundaries: bool = True,
        released: bool = False,
    ):
        self.length = length
        self._ends = boundary_ids(tokenizer, length) if boundaries else None
        encoder = Encoder(tokenizer, text_column)
        rows: list[np.ndarray] = []
        number = tokens = dropped = 0
        rest = np.empty(0, dtype=np.int32)
        with tqdm(desc="Wrapping", unit=" tokens", unit_scale=True, disable=not show_progress) as bar:
            for batch in documents.iter(RELEASED_BATCH if released else DOCUMENTS_PER_CALL):
                texts = [np.asarray(ids if insert_eos else ids[:-1], dtype=np.int32) for ids in encoder(batch)]
                cut, rest = self._cut(np.concatenate([rest, *texts]))
                rows.append(cut.ravel())
                read = sum(map(len, texts))
                number, tokens = number + len(cut), tokens + read
                bar.update(read)
                if released:
                    dropped, rest = dropped + len(rest), rest[:0]
                if max_rows is not None and number >= max_rows:
                    break
        documents_read = encoder.documents
        encoder.end_of_pass()
        if number == 0:
            raise ValueError(self._too_little(documents_read, tokens, released))
        if len(rest) and (max_rows is None or number < max_rows):
            rows.append(rest if self._ends is None else wrap(rest, len(rest) + 2, *self._ends)[0].ravel())
        self.tokens = np.concatenate(rows)[: None if max_rows is None else max_rows * length]
        counts = {"documents": documents_read, "text_tokens": tokens, "dropped_tokens": dropped, "rows": len(self)}
        self.counts: dict[str, int] = counts

    def _cut(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._ends is not None:
            return wrap(ids, self.length, *self._ends)
        number = len(ids) // self.length
        text, rest = np.split(ids, [number * self.length])
        return text.reshape(number, self.length), rest

    def _too_little(self, documents: int, tokens: int, released: bool) -> str:
        why = f" within one of the batches of {RELEASED_BATCH} documents of released=True" * released
        return (
            f"{documents} documents of {tokens} tokens are less than one row of length {self.length}{why}; reduce the "
            "row length, or give more text."
        )


class WrappedStream(PackedStream):
    """`PackedStream` with BOS and EOS at the ends of each row; every document is followed by EOS.

    Args:
        documents, tokenizer: As in `PackedStream`; the tokenizer also needs a BOS.
        length: L, tokens per row, boundary tokens included.
        options: As in `PackedStream`.

    Raises:
        ValueError: As `PackedStream` and `boundary_ids`.
    """

    def __init__(
        self, documents: "datasets.IterableDataset", tokenizer: PreTrainedTokenizerBase, length: int, **options: Any
    ):
        self._ends = boundary_ids(tokenizer, length)
        super().__init__(documents, tokenizer, length, **options)
        self._pieces = PackedStream(documents, tokenizer, length - 2, **options)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the stream as JSON: source, order, row length and boundary tokens."""
        return {**super().fingerprint, "boundaries": list(self._ends)}

    def read(
        self, worker: int = 0, workers: int = 1, state: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """As `PackedStream.read`."""
        bos, eos = (torch.tensor([end]) for end in self._ends)
        for row, after in self._pieces.read(worker, workers, state):
            yield {"input_ids": torch.cat([bos, row["input_ids"], eos])}, after
