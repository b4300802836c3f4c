"""DiT under everything that runs a model: trainer, adapters, plan, evaluation, export for the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file
from torch.distributed._tools.mem_tracker import MemTracker
from training import VOCAB, arguments, documents_and_tokenizer, trainer

from xdlm_hf import DiTConfig, DiTForDiffusionLM, GIDDProcess, diffusion_loss, export_for_hub
from xdlm_hf.evaluation.adapter import XDLMEvalModel
from xdlm_hf.models.dit.configuration_dit import UDLMConfig
from xdlm_hf.models.dit.modeling_dit import UDLMForDiffusionLM
from xdlm_hf.training.adapters import add_adapters, load_adapter
from xdlm_hf.training.batch_loss import weighted_loss
from xdlm_hf.training.metrics import flops_per_token
from xdlm_hf.training.planning import LAYOUTS, Run, count_parameters, memory
from xdlm_hf.training.trainer import XDLMTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from measure import peak_bytes  # noqa: E402

SIZES = {"hidden_dim": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 2, "model_length": 64, "dropout": 0.0}
SYSTEMS = {
    "mdlm": ({}, {"mixing_ratio": 0.0, "noise_schedule": "loglinear"}),
    "xdlm": ({}, {"mixing_ratio": 0.1}),
    "udlm": ({"mask_token_id": 5}, {"mixing_ratio": 1.0}),
    "gidd": ({"noise_process": "gidd", "p_uniform": 0.1}, {}),
    "timed": ({"time_conditioning": True}, {"mixing_ratio": 0.1}),
    "gidd, timed": ({"noise_process": "gidd", "p_uniform": 0.1, "time_conditioning": True}, {}),
}


def tiny(family=DiTForDiffusionLM, config=DiTConfig, random=True, **options):
    torch.manual_seed(0)
    ids = {"vocab_size": VOCAB, "mask_token_id": 5, "pad_token_id": 1, "eos_token_id": 1}
    model = family(config(**{**SIZES, **ids, **options}))
    if random:
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.2)
    return model


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_trains(tmp_path, system):
    """From zero logits, whose loss is that of the uniform prediction, to well below it."""
    config, options = SYSTEMS[system]
    model = tiny(random=False, **config)
    gidd = config.get("noise_process") == "gidd"
    options = {"max_steps": 30, "learning_rate": 0.02, "adam_epsilon": 1e-8, **options}
    data = [{"input_ids": [6 + (row + i) % 4 for i in range(12)]} for row in range(16)]
    args = arguments(tmp_path, nelbo_samples=4, **options)
    run = XDLMTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    assert run._fused
    before = run.evaluate()["eval_loss"]
    assert before > 3  # log 48 = 3.9 at least; GIDD's bound has more
    run.train()
    assert run.evaluate()["eval_loss"] < before - 1.5
    assert isinstance(run.process, GIDDProcess) == gidd and run.model.stationary_noise != gidd
    run.save_model(str(tmp_path / "final"))
    saved = json.loads((tmp_path / "final" / "config.json").read_text())
    assert saved["mixing_ratio"] == options.get("mixing_ratio", 0.0)
    assert saved["noise_process"] == config.get("noise_process", "stationary")
    again = DiTForDiffusionLM.from_pretrained(tmp_path / "final")
    assert again.generate(steps=4, max_new_tokens=8, seed=0).shape == (1, 8)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_fused_loss_is_the_loss_of_the_logits(tmp_path, system):
    config, options = SYSTEMS[system]
    model = tiny(**config).double().eval()
    process = model.noise_process(options.get("mixing_ratio"))
    generator = torch.Generator().manual_seed(1)
    x_0, t = torch.randint(6, VOCAB, (4, 12), generator=generator), torch.tensor([0.1, 0.4, 0.7, 0.99])
    batch = {"input_ids": x_0, "t": t, "z_t": process.corrupt(x_0, t, generator)}
    batch["token_weights"] = torch.rand(4, 12, generator=generator)
    if "timesteps" in model.conditioning:
        batch["timesteps"] = model.timesteps(t)
    results = []
    for fused in (True, False):
        total, per_token = weighted_loss(model, process, batch, fused, chunk_size=7)
        results.append([total.detach(), per_token, *torch.autograd.grad(total, list(model.parameters()))])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    assert all(gradient.abs().sum() > 0 for gradient in results[0][2:])


@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("what", ["training", "evaluation", "sampling"])
def test_no_tensor_has_the_logits_of_all_positions(k, what, one_thread):
    """4,096 positions of 4,096 logits are 64 MiB; a chunk has 3 MiB in the loss and 12 in sampling."""
    rows, length, n = 8, 512, 4096
    model = tiny(n_blocks=1, model_length=length, vocab_size=n, mask_token_id=n - 1, mixing_ratio=k)
    process, generator = model.noise_process(), torch.Generator().manual_seed(1)
    x_0, t = torch.randint(6, n - 1, (rows, length), generator=generator), torch.linspace(0.9, 0.99, rows)
    batch = {"input_ids": x_0, "t": t, "z_t": process.corrupt(x_0, t, generator)}
    batch["token_weights"] = torch.ones(rows, length)

    def run():
        if what == "sampling":
            model.eval().generate(steps=2, max_new_tokens=length, num_return_sequences=rows, seed=0)
        with torch.set_grad_enabled(what == "training"):
            total, _ = weighted_loss(model, process, batch, fused=True)
        if what == "training":
            total.backward()

    run()  # the model's constants and the gradients are there when it counts
    assert peak_bytes(run) < rows * length * n * 4 / 2  # two chunks at most, and the activations


def test_adapters_go_on_the_blocks_and_train(tmp_path):
    model = add_adapters(tiny(), 2, 8)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(names) == 2 * 4 * 2 and not any("adaLN" in name or "output_layer" in name for name in names)
    run = trainer(tmp_path, model=model, max_steps=3, mixing_ratio=0.3)
    assert run._fused
    run.train()
    run.save_model(str(tmp_path / "final"))
    ids, base = torch.arange(6, 30)[None], tiny().eval()
    with torch.no_grad():
        base(ids)  # folds the constants of a base without adapters
        adapted = load_adapter(base, tmp_path / "final")
        assert base.config.mixing_ratio == 0.3
        torch.testing.assert_close(adapted(ids).logits, run.model.eval()(ids).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, run.model(ids).logits, rtol=0, atol=1e-4)


def test_adapters_on_the_maps_of_the_condition_count():
    """Constants folded before an adapter is put there, or before it is trained, are not used after."""
    import peft

    ids, model = torch.arange(6, 30)[None], tiny().eval()
    with torch.no_grad():
        before = model(ids).logits
    config = peft.LoraConfig(target_modules=["adaLN_modulation"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        after = adapted(ids).logits
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(adapted(ids).logits, after, rtol=0, atol=1e-5)
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, after, rtol=0, atol=1e-4)


# --- the plan -------------------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_matrices():
    model = tiny(use_absolute_position_embeddings=True)
    config = model.config
    elsewhere = ("vocab_embed", "position_embed", "sigma_map", "adaLN")  # lookups, and the conditioning of a row
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not any(name in n for name in elsewhere)
    )
    assert flops_per_token(model, 12) == 6 * matrices + 12 * config.n_blocks * config.hidden_dim * 12


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_needs_no_more_than_planned(checkpointing):
    model = tiny(n_blocks=4, vocab_size=512, mask_token_id=511).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer, ids = torch.optim.AdamW(model.parameters(), foreach=True), torch.randint(6, 510, (4, 64))
    rates = torch.full((4,), 0.5), torch.full((4,), -1.0)
    kernel, tracker = model.noise_kernel(0.1), MemTracker()
    tracker.track_external(model, optimizer, ids)
    with tracker:
        for _ in range(2):  # the second step has the optimizer's moments beside it
            diffusion_loss(model(ids).logits, ids, ids, *rates, kernel).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_mod_stats()
    measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    options = {"dtype": torch.float32, "bf16": False, "checkpointing": checkpointing, "fused_loss": False}
    run = Run(model.config, count_parameters(model), 4, 64, device="cpu", **options)
    planned = memory(run, LAYOUTS["ddp"]).gpu
    assert 0.95 < planned / measured < 1.6


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timed", [False, True])
def test_evaluation(tmp_path, timed):
    _, tokenizer = documents_and_tokenizer()
    ids = {"mask_token_id": tokenizer.mask_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny(vocab_size=len(tokenizer), time_conditioning=timed, **ids).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # The check is by the confidence sampler, which knows no times.
    greedy = {"check_greedy": False} if timed else {}
    options = {"device": "cpu", "batch_size": 2, "mc_samples": 4, "max_new_tokens": 8, "steps": 4, **greedy}
    lm = XDLMEvalModel(str(tmp_path), **options)
    assert lm.max_length == 64
    answers = [Instance("generate_until", {}, (text, {"until": []}), 0) for text in ("text number", "many")]
    assert len(lm.generate_until(answers)) == 2
    pairs = [Instance("loglikelihood", {}, pair, 0) for pair in (("text", " number"), ("many many", " words"))]
    assert all(-1e3 < float(value) < 0 for value, _ in lm.loglikelihood(pairs))


# --- the Hub --------------------------------------------------------------------------------------------------------

REMOTE = """
import sys


class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "xdlm_hf":
            raise ModuleNotFoundError("No module named 'xdlm_hf'")


sys.meta_path.insert(0, Refuse())
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

folder, inputs, outputs = sys.argv[1:]
inputs = load_file(inputs)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.model_type == model.config.model_type
assert model.generate(steps=4, max_new_tokens=8, num_return_sequences=2).shape == (2, 8)
save_file({"logits": model(**inputs).logits.detach()}, outputs)
"""


@pytest.mark.parametrize("model_type", ["mdlm", "udlm"])
def test_an_export_loads_where_the_package_is_not_importable(tmp_path, model_type):
    kinds = {"mdlm": (), "udlm": (UDLMForDiffusionLM, UDLMConfig)}
    model = tiny(*kinds[model_type]).eval()
    inputs = {"input_ids": torch.randint(6, VOCAB, (2, 7))}
    if model_type == "udlm":
        inputs["timesteps"] = torch.tensor([0.5, 2.0])
    folder = export_for_hub(model, tmp_path / "my-model", license="mit")
    save_file(inputs, tmp_path / "inputs.safetensors")
    arguments = [folder, tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors"]
    caches = {"HF_HOME": tmp_path / "home", "HF_MODULES_CACHE": tmp_path / "modules", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", REMOTE, *map(str, arguments)],
        cwd=tmp_path,
        env=os.environ | {name: str(value) for name, value in caches.items()},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        wanted = model(**inputs).logits
    torch.testing.assert_close(load_file(arguments[2])["logits"], wanted, rtol=0, atol=1e-5)
    card = Path(folder, "README.md").read_text()
    assert model_type in card and "| Training length | 64 tokens |" in card


def test_the_card_of_a_gidd_model_names_its_noise(tmp_path):
    card = Path(export_for_hub(tiny(**SYSTEMS["gidd"][0]), tmp_path / "model"), "README.md").read_text()
    assert "| Noise | `GIDDProcess(48, 5, p_uniform=0.1, gamma=1.0)` |" in card
    assert "Noise schedule" not in card and "MDLM" not in card
