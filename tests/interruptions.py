"""Kill runs at random times, damage checkpoints, resume, and compare the final weights with an uninterrupted run's.

    python tests/interruptions.py --sigkills 20 --sigterms 10

Processes are forked from one that has imported everything, so that a run takes about a second.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from training import RecordingTrainer, state, trainer

from xdlm_hf.training.checkpoints import RUN_RECORD, UNFINISHED, last_checkpoint
from xdlm_hf.training.checksums import CHECKSUMS
from xdlm_hf.training.preemption import PREEMPTED_STATUS
from xdlm_hf.training.processes import run_script

OPTIONS = {"max_steps": 40, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 3, "save_seconds": 0.4}


class AnnouncingTrainer(RecordingTrainer):
    def training_step(self, *args, **kwargs):
        started = Path(self.args.output_dir) / "started"
        if not started.exists():
            started.touch()
        return super().training_step(*args, **kwargs)


def train(folder: Path, streaming: bool) -> None:
    os.setpgrp()
    with open(folder.with_suffix(".log"), "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        torch.set_num_threads(1)
        resume = last_checkpoint(folder) is not None
        run = trainer(folder, kind=AnnouncingTrainer, streaming=streaming, **OPTIONS)

        def main():
            run.train(resume_from_checkpoint=resume)
            save_file(state(run.model), folder / "end.st")

        run_script(main)


def started(folder: Path, streaming: bool) -> multiprocessing.Process:
    folder.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder, streaming))
    process.start()
    return process


def finish(folder: Path, streaming: bool) -> None:
    process = started(folder, streaming)
    process.join()
    if process.exitcode:
        log = folder.with_suffix(".log").read_text()[-3000:]
        raise SystemExit(f"{folder.name} ended with {process.exitcode}:\n{log}")


def interrupt(folder: Path, streaming: bool, number: signal.Signals, after: float) -> int:
    """Run until the signal, sent so many seconds after the first step began; the exit status."""
    process = started(folder, streaming)
    while not (folder / "started").exists() and process.is_alive():
        time.sleep(0.005)
    time.sleep(after)
    os.kill(process.pid, number)
    process.join()
    return process.exitcode


def flip_a_bit(checkpoint: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(path for path in checkpoint.iterdir() if path.name != CHECKSUMS))
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sigkills", type=int, default=20)
    parser.add_argument("--sigterms", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, top, counts = random.Random(options.seed), Path(tempfile.mkdtemp()), Counter()
    ends, seconds = {}, {}
    for streaming in (False, True):
        folder = top / f"whole_{streaming}"
        finish(folder, streaming)
        seconds[streaming] = (folder / "end.st").stat().st_mtime - (folder / "started").stat().st_mtime
        ends[streaming] = load_file(folder / "end.st")
    plan = [signal.SIGKILL] * options.sigkills + [signal.SIGTERM] * options.sigterms
    for index, number in enumerate(plan):
        streaming, folder = index % 2 == 1, top / f"run_{index}"
        while not (status := interrupt(folder, streaming, number, rng.uniform(0, 0.9 * seconds[streaming]))):
            counts["not counted: the run had ended before the signal"] += 1
            shutil.rmtree(folder)
        counts[f"{number.name}: exit status {status}"] += 1
        newest = last_checkpoint(folder)
        where = "in a save" if (folder / UNFINISHED).exists() else "in a step"
        counts[f"{number.name}: {where if newest else where + ', before the first checkpoint'}"] += 1
        note = ""
        if index % 3 == 0 and newest is not None and len(list(folder.glob("checkpoint-*"))) > 1:
            note = f", one bit of {flip_a_bit(newest, rng)} flipped"
            counts["newest checkpoint damaged"] += 1
        if newest is None:
            shutil.rmtree(folder)
        finish(folder, streaming)
        end = load_file(folder / "end.st")
        same = all(torch.equal(end[name], ends[streaming][name]) for name in ends[streaming])
        went_back = (folder / f"damaged-{newest.name}" / RUN_RECORD).exists() if newest else False
        assert went_back == bool(note), f"{folder}: the damage was not seen"
        counts["went back to the checkpoint before"] += went_back
        counts["resumed, final weights equal bit for bit" if same else "DIFFERENT final weights"] += 1
        newest_name = newest.name if newest else "none"
        print(f"{index} {number.name} status {status} {where}, newest {newest_name}{note}: equal {same}", flush=True)
        if same:
            shutil.rmtree(folder, ignore_errors=True)
    for name, count in sorted(counts.items()):
        print(f"{count:3} {name}")
    if counts["DIFFERENT final weights"] or (set(counts) & {f"SIGTERM: exit status {PREEMPTED_STATUS}"}) == set():
        raise SystemExit(1)
    shutil.rmtree(top)


if __name__ == "__main__":
    main()
