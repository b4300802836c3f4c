"""Rows of conversations: what is prompt, what is answer, what ends it, and which records are refused."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

from xdlm_hf.data.collator import DiffusionCollator
from xdlm_hf.data.conversations import (
    ConversationDataset,
    ConversationFormat,
    hold_out_records,
    load_conversations,
    messages_of,
    set_chat_template,
)
from xdlm_hf.data.tokenizer import CHAT_TEMPLATE, train_tokenizer

TWO_TURNS = [
    {"role": "user", "content": "Which dog?"},
    {"role": "assistant", "content": "The brown one."},
    {"role": "user", "content": "And which fox?"},
    {"role": "assistant", "content": "The quick one, of course."},
    {"role": "user", "content": "Thanks."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([message["content"] for message in TWO_TURNS] * 3, 300)


def dataset(tokenizer, *records, length=200, drop_unusable=False, **form):
    numbered = [(f"row {number}", record) for number, record in enumerate(records)]
    return ConversationDataset(numbered, tokenizer, ConversationFormat(length, **form), drop_unusable)


def parts(row, tokenizer):
    return tuple(tokenizer.decode(row["input_ids"][mask]) for mask in (row["prompt_mask"], ~row["prompt_mask"]))


def question(content="Which dog?", answer="The brown one."):
    return {"prompt": content, "completion": answer}


# --------------------------------------------------------------------------------------------------------------------
# Rows


def test_each_answer_becomes_a_row_that_ends_with_it(tokenizer):
    rows = dataset(tokenizer, {"messages": TWO_TURNS})
    assert len(rows) == 2
    start = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWhich dog?<|eot_id|>"
    ask = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert parts(rows[0], tokenizer) == (start + ask, "The brown one.<|eot_id|><|endoftext|>")
    prompt, answer = parts(rows[-1], tokenizer)
    assert prompt.startswith(start + ask + "The brown one.<|eot_id|>") and prompt.endswith("fox?<|eot_id|>" + ask)
    assert answer == "The quick one, of course.<|eot_id|><|endoftext|>"
    last = dataset(tokenizer, {"messages": TWO_TURNS}, turns="last")
    assert len(last) == 1 and torch.equal(last[0]["input_ids"], rows[1]["input_ids"])
    # The prompt is token for token what the model is asked with.
    asked = tokenizer.apply_chat_template(TWO_TURNS[:3], add_generation_prompt=True, return_dict=False)
    assert rows[1]["input_ids"][rows[1]["prompt_mask"]].tolist() == asked
    with pytest.raises(IndexError, match="row 2 of 2"):
        rows[2]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TWO_TURNS[:2]},
        question(),
        {"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:2]},
        {"prompt": "kept beside the messages, as in UltraChat", "messages": TWO_TURNS[:2]},
    ],
    ids=["messages", "texts", "messages apart", "both"],
)
def test_records_of_every_shape_make_the_same_row(tokenizer, record):
    (row,) = dataset(tokenizer, record)
    (expected,) = dataset(tokenizer, {"messages": TWO_TURNS[:2]})
    assert torch.equal(row["input_ids"], expected["input_ids"])


@pytest.mark.parametrize(("eos_in_loss", "count"), [("none", 0), ("one", 1), ("all", None)])
def test_end_of_text_in_the_loss_is_a_choice(tokenizer, eos_in_loss, count):
    (row,) = dataset(tokenizer, question(), length=60, eos_in_loss=eos_in_loss)
    (bare,) = dataset(tokenizer, question(), length=60, eos_in_loss="none")
    count = 60 - len(bare["input_ids"]) if count is None else count
    assert row["input_ids"].tolist() == bare["input_ids"].tolist() + [tokenizer.eos_token_id] * count
    assert not row["prompt_mask"][len(bare["input_ids"]) :].any()
    assert torch.equal(row["prompt_mask"][: len(bare["input_ids"])], bare["prompt_mask"])


@pytest.mark.parametrize(("weighting", "total"), [("rows", 1.0), ("tokens", None)])
def test_rows_or_tokens_weigh_alike(tokenizer, weighting, total):
    rows = dataset(tokenizer, {"messages": TWO_TURNS}, loss_weighting=weighting)
    batch = DiffusionCollator(tokenizer.pad_token_id, tokenizer.mask_token_id)([rows[0], rows[1]])
    answers = batch["noise_mask"].sum(1)
    assert answers[0] != answers[1]
    expected = answers.float() if total is None else torch.ones(2)
    torch.testing.assert_close(batch["token_weights"].sum(1), expected)
    assert (batch["token_weights"][~batch["noise_mask"]] == 0).all()
    padding = batch["attention_mask"] == 0
    assert padding.any() and not batch["noise_mask"][padding].any()


def test_a_long_answer_is_cut_and_counted(tokenizer, caplog):
    (whole,) = dataset(tokenizer, question())
    prompt = int(whole["prompt_mask"].sum())
    rows = dataset(tokenizer, question(), length=prompt + 2)
    assert torch.equal(rows[0]["input_ids"], whole["input_ids"][: prompt + 2])  # no end is taught where there is none
    assert rows.truncated == 1 and f"cut the answers of 1 rows of 1 to length {prompt + 2}" in caplog.text


def test_fingerprint_tells_rows_apart(tokenizer):
    fingerprints = [
        dataset(tokenizer, *records, **form).fingerprint
        for records, form in (
            ([question()], {}),
            ([question(answer="The other.")], {}),
            ([question()], {"eos_in_loss": "none"}),
            ([question()], {"loss_weighting": "tokens"}),
        )
    ]
    assert len({json.dumps(fingerprint) for fingerprint in fingerprints}) == 4
    assert fingerprints[0] == dataset(tokenizer, question()).fingerprint


# --------------------------------------------------------------------------------------------------------------------
# Refusals


UNUSABLE = [
    ({"text": "plain"}, r"row 1: neither messages nor prompt and completion; it has \['text'\]"),
    ({"messages": []}, "row 1: messages must be a list of objects with the texts role and content"),
    ({"messages": [{"role": "user", "content": 3}]}, "row 1: messages must be a list of objects"),
    ({"messages": [{"role": "assistant", "content": "Hi."}]}, "row 1: the first message is an answer, with no prompt"),
    ({"messages": TWO_TURNS[:1]}, "row 1: no message has the role 'assistant', so there is no answer"),
    (question("<|eot_id|> hello"), r"row 1: a message spells the special token '<\|eot_id\|>'"),
    (question(answer="a <|mdm_mask|>"), r"row 1: a message spells the special token '<\|mdm_mask\|>'"),
    (
        question("Which dog? " * 40),
        r"row 1: a prompt of \d+ tokens and an answer of \d+ leave nothing to learn in a row",
    ),
]


@pytest.mark.parametrize(("record", "message"), UNUSABLE)
def test_unusable_rows_are_errors_that_name_them_or_are_dropped_and_counted(tokenizer, record, message, caplog):
    records = [question(), record, question(answer="Another.")]
    with pytest.raises(ValueError, match=message):
        dataset(tokenizer, *records, length=60)
    kept = dataset(tokenizer, *records, length=60, drop_unusable=True)
    assert len(kept) == 2 and len(kept.dropped) == 1
    assert "left out 1 unusable rows: row 1: " in caplog.text
    with pytest.raises(ValueError, match="there is no row to train on; 1 were unusable"):
        dataset(tokenizer, record, length=60, drop_unusable=True)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"turns": "first"}, "turns='first' is not known; choose one of each, last"),
        ({"eos_in_loss": "some"}, "eos_in_loss='some' is not known; choose one of none, one, all"),
        ({"loss_weighting": "equal"}, "loss_weighting='equal' is not known; choose one of rows, tokens"),
        ({"length": 0}, "row length 0 must be positive"),
    ],
)
def test_unknown_forms_are_refused(form, message):
    with pytest.raises(ValueError, match=message):
        ConversationFormat(**{"length": 10, **form})


def test_chat_templates(tokenizer, tmp_path):
    bare = train_tokenizer(["text"], 262)
    bare.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template: give chat_template, 'llada' or a file"):
        dataset(bare, question())
    with pytest.raises(ValueError, match=r"chat_template='gone\.jinja' is neither 'llada' nor a file"):
        set_chat_template(bare, "gone.jinja")
    set_chat_template(bare, "llada")
    assert bare.chat_template == CHAT_TEMPLATE
    (tmp_path / "odd.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}Say: {% endif %}"
    )
    set_chat_template(bare, str(tmp_path / "odd.jinja"))
    with pytest.raises(ValueError, match="row 0: the chat template does not continue its own generation prompt"):
        dataset(bare, question())
    (tmp_path / "strict.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    set_chat_template(bare, str(tmp_path / "strict.jinja"))
    with pytest.raises(ValueError, match=r"row 0: the chat template refuses the messages \(roles must alternate\)"):
        dataset(bare, question())


# --------------------------------------------------------------------------------------------------------------------
# Reading


def test_files_of_every_kind_are_read_in_order(tmp_path):
    first, second, third = ({"messages": TWO_TURNS[:2], "id": i} for i in range(3))
    (tmp_path / "a.jsonl").write_text(json.dumps(first) + "\n\n" + json.dumps(second) + "\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps(third) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([first, second]), tmp_path / "c.parquet")
    read = list(load_conversations(data_files=[str(tmp_path / "*")]))
    assert [record["id"] for _, record in read] == [0, 1, 2, 0, 1]
    assert [where.rsplit("/")[-1] for where, _ in read] == [
        "a.jsonl, line 1",
        "a.jsonl, line 3",
        "b.jsonl.gz, line 1",
        "c.parquet, row 0",
        "c.parquet, row 1",
    ]
    assert all(messages_of(record, "") == TWO_TURNS[:2] for _, record in read)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", r"a\.jsonl, line 1: not valid JSON \(.*\); repair or remove the line"),
        ("a.jsonl", "[1]", r"a\.jsonl, line 1: expected a JSON object, got list"),
        ("a.parquet", "nothing", r"a\.parquet: damaged Parquet file"),
        ("a.txt", "Hello", r"a\.txt: conversations are read from \.jsonl and \.parquet files"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(load_conversations(data_files=[str(tmp_path / name)]))


def test_one_source_is_needed():
    with pytest.raises(ValueError, match="give one of dataset and data_files, not dataset=None and data_files=None"):
        load_conversations()


def test_records_are_held_out_by_their_content():
    records = [(f"row {i}", question(f"Question {i}?")) for i in range(400)]
    kept, held_out = (list(hold_out_records(records, 0.25, held)) for held in (False, True))
    assert sorted(kept + held_out, key=lambda pair: int(pair[0][4:])) == records
    assert 60 < len(held_out) < 140
    moved = [(f"moved {i}", record) for i, (_, record) in enumerate(reversed(records))]
    assert [r for _, r in hold_out_records(moved, 0.25, True)] == [r for _, r in reversed(held_out)]
    assert list(hold_out_records(records, 0.0, False)) == records
    with pytest.raises(ValueError, match=r"validation fraction 1 must lie in \[0, 1\)"):
        hold_out_records(records, 1, True)
