"""Resuming repeats the uninterrupted run bit for bit, wherever it was killed, rows or stream."""

import itertools
import json
import signal
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file
from training import (
    LENGTH,
    SCRIPT,
    RecordingTrainer,
    launch,
    losses,
    parameter_gap,
    state,
    stream,
    trainer,
)
from transformers.trainer_utils import get_last_checkpoint

from xdlm_hf import LLaDAForDiffusionLM
from xdlm_hf.data.readers import hold_out, load_documents
from xdlm_hf.data.stream import PackedStream
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.training.checkpoints import UNFINISHED, last_checkpoint

SAVES = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# --------------------------------------------------------------------------------------------------------------------
# A killed run goes on


def killed(output_dir, **options):
    """Run until the process kills itself."""
    status, output = launch(SCRIPT, json.dumps({"output_dir": str(output_dir), **options}))
    assert status == -signal.SIGKILL, output[-3000:]


KILLS = [
    ({"gradient_accumulation_steps": 2}, {"kill_in_step": 5}, 3),
    ({"streaming": True, "dataloader_num_workers": 2}, {"kill_in_save": 6}, 3),
]


@pytest.mark.parametrize(("options", "kill", "resumed_from"), KILLS, ids=["step", "write"])
def test_killed_run_goes_on_bit_for_bit(tmp_path, options, kill, resumed_from):
    whole = trainer(tmp_path / "whole", kind=RecordingTrainer, **SAVES, **options)
    whole.train()
    killed(tmp_path / "killed", **SAVES, **options, **kill)
    assert last_checkpoint(tmp_path / "killed").name == f"checkpoint-{resumed_from}"
    if "kill_in_save" in kill:  # what was being written lies under another name, which the Trainer's search ignores
        assert names(tmp_path / "killed" / UNFINISHED) == ["checkpoint-6"]
        assert (tmp_path / "killed" / UNFINISHED / "checkpoint-6" / "model.safetensors").exists()
        assert get_last_checkpoint(str(tmp_path / "killed")) == str(tmp_path / "killed" / "checkpoint-3")

    resumed = trainer(tmp_path / "killed", kind=RecordingTrainer, **SAVES, **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)  # the first three from the checkpoint's log, the others computed
    assert len(losses(whole)) == 8 and len(set(losses(whole))) == 8
    assert parameter_gap(resumed.model, state(whole.model)) == 0
    assert resumed.seen == whole.seen[resumed_from:] and len(whole.seen) == 8
    assert [entry["epoch"] for entry in resumed.state.log_history] == [e["epoch"] for e in whole.state.log_history]
    assert names(tmp_path / "killed") == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kill", [{"kill_in_step": 5}, {"kill_in_save": 6}], ids=["step", "write"])
def test_killed_run_of_two_processes_goes_on_bit_for_bit(tmp_path, streaming, kill):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT)
    options = {**SAVES, "per_device_train_batch_size": 2, "streaming": streaming}

    def run(name, **more):
        return launch(*torchrun, json.dumps({"output_dir": str(tmp_path / name), **options, **more}))

    status, output = run("whole")
    assert status == 0, output[-3000:]
    status, output = run("killed", **kill)
    assert status != 0 and "SIGKILL" in output
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-3"
    status, output = run("killed", resume=True)
    assert status == 0, output[-3000:]
    whole, resumed = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed"))
    assert resumed["losses"] == whole["losses"] and len(whole["losses"]) == 8
    ends = [load_file(tmp_path / name / "end.st") for name in ("whole", "killed")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    for rank in range(2):
        whole, resumed = (json.loads((tmp_path / n / f"seen_{rank}.json").read_text()) for n in ("whole", "killed"))
        assert resumed == whole[3:] and len(whole) == 8


@pytest.mark.parametrize("data", [{}, {"streaming": True}, {"max_steps": -1, "num_train_epochs": 2}], ids=str)
def test_a_finished_run_takes_no_further_step(tmp_path, data):
    """Killed between its last checkpoint and the final model; Transformers' Trainer would take step 9 of 8."""
    run = trainer(tmp_path, **{**SAVES, **data})
    run.train()
    before = names(tmp_path)
    resumed = trainer(tmp_path, kind=RecordingTrainer, **{**SAVES, **data})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == run.state.global_step == run.state.max_steps
    assert not hasattr(resumed, "seen") and losses(resumed) == losses(run)
    assert parameter_gap(resumed.model, state(run.model)) == 0
    assert names(tmp_path) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_resumes_at_either_workers_turn(tmp_path, workers):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 7, "per_device_train_batch_size": 2}
    options |= {"streaming": True, "dataloader_num_workers": workers}
    whole = trainer(tmp_path / "whole", kind=RecordingTrainer, **options)
    whole.train()
    for step in (1, 4, 5):  # so many batches: of two workers it is the second's turn, or the first's
        resumed = trainer(tmp_path / str(step), kind=RecordingTrainer, **{**options, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.seen == whole.seen[step:]
        assert losses(resumed) == losses(whole)


def test_map_style_resume_restores_other_weights_and_the_noise_in_the_config(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "mixing_ratio": 0.3, "noise_schedule": "cosine"}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    saved = tmp_path / "whole" / "checkpoint-5"
    restored = LLaDAForDiffusionLM.from_pretrained(saved)
    assert (restored.config.mixing_ratio, restored.config.noise_schedule) == (0.3, "cosine")
    assert restored.noise_kernel().mixing_ratio == 0.3

    other = tiny_model()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    resumed = trainer(tmp_path / "resumed", model=other, **options)
    resumed.train(resume_from_checkpoint=str(saved))
    assert resumed.state.global_step == 8
    assert losses(resumed)[5:] == losses(whole)[5:]
    assert parameter_gap(resumed.model, state(whole.model)) == 0


def test_dropout_goes_on_where_it_stopped(tmp_path):
    """The one thing that still draws from the global generator, which a new loader must not move."""
    from peft import LoraConfig, get_peft_model

    def run(folder):
        targets = r".*blocks\.\d+\.(q_proj|v_proj)"
        lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=targets, task_type=None)
        torch.manual_seed(1)
        model = get_peft_model(tiny_model(vocab_size=300), lora)
        return trainer(tmp_path / folder, model=model, streaming=True, learning_rate=3e-2, **SAVES)

    whole, resumed = run("whole"), run("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)


# --------------------------------------------------------------------------------------------------------------------
# The stream's state


TEXTS = [f"Document {i} says: {'word ' * (i % 7)}end {i}." for i in range(700)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same documents as JSONL files, in memory and as Parquet read as a Hub dataset is, in four shards each."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "parquet").mkdir()
    for shard in range(4):
        texts = TEXTS[shard::4]
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, folder / "parquet" / f"{shard}.parquet", row_group_size=50)
    return {
        "jsonl": lambda: load_documents(data_files=[str(folder / "*.jsonl")]),
        "memory": lambda: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(4),
        "parquet": lambda: load_documents(str(folder / "parquet")),
    }


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3), (2, 6)])  # 6 readers share 4 shards
@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("source", ["jsonl", "memory", "parquet"])
def test_reader_goes_on_after_any_row(sources, tokenizer, source, held_out, rank, world_size, shuffle_seed):
    def read(state=None):
        documents = hold_out(sources[source](), 0.2)[0] if held_out else sources[source]()
        options = {"rank": rank, "world_size": world_size, "shuffle_seed": shuffle_seed, "shuffle_buffer": 60}
        return PackedStream(documents, tokenizer, 64, **options).read(state=state)

    number = 260 // world_size  # more than one pass
    whole = [row["input_ids"].tolist() for row, _ in itertools.islice(read(), number)]
    pieces, place = [], None
    while len(pieces) < number:  # states of resumed readers count as well
        piece = list(itertools.islice(read(place), max(7, number // 9)))
        pieces += [row["input_ids"].tolist() for row, _ in piece]
        place = json.loads(json.dumps(piece[-1][1]))
        assert len(json.dumps(place)) < 1000
    assert pieces[:number] == whole


def test_resumed_reader_encodes_no_more_than_it_must(tokenizer):
    encoded = []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **options):
            encoded.extend(texts)
            return tokenizer(texts, **options)

    def read(state=None):
        documents = datasets.Dataset.from_dict({"text": TEXTS * 10}).to_iterable_dataset()
        return PackedStream(documents, Counting(), 64, shuffle_seed=0, shuffle_buffer=256).read(state=state)

    *_, (_, place) = itertools.islice(read(), 1000)
    assert len(encoded) > 4000
    encoded.clear()
    next(read(place))
    assert len(encoded) <= 256


def test_stream_notices_changed_data(tokenizer):
    def read(texts, state=None):
        documents = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
        return PackedStream(documents, tokenizer, 64, shuffle_seed=0, shuffle_buffer=256).read(state=state)

    *_, (_, place) = itertools.islice(read(TEXTS), 30)
    next(read(TEXTS, place))
    for changed in ([f"x{text}" for text in TEXTS], ["new", *TEXTS], TEXTS[:20]):
        with pytest.raises(ValueError, match="the data changed: the document where reading should resume is another"):
            next(read(changed, place))


def test_shuffling_by_datasets_is_refused(tokenizer):
    """Its buffer is lost on resuming: documents in it would never be seen (datasets says so in `state_dict`)."""
    documents = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset().shuffle(seed=0, buffer_size=9)
    with pytest.raises(ValueError, match=r"shuffled by datasets, whose buffer is lost on resuming: leave out .shuffle"):
        PackedStream(hold_out(documents, 0.5)[0], tokenizer, 64)
    with pytest.raises(ValueError, match="shuffle_buffer=0 must be at least 1 document"):
        stream(shuffle_buffer=0)


def test_rows_are_as_long_as_the_tests_say():
    assert all(len(row) == LENGTH for row in (ids["input_ids"] for ids, _ in itertools.islice(stream().read(), 9)))
