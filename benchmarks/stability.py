"""How often a perturbed run lies inside the interval of `stability=20`, and what low precision does to the same score.

    python benchmarks/stability.py [--output_dir outputs/stability]     (5 minutes on 2 idle cores)

A small model (0.1 million parameters) is trained briefly to add two numbers of two digits, so that it answers
some problems right, some wrong, and is undecided between two digits for others. Then:

1. `stability=20` gives the score, the flip rate and the interval.
2. The same with another seed gives 20 fresh perturbed runs. Reported: how many of their scores lie inside.
3. The weights run in bfloat16 and float16, with two attention implementations and alone or in a batch: real roundings.
   Reported: their scores, and the deviation of their logits from those of float32, at the positions of the answers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from decoding_quality import BATCH, K, trained
from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from measure import machine
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from xdlm_hf import LLaDAConfig, LLaDAForDiffusionLM
from xdlm_hf.data.tokenizer import symbol_tokenizer
from xdlm_hf.evaluation.adapter import XDLMEvalModel

DIGITS, ANSWER = 2, 3
SYMBOLS = [*"0123456789+=", "<mask>", "<end>"]
TASK = """
task: addition
dataset_path: json
test_split: train
dataset_kwargs:
  data_files: {rows}
output_type: generate_until
doc_to_text: "{{{{problem}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs:
  until: []
  max_gen_toks: 3
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each symbol."""
    return symbol_tokenizer(SYMBOLS, "<end>", mask_token="<mask>", eos_token="<end>", pad_token="<end>")


def problem(seed: int) -> tuple[str, str]:
    """A problem such as "12+95=" and its answer "107"."""
    a, b = torch.randint(10**DIGITS, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    return f"{a:0{DIGITS}}+{b:0{DIGITS}}=", f"{a + b:0{ANSWER}}"


class Problems(Dataset):
    """Training rows; row i is drawn from the seed 10,000 + i."""

    prompt_mask = torch.arange(2 * DIGITS + 2 + ANSWER) < 2 * DIGITS + 2

    def __init__(self, number: int):
        self.number, self.ids = number, {symbol: i for i, symbol in enumerate(SYMBOLS)}

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = "".join(problem(10_000 + index))
        return {"input_ids": torch.tensor([self.ids[symbol] for symbol in text]), "prompt_mask": self.prompt_mask}


def adder() -> LLaDAForDiffusionLM:
    """The network with random weights."""
    torch.manual_seed(0)
    sizes = dict(d_model=64, n_heads=4, n_kv_heads=4, n_layers=2, mlp_hidden_size=192, max_sequence_length=32)
    ids = {"mask_token_id": 12, "eos_token_id": 13, "pad_token_id": 13}
    return LLaDAForDiffusionLM(
        LLaDAConfig(vocab_size=len(SYMBOLS), embedding_size=len(SYMBOLS), mixing_ratio=K, **sizes, **ids)
    )


def run(checkpoint: Path, attention: str = "sdpa", **settings: Any) -> dict[str, Any]:
    """lm-eval's results of one run over the problems."""
    dtype = settings.pop("dtype", "float32")
    model = LLaDAForDiffusionLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype), attn_implementation=attention)
    lm = XDLMEvalModel(model, tokenizer=tokenizer(), **{"steps": 3, "batch_size": 64, **settings})
    tasks = TaskManager(include_path=str(checkpoint / "task"), include_defaults=False).load(["addition"])
    return evaluator.evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0)


@torch.no_grad()
def rounding(checkpoint: Path, number: int, dtype: torch.dtype, attention: str) -> tuple[float, float]:
    """Deviation of the logits of low precision from those of float32, and that between two tokens of a position."""
    codes, prompts = tokenizer(), [problem(seed)[0] for seed in range(number)]
    ids = torch.tensor([codes.encode(prompt) + [12] * ANSWER for prompt in prompts])
    exact, rounded = (
        LLaDAForDiffusionLM.from_pretrained(checkpoint, dtype=kind, attn_implementation=kernel)
        .eval()(input_ids=ids, logits_to_keep=ANSWER)
        .logits[..., :10]
        .float()
        for kind, kernel in ((torch.float32, "sdpa"), (dtype, attention))
    )
    error = rounded - exact
    return error.std().item(), (error - error.mean(-1, keepdim=True)).std().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/stability"))
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of the training")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.05, 0.5])
    options = parser.parse_args()
    checkpoint = trained(options.output_dir, adder(), Problems(options.steps * BATCH), options.steps)
    tokenizer().save_pretrained(checkpoint)
    folder = checkpoint / "task"
    folder.mkdir(exist_ok=True)
    rows = [dict(zip(("problem", "answer"), problem(seed), strict=True)) for seed in range(options.problems)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "addition.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    print(f"addition: {options.problems} problems, {machine()}")
    for noise in options.noise:
        first, fresh = (
            run(checkpoint, stability=20, stability_noise=noise, seed=seed)["stability"]["tasks"]["addition"][
                "exact_match,none"
            ]
            for seed in (1, 2)
        )
        (low, high), scores = first["interval"], fresh["scores"]
        print(f"noise {noise}: " + json.dumps({key: first[key] for key in first if key != "scores"}))
        print(f"  fresh scores: {sorted(scores)}; inside: {sum(low <= score <= high for score in scores)} of 20")
    for dtype in ("float32", "bfloat16", "float16"):
        for attention in ("sdpa", "eager"):
            scores = [
                float(
                    run(checkpoint, attention, dtype=dtype, batch_size=rows)["results"]["addition"]["exact_match,none"]
                )
                for rows in (1, 64)
            ]
            deviation = rounding(checkpoint, options.problems, getattr(torch, dtype), attention)
            print(f"{dtype}, {attention}: scores {scores}, deviation of logits {deviation[0]:.4f}, {deviation[1]:.4f}")


if __name__ == "__main__":
    main()
