"""Train, generate and score a small model on two CPU cores. `make demo` runs it, in about six minutes.

The text is Python's own documentation, so nothing is downloaded. In order:

1. a byte-level BPE tokenizer with LLaDA's special tokens, and a LLaDA of random weights;
2. the base model: masked diffusion (k = 0), by recipes/llada_cpt.py;
3. continual pretraining with the XDLM objective (k = 0.1), by the same recipe, which also trains LLaDA-8B: only the
   config file differs;
4. generation with `model.generate(steps=32)`, showing which tokens each step filled and which it refined;
5. the last word of held-out passages, scored through lm-eval;
6. a report: the table in the terminal, report.json, and the loss curve as loss.png.

    python recipes/demo.py [--output_dir outputs/demo] [--steps_scale 1.0]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import xdlm_hf
from xdlm_hf.data.readers import hold_out, python_reference_documents
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.watch.display import history_table

CONFIGS = Path(__file__).parent / "configs"
MARKER = ".xdlm-demo"  # marks a folder of the demo, which a new run may replace
PROMPT = "Return True if the"
ITEMS = 24
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--steps_scale", type=float, default=1.0, help="scales the training steps, at least 20 a run")
    options = parser.parse_args()
    start = time.perf_counter()
    folder = fresh_folder(options.output_dir)
    console.print(Rule("1. tokenizer and random weights"))
    texts = build(folder / "random")
    console.print(Rule("2. base model: masked diffusion, k = 0"))
    train("demo_base.yaml", folder / "random", folder / "base", options.steps_scale)
    console.print(Rule("3. continual pretraining: XDLM, k = 0.1"))
    train("demo_xdlm.yaml", folder / "base", folder / "xdlm", options.steps_scale)
    console.print(Rule("4. generation in 32 steps"))
    samples = generate(folder / "xdlm")
    console.print(Rule("5. last words of held-out passages, through lm-eval"))
    scores = score(folder / "xdlm", texts, folder / "eval")
    console.print(Rule("6. report"))
    report = {**training_figures(folder), **samples, **scores, "seconds": time.perf_counter() - start}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(folder)
    show(report)
    console.print(f"Written to {folder}: report.json, loss.png, and the models base/ and xdlm/.")


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
    steps = int(re.search(r"^max_steps: (\d+)", config.read_text(), re.MULTILINE)[1])
    return max(least, round(steps * scale))


def build(folder: Path) -> list[str]:
    """Write a tokenizer and a LLaDA of random weights, 1.4 million parameters; return the held-out documents."""
    with console.status("reading the language reference and the docstrings of the standard library"):
        train_documents, held_out = hold_out(python_reference_documents(), 0.05)
        tokenizer = train_tokenizer((row["text"] for row in train_documents), vocab_size=2048)
        texts = [row["text"] for row in held_out]
    config = xdlm_hf.LLaDAConfig(
        d_model=128,
        n_heads=4,
        n_layers=4,
        mlp_hidden_size=384,
        vocab_size=len(tokenizer),
        max_sequence_length=256,
        init_std=0.08,  # about 1 / sqrt(d_model), so that attention learns early in a short run
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = xdlm_hf.LLaDAForDiffusionLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    console.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(texts)} documents held out")
    return texts


def train(config: str, model: Path, output: Path, steps_scale: float) -> None:
    """One run of the recipe, started by accelerate."""
    steps = scaled_steps(CONFIGS / config, steps_scale, least=20)  # the loss is first logged at step 20
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    command += ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(Path(__file__).with_name("llada_cpt.py")), "--config", str(CONFIGS / config)]
    command += ["--model_name_or_path", str(model), "--output_dir", str(output)]
    command += ["--max_steps", str(steps)]
    # Waiting threads sleep: spinning ones slow training tenfold on a shared machine.
    run(command, OMP_NUM_THREADS=str(os.cpu_count()), OMP_WAIT_POLICY="PASSIVE")


def run(command: list[str], **environment: str) -> None:
    """Run a command with its output shown as it comes; a failure ends the demo."""
    console.print("$ " + " ".join(["python", *command[1:]]), style="dim", highlight=False, soft_wrap=True)
    status = subprocess.run(command, env={**os.environ, **environment}, check=False).returncode
    if status:
        raise SystemExit(f"demo: the command above failed with status {status}")


def generate(folder: Path) -> dict:
    """Load the trained model, show one generation step by step, and time a batch."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(
        **prompt, steps=32, max_new_tokens=64, return_dict_in_generate=True, output_history=True, eos_token_id=[]
    )
    start = prompt["input_ids"].shape[1]
    console.print(f"prompt: {PROMPT!r}, k = {model.config.mixing_ratio}, {int(output.num_edits)} tokens refined")
    console.print(history_table(output.history, tokenizer, model.config.mask_token_id, start=start, every=4))

    began = time.perf_counter()
    batch = model.generate(steps=32, max_new_tokens=64, sampler="ancestral", num_return_sequences=8, seed=0)
    seconds = time.perf_counter() - began
    return {
        "refined_tokens": int(output.num_edits),
        "generated_tokens_per_second": batch.numel() / seconds,
        "sample, confidence": tokenizer.decode(output.sequences[0], skip_special_tokens=True),
        "sample, ancestral": tokenizer.decode(batch[0], skip_special_tokens=True),
    }


def score(model: Path, texts: list[str], folder: Path) -> dict:
    """Exact match of the last word of held-out passages, scored by `xdlm-eval`."""
    folder.mkdir()
    passages = [p for text in texts for p in re.split(r"\n\s*\n", text) if 12 <= len(p.split()) <= 40]
    passages = [" ".join(p.split()) for p in passages if re.fullmatch(r"[a-z]+\.?", p.split()[-1])]
    chosen = passages[:: max(1, len(passages) // ITEMS)][:ITEMS]
    items = folder / "last_words.jsonl"
    items.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in chosen))
    command = [sys.executable, "-m", "xdlm_hf.evaluation.cli", "run", "--tasks", "xdlm_last_word"]
    command += ["--model_args", f"pretrained={model},steps=8,max_new_tokens=8", "--batch_size", "8"]
    command += ["--metadata", json.dumps({"data": str(items)}), "--output_path", str(folder)]
    run(command)
    results = json.loads(next(folder.rglob("results_*.json")).read_text())["results"]["xdlm_last_word"]
    return {"last_word_exact_match": results["exact_match,none"], "last_word_items": len(chosen)}


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def training_figures(folder: Path, runs: Sequence[str] = ("base", "xdlm")) -> dict:
    """Losses before and after, and the NELBO on held-out text, of the runs named."""
    figures = {}
    for name in runs:
        log = history(folder / name)
        losses = [entry["loss"] for entry in log if "loss" in entry]
        evaluation = [entry for entry in log if "eval_loss" in entry][-1]
        figures[name] = {
            "train_loss_first": losses[0],
            "train_loss_last": sum(losses[-5:]) / len(losses[-5:]),
            "train_tokens_per_second": [e["train_tokens_per_second"] for e in log if "loss" in e][-1],
            **{
                key: evaluation[key]
                for key in (
                    "eval_loss",
                    "eval_loss_standard_error",
                    "eval_perplexity",
                    "eval_perplexity_standard_error",
                )
            },
        }
    return figures


def plot(folder: Path) -> None:
    """loss.png: training loss of both runs, and the held-out NELBO at the end of each with its standard error."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    offset = 0
    for name, label, colour in (("base", "base, k = 0", "tab:gray"), ("xdlm", "XDLM, k = 0.1", "tab:blue")):
        log = history(folder / name)
        points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
        steps, losses = zip(*points, strict=True)
        axes.plot([offset + step for step in steps], losses, label=f"{label}: training loss", color=colour)
        offset += steps[-1]
        last = [entry for entry in log if "eval_loss" in entry][-1]
        axes.errorbar(
            offset,
            last["eval_loss"],
            2 * last["eval_loss_standard_error"],
            fmt="o",
            capsize=4,
            color=colour,
            label=f"{label}: held-out NELBO, two standard errors",
        )
    axes.set(xlabel="optimizer step", ylabel="nats per token", title="Loss of the demo model on Python's documentation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)


def show(report: dict) -> None:
    table = Table("", "base, k = 0", "XDLM, k = 0.1", title="The demo in figures")
    base, xdlm = report["base"], report["xdlm"]
    for label, key in (
        ("training loss, first (nats/token)", "train_loss_first"),
        ("training loss, last", "train_loss_last"),
    ):
        table.add_row(label, f"{base[key]:.3f}", f"{xdlm[key]:.3f}")
    for label, key in (("held-out NELBO (nats/token)", "eval_loss"), ("held-out perplexity", "eval_perplexity")):
        table.add_row(label, *(f"{run[key]:.3f} ± {run[key + '_standard_error']:.3f}" for run in (base, xdlm)))
    table.add_row("training, tokens/s", *(f"{run['train_tokens_per_second']:,.0f}" for run in (base, xdlm)))
    table.add_row("generation in 32 steps, tokens/s", "", f"{report['generated_tokens_per_second']:,.0f}")
    table.add_row(
        f"last word, exact match of {report['last_word_items']}", "", f"{report['last_word_exact_match']:.3f}"
    )
    console.print(table)
    for name in ("sample, confidence", "sample, ancestral"):
        console.print(f"[bold]{name}[/]:", end=" ")
        console.print(report[name], markup=False, highlight=False)
    console.print(f"{report['seconds']:.0f} seconds in all")


if __name__ == "__main__":
    main()
