"""Everything that a GPU is needed for, in one command of at most nine minutes on an H200: `make gpu`.

    make gpu                                       all stages, results in outputs/gpu
    make gpu STAGES="loss generation" GPU_OUT=/tmp/gpu
    python benchmarks/gpu/run.py --small           minutes on a CPU: proves the stages, and measures nothing

    environment   versions, the GPU, the bandwidth and the bfloat16 products it reaches
    tests         tests/test_gpu.py, the Triton kernels and every other test marked gpu
    loss          the passes of the loss over logits of LLaDA's vocabulary: times, bytes per logit, beside eager ones
    step          a training step of LLaDA-8B's architecture with random weights: seconds, MFU, memory beside the plan's
    generation    32 steps of the same model, with caches, thresholds, CUDA graphs: ms a step, tokens/s, host syncs
    text          the paper's Table 17, by benchmarks/text_efficiency.py

Each stage is a process of its own and writes STAGE.json at once; a stage that has written it is not run again.
report.md has all of them as tables.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

STAGES = {  # seconds that a stage may take, and what it needs
    "environment": (30, "any GPU"),
    "tests": (150, "any GPU; with bitsandbytes and flash_attn also their tests"),
    "loss": (60, "8 GiB"),
    "step": (90, "64 GiB, 80 with 8-bit AdamW (bitsandbytes)"),
    "generation": (130, "48 GiB"),
    "text": (120, "40 GiB"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--small", action="store_true", help="small sizes, also without a GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.small:
        raise SystemExit(needs())
    options.output.mkdir(parents=True, exist_ok=True)
    failed = [stage for stage in options.stages if not run(stage, options.output, options.small)]
    (options.output / "report.md").write_text(report(options.output))
    print(report(options.output))
    if failed:
        raise SystemExit(f"gpu: {', '.join(failed)} failed; see {options.output}/STAGE.log")


def needs() -> str:
    """What a GPU is needed for, as a message."""
    lines = ["gpu: there is no CUDA device. The stages need one GPU with this much memory, and take at most:"]
    lines += [f"  {stage:12} {seconds:4} s   {memory}" for stage, (seconds, memory) in STAGES.items()]
    return "\n".join([*lines, "--small runs them at small sizes on a CPU."])


def run(stage: str, output: Path, small: bool) -> bool:
    """Run a stage, unless its result is there; its output goes to STAGE.log. Whether it succeeded."""
    if (output / f"{stage}.json").exists():
        return True
    command = [sys.executable, str(Path(__file__).with_name("stages.py")), stage, str(output)]
    print(f"[gpu] {stage}", flush=True)
    with (output / f"{stage}.log").open("w") as log:
        try:
            finished = subprocess.run(
                [*command, *(["--small"] if small else [])],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                timeout=600 if small else STAGES[stage][0],
                check=False,
            )
        except subprocess.TimeoutExpired:
            log.write(f"\nno end after {STAGES[stage][0]} s\n")
            return False
    return finished.returncode == 0


def report(output: Path) -> str:
    """All results as Markdown."""
    parts = []
    for stage in STAGES:
        path = output / f"{stage}.json"
        if path.exists():
            parts += [f"## {stage}", *map(markdown, json.loads(path.read_text())["tables"])]
    return "\n\n".join(parts) + "\n"


def markdown(table: dict) -> str:
    head = "| " + " | ".join(table["columns"]) + " |\n| --- |" + " ---: |" * (len(table["columns"]) - 1)
    return f"{table['title']}\n\n{head}\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in table["rows"])


if __name__ == "__main__":
    main()
