"""The average of the weights: against the released code's, in checkpoints, in evaluation and in the final model."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from training import SCRIPT, RecordingTrainer, arguments, launch, parameter_gap, state, trainer

from xdlm_hf import LLaDAForDiffusionLM
from xdlm_hf.training.averages import EMA_FILE, apply_saved_average
from xdlm_hf.training.checkpoints import RUN_RECORD
from xdlm_hf.training.checksums import CHECKSUMS, write_checksums
from xdlm_hf.training.ema import ExponentialMovingAverage, check_ema
from xdlm_hf.training.planning import LAYOUTS, Run, count_parameters, memory
from xdlm_hf.training.storage import planned_disk

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny-dit" / "expected.safetensors"
SAVES = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}


class Numbers(nn.Module):
    """Four weights that are moved by hand, and one that is not trained."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def move(self):
        with torch.no_grad():
            self.weight += 1


def started(model, decay=0.9999):
    ema = ExponentialMovingAverage(decay)
    ema.start(model)
    return ema


def average_of(ema, model):
    with ema.applied(model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def saved(folder):
    with safe_open(Path(folder) / EMA_FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


# --------------------------------------------------------------------------------------------------------------------
# The average


def test_average_is_the_released_one():
    model, rows = Numbers(), []
    ema = started(model)
    for _ in range(5):
        model.move()
        ema.update(model)
        rows.append(average_of(ema, model)["weight"])
    recorded = load_file(FIXTURE)["ema.shadow"]
    # Equal here; a processor with fused multiply-add may differ in the last bit of a step, 2^-23 of 10 at most.
    assert (torch.stack(rows) - recorded).abs().max() <= 5 * 10 * 2**-23


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_decay_is_capped_and_then_constant(decay):
    model, ema = Numbers(), started(Numbers(), decay)
    expected = model.weight.detach().double()
    for n in range(1, 101):
        model.move()
        ema.update(model)
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * model.weight.detach().double()
    assert torch.allclose(average_of(ema, model)["weight"].double(), expected, rtol=1e-5)
    if decay == 0:
        assert torch.equal(average_of(ema, model)["weight"], model.weight.detach())


def test_weights_come_back_bit_for_bit_also_after_an_error():
    model = Numbers()
    ema = started(model)
    model.move()
    ema.update(model)
    before, address = model.weight.detach().clone(), model.weight.data_ptr()
    with pytest.raises(RuntimeError, match="in the block"), ema.applied(model):
        assert not torch.equal(model.weight, before) and torch.equal(model.frozen, torch.ones(2))
        raise RuntimeError("in the block")
    assert torch.equal(model.weight, before) and model.weight.data_ptr() == address


def test_16_bit_weights_have_a_float32_average(tmp_path):
    model = Numbers(torch.bfloat16)
    ema = started(model, 0.999)
    for _ in range(50):
        model.move()
        ema.update(model)
    ema.save(tmp_path)
    average = saved(tmp_path)[0]["weight"]
    assert average.dtype == torch.float32 and not torch.equal(average, average.bfloat16().float())
    assert torch.equal(average_of(ema, model)["weight"], average.bfloat16())


def test_skipped_steps_do_not_count():
    model = Numbers()
    ema = started(model)
    for skipped in (False, True, False):
        ema.on_step_end(None, None, None, model=model, optimizer=SimpleNamespace(step_was_skipped=skipped))
    assert ema.updates == 2


def test_a_compiled_model_has_the_same_names(tmp_path):
    model = Numbers()
    ema = started(torch.compile(model))
    ema.update(torch.compile(model))
    ema.save(tmp_path)
    ema.load(tmp_path, model)
    assert set(average_of(ema, model)) == {"weight", "frozen"} and ema.updates == 1


def test_frozen_weights_are_not_kept(tmp_path):
    started(Numbers()).save(tmp_path)
    assert set(saved(tmp_path)[0]) == {"weight"}


# --------------------------------------------------------------------------------------------------------------------
# Runs


def test_training_is_the_same_with_and_without(tmp_path):
    runs = [trainer(tmp_path / str(decay), max_steps=4, ema_decay=decay) for decay in (None, 0.9)]
    for run in runs:
        run.train()
    assert parameter_gap(runs[0].model, state(runs[1].model)) == 0
    assert runs[1].ema.updates == 4


def test_one_update_a_step_whatever_the_accumulation(tmp_path):
    run = trainer(tmp_path, max_steps=3, ema_decay=0.9, gradient_accumulation_steps=2)
    run.train()
    assert run.ema.updates == 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with an average, its checkpoints and its final model."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, kind=RecordingTrainer, ema_decay=0.9, eval_rows=6, **SAVES)
    run.train()
    run.save_model()
    return run, folder


def test_checkpoints_hold_weights_and_average(whole):
    run, folder = whole
    checkpoint = folder / "checkpoint-8"
    weights, (average, settings) = load_file(checkpoint / "model.safetensors"), saved(checkpoint)
    assert settings == {"ema_decay": "0.9", "updates": "8"}
    assert all(torch.equal(weights[name], p) for name, p in state(run.model).items())
    assert any(not torch.equal(average[name], weights[name]) for name in average)
    assert EMA_FILE in json.loads((checkpoint / CHECKSUMS).read_text())
    assert json.loads((checkpoint / RUN_RECORD).read_text())["ema_decay"] == 0.9
    assert "ema_decay" not in json.loads((checkpoint / "config.json").read_text())  # its model is not the average


def test_final_model_is_the_average_and_says_so(whole):
    run, folder = whole
    average = saved(folder / "checkpoint-8")[0]
    final = LLaDAForDiffusionLM.from_pretrained(folder)
    assert parameter_gap(final, average) == 0 and final.config.ema_decay == 0.9
    assert not hasattr(run.model.config, "ema_decay") and parameter_gap(run.model, average) > 0


def test_a_run_from_an_averaged_model_does_not_claim_to_be_one(whole, tmp_path):
    run = trainer(tmp_path, model=LLaDAForDiffusionLM.from_pretrained(whole[1]), max_steps=1)
    run.train()
    run.save_model()
    assert "ema_decay" not in json.loads((tmp_path / "config.json").read_text())


def test_evaluation_is_of_the_average(whole, tmp_path):
    run, folder = whole
    final = trainer(tmp_path, model=LLaDAForDiffusionLM.from_pretrained(folder), eval_rows=6)
    before = state(run.model)
    found = run.evaluate()["eval_loss"]
    assert found == final.evaluate()["eval_loss"] and parameter_gap(run.model, before) == 0
    plain = trainer(tmp_path, model=run.model, eval_rows=6)
    assert plain.evaluate()["eval_loss"] != found


def test_a_checkpoints_average_can_be_put_in_place(whole):
    checkpoint = whole[1] / "checkpoint-3"
    model = LLaDAForDiffusionLM.from_pretrained(checkpoint)
    assert apply_saved_average(model, checkpoint)
    assert parameter_gap(model, saved(checkpoint)[0]) == 0
    assert not apply_saved_average(model, whole[1])  # the final model has it in its weights


def test_killed_run_goes_on_bit_for_bit(whole, tmp_path):
    options = {"ema_decay": 0.9, "eval_rows": 6, **SAVES}
    status, output = launch(SCRIPT, json.dumps({"output_dir": str(tmp_path), "kill_in_step": 5, **options}))
    assert status == -signal.SIGKILL, output[-3000:]
    resumed = trainer(tmp_path, kind=RecordingTrainer, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.ema.updates == 8
    averages = [saved(folder / "checkpoint-8")[0] for folder in (whole[1], tmp_path)]
    assert averages[0].keys() == averages[1].keys()
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])
    assert parameter_gap(resumed.model, state(whole[0].model)) == 0


@pytest.mark.slow
def test_two_processes_keep_one_average_and_resume_it(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT)
    options = {**SAVES, "ema_decay": 0.9, "eval_rows": 6, "per_device_train_batch_size": 2}

    def run(name, **more):
        return launch(*torchrun, json.dumps({"output_dir": str(tmp_path / name), **options, **more}))

    assert run("whole")[0] == 0
    assert run("killed", kill_in_step=5)[0] != 0
    status, output = run("killed", resume=True)
    assert status == 0, output[-3000:]
    whole, resumed = (saved(tmp_path / name / "checkpoint-8")[0] for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["metrics"]["eval_loss"] == results[1]["metrics"]["eval_loss"]
    # One process with the same global batch: other sums, the same average within their rounding.
    alone = trainer(tmp_path / "alone", **{**options, "per_device_train_batch_size": 4})
    alone.train()
    ends = saved(tmp_path / "alone" / "checkpoint-8")[0]
    assert max((ends[name] - whole[name]).abs().max().item() for name in whole) < 1e-5


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def copied(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    return tmp_path / "run"


def resume(folder, **options):
    run = trainer(folder, eval_rows=6, **{"ema_decay": 0.9, **SAVES, **options})
    run.train(resume_from_checkpoint=str(folder / "checkpoint-3"))


@pytest.mark.parametrize("decay", [None, 0.99])
def test_another_decay_is_refused(copied, decay):
    with pytest.raises(ValueError, match=rf"checkpoint-3 has ema_decay=0.9, this run {decay}: the average"):
        resume(copied, ema_decay=decay)


def test_a_checkpoint_without_an_average_is_refused(copied):
    (copied / "checkpoint-3" / EMA_FILE).unlink()
    with pytest.raises(ValueError, match="checkpoint-3 is damaged: ema.safetensors cannot be read"):
        resume(copied)
    write_checksums(copied / "checkpoint-3")
    with pytest.raises(ValueError, match="checkpoint-3 has no ema.safetensors, the average of its weights; restore"):
        resume(copied)


def test_a_run_that_kept_no_average_cannot_start_one(copied):
    record = json.loads((copied / "checkpoint-3" / RUN_RECORD).read_text())
    del record["ema_decay"]  # of a version that had none
    (copied / "checkpoint-3" / RUN_RECORD).write_text(json.dumps(record))
    write_checksums(copied / "checkpoint-3")
    with pytest.raises(ValueError, match=r"ema_decay=None, this run 0\.9"):
        resume(copied)


def test_the_average_of_another_model_is_refused(copied, tmp_path):
    average, settings = saved(copied / "checkpoint-3")
    first = sorted(average)[0]
    save_file({**average, first: average[first][:1].clone()}, copied / "checkpoint-3" / EMA_FILE, settings)
    write_checksums(copied / "checkpoint-3")
    with pytest.raises(ValueError, match="is the average of another model: .* has shape"):
        resume(copied)
    with pytest.raises(ValueError, match="is the average of another model"):
        apply_saved_average(tiny_model(), copied / "checkpoint-3")


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(tmp_path, decay):
    with pytest.raises(ValueError, match=r"ema_decay=.* must lie in \[0, 1\)"):
        arguments(tmp_path, ema_decay=decay)
    with pytest.raises(ValueError, match=r"ema_decay=.* must lie in \[0, 1\)"):
        ExponentialMovingAverage(decay)


def test_the_best_model_is_not_loaded_over_an_average(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, **SAVES}
    with pytest.raises(ValueError, match="load_best_model_at_end=True loads weights, and ema_decay=0.9"):
        arguments(tmp_path, ema_decay=0.9, **options)


def test_adapters_and_spread_weights_are_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path, ema_decay=0.9)
    with pytest.raises(ValueError, match="ema_decay=0.9 averages a whole model, not adapters"):
        check_ema(SimpleNamespace(peft_config={}), args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="but ZeRO-3 and FSDP shard them; use zero2.yaml"):
        check_ema(tiny_model(), args)
    check_ema(tiny_model(), arguments(tmp_path))


def test_a_plan_counts_the_average(whole):
    model = whole[0].model
    average = saved(whole[1] / "checkpoint-8")[0]
    plain = Run(model.config, count_parameters(model), rows=4, length=12)
    kept, layout = replace(plain, average=True), LAYOUTS["ddp"]
    disks = [planned_disk(run, layout, 3, 2) for run in (plain, kept)]
    assert disks[1].checkpoint - disks[0].checkpoint == sum(tensor.nbytes for tensor in average.values()) > 0
    assert disks[1].final == disks[0].final
    held = [memory(run, layout).buffers for run in (plain, kept)]
    assert held[1] - held[0] == 2 * sum(tensor.nbytes for tensor in average.values())  # and the weights set aside
