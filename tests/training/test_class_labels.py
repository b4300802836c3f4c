"""Class labels in training: dropped per row, the same whatever the processes, and never in evaluation."""

import json
import sys
from pathlib import Path

import pytest
import torch
from models import random_dit, tiny_model
from safetensors.torch import load_file, save_file
from training import ENDS_CLEANLY, arguments, launch, losses, one_batch, rows, state

from xdlm_hf.training.processes import run_script
from xdlm_hf.training.trainer import XDLMTrainer

CLASSES = 4
SCRIPT = __file__


def labelled(number, seed=0):
    return [{**row, "class_label": i % CLASSES} for i, row in enumerate(rows(number, seed))]


class Recording(XDLMTrainer):
    """Keeps the places and the labels of all rows that the network is given."""

    def _weighted_loss(self, model, inputs):
        kept = self.__dict__.setdefault("kept", [])
        kept += zip(
            inputs.get("sample_index", torch.tensor([])).tolist(), inputs["class_labels"].tolist(), strict=False
        )
        self.labels = inputs["class_labels"].tolist()
        return super()._weighted_loss(model, inputs)


def run(folder, model=None, **options):
    model = model or random_dit(num_classes=CLASSES, label_dropout=0.4, dropout=0.0, vocab_size=48, mask_token_id=5)
    data = {"train_dataset": labelled(32), "eval_dataset": labelled(6, seed=1)}
    return Recording(model=model.train(), args=arguments(folder, **{"max_steps": 6, **options}), **data)


def test_about_the_wanted_share_of_labels_is_dropped():
    """4,000 rows at 0.4: 1,600 with a standard deviation of 31, a false alarm at 6 of these once in 5e8 runs."""
    trainer = run("unused")
    labels = torch.arange(4000) % CLASSES
    dropped = trainer.row_noise.drop_labels(labels, range(4000), 0.4, CLASSES)
    assert abs((dropped == CLASSES).sum().item() - 1600) < 6 * 31
    assert dropped[dropped != CLASSES].equal(labels[dropped != CLASSES])
    assert trainer.row_noise.drop_labels(labels, range(4000), 0.0, CLASSES).equal(labels)


def test_a_resumed_run_drops_the_same_labels(tmp_path):
    whole = run(tmp_path / "whole")
    whole.train()
    assert {label == CLASSES for _, label in whole.kept} == {True, False}
    run(tmp_path / "cut", max_steps=3, save_strategy="steps", save_steps=3).train()
    resumed = run(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert resumed.kept == whole.kept[len(whole.kept) // 2 :] and losses(resumed)[-1] == losses(whole)[-1]
    ends = state(whole.model), state(resumed.model)
    assert all(weight.equal(ends[1][name]) for name, weight in ends[0].items())


def test_evaluation_drops_no_labels(tmp_path):
    trainer = run(tmp_path, per_device_eval_batch_size=6)
    loss = trainer.evaluate()["eval_loss"]
    assert trainer.labels == [i % CLASSES for i in range(6)]
    trainer.eval_dataset = rows(6, seed=1)
    unlabelled = [{**row, "class_label": CLASSES - 1} for row in rows(6, seed=1)]
    assert loss != trainer.evaluate(unlabelled)["eval_loss"]


def test_labels_change_neither_times_nor_noise(tmp_path):
    with_labels = run(tmp_path)
    without = Recording(model=with_labels.model, args=arguments(tmp_path), train_dataset=rows(32))
    (first, _), (second, _) = one_batch(with_labels), one_batch(without)
    assert first["z_t"].equal(second["z_t"]) and first["t"].equal(second["t"])
    assert "class_labels" not in second and len(first["class_labels"]) == 4


def test_two_processes_drop_what_one_drops(tmp_path):
    outcomes = []
    for processes, rows_each in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launcher, ENDS_CLEANLY, SCRIPT, str(folder), str(rows_each)]
        code, output = launch(*command, PYTHONPATH=str(Path(SCRIPT).parents[1]))
        assert code == 0, output[-3000:]
        kept = [pair for part in sorted(folder.glob("kept_*.json")) for pair in json.loads(part.read_text())]
        outcomes.append((sorted(kept), load_file(folder / "end.st")))
    assert outcomes[0][0] == outcomes[1][0] and len(outcomes[0][0]) == 12
    gaps = [(weight - outcomes[1][1][name]).abs().max() for name, weight in outcomes[0][1].items()]
    assert max(gaps) < 1e-5  # ADAM_EPSILON: a rounding error moves a weight by no more than 3 of it a step


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model(), "class_label=.*, but the model has no classes; remove the column"),
        (
            lambda: random_dit(num_classes=2, vocab_size=48, mask_token_id=5),
            r"class_label=.*; the model's classes are 0..1",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, model=model()).train()


def main():
    folder = Path(sys.argv[1])
    trainer = run(folder, max_steps=3, per_device_train_batch_size=int(sys.argv[2]))
    trainer.train()
    (folder / f"kept_{trainer.args.process_index}.json").write_text(json.dumps(trainer.kept))
    if trainer.is_world_process_zero():
        save_file(state(trainer.accelerator.unwrap_model(trainer.model)), folder / "end.st")


if __name__ == "__main__":
    run_script(main)
