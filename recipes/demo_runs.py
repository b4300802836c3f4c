"""What the demos share: a folder of their own, and recipes that run side by side."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

MARKER = ".xdlm-demo"  # marks a folder of a demo, which a new run may replace
# One thread each: matrices this small gain little from a second. Waiting threads sleep: spinning ones take the time of
# the other runs.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}


def fresh_folder(folder: Path) -> Path:
    """An empty output folder; an earlier demo's is replaced.

    Raises:
        ValueError: If the folder holds something that is not a demo.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ValueError(f"--output_dir {folder} holds files that are not a demo's; name an empty or new folder.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return folder


def scaled_steps(config: Path, scale: float, least: int) -> int:
    """`max_steps` of a config file, scaled."""
    return max(least, round(yaml.safe_load(config.read_text(encoding="utf-8"))["max_steps"] * scale))


@dataclass(frozen=True)
class Training:
    """A run of a recipe. `steps` are its optimizer steps; what it prints is appended to `log`."""

    label: str
    command: list[str]
    log: Path
    steps: int

    def start(self) -> subprocess.Popen:
        with self.log.open("a") as output:
            environment = {**os.environ, **ENVIRONMENT}
            return subprocess.Popen(self.command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def run_all(chains: Sequence[Sequence[Training]], at_a_time: int, watch: Callable[[Training], None]) -> None:
    """Run all, `at_a_time` at once; those of one chain follow each other.

    `watch` is called for each run about three times a second, and once after its end.

    Raises:
        SystemExit: If one fails; the others are terminated.
    """
    waiting, active = list(chains), []
    try:
        while waiting or active:
            while waiting and len(active) < at_a_time:
                training, *later = waiting.pop(0)
                active.append((training.start(), training, later))
            time.sleep(0.3)
            for entry in list(active):
                process, training, later = entry
                status = process.poll()
                watch(training)
                if status:
                    raise SystemExit(f"demo: training failed with status {status}; see {training.log}")
                if status == 0:
                    active.remove(entry)
                    waiting[:0] = [later] if later else []
    finally:
        for process, *_ in active:
            process.terminate()
            process.wait()
