"""The notebooks of examples/ run from top to bottom, and are stored without outputs."""

import pytest
from models import model_of, save_checkpoint
from notebooks import GENERATE, NOTEBOOKS, cells, run

from xdlm_hf.data.text8 import text8_tokenizer
from xdlm_hf.data.tokenizer import train_tokenizer


def check(names):
    """What the notebook shows happened: an answer, a page, and nothing changed outside of what may change."""
    mask, (first, end) = names["mask"], names["hole"]
    assert names["answer"].shape[1] == names["start"] + 32 and mask not in names["answer"]
    assert all(edits == 0 for (_, k), edits in names["edits"].items() if k == 0)
    assert len(names["output"].history) == 9 and "<html" in names["page"].read_text(encoding="utf-8")
    assert names["revised"].endswith(" true if the name is a string")
    filled, ids = names["filled"], names["ids"]
    assert mask not in filled and filled[:, :first].equal(ids[:, :first]) and filled[:, end:].equal(ids[:, end:])


def test_the_notebooks_are_found_and_hold_no_outputs():
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        code = cells(notebook)
        assert code and cells(notebook, "markdown")
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


TOKENIZERS = {
    "random weights": None,
    "bytes": lambda: train_tokenizer(["return true if the name is a string"], vocab_size=280),
    "letters, as the demo's": text8_tokenizer,
}


@pytest.mark.parametrize("given", TOKENIZERS.values(), ids=TOKENIZERS)
def test_generate_runs_from_top_to_bottom(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDLM_CHECKPOINT", raising=False)
    if given:
        tokenizer = given()
        model = model_of(tokenizer, mixing_ratio=0.3)
        monkeypatch.setenv("XDLM_CHECKPOINT", str(save_checkpoint(tmp_path / "checkpoint", model, tokenizer)))
    names = run(GENERATE)
    check(names)
    assert names["model"].config.mixing_ratio == (0.3 if given else 0.1)
    assert "16 steps, k = 0.5: 16 passes" in capsys.readouterr().out
