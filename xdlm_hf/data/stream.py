"""Packing of a stream of documents by any number of readers, with an exactly resumable state.

A reader is one worker of one rank. Its state is small and does not grow: the state of the `datasets` iterable where
the current block of documents starts, and the document and token where the next row starts. Resuming reads at most one
block again.

Shapes: L tokens per row.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from datasets.iterable_dataset import BufferShuffledExamplesIterable
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .packing import DOCUMENTS_PER_CALL, Encoder, check_length
from .readers import check_column, checksum

_DATA_CHANGED = (
    "the data changed: the document where reading should resume is another one now. Restore the data of the "
    "interrupted run, or start a new run from the checkpoint's weights."
)


class _Removed(str):
    """Placeholder for a document of a removed file in a block that is read again; empty, so that it is skipped."""


class PackedStream(torch.utils.data.IterableDataset):
    """Documents packed into rows while they are read; every document goes to exactly one rank and worker.

    Whole shards (files) are assigned if there is at least one for each reader (rank times worker); otherwise every
    reader reads all shards and keeps each n-th document, so that a stream of one shard serves all readers.
    Each reader packs its own documents: rows depend on the number of readers, their tokens together do not.

    With `shuffle_seed`, shards come in random order and each block of `shuffle_buffer` documents is permuted,
    differently in every pass. The permutation depends on the block's number alone, so that reading can resume anywhere.
    The rolling buffer of `datasets.IterableDataset.shuffle` is lost on resuming, and is refused.

    Args:
        documents: `datasets.IterableDataset` with a text column, not shuffled.
        tokenizer: Its end-of-text token separates documents.
        length: L, tokens per row.
        text_column: Column that holds the text.
        rank, world_size: Which of how many processes this one is.
        repeat: Start over at the end, so that no rank ends before another; the tokens left over begin the next pass.
            Otherwise they become a last, shorter row.
        shuffle_seed: Seed of the order; None reads in the given order.
        shuffle_buffer: Documents permuted together, held in memory by each reader.
        source: Identity of the data, e.g. `find_files(...).fingerprint`; kept in checkpoints.

    Raises:
        ValueError: If rank, length or buffer are out of range or the documents are shuffled already. While reading: as
            `PackedDataset`; if a reader gets no document at all; if the data changed under a resumed reader.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        text_column: str = "text",
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = True,
        shuffle_seed: int | None = None,
        shuffle_buffer: int = 10_000,
        source: Mapping[str, Any] | None = None,
    ):
        check_length(length)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must lie in [0, world_size={world_size}).")
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer} must be at least 1 document.")
        _refuse_shuffled(documents)
        self.documents = documents
        self.tokenizer = tokenizer
        self.length = length
        self.text_column = text_column
        self.rank = rank
        self.world_size = world_size
        self.repeat = repeat
        self.shuffle_seed = shuffle_seed
        self.shuffle_buffer = shuffle_buffer
        self.source = source
        files = (source or {}).get("files") if isinstance(source, Mapping) else None
        # Numbers of files that were removed during the run (`SourceFiles.fingerprint`).
        self._removed = {number for number, entry in enumerate(files or ()) if entry[1] is None}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the stream: source, order and row length, as JSON."""
        order = None if self.shuffle_seed is None else [self.shuffle_seed, self.shuffle_buffer]
        return {"source": self.source, "length": self.length, "shuffle": order}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return (row for row, _ in self.read(worker_id, workers))

    def read(
        self, worker: int = 0, workers: int = 1, state: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Rows of one reader of this rank, each with the state that resumes after it.

        Args:
            worker, workers: Which of how many readers on this rank.
            state: As returned with the last row read, for the same number of readers; None starts at the beginning.

        Returns:
            Pairs of a row and a state; a state is JSON and does not grow. For documents with a
            `place` (`SourceFiles.documents`), its `read` says how far files were read since the row before.
        """
        encoder = Encoder(self.tokenizer, self.text_column)
        buffer: list[int] = []
        read: dict[str, list[int]] = {}
        for ids, place in self._encoded(encoder, worker, workers, state):
            read.update(place.pop("read", {}))
            buffer.extend(ids)
            while len(buffer) >= self.length:
                row = {"input_ids": torch.tensor(buffer[: self.length])}
                del buffer[: self.length]
                # The rest belongs to this document: all earlier tokens are in rows already.
                yield row, {**place, "left": len(buffer), "read": read}
                read = {}
        if buffer:
            yield {"input_ids": torch.tensor(buffer)}, {}

    def _encoded(
        self, encoder: Encoder, worker: int, workers: int, state: Mapping[str, Any] | None
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Token ids of each document, and its place: block, number in the block, checksum."""
        resumed = dict(state) if state else None
        for block, texts in self._blocks(encoder, worker, workers, resumed):
            first = resumed["document"] if resumed else 0
            if first < len(texts) and isinstance(texts[first], _Removed):
                if resumed["left"]:  # the rest of the document was removed with its file, so it ends here
                    place = {**block, "document": first, "checksum": resumed["checksum"]}
                    yield [self.tokenizer.eos_token_id], place
                resumed = None
            for start in range(first, len(texts), DOCUMENTS_PER_CALL):
                chunk = texts[start : start + DOCUMENTS_PER_CALL]
                for number, text, ids in encoder.encode(chunk):
                    place = {**block, "document": start + number, "checksum": checksum(text)}
                    block.pop("read", None)  # once per block
                    if resumed:
                        ids = self._rest_of(ids, place, resumed)
                        resumed = None
                    yield ids, place
            if resumed:
                raise ValueError(_DATA_CHANGED)

    @staticmethod
    def _rest_of(ids: list[int], place: Mapping[str, Any], state: Mapping[str, Any]) -> list[int]:
        same = (place["document"], place["checksum"]) == (state["document"], state["checksum"])
        if not same or state["left"] > len(ids):
            raise ValueError(_DATA_CHANGED)
        return ids[len(ids) - state["left"] :]

    def _blocks(
        self, encoder: Encoder, worker: int, workers: int, state: Mapping[str, Any] | None
    ) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        """Documents in blocks, permuted, and where each block starts."""
        readers, reader = self.world_size * workers, self.rank * workers + worker
        documents = self._share_of(reader, readers)
        if state:
            documents.load_state_dict(state["source"])
        for epoch in itertools.count(state["epoch"] if state else 0):
            number = state["block"] if state else 0
            documents.set_epoch(self._order(epoch) if self.shuffle_seed is not None else epoch)
            source, texts, layout, read = state["source"] if state else None, [], [], {}
            if state and state.get("layout"):
                place = {"epoch": epoch, "block": number, "source": source, "layout": state["layout"]}
                yield place, self._permuted(self._block_again(documents, state["layout"]), epoch, number)
                number, source = number + 1, documents.state_dict()
                documents.load_state_dict(source)
            state = None
            # `iter` in batches, unlike `__iter__`, leaves the split by worker to us.
            for batch in itertools.chain(documents.iter(DOCUMENTS_PER_CALL), [None]):
                if batch is not None:
                    check_column(self.text_column, batch, "the dataset")
                    texts += batch[self.text_column]
                    _record_places(batch.get("place", ()), layout, read)
                if texts and (batch is None or self.shuffle_seed is None or len(texts) >= self.shuffle_buffer):
                    place = {"epoch": epoch, "block": number, "source": source, "layout": layout, "read": read}
                    yield place, self._permuted(texts, epoch, number)
                    number, texts, layout, read = number + 1, [], [], {}
                if not texts:
                    source = documents.state_dict()
            encoder.end_of_pass()
            if not self.repeat:
                break

    def _block_again(self, documents: datasets.IterableDataset, layout: Sequence[Sequence[int]]) -> list[Any]:
        """The documents of the block in which reading resumes, with placeholders for those of removed files."""
        rest = documents.iter(1)
        texts: list[Any] = []
        for file, count in layout:
            if file in self._removed:
                texts += [_Removed()] * count
                continue
            for _ in range(count):
                document = next(rest, None)
                if document is None or document["place"][0][0] != file:
                    raise ValueError(_DATA_CHANGED)
                texts += document[self.text_column]
        return texts

    def _share_of(self, reader: int, readers: int) -> datasets.IterableDataset:
        strategy = "shards" if self.documents.num_shards >= readers else "examples"
        return split_dataset_by_node(self.documents, rank=reader, world_size=readers, strategy=strategy)

    def _order(self, *place: int) -> int:
        return int(np.random.SeedSequence((self.shuffle_seed, *place)).generate_state(1)[0])

    def _permuted(self, texts: list[Any], epoch: int, block: int) -> list[Any]:
        if self.shuffle_seed is None:
            return texts
        order = np.random.default_rng((self.shuffle_seed, epoch, block, 1)).permutation(len(texts))
        return [texts[index] for index in order]


def _record_places(places: Sequence[Sequence[int]], layout: list[list[int]], read: dict[str, list[int]]) -> None:
    """Record how many documents of each file follow each other in a block, and how far each file was read."""
    for file, count, crc in places:
        read[str(file)] = [count, crc]
        if not layout or layout[-1][0] != file:
            layout.append([file, 0])
        layout[-1][1] += 1


def _refuse_shuffled(documents: datasets.IterableDataset) -> None:
    # A chain of iterables, each around the next; `datasets` offers no public way to ask.
    node = getattr(documents, "_ex_iterable", None)
    while node is not None:
        if isinstance(node, BufferShuffledExamplesIterable):
            raise ValueError(
                "documents are shuffled by datasets, whose buffer is lost on resuming: "
                "leave out .shuffle() and give PackedStream a shuffle_seed and shuffle_buffer."
            )
        node = getattr(node, "ex_iterable", None)


@dataclass
class StreamPosition:
    """Position of the readers of one rank after the batches that training has used (not those read ahead).

    Args:
        batches: Batches used by this rank.
        states: By worker, as a string, the state after the last row used from it.
        read: By number of the file, as a string, how many documents were read of it at most in one pass, and the
            CRC-32 of their texts (`source_files.check_same_files`).
    """

    batches: int = 0
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    read: dict[str, list[int]] = field(default_factory=dict)

    def advance(self, stream_state: str) -> None:
        """Count one batch, which came with this `stream_state`."""
        worker, state = json.loads(stream_state)
        self.batches += 1
        for file, found in state.pop("read", {}).items():
            self.read[file] = max(self.read.get(file, [0, 0]), found)
        self.states[str(worker)] = state

    def as_json(self) -> dict[str, Any]:
        """The fields, as the arguments that make an equal object."""
        return asdict(self)


class _ReaderRows(torch.utils.data.IterableDataset):
    """Rows of a stream from a position on, each with its worker and the state after it."""

    def __init__(self, stream: PackedStream, position: StreamPosition):
        self.stream = stream
        self.position = position

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], int, dict[str, Any]]]:
        info = torch.utils.data.get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        # A loader asks its workers in turn, from the first on; the first must be the one whose turn it was.
        worker = (worker + self.position.batches) % workers
        for row, state in self.stream.read(worker, workers, self.position.states.get(str(worker))):
            yield row, worker, state


@dataclass
class _CollateWithState:
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[tuple[dict[str, Tensor], int, dict[str, Any]]]) -> dict[str, Any]:
        _, worker, state = rows[-1]
        read = {file: found for _, _, each in rows for file, found in each.get("read", {}).items()}
        state = {**state, "read": read} if state else state
        return {**self.collate([row for row, _, _ in rows]), "stream_state": json.dumps([worker, state])}


def stream_loader(
    stream: PackedStream, position: StreamPosition, collate_fn: Callable, **options: Any
) -> torch.utils.data.DataLoader:
    """Loader over this rank's part of a stream from `position` on; each batch has a `stream_state` for `advance`.

    Args:
        stream: The stream.
        position: Where to start.
        collate_fn: Makes a batch, a dictionary, of rows.
        options: Further arguments of `DataLoader`.
    """
    return torch.utils.data.DataLoader(
        _ReaderRows(stream, StreamPosition(position.batches, dict(position.states))),
        collate_fn=_CollateWithState(collate_fn),
        generator=torch.Generator(),  # the global one must not move, or dropout would differ after resuming
        **options,
    )
