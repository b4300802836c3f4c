"""The trainer: one trajectory however the global batch is split, noise by row, NELBO, resume, refusals."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from training import (
    CONFIGS,
    LENGTH,
    MASK,
    SCRIPT,
    VOCAB,
    arguments,
    launch,
    losses,
    one_batch,
    parameter_gap,
    rows,
    state,
    stream,
    trainer,
)
from transformers.trainer_utils import EvalPrediction

from xdlm_hf.data.collator import DiffusionCollator
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.diffusion.losses import diffusion_loss
from xdlm_hf.diffusion.schedules import LinearSchedule
from xdlm_hf.training.checkpoints import refuse_other_run
from xdlm_hf.training.nelbo import evaluation_noise, nelbo_metrics
from xdlm_hf.training.optimizers import check_offload
from xdlm_hf.training.trainer import XDLMTrainer

# 18 rows in global batches of 4: the last step of an epoch holds 2 rows, and is reached within 8 steps.
SPLIT_OPTIONS = {"train_rows": 18, "eval_rows": 9, "time_sampling": "stratified"}


# --------------------------------------------------------------------------------------------------------------------
# One trajectory


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("whole"), per_device_train_batch_size=4, **SPLIT_OPTIONS)
    run.train()
    return run, run.evaluate()


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "global_batch_size": 4},
        {"per_device_train_batch_size": 4, "fused_loss": False},
        {"per_device_train_batch_size": 4, "loss_chunk_size": 5, "activation_checkpointing": True},
    ],
    ids=["1x4", "2x2", "dense", "chunks+checkpointing"],
)
def test_trajectory_does_not_depend_on_the_split(whole_batch, options, tmp_path):
    reference, metrics = whole_batch
    run = trainer(tmp_path, per_device_eval_batch_size=2, **SPLIT_OPTIONS, **options)
    run.train()
    assert losses(run) == pytest.approx(losses(reference), abs=1e-5)
    assert parameter_gap(run.model, state(reference.model)) < 1e-5
    assert run.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)


def test_trajectory_does_not_depend_on_the_number_of_processes(whole_batch, tmp_path):
    reference, metrics = whole_batch
    options = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        **SPLIT_OPTIONS,
    }
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    status, output = launch(*torchrun, SCRIPT, json.dumps(options))
    assert status == 0, output[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 2
    assert result["losses"] == pytest.approx(losses(reference), abs=1e-5)
    assert parameter_gap(reference.model, load_file(tmp_path / "end.st")) < 1e-5
    for name in ("eval_loss", "eval_loss_standard_error", "eval_tokens"):
        assert result["metrics"][name] == pytest.approx(metrics[name], abs=1e-5)


@pytest.mark.slow
def test_trajectory_of_four_processes(whole_batch, tmp_path):
    reference, metrics = whole_batch
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4")
    status, output = launch(*torchrun, SCRIPT, json.dumps({**options, **SPLIT_OPTIONS}))
    assert status == 0, output[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 4
    assert result["losses"] == pytest.approx(losses(reference), abs=1e-5)
    assert parameter_gap(reference.model, load_file(tmp_path / "end.st")) < 1e-5
    assert result["metrics"]["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_two_processes_under_zero_2(tmp_path):
    """The process that meets it says where; no NaN reaches the other, and the last checkpoint is whole."""
    zero2 = ("-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file")
    zero2 += (str(CONFIGS / "zero2.yaml"), "--num_processes", "2")
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_grad_norm": 1.0}
    options |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    status, output = launch(*zero2, SCRIPT, json.dumps({**options, "nan_in_step": 5}))
    assert status != 0
    (message,) = set(re.findall(r"training\.py: error: (.*)", output))
    pattern = r"step 5: the loss is not finite; its rows have the sample indices (\d+) \(t = (0\.\d+)\), (\d+) \(t = .*"
    first, t, second = re.fullmatch(pattern, message).groups()
    assert (int(first), int(second)) == (18, 19) and 0 < float(t) < 1  # rows 2 and 3 of the fifth batch of four
    assert message.endswith("No checkpoint was written from it; the last whole one is checkpoint-4.")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-2", "checkpoint-4"]
    status, output = launch(*zero2, SCRIPT, json.dumps({**options, "resume": True}))
    assert status == 0, output[-3000:]
    whole = trainer(**{**options, "output_dir": tmp_path / "whole", "per_device_train_batch_size": 4})
    whole.train()
    assert json.loads((tmp_path / "result.json").read_text())["losses"] == pytest.approx(losses(whole), abs=1e-5)


def test_split_test_would_notice_a_mean_of_means(whole_batch):
    """The rows are uneven enough: a mean of row means instead of one over tokens moves the first loss by 1e-2."""
    run, _ = whole_batch
    run.state.global_step = 0
    batch, tokens = one_batch(run)
    _, outputs = run.compute_loss(run.model, batch, return_outputs=True, num_items_in_batch=tokens)
    weights, per_token = batch["token_weights"], outputs["token_losses"]
    over_tokens = (weights * per_token).sum() / weights.sum()
    over_rows = ((weights * per_token).sum(1) / weights.sum(1)).mean()
    assert abs(over_tokens - over_rows) > 1e-2


def test_first_loss_is_the_objective_over_the_global_batch(tmp_path):
    run = trainer(tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    model = tiny_model()
    # The same rows, in the sampler's order, as one batch through the plain formula.
    run.accelerator.gradient_state._set_sync_gradients(True)
    batches, tokens = run.get_batch_samples(iter(run.get_train_dataloader()), 4, "cpu")
    nats, count = 0.0, 0.0
    for batch in batches:
        alpha_t, d_alpha_t = LinearSchedule()(batch["t"])
        z_t = batch["z_t"]
        with torch.no_grad():
            logits = model(z_t, attention_mask=batch.get("attention_mask")).logits
            per_token = diffusion_loss(logits, batch["input_ids"], z_t, alpha_t, d_alpha_t, model.noise_kernel(0.1))
        nats += (batch["token_weights"] * per_token).sum().item()
        count += batch["token_weights"].sum().item()
    assert count == tokens
    run.train()
    assert losses(run) == [pytest.approx(nats / count, rel=1e-5)]


def test_committed_trajectory(tmp_path):
    """Guards against silent changes of noise, objective or optimiser; tests/invariant/README.md says when to renew."""
    path = Path(__file__).parents[1] / "invariant" / "tiny_trajectory.json"
    recorded = json.loads(path.read_text())
    for name, trajectory in recorded.items():
        run = trainer(tmp_path / name, train_rows=18, **trajectory["options"])
        run.train()
        gaps = np.abs(np.array(losses(run)) - trajectory["losses"])
        assert gaps.max() < 1e-3 and gaps.mean() < 2e-4, f"{name}: {gaps}"


# --------------------------------------------------------------------------------------------------------------------
# NELBO


def test_nelbo_of_a_uniform_model_is_log_of_the_vocabulary(tmp_path):
    """k = 0 and equal logits: every masked token costs log(N - 1), and the weight 1/t undoes P(masked) = t."""
    model = tiny_model()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    run = trainer(tmp_path, eval_rows=200, model=model, mixing_ratio=0.0, nelbo_samples=8)
    metrics = run.evaluate()
    error = metrics["eval_loss_standard_error"]
    assert 0 < error < 0.1
    # Off by more than 5 standard errors with probability below 1e-6.
    assert abs(metrics["eval_loss"] - math.log(VOCAB - 1)) < 5 * error
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert metrics["eval_perplexity_standard_error"] == pytest.approx(metrics["eval_perplexity"] * error)
    assert metrics["eval_tokens"] == sum(len(r["input_ids"]) - sum(r["prompt_mask"]) for r in run.eval_dataset)


def test_nelbo_is_deterministic_and_logged(tmp_path):
    run = trainer(tmp_path, eval_rows=9)
    first = run.evaluate()
    torch.manual_seed(123)
    second = run.evaluate()
    assert first["eval_loss"] == second["eval_loss"]
    assert run.state.log_history[-1]["eval_loss"] == first["eval_loss"]
    assert {"eval_loss_standard_error", "eval_perplexity", "eval_runtime"} <= run.state.log_history[-1].keys()


def test_nelbo_times_cover_the_unit_interval_evenly(tmp_path):
    run = trainer(tmp_path, nelbo_samples=4)
    batch = run.data_collator([{"input_ids": [7]}] * 16)
    x_0, noise_mask = batch["input_ids"], batch["noise_mask"]
    t = torch.cat([evaluation_noise(run.process, 7, x_0, noise_mask, range(16), j, 4)[1] for j in range(4)])
    assert 0 < t.min() and t.max() <= 1
    assert (t * 64).ceil().sort().values.tolist() == list(range(1, 65))  # one in each of (0, 1/64], (1/64, 2/64], ...


def test_metrics_by_hand():
    # NELBO (6 + 12) / (3 + 3) = 3; residuals 6 - 9 = -3 and 12 - 9 = 3; error sqrt((9 + 9) * 2/1) / 6 = 1.
    metrics = nelbo_metrics(EvalPrediction(predictions=np.array([6.0, 12.0]), label_ids=np.array([3.0, 3.0])))
    assert metrics["loss"] == 3 and metrics["loss_standard_error"] == 1 and metrics["tokens"] == 6
    single = nelbo_metrics(EvalPrediction(predictions=np.array([6.0]), label_ids=np.array([3.0])))
    assert single == {"loss": 2.0, "perplexity": pytest.approx(math.e**2), "tokens": 3.0}


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_output_dir_with_another_run_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"holds another run \(checkpoint-2\): resume it .* or choose another folder"):
        trainer(tmp_path, max_steps=3).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    again = trainer(tmp_path, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds another run \(config\.json\)"):
        refuse_other_run(tmp_path / "model")
    refuse_other_run(tmp_path / "missing")


def test_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint to resume"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


# --------------------------------------------------------------------------------------------------------------------
# Streams, adapters, precision


def test_stream_must_fit_the_process_and_repeat(tmp_path):
    for options, message in (
        ({"rank": 1, "world_size": 2}, "built for rank 1 of 2, but this is rank 0 of 1"),
        ({"repeat": False}, "repeat=False ends on some ranks before others"),
    ):
        with pytest.raises(ValueError, match=message):
            XDLMTrainer(model=tiny_model(), args=arguments(tmp_path), train_dataset=stream(**options))
    run = XDLMTrainer(model=tiny_model(vocab_size=300), args=arguments(tmp_path), eval_dataset=stream())
    with pytest.raises(ValueError, match="the NELBO needs a dataset with a length"):
        run.evaluate()


def test_lora_trains_the_adapter_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny_model()
    frozen = state(base)
    targets = r".*blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type=None))
    run = trainer(tmp_path, model=model, max_steps=3, per_device_train_batch_size=2)
    assert run._fused
    run.train()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            original = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, frozen[original]), name
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert base.config.mixing_ratio == 0.1


def test_bfloat16_stays_close_to_float32(tmp_path):
    full, half = (trainer(tmp_path / str(bf16), max_steps=4, bf16=bf16, eval_rows=9) for bf16 in (False, True))
    for run in (full, half):
        run.train()
    assert losses(half) != losses(full)
    assert losses(half) == pytest.approx(losses(full), rel=0.03)
    assert half.evaluate()["eval_loss"] == pytest.approx(full.evaluate()["eval_loss"], rel=0.03)


@pytest.mark.parametrize("mixing_ratio", [0.0, 1.0])
def test_training_lowers_the_nelbo(tmp_path, mixing_ratio):
    """Rows that repeat one pattern: learnable in a few steps at both ends of k."""
    data = [{"input_ids": [10, 20, 30, 40] * 3}] * 16
    mask = MASK if mixing_ratio < 1 else None
    run = XDLMTrainer(
        model=tiny_model(mask_token_id=mask),
        args=arguments(tmp_path, mixing_ratio=mixing_ratio, max_steps=40, learning_rate=1e-2),
        train_dataset=data,
        eval_dataset=data,
    )
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.5 * before
    assert run.train_dataset is data and run.data_collator.mask_token_id == mask


# --------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing_ratio": 1.5}, r"mixing_ratio=1\.5 must lie in \[0, 1\]"),
        ({"mixing_ratio": -0.1}, r"mixing_ratio=-0\.1 must lie in \[0, 1\]"),
        ({"mixing_ratio": math.nan}, r"mixing_ratio=nan must lie in \[0, 1\]"),
        ({"noise_schedule": "quadratic"}, "noise_schedule='quadratic' is not known; choose one of"),
        ({"t_eps": 1.0}, r"t_eps=1\.0 must lie in \[0, 1\)"),
        ({"t_eps": -1e-3}, r"t_eps=-0\.001 must lie in \[0, 1\)"),
        ({"time_sampling": "sobol"}, "time_sampling='sobol' is not known"),
        ({"random_length_probability": 1.5}, r"random_length_probability=1\.5 must lie in \[0, 1\]"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"nelbo_samples": 0}, "nelbo_samples=0 must be at least 1"),
        ({"loss_chunk_size": 0}, "loss_chunk_size=0 must be at least 1"),
        ({"noise_seed": -1}, "noise_seed=-1 must not be negative"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True would drop"),
        ({"average_tokens_across_devices": False}, "would weight tokens by their process"),
        ({"global_batch_size": 6}, "global_batch_size=6 is not a multiple of 4 .*4 on 1 processes"),
        ({"global_batch_size": 2}, "global_batch_size=2 is not a multiple of 4"),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 3}, "=3 disagrees with global_batch_size=8 .*make 2"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_arguments_survive_a_round_trip(tmp_path):
    args = arguments(tmp_path, global_batch_size=8, time_sampling="antithetic")
    assert args.gradient_accumulation_steps == 2 and args.time_sampling == "stratified"
    assert type(args)(**{**args.to_dict(), "accelerator_config": None}).gradient_accumulation_steps == 2


def offloading(args, **more):
    """The arguments as under DeepSpeed with its optimizer in main memory."""
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, **more}
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)
    return args


@pytest.mark.parametrize("name", ["sgd", "adamw_8bit", "adafactor", "lion_32bit", "rmsprop"])
def test_an_offloaded_optimizer_that_would_become_another_is_refused(tmp_path, name):
    message = f"optim='{name}' with offload_optimizer to cpu: .* CPU Adam in its place. Use optim='adamw_torch'"
    args = arguments(tmp_path, optim=name)
    with pytest.raises(ValueError, match=message):
        XDLMTrainer(model=tiny_model(), args=offloading(args))
    check_offload(offloading(args, zero_force_ds_cpu_optimizer=False))
    check_offload(offloading(args, optimizer={"type": "Lion"}))
    check_offload(offloading(arguments(tmp_path, optim="adamw_torch_fused")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True is only supported for streams"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance.* is not supported"),
    ],
)
def test_data_layouts_that_would_move_rows_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_model_and_tokenizer_are_checked_before_anything_changes(tmp_path):
    model = tiny_model(mask_token_id=None)
    with pytest.raises(ValueError, match="mixing_ratio=0.1 puts weight 0.9 on a mask token"):
        trainer(tmp_path / "run", model=model)
    assert model.config.mixing_ratio == 0.0 and not (tmp_path / "run").exists()

    tokenizer = train_tokenizer(["text"], 262)
    with pytest.raises(ValueError, match="the tokenizer has 262 tokens but the model's output layer 48 rows"):
        XDLMTrainer(model=tiny_model(), args=arguments(tmp_path / "run"), processing_class=tokenizer)
    model = tiny_model(vocab_size=300, mask_token_id=7)
    with pytest.raises(ValueError, match="has id 5, the model's mask_token_id is 7"):
        XDLMTrainer(model=model, args=arguments(tmp_path / "run"), processing_class=tokenizer)
    assert not (tmp_path / "run").exists()


def test_fused_loss_needs_a_plain_head(tmp_path):
    model = tiny_model()
    model.set_output_embeddings(torch.nn.Linear(32, VOCAB, bias=True))
    assert not trainer(tmp_path, model=model)._fused
    with pytest.raises(ValueError, match="fused_loss=True needs an output layer that is a plain OutputLayer"):
        trainer(tmp_path, model=model, fused_loss=True)


def test_a_resized_model_keeps_the_fused_loss(tmp_path):
    """Transformers makes a new nn.Linear for more tokens, which could not take the fused loss."""
    model = tiny_model()
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    run = trainer(tmp_path, model=model, max_steps=2)
    assert run._fused and run.process.vocab_size == VOCAB + 8
    run.train()
    tied = tiny_model(weight_tying=True)
    tied.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_a_reduction_takes_the_place_of_the_logits():
    model, ids = tiny_model(), torch.arange(6, 18).view(2, 6)
    with torch.no_grad():
        outputs = model(ids, output_reduction=lambda hidden, weight: ((hidden @ weight.T).sum(), hidden[..., 0]))
        logits = model(ids).logits
    assert "logits" not in outputs and outputs.token_losses.shape == ids.shape
    assert outputs.loss.item() == pytest.approx(logits.sum().item(), rel=1e-4)
    model.set_output_embeddings(torch.nn.Linear(32, VOCAB))
    with pytest.raises(ValueError, match="output_reduction needs an OutputLayer, but the output layer is Linear"):
        model(ids, output_reduction=lambda hidden, weight: None)


@pytest.mark.parametrize("fused", [None, False])
def test_a_compiled_model_takes_the_same_trajectory(fused, tmp_path):
    """Compiled once and not at every step, and the fused loss, the default, between its graphs."""
    torch.compiler.reset()
    counters["stats"].clear()
    options = {"pack": True, "max_steps": 5, "fused_loss": fused}
    plain = trainer(tmp_path / "plain", **options)
    compiled = trainer(
        tmp_path / "compiled",
        torch_compile=True,
        torch_compile_backend="aot_eager",
        save_strategy="steps",
        save_steps=5,
        **options,
    )
    for run in (plain, compiled):
        run.train()
        assert run._fused is (fused is None)
    assert counters["stats"]["unique_graphs"] == 1
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    saved = load_file(tmp_path / "compiled" / "checkpoint-5" / "model.safetensors")  # the plain model's names
    assert parameter_gap(plain.model, saved) < 1e-5


def test_tied_head_takes_the_fused_path(tmp_path):
    tied, dense = (
        trainer(tmp_path / str(fused), model=tiny_model(weight_tying=True), max_steps=3, fused_loss=fused)
        for fused in (True, False)
    )
    for run in (tied, dense):
        run.train()
    assert losses(tied) == pytest.approx(losses(dense), abs=1e-5)


def test_a_batch_without_scored_tokens_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.train_dataset = [{"input_ids": [7, 8], "prompt_mask": [True, True]}] * 4
    with pytest.raises(ValueError, match="step 1: no token of the global batch is to be scored"):
        run.train()


def test_mask_token_in_a_row_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    assert isinstance(run.data_collator, DiffusionCollator)
    run.train_dataset = [{"input_ids": [7, MASK]}] * 4
    with pytest.raises(ValueError, match=r"holds the mask token \(id 5\) as text"):
        run.train()


def test_plain_training_arguments_are_refused(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="args must be XDLMTrainingArguments, got TrainingArguments"):
        XDLMTrainer(model=tiny_model(), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_rows_helper_is_uneven():
    lengths = [len(row["input_ids"]) for row in rows(18)]
    assert min(lengths) < max(lengths) <= LENGTH
