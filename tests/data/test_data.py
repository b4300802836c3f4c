"""Readers, packing, sharding, the tokenizer and the collator."""

import gzip
import json
import logging
from pydoc_data.topics import topics
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader

from xdlm_hf.data.collator import DiffusionCollator
from xdlm_hf.data.packing import PackedDataset
from xdlm_hf.data.readers import hold_out, load_documents, python_reference_documents
from xdlm_hf.data.stream import PackedStream
from xdlm_hf.data.tokenizer import MASK, SPECIAL_TOKENS, check_tokenizer, train_tokenizer

TEXTS = [f"Document {i} says: " + "word " * (i % 7) + f"end {i}." for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


def as_documents(texts, num_shards=1):
    return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=num_shards)


def expected_tokens(tokenizer, texts):
    """Documents end to end, each followed by end-of-text: the plain computation that packing must equal."""
    ids = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids.append(tokenizer.eos_token_id)
    return ids


def flatten(rows):
    return [token for row in rows for token in row["input_ids"].tolist()]


def split_documents(tokenizer, ids):
    """Texts between the separators."""
    texts, current = [], []
    for token in ids:
        if token == tokenizer.eos_token_id:
            texts.append(tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    assert not current, "tokens after the last separator"
    return texts


# --------------------------------------------------------------------------------------------------------------------
# Tokenizer


def test_tokenizer_has_lladas_special_tokens_and_round_trips_any_text(tokenizer, tmp_path):
    assert tokenizer.convert_ids_to_tokens(range(6)) == list(SPECIAL_TOKENS)
    assert tokenizer.mask_token == "<|mdm_mask|>" and tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert len(tokenizer) <= 300
    text = "naïve\n\tπ 木 \U0001f600 def f(x):  return x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.mask_token_id == 5


def test_chat_template_frames_turns(tokenizer):
    messages = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes"}]
    rendered = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == rendered + "Yes<|eot_id|>"


def test_tokenizer_needs_room_for_bytes():
    with pytest.raises(ValueError, match="vocab_size=100 must be at least 262"):
        train_tokenizer(TEXTS, vocab_size=100)


def test_tokenizer_must_agree_with_the_model(tokenizer):
    check_tokenizer(tokenizer, SimpleNamespace(vocab_size=300, mask_token_id=5))
    check_tokenizer(tokenizer, SimpleNamespace(vocab_size=262, output_rows=300, mask_token_id=5))
    with pytest.raises(ValueError, match=r"mask token '<\|mdm_mask\|>' has id 5, .*mask_token_id is 7"):
        check_tokenizer(tokenizer, SimpleNamespace(vocab_size=300, mask_token_id=7))
    with pytest.raises(ValueError, match=f"the tokenizer has {len(tokenizer)} tokens .* 280 rows"):
        check_tokenizer(tokenizer, SimpleNamespace(vocab_size=280, mask_token_id=5))


# --------------------------------------------------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize("length", [1, 7, 64, 10_000])
def test_packing_loses_nothing_and_separates_documents(tokenizer, length):
    rows = list(PackedDataset(as_documents(TEXTS), tokenizer, length))
    assert flatten(rows) == expected_tokens(tokenizer, TEXTS)
    assert [len(row["input_ids"]) for row in rows[:-1]] == [length] * (len(rows) - 1)
    assert 0 < len(rows[-1]["input_ids"]) <= length
    assert split_documents(tokenizer, flatten(rows)) == TEXTS


def test_packing_crosses_the_tokenizer_batch_of_256_documents(tokenizer):
    texts = [f"text {i}" for i in range(600)]
    assert split_documents(tokenizer, flatten(PackedDataset(as_documents(texts), tokenizer, 11))) == texts


def test_packed_dataset_indexing_and_row_limit(tokenizer):
    packed = PackedDataset(datasets.Dataset.from_dict({"text": TEXTS}), tokenizer, 16, max_rows=3)
    assert len(packed) == 3 and flatten(packed) == expected_tokens(tokenizer, TEXTS)[:48]
    assert packed[-1]["input_ids"].tolist() == packed[2]["input_ids"].tolist()
    with pytest.raises(IndexError):
        packed[3]


def test_special_tokens_in_text_are_text(tokenizer):
    text = f"a{MASK}b<|endoftext|>c"
    ids = flatten(PackedDataset(as_documents([text]), tokenizer, 100))
    assert tokenizer.mask_token_id not in ids and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == text


def test_empty_documents_are_skipped_and_counted(tokenizer, caplog):
    texts = ["one", "", "two", "  \n", None, "three"]
    with caplog.at_level(logging.WARNING):
        packed = PackedDataset(as_documents(texts), tokenizer, 8)
    assert split_documents(tokenizer, flatten(packed)) == ["one", "two", "three"]
    assert "skipped 3 empty documents of 6" in caplog.text


@pytest.mark.parametrize("packing", [PackedDataset, PackedStream])
def test_packing_refuses_bad_documents(tokenizer, packing):
    def read(data, keep=True, **kwargs):
        documents = datasets.Dataset.from_dict(data).to_iterable_dataset().filter(lambda row: keep)
        list(packing(documents, tokenizer, 8, **kwargs))

    with pytest.raises(ValueError, match=r"no column 'text'; it has \['body', 'url'\]"):
        read({"body": ["x"], "url": ["y"]})
    with pytest.raises(ValueError, match="column 'text' holds no text: all 2 documents are empty"):
        read({"text": ["", "  "]})
    with pytest.raises(ValueError, match="no document to read"):
        read({"text": ["x"]}, keep=False)
    with pytest.raises(ValueError, match="document 1: column 'id' holds int 6, not text"):
        read({"id": [6, 7]}, text_column="id")
    with pytest.raises(ValueError, match="row length 0 must be positive"):
        packing(as_documents(TEXTS), tokenizer, 0)


def test_a_slow_path_that_yields_the_mask_id_is_refused(tokenizer):
    class Naive:
        """A tokenizer that ignores split_special_tokens."""

        eos_token_id, mask_token_id, mask_token = 1, 5, MASK

        def __call__(self, texts, **kwargs):
            return {"input_ids": [[9, 5, 9] for _ in texts]}

    with pytest.raises(ValueError, match=r"encodes to the mask token '<\|mdm_mask\|>'"):
        PackedDataset(as_documents(["x"]), Naive(), 8)


# --------------------------------------------------------------------------------------------------------------------
# Streams: every document goes to exactly one rank and worker


@pytest.mark.parametrize("num_shards", [1, 3, 8])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2)])
def test_stream_deals_each_document_to_one_reader(tokenizer, num_shards, world_size, workers):
    found = []
    for rank in range(world_size):
        stream = PackedStream(
            as_documents(TEXTS, num_shards), tokenizer, 1, rank=rank, world_size=world_size, repeat=False
        )
        # Rows of one token: a worker's documents stay in order, and batches of one interleave the workers.
        per_worker: dict[int, list[int]] = {}
        if workers:
            for row in DataLoader(WithWorkerId(stream), batch_size=None, num_workers=workers):
                per_worker.setdefault(row["worker"], []).append(int(row["input_ids"]))
            assert len(per_worker) == workers, "a worker read nothing"
        else:
            per_worker[0] = flatten(stream)
        for ids in per_worker.values():
            found += split_documents(tokenizer, ids)
    assert sorted(found) == sorted(TEXTS)


class WithWorkerId(torch.utils.data.IterableDataset):
    def __init__(self, stream):
        self.stream = stream

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        for row in self.stream:
            yield {**row, "worker": info.id}


def test_stream_equals_map_style_packing_on_one_reader(tokenizer):
    stream = PackedStream(as_documents(TEXTS), tokenizer, 16, repeat=False)
    packed = PackedDataset(as_documents(TEXTS), tokenizer, 16)
    assert [row["input_ids"].tolist() for row in stream] == [row["input_ids"].tolist() for row in packed]


def test_repeating_stream_carries_the_tail_over_and_reshuffles(tokenizer):
    once = expected_tokens(tokenizer, TEXTS)
    rows = iter(PackedStream(as_documents(TEXTS), tokenizer, 16))
    ids = flatten(next(rows) for _ in range(2 * len(once) // 16))
    assert ids == (once * 2)[: len(ids)]

    shuffled = PackedStream(as_documents(TEXTS), tokenizer, 1, shuffle_seed=0)
    ids = flatten(row for row, _ in zip(shuffled, range(2 * len(once)), strict=False))
    first, second = (split_documents(tokenizer, part) for part in (ids[: len(once)], ids[len(once) :]))
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert first != second and first != TEXTS


def test_stream_refuses_more_readers_than_documents_and_bad_ranks(tokenizer):
    stream = PackedStream(as_documents(TEXTS[:2]), tokenizer, 4, rank=2, world_size=3)
    with pytest.raises(ValueError, match="fewer documents than readers"):
        next(iter(stream))
    with pytest.raises(ValueError, match=r"rank=2 must lie in \[0, world_size=2\)"):
        PackedStream(as_documents(TEXTS), tokenizer, 4, rank=2, world_size=2)


# --------------------------------------------------------------------------------------------------------------------
# Readers


def test_local_files_of_every_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "extra": 1}\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "thrée"}) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["four", "five"], "id": [1, 2]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("six\nstill six")
    documents = load_documents(data_files=[str(tmp_path / "[abc].*"), str(tmp_path / "d.txt")])
    assert [d["text"] for d in documents] == ["one", "two", "thrée", "four", "five", "six\nstill six"]
    assert documents.num_shards == 4


def test_text_column_may_have_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    documents = load_documents(data_files=[str(tmp_path / "a.jsonl")], text_column="body")
    assert list(documents) == [{"text": "one"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}\n{"text": "tw', r"a\.jsonl, line 2: not valid JSON"),
        ('{"text": "one"}\n[1]\n', r"a\.jsonl, line 2: expected a JSON object, got list"),
        ('{"text": "one"}\n{"body": "x"}\n', r"a\.jsonl, line 2: no column 'text'; it has \['body'\]"),
        (b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not valid JSON"),
        (r'{"text": "half a pair \uD83d"}', r"a\.jsonl, line 1: not valid JSON \(.*surrogates not allowed\)"),
        ('{"text": "one"}\n' + "[" * 100_000, r"a\.jsonl, line 2: not valid JSON \(maximum recursion depth"),
        ('{"text": ["x"]}\n', r"a\.jsonl, line 1: 'text' holds list, not text"),
    ],
)
def test_corrupted_jsonl_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(load_documents(data_files=[str(path)]))


def test_whole_surrogate_pairs_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a \ud83d\ude00"}')
    assert list(load_documents(data_files=[str(tmp_path / "a.jsonl")])) == [{"text": "a \U0001f600"}]


def test_corrupted_jsonl_is_named_through_a_worker_too(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{oops\n')
    stream = PackedStream(load_documents(data_files=[str(tmp_path / "a.jsonl")]), tokenizer, 4)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not valid JSON"):
        list(DataLoader(stream, batch_size=None, num_workers=1))


@pytest.mark.parametrize("shards", [1, 2])
def test_corrupted_lines_are_skipped_only_when_asked_for_and_counted(tmp_path, caplog, shards):
    lines = ['{"text": "one"}', "{oops", '{"text": 3}', '{"text": "two"}', '{"body": "x"}', '{"text": "three']
    for shard in range(shards):
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(lines))
    files = [str(tmp_path / "*.jsonl")]
    with pytest.raises(
        ValueError, match=r"0\.jsonl, line 2: not valid JSON .*; repair or remove .* skip_corrupted such"
    ):
        list(load_documents(data_files=files))
    with caplog.at_level(logging.WARNING, "xdlm_hf.data.readers"):
        documents = load_documents(data_files=files, skip_corrupted=True)
        assert [d["text"] for d in documents] == ["one", "two"] * shards and documents.num_shards == shards
    for shard in range(shards):
        assert f"{shard}.jsonl: skipped 4 corrupted lines (2, 3, 5, 6)" in caplog.text
    with pytest.raises(ValueError, match="skip_corrupted=True is for the lines of local JSONL files"):
        load_documents(str(tmp_path), skip_corrupted=True)


def test_skipped_lines_are_counted_before_the_file_ends(tmp_path, caplog):
    """A stream with a number of steps may never come to the end of a file."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{oops\n' * 50)
    documents = iter(load_documents(data_files=[str(tmp_path / "a.jsonl")], skip_corrupted=True))
    assert len([next(documents) for _ in range(30)]) == 30
    assert [record.args[1] for record in caplog.records] == [1, 10]
    assert "skipped 10 corrupted lines (2, 4, 6," in caplog.text
    assert len(list(documents)) == 20
    assert [record.args[1] for record in caplog.records] == [1, 10, 50]


def test_damaged_files_are_named_even_when_lines_may_be_skipped(tmp_path):
    whole = gzip.compress(b'{"text": "one"}\n' * 100_000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, after line \d+: damaged gzip file"):
        list(load_documents(data_files=[str(tmp_path / "a.jsonl.gz")], skip_corrupted=True))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then something else")
    with pytest.raises(ValueError, match=r"a\.parquet: damaged Parquet file"):
        list(load_documents(data_files=[str(tmp_path / "a.parquet")], skip_corrupted=True))


def test_readers_refuse_bad_sources(tmp_path):
    with pytest.raises(ValueError, match=r"'.*none\*' matches no file"):
        load_documents(data_files=[str(tmp_path / "none*")])
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"a\.csv: unknown suffix"):
        load_documents(data_files=[str(tmp_path / "a.csv")])
    with pytest.raises(ValueError, match="give one of dataset and data_files, not dataset=None and"):
        load_documents()
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; it has \['body'\]"):
        list(load_documents(data_files=[str(tmp_path / "a.parquet")]))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8"):
        list(load_documents(data_files=[str(tmp_path / "a.txt")]))


def test_streamed_dataset_without_the_text_column(tmp_path):
    # A local folder goes through datasets.load_dataset(streaming=True) exactly as a Hub dataset does.
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", "y"], "id": [1, 2]}), tmp_path / "a.parquet")
    assert list(load_documents(str(tmp_path), text_column="body")) == [{"text": "x"}, {"text": "y"}]
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['body', 'id'\]"):
        load_documents(str(tmp_path))


def test_hold_out_is_disjoint_complete_and_a_function_of_the_text():
    train, validation = hold_out(as_documents(TEXTS + TEXTS), 0.3)
    train, validation = ([d["text"] for d in part] for part in (train, validation))
    assert sorted(train + validation) == sorted(TEXTS * 2)
    assert not set(train) & set(validation)  # copies stay together
    assert 0 < len(validation) < len(train)
    reverse = hold_out(as_documents(TEXTS[::-1], 4), 0.3)[1]
    assert sorted(d["text"] for d in reverse) == sorted(set(validation))
    with pytest.raises(ValueError, match=r"validation fraction 1\.5"):
        hold_out(as_documents(TEXTS), 1.5)


def test_python_reference_documents_are_python_documentation():
    documents = [d["text"] for d in python_reference_documents()]
    # In an order that nothing but the Python version decides: the topics by name, then the modules by file.
    assert documents[: len(topics)] == [topics[name] for name in sorted(topics)]
    top_level = [text.split("\n")[0].split(".")[0] for text in documents[len(topics) :]]
    assert top_level == sorted(top_level) and len(set(top_level)) > 100
    assert any(text.startswith('The "assert" statement') for text in documents)
    assert any(text.startswith("json\n\nJSON (JavaScript Object Notation)") for text in documents)
    joined = "\n".join(documents)
    assert "json.decoder.JSONDecoder\n\nSimple JSON" in joined
    assert len(joined) > 1_500_000 and all(text.strip() for text in documents)


# --------------------------------------------------------------------------------------------------------------------
# Collator


def test_collator_pads_without_scoring_the_padding():
    batch = DiffusionCollator(pad_token_id=1)([{"input_ids": [7, 8, 1]}, {"input_ids": torch.tensor([9])}])
    assert batch["input_ids"].tolist() == [[7, 8, 1], [9, 1, 1]]
    # The pad id inside a document is end-of-text and is scored; only positions past the row's end are not.
    assert batch["token_weights"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["noise_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in DiffusionCollator(1)([{"input_ids": [7, 8]}, {"input_ids": [9, 9]}])


@pytest.mark.parametrize("prompt", [{"labels": [-100, -100, 8]}, {"prompt_mask": [1, 1, 0]}])
def test_collator_protects_the_prompt(prompt):
    batch = DiffusionCollator(0, mask_token_id=5)([{"input_ids": [5, 7, 8], **prompt}])
    assert batch["noise_mask"].tolist() == [[False, False, True]]
    assert batch["token_weights"].tolist() == [[0, 0, 1]]


def test_collator_keeps_token_weights():
    batch = DiffusionCollator(0)([{"input_ids": [6, 7, 8], "token_weights": [0.5, 0, 2]}])
    assert batch["token_weights"].tolist() == [[0.5, 0, 2]] and batch["noise_mask"].all()


def test_collator_keeps_class_labels():
    rows = [{"input_ids": [7], "class_label": 2}, {"input_ids": [8], "class_label": None}, {"input_ids": [9]}]
    labels = DiffusionCollator(0, num_classes=3)(rows)["class_labels"]
    assert labels.tolist() == [2, 3, 3] and labels.dtype == torch.int64
    assert "class_labels" not in DiffusionCollator(0, num_classes=3)(rows[1:])
    with pytest.raises(ValueError, match="a row has class_label=2, but the model has no classes; remove the column"):
        DiffusionCollator(0)(rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"class_label": 3}, r"class_label=3; the model's classes are 0\.\.2"),
        ({"class_label": -1}, r"class_label=-1; the model's classes are 0\.\.2"),
        ({"class_label": 0.5}, "class_label=0.5; the model's classes"),
        ({"labels": [6, 7], "prompt_mask": [0, 0]}, "both labels and prompt_mask"),
        ({"labels": [7, 8]}, "labels must repeat input_ids or be -100"),
        ({"labels": [6]}, "labels has 1 entries, input_ids 2"),
        ({"token_weights": [-1, 1]}, "must not be negative"),
        ({"labels": [-100, 7], "token_weights": [1, 1]}, "must be 0 on the prompt"),
        ({"input_ids": [6, 5]}, r"holds the mask token \(id 5\)"),
    ],
)
def test_collator_refuses_inconsistent_rows(row, message):
    with pytest.raises(ValueError, match=message):
        DiffusionCollator(0, mask_token_id=5, num_classes=3)([{"input_ids": [6, 7], **row}])
