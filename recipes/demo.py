"""Show on two CPU cores what mixed noise does. `make demo` runs it, in about five minutes, without any download.

1. Training, two runs at a time: text (Python's own documentation, as the letters a to z and blanks) as a masked model,
   k = 0, continued at k = 0.1 by the recipe that trains LLaDA-XDLM, `accelerate launch recipes/llada_cpt.py`; and three
   models of a task with checkable answers (demo_task/alphabet.py), alike but for k = 0, 0.1 and 1, by
   recipes/llada_sft.py.
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
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from demo_page import LABELS, history, write_page
from demo_runs import ENVIRONMENT, Training, fresh_folder, run_all, scaled_steps
from demo_task import alphabet
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from xdlm_hf.data.packing import PackedDataset
from xdlm_hf.data.readers import hold_out, load_documents, python_reference_documents
from xdlm_hf.data.text8 import as_text8, text8_tokenizer
from xdlm_hf.evaluation.ngram import WittenBell
from xdlm_hf.generation.output import DiffusionGenerateOutput
from xdlm_hf.watch.animation import save_animation
from xdlm_hf.watch.trace import Trace, save_trace

RECIPES = Path(__file__).resolve().parent
CONFIGS = RECIPES / "configs"
K = (0.0, 0.1, 1.0)
STEPS = (32, 16, 8, 4, 2)
EDITS = {"refinement": {"policy": "threshold", "threshold": 0.5}}
TRAINING, PROBLEMS = 45_000, 200
EXAMPLES = 8
PROMPT, TEXTS, SHOWN_TEXTS = "return true if the ", 32, 4
TEXT = {"sampler": "ancestral", "steps": 32, "max_new_tokens": 44, "temperature": 0.4, "seed": 0}
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

    def training(self, folder: Path, steps_scale: float) -> Training:
        """The run in a folder, its command at the head of logs/NAME.txt."""
        steps, log = scaled_steps(CONFIGS / self.config, steps_scale, least=4), folder / "logs" / f"{self.name}.txt"
        command = [sys.executable, *self.launcher.split(), str(RECIPES / self.recipe)]
        command += ["--config", str(CONFIGS / self.config), *self.options, "--output_dir", str(folder / self.name)]
        command += ["--max_steps", str(steps), "--logging_steps", str(entry_steps(steps))]
        command += ["--warmup_steps", str(min(50, steps // 4))]
        log.write_text("$ " + " ".join(command) + "\n", encoding="utf-8")
        return Training(self.label, command, log, steps)


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
    report["samples"] = {**sample_texts(folder), "problem": sample_answers(folder)}
    report["seconds"] = time.perf_counter() - start
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_page(folder, report)
    show(folder, report)
    failures = shortcomings(report)
    if failures:
        raise SystemExit("demo: " + "; ".join(failures))


def prepare(folder: Path) -> None:
    """The text, problems for training and for the scores, and their tokenizers: every character is a token."""
    (folder / "logs").mkdir()
    rows = [{"text": as_text8(row["text"])} for row in python_reference_documents()]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text8_tokenizer().save_pretrained(folder / "letters")
    alphabet.write(folder / "train.jsonl", TRAINING, seed=0)
    alphabet.write(folder / "problems.jsonl", PROBLEMS, seed=1)
    alphabet.tokenizer().save_pretrained(folder / "characters")


# --------------------------------------------------------------------------------------------------------------------
# Training


def chains(folder: Path) -> list[list[Run]]:
    """The runs; those of one list follow each other."""
    data = ("--data_files", str(folder / "text.jsonl"))
    text = [
        Run("base", "text, k = 0", "llada_cpt.py", "demo_base.yaml",
            (*data, "--tokenizer_name", str(folder / "letters")), LAUNCH),
        Run("xdlm", "text, on at k = 0.1", "llada_cpt.py", "demo_xdlm.yaml",
            (*data, "--model_name_or_path", str(folder / "base")), LAUNCH),
    ]  # fmt: skip
    data = ("--data_files", str(folder / "train.jsonl"), "--tokenizer_name", str(folder / "characters"))
    task = [
        Run(f"k{k:g}", f"alphabet, k = {k:g}", "llada_sft.py", "demo_alphabet.yaml", (*data, "--mixing_ratio", str(k)))
        for k in K
    ]
    return [text, *([run] for run in task)]


def train(folder: Path, steps_scale: float) -> None:
    """All runs, two at a time, under one display; each entry of a log is shown as a line."""
    trainings = [[run.training(folder, steps_scale) for run in chain] for chain in chains(folder)]
    columns = TextColumn("{task.description:<20}"), BarColumn(24), TextColumn("step {task.completed:.0f}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = {run.label: progress.add_task(run.label, start=False) for chain in trainings for run in chain}
        run_all(trainings, at_a_time=2, watch=lambda run: show_entries(run, progress, bars[run.label]))


def show_entries(run: Training, progress: Progress, bar: int) -> None:
    """Print the entries that are new in the log, a line each, and move the bar."""
    if not progress.tasks[bar].started:
        progress.start_task(bar)
    entries, every = logged(run.log), entry_steps(run.steps)
    shown = round(progress.tasks[bar].completed) // every
    for number, entry in enumerate(entries[shown:], shown + 1):
        loss = f"loss {entry['nelbo']:.3f} ± {entry['nelbo_standard_error']:.3f}"
        line = f"{run.label:<20} step {number * every:>4}  {loss}  {entry['tokens_per_second']:>6,.0f} tokens/s"
        progress.console.print(line, style="dim", highlight=False)
    progress.update(bar, total=run.steps, completed=len(entries) * every)


def entry_steps(steps: int) -> int:
    """Optimizer steps of an entry in the log: five entries a run."""
    return max(1, steps // 5)


def logged(log: Path) -> list[dict[str, float]]:
    """The entries of training that the Trainer has printed so far."""
    pieces = [piece.strip() for line in log.read_text(errors="replace").splitlines() for piece in line.split("\r")]
    entries = [ast.literal_eval(piece) for piece in pieces if piece.startswith("{'loss'") and piece.endswith("}")]
    return [{name: float(value) for name, value in entry.items()} for entry in entries]


# --------------------------------------------------------------------------------------------------------------------
# Scores


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answers(folder: Path) -> dict[str, dict]:
    """Share of right answers by decoding and steps, with forward passes; greedy."""
    prompts = [problem["prompt"] for problem in alphabet.problems(PROBLEMS, seed=1)]
    found = {}
    for k in K:
        model, tokenizer = load(folder / f"k{k:g}")
        right = partial(right_answers, model, tokenizer, prompts)
        found[f"trained at k = {k:g}"] = {steps: right(steps) for steps in STEPS}
        if k == 0.1:
            found["k = 0.1, without refinement"] = {steps: right(steps, mixing_ratio=0.0) for steps in STEPS}
            found["k = 0.1, edits above 0.5"] = {steps: right(steps, **EDITS) for steps in STEPS}
            filled = right(alphabet.ANSWER, parallel_decoding={"threshold": 0.9})
            found["k = 0.1, all tokens above 0.9"] = {alphabet.ANSWER: filled}
    return found


def right_answers(model, tokenizer, prompts: list[str], steps: int, **options) -> dict[str, float]:
    """The share of right answers, its standard error, and the mean number of forward passes."""
    batch = tokenizer(prompts, return_tensors="pt")
    output = model.generate(
        **batch, steps=steps, max_new_tokens=alphabet.ANSWER, return_dict_in_generate=True, **options
    )
    texts = tokenizer.batch_decode(output.sequences[:, batch["input_ids"].shape[1] :])
    share = sum(map(alphabet.is_right, prompts, texts)) / len(texts)
    error = math.sqrt(share * (1 - share) / len(texts))
    return {"right": share, "standard_error": error, "passes": float(output.row_forward_passes.double().mean())}


def text_figures(folder: Path) -> dict:
    """Held-out NELBO of both text models, beside the cross-entropy of token frequencies on the same rows."""
    figures = {"unigram": unigram_nats(folder)}
    for run in ("base", "xdlm"):
        last = [entry for entry in history(folder / run) if "eval_loss" in entry][-1]
        figures[run] = {"nelbo": last["eval_loss"], "standard_error": last["eval_loss_standard_error"]}
    return figures


def unigram_nats(folder: Path) -> float:
    """Nats per token of the held-out rows under the smoothed frequencies of the training rows."""
    settings = yaml.safe_load((CONFIGS / "demo_base.yaml").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    train_part, held_out_part = hold_out(
        load_documents(data_files=[str(folder / "text.jsonl")]), settings["validation_fraction"]
    )
    length, limit = settings["sequence_length"], settings["validation_rows"]
    rows = [row["input_ids"].tolist() for row in PackedDataset(train_part, tokenizer, length)]
    held_out = [row["input_ids"].tolist() for row in PackedDataset(held_out_part, tokenizer, length, max_rows=limit)]
    frequencies = WittenBell(rows, order=1, vocab_size=len(tokenizer))
    return -float(np.concatenate(frequencies.log_probabilities(held_out)).mean())


def lm_eval(folder: Path) -> dict[str, dict]:
    """The k = 0.1 model in 8 steps, with and without refinement, by `xdlm-eval`; both at a time."""
    settings = {"refined": "", "unrefined": ",mixing_ratio=0.0"}
    with console.status("two processes of xdlm-eval"), ThreadPoolExecutor(2) as pool:
        scores = pool.map(partial(lm_eval_score, folder), settings, settings.values())
        found = dict(zip(settings, scores, strict=True))
    for score, label in zip(found.values(), ("with refinement", "without"), strict=True):
        shown = f"{100 * score['right']:5.1f} ± {100 * score['standard_error']:.1f} % right"
        console.print(f"k = 0.1, 8 steps, {label:<16}{shown}")
    return found


def lm_eval_score(folder: Path, name: str, more: str) -> dict[str, float]:
    output, log = folder / "lm-eval" / name, folder / "logs" / f"lm-eval-{name}.txt"
    settings = f"pretrained={folder / 'k0.1'},steps=8,max_new_tokens={alphabet.ANSWER}{more}"
    command = [sys.executable, "-m", "xdlm_hf.evaluation.cli", "run", "--tasks", "xdlm_alphabet"]
    command += ["--include_path", str(RECIPES / "demo_task"), "--model_args", settings, "--batch_size", "50"]
    command += ["--metadata", json.dumps({"data": str(folder / "problems.jsonl")}), "--output_path", str(output)]
    environment = {**os.environ, **ENVIRONMENT}
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if status:
        raise SystemExit(f"demo: lm-eval failed with status {status}; see {log}")
    results = json.loads(next(output.rglob("results_*.json")).read_text(encoding="utf-8"))["results"]["xdlm_alphabet"]
    return {"right": results["exact_match,none"], "standard_error": results["exact_match_stderr,none"]}


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


def sample_texts(folder: Path) -> dict:
    """Texts of the k = 0.1 model, and how many of their words the documentation has; writes text.html."""
    model, tokenizer = load(folder / "xdlm")
    output = generated(model, tokenizer, [PROMPT] * TEXTS, **TEXT)
    start, title = len(tokenizer(PROMPT)["input_ids"]), f"Text in {TEXT['steps']} steps, k = 0.1"
    save_trace(folder / "text.html", output.history, tokenizer, model.config.mask_token_id, start, title)
    texts = [text.removeprefix(PROMPT) for text in tokenizer.batch_decode(output.sequences)]
    # Without the last word, which may be cut.
    words = [word for text in texts for word in text.split()[:-1] if len(word) >= 3]
    lines = (folder / "text.jsonl").read_text(encoding="utf-8").splitlines()
    known = {word for line in lines for word in json.loads(line)["text"].split()}
    return {"texts": texts[:SHOWN_TEXTS], "words": len(words), "known_words": sum(word in known for word in words)}


def sample_answers(folder: Path) -> str:
    """Answers in 8 steps with and without refinement, as answers.html and refinement.svg; the picture's problem."""
    model, tokenizer = load(folder / "k0.1")
    problems = [problem["prompt"] for problem in alphabet.problems(EXAMPLES, seed=1)]
    start, mask = len(problems[0]), model.config.mask_token_id
    traces, histories, right = [], {}, {}
    for name, options in (("without refinement", {"mixing_ratio": 0.0}), ("with refinement", EDITS)):
        output = generated(model, tokenizer, problems, steps=8, max_new_tokens=alphabet.ANSWER, **options)
        answers = tokenizer.batch_decode(output.sequences[:, start:])
        histories[name], right[name] = output.history, list(map(alphabet.is_right, problems, answers))
        title = f"{name.capitalize()}: {sum(right[name])} of {EXAMPLES} right"
        traces.append(Trace(output.history, tokenizer, mask, start, title, confidences=output.confidences))
    traces[0].save(folder / "answers.html", beside=traces[1])
    # The picture shows the first answer that refinement corrects, the page all.
    both = zip(*right.values(), strict=True)
    row = next((number for number, (before, after) in enumerate(both) if after and not before), 0)
    runs = {
        f"8 steps {name}: {'right' if right[name][row] else 'wrong'}": history for name, history in histories.items()
    }
    save_animation(folder / "refinement.svg", runs, tokenizer, mask, start, row, width=60)
    return problems[row]


def generated(model, tokenizer, prompts: list[str], **options) -> DiffusionGenerateOutput:
    """Prompts and their continuations to the full length, with every step."""
    batch = tokenizer(prompts, return_tensors="pt")
    return model.generate(**batch, eos_token_id=[], return_dict_in_generate=True, output_history=True, **options)


def answer_table(found: dict[str, dict]) -> Table:
    largest = max(cell["standard_error"] for cells in found.values() for cell in cells.values())
    title = f"right answers of {PROBLEMS}, % ({alphabet.ANSWER} letters; standard error at most {100 * largest:.1f})"
    table = Table(title=title, title_justify="left")
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
    console.print(
        f"held-out text, nats per letter: frequencies of letters {text['unigram']:.2f}, {bounds}", highlight=False
    )
    samples = report["samples"]
    share = (
        f"{samples['known_words']} of {samples['words']} words of three letters or more are words of the documentation"
    )
    console.print(f"{TEXTS} texts after {PROMPT!r}; {share}. The first {SHOWN_TEXTS}:", highlight=False)
    for text in samples["texts"]:
        console.print(f"  {text}", markup=False, highlight=False)
    console.print(f"\n{report['seconds']:.0f} seconds. Losses, quality and traces: {folder / 'index.html'}")
    console.print(
        f"Next: xdlm-chat --model {folder / 'k0.1'} --steps 8, and a line like {report['samples']['problem']}"
    )


if __name__ == "__main__":
    main()
