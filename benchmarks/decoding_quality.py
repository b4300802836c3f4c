"""Accuracy of a small model under fewer steps, confidence thresholds and caches, on a task with checkable answers.

    python benchmarks/decoding_quality.py [--output_dir outputs/walks]     (30 minutes on 2 cores)
    python benchmarks/decoding_quality.py --cpu-time                       (on a shared machine)

A small model is trained on one task at k = 0.1 until it solves it. There are four fixed cycles through 64 letters. The
prompt has 32 tokens: one names a cycle, the others are random letters. The answer is 64 steps along that cycle from any
start (64 right answers). The start is free, so the model is uncertain at first, and tokens filled in parallel
contradict each other; once one token is fixed, its neighbours follow from it and the prompt almost surely. A threshold
can then fill many tokens at once, which a fixed number of steps cannot, and stale cache entries lead to wrong answers.
Weights are kept in the output folder and reused.

Blocks have 16 letters; "every 4" is the cache's `refresh`; "edits above" is refinement by a threshold in place of
Algorithm 1's budget of k / (1 - k) edits per filled token. Reported per setting: wholly right answers with their
standard error, tokens that follow from their left neighbour, forward passes of a row, and time as a ratio to the first
line (medians of interleaved rounds).
"""

import argparse
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import interleaved_seconds, machine
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from xdlm_hf import LLaDAConfig, LLaDAForDiffusionLM
from xdlm_hf.training.arguments import XDLMTrainingArguments
from xdlm_hf.training.trainer import XDLMTrainer

LETTERS, CYCLES, GIVEN, ANSWER, BLOCK, K = 64, 4, 32, 64, 16, 0.1
MASK, EOS = LETTERS + CYCLES, LETTERS + CYCLES + 1  # after the letters come the names of the cycles
VOCAB, CONTEXT = EOS + 1, GIVEN + ANSWER
BATCH = 64  # rows of a training step

IN_BLOCKS = {"steps": 64, "block_length": BLOCK}
DUAL = {**IN_BLOCKS, "cache": "dual"}
SURE = {"parallel_decoding": {"threshold": 0.9}}


def edits(threshold: float) -> dict[str, object]:
    """Edits of every token that the network predicts differently with at least this confidence."""
    return {"refinement": {"policy": "threshold", "threshold": threshold}}


def refreshed(steps: int) -> dict[str, object]:
    """The dual cache in blocks, recomputed as a whole every so many steps."""
    return {**IN_BLOCKS, "cache": {"mode": "dual", "refresh": steps}}


SETTINGS = {
    "64 steps": {"steps": 64},
    "16 steps": {"steps": 16},
    "8 steps": {"steps": 8},
    "4 steps": {"steps": 4},
    "2 steps": {"steps": 2},
    "64 steps, k = 0": {"steps": 64, "mixing_ratio": 0.0},
    "16 steps, k = 0": {"steps": 16, "mixing_ratio": 0.0},
    "8 steps, k = 0": {"steps": 8, "mixing_ratio": 0.0},
    "4 steps, k = 0": {"steps": 4, "mixing_ratio": 0.0},
    **{f"{n} steps, edits above {p}": {"steps": n, **edits(p)} for n in (16, 8, 4, 2) for p in (0.5, 0.7, 0.9)},
    "threshold 0.9": {"steps": 64, **SURE},
    "threshold 0.9, edits above 0.5": {"steps": 64, **SURE, **edits(0.5)},
    "factor 1": {"steps": 64, "parallel_decoding": {"factor": 1.0}},
    "prefix": {"steps": 64, "cache": "prefix"},
    "prefix, threshold 0.9": {"steps": 64, "cache": "prefix", **SURE},
    "blocks": IN_BLOCKS,
    "blocks, k = 0": {**IN_BLOCKS, "mixing_ratio": 0.0},
    "blocks, threshold 0.9": {**IN_BLOCKS, **SURE},
    "blocks, dual": DUAL,
    "blocks, dual, k = 0": {**DUAL, "mixing_ratio": 0.0},
    "blocks, dual, every 4": refreshed(4),
    "blocks, dual, every 2": refreshed(2),
    "blocks, dual, threshold 0.9": {**DUAL, **SURE},
    "blocks, dual, every 4, threshold 0.9": {**refreshed(4), **SURE},
}


def successors() -> Tensor:
    """(CYCLES, LETTERS): the letter after each on each cycle."""
    orders = torch.rand(CYCLES, LETTERS, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return torch.empty_like(orders).scatter_(1, orders, orders.roll(-1, 1))


SUCCESSORS = successors()


def walks(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Prompts (number, GIVEN) and one right answer each, (number, ANSWER)."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(LETTERS, (number, GIVEN), generator=generator)
    cycle = torch.randint(CYCLES, (number,), generator=generator)
    prompts[torch.arange(number), torch.randint(GIVEN, (number,), generator=generator)] = LETTERS + cycle
    letters = [torch.randint(LETTERS, (number,), generator=generator)]
    for _ in range(ANSWER - 1):
        letters.append(SUCCESSORS[cycle, letters[-1]])
    return prompts, torch.stack(letters, 1)


class Walks(Dataset):
    """Training rows; row i is drawn from the seed 1000 + i, so none is one of the problems."""

    prompt_mask = torch.arange(CONTEXT) < GIVEN

    def __init__(self, number: int):
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.cat(walks(1, 1000 + index), 1)[0], "prompt_mask": self.prompt_mask}


def follows(prompts: Tensor, answers: Tensor) -> Tensor:
    """(B, ANSWER) bool: the first token is a letter, each other token the successor of the one before on its cycle."""
    cycle = prompts.max(-1).values - LETTERS
    known = answers.clamp_max(LETTERS - 1)
    expected = SUCCESSORS[cycle[:, None], known[:, :-1]]
    return (answers < LETTERS) & torch.cat([known[:, :1] >= 0, known[:, 1:] == expected], 1)


def build() -> LLaDAForDiffusionLM:
    torch.manual_seed(0)
    config = LLaDAConfig(
        vocab_size=VOCAB,
        embedding_size=VOCAB,
        d_model=128,
        n_heads=4,
        n_kv_heads=4,
        n_layers=4,
        mlp_hidden_size=256,
        max_sequence_length=CONTEXT,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=EOS,
        mixing_ratio=K,
    )
    return LLaDAForDiffusionLM(config)


def trained(
    folder: Path, model: LLaDAForDiffusionLM, rows: Dataset, steps: int, learning_rate: float = 2e-3, **options: Any
) -> Path:
    """The checkpoint of the model trained on `steps` batches of 64 of the rows; trained unless it is there.

    `options` are further arguments of the training.
    """
    if not (folder / "model.safetensors").exists():
        arguments = XDLMTrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            mixing_ratio=K,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            **options,
        )
        trainer = XDLMTrainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        trainer.save_model()
    return folder


@torch.no_grad()
def measure(
    model: LLaDAForDiffusionLM, names: Sequence[str], problems: int, repeats: int, clock: Callable[[], float]
) -> None:
    prompts, _ = walks(problems, seed=1)
    common = {"max_new_tokens": ANSWER, "eos_token_id": [], "return_dict_in_generate": True}
    outputs = {}

    def run(name: str) -> None:
        outputs[name] = model.generate(prompts, **{**common, **SETTINGS[name]})
        bar.update()

    with tqdm(desc="generating", total=len(names) * (repeats + 1)) as bar:
        work = {name: partial(run, name) for name in names}
        seconds = interleaved_seconds(work, repeats, clock) if repeats else {name: one() for name, one in work.items()}
    base = names[0]
    table = Table(title=f"walks: {problems} problems, k = {K} unless said, {machine()}")
    for column in ("decoding", "right, %", "+-", "tokens that follow, %", "passes of a row", "time"):
        table.add_column(column, justify="left" if column == "decoding" else "right")
    for name, output in outputs.items():
        fits = follows(prompts, output.sequences[:, GIVEN:])
        right = fits.all(-1).double()
        table.add_row(
            name,
            f"{100 * right.mean():.1f}",
            f"{100 * right.std() / problems**0.5:.1f}",
            f"{100 * fits.double().mean():.2f}",
            f"{output.row_forward_passes.double().mean():.1f}",
            f"{seconds[name] / seconds[base]:.3f}" if repeats else "-",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/walks"))
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps of the training")
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1, help="rounds of timing after a warm-up, 0 for none")
    parser.add_argument("--only", default="", help="regular expression of the settings to run beside the first")
    parser.add_argument("--cpu-time", action="store_true", help="measure this process's CPU time, not wall time")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    first, *others = SETTINGS
    names = [first, *(name for name in others if re.search(options.only, name))]
    folder = trained(options.output_dir, build(), Walks(options.steps * BATCH), options.steps)
    model = LLaDAForDiffusionLM.from_pretrained(folder).eval()
    measure(model, names, options.problems, options.repeats, clock)


if __name__ == "__main__":
    main()
