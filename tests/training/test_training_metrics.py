"""What training logs: against plain sums, on any number of processes, and in the files that report_to writes."""

import json
import math

import pytest
import torch
from models import LLADA_8B, tiny_model
from training import LENGTH, MASK, SCRIPT, launch, losses, stream, trainer

from xdlm_hf.training.metrics import TrainingMetrics, flops_per_token, peak_tflops
from xdlm_hf.training.trainer import XDLMTrainer

OPTIONS = {"train_rows": 20, "max_steps": 6, "mixing_ratio": 0.5, "logging_steps": 2, "logging_first_step": False}
PARTS = ("loss_masked", "loss_uniform", "loss_clean", "share_masked", "share_uniform", "share_clean")


class Keeping(XDLMTrainer):
    """Keeps what the figures are made of."""

    def compute_loss(self, model, inputs, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, **{**kwargs, "return_outputs": True})
        self.__dict__.setdefault("kept", []).append((inputs, outputs["token_losses"]))
        return loss


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("run"), kind=Keeping, peak_tflops=1e-3, **OPTIONS)
    run.train()
    return run, [entry for entry in run.state.log_history if "nelbo" in entry]


def test_figures_are_plain_sums_over_the_logged_steps(kept):
    run, logs = kept
    assert len(logs) == 3
    for number, entry in enumerate(logs):
        steps = run.kept[2 * number : 2 * number + 2]
        kinds = {"masked": [0.0, 0.0], "uniform": [0.0, 0.0], "clean": [0.0, 0.0]}
        quarters = {name: [0.0, 0.0] for name in ("0_25", "25_50", "50_75", "75_100")}
        rows = []
        for inputs, per_token in steps:
            z_t = inputs["z_t"]
            for row in range(len(z_t)):
                nats = tokens = 0.0
                for position in range(z_t.shape[1]):
                    w = inputs["token_weights"][row, position].item()
                    z, x = z_t[row, position].item(), inputs["input_ids"][row, position].item()
                    kind = "clean" if z == x else "masked" if z == MASK else "uniform"
                    for sums, value in ((kinds[kind], per_token[row, position].item() * w),):
                        sums[0] += value
                        sums[1] += w
                        nats, tokens = nats + value, tokens + w
                rows.append((nats, tokens))
                quarter = list(quarters.values())[min(int(4 * inputs["t"][row].item()), 3)]
                quarter[0] += nats
                quarter[1] += tokens
        total = sum(tokens for _, tokens in rows)
        nelbo = sum(nats for nats, _ in rows) / total
        n = len(rows)
        error = math.sqrt(sum((a - nelbo * b) ** 2 for a, b in rows) * n / (n - 1)) / total
        assert entry["nelbo"] == pytest.approx(nelbo) and entry["perplexity"] == pytest.approx(math.exp(nelbo))
        assert entry["nelbo_standard_error"] == pytest.approx(error)
        assert entry["perplexity_standard_error"] == pytest.approx(error * math.exp(nelbo))
        for name, (nats, tokens) in kinds.items():
            assert entry[f"loss_{name}"] == pytest.approx(nats / tokens)
            assert entry[f"share_{name}"] == pytest.approx(tokens / total)
        for name, (nats, tokens) in quarters.items():
            assert entry.get(f"loss_t_{name}") == (pytest.approx(nats / tokens) if tokens else None)
        assert nelbo == pytest.approx(sum(entry[f"share_{k}"] * entry[f"loss_{k}"] for k in kinds))


def test_speed_memory_and_gradient_are_logged(kept):
    run, logs = kept
    per_token = flops_per_token(run.model, 0)
    for entry in logs:
        assert entry["tokens_per_second"] > 0 and entry["grad_norm"] > 0
        # A peak of 1 GFLOP/s; attention adds to the matrices' share.
        plain = entry["tokens_per_second"] * per_token / 1e9
        assert plain < entry["model_flops_utilization"] < 1.5 * plain
        assert 0.05 < entry["peak_memory_gib"] < 100
    assert "loss_uniform" in logs[0]


def test_figures_that_have_no_position_are_left_out(tmp_path):
    run = trainer(tmp_path, mixing_ratio=0.0, max_steps=2)
    run.train()
    entry = run.state.log_history[0]
    assert "loss_uniform" not in entry and "share_uniform" not in entry and "loss_masked" in entry
    # At k = 0 a clean position costs nothing.
    assert entry["loss_clean"] == 0 and "model_flops_utilization" not in entry


def test_a_literal_mask_in_the_prompt_counts_as_clean():
    metrics = TrainingMetrics(lambda length: 1.0, None, torch.device("cpu"))
    x_0, z_t = torch.tensor([[MASK, 7, 8, 9]]), torch.tensor([[MASK, MASK, 9, 9]])
    weights = torch.tensor([[0.0, 1, 1, 1]])
    metrics.add(x_0, z_t, torch.tensor([1.0]), weights, torch.tensor([[5.0, 2, 3, 1]]), (MASK,))
    figures = metrics.report(lambda v: v, lambda v: v)
    assert (figures["loss_masked"], figures["loss_uniform"], figures["loss_clean"]) == (2, 3, 1)
    assert figures["loss_t_75_100"] == 2 and "nelbo_standard_error" not in figures  # of one row there is none
    assert metrics.report(lambda v: v, lambda v: v) == {}  # nothing since


def test_perplexity_of_a_hopeless_model_is_finite():
    metrics = TrainingMetrics(lambda length: 1.0, None, torch.device("cpu"))
    ids = torch.tensor([[7]])
    metrics.add(ids, ids, torch.tensor([0.5]), torch.ones(1, 1), torch.full((1, 1), 1e4), ())
    assert math.isfinite(metrics.report(lambda v: v, lambda v: v)["perplexity"])


@pytest.mark.slow
def test_figures_do_not_depend_on_the_number_of_processes(kept, tmp_path):
    _, logs = kept
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT)
    status, output = launch(*torchrun, json.dumps({**options, **OPTIONS, "save_strategy": "steps", "save_steps": 6}))
    assert status == 0, output[-3000:]
    history = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    for ours, theirs in zip(logs, [entry for entry in history if "nelbo" in entry], strict=True):
        for name in ("nelbo", "nelbo_standard_error", *PARTS):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name


# --------------------------------------------------------------------------------------------------------------------
# Operations


def test_llada_8b_needs_211_teraflops_a_row():
    with torch.device("meta"):
        model = tiny_model(**LLADA_8B)
    assert flops_per_token(model, 4096) * 4096 == pytest.approx(210.7e12, rel=1e-3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert flops_per_token(model, 0) == pytest.approx(4 * 7.4974e9, rel=1e-3)  # frozen: no gradient of the weights


def test_a_tied_head_is_counted_once():
    tied, untied = (tiny_model(weight_tying=tying) for tying in (True, False))
    assert flops_per_token(tied, 8) == flops_per_token(untied, 8)
    assert peak_tflops(torch.device("cpu")) is None


def test_peak_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="peak_tflops=0.0 must be positive"):
        trainer(tmp_path, peak_tflops=0.0)


# --------------------------------------------------------------------------------------------------------------------
# report_to


def test_tensorboard_gets_every_figure(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = trainer(tmp_path, report_to="tensorboard", eval_rows=4, **OPTIONS)
    run.train()
    run.evaluate()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    names = {f"train/{name}" for name in ("loss", "nelbo", "nelbo_standard_error", "perplexity", "grad_norm", *PARTS)}
    names |= {"train/tokens_per_second", "train/peak_memory_gib", "eval/loss", "eval/loss_standard_error"}
    assert names <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(run))


@pytest.mark.slow
def test_wandb_offline_gets_every_figure(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    logged = {}
    run = trainer(tmp_path / "run", report_to="wandb", **OPTIONS)
    log, history = None, logged

    def keep(self, data, *args, **kwargs):
        history.update(data)
        return log(self, data, *args, **kwargs)

    log = wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", keep)
    run.train()
    wandb.finish()
    assert {f"train/{name}" for name in ("loss", "nelbo", "perplexity", *PARTS)} <= set(logged)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_streams_log_the_same_figures(tmp_path):
    run = XDLMTrainer(
        model=tiny_model(vocab_size=300),
        args=trainer(tmp_path, max_steps=2).args,
        train_dataset=stream(),
    )
    run.train()
    entry = run.state.log_history[0]
    assert entry["nelbo"] == pytest.approx(entry["loss"], rel=1e-5)
    assert run.state.num_input_tokens_seen == 2 * 4 * LENGTH
