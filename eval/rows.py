"""Rows of the tasks' local files: where they are, and reading them with every row checked."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def task_file(task: str, data: str | None, inside: str) -> Path:
    """The file a task reads: `data`, else XDLM_DATA; the path itself, or `inside` when it is a folder.

    Raises:
        ValueError: If neither is set.
    """
    setting = data or os.environ.get("XDLM_DATA")
    if not setting:
        raise ValueError(
            f"{task} reads local files and none are set: pass --metadata data=PATH or set XDLM_DATA, PATH "
            f"being a JSONL file or a folder with {inside}"
        )
    path = Path(setting).expanduser()
    return path / inside if path.is_dir() else path


def read_rows(path: Path, parse_row: Callable[[dict[str, Any], str], dict]) -> list[dict]:
    """Every row of a JSONL file through `parse_row(row, where)`, `where` being what its ValueError should open with.

    Raises:
        ValueError: If the file is missing or holds no rows, or a line is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path} (set by --metadata data=PATH or XDLM_DATA)")
    with path.open(encoding="utf-8") as lines:
        rows = [
            parse_row(_object(line, f"{path}, line {n}"), f"{path}, line {n}")
            for n, line in enumerate(lines, 1)
            if line.strip()
        ]
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: needs an object, got {line[:80]!r}")
    return row
