"""What each process of a tensor-parallel model computes, for tests:

torchrun --standalone --nproc_per_node 2 tests/tensor_parallel.py FOLDER

FOLDER/NAME is a checkpoint; process r writes FOLDER/NAME_r.st, and errors to FOLDER/errors_r.json.
"""

import json
import os
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from xdlm_hf import XDLMTrainer, XDLMTrainingArguments
from xdlm_hf.training.batch_loss import weighted_loss
from xdlm_hf.training.processes import run_script

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
REFINED = {"sampler": "confidence", "max_new_tokens": 8, "steps": 8, "mixing_ratio": 0.5}
DRAWN = {"sampler": "ancestral", "max_new_tokens": 8, "steps": 8}
SHARDED_HEAD = {"model.transformer.ff_out": "colwise_gather_output"}


def loss(model, fused):
    """Loss of one noisy batch, with gradients."""
    process = model.noise_process(0.5)
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    z_t = process.corrupt(IDS, t, torch.Generator().manual_seed(0))
    batch = {"input_ids": IDS, "z_t": z_t, "t": t, "token_weights": torch.ones(IDS.shape, dtype=torch.float64)}
    return weighted_loss(model, process, batch, fused, chunk_size=5)[0]


def whole(weight):
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def generations(model):
    """Tokens of each sampler, by name."""
    generator = torch.Generator().manual_seed(7)
    tokens = {
        "greedy": model.generate(IDS, **REFINED),
        "padded": model.generate(IDS, attention_mask=MASK, **REFINED),
        "drawn": model.generate(IDS, generator=generator, **DRAWN),
        "again": model.generate(IDS, generator=generator, **DRAWN),
        "tempered": model.generate(IDS, seed=3, temperature=1.0, **REFINED),
    }
    if model.supports_canvas_cache:
        tokens["dual"] = model.generate(IDS, attention_mask=MASK, use_cache="dual", block_length=4, **REFINED)
    return tokens


def results(model):
    """Logits, generations, loss and gradients of a model in evaluation mode, by name."""
    with torch.no_grad():
        logits = {"logits": model(IDS).logits, "padded_logits": model(IDS, attention_mask=MASK).logits}
    total = loss(model, fused=True)
    total.backward()
    gradients = {f"gradient.{name}": whole(weight.grad) for name, weight in model.named_parameters()}
    with torch.no_grad():
        plain = loss(model, fused=False)
    return {**logits, **generations(model), "loss": total.detach(), "plain_loss": plain, **gradients}


def error_of(action):
    """The message of the ValueError that an action raises, or None."""
    try:
        action()
    except ValueError as error:
        return str(error)


def main():
    folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])

    def load(name, plan="auto"):
        config = DistributedConfig(tp_plan=plan)
        return AutoModelForCausalLM.from_pretrained(
            folder / name, distributed_config=config, dtype=torch.float64
        ).eval()

    for name in ("llada", "dit"):
        model = load(name)
        torch.manual_seed(rank)  # by itself, each process would draw other numbers
        tensors = {"unseeded": model.generate(IDS, **DRAWN), **results(model)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{name}_{rank}.st")
        model.save_pretrained(folder / f"{name}_saved")
    sharded = load("llada", SHARDED_HEAD)
    with torch.no_grad():
        tensors = {"logits": sharded(IDS).logits, **generations(sharded)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"sharded_{rank}.st")
    errors = {
        "loss": error_of(lambda: loss(sharded, fused=True)),
        "trainer": error_of(lambda: XDLMTrainer(sharded, XDLMTrainingArguments(output_dir=folder, report_to=[]))),
        **{name: error_of(lambda name=name: load(name)) for name in ("kv_heads", "width", "dit_heads")},
    }
    (folder / f"errors_{rank}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    run_script(main)
