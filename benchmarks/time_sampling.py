"""Variance of the training loss with stratified times, relative to independent times, on a trained model.

The loss of an optimizer step estimates the NELBO from G rows with one time each. With independent times its variance is
that of one row's loss over G; with stratified times, one row in each of G equal intervals, only the variance within the
intervals remains:

    ratio = variance within intervals / (variance within + variance between their means)

Both parts are estimated from the same draws of rows, times and noise, made by the trainer as in training; two separate
sample variances would be dominated by rare large losses near t = 0. The error is a jackknife over 20 groups of steps.

    python benchmarks/time_sampling.py [--model outputs/loss_curve] [--steps 400]

The default model is that of benchmarks/loss_curve.py, which must be run first.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from xdlm_hf.data.packing import PackedDataset
from xdlm_hf.data.readers import hold_out, python_reference_documents
from xdlm_hf.training.arguments import XDLMTrainingArguments
from xdlm_hf.training.trainer import XDLMTrainer

GROUPS = 20  # of the jackknife
T_EPS = (1e-3, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/loss_curve"))
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps whose loss is drawn, for G = 32")
    parser.add_argument("--global_batch", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    held_out = hold_out(python_reference_documents(), 0.05)[1]
    rows = [
        row for row in PackedDataset(held_out, tokenizer, options.length) if len(row["input_ids"]) == options.length
    ]
    print("| t_eps | rows a step | loss | deviation of one row | ratio | rows that independent times need |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for t_eps in T_EPS:
        for global_batch in options.global_batch:
            losses = draw(model, rows, global_batch, max(GROUPS * 2, options.steps * 32 // global_batch), t_eps)
            ratio, error = jackknife(losses)
            deviation, needed = losses.std(), global_batch / ratio
            cells = f"{losses.mean():.3f} | {deviation:.3f} | {ratio:.3f} +- {error:.3f} | {needed:.0f}"
            print(f"| {t_eps:g} | {global_batch} | {cells} |", flush=True)


def draw(model, rows: list, global_batch: int, steps: int, t_eps: float) -> np.ndarray:
    """Loss of each row in nats per token, (steps, global_batch), sorted by the interval of its time."""
    with tempfile.TemporaryDirectory() as folder:
        args = XDLMTrainingArguments(
            output_dir=folder,
            mixing_ratio=model.config.mixing_ratio,
            noise_schedule=model.config.noise_schedule,
            time_sampling="stratified",
            t_eps=t_eps,
            per_device_train_batch_size=global_batch,
            report_to="none",
            use_cpu=True,
        )
        run = XDLMTrainer(model=model, args=args, train_dataset=rows)
    generator = np.random.default_rng(0)
    losses = []
    for step in range(steps):
        batch = run.data_collator([rows[row] for row in generator.integers(len(rows), size=global_batch)])
        batch["sample_index"] = step * global_batch + torch.arange(global_batch)
        run._add_noise(batch)
        with torch.no_grad():
            _, outputs = run.compute_loss(run.model, batch, return_outputs=True)
        times = batch["t"]
        losses.append(outputs["token_losses"].double().mean(1).numpy()[np.argsort(times)])
    return np.stack(losses)


def variance_ratio(losses: np.ndarray) -> float:
    """Variance within the columns over the total, without the bias of a one-way analysis of variance."""
    steps = len(losses)
    within = losses.var(axis=0, ddof=1).mean()
    between = losses.mean(axis=0).var() - within / steps * (1 - 1 / losses.shape[1])
    return within / (within + between)


def jackknife(losses: np.ndarray) -> tuple[float, float]:
    groups = np.array_split(np.arange(len(losses)), GROUPS)
    without = [variance_ratio(np.delete(losses, group, axis=0)) for group in groups]
    return variance_ratio(losses), float(np.std(without) * np.sqrt(GROUPS - 1))


if __name__ == "__main__":
    main()
