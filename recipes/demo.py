"""Show on two CPU cores what mixed noise does. `make demo` runs it, in about five minutes, without any download.

1. Training, two runs at a time: text (Python's own documentation) as a masked model, k = 0, continued at k = 0.1 by the
   recipe that trains LLaDA-XDLM, `accelerate launch recipes/llada_cpt.py`; and three models of a task with checkable
   answers (demo_task/alphabet.py), alike but for k = 0, 0.1 and 1, by recipes/llada_sft.py.
2. Answers in 32 to 2 steps by `model.generate`, for each k, and with edits by confidence instead of a budget.
3. The same task through lm-eval.
4. outputs/demo/index.html: losses, answers against steps, and a generation with a slider over its steps.

Ends with status 1 unless refinement makes the k = 0.1 model better in 8 steps, and unless the text model has learnt
more than how frequent each token is. What the libraries print is in logs/.

    python recipes/demo.py [--output_dir outputs/demo] [--steps_scale 1.0]
"""

import argparse
import ast
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from demo_page import LABELS, write_page
from demo_task import alphabet
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from xdlm_hf.data.packing import PackedDataset
from xdlm_hf.data.readers import hold_out, python_reference_documents
from xdlm_hf.watch.trace import save_trace

RECIPES = Path(__file__).resolve().parent
CONFIGS = RECIPES / "configs"
MARKER = ".xdlm-demo"  # marks a folder of the demo, which a new run may replace
K = (0.0, 0.1, 1.0)
STEPS = (32, 16, 8, 4, 2)
EDITS = {"refinement": {"policy": "threshold", "threshold": 0.5}}
TRAINING, PROBLEMS = 45_000, 200
PROMPT = "Return True if the"
TEXT_STEPS, TEXT_TOKENS, TEXT_SAMPLING = 32, 180, {"temperature": 0.5, "seed": 0}
LAUNCH = "-m accelerate.commands.accelerate_cli launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no"
console = Console()


@dataclass(frozen=True)
class Run:
    """A training run: `name` is its folder, `launcher` what stands before the recipe."""

    name: str
    label: str
    recipe: str
    config: str
    options: tuple[str, ...]
    launcher: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--steps_scale", type=float, default=1.0, help="scales the training steps, at least 4 a run")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    start = time.perf_counter()
    folder = fresh_folder(options.output_dir).resolve()
    console.print("[bold]1. Training[/] five small models, two at a time")
    prepare(folder)
    train(folder, options.steps_scale)
    console.print("\n[bold]2. Answers in few steps[/]")
    report = {"alphabet": answers(folder), "text": text_figures(folder)}
    console.print(answer_table(report["alphabet"]))
    console.print("\n[bold]3. The same through lm-eval[/]")
    report["lm_eval"] = lm_eval(folder)
    console.print("\n[bold]4. Samples and pictures[/]")
    report["samples"] = samples(folder)
    report["seconds"] = time.perf_counter() - start
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_page(folder, report)
    show(folder, report)
    failures = shortcomings(report)
    if failures:
        raise SystemExit("demo: " + "; ".join(failures))


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


def prepare(folder: Path) -> None:
    """Problems for training and for the scores, and the tokenizer of the task: every character is a token."""
    (folder / "logs").mkdir()
    alphabet.write(folder / "train.jsonl", TRAINING, seed=0)
    alphabet.write(folder / "problems.jsonl", PROBLEMS, seed=1)
    alphabet.tokenizer().save_pretrained(folder / "characters")


# --------------------------------------------------------------------------------------------------------------------
# Training


def chains(folder: Path) -> list[list[Run]]:
    """The runs; those of one list follow each other."""
    text = [
        Run("base", "text, k = 0", "llada_cpt.py", "demo_base.yaml", (), LAUNCH),
        Run("xdlm", "text, on at k = 0.1", "llada_cpt.py", "demo_xdlm.yaml",
            ("--model_name_or_path", str(folder / "base")), LAUNCH),
    ]  # fmt: skip
    data = ("--data_files", str(folder / "train.jsonl"), "--tokenizer_name", str(folder / "characters"))
    task = [
        Run(f"k{k:g}", f"alphabet, k = {k:g}", "llada_sft.py", "demo_alphabet.yaml", (*data, "--mixing_ratio", str(k)))
        for k in K
    ]
    return [text, *([run] for run in task)]


def train(folder: Path, steps_scale: float) -> None:
    """All runs, two at a time with a thread each, under one display; a failing one ends the others."""
    columns = TextColumn("{task.description:<20}"), BarColumn(24), TextColumn("step {task.completed:.0f}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        waiting = chains(folder)
        bars = {run.name: progress.add_task(run.label, start=False) for chain in waiting for run in chain}
        active: list[tuple[Training, list[Run]]] = []
        try:
            while waiting or active:
                while waiting and len(active) < 2:
                    run, *later = waiting.pop(0)
                    active.append((Training(run, folder, steps_scale), later))
                time.sleep(0.3)
                for training, later in list(active):
                    ended = training.process.poll() is not None
                    training.show(progress, bars[training.run.name])
                    if ended:
                        training.check()
                        active.remove((training, later))
                        waiting[:0] = [later] if later else []
        finally:
            for training, _ in active:
                training.process.terminate()
                training.process.wait()


class Training:
    """One run of a recipe in a process of its own, whose output goes to logs/NAME.txt."""

    def __init__(self, run: Run, folder: Path, steps_scale: float):
        self.run, self.log, self.shown = run, folder / "logs" / f"{run.name}.txt", 0
        self.steps = scaled_steps(CONFIGS / run.config, steps_scale, least=4)
        self.every = max(1, self.steps // 5)
        command = [sys.executable, *run.launcher.split(), str(RECIPES / run.recipe)]
        command += ["--config", str(CONFIGS / run.config), *run.options, "--output_dir", str(folder / run.name)]
        command += ["--max_steps", str(self.steps), "--logging_steps", str(self.every)]
        command += ["--warmup_steps", str(min(50, self.steps // 4))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("w") as output:
            output.write("$ " + " ".join(command) + "\n")
            output.flush()
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def show(self, progress: Progress, bar: int) -> None:
        """Print the entries that are new in the log, a line each, and move the bar."""
        entries = logged(self.log)
        if not progress.tasks[bar].started:
            progress.start_task(bar)
        for number, entry in enumerate(entries[self.shown :], self.shown + 1):
            loss = f"loss {entry['nelbo']:.3f} ± {entry['nelbo_standard_error']:.3f}"
            speed = f"{entry['tokens_per_second']:>6,.0f} tokens/s"
            line = f"{self.run.label:<20} step {number * self.every:>4}  {loss}  {speed}"
            progress.console.print(line, style="dim", highlight=False)
        self.shown = len(entries)
        progress.update(bar, total=self.steps, completed=self.shown * self.every)

    def check(self) -> None:
        """Raise SystemExit if the run, which has ended, has failed."""
        if self.process.returncode:
            raise SystemExit(f"demo: {self.run.label} failed with status {self.process.returncode}; see {self.log}.")


def logged(log: Path) -> list[dict[str, float]]:
    """The entries of training that the Trainer has printed so far."""
    pieces = [piece.strip() for line in log.read_text(errors="replace").splitlines() for piece in line.split("\r")]
    entries = [ast.literal_eval(piece) for piece in pieces if piece.startswith("{'loss'") and piece.endswith("}")]
    return [{name: float(value) for name, value in entry.items()} for entry in entries]


def history(folder: Path, run: str) -> list[dict]:
    return json.loads((folder / run / "trainer_state.json").read_text())["log_history"]


# --------------------------------------------------------------------------------------------------------------------
# Scores


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answers(folder: Path) -> dict[str, dict]:
    """Share of right answers by decoding and steps, with forward passes; greedy."""
    problems = list(alphabet.problems(PROBLEMS, seed=1))
    prompts = [problem["prompt"] for problem in problems]
    found = {}
    for k in K:
        model, tokenizer = load(folder / f"k{k:g}")
        batch = tokenizer(prompts, return_tensors="pt")

        def right(name: str, steps: int, batch=batch, model=model, tokenizer=tokenizer, **options) -> None:
            output = model.generate(
                **batch, steps=steps, max_new_tokens=alphabet.ANSWER, return_dict_in_generate=True, **options
            )
            texts = tokenizer.batch_decode(output.sequences[:, batch["input_ids"].shape[1] :])
            share = sum(map(alphabet.is_right, prompts, texts)) / len(texts)
            passes = float(output.row_forward_passes.double().mean())
            error = math.sqrt(share * (1 - share) / len(texts))
            found.setdefault(name, {})[steps] = {"right": share, "standard_error": error, "passes": passes}

        for steps in STEPS:
            right(f"trained at k = {k:g}", steps)
            if k == 0.1:
                right("k = 0.1, without refinement", steps, mixing_ratio=0.0)
                right("k = 0.1, edits above 0.5", steps, **EDITS)
        if k == 0.1:
            right("k = 0.1, all tokens above 0.9", alphabet.ANSWER, parallel_decoding={"threshold": 0.9})
    return found


def text_figures(folder: Path) -> dict:
    """Held-out NELBO of both text models, beside the cross-entropy of token frequencies on the same rows."""
    figures = {"unigram": unigram_nats(folder)}
    for run in ("base", "xdlm"):
        last = [entry for entry in history(folder, run) if "eval_loss" in entry][-1]
        figures[run] = {"nelbo": last["eval_loss"], "standard_error": last["eval_loss_standard_error"]}
    return figures


def unigram_nats(folder: Path) -> float:
    """Nats per token of the held-out rows under the frequencies of the training rows, one more for each token."""
    settings = yaml.safe_load((CONFIGS / "demo_base.yaml").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    parts = hold_out(python_reference_documents(), settings["validation_fraction"])
    length, rows = settings["sequence_length"], settings["validation_rows"]
    train_rows = PackedDataset(parts[0], tokenizer, length)
    held_out = PackedDataset(parts[1], tokenizer, length, max_rows=rows)
    counts = torch.ones(len(tokenizer), dtype=torch.float64)
    for row in train_rows:
        counts += torch.bincount(row["input_ids"], minlength=len(counts))
    ids = torch.cat([row["input_ids"] for row in held_out])
    return float(-(counts / counts.sum()).log()[ids].mean())


def lm_eval(folder: Path) -> dict[str, dict]:
    """The k = 0.1 model in 8 steps, with and without refinement, by `xdlm-eval`; both at a time."""

    def score(name: str, more: str) -> dict:
        output = folder / "lm-eval" / name
        settings = f"pretrained={folder / 'k0.1'},steps=8,max_new_tokens={alphabet.ANSWER}{more}"
        command = [sys.executable, "-m", "xdlm_hf.evaluation.cli", "run", "--tasks", "xdlm_alphabet"]
        command += ["--include_path", str(RECIPES / "demo_task"), "--model_args", settings, "--batch_size", "50"]
        command += ["--metadata", json.dumps({"data": str(folder / "problems.jsonl")}), "--output_path", str(output)]
        log = folder / "logs" / f"lm-eval-{name}.txt"
        with log.open("w") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
        if status.returncode:
            raise SystemExit(f"demo: lm-eval failed with status {status.returncode}; see {log}.")
        results = json.loads(next(output.rglob("results_*.json")).read_text())["results"]["xdlm_alphabet"]
        return {"right": results["exact_match,none"], "standard_error": results["exact_match_stderr,none"]}

    with console.status("two processes of xdlm-eval"), ThreadPoolExecutor(2) as pool:
        settings = {"refined": "", "unrefined": ",mixing_ratio=0.0"}
        found = dict(zip(settings, pool.map(score, settings, settings.values()), strict=True))
    for name, label in (("refined", "with refinement"), ("unrefined", "without")):
        one = found[name]
        console.print(
            f"k = 0.1, 8 steps, {label:<16}{100 * one['right']:5.1f} ± {100 * one['standard_error']:.1f} % right"
        )
    return found


def shortcomings(report: dict) -> list[str]:
    """Why the demo has failed: refinement does not help at 8 steps, or the text model knows frequencies only."""
    found, scores, text = [], report["lm_eval"], report["text"]
    gain = scores["refined"]["right"] - scores["unrefined"]["right"]
    if gain <= 4 * math.hypot(scores["refined"]["standard_error"], scores["unrefined"]["standard_error"]):
        found.append(f"refinement gains {100 * gain:.1f} points in 8 steps, less than four standard errors")
    if text["xdlm"]["nelbo"] > text["unigram"] - 10 * text["xdlm"]["standard_error"]:
        found.append(
            f"the text model's bound, {text['xdlm']['nelbo']:.2f} nats, is not ten standard errors below that of token "
            f"frequencies, {text['unigram']:.2f}"
        )
    return found


# --------------------------------------------------------------------------------------------------------------------
# What is shown


def samples(folder: Path) -> dict:
    """A text, and the problem of the two traces of answers; writes text.html, refined.html and unrefined.html."""
    model, tokenizer = load(folder / "xdlm")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    options = {"return_dict_in_generate": True, "output_history": True, "eos_token_id": []}
    text = model.generate(**prompt, steps=TEXT_STEPS, max_new_tokens=TEXT_TOKENS, **TEXT_SAMPLING, **options)
    trace(folder / "text.html", text, model, tokenizer, f"Text in {TEXT_STEPS} steps, k = 0.1")
    model, tokenizer = load(folder / "k0.1")
    problem = next(alphabet.problems(1, seed=1))["prompt"]
    batch = tokenizer(problem, return_tensors="pt")
    for name, title, more in (
        ("refined", "With refinement, k = 0.1", {}),
        ("unrefined", "Without refinement", {"mixing_ratio": 0.0}),
    ):
        output = model.generate(**batch, steps=8, max_new_tokens=alphabet.ANSWER, **options, **more)
        right = alphabet.is_right(problem, tokenizer.decode(output.sequences[0, batch["input_ids"].shape[1] :]))
        trace(folder / f"{name}.html", output, model, tokenizer, title, "right" if right else "wrong")
    _, tokenizer = load(folder / "xdlm")
    return {"text": tokenizer.decode(text.sequences[0]), "problem": problem}


def trace(path: Path, output, model, tokenizer, title: str, note: str = "") -> None:
    start = output.sequences.shape[1] - output.history[0].eq(model.config.mask_token_id).sum()
    save_trace(path, output.history, tokenizer, model.config.mask_token_id, int(start), title, note)


def answer_table(found: dict[str, dict]) -> Table:
    table = Table(title=f"right answers of {PROBLEMS}, % (32 letters; error at most 3.5)", title_justify="left")
    table.add_column("decoding")
    for steps in STEPS:
        table.add_column(f"{steps} steps", justify="right")
    for name, cells in found.items():
        if set(cells) == set(STEPS):
            table.add_row(name, *(f"{100 * cells[steps]['right']:.1f}" for steps in STEPS))
    for name, cells in found.items():
        if set(cells) != set(STEPS):
            (only,) = cells.values()
            table.caption = f"{name}: {100 * only['right']:.1f} % in {only['passes']:.1f} passes"
    return table


def show(folder: Path, report: dict) -> None:
    text = report["text"]
    bounds = ", ".join(
        f"{LABELS[run]} {text[run]['nelbo']:.2f} ± {text[run]['standard_error']:.2f}" for run in ("base", "xdlm")
    )
    console.print(f"held-out text, nats per token: token frequencies {text['unigram']:.2f}, {bounds}", highlight=False)
    console.print("[bold]sample:[/]", end=" ")
    console.print(report["samples"]["text"], markup=False, highlight=False)
    console.print(f"\n{report['seconds']:.0f} seconds. Losses, quality and traces: {folder / 'index.html'}")
    console.print(f"Next: xdlm-chat --model {folder / 'k0.1'}, and a line like {report['samples']['problem']}")


if __name__ == "__main__":
    main()
