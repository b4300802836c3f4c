"""What the benchmarks share: median times of interleaved runs, peak memory, and parts of comparisons of trained models.

All candidates of a comparison of times run in turn in one process, so that a slow minute of the machine affects all of
them; ratios are reported. Memory is by the allocator's record.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent


def interleaved_seconds(
    candidates: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each candidate over `repeats` rounds of all candidates, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(repeats + 1):
        for name, run in candidates.items():
            _synchronise()
            start = clock()
            run()
            _synchronise()
            if round_number:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak of the memory allocated during `run`, in bytes, beyond what was allocated before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def machine() -> str:
    """One line for the head of a report."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}"


def run_job(command: Sequence[str], folder: Path) -> None:
    """Run a command on one thread, with its output appended to log.txt of a folder; a failure ends the benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (folder / "log.txt").open("a") as log:
        status = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}; see {folder / 'log.txt'}")


def run_jobs(jobs: Sequence[Callable[[], None]], at_a_time: int) -> None:
    """Run jobs in threads, some at a time; after one fails, no other begins, and its error is raised."""
    with ThreadPoolExecutor(at_a_time) as pool:
        running = [pool.submit(job) for job in jobs]
        wait(running, return_when=FIRST_EXCEPTION)
        pool.shutdown(cancel_futures=True)
    for job in running:
        if not job.cancelled():
            job.result()


def training_curve(folder: Path) -> dict[str, list[float]]:
    """Steps and bounds of the evaluations during training."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry for entry in history if "eval_loss" in entry]
    return {"steps": [e["step"] for e in evaluated], "nelbo": [e["eval_loss"] for e in evaluated]}


def finish_plot(figure: Any, axes: Any, x: str, y: str, file: Path | None) -> None:
    """Label and legend of a matplotlib plot; writes the figure unless `file` is None."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if file is not None:
        figure.tight_layout()
        figure.savefig(file, dpi=120)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
