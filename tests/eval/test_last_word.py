"""The last-word task: how a row is split, and what counts as the right word."""

import json

import pytest

from xdlm_hf.evaluation.tasks import last_word


def test_rows_are_split_before_the_last_word(tmp_path, monkeypatch):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "lambada_openai_test.jsonl").write_text(json.dumps({"text": "Return the given value. "}) + "\n")
    monkeypatch.setenv("XDLM_DATA", str(tmp_path))
    assert list(last_word.load()["test"]) == [{"context": "Return the given", "word": "value."}]


@pytest.mark.parametrize(
    ("answer", "score"),
    [(" value", 1.0), (" value. Then", 1.0), (" 'value',", 1.0), (" values", 0.0), ("", 0.0), (" the value", 0.0)],
)
def test_score_is_for_the_first_word(answer, score):
    assert last_word.process_results({"context": "Return the", "word": "value."}, [answer]) == {"exact_match": score}


@pytest.mark.parametrize("row", [{"text": "one"}, {"text": "ends in ..."}, {"txt": "a b"}])
def test_rows_without_two_words_are_refused(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="line 1: needs a 'text' of two words or more, got"):
        last_word.load(data=str(path))
