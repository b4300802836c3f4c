"""Checkpoints are whole or absent, of this run, undamaged and finite; else what is resumed from says why not."""

import contextlib
import datetime
import json
import logging
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file
from training import (
    ADAM_EPSILON,
    SCRIPT,
    arguments,
    disk_that_takes,
    launch,
    losses,
    parameter_gap,
    rows,
    state,
    stream,
    trainer,
)

from xdlm_hf import LLaDAForDiffusionLM
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.training import checkpoints
from xdlm_hf.training.checkpointing import run_record
from xdlm_hf.training.checkpoints import RUN_RECORD, UNFINISHED, check_same_run, last_whole_checkpoint
from xdlm_hf.training.checksums import CHECKSUMS, damage, write_checksums
from xdlm_hf.training.precision import NonFiniteError
from xdlm_hf.training.row_noise import TRAIN_ROW, generator_of
from xdlm_hf.training.trainer import XDLMTrainer

SAVES = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# --------------------------------------------------------------------------------------------------------------------
# Whole or absent


@pytest.mark.parametrize(
    ("size", "step", "kept"),
    [
        (1_000, 3, "There is no earlier checkpoint"),
        (1_000, 6, "checkpoint-3 is whole: make room and resume from it"),
        (100_000, 6, "checkpoint-3 is whole: make room and resume from it"),
    ],
    ids=["first", "weights", "optimizer"],
)
def test_full_disk_keeps_the_old_checkpoint(tmp_path, size, step, kept):
    """Weights take 82 kB, the optimizer's state twice that: the limit falls into the one or the other."""

    class FullLater(XDLMTrainer):
        def _save_checkpoint(self, model, trial):
            with disk_that_takes(size) if self.state.global_step == step else contextlib.nullcontext():
                super()._save_checkpoint(model, trial)

    run = trainer(tmp_path, kind=FullLater, save_total_limit=1, **SAVES)
    message = rf"step {step}: the checkpoint could not be written to .*GiB are free \(.*\)\. {kept}"
    with pytest.raises(OSError, match=message):
        run.train()
    assert names(tmp_path) == (["checkpoint-3"] if step == 6 else [])
    if step == 6:
        whole, resumed = trainer(tmp_path / "whole", **SAVES), trainer(tmp_path, **SAVES)
        resumed.train(resume_from_checkpoint=True)
        whole.train()
        assert losses(resumed) == losses(whole)


def test_full_disk_at_the_end_keeps_the_checkpoints(tmp_path):
    """The model that a finished run writes beside its checkpoints, which can write it again."""
    run = trainer(tmp_path, **SAVES)
    run.train()
    message = (
        r"step 8: the model could not be written to .*GiB are free \(.*\)\. checkpoint-8 is whole: make room and resume"
    )
    with disk_that_takes(1_000), pytest.raises(OSError, match=message):
        run.save_model()
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    resumed = trainer(tmp_path, **SAVES)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert parameter_gap(run.model, load_file(tmp_path / "model.safetensors")) == 0


def test_a_model_is_replaced_by_a_whole_one_or_stays(tmp_path):
    run = trainer(tmp_path, **SAVES)
    run.save_model(tmp_path / "model")
    before = state(run.model)
    with torch.no_grad():
        run.model.get_output_embeddings().weight.add_(1)
    (tmp_path / "model" / UNFINISHED).mkdir()
    (tmp_path / "model" / UNFINISHED / "model.safetensors").write_bytes(b"half")  # of a killed process
    files = names(tmp_path / "model")
    with (
        disk_that_takes(1_000),
        pytest.raises(OSError, match="the model could not be .*/model'. It needs 0.0 GiB"),
    ):
        run.save_model(tmp_path / "model")
    assert names(tmp_path / "model") == [name for name in files if name != UNFINISHED]
    assert parameter_gap(LLaDAForDiffusionLM.from_pretrained(tmp_path / "model"), before) == 0
    with disk_that_takes(1_000), pytest.raises(OSError, match="could not be written to '.*/new'"):
        run.save_model(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    run.save_model(tmp_path / "model")
    assert parameter_gap(run.model, state(LLaDAForDiffusionLM.from_pretrained(tmp_path / "model"))) == 0


def test_weights_of_a_replaced_model_do_not_stay_beside_those_of_the_new_one(tmp_path, monkeypatch):
    """`from_pretrained` would take one old file before new parts; an adapter beside them is not theirs."""
    run, folder, save = trainer(tmp_path, **SAVES), tmp_path / "model", LLaDAForDiffusionLM.save_pretrained
    run.save_model(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"another's")
    with torch.no_grad():
        run.model.get_output_embeddings().weight.add_(1)

    def in_parts(*args, **options):
        save(*args, max_shard_size="10KB", **options)

    with monkeypatch.context() as patch:
        patch.setattr(LLaDAForDiffusionLM, "save_pretrained", in_parts)
        run.save_model(folder)
    weights = {path.name for path in folder.glob("*safetensors*")}
    assert "model.safetensors" not in weights and {"model.safetensors.index.json"} < weights
    (folder / "adapter_model.safetensors").unlink()
    assert parameter_gap(run.model, state(LLaDAForDiffusionLM.from_pretrained(folder))) == 0
    run.save_model(folder)
    assert [path.name for path in folder.glob("*safetensors*")] == ["model.safetensors"]


def test_checkpoints_are_rotated_replaced_and_the_best_is_found(tmp_path):
    options = {**SAVES, "save_steps": 2, "save_total_limit": 2, "eval_rows": 4, "eval_strategy": "steps"}
    options |= {"eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e-4}
    run = trainer(tmp_path, **options)
    run.train()
    evaluations = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = min(evaluations, key=evaluations.get)
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert set(names(tmp_path)) == {f"checkpoint-{best}", "checkpoint-8"} | ({"checkpoint-6"} if best == 8 else set())
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")

    # An explicit earlier checkpoint: the later one is written anew.
    again = tmp_path / "again"
    trainer(again, **SAVES).train()
    age = (again / "checkpoint-6").stat().st_ino
    trainer(again, **SAVES).train(resume_from_checkpoint=str(again / "checkpoint-3"))
    assert (again / "checkpoint-6").stat().st_ino != age
    assert names(again) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


# --------------------------------------------------------------------------------------------------------------------
# Another run than the checkpoint's


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trainer(folder / "rows", **SAVES).train()
    trainer(folder / "stream", streaming=True, **SAVES).train()
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing_ratio": 0.2}, r"checkpoint-8 has mixing_ratio=0\.1, this run 0\.2: the optimizer's state belongs to"),
        ({"noise_schedule": "cosine"}, "has noise_schedule=linear, this run cosine"),
        ({"train_rows": 21}, r"has data rows=20, this run 21: documents would be seen twice or never"),
        ({"seed": 8, "noise_seed": 7}, "has seed=7, this run 8: rows would come in another order"),
        ({"gradient_accumulation_steps": 2}, "has global_batch_size=4, this run 8: rows would be seen twice or never"),
    ],
)
def test_another_run_is_refused(finished, tmp_path, options, message):
    run = trainer(tmp_path, **{**SAVES, "max_steps": 9, **options})
    before = state(run.model)
    with pytest.raises(ValueError, match=message):
        run.train(resume_from_checkpoint=str(finished / "rows" / "checkpoint-8"))
    assert parameter_gap(run.model, before) == 0 and names(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataloader_num_workers": 2}, "has readers=1x1, this run 1x2: a stream is split over readers"),
        ({"stream": {"seed": 1}}, r"has data shuffle=\[0, 16\], this run \[1, 16\]: documents would be seen twice"),
        ({"stream": {"source": {"a.jsonl": [3, 4]}}}, r"has data source=None, this run \{'a\.jsonl': \[3, 4\]\}"),
    ],
)
def test_another_stream_is_refused(finished, tmp_path, options, message):
    data = stream(**options.pop("stream", {}))
    args = arguments(tmp_path, **{**SAVES, **options})
    run = XDLMTrainer(model=tiny_model(vocab_size=300), args=args, train_dataset=data)
    with pytest.raises(ValueError, match=message):
        run.train(resume_from_checkpoint=str(finished / "stream" / "checkpoint-8"))


def test_another_tokenizer_is_refused(tmp_path):
    def run(texts):
        return XDLMTrainer(
            model=tiny_model(vocab_size=300),
            args=arguments(tmp_path, **SAVES),
            train_dataset=rows(20),
            processing_class=train_tokenizer(texts, 300),
        )

    run(["some text here"] * 9).train()
    run(["some text here"] * 9).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"has tokenizer=\d+, this run \d+: the same ids would mean other text"):
        run(["words of another kind"] * 9).train(resume_from_checkpoint=True)


def test_what_may_differ_is_said(finished, tmp_path, caplog):
    changes = {"time_sampling": "stratified", "noise_seed": 1, "t_eps": 0.01, "learning_rate": 1e-3}
    run = trainer(tmp_path, **{**SAVES, "max_steps": 9, **changes})
    with caplog.at_level(logging.WARNING, "xdlm_hf.training.checkpoints"):
        run.train(resume_from_checkpoint=str(finished / "rows" / "checkpoint-8"))
    for part in (
        "t_eps=0.001, this run 0.01: times are drawn differently",
        "time_sampling=independent, this run stratified: times",
        "noise_seed=7, this run 1: noise is drawn",
        "learning_rate=0.003, this run 0.001: the former value stays in force",
    ):
        assert f"checkpoint-8 has {part}" in caplog.text
    assert run.state.log_history[8]["learning_rate"] == 0.003


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "adafactor"}, "has optimizer=adamw_torch.*, this run adafactor: another optimizer cannot use"),
        ({"optim": "lion_32bit"}, "this run lion_32bit: another optimizer"),
        ({"optim_args": "foo=1"}, "this run adamw_torch.*:foo=1: another optimizer"),
        ({"dtype": "float64"}, r"has weight_dtype=\['torch.float32'\], this run \['torch.float64'\]: weights and"),
        ({"lora": {"lora_alpha": 8}}, "has lora lora_alpha=4, this run 8: the adapters' weights would have another"),
        ({"lora": {"r": 4}}, "has lora r=2, this run 4"),
        ({"lora": {"target_modules": ["q_proj"]}}, r"has lora target_modules=\['q_proj', 'v_proj'\], this run"),
        ({"lora": {"use_rslora": True}}, "has lora use_rslora=False, this run True"),
    ],
)
def test_another_optimization_is_refused(finished, adapted, tmp_path, options, message):
    """Transformers' Trainer would begin another optimizer, round weights or scale adapters, and say nothing."""
    saved = adapted if "lora" in options else finished / "rows"
    model = adapters(**options.pop("lora")) if "lora" in options else tiny_model()
    model = model.to(getattr(torch, options.pop("dtype", "float32")))
    run = trainer(tmp_path, model=model, **{**SAVES, "max_steps": 9, **options})
    with pytest.raises(ValueError, match=message):
        run.train(resume_from_checkpoint=str(saved / "checkpoint-8"))
    assert names(tmp_path) == []


def adapters(**options):
    from peft import LoraConfig, get_peft_model

    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **options}
    torch.manual_seed(1)
    return get_peft_model(tiny_model(), LoraConfig(task_type=None, **options))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    trainer(folder, model=adapters(), **SAVES).train()
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler type=constant, this run cosine: the learning rate follows"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler kwargs a=None, this run 1: the learning rate"),
        ({"max_grad_norm": 0.5}, "max_grad_norm=1.0, this run 0.5: gradients are clipped differently"),
        ({"adam_beta1": 0.8}, "adam_beta1=0.9, this run 0.8: the former value stays in force"),
        ({"adam_beta2": 0.95}, "adam_beta2=0.999, this run 0.95: the former value stays in force"),
        ({"adam_epsilon": 1e-6}, "adam_epsilon=0.001, this run 1e-06: the former value stays in force"),
        ({"bf16": True}, "precision=as the weights, this run bf16: the network is computed in another"),
        ({"lora": {"lora_dropout": 0.5}}, r"lora_dropout=\[0.0\], this run \[0.5\]: adapters are trained with other"),
    ],
)
def test_other_changes_of_the_optimization_are_said(finished, adapted, tmp_path, caplog, options, message):
    saved = adapted if "lora" in options else finished / "rows"
    model = adapters(**options.pop("lora")) if "lora" in options else None
    run = trainer(tmp_path, model=model, **{**SAVES, **options})
    with caplog.at_level(logging.WARNING, "xdlm_hf.training.checkpoints"):
        check_same_run(saved / "checkpoint-8", run_record(run), reshards=True)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and re.match(f"checkpoint-8 has {message}", warnings[0])


def test_the_betas_of_the_checkpoint_stay_in_force(finished, tmp_path):
    run = trainer(tmp_path, **{**SAVES, "max_steps": 9, "adam_beta2": 0.5, "adam_epsilon": 1e-6})
    run.train(resume_from_checkpoint=str(finished / "rows" / "checkpoint-8"))
    group = run.optimizer.param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), ADAM_EPSILON)


# --------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints


def flip_a_bit(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished / "rows", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_one_flipped_bit_in_any_file_is_found_and_named(copied, place):
    checkpoint = copied / "checkpoint-8"
    files = sorted(path for path in checkpoint.iterdir() if path.name != CHECKSUMS)
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", RUN_RECORD} < set(names(checkpoint))
    for path in files:
        before = path.read_bytes()
        flip_a_bit(path, place)
        assert damage(checkpoint) == [f"{path.name} has another checksum than when it was written"]
        path.write_bytes(before)
    assert damage(checkpoint) == []


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: flip_a_bit(path / "optimizer.pt"), "optimizer.pt has another checksum than when it was written"),
        (lambda path: (path / "model.safetensors").write_bytes(b"half"), "model.safetensors has 4 bytes, .* were"),
        (lambda path: (path / "scheduler.pt").unlink(), "scheduler.pt cannot be read .No such file"),
    ],
)
def test_auto_goes_back_to_the_last_whole_checkpoint_and_says_so(copied, tmp_path, caplog, harm, message):
    whole, options = trainer(tmp_path / "whole", **SAVES), {**SAVES, "save_total_limit": 1}
    whole.train()
    harm(copied / "checkpoint-8")
    with pytest.raises(ValueError, match=rf"checkpoint-8 is damaged: {message}.*or resume from an earlier"):
        trainer(copied, **SAVES).train(resume_from_checkpoint=str(copied / "checkpoint-8"))
    run = trainer(copied, **options)
    with caplog.at_level(logging.WARNING, "xdlm_hf.training.checkpoints"):
        run.train(resume_from_checkpoint=True)
    assert re.search(rf"checkpoint-8 is damaged \({message}.*\). It is now called damaged-checkpoint-8", caplog.text)
    assert "going back to checkpoint-6" in caplog.text
    assert losses(run) == losses(whole) and parameter_gap(run.model, state(whole.model)) == 0
    assert names(copied) == ["checkpoint-8", "damaged-checkpoint-8"]
    assert damage(copied / "checkpoint-8") == []


def test_checksums_are_compared_once(copied, monkeypatch):
    """By the search for the last whole checkpoint, by whoever searched for it before, or on resuming."""
    compared = []
    monkeypatch.setattr(checkpoints, "damage", lambda folder, shared: compared.append(folder.name) or [])
    found = last_whole_checkpoint(copied)
    for given, verified in ((found, True), (found, False), (True, False)):
        trainer(copied, **SAVES).train(resume_from_checkpoint=given, verified=verified)
    assert compared == ["checkpoint-8"] * 3


def test_nothing_is_moved_or_begun_when_every_checkpoint_is_damaged(copied):
    for step in (3, 6, 8):
        flip_a_bit(copied / f"checkpoint-{step}" / "optimizer.pt")
    before = names(copied)
    with pytest.raises(ValueError, match=r"every checkpoint is damaged \(checkpoint-8: optimizer.pt .*; checkpoint"):
        trainer(copied, **SAVES).train(resume_from_checkpoint=True)
    assert names(copied) == before


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_a_state_is_refused_even_without_checksums(copied, caplog, file):
    (copied / "checkpoint-8" / CHECKSUMS).unlink()
    with caplog.at_level(logging.WARNING, "xdlm_hf.training.checkpoints"):
        trainer(copied, **SAVES).train(resume_from_checkpoint=True)
    assert "checkpoint-8 has no checksums: its files are resumed from unverified" in caplog.text
    (copied / "checkpoint-8" / file).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-8 has no {file}: resuming would start them anew"):
        trainer(copied, **SAVES).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_another_number_of_processes_is_allowed_for_rows_and_said(finished, tmp_path, caplog):
    """One process resumes what two wrote: the same rows and noise, since the global batch is the same."""
    options = {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 2, **SAVES, "max_steps": 6}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT)
    status, output = launch(*torchrun, json.dumps(options))
    assert status == 0, output[-3000:]
    run = trainer(tmp_path / "one", **SAVES)
    with caplog.at_level(logging.WARNING, "xdlm_hf.training.checkpoints"):
        run.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-6"))
    assert "world_size=2, this run 1: the same rows and the same noise" in caplog.text
    whole = json.loads((finished / "rows" / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    assert losses(run) == pytest.approx([entry["loss"] for entry in whole], abs=1e-5)


def test_another_number_of_processes_is_refused_where_parts_belong_to_them(finished, tmp_path):
    run = trainer(tmp_path, **SAVES)
    run.is_deepspeed_enabled = True
    saved = finished / "rows" / "checkpoint-6"
    shutil.copytree(saved, tmp_path / "checkpoint-6")
    record = json.loads((saved / RUN_RECORD).read_text())
    (tmp_path / "checkpoint-6" / RUN_RECORD).write_text(json.dumps({**record, "world_size": 2}))
    write_checksums(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match="was written by 2 processes, this run has 1: under DeepSpeed and FSDP"):
        run.train(resume_from_checkpoint=True)


def test_resuming_from_what_is_no_checkpoint_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"output_dir='.*' holds no complete checkpoint to resume"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=rf"is no checkpoint to resume from \({RUN_RECORD} is missing\)"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer(tmp_path / "run", save_only_model=True, **SAVES).train()
    with pytest.raises(ValueError, match=r"holds no optimizer state \(save_only_model=True\)"):
        trainer(tmp_path / "run", **SAVES).train(resume_from_checkpoint=True)


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path):
    run = trainer(tmp_path, **SAVES)
    run.train()
    torch.save({"when": datetime.datetime(2026, 1, 1)}, tmp_path / "checkpoint-8" / "optimizer.pt")
    write_checksums(tmp_path / "checkpoint-8")
    with pytest.raises(Exception, match="Weights only load failed"):
        trainer(tmp_path, **{**SAVES, "max_steps": 9}).train(resume_from_checkpoint=True)


# --------------------------------------------------------------------------------------------------------------------
# Not finite


def spoiled(step, what):
    """A trainer whose loss or gradient becomes NaN in one step."""

    class Spoiled(XDLMTrainer):
        def _weighted_loss(self, model, inputs):
            total, per_token = super()._weighted_loss(model, inputs)
            if self.state.global_step + 1 == step and self.is_in_train:
                if what == "loss":
                    per_token = per_token.clone()
                    per_token[2, 0] = math.nan
                else:
                    total.register_hook(lambda gradient: gradient * math.inf)
            return total, per_token

    return Spoiled


@pytest.mark.parametrize(
    ("what", "message"),
    [
        # Global batches of 4: step 5 has the sample indices 16 to 19, and its third row is 18.
        ("loss", r"^step 5: the loss is not finite; its rows have the sample indices 18 \(t = 0\.\d+\)\. "),
        ("gradient", r"^step 5: the gradient's norm is (nan|inf); this process' rows had the sample indices 16 \(t = "),
    ],
)
def test_what_is_not_finite_stops_the_run(tmp_path, what, message):
    run = trainer(tmp_path, kind=spoiled(5, what), **SAVES)
    with pytest.raises(NonFiniteError, match=message) as error:
        run.train()
    assert "No checkpoint was written from it; the last whole one is checkpoint-3" in str(error.value)
    assert names(tmp_path) == ["checkpoint-3"]
    weights = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    resumed, whole = trainer(tmp_path, **SAVES), trainer(tmp_path / "whole", **SAVES)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert losses(resumed) == losses(whole)


def test_named_times_are_those_of_the_rows(tmp_path):
    """The time in the message reproduces the corruption: it is the one drawn for that sample index."""
    run = trainer(tmp_path, kind=spoiled(1, "loss"), max_steps=1)
    with pytest.raises(NonFiniteError, match="sample indices 2 ") as error:
        run.train()
    generator = generator_of(run.args.noise_seed, TRAIN_ROW, 2)
    t = torch.rand((), generator=generator, dtype=torch.float64).item()
    assert f"(t = {(1 - 1e-3) * t + 1e-3:.6g})" in str(error.value)
