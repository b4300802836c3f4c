"""Local files of a stream: their identity, and the changes that a resumed run accepts.

A file is identified by its path below the folder that all files have in common, so that a dataset may be moved as a
whole, and by its content. The files of a run keep their numbers: a removed file leaves an empty place, so that the
others stay with the same readers.
"""

import itertools
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from .readers import checksum, expand_files, read_documents, stream_files

logger = logging.getLogger(__name__)
_SAMPLE = 1 << 16  # bytes of one sample of a large file
_SAMPLES = 256  # a file of up to 16 MiB is read whole


@dataclass(frozen=True)
class SourceFiles:
    """The files of a stream, each in its numbered place.

    Args:
        root: Folder that the files have in common, absolute.
        names: Paths below `root`, with `/`.
        present: Whether each is there; a file that was removed during a run keeps its place.
    """

    root: str
    names: Sequence[str]
    present: Sequence[bool]

    @property
    def paths(self) -> list[str]:
        """Where to read each file; an empty string for one that was removed."""
        return [
            os.path.join(self.root, name) if there else "" for name, there in zip(self.names, self.present, strict=True)
        ]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """`{"root": folder, "files": [[path below it, bytes, CRC-32], ...]}`, as JSON; None and None for a removed one.

        The CRC-32 is over the whole content of files up to 16 MiB, and over 256 evenly spaced samples of 64 KiB, both
        ends included, of larger ones. A change between the samples that keeps the size is not seen here.
        """
        files = [
            [name, *(_fingerprint(path) if path else (None, None))]
            for name, path in zip(self.names, self.paths, strict=True)
        ]
        return {"root": self.root, "files": files}

    def documents(self, text_column: str = "text", skip_corrupted: bool = False) -> datasets.IterableDataset:
        """Stream of documents as from `load_documents`, each with its `place`, which tells `PackedStream` what was read
        of each file: [number of the file, documents read of it, CRC-32 of their texts]."""
        return stream_files(self.paths, text_column, skip_corrupted, places=True)


def find_files(patterns: Sequence[str], recorded: Mapping[str, Any] | None = None) -> SourceFiles:
    """Files of a stream.

    Args:
        patterns: As `data_files` of `load_documents`.
        recorded: On resuming, the `source` in the checkpoint. Files keep the places that they have there.

    Raises:
        ValueError: As `load_documents`.
    """
    ours = [os.path.abspath(file) for file in expand_files(patterns)]
    root = os.path.commonpath([os.path.dirname(file) for file in ours])
    known = [name for name, _, _ in recorded["files"]] if recorded and "root" in recorded else []
    for folder in (recorded["root"], root) if known else ():  # unmoved, or moved as a whole
        places = [os.path.normpath(os.path.join(folder, name)) for name in known]
        if set(ours) <= set(places):
            return SourceFiles(folder, known, [place in ours for place in places])
    return SourceFiles(root, [Path(file).relative_to(root).as_posix() for file in ours], [True] * len(ours))


def _fingerprint(file: str) -> tuple[int, int]:
    with open(file, "rb") as content:
        size = content.seek(0, os.SEEK_END)
        if size <= _SAMPLE * _SAMPLES:
            content.seek(0)
            return size, zlib.crc32(content.read())
        found = 0
        for sample in range(_SAMPLES):
            content.seek((size - _SAMPLE) * sample // (_SAMPLES - 1))
            found = zlib.crc32(content.read(_SAMPLE), found)
        return size, found


def check_same_files(
    checkpoint: Path, saved: Mapping[str, Any], ours: Mapping[str, Any], readers: int, accept_repaired: bool
) -> None:
    """Compare the files of a checkpoint's stream with those of the run that is to resume it.

    With `accept_repaired`, a file may differ as long as the documents that were read of it are the same, and a file may
    be removed. The resumed run then reads exactly the documents that were not read before.

    Args:
        checkpoint: Its folder.
        saved, ours: The two `source` records, each with `root` and `files`.
        readers: Readers of the stream, processes times workers.
        accept_repaired: Whether files may be repaired or removed.

    Raises:
        ValueError: If files differ; with `accept_repaired`, if the resumed run could not be exact.
    """
    before, now = ({name: content for name, *content in source["files"]} for source in (saved, ours))
    if list(before) != list(now):
        unknown = sorted(set(now) - set(before))
        what = f"data file {unknown[0]!r} is new" if unknown else "data files are missing or in another order"
        raise ValueError(
            f"{checkpoint.name}: {what}: documents would be seen twice or never. Files may be repaired or removed "
            "during a run, not added or renamed."
        )
    read = _read_of_each_file(checkpoint)
    for number, (name, content) in enumerate(now.items()):
        if content == before[name]:
            continue
        gone = content[0] is None
        what = f"data file {name!r} " + ("is gone" if gone else f"had {before[name]} (bytes, CRC-32), now {content}")
        if not accept_repaired:
            raise ValueError(
                f"{checkpoint.name}: {what}: documents would be seen twice or never. Restore it; or, if it was "
                "repaired or removed on purpose, go on with accept_repaired_data=True."
            )
        documents, crc = read.get(number, (0, 0))
        if gone and documents and len(now) < readers:
            raise ValueError(
                f"{checkpoint.name}: {what}: {documents} documents of it were read, and with fewer files than readers "
                f"({readers}) all of them count its documents. Restore the file at least up to there."
            )
        if not gone and _checksum_of(ours, name, documents) != crc:
            raise ValueError(
                f"{checkpoint.name}: {what}: the first {documents} documents, which were read, are others than before. "
                "Restore them; what follows them may be repaired, and the file as a whole may be removed."
            )
        logger.warning("%s: %s; %d documents of it were read before.", checkpoint.name, what, documents)


def _read_of_each_file(checkpoint: Path) -> dict[int, tuple[int, int]]:
    """By number of the file, the most documents read of it in one pass, and the CRC-32 of their texts."""
    read: dict[int, tuple[int, int]] = {}
    for path in checkpoint.glob("stream_state_*.json"):
        for number, found in json.loads(path.read_text(encoding="utf-8")).get("read", {}).items():
            read[int(number)] = max(read.get(int(number), (0, 0)), tuple(found))
    return read


def _checksum_of(source: Mapping[str, Any], name: str, documents: int) -> int | None:
    """CRC-32 of the first documents of a file; None if it has fewer."""
    texts = read_documents(os.path.join(source["root"], name), source.get("text_column", "text"), skip_corrupted=True)
    crc = number = 0
    for number, text in enumerate(itertools.islice(texts, documents), start=1):  # noqa: B007  (counts them)
        crc = checksum(text, crc)
    return crc if number == documents else None
