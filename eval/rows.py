"""Rows of the tasks, read from local files or the Hub and checked one by one.

`--metadata data=PATH`, or the environment variable XDLM_DATA, names a folder with a subfolder for each benchmark
(gsm8k/, math/, bbh/, humaneval/, mbpp/), or the JSONL file of a single task. Without it, or with `data=hub`, rows come
from the Hub; `data=hub@REVISION` names a branch, tag or commit of the dataset.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets

from xdlm_hf.training.revisions import pin_revision, revision_to_read

HUB = "hub"

READ: dict[str, dict[str, str | None]] = {}
"""What tasks have read in this process: `sha256` of each local file, or of the rows of each dataset on the Hub with its
`commit`, None if the Hub could not be reached."""

# Cached, so that all subtasks of a dataset, and the check before the run, read the same commit of a branch.
_pinned = functools.cache(pin_revision)


def local_path(data: str | None, inside: str) -> Path | None:
    """A task's local file: the path in `data` or XDLM_DATA, or `inside` that folder; None for the Hub."""
    setting = data or os.environ.get("XDLM_DATA")
    if not setting or setting.partition("@")[0] == HUB:
        return None
    path = Path(setting).expanduser()
    return path / inside if path.is_dir() else path


def load_rows(
    data: str | None,
    inside: str,
    hub: tuple[str, str | None, str],
    parse_row: Callable[[dict[str, Any], str], dict],
    read: Callable[[Path], Iterable[tuple[str, dict]]] | None = None,
) -> list[dict]:
    """The rows of a task.

    Args:
        data: The metadata `data`, or None.
        inside: The file's path in a folder of local files.
        hub: Name, configuration and split of the dataset to read without local files.
        parse_row: Called with each row and its location, which begins the message of its errors; returns the fields
            that the task needs.
        read: Reads a local file that is not JSONL, as (location, row) pairs.

    Raises:
        ValueError: If the file is missing, cannot be decoded or holds no rows, a line is not a JSON object, or the Hub
            or the revision cannot be read.
    """
    path = local_path(data, inside)
    if path is None:
        setting = data or os.environ.get("XDLM_DATA") or HUB
        rows = hub_rows(*hub, setting.partition("@")[2] or None)
    elif not path.is_file():
        raise ValueError(f"no such file: {path} (set by --metadata data=PATH or XDLM_DATA)")
    else:
        rows = (read or read_lines)(path)
    parsed = [parse_row(row, where) for where, row in rows]
    if not parsed:
        raise ValueError(f"{path or hub[0]} holds no rows")
    return parsed


def hub_rows(name: str, config: str | None, split: str, revision: str | None = None) -> list[tuple[str, dict]]:
    """(location, row) pairs of a dataset on the Hub.

    Raises:
        ValueError: If it has no such revision or cannot be reached.
    """
    pinned = _pinned(name, revision)
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision_to_read(pinned))
    except (OSError, datasets.exceptions.DatasetsError) as error:  # no connection, offline mode, no such dataset
        raise ValueError(
            f"cannot read {name} from the Hub ({type(error).__name__}): for local files, pass --metadata data=PATH or "
            "set XDLM_DATA, PATH being the task's JSONL file or a folder of all tasks' files (docs/evaluation.md)"
        ) from error
    rows = list(rows)
    text = json.dumps(rows, sort_keys=True, default=str)
    where = " ".join(filter(None, (name, config, split)))
    READ[where] = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "commit": pinned["commit"]}
    return [(f"{name}, row {n}", row) for n, row in enumerate(rows)]


def read_text(path: Path) -> str:
    """The text of a file, whose hash is added to `READ`.

    Raises:
        ValueError: If it cannot be read, or is not UTF-8, naming the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    READ[str(path)] = {"sha256": hashlib.sha256(content).hexdigest()}
    try:
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02x}, {error.reason}"
        raise ValueError(f"{path}, line {line}: not UTF-8 ({byte})") from error


def read_lines(path: Path) -> list[tuple[str, dict]]:
    """(location, row) pairs of a JSONL file."""
    # Not splitlines(), which also splits at separators that JSON allows within a text.
    lines = ((f"{path}, line {n}", line) for n, line in enumerate(read_text(path).split("\n"), 1))
    return [(where, _object(line, where)) for where, line in lines if line.strip()]


def require_texts(row: dict[str, Any], names: Iterable[str], where: str) -> None:
    """Raises ValueError unless every one of `names` is a text in `row`."""
    if not all(isinstance(row.get(name), str) for name in names):
        raise ValueError(
            f"{where}: needs the texts {' and '.join(repr(n) for n in names)}, got {json.dumps(row, default=str)[:80]}"
        )


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: needs an object, got {line[:80]!r}")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: holds half a surrogate pair, which is not valid text: {error}") from error
    return row


def as_test_split(rows: list[dict]) -> datasets.DatasetDict:
    """Rows in the form that lm-eval expects of a `custom_dataset`."""
    return datasets.DatasetDict(test=datasets.Dataset.from_list(rows))
