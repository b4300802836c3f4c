"""A tiny training run that tests share; also the script that each process of a distributed test runs.

torchrun --standalone --nproc_per_node 2 tests/training.py '{"output_dir": "...", "per_device_train_batch_size": 2}'
"""

import json
import os
import pathlib
import subprocess
import sys

import torch
from safetensors.torch import save_file

from xdlm_hf import LLaDAConfig, LLaDAForDiffusionLM
from xdlm_hf.trainer import XDLMTrainer, XDLMTrainingArguments

VOCAB, MASK, LENGTH = 48, 5, 12


def tiny_model(**options):
    torch.manual_seed(0)
    config = LLaDAConfig(
        **{
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 2,
            "mlp_hidden_size": 48,
            "vocab_size": VOCAB,
            "max_sequence_length": 64,
            "mask_token_id": MASK,
            "pad_token_id": 1,
            "eos_token_id": 1,
            **options,
        }
    )
    return LLaDAForDiffusionLM(config)


def rows(number, seed=0):
    """Rows of unequal length and weight: a mean over rows or over processes would differ from one over tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, LENGTH + 1, (number,), generator=generator).tolist()
    ids = [torch.randint(6, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [
        {"input_ids": row, "prompt_mask": [position < index % 3 for position in range(len(row))]}
        for index, row in enumerate(ids)
    ]


def arguments(output_dir, **options):
    return XDLMTrainingArguments(
        output_dir=str(output_dir),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 7,
            **options,
        },
    )


def trainer(output_dir, train_rows=20, eval_rows=0, model=None, **options):
    return XDLMTrainer(
        model=tiny_model() if model is None else model,
        args=arguments(output_dir, **options),
        train_dataset=rows(train_rows),
        eval_dataset=rows(eval_rows, seed=1) if eval_rows else None,
    )


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def launch(*command, timeout=300, **environment):
    """Run `python *command` to its end and return its output; on a timeout its processes are told to stop."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun and accelerate pass it on to their workers
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"no end after {timeout} s; output so far:\n{output[-3000:]}") from None
    return process.returncode, output


def main():
    options = json.loads(sys.argv[1])
    output_dir = pathlib.Path(options.pop("output_dir"))
    run = trainer(output_dir, **options)
    run.train()
    metrics = run.evaluate() if run.eval_dataset else {}
    if run.is_world_process_zero():
        result = {"losses": losses(run), "metrics": metrics, "processes": run.args.world_size}
        (output_dir / "result.json").write_text(json.dumps(result))
        save_file({name: p.detach().clone() for name, p in run.model.named_parameters()}, output_dir / "end.st")


if __name__ == "__main__":
    main()
