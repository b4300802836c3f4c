"""The notebooks of examples/ run from top to bottom, and are stored without outputs."""

import json
from pathlib import Path

import pytest
from models import model_of, save_checkpoint

from xdlm_hf.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells(notebook, kind="code"):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def run(notebook):
    """The names that the cells define, run one after the other as a kernel does, without the notebook's libraries."""
    names = {"__name__": "__main__"}
    for n, cell in enumerate(cells(notebook)):
        exec(compile("".join(cell["source"]), f"{notebook.name}, code cell {n}", "exec"), names)
    return names


def check(names):
    """What the notebook shows happened: an answer, a page, and nothing changed outside of what may change."""
    mask, (first, end) = names["mask"], names["hole"]
    assert names["answer"].shape[1] == names["start"] + 32 and mask not in names["answer"]
    assert all(edits == 0 for (_, k), edits in names["edits"].items() if k == 0)
    assert len(names["output"].history) == 9 and "<html" in names["page"].read_text(encoding="utf-8")
    assert names["revised"].endswith(" capital of France is Paris.")
    filled, ids = names["filled"], names["ids"]
    assert mask not in filled and filled[:, :first].equal(ids[:, :first]) and filled[:, end:].equal(ids[:, end:])


def test_the_notebooks_are_found_and_hold_no_outputs():
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        code = cells(notebook)
        assert code and cells(notebook, "markdown")
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.parametrize("given", [False, True], ids=["random weights", "a checkpoint"])
def test_generate_runs_from_top_to_bottom(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDLM_CHECKPOINT", raising=False)
    if given:
        tokenizer = train_tokenizer(["The capital of France is Paris."], vocab_size=280)
        model = model_of(tokenizer, mixing_ratio=0.3)
        monkeypatch.setenv("XDLM_CHECKPOINT", str(save_checkpoint(tmp_path / "checkpoint", model, tokenizer)))
    names = run(ROOT / "examples" / "generate.ipynb")
    check(names)
    assert names["model"].config.mixing_ratio == (0.3 if given else 0.1)
    assert "16 steps, k = 0.5: 16 passes" in capsys.readouterr().out
