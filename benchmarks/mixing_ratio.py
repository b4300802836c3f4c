"""A small model trained at k = 0, 0.1 and 1: held-out NELBO, and quality of samples in 8 and 32 steps.

    python benchmarks/mixing_ratio.py [--output_dir outputs/mixing_ratio] [--steps 1500]

Each model starts from the same random weights and sees the same rows in the same order, with the demo's recipe and text
(recipes/demo.py). As in the paper, samples are scored by perplexity and entropy; perplexity is that of a trigram model
of the training text's tokens (`eval/ngram.py`), because no large language model is available offline. A low perplexity
is good only if the entropy stays near that of the text, which the last row gives.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import demo  # noqa: E402

from xdlm_hf.data.packing import PackedDataset  # noqa: E402
from xdlm_hf.data.readers import hold_out, python_reference_documents  # noqa: E402
from xdlm_hf.evaluation.ngram import WittenBell  # noqa: E402
from xdlm_hf.evaluation.text_judges import entropies, perplexity  # noqa: E402

MIXING_RATIOS = (0.0, 0.1, 1.0)
STEPS = (8, 32)
SAMPLES, LENGTH, ORDER = 64, 128, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/mixing_ratio"))
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each model")
    options = parser.parse_args()
    folder = demo.fresh_folder(options.output_dir)
    demo.build(folder / "random")
    for k in MIXING_RATIOS:
        train(folder, k, options.steps)
    tokenizer = AutoTokenizer.from_pretrained(folder / "random")
    documents, held_out = hold_out(python_reference_documents(), 0.05)
    training_rows = PackedDataset(documents, tokenizer, LENGTH)
    judge = WittenBell((row["input_ids"].numpy() for row in training_rows), ORDER, len(tokenizer))
    rows = [measure(folder / name(k), judge) for k in MIXING_RATIOS]
    held_out_rows = PackedDataset(held_out, tokenizer, LENGTH, max_rows=SAMPLES)
    text = judged(judge, torch.stack([row["input_ids"] for row in held_out_rows]))
    (folder / "report.json").write_text(json.dumps({"models": rows, "held_out_text": text}, indent=2) + "\n")
    show(rows, text, options.steps)


def name(k: float) -> str:
    return f"k{k:g}"


def train(folder: Path, k: float, steps: int) -> None:
    recipe = str(Path(demo.__file__).with_name("llada_cpt.py"))
    command = [sys.executable, recipe, "--config", str(demo.CONFIGS / "demo_base.yaml"), "--mixing_ratio", str(k)]
    command += ["--model_name_or_path", str(folder / "random"), "--output_dir", str(folder / name(k))]
    demo.run([*command, "--max_steps", str(steps), "--nelbo_samples", "16"])


def judged(judge: WittenBell, ids: torch.Tensor) -> dict[str, float]:
    """Perplexity per token of rows (B, L) with its standard error, and the mean entropy of a row's tokens in nats."""
    nats = np.array([-row.sum() for row in judge.log_probabilities(ids.tolist())])
    return {**perplexity(nats, np.full(len(ids), float(ids.shape[1]))), "entropy": entropies(ids).mean().item()}


def measure(folder: Path, judge: WittenBell) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    figures = {"k": model.config.mixing_ratio, **demo.training_figures(folder.parent, [folder.name])[folder.name]}
    for steps in STEPS:
        options = {"steps": steps, "max_new_tokens": LENGTH, "sampler": "ancestral", "eos_token_id": [], "seed": 0}
        ids = model.generate(num_return_sequences=SAMPLES, **options)
        figures[f"{steps} steps"] = judged(judge, ids)
    return figures


def show(rows: list[dict], text: dict, steps: int) -> None:
    table = Table(title=f"Trained alike, {steps} optimizer steps; {SAMPLES} ancestral samples of {LENGTH} tokens")
    for column in (
        "k",
        "held-out NELBO (nats/token)",
        "8 steps: perplexity",
        "entropy",
        "32 steps: perplexity",
        "entropy",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        nelbo = f"{row['eval_loss']:.3f} ± {row['eval_loss_standard_error']:.3f}"
        table.add_row(f"{row['k']:g}", nelbo, *(cell for s in STEPS for cell in cells(row[f"{s} steps"])))
    table.add_row("text", "", *cells(text), *cells(text))
    Console().print(table)


def cells(figures: dict[str, float]) -> tuple[str, str]:
    judged_as = f"{figures['perplexity']:.1f} ± {figures['perplexity_standard_error']:.1f}"
    return judged_as, f"{figures['entropy']:.2f}"


if __name__ == "__main__":
    main()
