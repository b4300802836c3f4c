"""Rows of the tasks, from local files or the Hub: one setting says which, and every row is checked.

The setting is `--metadata data=PATH`, or the environment variable XDLM_DATA: a folder in which each benchmark has its
own (gsm8k/, math/, bbh/, humaneval/, mbpp/), or, for a single task, its JSONL file. Without it, rows come from the Hub.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets


def local_path(data: str | None, inside: str) -> Path | None:
    """Where a task's local file is: `data`, else XDLM_DATA; the path itself, or `inside` when it is a folder."""
    setting = data or os.environ.get("XDLM_DATA")
    if not setting:
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
    """Every row through `parse_row(row, where)`, `where` being what its ValueError should open with.

    Args:
        data: The setting, or None.
        inside: The file's place in a folder of local files.
        hub: Name, configuration and split of the dataset to read without local files.
        parse_row: Checks a row and keeps what the task needs of it.
        read: Reads a local file that is no JSONL, as (where, row) pairs.

    Raises:
        ValueError: If the file is missing or holds no rows, a line is no JSON object, or the Hub cannot be read.
    """
    path = local_path(data, inside)
    if path is None:
        rows = hub_rows(*hub)
    elif not path.is_file():
        raise ValueError(f"no such file: {path} (set by --metadata data=PATH or XDLM_DATA)")
    else:
        rows = (read or read_lines)(path)
    parsed = [parse_row(row, where) for where, row in rows]
    if not parsed:
        raise ValueError(f"{path or hub[0]} holds no rows")
    return parsed


def hub_rows(name: str, config: str | None, split: str) -> list[tuple[str, dict]]:
    """(where, row) of a dataset on the Hub.

    Raises:
        ValueError: If it cannot be reached, saying how to use local files.
    """
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:  # no connection, offline mode, no such dataset
        raise ValueError(
            f"cannot read {name} from the Hub ({type(error).__name__}): for local files, pass --metadata data=PATH or "
            "set XDLM_DATA, PATH being the task's JSONL file or a folder of all tasks' files (docs/evaluation.md)"
        ) from error
    return [(f"{name}, row {n}", row) for n, row in enumerate(rows)]


def read_lines(path: Path) -> list[tuple[str, dict]]:
    """(where, row) of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [
            (f"{path}, line {n}", _object(line, f"{path}, line {n}")) for n, line in enumerate(lines, 1) if line.strip()
        ]


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
    return row


def as_test_split(rows: list[dict]) -> datasets.DatasetDict:
    """What lm-eval wants of a `custom_dataset`."""
    return datasets.DatasetDict(test=datasets.Dataset.from_list(rows))
