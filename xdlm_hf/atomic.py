"""Atomic writing of files and folders."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Write a file under another name beside it, then rename it: `path` is as before, or holds all of `content`."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_new_folder(path: str | os.PathLike) -> Path:
    """The absolute path of a folder that does not exist yet, or is empty.

    Raises:
        ValueError: If it is not empty, or is a file.
    """
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; use a new one.")
    return path


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder to write into; it is renamed to `path` if the block succeeds, and removed otherwise.

    Raises:
        ValueError: As `check_new_folder`.
    """
    path = check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=path.name + ".", dir=path.parent) as unfinished:
        folder = Path(unfinished) / path.name
        folder.mkdir()
        yield folder
        folder.rename(path)
