"""What a score was made with: commit or content hash of every checkpoint, rows, hardware, layers of the sandbox.

A Hub name and a branch say too little: both may stand for other weights tomorrow. So a run reads one commit, found out
before anything is loaded, and results name it as `model_sha`; for a folder that is a hash of its files.
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

# What decides answers: weights, configs, tokenizers, chat templates, and an adapter's noise. Not README or optimizer.
_HASHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def hub_commit(source: str, revision: str | None, file: str) -> str | None:
    """Commit that a Hub name stands for now, or in the cache when the Hub cannot be reached; None for a local folder.

    Args:
        source: Folder or Hub name.
        revision: Branch, tag or commit; None for the default branch.
        file: A file that every such repository has, which is fetched.

    Raises:
        ValueError: If a revision is asked of a folder.
        OSError: If there is no such repository, revision or file.
    """
    if os.path.isdir(source):
        if revision is not None:
            raise ValueError(f"{source!r} is a local folder, which has no revisions: leave {revision!r} out")
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
    """Cached by size and time of change too: a run asks for it when it is checked, started and written down."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hardware(device: torch.device) -> dict[str, Any]:
    """Where the model ran, as far as rounding depends on it."""
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
    """Layers that confine programs here; None unless HF_ALLOW_CODE_EVAL=1, without which none is run."""
    try:
        require_consent()
    except ValueError:
        return None
    try:
        return list(layers())
    except ValueError as error:  # it works not at all, which must not cost a run its scores
        return [f"none: {error}"]
