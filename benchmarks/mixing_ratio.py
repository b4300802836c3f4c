"""A small model trained at k = 0, 0.1 and 1: held-out NELBO, and quality of samples in 8 and 32 steps.

    python benchmarks/mixing_ratio.py [--output_dir outputs/mixing_ratio] [--steps 1500]

Each model starts from the same random weights and sees the same rows in the same order, with the demo's recipe and text
(recipes/demo.py). As in the paper, samples are scored by perplexity and entropy; perplexity is that of a trigram model
(Witten-Bell, from nltk) of the training text, because no large language model is available offline. A low perplexity is
good only if the entropy stays near that of the text, which the last row gives.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from nltk.lm import WittenBellInterpolated
from nltk.lm.preprocessing import padded_everygram_pipeline
from nltk.util import ngrams
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import demo  # noqa: E402

from xdlm_hf.data.packing import PackedDataset  # noqa: E402
from xdlm_hf.data.readers import hold_out, python_reference_documents  # noqa: E402

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
    judge = Trigrams(PackedDataset(documents, tokenizer, LENGTH))
    rows = [measure(folder / name(k), judge) for k in MIXING_RATIOS]
    text = judge.report(
        torch.stack([row["input_ids"] for row in list(PackedDataset(held_out, tokenizer, LENGTH))[:SAMPLES]])
    )
    (folder / "report.json").write_text(json.dumps({"models": rows, "held_out_text": text}, indent=2) + "\n")
    show(rows, text, options.steps)


def name(k: float) -> str:
    return f"k{k:g}"


def train(folder: Path, k: float, steps: int) -> None:
    recipe = str(Path(demo.__file__).with_name("llada_cpt.py"))
    command = [sys.executable, recipe, "--config", str(demo.CONFIGS / "demo_base.yaml"), "--mixing_ratio", str(k)]
    command += ["--model_name_or_path", str(folder / "random"), "--output_dir", str(folder / name(k))]
    demo.run([*command, "--max_steps", str(steps), "--nelbo_samples", "16"])


class Trigrams:
    """Witten-Bell trigram model of token ids, which scores rows of ids, (B, L)."""

    def __init__(self, rows: PackedDataset):
        sequences = [[str(i) for i in row["input_ids"].tolist()] for row in tqdm(rows, desc="judge: reading")]
        self.model = WittenBellInterpolated(ORDER)
        self.model.fit(*padded_everygram_pipeline(ORDER, sequences))

    def report(self, ids: torch.Tensor) -> dict[str, float]:
        """Perplexity per token with its standard error over rows, and the mean entropy of a row's tokens in nats."""
        nats = torch.tensor([self._nats(row) for row in tqdm(ids.tolist(), desc="judge: scoring")], dtype=torch.float64)
        perplexity = nats.mean().exp().item()
        shares = [row.unique(return_counts=True)[1] / ids.shape[1] for row in ids]
        entropy = sum(-(share * share.log()).sum().item() for share in shares) / len(ids)
        return {
            "perplexity": perplexity,
            "perplexity_standard_error": perplexity * nats.std().item() / math.sqrt(len(ids)),
            "entropy": entropy,
        }

    def _nats(self, row: list[int]) -> float:
        grams = list(ngrams([str(i) for i in row], ORDER))
        return -sum(math.log(max(self.model.score(gram[-1], gram[:-1]), 1e-9)) for gram in grams) / len(grams)


def measure(folder: Path, judge: Trigrams) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    figures = {"k": model.config.mixing_ratio, **demo.training_figures(folder.parent, [folder.name])[folder.name]}
    for steps in STEPS:
        options = {"steps": steps, "max_new_tokens": LENGTH, "sampler": "ancestral", "eos_token_id": [], "seed": 0}
        ids = model.generate(num_return_sequences=SAMPLES, **options)
        figures[f"{steps} steps"] = judge.report(ids)
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


def cells(judged: dict[str, float]) -> tuple[str, str]:
    perplexity = f"{judged['perplexity']:.1f} ± {judged['perplexity_standard_error']:.1f}"
    return perplexity, f"{judged['entropy']:.2f}"


if __name__ == "__main__":
    main()
