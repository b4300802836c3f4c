"""Provenance of a score: commits or content hashes of checkpoints, hardware, layers of the sandbox.

A branch on the Hub can change. So a run resolves it to a commit before anything is loaded, and results name the commit
as `model_sha`; for a local folder it is a hash of its files.
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from xdlm_hf.evaluation.sandbox import layers, require_consent

# Files that answers depend on: weights, configs, tokenizers, chat templates, an adapter's noise.
_HASHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def hub_commit(source: str, revision: str | None, file: str) -> str | None:
    """Current commit of a repository on the Hub, or the cached one if the Hub cannot be reached; None for a folder.

    Args:
        source: Folder or Hub name.
        revision: Branch, tag or commit; None for the default branch.
        file: A file of the repository, which is fetched.

    Raises:
        ValueError: If a folder is given with a revision.
        OSError: If there is no such repository, revision or file.
    """
    if os.path.isdir(source):
        if revision is not None:
            raise ValueError(f"{source!r} is a local folder, which has no revisions: leave out {revision!r}")
        return None
    return extract_commit_hash(cached_file(source, file, revision=revision), None)


def content_sha(source: str, commit: str | None) -> str:
    """The commit, or for a folder a SHA-256 of the names and whole contents of its weights, configs and tokenizer."""
    if commit is not None:
        return commit
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _HASHED for path in Path(source).glob(pattern)):
        status = path.stat()
        digest.update(f"{path.name} {_file_sha256(path, status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def _file_sha256(path: Path, size: int, modified: int) -> str:
    """SHA-256 of a file, cached by path, size and modification time, because a run needs it several times."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hardware(device: torch.device) -> dict[str, Any]:
    """Device, processor and library versions, on which rounding depends."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def sandbox_layers() -> list[str] | None:
    """Layers of the sandbox on this machine; None unless HF_ALLOW_CODE_EVAL=1, without which no program is run."""
    try:
        require_consent()
    except ValueError:
        return None
    try:
        return list(layers())
    except ValueError as error:  # the sandbox does not work; scores of other tasks are kept
        return [f"none: {error}"]
