"""LoRA on the right matrices, the noise stored beside it, and 4 bits: what they need, and what they refuse."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from models import tiny_model
from training import state, trainer

from xdlm_hf import LLaDAForDiffusionLM
from xdlm_hf.models.output_layer import OutputLayer
from xdlm_hf.training.adapters import NOISE_FILE, add_adapters, load_adapter, quantization_4bit, save_noise

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of adapters at k = 0.3, with a checkpoint."""
    folder = tmp_path_factory.mktemp("adapter")
    options = {"mixing_ratio": 0.3, "noise_schedule": "cosine", "save_strategy": "steps", "save_steps": 2}
    run = trainer(folder, model=add_adapters(tiny_model(), 2, 8), max_steps=2, **options)
    run.train()
    run.save_model(str(folder / "final"))
    return folder, run.model


def test_adapters_go_on_all_projections_and_not_on_the_head():
    model = add_adapters(tiny_model(), 2, 8)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2 and all(".blocks." in name and "lora_" in name for name in names)
    assert type(model.get_output_embeddings()) is OutputLayer
    with pytest.raises(ValueError, match="lora_rank=0 must be at least 1"):
        add_adapters(tiny_model(), 0, 8)


def test_the_targets_of_a_family_that_names_none(monkeypatch):
    def places(model):
        return [name for name, _ in add_adapters(model, 2, 8).named_parameters() if "lora_" in name]

    named = places(tiny_model())
    monkeypatch.delattr(LLaDAForDiffusionLM, "lora_targets")
    assert tiny_model().lora_targets == "all-linear" and places(tiny_model()) == named


@pytest.mark.parametrize("folder", ["final", "checkpoint-2"])
def test_an_adapter_brings_the_noise_it_was_trained_with(trained, folder):
    base = tiny_model()
    assert base.config.mixing_ratio == 0.0
    adapted = load_adapter(base, trained[0] / folder)
    assert (base.config.mixing_ratio, base.config.noise_schedule) == (0.3, "cosine")
    assert base.noise_kernel().mixing_ratio == 0.3
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, trained[1](ids).logits)
    assert adapted.merge_and_unload().config.mixing_ratio == 0.3
    assert not (trained[0] / folder / "config.json").exists()  # Transformers would take the folder for a whole model


def test_an_adapter_of_another_program_leaves_the_noise(trained, tmp_path):
    trained[1].save_pretrained(tmp_path)  # peft's own, which knows of no noise
    base = tiny_model(mixing_ratio=0.5)
    load_adapter(base, tmp_path)
    assert base.config.mixing_ratio == 0.5


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"mixing_ratio": 0.1}, r"xdlm_noise\.json must hold mixing_ratio and noise_schedule, not"),
        ([0.1], r"must hold mixing_ratio and noise_schedule, not \[0\.1\]"),
        ({"mixing_ratio": 2, "noise_schedule": "linear"}, r"xdlm_noise\.json: mixing_ratio=2 must lie in \[0, 1\]"),
        ({"mixing_ratio": 0.1, "noise_schedule": "steep"}, "'steep' is not known; choose one of"),
        ({"mixing_ratio": "0.1", "noise_schedule": "linear"}, r"xdlm_noise\.json: mixing_ratio='0.1' must be a number"),
    ],
)
def test_damaged_noise_is_refused(trained, tmp_path, noise, message):
    trained[1].save_pretrained(tmp_path)
    (tmp_path / NOISE_FILE).write_text(json.dumps(noise))
    base = tiny_model()
    before = set(state(base))
    with pytest.raises(ValueError, match=message):
        load_adapter(base, tmp_path)
    assert base.config.mixing_ratio == 0.0 and set(state(base)) == before


def test_noise_file_holds_two_fields(tmp_path):
    save_noise(tiny_model(mixing_ratio=0.25).config, tmp_path)
    assert json.loads((tmp_path / NOISE_FILE).read_text()) == {"mixing_ratio": 0.25, "noise_schedule": "linear"}


def test_training_without_adapters_needs_neither_peft_nor_bitsandbytes():
    script = "import sys; sys.modules.update(peft=None, bitsandbytes=None); import xdlm_hf.training.trainer"
    subprocess.run([sys.executable, "-c", script], check=True)


# --------------------------------------------------------------------------------------------------------------------
# 4 bits


def test_4_bits_without_bitsandbytes_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs bitsandbytes, which is not installed: pip install"):
        quantization_4bit("cpu", torch.float32)


@needs_bitsandbytes
def test_a_device_that_cannot_do_4_bits_is_refused(monkeypatch):
    from bitsandbytes import functional

    def no_kernel(*args, **options):
        raise NotImplementedError("no kernel for this device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"on cpu \(NotImpl.* no kernel .*\); use a CUDA"),
    ):
        patch.setattr(functional, "quantize_4bit", no_kernel)
        quantization_4bit("cpu", torch.float32)
    monkeypatch.setattr(functional, "dequantize_4bit", lambda quantized, state: torch.zeros(64, 64))
    with pytest.raises(ValueError, match="bitsandbytes gives wrong numbers on cpu"):
        quantization_4bit("cpu", torch.float32)


@needs_bitsandbytes
def test_4_bits_are_for_the_blocks_alone(tmp_path):
    from transformers import AutoModelForCausalLM

    from xdlm_hf.training.metrics import flops_per_token

    whole = tiny_model(d_model=64, mlp_hidden_size=128)
    whole.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization_4bit("cpu", torch.float32), device_map={"": "cpu"}
    )
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}
    assert kinds.pop("model.transformer.ff_out") == "OutputLayer"
    assert len(kinds) == 14 and set(kinds.values()) == {"Linear4bit"}
    for parameter in whole.parameters():  # frozen, as in 4 bits
        parameter.requires_grad_(parameter is whole.get_output_embeddings().weight)
    assert flops_per_token(model, 16) == flops_per_token(whole, 16)  # packed, a weight has another shape
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        gap = (model(ids).logits - whole(ids).logits).abs().max()
    assert 1e-4 < gap < 0.2 * whole(ids).logits.abs().max()
