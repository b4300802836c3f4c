"""The demo: its task, the conditions under which it fails, and a run at the size of seconds."""

import importlib
import json
import sys
from pathlib import Path

import notebooks
import pytest
from lm_eval.tasks import TaskManager

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import demo  # noqa: E402
from demo_task import alphabet  # noqa: E402


def test_completions_are_right_and_any_other_letter_is_wrong():
    for problem in alphabet.problems(40, seed=3):
        prompt, right = problem["prompt"], problem["completion"]
        assert len(prompt) == 2 * alphabet.GIVEN + 1 and len(right) == alphabet.ANSWER
        assert alphabet.is_right(prompt, right)
        for place in range(alphabet.ANSWER):
            other = "a" if right[place] != "a" else "b"
            assert not alphabet.is_right(prompt, right[:place] + other + right[place + 1 :])
        assert not alphabet.is_right(prompt, right[:-1]) and not alphabet.is_right(prompt, right + "a")
        assert not alphabet.is_right(prompt.translate(str.maketrans("<>", "><")), right)
    assert not alphabet.is_right("ab>:", "") and not alphabet.is_right("ab>:", "<" * 32)
    assert alphabet.answer(">", 24) == "yzabcdefghijklmnopqrstuvwxyzabcd"
    assert alphabet.answer("<", 1) == "bazyxwvutsrqponmlkjihgfedcbazyxw"


def test_the_runs_parse(tmp_path):
    (tmp_path / "logs").mkdir()
    for run in [run for chain in demo.chains(tmp_path) for run in chain]:
        recipe = importlib.import_module(Path(run.recipe).stem)
        *_, args, _ = recipe.parse(["--config", str(demo.CONFIGS / run.config), *run.options])
        assert args.mixing_ratio == {"base": 0, "xdlm": 0.1, "k0": 0, "k0.1": 0.1, "k1": 1}[run.name]


def test_problems_for_training_and_for_scores_differ():
    given = {problem["prompt"] for problem in alphabet.problems(2000, seed=0)}
    assert not given & {problem["prompt"] for problem in alphabet.problems(demo.PROBLEMS, seed=1)}


def test_lm_eval_scores_the_task(tmp_path):
    alphabet.write(tmp_path / "problems.jsonl", 5, seed=1)
    manager = TaskManager(
        include_path=str(ROOT / "recipes" / "demo_task"),
        include_defaults=False,
        metadata={"data": str(tmp_path / "problems.jsonl")},
    )
    task = manager.load_task_or_group("xdlm_alphabet")["xdlm_alphabet"]
    for doc, problem in zip(task.test_docs(), alphabet.problems(5, seed=1), strict=True):
        assert task.doc_to_text(doc) == problem["prompt"]
        assert task.process_results(doc, [problem["completion"]]) == {"exact_match": 1.0}
        assert task.process_results(doc, [problem["completion"][::-1]]) == {"exact_match": 0.0}
    with pytest.raises(ValueError, match="xdlm_alphabet needs its problems: --metadata data=PATH"):
        alphabet.load()
    (tmp_path / "empty.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"empty.jsonl, line 1: needs the texts 'prompt'"):
        alphabet.load(str(tmp_path / "empty.jsonl"))


def report(refined: float, unrefined: float, nelbo: float) -> dict:
    scores = {
        name: {"right": right, "standard_error": 0.03}
        for name, right in (("refined", refined), ("unrefined", unrefined))
    }
    return {"lm_eval": scores, "text": {"unigram": 3.0, "xdlm": {"nelbo": nelbo, "standard_error": 0.02}}}


def test_the_demo_fails_where_it_shows_nothing():
    assert demo.shortcomings(report(0.8, 0.05, 2.4)) == []
    assert demo.shortcomings(report(0.2, 0.05, 2.4)) == [
        "refinement gains 15.0 points in 8 steps, less than four standard errors"
    ]
    (found,) = demo.shortcomings(report(0.8, 0.05, 2.81))
    assert found == (
        "the text model's bound, 2.81 nats, is not ten standard errors below that of token frequencies, 3.00"
    )


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds files that are not a demo's; name an empty or new folder"):
        demo.fresh_folder(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.slow
def test_a_run_of_seconds(tmp_path, monkeypatch, capsys):
    """All parts run; models of so few steps show nothing, and the demo says so by its status."""
    folder = tmp_path / "demo"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(folder), "--steps_scale", "0.01"])
    with pytest.raises(SystemExit, match="demo: refinement gains .*; the text model's bound"):
        demo.main()
    found = json.loads((folder / "report.json").read_text())
    assert set(found["alphabet"]) >= {"trained at k = 0", "trained at k = 0.1", "trained at k = 1"}
    # lm-eval and generate score the same problems.
    for name, label in (("refined", "trained at k = 0.1"), ("unrefined", "k = 0.1, without refinement")):
        assert found["lm_eval"][name]["right"] == found["alphabet"][label]["8"]["right"]
    page = (folder / "index.html").read_text()
    for name in ("answers.html", "refinement.svg", "text.html", "loss.svg", "steps.svg"):
        assert name in page and (folder / name).stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "UserWarning" not in shown and "Next: xdlm-chat --model" in shown
    assert "tokens/s" in shown and "step" in shown
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDLM_CHECKPOINT", str(folder / "xdlm"))
    assert notebooks.run(notebooks.GENERATE)["revised"].endswith(" true if the name is a string")
