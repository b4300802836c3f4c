"""SIGTERM saves after the current step and exits with 75; a checkpoint is also written every so many seconds."""

import itertools
import json
import signal

import pytest
from training import SCRIPT, RecordingTrainer, launch, losses, parameter_gap, state, trainer

import xdlm_hf.training.preemption
from xdlm_hf.training.checksums import damage
from xdlm_hf.training.preemption import PREEMPTED_STATUS, Preempted
from xdlm_hf.training.processes import run_script


def terminated(output_dir, **options):
    """A run that is sent SIGTERM in the middle of step 5."""
    run = trainer(output_dir, kind=RecordingTrainer, **options)
    run.terminate_in_step = 5
    return run


LAYOUTS = [
    {"save_strategy": "no"},
    {"save_strategy": "steps", "save_steps": 3, "streaming": True, "dataloader_num_workers": 2},
    # The Trainer deletes the last checkpoint at the end of training here, and would evaluate before it saves.
    {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_rows": 4,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "learning_rate": 0.5,
    },
]


@pytest.mark.parametrize("options", LAYOUTS, ids=["never saves", "stream", "best model"])
def test_sigterm_saves_after_the_step_and_the_run_goes_on_bit_for_bit(tmp_path, options):
    whole = trainer(tmp_path / "whole", **{**options, "load_best_model_at_end": False})
    whole.train()
    handler = signal.getsignal(signal.SIGTERM)
    run = terminated(tmp_path / "run", **options)
    with pytest.raises(
        Preempted, match=r"preempted: SIGTERM arrived, step 5 is saved in .*checkpoint-5'.*=auto"
    ) as stop:
        run.train()
    assert stop.value.code == PREEMPTED_STATUS == 75 and stop.value.step == 5
    assert signal.getsignal(signal.SIGTERM) is handler
    assert damage(tmp_path / "run" / "checkpoint-5") == []

    resumed = trainer(tmp_path / "run", **{**options, "load_best_model_at_end": False})
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 8
    assert parameter_gap(resumed.model, state(whole.model)) == 0


def test_a_script_says_that_it_was_preempted_by_its_status(tmp_path, capsys):
    def main():
        terminated(tmp_path).train()

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 75
    assert "preempted: SIGTERM arrived, step 5 is saved" in capsys.readouterr().err


def test_training_outside_the_main_thread_leaves_signals_alone(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(trainer(tmp_path).train).result()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_checkpoint_is_written_when_the_seconds_have_passed(tmp_path, monkeypatch):
    """By a clock on which every step takes 10 seconds, and saving none."""
    clock = itertools.count()
    now = [0.0]
    monkeypatch.setattr(xdlm_hf.training.preemption.time, "monotonic", lambda: now[0])

    class Timed(RecordingTrainer):
        def training_step(self, *args, **kwargs):
            now[0] = 10.0 * (next(clock) + 1)
            return super().training_step(*args, **kwargs)

    trainer(tmp_path, kind=Timed, save_seconds=25, save_strategy="steps", save_steps=5).train()
    # 30 s after the start; the one of step 5 starts the clock anew; the last step is always saved.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (3, 5, 8)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_seconds": 0}, "save_seconds=0 must be positive"),
        ({"save_seconds": float("nan")}, "save_seconds=nan must be positive"),
        ({"enable_jit_checkpoint": True}, "SIGTERM saves after the current step without it"),
        ({"max_steps": 0}, "max_steps=0 must be positive, or -1 for num_train_epochs"),
        ({"max_steps": -3}, "max_steps=-3 must be positive"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0 must be positive"),
        ({"num_train_epochs": -2}, "num_train_epochs=-2 must be positive"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs=nan must be positive"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan must not be negative; 0 does not clip"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must not be negative"),
    ],
)
def test_lengths_and_limits_that_mean_nothing_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_of_two_processes_is_signalled_and_both_save_and_stop(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT)
    options = {"per_device_train_batch_size": 2, "streaming": True, "save_strategy": "no"}

    def run(name, **more):
        return launch(*torchrun, json.dumps({"output_dir": str(tmp_path / name), **options, **more}))

    assert run("whole")[0] == 0
    status, output = run("stopped", terminate_in_step=5)
    assert status != 0 and "exitcode  : 75" in output.replace("exitcode: ", "exitcode  : "), output[-3000:]
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-5"]
    assert damage(tmp_path / "stopped" / "checkpoint-5") == []
    status, output = run("stopped", resume=True)
    assert status == 0, output[-3000:]
    whole, resumed = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "stopped"))
    assert resumed["losses"] == whole["losses"] and len(whole["losses"]) == 8
