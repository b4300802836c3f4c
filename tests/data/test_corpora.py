"""The paper's corpora: detokenizers and cutting against the released code, tokenizers, local files, errors."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xdlm_hf.data import corpora, text8
from xdlm_hf.data.corpora import CORPORA, ZERO_SHOT, corpus_rows, corpus_stream, load_corpus
from xdlm_hf.data.detokenizers import DETOKENIZERS
from xdlm_hf.data.packing import PackedDataset
from xdlm_hf.data.text8 import ALPHABET, as_text8, text8_documents, text8_tokenizer
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.data.wrapping import WrappedDataset, WrappedStream, set_boundary_tokens, wrap

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny-dit" / "expected.json"
EXPECTED = json.loads(FIXTURE.read_text(encoding="utf-8"))
PAIRS = [(name, pair["in"], pair["out"]) for name, pairs in EXPECTED["detokenizers"].items() for pair in pairs]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def word_tokenizer(**names):
    """Ids 0 to 9 are the words, 10 [CLS], 11 [SEP], 12 [UNK]; like BERT's, it puts [CLS] and [SEP] around a text."""
    vocab = {word: number for number, word in enumerate([*WORDS, "[CLS]", "[SEP]", "[UNK]"])}
    backend = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 11), ("[CLS]", 10))
    names = names or {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **names)


def documents(*texts):
    return datasets.Dataset.from_dict({"text": list(texts)})


def text_of(numbers):
    return " ".join(WORDS[number] for number in numbers)


def rows_of(data):
    return [data[index]["input_ids"].tolist() for index in range(len(data))]


# --------------------------------------------------------------------------------------------------------------------
# Against the released code


@pytest.mark.parametrize(("name", "text", "expected"), PAIRS)
def test_detokenizers_give_the_recorded_text(name, text, expected):
    assert DETOKENIZERS[name](text) == expected


def test_rows_are_cut_as_recorded():
    case = EXPECTED["group_texts"]
    ids = np.concatenate([np.array(document) for document in case["input_ids"]])
    rows, rest = wrap(ids, case["block_size"], case["bos"], case["eos"])
    assert rows.tolist() == case["rows"]
    assert rest.tolist() == ids[-3:].tolist()  # 15 tokens, three pieces of 4


def test_text8_tokenizer_has_the_recorded_vocabulary(tmp_path):
    text8_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__module__.startswith("transformers.")  # no class of this package, no remote code
    recorded = EXPECTED["text8_tokenizer"]
    vocab = recorded["vocab"]
    assert tokenizer.get_vocab() == vocab and len(tokenizer) == recorded["len"]
    assert tokenizer.mask_token_id == 4 and tokenizer.decode([27, 22, 34, 9]) == "to b"
    assert tokenizer("to be 7")["input_ids"] == [*(vocab[sign] for sign in "to be "), vocab["[UNK]"]]


def test_text8_tokenizer_keeps_every_character():
    tokenizer = text8_tokenizer()
    text = "the  quick brown fox  jumps over a lazy dog "  # two blanks stay two, one at the end stays
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer("AbC")["input_ids"] == tokenizer("abc")["input_ids"]
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {2, 3, 5}


# --------------------------------------------------------------------------------------------------------------------
# Rows


def test_rows_have_boundary_tokens_and_lose_nothing():
    tokenizer = set_boundary_tokens(word_tokenizer())
    data = WrappedDataset(documents("one two three", " ", "four", "five six seven eight"), tokenizer, 6)
    # 8 words and an [SEP] after each of the three documents, four a row; the last row is shorter.
    assert rows_of(data) == [[10, 1, 2, 3, 11, 11], [10, 4, 11, 5, 6, 11], [10, 7, 8, 11, 11]]
    assert data.counts == {"documents": 4, "text_tokens": 11, "dropped_tokens": 0, "rows": 3}
    assert data.fingerprint["crc32"] == zlib.crc32(np.concatenate(rows_of(data)).astype(np.int32).tobytes())


def test_rows_without_eos_between_documents():
    tokenizer = set_boundary_tokens(word_tokenizer())
    data = WrappedDataset(documents("one two three", "four"), tokenizer, 4, insert_eos=False)
    assert rows_of(data) == [[10, 1, 2, 11], [10, 3, 4, 11]]


def test_rows_without_boundaries_are_text_alone():
    tokenizer = set_boundary_tokens(word_tokenizer())
    data = WrappedDataset(documents("one two three", "four"), tokenizer, 3, insert_eos=False, boundaries=False)
    assert rows_of(data) == [[1, 2, 3], [4]]


def test_released_rows_join_a_thousand_documents_and_drop_the_rest():
    tokenizer = set_boundary_tokens(word_tokenizer(), released=True)
    texts = [text_of([number % 10]) for number in range(1003)]
    texts[5] = ""  # counted among the thousand, though it has no token
    data = WrappedDataset(documents(*texts), tokenizer, 9, insert_eos=False, released=True)
    # 999 tokens of the first thousand make 142 pieces of 7 and leave 5, the last three documents leave 3.
    assert data.counts == {"documents": 1003, "text_tokens": 1002, "dropped_tokens": 8, "rows": 142}
    numbers = [number % 10 for number in range(1000) if number != 5]
    assert rows_of(data)[-1] == [10, *numbers[141 * 7 : 142 * 7], 10]
    kept = WrappedDataset(documents(*texts), tokenizer, 9, insert_eos=False)
    assert kept.counts["dropped_tokens"] == 0 and len(kept) == 144


def test_max_rows_ends_reading():
    tokenizer = set_boundary_tokens(word_tokenizer())
    data = WrappedDataset(documents(*["one two three"] * 1000), tokenizer, 6, max_rows=3)
    assert len(data) == 3 and data.counts["documents"] == 256


def test_bert_takes_cls_for_eos_as_released():
    assert set_boundary_tokens(word_tokenizer()).eos_token == "[SEP]"
    tokenizer = set_boundary_tokens(word_tokenizer(), released=True)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("[CLS]", "[CLS]")
    data = WrappedDataset(documents("one two", "three"), tokenizer, 7, released=True)
    assert rows_of(data) == [[10, 1, 2, 10, 3, 10, 10]]


def test_a_tokenizer_with_bos_and_eos_stays_as_it_is():
    tokenizer = train_tokenizer(["some text"], 300)
    before = tokenizer.special_tokens_map
    assert set_boundary_tokens(tokenizer, released=True).special_tokens_map == before


def test_a_special_token_in_a_text_is_text():
    tokenizer = train_tokenizer(["some text"], 300)
    data = WrappedDataset(documents("<|endoftext|>"), tokenizer, 5, insert_eos=False)
    ids = data.tokens.tolist()
    assert tokenizer.eos_token_id not in ids[1:4] and tokenizer.decode(ids[1:4]) == "<|e"


ERRORS = [
    (lambda: set_boundary_tokens(bare_tokenizer()), "neither bos_token nor cls_token"),
    (lambda: WrappedDataset(documents("one"), word_tokenizer(), 5), "use set_boundary_tokens"),
    (lambda: WrappedDataset(documents("one"), set_boundary_tokens(word_tokenizer()), 2), "must be at least 3"),
    (
        lambda: WrappedDataset(documents("one", "two"), set_boundary_tokens(word_tokenizer()), 9),
        "2 documents of 4 tokens are less than one row of length 9; reduce",
    ),
    (
        lambda: WrappedDataset(documents("one"), set_boundary_tokens(word_tokenizer()), 9, released=True),
        "within one of the batches of 1000 documents",
    ),
]


def bare_tokenizer():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_rows_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def stream(tokenizer, texts, length=6, **options):
    return WrappedStream(documents(*texts).to_iterable_dataset(2), tokenizer, length, repeat=False, **options)


def test_a_stream_has_boundary_tokens_and_goes_on_exactly():
    tokenizer = set_boundary_tokens(word_tokenizer())
    texts = [text_of([(3 * i + j) % 10 for j in range(1 + i % 4)]) for i in range(30)]
    read = list(stream(tokenizer, texts).read())
    whole = [row["input_ids"].tolist() for row, _ in read]
    assert all(row[0] == 10 and row[-1] == 11 for row in whole) and {len(row) for row in whole[:-1]} == {6}
    packed = PackedDataset(documents(*texts), tokenizer, 4)
    assert [token for row in whole for token in row[1:-1]] == packed.tokens.tolist()
    state = json.loads(json.dumps(read[7][1]))
    rest = [row["input_ids"].tolist() for row, _ in stream(tokenizer, texts).read(state=state)]
    assert rest == whole[8:]


def test_streams_with_other_boundaries_are_told_apart():
    texts = ["one two three", "four"]
    ours = stream(set_boundary_tokens(word_tokenizer()), texts).fingerprint
    assert ours["length"] == 6 and ours["boundaries"] == [10, 11]
    assert stream(set_boundary_tokens(word_tokenizer(), released=True), texts).fingerprint != ours


# --------------------------------------------------------------------------------------------------------------------
# Corpora from local files


def write(path, rows, column="text"):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({column: rows}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return [str(path)]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_local_files_stand_in_and_are_detokenized(tmp_path, suffix):
    text = "It 's the end , is n't it ?"
    files = write(tmp_path / f"file{suffix}", [text, text])
    assert [row["text"] for row in load_corpus("lm1b", data_files=files)] == [DETOKENIZERS["lm1b"](text)] * 2


def test_lines_of_wikitext_keep_their_ends(tmp_path):
    files = write(tmp_path / "wiki.txt", [" = A title = ", " Text , more . "])
    assert [row["text"] for row in load_corpus("wikitext", data_files=files)] == [" = A title =\n", " Text, more.\n"]


def test_a_file_of_a_corpus_of_long_documents_is_one_document(tmp_path):
    files = write(tmp_path / "page.txt", ["one", "two"])
    assert [row["text"] for row in load_corpus("openwebtext", data_files=files)] == ["one\ntwo\n"]


def test_a_corpus_has_its_own_column(tmp_path):
    files = write(tmp_path / "ptb.jsonl", ["mr. smith 's N N shares"], column="sentence")
    assert [row["text"] for row in load_corpus("ptb", data_files=files)] == ["mr. smith's 1 1 shares"]
    with pytest.raises(ValueError, match="no column 'text'.*Set text_column"):
        list(load_corpus("ptb", data_files=files, text_column="text"))


def test_missing_texts_stay_missing(tmp_path):
    files = write(tmp_path / "some.parquet", ["a", None])
    assert [row["text"] for row in load_corpus("lm1b", data_files=files)] == ["a", None]


def test_evaluation_parts_have_no_eos_as_released(tmp_path):
    files = write(tmp_path / "lm1b.txt", ["one two", "three four"] * 3)
    plain, released = (
        corpus_rows("lm1b", word_tokenizer(), 6, data_files=files, released=released) for released in (False, True)
    )
    assert rows_of(plain)[0] == [10, 1, 2, 11, 3, 11] and rows_of(released)[0] == [10, 1, 2, 3, 4, 10]
    train = corpus_rows("lm1b", word_tokenizer(), 6, "train", data_files=files, released=True)
    assert rows_of(train)[0] == [10, 1, 2, 10, 3, 10]
    chosen = corpus_rows("lm1b", word_tokenizer(), 6, data_files=files, insert_eos=False)
    assert rows_of(chosen)[0] == [10, 1, 2, 3, 4, 11]


def test_a_training_stream_reads_the_files_and_remembers_them(tmp_path):
    files = write(tmp_path / "lm1b.txt", ["one two", "three four"] * 3)
    rows = corpus_stream("lm1b", word_tokenizer(), 6, data_files=files, repeat=False)
    assert [row["input_ids"].tolist() for row in rows][0] == [10, 1, 2, 11, 3, 11]
    source = rows.fingerprint["source"]
    assert source["corpus"] == "lm1b" and source["files"] == [["lm1b.txt", 57, zlib.crc32(Path(files[0]).read_bytes())]]


def test_counts_and_checksum_are_printed(tmp_path, capsys):
    text8_tokenizer().save_pretrained(tmp_path / "tokenizer")
    files = write(tmp_path / "some.txt", ["some text, and more of it: 1 2 3"] * 40)
    corpora.main(["text8", "--tokenizer", "text8", "--length", "16", "--data_files", *files])
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == 4 and printed["tokens"] == printed["text_tokens"] and printed["length"] == 16
    arguments = ["--tokenizer", str(tmp_path / "tokenizer"), "--length", "16", "--data_files", *files]
    corpora.main(["text8", *arguments])
    assert json.loads(capsys.readouterr().out) == printed
    with pytest.raises(SystemExit, match="corpora: .*less than one row"):
        corpora.main(["ag_news", *arguments[:2], "--length", "9999", "--data_files", *files])


# --------------------------------------------------------------------------------------------------------------------
# text8


def test_text8_is_cut_into_its_parts(tmp_path):
    text = "".join(ALPHABET[number % 26] for number in range(10_000))
    file = tmp_path / "text8.txt"
    file.write_text(text)
    parts = {part: "".join(text8_documents(part, str(file))["text"]) for part in ("train", "validation", "test")}
    assert parts == {"train": text[:9000], "validation": text[9000:9500], "test": text[9500:]}
    assert {len(chunk) for chunk in text8_documents("train", str(file))["text"][:-1]} == {256}
    rows = corpus_rows("text8", text8_tokenizer(), 100, "train", data_files=[str(file)])
    assert len(rows) == 90 and text8_tokenizer().decode(rows.tokens) == text[:9000]
    # As released, a chunk of 256 is a document like any other: rows with [BOS] and [EOS] of 98 tokens.
    released = corpus_rows("text8", text8_tokenizer(), 100, "train", data_files=[str(file)], released=True)
    assert released[0]["input_ids"][0] == 2 and released[0]["input_ids"][-1] == 3
    assert len(released) == (9000 + 36) // 98 and released[2]["input_ids"][1 + 256 - 2 * 98] == 3


def test_other_text_is_brought_to_the_alphabet_of_text8():
    assert as_text8("One, two -- 3!\nFour") == "one two four"
    assert as_text8(text := "anarchism originated as a term ") == text


def test_text8_is_downloaded_once_unpacked(tmp_path, monkeypatch):
    (tmp_path / "text8").write_text("abc " * 100)
    archive = tmp_path / "text8.zip"
    subprocess.run([sys.executable, "-m", "zipfile", "-c", str(archive), str(tmp_path / "text8")], check=True)
    monkeypatch.setattr(text8, "TEXT8_URL", str(archive))
    assert "".join(text8_documents("test")["text"]) == "abc " * 5


def test_text8_refuses_other_tokenizers_and_files(tmp_path):
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    for file in files:
        Path(file).write_text("the end of the end " * 99)
    with pytest.raises(
        ValueError, match="encodes 94 characters of text8 as .* tokens, and the 27 characters of its alphabet as 27"
    ):
        corpus_rows("text8", train_tokenizer(["the end of the"] * 9, 270), 8, data_files=files[:1])
    with pytest.raises(ValueError, match="give one file, not 2"):
        load_corpus("text8", data_files=files)
    with pytest.raises(ValueError, match="leave text_column and revision out"):
        load_corpus("text8", data_files=files[:1], text_column="text")
    with pytest.raises(ValueError, match="no part 'dev'; choose one of train, validation, test"):
        load_corpus("text8", "dev", data_files=files[:1])
    with pytest.raises(ValueError, match="cannot be streamed"):
        corpus_stream("text8", text8_tokenizer(), 8, data_files=files[:1])
    with pytest.raises(ValueError, match="cannot be read from .*data_files"):
        text8_documents("test", str(tmp_path / "none.txt"))
    Path(files[0]).write_text("abc")
    with pytest.raises(ValueError, match="has 3 characters, so that its part 'test' is empty"):
        text8_documents("test", files[0])


# --------------------------------------------------------------------------------------------------------------------
# The Hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: answers of `load_dataset`, and what was asked."""
    asked, answers = [], []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        answer = answers[min(len(asked), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, answers


def test_a_corpus_is_read_from_its_home(hub):
    asked, answers = hub
    answers.append(datasets.Dataset.from_dict({"sentence": ["it 's N"], "other": [1]}))
    assert list(load_corpus("ptb", "train", revision="abc")) == [{"text": "it's N"}]
    assert asked == [(("ptb-text-only/ptb_text_only", "penn_treebank"), {"split": "train", "revision": "abc"})]


def test_a_home_with_a_script_is_read_from_the_parquet_copy(hub):
    asked, answers = hub
    answers += [RuntimeError("Dataset scripts are no longer supported"), documents("some text")]
    assert len(list(load_corpus("lm1b"))) == 1
    assert asked[1][1] == {
        "data_files": {"test": "plain_text/test/*.parquet"},
        "split": "test",
        "revision": "refs/convert/parquet",
    }


def test_a_corpus_that_cannot_be_had_is_named_with_the_remedy(hub):
    asked, answers = hub
    answers.append(ConnectionError("Couldn't reach the Hub"))
    with pytest.raises(ValueError, match="'ag_news' cannot be read from fancyzhx.*reach.*give its files as data"):
        load_corpus("ag_news")
    answers[0] = RuntimeError("Dataset scripts are no longer supported")
    with pytest.raises(ValueError, match="'arxiv' cannot be read.*scripts.*column 'article'"):
        load_corpus("arxiv", revision="main")
    assert len(asked) == 2  # a revision that is asked for is not replaced


def test_an_incomplete_openwebtext_has_no_last_documents(hub):
    hub[1].append(documents("some", "text"))
    with pytest.raises(ValueError, match="has 2 documents, not 8013769"):
        load_corpus("openwebtext", "train")


def test_unknown_names_and_options_are_refused(tmp_path):
    files = write(tmp_path / "a.txt", ["a"])
    with pytest.raises(ValueError, match="corpus 'c4' is not known; choose one of openwebtext"):
        load_corpus("c4")
    with pytest.raises(ValueError, match="'lambada' has no part 'train'; choose one of test"):
        load_corpus("lambada", "train")
    with pytest.raises(ValueError, match="revision='main' is for a corpus on the Hub"):
        load_corpus("lm1b", data_files=files, revision="main")
    with pytest.raises(ValueError, match="text_column='text' is for data_files"):
        load_corpus("lm1b", text_column="text")
    with pytest.raises(ValueError, match="JSONL and Parquet files, not both"):
        load_corpus("lm1b", data_files=[*files, *write(tmp_path / "b.jsonl", ["b"])])


def test_the_registry_is_complete():
    assert set(ZERO_SHOT) < set(CORPORA)
    for name, corpus in CORPORA.items():
        assert corpus.scored in corpus.splits, name
        assert corpus.detokenizer is None or corpus.detokenizer in DETOKENIZERS, name
    # The rule of the release: `test` for these three (LAMBADA has one part), `validation` for everything else.
    scored = {name for name, corpus in CORPORA.items() if corpus.scored == "test"}
    assert scored == {"text8", "lm1b", "ag_news", "lambada"}
