"""Readers of documents: from the Hub, from local files, and from Python's own documentation."""

import ast
import glob
import gzip
import json
import logging
import os
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import datasets
import pyarrow.parquet

logger = logging.getLogger(__name__)
# Left out of the reference text: tests, and packages that Linux distributions ship separately or not at all.
_OPTIONAL_PACKAGES = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "tkinter", "turtledemo"}
    | {"lib2to3", "distutils", "ensurepip", "__phello__", "pydoc_data"}
)
# JSON can hold half of a surrogate pair, which tokenizers refuse.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def load_documents(
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    data_files: Sequence[str] | None = None,
    text_column: str = "text",
    skip_corrupted: bool = False,
    revision: str | None = None,
) -> datasets.IterableDataset:
    """Stream of documents `{"text": str}` from a Hub dataset or from local files.

    Args:
        dataset: Dataset on the Hub, read by streaming. Exclusive with `data_files`.
        config: Its configuration, e.g. `sample-10BT`.
        split: Its split.
        data_files: Local paths or glob patterns: `.jsonl` (one object per line), `.parquet`, and `.txt` or `.md`
            (one document per file); `.gz` of the text formats. One file is one shard.
        text_column: Field that holds the text.
        skip_corrupted: Leave out lines of local JSONL files that are not JSON objects with text in that field; they
            are counted and their numbers logged, at the 1st, 10th, 100th ... of a file and at its end. By default such
            a line is an error.
        revision: Branch, tag or commit of the dataset; `revisions.pin_revision` finds a commit.

    Raises:
        ValueError: If not exactly one source is given, a pattern matches no file, a suffix is unknown, or there is no
            such column. While reading: a corrupted line, naming file and line, or a damaged file.
    """
    check_source(dataset, data_files, skip_corrupted)
    if data_files is not None:
        return stream_files(expand_files(data_files), text_column, skip_corrupted)
    documents = datasets.load_dataset(dataset, config, split=split, revision=revision, streaming=True)
    names = documents.column_names or list(next(iter(documents)))
    check_column(text_column, names, f"dataset {dataset!r}")
    documents = documents.select_columns([text_column])
    return documents if text_column == "text" else documents.rename_column(text_column, "text")


def check_source(dataset: str | None, data_files: Sequence[str] | None, skip_corrupted: bool = False) -> None:
    """Refuse options of `load_documents` that do not go together, before the Hub or a file is read."""
    if (dataset is None) == (data_files is None):
        raise ValueError(f"give one of dataset and data_files, not dataset={dataset!r} and data_files={data_files!r}.")
    if skip_corrupted and data_files is None:
        raise ValueError("skip_corrupted=True is for the lines of local JSONL files: give data_files.")


def expand_files(patterns: Sequence[str]) -> list[str]:
    """Files of paths and glob patterns, in order.

    Raises:
        ValueError: If there is none, a pattern matches none, one has an unknown suffix, or one is given twice, also
            under another name of the same file.
    """
    files = []
    for pattern in patterns:
        matches = sorted(glob.glob(str(pattern), recursive=True))
        if not matches:
            raise ValueError(f"data_files: {str(pattern)!r} matches no file.")
        files.extend(matches)
    if not files:
        raise ValueError("data_files names no file.")
    seen: dict[str, str] = {}
    for file in files:
        first = seen.setdefault(os.path.realpath(file), file)
        if first is not file:
            also = "" if first == file else f", also as {first!r}"
            raise ValueError(f"data_files: {file!r} is given twice{also}: its text would be read twice in each pass.")
        if _suffix(file) not in _READERS:
            raise ValueError(f"{file}: unknown suffix; expected one of {sorted(_READERS)}, optionally with .gz.")
    return files


def _suffix(file: str) -> str:
    return pathlib.Path(file.removesuffix(".gz")).suffix


def stream_files(
    files: Sequence[str], text_column: str, skip_corrupted: bool, places: bool = False
) -> datasets.IterableDataset:
    """Stream of documents `{"text": str}` from files that exist, one shard each; an empty name is an empty shard.

    Args:
        files, text_column, skip_corrupted: As `load_documents`, patterns expanded.
        places: Add a column `place`: [number of the file, documents read of it, running CRC-32 of their texts].
    """
    return datasets.IterableDataset.from_generator(
        _read_files,
        # All of the same length, because `datasets` shards every list that a generator takes.
        gen_kwargs={
            "files": list(files),
            "numbers": list(range(len(files))),
            "column": text_column,
            "skip_corrupted": skip_corrupted,
            "places": places,
        },
    )


def _read_files(
    files: list[str], numbers: list[int], column: str, skip_corrupted: bool, places: bool
) -> Iterator[dict[str, Any]]:
    for file, number in zip(files, numbers, strict=True):
        crc = 0
        try:
            for count, text in enumerate(read_documents(file, column, skip_corrupted) if file else (), start=1):
                crc = checksum(text, crc)
                yield {"text": text, "place": [number, count, crc]} if places else {"text": text}
        except ValueError as error:
            if not places:
                raise
            raise ValueError(
                f"{error} A streamed run goes on after the file is repaired or removed, with "
                "--resume_from_checkpoint auto --accept_repaired_data true."
            ) from error


def read_documents(file: str, column: str, skip_corrupted: bool) -> Iterator[str | None]:
    """Texts of one file, as `load_documents` reads it."""
    return _READERS[_suffix(file)](file, column, skip_corrupted)


def read_lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, gzipped or not; ValueError if it is damaged."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007  (the handler names the last line read)
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}, after line {number}: damaged gzip file ({error}); fetch it again.") from error


def _read_jsonl(file: str, column: str, skip_corrupted: bool) -> Iterator[str | None]:
    corrupted, report_at = [], 1
    for number, line in read_lines(file):
        if not line.strip():
            continue
        try:
            text = _parse_line(line, column, f"{file}, line {number}")
        except ValueError as error:
            if not skip_corrupted:
                raise ValueError(f"{error} With skip_corrupted such lines are left out.") from error
            corrupted.append(number)
            if len(corrupted) == report_at:  # a run may end before its file does
                _report_skipped(file, corrupted)
                report_at *= 10
        else:
            yield text
    if corrupted and 10 * len(corrupted) != report_at:
        _report_skipped(file, corrupted)


def _report_skipped(file: str, corrupted: Sequence[int]) -> None:
    shown = ", ".join(map(str, corrupted[:20])) + (", ..." if len(corrupted) > 20 else "")
    logger.warning("%s: skipped %d corrupted lines (%s)", file, len(corrupted), shown)


def _parse_line(line: bytes, column: str, where: str) -> str | None:
    record = parse_object(line, where)
    check_column(column, record, where)
    if record[column] is not None and not isinstance(record[column], str):
        raise ValueError(f"{where}: {column!r} holds {type(record[column]).__name__}, not text.")
    return record[column]


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object in a line; ValueError naming `where` if there is none."""
    try:
        record = json.loads(line)
        if _SURROGATE.search(line):
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, half a surrogate pair, a million brackets
        raise ValueError(f"{where}: not valid JSON ({error}); repair or remove the line.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}; repair or remove the line.")
    return record


def _read_parquet(file: str, column: str, skip_corrupted: bool) -> Iterator[str | None]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: damaged Parquet file ({error}); fetch it again.") from error
    with table:
        check_column(column, table.schema_arrow.names, file)
        for batch in table.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


def _read_text(file: str, column: str, skip_corrupted: bool) -> Iterator[str]:
    content = b"".join(line for _, line in read_lines(file))
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error}).") from error


_READERS: dict[str, Callable[[str, str, bool], Iterator[str | None]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}


def check_column(column: str, names: Iterable[str], where: str) -> None:
    if column not in names:
        raise ValueError(f"{where}: no column {column!r}; it has {sorted(names)}. Set text_column to one of them.")


def hold_out(
    documents: datasets.IterableDataset, fraction: float
) -> tuple[datasets.IterableDataset, datasets.IterableDataset]:
    """Split documents into training and validation by a hash of their text.

    The split depends on the text alone, so that it is the same on every rank and worker, in every order and every run,
    and copies of a document are on the same side. (After sharding, `skip` skips other documents than `take` takes.)

    Raises:
        ValueError: If `fraction` is not in (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation fraction {fraction} must lie strictly between 0 and 1.")
    threshold = int(fraction * 2**32)
    train = documents.filter(_HashFilter(threshold, held_out=False), input_columns=["text"])
    return train, documents.filter(_HashFilter(threshold, held_out=True), input_columns=["text"])


def checksum(text: str | None, before: int = 0) -> int:
    """CRC-32 of a text, continued from that of the texts before it."""
    return zlib.crc32((text or "").encode("utf-8", "surrogatepass"), before)


@dataclass(frozen=True)
class _HashFilter:
    threshold: int
    held_out: bool

    def __call__(self, text: str | None) -> bool:
        return (checksum(text) < self.threshold) == self.held_out


def python_reference_documents() -> datasets.IterableDataset:
    """Python's own documentation as documents `{"text": str}`, without a download.

    First the language reference that `help()` shows (`pydoc_data.topics`, 79 documents in Python 3.11), then one
    document per standard-library module with all its docstrings, 2.2 MB in all. The modules are parsed, never
    imported. The order is alphabetical; the text depends on the Python version alone.
    """
    texts = [topics[name] for name in sorted(topics)]
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(_python_files(root)):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        text = _docstrings(ast.parse(path.read_bytes()), name)
        if text:
            texts.append(text)
    return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()


def _python_files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - _OPTIONAL_PACKAGES  # in place: site-packages is not even entered
        yield from (pathlib.Path(folder, file) for file in files if file.endswith(".py"))


def _docstrings(tree: ast.Module, module: str) -> str:
    """The docstrings of a module, each under its dotted name, in source order."""
    sections = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                sections.append(f"{name}\n\n{docstring}\n")
        for child in ast.iter_child_nodes(node):
            visit(child, f"{name}.{child.name}" if hasattr(child, "name") else name)

    visit(tree, module)
    return "\n".join(sections)
