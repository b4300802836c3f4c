"""A run reads one commit of a Hub dataset, from its start to its end. The Hub is stood in for by folders."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError
from models import tiny_model
from safetensors.torch import load_file
from training import ENDS_CLEANLY, flags, launch, logged

from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.training.checkpoints import RUN_RECORD
from xdlm_hf.training.checksums import write_checksums
from xdlm_hf.training.revisions import pin_revision

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import llada_cpt  # noqa: E402

OLD, NEW = "a" * 40, "b" * 40
NAME = "someone/texts"


class FakeHub:
    """Branches that name commits, each a folder of documents; it may be out of reach."""

    def __init__(self, folder):
        self.folder, self.offline, self.asked = folder, False, []
        self.names = {None: OLD, "main": OLD, "v2": NEW, OLD: OLD, NEW: NEW}
        for commit, word in ((OLD, "old"), (NEW, "new")):
            (folder / commit).mkdir()
            rows = [json.dumps({"text": f"the {word} text, number {i}, {'many ' * (i % 5)}words"}) for i in range(80)]
            (folder / commit / "a.jsonl").write_text("\n".join(rows))

    def dataset_info(self, api, dataset, revision=None, timeout=None):
        self.asked.append(revision)
        if self.offline:
            raise OfflineModeIsEnabled("the Hub is out of reach")
        if revision not in self.names:
            response = SimpleNamespace(headers={}, request=None)
            raise RevisionNotFoundError("404", response=response)
        return SimpleNamespace(sha=self.names[revision])

    def load_dataset(self, load, dataset, config, revision=None, **options):
        assert dataset == NAME
        return load(str(self.folder / self.names[revision]), None, **options)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake, load = FakeHub(tmp_path), datasets.load_dataset
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **named: fake.dataset_info(*args, **named))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: fake.load_dataset(load, *args, **named))
    return fake


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(vocab_size=300).save_pretrained(folder)
    train_tokenizer([f"the old text, the new text, number {i}, many words" for i in range(40)], 300).save_pretrained(
        folder
    )
    return folder


def run(base, output_dir, **changes):
    """A stream of 6 steps with checkpoints after each 3, as far as `max_steps`."""
    values = {
        "model_name_or_path": base,
        "dataset": NAME,
        "sequence_length": 16,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "shuffle_buffer": 16,
        "report_to": "none",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "resume_from_checkpoint": "auto",
        "output_dir": output_dir,
        **changes,
    }
    return llada_cpt.main(flags(values))


def revision_of(checkpoint):
    return json.loads((checkpoint / RUN_RECORD).read_text())["data"]["source"]["revision"]


def forget_revision(checkpoint):
    """Make it a checkpoint as they were before revisions were recorded."""
    record = json.loads((checkpoint / RUN_RECORD).read_text())
    del record["data"]["source"]["revision"]
    (checkpoint / RUN_RECORD).write_text(json.dumps(record))
    write_checksums(checkpoint)


@pytest.mark.parametrize("asked", [None, "main"])
def test_a_resumed_run_reads_the_commit_it_began_with(hub, base, tmp_path, asked):
    """Also where the same name is asked for again, which by then names another commit."""
    run(base, tmp_path / "whole", dataset_revision=OLD)
    run(base, tmp_path / "run", max_steps=3, dataset_revision=asked)
    assert revision_of(tmp_path / "run" / "checkpoint-3") == {"commit": OLD, "asked": asked}
    hub.names |= {None: NEW, "main": NEW}
    run(base, tmp_path / "run", dataset_revision=asked)
    assert revision_of(tmp_path / "run" / "checkpoint-6") == {"commit": OLD, "asked": asked}
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    run(base, tmp_path / "new", max_steps=1)
    assert logged(tmp_path / "new") != logged(tmp_path / "whole")[:1]  # another commit is other data


def test_another_revision_is_refused_on_resuming(hub, base, tmp_path):
    run(base, tmp_path / "run", max_steps=3)
    for resume in ("auto", tmp_path / "run" / "checkpoint-3"):
        message = f"dataset_revision='v2' of {NAME} is {NEW}, checkpoint-3 has read {OLD}: documents would be seen"
        with pytest.raises(ValueError, match=message):
            run(base, tmp_path / "run", dataset_revision="v2", resume_from_checkpoint=resume)
    assert not (tmp_path / "run" / "checkpoint-6").exists()
    hub.names["v1"] = OLD
    run(base, tmp_path / "run", dataset_revision="v1")  # another name of the same commit
    assert revision_of(tmp_path / "run" / "checkpoint-6")["commit"] == OLD


def test_a_checkpoint_without_a_revision_is_resumed_and_pinned(hub, base, tmp_path, caplog):
    run(base, tmp_path / "run", max_steps=3)
    forget_revision(tmp_path / "run" / "checkpoint-3")
    run(base, tmp_path / "run")
    assert f"checkpoint-3 does not say which revision of {NAME} it read" in caplog.text
    assert revision_of(tmp_path / "run" / "checkpoint-6") == {"commit": OLD, "asked": None}


def test_offline_runs_go_on_with_a_warning(hub, base, tmp_path, caplog):
    hub.offline = True
    run(base, tmp_path / "run", max_steps=3)
    assert f"dataset {NAME} is not pinned to a revision: the Hub did not say which commit its default" in caplog.text
    assert "(OfflineModeIsEnabled: the Hub is out of reach)" in caplog.text
    assert revision_of(tmp_path / "run" / "checkpoint-3") == {"commit": None, "asked": None}
    run(base, tmp_path / "run")
    assert len(logged(tmp_path / "run")) == 6


def test_a_revision_asked_for_offline_is_pinned_when_the_hub_is_there_again(hub, base, tmp_path):
    hub.offline = True
    run(base, tmp_path / "run", max_steps=3, dataset_revision="v2")
    assert revision_of(tmp_path / "run" / "checkpoint-3") == {"commit": None, "asked": "v2"}
    hub.offline = False
    run(base, tmp_path / "run")
    assert revision_of(tmp_path / "run" / "checkpoint-6") == {"commit": NEW, "asked": "v2"}


def test_a_pinned_run_that_is_resumed_offline_keeps_its_revision(hub, base, tmp_path, caplog):
    run(base, tmp_path / "run", max_steps=3)
    assert "not pinned" not in caplog.text
    hub.offline = True
    run(base, tmp_path / "run")
    assert f"is not pinned to a revision: the Hub did not say which commit {OLD!r} is" in caplog.text
    assert revision_of(tmp_path / "run" / "checkpoint-6") == {"commit": OLD, "asked": None}
    with pytest.raises(ValueError, match=f"'v2' of {NAME} is unknown here, checkpoint-6 has read {OLD}"):
        run(base, tmp_path / "run", dataset_revision="v2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_revision": "v9"}, f"dataset '{NAME}' has no revision 'v9' on the Hub"),
        (
            {"dataset": "python-reference", "dataset_revision": "v2"},
            "dataset_revision='v2' is for a dataset of the Hub",
        ),
        ({"dataset": ".", "dataset_revision": "v2"}, r"dataset_revision='v2': dataset '\.' is a local folder"),
        ({"skip_corrupted": "true"}, "skip_corrupted=True is for the lines of local JSONL files"),
    ],
)
def test_bad_revisions_are_refused(hub, base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(base, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_commit_that_the_hub_has_lost_is_an_error(hub, base, tmp_path):
    """`datasets` would take another one from its cache."""
    run(base, tmp_path / "run", max_steps=3)
    hub.names = {None: NEW}
    with pytest.raises(ValueError, match=f"dataset '{NAME}' has no revision '{OLD}' on the Hub"):
        run(base, tmp_path / "run")


def test_a_local_folder_has_no_revision(hub, tmp_path, caplog):
    assert pin_revision(str(tmp_path)) == {"commit": None, "asked": None}
    assert not hub.asked and not [record for record in caplog.records if record.levelno >= logging.WARNING]


TWO = """
import torch
from accelerate import PartialState
from xdlm_hf.training.processes import run_on_main_process, end_script

def refuse():
    raise ValueError(f"refused by {rank}")

rank = PartialState(cpu=True).process_index
found = run_on_main_process(lambda: {"commit": f"seen by {rank}"})
try:
    run_on_main_process(refuse)
except ValueError as error:
    print(f"{rank}: {found}, {error}", flush=True)
end_script()
"""


def test_processes_agree_on_what_the_first_one_finds(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ENDS_CLEANLY)
    status, output = launch(*torchrun, str(tmp_path / "two.py"))
    assert status == 0, output[-3000:]
    for rank in range(2):
        assert f"{rank}: {{'commit': 'seen by 0'}}, refused by 0" in output
