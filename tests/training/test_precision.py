"""Which dtypes may be trained, and that weights which are not finite never reach a checkpoint or a final model."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from training import SCRIPT, arguments, launch, partitioned, trainer

from xdlm_hf import LLaDAForDiffusionLM
from xdlm_hf.training.adapters import add_adapters
from xdlm_hf.training.precision import NonFiniteError, check_trained_dtype, keeps_float32_copies, non_finite_weights
from xdlm_hf.training.trainer import XDLMTrainer

SAVES = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}


def engine(stage, **sections):
    return SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}, **sections})


# --------------------------------------------------------------------------------------------------------------------
# Which dtypes may be trained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_without_float32_copies_are_refused(tmp_path, dtype):
    model = tiny_model().to(dtype)
    message = rf"^model.transformer.wte.weight: the trained weights are {str(dtype)[6:]} and nothing keeps"
    with pytest.raises(ValueError, match=message + r".*Load them with dtype float32 .* or train adapters \(lora_rank"):
        trainer(tmp_path / "run", model=model, bf16=True)
    assert model.config.mixing_ratio == 0.0 and not (tmp_path / "run").exists()


def test_bfloat16_would_lose_updates_that_float32_keeps(tmp_path, monkeypatch):
    """Why: at a rate of 1e-5 three steps change nearly every float32 weight, and few of the bfloat16 ones."""
    monkeypatch.setattr("xdlm_hf.training.trainer.check_trained_weights", lambda *_: None)
    changed = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        before = [p.detach().clone() for p in model.parameters()]
        trainer(tmp_path / str(dtype), model=model, max_steps=3, learning_rate=1e-5).train()
        moved = [(p != old).float().flatten() for p, old in zip(model.parameters(), before, strict=True)]
        changed[dtype] = torch.cat(moved).mean().item()
    assert changed[torch.float32] > 0.9 and changed[torch.bfloat16] < 0.3


def test_frozen_weights_may_be_bfloat16_and_adapters_are_float32(tmp_path):
    run = trainer(tmp_path, model=add_adapters(tiny_model().bfloat16(), 2, 8), max_steps=2, bf16=True)
    run.train()
    dtypes = {p.requires_grad: p.dtype for p in run.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    lora = LoraConfig(r=2, target_modules=LLaDAForDiffusionLM.lora_targets)
    narrow = get_peft_model(tiny_model().bfloat16(), lora, autocast_adapter_dtype=False)
    with pytest.raises(ValueError, match=r"lora_A.default.weight: the trained weights are bfloat16"):
        trainer(tmp_path / "narrow", model=narrow)


def test_deepspeed_keeps_float32_copies_unless_told_otherwise():
    assert all(keeps_float32_copies(engine(stage, bf16={"enabled": "auto"})) for stage in (1, 2, 3))
    for plugin in (None, engine(0), engine(2, bf16={"enabled": True, "bf16_master_weights_and_grads": True})):
        assert not keeps_float32_copies(plugin)
        check_trained_dtype(torch.float32, plugin)
        with pytest.raises(ValueError, match="the trained weights are bfloat16 and nothing keeps float32 copies"):
            check_trained_dtype(torch.bfloat16, plugin)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "adam_beta1", "adam_epsilon", "warmup_steps"])
def test_options_that_are_no_finite_numbers_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be a finite number"):
        arguments(tmp_path, **{name: value})


# --------------------------------------------------------------------------------------------------------------------
# Finite weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_bad_weight_is_found_by_name(dtype, value):
    model = tiny_model().to(dtype)
    assert non_finite_weights(model) == []
    with torch.no_grad():
        model.model.transformer.ln_f.weight[-1] = value
    assert non_finite_weights(model) == ["model.transformer.ln_f.weight"]
    model.model.transformer.ln_f.weight.requires_grad_(False)
    assert non_finite_weights(model) == []
    assert non_finite_weights(model, trained_only=False) == ["model.transformer.ln_f.weight"]


def test_what_another_process_found_is_named_here_too():
    model = tiny_model()

    def all_sum(flags):  # as if the other had found its part of the third parameter
        flags[2] += 1
        return flags

    assert non_finite_weights(model, all_sum) == [list(dict(model.named_parameters()))[2]]


def test_the_part_that_zero_3_leaves_in_a_process_is_read():
    model = tiny_model()
    first, second = list(model.parameters())[:2]
    first.ds_tensor, first.data = torch.tensor([1.0, math.nan]), torch.empty(0)
    second.ds_tensor, second.data = torch.tensor([]), torch.empty(0)  # a share may be empty
    assert non_finite_weights(model) == ["model.transformer.wte.weight"]


def overflowing(step):
    """A trainer whose optimizer makes one weight infinite in a step, all gradients being finite."""

    class Overflowing(XDLMTrainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)

            def overflow(*_):
                if self.state.global_step + 1 == step:
                    with torch.no_grad():
                        next(self.model.parameters())[0, 0] = math.inf  # of a token that no text holds

            optimizer.register_step_post_hook(overflow)
            return optimizer

    return Overflowing


@pytest.mark.parametrize(("step", "kept"), [(6, ["checkpoint-3"]), (3, [])])
def test_weights_that_are_not_finite_reach_no_checkpoint(tmp_path, step, kept):
    run = trainer(tmp_path, kind=overflowing(step), **SAVES)
    message = rf"step {step}: the weights are not finite \(.*wte.weight\), so nothing was saved\. The last whole"
    with pytest.raises(NonFiniteError, match=f"{message} checkpoint is {kept[0] if kept else 'none'}; lower learning"):
        run.train()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == kept
    for folder in kept:
        assert all(w.isfinite().all() for w in load_file(tmp_path / folder / "model.safetensors").values())


def test_weights_that_are_not_finite_reach_no_final_model(tmp_path):
    run = trainer(tmp_path, kind=overflowing(2), max_steps=2)
    run.train()
    with pytest.raises(NonFiniteError, match=r"step 2: the weights are not finite"):
        run.save_model()
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "config.json").exists()


def test_a_loss_names_weights_that_were_not_finite_before(tmp_path):
    class Worse(overflowing(2)):
        def _weighted_loss(self, *args):
            total, per_token = super()._weighted_loss(*args)
            return total, per_token * (math.nan if self.state.global_step == 2 else 1)

    message = r"step 3: the loss is not finite; .*\. Nor are the weights, since an earlier step \(.*wte.weight\)\. No"
    with pytest.raises(NonFiniteError, match=message):
        trainer(tmp_path, kind=Worse, max_steps=4).train()


@pytest.mark.slow
def test_both_processes_refuse_what_one_of_them_holds(tmp_path):
    """Under ZeRO-3 the other process does not have the part that is not finite."""
    launcher = ("-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file")
    launcher += (str(partitioned(tmp_path, "zero3")), "--num_processes", "2")
    options = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2, "nan_in_save": 6, **SAVES}
    status, output = launch(*launcher, SCRIPT, json.dumps(options), timeout=600)
    assert status != 0
    (message,) = set(re.findall(r"training\.py: error: (.*)", output))
    assert message.startswith("step 6: the weights are not finite (model.transformer.wte.weight), so nothing was saved")
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["checkpoint-3"]
