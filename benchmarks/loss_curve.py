"""Reference curves of docs/training.md: all metrics logged while a small model trains from random weights.

    python benchmarks/loss_curve.py [--steps 2000] [--picture docs/loss_curve.png] [--output_dir outputs/loss_curve]

About three minutes on one core: 0.2 million parameters, bytes as tokens (262 with the special ones), k = 0.1, Python's
documentation in rows of 64 tokens, 16 rows a step. The model learns to use context, so its loss depends on t as a large
model's does.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch

from xdlm_hf import LLaDAConfig, LLaDAForDiffusionLM
from xdlm_hf.data.packing import PackedDataset
from xdlm_hf.data.readers import hold_out, python_reference_documents
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.training.arguments import XDLMTrainingArguments
from xdlm_hf.training.trainer import XDLMTrainer

LENGTH, VOCABULARY, MIXING_RATIO = 64, 262, 0.1
LOGGING = 5  # steps
WINDOW = 10  # logs averaged in the picture and the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--picture", type=Path, default=Path("docs/loss_curve.png"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/loss_curve"), help="for the model")
    options = parser.parse_args()
    run = train(options.output_dir, options.steps)
    metrics = run.evaluate()
    run.save_model()
    history = [entry for entry in run.state.log_history if "nelbo" in entry]
    draw(history, options.picture)
    table(history)
    print(f"\nheld-out NELBO {metrics['eval_loss']:.3f} +- {metrics['eval_loss_standard_error']:.3f} nats per token")


def train(output_dir: Path, steps: int) -> XDLMTrainer:
    """Trains a small model at k = 0.1, with held-out rows as evaluation data."""
    documents, held_out = hold_out(python_reference_documents(), 0.05)
    tokenizer = train_tokenizer((document["text"] for document in documents), VOCABULARY)
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    config = LLaDAConfig(
        d_model=64, n_heads=4, n_layers=3, mlp_hidden_size=192, rope_theta=1e3, vocab_size=len(tokenizer), **ids
    )
    args = XDLMTrainingArguments(
        output_dir=str(output_dir),
        mixing_ratio=MIXING_RATIO,
        per_device_train_batch_size=16,
        max_steps=steps,
        learning_rate=5e-3,
        adam_beta2=0.98,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        time_sampling="stratified",
        save_strategy="no",
        logging_first_step=False,
        logging_steps=LOGGING,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = XDLMTrainer(
        LLaDAForDiffusionLM(config),
        args,
        train_dataset=PackedDataset(documents, tokenizer, LENGTH),
        eval_dataset=PackedDataset(held_out, tokenizer, LENGTH, max_rows=512),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def draw(history: list[dict], path: Path) -> None:
    """Plots loss, its parts and the gradient norm, one panel each."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "loss (nats per token)": {"nelbo": "loss"},
        "by kind of position": {"loss_masked": "masked", "loss_uniform": "uniform noise", "loss_clean": "clean"},
        "by time": {
            f"loss_t_{name}": f"t in {name.replace('_', '-')} %" for name in ("0_25", "25_50", "50_75", "75_100")
        },
        "gradient norm": {"grad_norm": "before clipping"},
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(17, 4), constrained_layout=True)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, label in lines.items():
            entries = [entry for entry in history if name in entry]
            steps, values = (np.array([entry[key] for entry in entries]) for key in ("step", name))
            smooth = np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")
            (line,) = axis.plot(steps[WINDOW - 1 :], smooth, label=label)
            axis.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.7)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=80)


def table(history: list[dict]) -> None:
    """Prints means over ten logs at a few steps, as Markdown."""
    names = ["nelbo", "loss_masked", "loss_uniform", "loss_clean", "loss_t_0_25", "loss_t_75_100", "grad_norm"]
    print("| steps | " + " | ".join(names) + " |\n| --- |" + " ---: |" * len(names))
    parts = len(history) // WINDOW
    for part in sorted({0, 1, 3, parts // 3, 2 * parts // 3, parts - 1}):
        entries = history[part * WINDOW : (part + 1) * WINDOW]
        means = [np.mean([entry[name] for entry in entries if name in entry]) for name in names]
        print(
            f"| {entries[0]['step'] - 4}-{entries[-1]['step']} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |"
        )


if __name__ == "__main__":
    main()
