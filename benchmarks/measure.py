"""Measurement of alternatives: median times of interleaved runs, and peak memory by the allocator's record.

All candidates of a comparison run in turn in one process, so that a slow minute of the machine affects all of them;
ratios are reported.
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


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


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
