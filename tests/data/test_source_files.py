"""A stream's files may be repaired or removed while a run is interrupted, when asked for, and only if that is exact."""

import itertools
import json
import logging
import os
import re
import shutil

import pytest
from models import tiny_model
from training import RecordingTrainer, arguments, parameter_gap, state

from xdlm_hf.data.readers import hold_out
from xdlm_hf.data.source_files import find_files
from xdlm_hf.data.stream import PackedStream
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.training.checkpoints import last_checkpoint, recorded_data

NUMBERS = range(100)  # documents of one file
TEXTS = {name: [f"{name} number {i} {'many ' * (i % 5)}words" for i in NUMBERS] for name in "abc"}
BAD = 90  # the line that is corrupted


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(itertools.chain.from_iterable(TEXTS.values()), 300)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("xdlm_hf.data.stream.DOCUMENTS_PER_CALL", 16)


@pytest.fixture
def folder(tmp_path):
    for name in TEXTS:
        write(tmp_path / "data", name, lines(name))
    return tmp_path / "data"


def lines(name, **changes):
    """The file's lines; `line_3="x"` puts another in its place."""
    found = [json.dumps({"text": text}) for text in TEXTS[name]]
    for line, content in changes.items():
        found[int(line.removeprefix("line_"))] = content
    return found


def write(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join(content) + "\n")


def run(tokenizer, output, patterns, resume=False, held_out=False, skip_corrupted=False, **options):
    """Train 56 steps, more than a pass over the files, in blocks of 16 documents."""
    newest = last_checkpoint(output) if resume else None
    files = find_files(patterns, recorded_data(newest)["source"] if newest else None)
    args = arguments(
        output,
        **{
            "max_steps": 56,
            "save_strategy": "steps",
            "save_steps": 6,
            "logging_steps": 20,
            "per_device_train_batch_size": 2,
            **options,
        },
    )
    documents = files.documents(skip_corrupted=skip_corrupted)
    data = PackedStream(
        hold_out(documents, 0.2)[0] if held_out else documents,
        tokenizer,
        24,
        shuffle_seed=0,
        shuffle_buffer=16,
        source={**files.fingerprint, "text_column": "text"},
    )
    trained = RecordingTrainer(model=tiny_model(vocab_size=300), args=args, train_dataset=data)
    trained.train(resume_from_checkpoint=str(newest) if newest else None)
    return trained


def stopped(tokenizer, output, folder, name="b", **options):
    """A run that a corrupted line of one file stopped; its last checkpoint's step."""
    write(folder, name, lines(name, **{f"line_{BAD}": "{oops"}))
    way_on = "A streamed run goes on after .* --resume_from_checkpoint auto --accept_repaired_data true"
    with pytest.raises(ValueError, match=rf"{name}\.jsonl, line {BAD + 1}: not valid JSON .*{way_on}"):
        run(tokenizer, output, [f"{folder}/*.jsonl"], **options)
    return int(last_checkpoint(output).name.removeprefix("checkpoint-"))


READERS = [{}, {"held_out": True, "dataloader_num_workers": 2}, {"dataloader_num_workers": 5}]


@pytest.mark.parametrize("options", READERS, ids=str)  # 5 workers share the documents of 3 files
def test_a_repaired_file_gives_the_rows_of_an_unbroken_run(tmp_path, folder, tokenizer, caplog, options):
    whole = run(tokenizer, tmp_path / "whole", [f"{folder}/*.jsonl"], save_strategy="no", **options)
    at = stopped(tokenizer, tmp_path / "run", folder, **options)
    assert 0 < at < 50
    write(folder, "b", lines("b"))
    write(folder, "c", lines("c"))
    (folder / "b.jsonl").write_text((folder / "b.jsonl").read_text() + "\n")  # not byte for byte as it was
    resuming = {"resume": True, **options}
    message = (
        rf"checkpoint-{at}: data file 'b\.jsonl' had \[\d+, \d+\] \(bytes, CRC-32\), now .*: documents would be seen "
        "twice or never. Restore it; or, if it was repaired or removed on purpose, go on with accept_repaired_data=True"
    )
    with pytest.raises(ValueError, match=message):
        run(tokenizer, tmp_path / "run", [f"{folder}/*.jsonl"], **resuming)
    with caplog.at_level(logging.WARNING, "xdlm_hf.source_files"):
        resumed = run(tokenizer, tmp_path / "run", [f"{folder}/*.jsonl"], accept_repaired_data=True, **resuming)
    assert re.search(r"data file 'b\.jsonl' had .*; \d+ documents of it were read before", caplog.text)
    assert resumed.seen == whole.seen[at:] and len(whole.seen) == 56
    assert parameter_gap(resumed.model, state(whole.model)) == 0
    run(tokenizer, tmp_path / "run", [f"{folder}/*.jsonl"], **{**resuming, "max_steps": 57})  # from then on as usual


def test_lines_may_be_skipped_from_the_corrupted_one_on(tmp_path, folder, tokenizer):
    at = stopped(tokenizer, tmp_path / "run", folder)
    whole = run(tokenizer, tmp_path / "whole", [f"{folder}/*.jsonl"], save_strategy="no", skip_corrupted=True)
    resumed = run(tokenizer, tmp_path / "run", [f"{folder}/*.jsonl"], resume=True, skip_corrupted=True)
    assert resumed.seen == whole.seen[at:]


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("b", lines("b", line_3='{"text": "another"}'), r"\d+"),
        ("b", lines("b")[1:], r"\d+"),
        ("b", lines("b")[:2], r"\d+"),
        ("a", lines("a", line_99='{"text": "another"}'), "100"),
    ],
    ids=["a line", "a line less", "cut short", "a file read whole"],
)
def test_what_was_read_must_be_the_same(tmp_path, folder, tokenizer, name, content, documents):
    stopped(tokenizer, tmp_path / "run", folder)
    write(folder, "b", lines("b"))
    write(folder, name, content)
    message = rf"'{name}\.jsonl' had .*: the first {documents} documents, which were read, are others than before"
    with pytest.raises(ValueError, match=message):
        run(tokenizer, tmp_path / "run", [f"{folder}/*.jsonl"], resume=True, accept_repaired_data=True)


def documents_of(tokenizer, seen):
    """Whole documents in the rows of all steps, one reader's."""
    ids = [token for step in seen for batch in step for row in batch for token in row]
    return tokenizer.decode(ids).split("<|endoftext|>")


@pytest.mark.parametrize("options", [{}, {"held_out": True}], ids=str)
def test_a_removed_file_leaves_the_others_to_be_read_once(tmp_path, folder, tokenizer, caplog, options):
    at = stopped(tokenizer, tmp_path / "run", folder, **options)
    (folder / "b.jsonl").unlink()
    files = [f"{folder}/*.jsonl"]
    with pytest.raises(ValueError, match=r"data file 'b\.jsonl' is gone: documents would be seen twice or never"):
        run(tokenizer, tmp_path / "run", files, resume=True, **options)
    resumed = run(tokenizer, tmp_path / "run", files, resume=True, accept_repaired_data=True, **options)
    assert re.search(r"'b\.jsonl' is gone; [1-9]\d* documents of it were read before", caplog.text)

    # What the run had seen at its last checkpoint is what an unbroken one has seen by then.
    write(folder, "b", lines("b"))
    whole = run(tokenizer, tmp_path / "whole", files, save_strategy="no", **options)
    before = documents_of(tokenizer, whole.seen[:at])
    kept = {
        text["text"]
        for text in (hold_out(find_files(files).documents(), 0.2)[0] if options else find_files(files).documents())
    }
    seen = documents_of(tokenizer, whole.seen[:at] + resumed.seen)
    first_pass = list(itertools.takewhile(lambda text: text.startswith(("a ", "b ", "c ")), seen))
    first_pass = first_pass[: sum(not text.startswith("b ") for text in kept) + sum(t.startswith("b ") for t in before)]
    others = [text for text in first_pass if text.startswith(("a ", "c ")) and text in kept]
    assert sorted(others) == sorted(text for text in kept if not text.startswith("b "))  # each once, none twice
    assert {text for text in seen if text.startswith("b ")} <= set(before)
    (folder / "b.jsonl").unlink()
    run(tokenizer, tmp_path / "run", files, resume=True, **{**options, "max_steps": 57})  # known to be gone


def test_a_removed_file_is_refused_where_readers_share_files(tmp_path, folder, tokenizer):
    options = {"dataloader_num_workers": 5}
    stopped(tokenizer, tmp_path / "run", folder, **options)
    (folder / "b.jsonl").unlink()
    with pytest.raises(ValueError, match=r"'b\.jsonl' is gone: \d+ documents of it were read, and with fewer files"):
        run(tokenizer, tmp_path / "run", [f"{folder}/*"], resume=True, accept_repaired_data=True, **options)


@pytest.mark.parametrize("patterns", ["{}/*/x.jsonl", "{}/2/x.jsonl {}/1/x.jsonl"])
def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path, tokenizer, patterns):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in (("1", "a"), ("2", "b")):
        write(folder, name, lines(name))
        (folder / number).mkdir()
        (folder / f"{name}.jsonl").rename(folder / number / "x.jsonl")

    def started(**options):
        found = [pattern.format(folder) for pattern in patterns.split()]
        return run(tokenizer, tmp_path / "run", found, save_steps=5, **options)

    started(max_steps=5)
    names = [name for name, *_ in recorded_data(tmp_path / "run" / "checkpoint-5")["source"]["files"]]
    assert sorted(names) == ["1/x.jsonl", "2/x.jsonl"]
    for swapped in (True, False):  # there and back
        os.rename(folder / "1", folder / "3")
        os.rename(folder / "2", folder / "1")
        os.rename(folder / "3", folder / "2")
        if swapped:
            with pytest.raises(ValueError, match=r"data file '[12]/x\.jsonl' had \[\d+, \d+\]"):
                started(resume=True, max_steps=6)
            with pytest.raises(ValueError, match=r"documents, which were read, are others than before"):
                started(resume=True, max_steps=6, accept_repaired_data=True)
    started(resume=True, max_steps=10)


def test_a_folder_may_be_moved_and_files_given_in_another_order(tmp_path, folder, tokenizer):
    whole = run(tokenizer, tmp_path / "whole", [f"{folder}/*.jsonl"], max_steps=10)
    run(tokenizer, tmp_path / "run", [f"{folder}/*.jsonl"], max_steps=5)
    shutil.move(folder, tmp_path / "elsewhere")
    patterns = [str(tmp_path / "elsewhere" / f"{name}.jsonl") for name in "cab"]
    resumed = run(tokenizer, tmp_path / "run", patterns, resume=True, max_steps=10)
    assert resumed.seen == whole.seen[5:]
    write(tmp_path / "elsewhere", "a", lines("a"))
    (tmp_path / "elsewhere" / "d.jsonl").write_text('{"text": "new"}\n')
    with pytest.raises(ValueError, match=r"checkpoint-10: data file 'd\.jsonl' is new: documents would be seen twice"):
        run(tokenizer, tmp_path / "run", [f"{tmp_path}/elsewhere/*"], resume=True, accept_repaired_data=True)


def test_a_change_of_one_byte_anywhere_in_a_file_is_seen(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(300_000))
    before = find_files([str(path)]).fingerprint
    assert before == find_files([str(path)]).fingerprint
    for place in (0, 150_001, 299_999):
        content = bytearray(300_000)
        content[place] = 1
        path.write_bytes(content)
        assert find_files([str(path)]).fingerprint != before


def test_large_files_are_sampled_at_both_ends_and_between(tmp_path, monkeypatch):
    monkeypatch.setattr("xdlm_hf.data.source_files._SAMPLE", 10)
    monkeypatch.setattr("xdlm_hf.data.source_files._SAMPLES", 4)
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(100))
    before, seen = find_files([str(path)]).fingerprint["files"], []
    for place in range(100):
        content = bytearray(100)
        content[place] = 1
        path.write_bytes(content)
        if find_files([str(path)]).fingerprint["files"] != before:
            seen.append(place)
    assert seen == [*range(10), *range(30, 40), *range(60, 70), *range(90, 100)]


def test_a_file_given_twice_is_refused(tmp_path, folder):
    path = str(folder / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl' is given twice: its text would be read twice in each pass"):
        find_files([path, f"{folder}/*"])
    (folder / "z.jsonl").symlink_to(path)
    with pytest.raises(ValueError, match=r"z\.jsonl' is given twice, also as '.*a\.jsonl'"):
        find_files([f"{folder}/*"])
    with pytest.raises(ValueError, match="data_files names no file"):
        find_files([])
