"""Disk space of a run's checkpoints and model, checked before the run starts, and main memory of loading.

Computed from a planned run (`planning.Run`). With P trained and Z frozen parameters, w
bytes of a saved weight and s bytes of an element's optimizer states, a checkpoint holds

    ddp             4 P + w Z + s P               weights and optimizer.pt
    zero1, zero2    2 w (P + Z) + (4 + s) P       weights twice, as a model and in DeepSpeed's own form; float32 copies
    zero3           w (P + Z) + (4 + s) P         DeepSpeed's own form has no second copy

and with adapters the adapters' weights alone. Tokenizer, log and random states are left out.
"""

import math
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from .planning import GIB, Layout, Run


class Disk(NamedTuple):
    """Disk space of a run.

    Args:
        checkpoint: Bytes of one checkpoint.
        most: Checkpoints at once: those kept, and the one being written.
        kept: Checkpoints that stay when the run ends.
        final: Bytes of the final model, of adapters and of the merged model.
    """

    checkpoint: float
    most: int
    kept: int
    final: float

    @property
    def peak(self) -> float:
        """Most bytes at once: while the last checkpoint is written, or the final model beside those kept."""
        return max(self.most * self.checkpoint, self.kept * self.checkpoint + self.final)


def planned_disk(run: Run, layout: Layout, saves: int, limit: int | None, weights_only: bool = False) -> Disk:
    """Disk space of a run.

    Args:
        run, layout: The plan.
        saves: Checkpoints that the run writes.
        limit: `save_total_limit`; None keeps all.
        weights_only: `save_only_model`.
    """
    kept = min(saves, limit or saves)
    checkpoint = _weight_bytes(run, layout) if weights_only else checkpoint_bytes(run, layout)
    return Disk(checkpoint, min(saves, kept + 1), kept, final_bytes(run, layout))


def checkpoint_bytes(run: Run, layout: Layout) -> float:
    """Bytes of a checkpoint, of all processes together."""
    counts, weights = run.counts, _weight_bytes(run, layout)
    if not layout.stage:
        return weights + sum(run.optimizer.tensor_bytes(*tensor) for tensor in counts.trained_tensors)
    copies = (4 + run.optimizer.flat_bytes) * counts.trainable
    return weights * (2 if layout.stage < 3 else 1) + copies


def final_bytes(run: Run, layout: Layout) -> float:
    """Bytes written at the end: the model, or the adapters and the merged model."""
    weights = _weight_bytes(run, layout)
    if not run.adapters_only:
        return weights
    width = run.precision(layout)[0] if layout.stage else run.dtype.itemsize
    return weights + width * (run.counts.total - run.counts.trainable)


def _weight_bytes(run: Run, layout: Layout) -> float:
    """Bytes of the saved weights, without frozen ones if there are adapters; in float32, or DeepSpeed's dtype."""
    width = run.precision(layout)[0] if layout.stage else 4
    return float(width * (run.counts.trainable if run.adapters_only else run.counts.total))


def number_of_saves(steps: int, save_steps: float) -> int:
    """Checkpoints of a run of so many steps: every `save_steps` (below 1: a share of the run), and the last step's."""
    every = math.ceil(save_steps * steps) if save_steps < 1 else int(save_steps)
    return math.ceil(steps / max(1, every))


def check_disk(folder: str | Path, disk: Disk) -> None:
    """Refuse a run whose checkpoints and model do not fit on the disk; a resumed run's checkpoints count as free space.

    Args:
        folder: The run's `output_dir`; it may not exist yet.
        disk: What the run needs.

    Raises:
        ValueError: With the space needed and free, and how to need less.
    """
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    written = sum(file.stat().st_size for file in folder.glob("checkpoint-*/**/*") if file.is_file())
    free = shutil.disk_usage(there).free + written
    if disk.peak <= free:
        return
    raise ValueError(
        f"output_dir={str(folder)!r}: the run needs {disk.peak / GIB:.1f} GiB of disk ({disk.most} checkpoints at once "
        f"of {disk.checkpoint / GIB:.1f} GiB, {disk.kept} of them kept, the final model {disk.final / GIB:.1f} GiB) "
        f"and {free / GIB:.1f} GiB are free: make room, name another disk, lower save_total_limit or raise save_steps."
    )


class Loading(NamedTuple):
    """Main memory of loading the weights.

    Args:
        each: Bytes in each process.
        shared: Bytes of the checkpoint's files, read through pages that the processes of a machine share.
    """

    each: float
    shared: float


def loading_bytes(run: Run, stored: torch.dtype | None) -> Loading:
    """Main memory to load a model before it is moved to a GPU.

    Weights that keep their dtype are mapped from the file and take no other memory; a cast makes a copy in each process
    while the file's pages are still mapped.

    Args:
        run: The plan.
        stored: The checkpoint's dtype; None for random weights, which have no file.
    """
    parameters = run.counts.total - (run.counts.trainable if run.adapters_only else 0)
    if stored is None:
        return Loading(4.0 * parameters, 0.0)
    copied = 0 if stored == run.dtype else parameters - run.counts.quantized
    return Loading(float(run.dtype.itemsize * copied), float(stored.itemsize * parameters))
