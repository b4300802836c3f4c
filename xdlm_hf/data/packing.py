"""Packing of documents into rows of one length.

Documents are joined end to end, each followed by the tokenizer's end-of-text token, and cut every L tokens:

    d1 d1 d1 <eot> d2 | d2 d2 d2 d2 d2 | d2 <eot> d3 d3 <eot>

No token is dropped. The tokens left after the last document become a shorter row, which the collator pads; padding is
never noised and never scored. Documents share rows and see each other, as in LLaDA's pretraining.

Text is encoded with `split_special_tokens=True`, so that a document that spells `<|mdm_mask|>` or `<|endoftext|>`, as
web pages about language models do, gives ordinary tokens. A mask token in x_0 could not be predicted (p_m = 0).

Shapes: B batch, L length.
"""

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .readers import check_column, logger

DOCUMENTS_PER_CALL = 256  # fast tokenizers work through a batch in parallel


class Encoder:
    """Encodes batches of documents, each followed by the separator; counts the empty ones, which it skips."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_column: str):
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token; it is needed to separate documents.")
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.documents = 0
        self.empty = 0

    def __call__(self, batch: Mapping[str, list[Any]]) -> Iterator[list[int]]:
        check_column(self.text_column, batch, "the dataset")
        return (ids for _, _, ids in self.encode(batch[self.text_column]))

    def encode(self, documents: Sequence[Any]) -> Iterator[tuple[int, str, list[int]]]:
        """Number, text and ids of each document that is not empty."""
        texts, numbers = [], []
        for number, text in enumerate(documents):
            self.documents += 1
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"document {self.documents}: column {self.text_column!r} holds {type(text).__name__} "
                    f"{text!r:.60}, not text."
                )
            if text is None or not text.strip():
                self.empty += 1
            else:
                texts.append(text)
                numbers.append(number)
        if not texts:
            return
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,  # silences the length warning: rows are cut below
        )["input_ids"]
        for number, text, ids in zip(numbers, texts, encoded, strict=True):
            if self.tokenizer.mask_token_id in ids:
                raise ValueError(
                    f"a document encodes to the mask token {self.tokenizer.mask_token!r} although special tokens are "
                    "split: use a fast tokenizer, or remove that string from the text."
                )
            yield number, text, ids + [self.tokenizer.eos_token_id]

    def end_of_pass(self) -> None:
        """Log how many empty documents were skipped, and reset the counts.

        Raises:
            ValueError: If there was no document, or nothing but empty ones.
        """
        if self.documents == 0:
            raise ValueError("there is no document to read: the source is empty, or has fewer documents than readers.")
        if self.documents == self.empty:
            raise ValueError(f"column {self.text_column!r} holds no text: all {self.empty} documents are empty.")
        if self.empty:
            logger.warning("skipped %d empty documents of %d", self.empty, self.documents)
        self.documents = self.empty = 0


def check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"row length {length} must be positive.")


class PackedDataset(torch.utils.data.Dataset):
    """Documents packed into rows, held in memory: 4 bytes per token.

    Item i is `{"input_ids": int64 ids}` of `length` tokens; the last row may be shorter.

    Args:
        documents: `datasets.Dataset` or `IterableDataset` with a text column, read once from start to end.
        tokenizer: Its end-of-text token separates documents.
        length: L, tokens per row.
        text_column: Column that holds the text.
        max_rows: Stop reading after so many full rows; default: no limit.
        show_progress: Show a progress bar.

    Raises:
        ValueError: If there is no such column, all documents are empty, a value is not text, the tokenizer has no
            end-of-text token, or `length` is not positive.
    """

    def __init__(
        self,
        documents: datasets.Dataset | datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        text_column: str = "text",
        max_rows: int | None = None,
        show_progress: bool = False,
    ):
        check_length(length)
        encoder = Encoder(tokenizer, text_column)
        chunks, total = [], 0
        limit = None if max_rows is None else max_rows * length
        with tqdm(desc="Packing", unit=" tokens", unit_scale=True, disable=not show_progress) as bar:
            for ids in itertools.chain.from_iterable(map(encoder, documents.iter(DOCUMENTS_PER_CALL))):
                chunks.append(np.asarray(ids, dtype=np.int32))
                total += len(ids)
                bar.update(len(ids))
                if limit is not None and total >= limit:
                    break
        encoder.end_of_pass()
        self.tokens = np.concatenate(chunks)[:limit]
        self.length = length

    @property
    def fingerprint(self) -> dict[str, int]:
        """Identity of the data: `{"tokens": ..., "length": L, "crc32": ...}`, over every token."""
        return {"tokens": len(self.tokens), "length": self.length, "crc32": zlib.crc32(self.tokens.tobytes())}

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = (index % len(self)) * self.length
        return {"input_ids": torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))}
