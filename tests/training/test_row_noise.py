"""Noise and times that belong to a row, whatever the batches and processes, and rows of random length."""

import json
import math

import numpy as np
import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file
from training import (
    LENGTH,
    MASK,
    SCRIPT,
    VOCAB,
    RecordingTrainer,
    arguments,
    launch,
    losses,
    one_batch,
    parameter_gap,
    state,
    trainer,
)

from xdlm_hf.training.trainer import XDLMTrainer

# --------------------------------------------------------------------------------------------------------------------
# Noise


def test_noise_is_a_function_of_seed_and_place(tmp_path):
    run = trainer(tmp_path)
    torch.manual_seed(1)
    first, _ = one_batch(run)
    torch.manual_seed(2)
    again, _ = one_batch(run)
    assert torch.equal(first["z_t"], again["z_t"]) and torch.equal(first["t"], again["t"])
    # Row 2 alone, unpadded, gets the noise it has in the batch.
    alone = {**run.data_collator([run.train_dataset[2]]), "sample_index": first["sample_index"][2:3]}
    run._add_noise(alone)
    assert torch.equal(alone["z_t"][0], first["z_t"][2, : alone["z_t"].shape[1]]) and alone["t"][0] == first["t"][2]
    # Another step, or another seed, gives other noise.
    run.state.global_step = 1
    assert not torch.equal(first["t"], one_batch(run)[0]["t"])
    run.state.global_step = 0
    run.row_noise.seed += 1
    assert not torch.equal(first["t"], one_batch(run)[0]["t"])


def test_noise_is_drawn_before_a_batch_is_moved(tmp_path):
    """Batches come on the CPU, where their rows draw noise, and go to the device once, with z_t."""
    run = trainer(tmp_path, eval_rows=4)
    for loader in (run.get_train_dataloader(), run.get_eval_dataloader()):
        assert loader.device is None
    assert run.accelerator.device_placement


def times(run, steps, global_batch):
    batch = run.data_collator([{"input_ids": [7]}] * global_batch)
    drawn = []
    for step in range(steps):
        batch["sample_index"] = step * global_batch + torch.arange(global_batch)
        run._add_noise(batch)
        drawn.append(batch["t"])
    return torch.stack(drawn)


def test_stratified_times_fill_every_interval_of_the_global_batch(tmp_path):
    run = trainer(tmp_path, time_sampling="antithetic", t_eps=0.0, per_device_train_batch_size=8)
    t = times(run, 300, 8)
    assert torch.equal((t * 8).long().sort(1).values, torch.arange(8).expand(300, 8))
    # Each place is uniform over time: 300 draws have a mean within 5 standard errors (false alarm 5e-6 over 8 places).
    assert ((t.mean(0) - 0.5).abs() < 5 / math.sqrt(12 * 300)).all()


def test_independent_times_are_uniform_between_t_eps_and_one(tmp_path):
    run = trainer(tmp_path, t_eps=0.25, per_device_train_batch_size=8)
    t = times(run, 250, 8).flatten()
    assert t.min() >= 0.25 and t.max() <= 1
    # Kolmogorov-Smirnov distance of 2000 draws: above 0.05 with probability below 1e-4.
    gap = (t.sort().values - 0.25) / 0.75 - (torch.arange(2000) + 0.5) / 2000
    assert gap.abs().max() < 0.05
    assert len((times(run, 1, 8)[0] * 8).long().unique()) < 8, "stratified by accident: choose another seed"


def test_stratified_times_lower_the_variance_on_a_trained_model(tmp_path):
    """Equal cost: the same rows, one time per row. At k = 0.5 a trained model's loss falls from 5.0 to 1.2 nats over t.

    t_eps = 0.1 keeps the rare large losses near t = 0, whose sample variance says little, out of the comparison. The
    ratio is 0.36, as an analysis of variance gives too; of 120 estimates a side it is above 0.75 with probability 3e-5.
    """
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": ids} for ids in torch.randint(6, VOCAB, (64, 48), generator=generator).tolist()]
    run = XDLMTrainer(
        model=tiny_model(),
        args=arguments(
            tmp_path, max_steps=30, learning_rate=1e-2, per_device_train_batch_size=16, mixing_ratio=0.5, t_eps=0.1
        ),
        train_dataset=data,
    )
    run.train()
    batch, _ = one_batch(run, 16)
    variance = {}
    for sampling in ("independent", "stratified"):
        run.row_noise.stratified = sampling == "stratified"
        estimates = []
        for step in range(120):
            batch["sample_index"] = step * 16 + torch.arange(16)
            run._add_noise(batch)
            with torch.no_grad():
                estimates.append(run.compute_loss(run.model, batch).item())
        variance[sampling] = np.var(estimates, ddof=1)
    assert variance["stratified"] < 0.75 * variance["independent"]


def test_prompt_and_padding_are_neither_noised_nor_scored(tmp_path):
    run = trainer(tmp_path, mixing_ratio=0.0, t_eps=0.999)
    batch, tokens = one_batch(run)
    z_t = batch["z_t"]
    protected = ~batch["noise_mask"]
    assert protected[:, 0].tolist() == [False, True, True, False]  # rows 1 and 2 open with a prompt
    assert torch.equal(z_t[protected], batch["input_ids"][protected])
    assert (z_t[~protected] == MASK).float().mean() > 0.9
    assert tokens == batch["noise_mask"].sum()

    loss = run.compute_loss(run.model, batch, num_items_in_batch=tokens).item()
    padding = batch["attention_mask"] == 0
    assert padding.any()
    other = {**batch, **{name: batch[name].masked_fill(padding, 9) for name in ("input_ids", "z_t")}}
    assert run.compute_loss(run.model, other, num_items_in_batch=tokens).item() == pytest.approx(loss, rel=1e-6)


def test_token_weights_weigh_the_mean(tmp_path):
    run = trainer(tmp_path)
    run.train_dataset = [
        {"input_ids": [7, 8, 9, 10], "token_weights": [0.25, 0.0, 1.0, 3.0]},
        {"input_ids": [11, 12]},
    ]
    batch, tokens = one_batch(run, 2)
    assert tokens == 6.25
    loss, outputs = run.compute_loss(run.model, batch, return_outputs=True, num_items_in_batch=tokens)
    expected = (batch["token_weights"] * outputs["token_losses"]).sum() / 6.25
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_survive_a_cast_to_the_models_dtype(tmp_path):
    """DeepSpeed has the Trainer cast float inputs to bfloat16, where 0.3 is 0.30078."""
    run = trainer(tmp_path)
    run._prepare_input = lambda data: {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in data.items()
    }
    exact = {"token_weights": torch.tensor([[0.3]]), "t": torch.tensor([0.3], dtype=torch.float64)}
    prepared = run._prepare_inputs(exact)
    assert all(torch.equal(prepared[name], exact[name]) for name in exact)


# --------------------------------------------------------------------------------------------------------------------
# Random lengths

RANDOM_LENGTHS = {"pack": True, "random_length_probability": 0.5, "per_device_train_batch_size": 4, "eval_rows": 4}


def widths(run):
    return [[len(row) for batch in step for row in batch] for step in run.seen]


@pytest.fixture(scope="module")
def random_lengths(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("lengths"), kind=RecordingTrainer, **RANDOM_LENGTHS)
    run.train()
    return run


def test_random_lengths_cut_whole_steps(random_lengths):
    per_step = [set(row) for row in widths(random_lengths)]
    assert all(len(step) == 1 for step in per_step)
    lengths = [step.pop() for step in per_step]
    assert lengths == [random_lengths._random_length(step) or LENGTH for step in range(8)]
    assert LENGTH in lengths and len(set(lengths)) > 2
    assert random_lengths.state.num_input_tokens_seen == 4 * sum(lengths)


def test_random_lengths_are_uniform_and_as_frequent_as_asked(tmp_path):
    run = trainer(tmp_path, pack=True, random_length_probability=0.25)
    drawn = [run._random_length(step) for step in range(4000)]
    cut = torch.tensor([length for length in drawn if length is not None])
    # Five standard deviations each: false alarm 6e-7 for the share, 8e-6 over the lengths.
    assert abs(len(cut) / 4000 - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    counts = torch.bincount(cut, minlength=LENGTH + 1)[1:]
    assert len(counts) == LENGTH and (counts - len(cut) / LENGTH).abs().max() < 5 * math.sqrt(len(cut) / LENGTH)
    torch.manual_seed(1)
    assert drawn[:100] == [run._random_length(step) for step in range(100)]
    run.row_noise.seed += 1
    assert drawn[:100] != [run._random_length(step) for step in range(100)]
    assert trainer(tmp_path, pack=True)._random_length(0) is None


def test_random_lengths_do_not_depend_on_accumulation(random_lengths, tmp_path):
    options = {**RANDOM_LENGTHS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    run = trainer(tmp_path, kind=RecordingTrainer, **options)
    run.train()
    assert [[row for batch in step for row in batch] for step in run.seen] == [step[0] for step in random_lengths.seen]
    assert losses(run) == pytest.approx(losses(random_lengths), abs=1e-5)
    assert parameter_gap(run.model, state(random_lengths.model)) < 1e-5


@pytest.mark.slow
def test_random_lengths_agree_between_processes(random_lengths, tmp_path):
    options = {**RANDOM_LENGTHS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    status, output = launch(*torchrun, SCRIPT, json.dumps({**options, "output_dir": str(tmp_path)}))
    assert status == 0, output[-3000:]
    seen = [json.loads((tmp_path / f"seen_{rank}.json").read_text()) for rank in range(2)]
    for step, whole in enumerate(random_lengths.seen):
        assert [rank[step][number][0] for number in range(2) for rank in seen] == whole[0]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["losses"] == pytest.approx(losses(random_lengths), abs=1e-5)
    assert parameter_gap(random_lengths.model, load_file(tmp_path / "end.st")) < 1e-5


@pytest.mark.parametrize("data", [{"pack": True}, {"streaming": True, "pack": False}], ids=["packed", "stream"])
def test_random_lengths_resume_bit_for_bit(data, tmp_path, caplog):
    options = {**RANDOM_LENGTHS, **data, "save_strategy": "steps", "save_steps": 3, "kind": RecordingTrainer}
    whole, resumed = (trainer(tmp_path / "run", **options) for _ in range(2))
    whole.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.seen == whole.seen[3:] and losses(resumed) == losses(whole)
    assert parameter_gap(resumed.model, state(whole.model)) == 0
    other = trainer(tmp_path / "other", **{**options, "random_length_probability": 0.0, "max_steps": 4})
    other.train(resume_from_checkpoint=checkpoint)
    assert "random_length_probability=0.5, this run 0.0: lengths are drawn differently" in caplog.text


def test_random_lengths_need_packed_rows(tmp_path):
    with pytest.raises(ValueError, match=r"random_length_probability=0\.01 needs packed rows"):
        trainer(tmp_path / "run", random_length_probability=0.01)
    assert not (tmp_path / "run").exists()
