"""Checksums of a checkpoint's files, written with it and compared before it is resumed.

`checksums.json` maps every other file of the folder to its size in bytes and its CRC-32, which detects every single
flipped bit. It is written last. The files are hashed by all processes that see the folder.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

CHECKSUMS = "checksums.json"
_BLOCK = 1 << 22  # bytes read at once
_THREADS = 4  # zlib releases the GIL


def write_checksums(folder: Path, shared: bool = True) -> None:
    """Hash every file of a written checkpoint. Every process must call this, after all of them have written.

    Args:
        folder: The checkpoint.
        shared: Whether all processes see the same folder; otherwise the first process of each node hashes its own.
    """
    found = _our_share(_files(folder), lambda name: (name, file_checksum(folder / name)), shared)
    checksums = dict(sorted(_gathered(found) if shared else found))
    if PartialState().is_main_process or (not shared and PartialState().is_local_main_process):
        (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1), encoding="utf-8")


def damage(folder: Path, shared: bool = True) -> list[str] | None:
    """Damage of a checkpoint's files, one sentence for each damaged file. Every process must call this.

    Returns:
        Empty if all files match; None if there are no readable checksums.
    """
    recorded = _recorded(folder)
    known = _gathered([recorded is not None])
    if not all(known):
        return None
    found = _our_share(list(recorded), lambda name: _damage_of(folder, name, recorded[name]), shared)
    return sorted(_gathered([sentence for sentence in found if sentence]))


def file_checksum(path: Path) -> list[int]:
    """Size of a file in bytes, and its CRC-32."""
    size = checksum = 0
    with open(path, "rb") as content:
        while block := content.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _recorded(folder: Path) -> dict[str, list[int]] | None:
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) else None


def _damage_of(folder: Path, name: str, recorded: Sequence[int]) -> str | None:
    try:
        found = file_checksum(folder / name)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if found[0] != recorded[0]:
        return f"{name} has {found[0]} bytes, {recorded[0]} were written"
    return None if found == list(recorded) else f"{name} has another checksum than when it was written"


def _files(folder: Path) -> list[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != CHECKSUMS)


def _our_share(names: Sequence[str], task: Callable[[str], Any], shared: bool) -> list[Any]:
    """Results of a task on this process' share of the files."""
    state = PartialState()
    if shared:
        names = names[state.process_index :: state.num_processes]
    elif not state.is_local_main_process:
        names = []
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(task, names))


def _gathered(results: list[Any]) -> list[Any]:
    return gather_object(results) if PartialState().num_processes > 1 else results
