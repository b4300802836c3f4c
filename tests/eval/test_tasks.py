"""The five benchmarks: rows, prompts, answer extraction, and the proof that scoring is right, on the real data.

The whole proof (1,319 GSM8K, 5,000 MATH, 6,511 BBH, 164 HumanEval, 500 MBPP) is marked `slow`; a sample runs always.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from xdlm_hf.evaluation import TASKS, cli, equality, evalplus, oracle, sandbox
from xdlm_hf.evaluation.tasks import bbh, code, competition_math, gsm8k, humaneval, mbpp, plus

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("XDLM_DATA", ROOT.parent / "shared" / "data"))
FILES = {
    "gsm8k": "gsm8k/test.jsonl",
    "math": "math/test.jsonl",
    "math500": "math/math500_test.jsonl",
    "bbh": "bbh/tasks",
    "humaneval": "humaneval/HumanEval.jsonl",
    "mbpp": "mbpp/mbpp.jsonl",
}
PATIENCE = 120  # seconds before something is taken for lost; no verdict depends on what happens sooner
COUNTS = {"gsm8k": 1319, "math": 5000, "math500": 500, "bbh": 6511, "humaneval": 164, "mbpp": 500}
# What OpenCompass's own functions give the gold answers in the form of its shots; three targets of BBH cannot be won,
# and one row of MBPP needs the setup code that is not run.
RIGHT_BY_OPENCOMPASS = {"gsm8k": 1319, "math": 4927, "bbh": 6508, "humaneval": 164, "mbpp": 499}


@pytest.fixture(autouse=True)
def consent(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.delenv("XDLM_DATA", raising=False)


def need(benchmark):
    if not (DATA / FILES[benchmark]).exists():
        pytest.skip(f"no {FILES[benchmark]} under XDLM_DATA")


def score(benchmark, corrupt, limit=None, protocol="lenient"):
    """Results of the oracle through the harness, and its samples."""
    metadata = {"data": str(DATA), "protocol": protocol}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    model = oracle.OracleModel(corrupt=corrupt)
    results = lm_eval.simple_evaluate(
        model, tasks=[f"xdlm_{benchmark}"], task_manager=manager, limit=limit, confirm_run_unsafe_code=True
    )
    table = results["groups" if benchmark == "bbh" else "results"][f"xdlm_{benchmark}"]
    return table, [sample for samples in results["samples"].values() for sample in samples]


def check_proof(benchmark, limit, protocol="lenient"):
    """Scores right and corrupted answers; (rows, how many of the right ones were counted right)."""
    metric = "pass_at_1" if benchmark in ("humaneval", "mbpp") else "exact_match"
    name = f"{metric},{'executed' if metric == 'pass_at_1' else 'none'}"
    right, samples = score(benchmark, False, limit, protocol)
    assert right[name] == 1.0 or protocol == "opencompass"
    wrong, _ = score(benchmark, True, limit, protocol)
    assert wrong[name] == 0.0
    if name.startswith("pass"):
        assert wrong["wrong,executed"] > 0.9 and wrong["timeout,executed"] == 0.0
        assert sum(wrong[f"{n},executed"] for n in ("pass_at_1", "wrong", "failed", "timeout")) == pytest.approx(1.0)
    return len(samples), sum(sample[metric] for sample in samples)


class TestProof:
    @pytest.mark.parametrize(
        ("benchmark", "limit"), [("gsm8k", 200), ("math500", 40), ("bbh", 4), ("humaneval", 12), ("mbpp", 12)]
    )
    def test_on_a_sample(self, benchmark, limit):
        need(benchmark)
        rows = limit * (27 if benchmark == "bbh" else 1)
        assert check_proof(benchmark, limit) == (rows, rows)
        assert check_proof(benchmark, limit, "opencompass")[1] >= 0.95 * rows

    @pytest.mark.slow
    @pytest.mark.parametrize("benchmark", COUNTS)
    def test_on_everything(self, benchmark):
        need(benchmark)
        assert check_proof(benchmark, None) == (COUNTS[benchmark], COUNTS[benchmark])

    @pytest.mark.slow
    @pytest.mark.parametrize("benchmark", RIGHT_BY_OPENCOMPASS)
    def test_opencompass_on_everything(self, benchmark):
        need(benchmark)
        rows, right = check_proof(benchmark, None, "opencompass")
        assert rows == COUNTS[benchmark]
        # Both have time limits that a busy machine may exceed on a few rows.
        spared = {"math": 5, "mbpp": 3}.get(benchmark, 0)
        assert RIGHT_BY_OPENCOMPASS[benchmark] - spared <= right <= RIGHT_BY_OPENCOMPASS[benchmark]

    def test_oracle_refuses_other_tasks(self):
        for action in (oracle.gold, oracle.corrupted):
            with pytest.raises((ValueError, KeyError)):
                action("hellaswag", {})
        with pytest.raises(ValueError, match="xdlm-oracle has no likelihoods"):
            oracle.OracleModel().loglikelihood([])


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestMath:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            (r"so $\boxed{\frac12}$ and more", r"\frac{1}{2}"),
            (r"first $\boxed{1}$, then $\boxed{2}$.", "2"),
            ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
            ("The final answer is $3.5$.\nNext", "3.5"),
            (r"The final answer is $\boxed{7}$. I hope", "7"),
            ("nothing of the kind", None),
            (r"so \fbox{5}", "5"),
            (r"so $\boxed\frac{1}{2}$ and more", r"\frac{1}{2}"),
            (r"so $\boxed\{1,2\}$", r"\{1,2\}"),
            (r"\boxed5 and {x}", "5"),
            (r"\boxed{\boxed{4}}", "4"),
            (r"$\boxed 72$ of $3$", "72"),
            ("\\boxed", None),
            (r"\boxed{" + "9" * 5000 + "}", None),
            (r"The final answer is $.5$.", "0.5"),
            (r"\boxed{12\,\mathrm{cm}}", "12"),
            (r"an open \boxed{", None),
        ],
    )
    def test_extraction(self, text, answer):
        assert competition_math.final_answer(text) == answer

    @pytest.mark.parametrize(
        ("answer", "gold", "equal"),
        [
            (r"\frac{1}{2}", "0.5", True),
            (r"2\sqrt{2}", r"\sqrt{8}", True),
            ("x+1", "1+x", True),
            ("(1,2.0)", "(1,2)", True),
            ("(1,2)", "[1,2]", False),
            ("0,5", "0,1", False),  # lm-eval's own comparison reads both as 0
            ("2,1", "1,2", False),
            ("1,2,3", "1,2", False),
            (r"1200_7+1", "1200_7", False),
            (r"\text{east}", r"\text{west}", False),
            ("", "1", False),
        ],
    )
    def test_equality(self, answer, gold, equal):
        assert equality.equivalent(answer, gold, seconds=PATIENCE) is equal

    @pytest.mark.parametrize(
        ("answer", "gold"),
        [
            (".5", "0.5"),
            ("-.25", r"-\frac{1}{4}"),
            (r"10\,\mathrm{cm}", r"10 \text{ cm}"),
            (r"3\mathrm{~kg}", r"3\text{ kg}"),
            (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\n\\end{pmatrix}"),
        ],
    )
    def test_same_answer_in_another_form(self, answer, gold):
        doc = {"answer": gold, "protocol": "lenient"}
        assert competition_math.process_results(doc, [f"so $\\boxed{{{answer}}}$"]) == {"exact_match": 1.0}

    def test_matrices_that_differ(self):
        doc = {"answer": r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "protocol": "lenient"}
        other = r"\boxed{\begin{pmatrix} 1 & 2 \\ 4 & 3 \end{pmatrix}}"
        assert competition_math.process_results(doc, [other]) == {"exact_match": 0.0}

    def test_comparison_that_does_not_end_is_ended(self):
        assert equality.equivalent("9^{9^{9^{9}}}", "3", seconds=2.0) is False
        # And the next one has a process again.
        assert equality.equivalent("1+1", "2", seconds=PATIENCE) is True

    def test_comparison_ends_with_a_killed_harness(self):
        script = (
            "from xdlm_hf.evaluation import equality as e; w = e._workers['symbolic'] = e._start('symbolic'); "
            "print(w.pid, flush=True)"
        )
        script += "; e.equivalent('9^{9^{9^{9}}}', '3', seconds=600)"
        harness = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        worker = int(harness.stdout.readline())
        time.sleep(0.5)
        harness.kill()
        harness.communicate()
        deadline = time.monotonic() + PATIENCE
        while running(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not running(worker)

    def test_row_without_box(self):
        with pytest.raises(ValueError, match=r"row 3: the solution must hold its answer in \\boxed"):
            competition_math.parse_row({"problem": "a", "solution": "b"}, "row 3")


class TestGSM8K:
    @pytest.mark.parametrize(
        ("text", "gold", "equal"),
        [
            ("#### 1/2", "2", False),
            ("It is 1/2", "2", False),
            ("It is 1/2", "0.5", True),
            ("It is 6/3", "2", True),
            ("He has 3 / 4 left", "0.75", True),
            ("It is $1,000.00", "1000", True),
            ("12-5", "5", True),
            ("1/0", "0", False),
            ("\u0663", "3", True),
            ("9" * 5000, "9", False),
            ("no number", "1", False),
        ],
    )
    def test_final_number(self, text, gold, equal):
        doc = {"answer": f"#### {gold}", "protocol": "lenient"}
        assert gsm8k.process_results(doc, [text])["exact_match"] == equal


class TestBBH:
    @pytest.mark.parametrize(
        ("text", "letter", "answer"),
        [
            ("Thus (B). So the answer is (C).", True, "(C)"),
            ("So the answer is (C).\nQ: x So the answer is (D).", True, "(C)"),
            ("It is (A), or rather (B)", True, "(B)"),
            ("no letter", True, ""),
            ("So the answer is True.", False, "True"),
            ("So the answer is ] } ].\nmore", False, "] } ]"),
            ("the answer is **Yes**.", False, "Yes"),
            (" valid\nbecause", False, "valid"),
        ],
    )
    def test_extraction(self, text, letter, answer):
        assert bbh.final_answer(text, letter) == answer

    def test_prompts_of_the_files_are_those_of_lm_eval(self):
        need("bbh")
        published = {p.stem: bbh.read_shots(p) for p in (DATA / "bbh" / "cot-prompts").glob("*.txt")}
        assert len(published) == 27
        for name, shots in published.items():
            assert bbh.stock_shots(name) == shots, name
            assert "canary" not in shots.lower() and shots.count("\nQ: ") >= 2

    def test_prompt(self, tmp_path):
        need("bbh")
        row = bbh.load("navigate", data=str(DATA))["test"][0]
        assert row["prompt"].startswith("Follow the given examples and answer the question.\nGiven a series")
        assert row["prompt"].endswith("\nA: Let's think step by step.") and row["prompt"].count("\nQ: ") == 4
        with pytest.raises(ValueError, match=r"no such file: .*navigate\.txt"):
            bbh.load("navigate", data=str(tmp_path))

    def test_broken_file(self, tmp_path):
        path = tmp_path / "a.json"
        for content in ("{", "[]", '{"canary": 1}'):
            path.write_text(content)
            with pytest.raises(ValueError, match="needs an object with 'examples'"):
                bbh.read_examples(path)


PROMPT = 'from typing import List\n\n\ndef helper(x):\n    return x\n\n\ndef f(x: int) -> int:\n    """ Doc. """\n'
TEST = "def check(c):\n    assert c(2) == helper(4)\n"
PROBLEM = {"prompt": PROMPT, "entry_point": "f", "test": TEST, "protocol": "lenient"}
BODY = "    return 2 * x\n"


class TestPrograms:
    @pytest.mark.parametrize(
        "answer",
        [
            BODY,
            BODY + "\n\nprint(f(1))\nmore text",
            "return 2 * x",
            "\n" + BODY,
            f"```python\n{BODY}```\nIt doubles.",
            f"def f(x):\n{BODY}\nx = f(",
            f"from typing import List\nimport math\n\ndef f(x: int) -> int:\n{BODY}",
            "Here it is:\n```python\ndef g(x):\n    return 2 * x\n\ndef f(x):\n    return g(x)\n```",
            f"def f(x):\n    return g(x)\n\ndef g(x):\n{BODY}\nThat is all, folks",
        ],
    )
    def test_humaneval_answers_that_pass(self, answer):
        verdict = sandbox.run(humaneval.job(PROBLEM, answer))
        assert verdict.result == "pass", (verdict, humaneval.program(PROBLEM, answer))

    @pytest.mark.parametrize(
        ("answer", "result"), [("    return x", "wrong"), ("", "wrong"), ("    return (", "failed")]
    )
    def test_humaneval_answers_that_do_not(self, answer, result):
        # An empty body leaves the docstring, so that the function returns None.
        assert sandbox.run(humaneval.job(PROBLEM, answer)).result == result

    @pytest.mark.parametrize(
        "answer",
        [
            "def f(): return 1",
            " 'def f(): return 1' \n",
            "[BEGIN]\n 'def f(): return 1' \n[DONE] \n\n more",
            "def f(): return 1\n[DONE]\nYou are an expert",
            "```python\ndef f(): return 1\n```\nDone.",
            "def f\\_g(): pass\ndef f(): return 1",
        ],
    )
    def test_mbpp_programs(self, answer):
        job = mbpp.job({"tests": ["", "assert f() == 1"], "names": ["f"], "protocol": "lenient"}, answer)
        assert sandbox.run(job).result == "pass", job.program

    def test_mbpp_rows(self):
        row = {"task_id": 11, "text": "T", "code": "def sum(a): return a\n", "test_list": ["assert sum(len('a')) == 1"]}
        parsed = mbpp.parse_row(row, "row 1")
        # `sum` is the row's own, `len` Python's.
        assert parsed["names"] == ["sum"] and parsed["tests"] == ["", "assert sum(len('a')) == 1"]
        assert parsed["prompt"].endswith(
            "[DONE] \n\n \nYou are an expert Python programmer, and here is your task: T Your code should pass these "
            "tests:\n\n assert sum(len('a')) == 1  \n\n[BEGIN]\n"
        )
        assert parsed["prompt"].count("[BEGIN]") == 4
        for broken in ({"test_list": []}, {"task_id": "11"}, {"test_list": [1]}):
            with pytest.raises(ValueError, match="row 1: needs a number 'task_id' and a list of texts"):
                mbpp.parse_row(row | broken, "row 1")

    def test_mbpp_test_split(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        row = {"text": "T", "code": "def f(): pass", "test_list": ["assert f() is None"]}
        path.write_text("".join(json.dumps({**row, "task_id": n}) + "\n" for n in (10, 11, 510, 511)))
        assert [r["task_id"] for r in mbpp.load(data=str(path))["test"]] == [11, 510]
        path.write_text(json.dumps({**row, "task_id": 601}) + "\n")
        with pytest.raises(ValueError, match="no rows with task_id 11 to 510"):
            mbpp.load(data=str(path))

    def test_counts(self):
        for verdict, name in (("pass", "pass_at_1"), ("failed: NameError: x", "failed"), ("wrong", "wrong")):
            counts = code.process_results({}, [[verdict]])
            assert counts == {n: float(n == name) for n in ("pass_at_1", "wrong", "failed", "timeout")}

    def test_no_consent(self, monkeypatch):
        monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
        for task in (humaneval, mbpp):
            with pytest.raises(ValueError, match="set HF_ALLOW_CODE_EVAL=1"):
                task.load(data="nowhere")


class TestBeforeTheModelIsLoaded:
    def test_unknown_task(self):
        with pytest.raises(ValueError, match=r"unknown tasks \['xdlm_nope'\]: this package has .*xdlm_bbh, xdlm_gsm8k"):
            cli.check_tasks(["xdlm_gsm8k", "xdlm_nope"], [], {"data": "nowhere"}, True, {})

    def test_missing_file(self, tmp_path):
        for task, file in (("xdlm_gsm8k", "test.jsonl"), ("xdlm_math", "test.jsonl"), ("xdlm_bbh", "txt")):
            with pytest.raises(ValueError, match=f"no such file: .*{file}"):
                cli.check_tasks([task], [], {"data": str(tmp_path)}, True, {})

    def test_unconfirmed_code(self):
        need("mbpp")
        with pytest.raises(ValueError, match="xdlm_mbpp runs code .*pass --confirm_run_unsafe_code"):
            cli.check_tasks(["xdlm_mbpp"], [], {"data": str(DATA)}, False, {})
        cli.check_tasks(["xdlm_mbpp"], [], {"data": str(DATA)}, True, {})

    def test_steps_that_do_not_fit_the_task(self):
        need("gsm8k")
        data = {"data": str(DATA)}
        with pytest.raises(ValueError, match="steps=300 is more than max_new_tokens=256"):
            cli.check_tasks(["xdlm_gsm8k"], [], data, True, {"pretrained": "nowhere", "steps": 300})
        with pytest.raises(ValueError, match="steps=2 is too few for the 3 blocks of 100 tokens"):
            cli.check_tasks(["xdlm_gsm8k"], [], data, True, {"block_length": 100, "steps": 2})
        cli.check_tasks(["xdlm_gsm8k"], [], data, True, {"steps": 300, "max_new_tokens": 512, "seed": 1})

    def test_every_subtask_is_in_the_group(self):
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        subtasks = {path.stem for path in TASKS.glob("xdlm_bbh_*.yaml")}
        assert len(subtasks) == 27 and subtasks <= set(manager.all_tasks)
        listed = (TASKS / "xdlm_bbh.yaml").read_text()
        assert all(f"- {name}\n" in listed for name in subtasks)


# A test as the dataset evalplus/humanevalplus on the Hub writes them.
HUB_HELPERS = """
import numpy as np

def is_floats(x) -> bool:
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False

def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"
"""
HALVES = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef halves(x: List[int]) -> List[float]:\n    """ Half of each. """\n',
    "entry_point": "halves",
    "canonical_solution": "\n\n    return [n / 2 for n in x]\n\n",
}
HALVES_HUB = HALVES | {
    "test": HUB_HELPERS
    + "\ndef check(candidate):\n    inputs, results = [[[2, 4]], [[]], [[-3]]], [[1.0, 2.0], [], [-1.5]]\n"
    "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n"
}
HALVES_RELEASE = HALVES | {
    "contract": "    assert isinstance(x, list)\n",
    "base_input": [[[2, 4]], [[]]],
    "plus_input": [[[-3]], [[10**20, 0.5]]],
    "atol": 0,
}
# What a model may write, and its verdict.
HALVES_ANSWERS = [
    ("    return [n / 2 for n in x]\n", "pass"),
    ("    return [n * 0.5 + 1e-9 for n in x]\n", "pass"),  # within 1e-6
    ("    return [n / 2 + 1e-3 for n in x]\n", "wrong"),
    ("    return [float(n // 2) for n in x]\n", "wrong"),  # right on the base inputs
    ("    return [str(n / 2) for n in x]\n", None),
    ("    import numpy as np\n    return (np.array(x) / 2).tolist()\n", "pass"),
    ("    return [n / 0 for n in x]\n", "failed"),
    ("    return x[1:] +\n", "failed"),
    ("    x.clear()\n    return [1.0, 2.0]\n", None),
]
SHARED = {
    "task_id": "Mbpp/2",
    "prompt": '"""\nWrite a function to share elements.\nassert set(similar_elements((3, 4),(4, 7))) == {4}\n"""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "\ndef similar_elements(a, b):\n  return tuple(set(a) & set(b))\n",
    "base_input": [[[3, 4, 5], [5, 4, 10]]],
    "plus_input": [[[1, 1, 2], [1]], [[], []]],
    "atol": 0,
    "contract": "",
}
SHARED_HUB = {
    "task_id": 2,
    "code": "\ndef similar_elements(a, b):\n  return tuple(set(a) & set(b))\n",
    "prompt": "Write a function to share elements.",
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "test_imports": ["from math import inf"],
    "test_list": ["assert set(similar_elements((3, 4), (4, 7))) == {4}"],
    "test": HUB_HELPERS
    + "\ninputs = [[(3, 4, 5), (5, 4, 10)], [(1, 1, 2, inf), (1,)], [(), ()]]\nresults = [(4, 5), (1,), ()]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
    "    assertion(set(similar_elements(*inp)), set(exp), 0)\n",
}
SHARED_ANSWERS = [
    ("def similar_elements(a, b):\n    return tuple(set(b) & set(a))", "pass"),
    ("def similar_elements(a, b):\n    return tuple(hash(a) and x for x in a if x in b)", "pass"),  # tuples, not lists
    ("def similar_elements(a, b):\n    return (4, 5)", "wrong"),  # right on the base inputs
    ("def similar_elements(a, b):\n    return a + [b]", "failed"),
    ("def other(a, b):\n    return ()", "failed"),
]
EVERY_FORM = [
    (humaneval, HALVES_HUB, HALVES_ANSWERS),
    (humaneval, HALVES_RELEASE, HALVES_ANSWERS),
    (mbpp, SHARED_HUB, SHARED_ANSWERS),
    (mbpp, SHARED, SHARED_ANSWERS),
]


def release(task_id, function, solution, base=(), more=(), atol=0):
    """A row of EvalPlus's own file for MBPP+."""
    fields = {"task_id": task_id, "entry_point": function, "canonical_solution": solution, "atol": atol}
    return SHARED | fields | {"base_input": list(base), "plus_input": list(more)}


def judged(row, answer, task=mbpp):
    doc = task.parse_row(row, "row 1", "lenient")
    return sandbox.run(task.job(doc, answer), sandbox.Limits(seconds=PATIENCE))


class TestPlus:
    @pytest.mark.parametrize("protocol", ["opencompass", "lenient"])
    @pytest.mark.parametrize(("task", "row", "answers"), EVERY_FORM)
    def test_every_form_from_a_file(self, tmp_path, monkeypatch, task, row, answers, protocol):
        pytest.importorskip("numpy")
        monkeypatch.setattr(plus, "SECONDS", float(PATIENCE))
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        (doc,) = task.load_plus(data=str(path), protocol=protocol)["test"]
        assert doc["seconds"] == PATIENCE
        (verdicts,) = task.execute([[answer for answer, _ in answers]], [doc])
        assert len(verdicts) == len(answers)
        for verdict, (answer, expected) in zip(verdicts, answers, strict=True):
            right = verdict.partition(":")[0]
            assert right == expected or (expected is None and right in ("wrong", "failed")), (answer, verdict)

    @pytest.mark.parametrize(("task", "row", "answers"), EVERY_FORM)
    def test_the_plain_tasks_read_them_too(self, tmp_path, task, row, answers):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        plain, more = (load(data=str(path))["test"][0] for load in (task.load, task.load_plus))
        assert plain == {name: more[name] for name in plain}
        assert ("seconds" in plain) == (row is not HALVES_HUB)  # which looks as HumanEval's own rows do

    def test_the_harness_scores_them(self, tmp_path):
        for name, row in (("humaneval/HumanEvalPlus.jsonl", HALVES_RELEASE), ("mbpp/MbppPlus.jsonl", SHARED)):
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_text(json.dumps(row) + "\n")
        names = ["xdlm_humaneval_plus", "xdlm_mbpp_plus"]
        cli.check_tasks(names, [], {"data": str(tmp_path)}, True, {})
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(tmp_path)})
        for corrupt in (False, True):
            scores = lm_eval.simple_evaluate(
                oracle.OracleModel(corrupt=corrupt), tasks=names, task_manager=manager, confirm_run_unsafe_code=True
            )["results"]
            assert [scores[name]["pass_at_1,executed"] for name in names] == [float(not corrupt)] * 2

    def test_a_verdict_names_the_input(self):
        assert judged(HALVES_RELEASE, "    return [float(n // 2) for n in x]\n", humaneval).why == "plus input 0"
        assert judged(HALVES_RELEASE, "    return x or 0\n", humaneval).why == "base input 0"

    def test_many_and_long_inputs(self):
        more = [[f"{i:04}" * 2**17] for i in range(40)] + [[str(i)] for i in range(1000)]  # 20 MiB, and as many calls
        row = release("Mbpp/9", "f", "def f(x):\n    return x[:4]\n", more=more)
        assert judged(row, "def f(x):\n    return x[:4]").result == "pass"
        assert judged(row, "def f(x):\n    return x[:4] if x != '999' else ''").why == "plus input 1039"

    def test_tolerance_of_the_row(self):
        row = HALVES_RELEASE | {"atol": 0.25}
        assert judged(row, "    return [n / 2 + 0.2 for n in x]\n", humaneval).result == "pass"
        assert judged(row, "    return [n / 2 + 0.3 for n in x]\n", humaneval).result == "wrong"

    def test_the_canonical_solution_never_calls_the_answer(self):
        solution = "def down(n):\n    print('x' * 10**5)\n    return [] if n == 0 else [n, *down(n - 1)]\n"
        row = release("Mbpp/9", "down", solution, [[3]], [[0]])
        assert judged(row, solution).result == "pass"
        verdict = judged(row, "def down(n):\n    return [] if n == 0 else [n]")
        assert (verdict.result, verdict.why) == ("wrong", "base input 0")
        in_place = release("Mbpp/9", "last", "def last(x):\n    return x.pop()\n", [[[1, 2]]])
        assert judged(in_place, "def last(x):\n    return x.pop()").result == "pass"
        broken = row | {"plus_input": [["a"]]}
        why = judged(broken, solution).why
        assert why.startswith("RuntimeError: the canonical solution fails on plus input 0: TypeError")

    @pytest.mark.parametrize(
        ("number", "given", "expected"),
        [
            (2, [[1], [2]], "((1,), (2,))"),
            (63, [[[1, 2]]], "([(1, 2)],)"),
            (75, [[[1, 2]], 3], "([(1, 2)], 3)"),
            (106, [[1], [2]], "([1], (2,))"),
            (115, [[[1], []]], "([{1}, {}],)"),
            (124, ["1", "2j"], "(1.0, 2j)"),
            (250, [[1], 2], "((1,), 2)"),
            (252, ["1+2j"], "((1+2j),)"),
            (259, [[[1]], [[2]]], "(((1,),), ((2,),))"),
            (278, [[1, [2]]], "((1, (2,)),)"),
            (307, [[1], 2, 3], "((1,), 2, 3)"),
            (580, [[1, [2]]], "((1, (2,)),)"),
            (722, [{"a": [1]}, 2, 3], "({'a': (1,)}, 2, 3)"),
            (9, [[1]], "([1],)"),
        ],
    )
    def test_types_that_json_does_not_keep(self, number, given, expected):
        assert repr(tuple(evalplus.typed(str(number), given))) == expected
        shown = release(f"Mbpp/{number}", "f", "def f(*x):\n    return repr(x)\n", [given])
        assert judged(shown, f"def f(*x):\n    assert repr(x) == {expected!r}, repr(x)\n    return {expected!r}") == (
            sandbox.Verdict("pass", "", sandbox.layers())
        )

    @pytest.mark.parametrize(
        ("function", "arguments", "output", "expected", "atol", "right"),
        [
            ("f", [], 1.0000001, 1.0, 1e-6, True),
            ("f", [], 1, 1.0, 0, True),
            ("f", [], "1.0", 1.0, 1e-6, False),
            ("f", [], (1.0,), [1.0], 1e-6, False),
            ("f", [], [1.0, 2.0], [1.0], 1e-6, False),
            ("f", [], "a", "b", 1e-6, False),
            ("Diff", [], [2, 1], [1, 2], 0, True),
            ("Diff", [], [2], [1, 2], 0, False),
            ("check_str", [], object(), "match", 0, True),
            ("check_str", [], None, "match", 0, False),
            ("check_str", [], True, "match", 0, True),
            ("sum_div", [], 0, 7, 0, True),
            ("sum_div", [], 1, 7, 0, False),
            ("are_equivalent", [], True, False, 0, True),
            ("surface_Area", [3, 4], 35, 33, 0, True),
            ("surface_Area", [3, 4], 34, 33, 0, False),
            ("digit_distance_nums", [1, 200], 3, 199, 0, True),
            ("digit_distance_nums", [1, 200], 4, 199, 0, False),
        ],
    )
    def test_rules_of_comparison(self, function, arguments, output, expected, atol, right):
        assert evalplus.accepted("Mbpp", function, arguments, output, expected, atol) is right

    def test_any_zero_of_a_polynomial_will_do(self):
        for output, right in ((1.0, True), (-1.0, True), (1.1, False)):  # x^2 - 1
            assert evalplus.accepted("HumanEval", "find_zero", [[-1, 0, 1]], output, 1.0, 1e-4) is right

    @pytest.mark.parametrize(
        ("task", "row", "field"),
        [
            (humaneval, HALVES_HUB, "test"),
            (humaneval, HALVES_RELEASE, "plus_input"),
            (humaneval, HALVES_RELEASE, "atol"),
            (humaneval, HALVES_HUB, "entry_point"),
            (mbpp, SHARED_HUB, "test"),
            (mbpp, SHARED_HUB, "code"),
            (mbpp, SHARED, "base_input"),
        ],
    )
    def test_rows_of_neither_form(self, tmp_path, task, row, field):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n" + json.dumps({k: v for k, v in row.items() if k != field}) + "\n")
        for load in (task.load, task.load_plus):
            with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: .*without [^;)]*'{field}'"):
                load(data=str(path))

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (SHARED | {"base_input": [1]}, "row 1: every input in 'base_input' and 'plus_input' must be a list"),
            (SHARED | {"task_id": "Mbpp/two"}, "row 1: 'task_id' must be Mbpp/ and a number, got 'Mbpp/two'"),
            (HALVES_RELEASE, "row 1: 'task_id' must be Mbpp/ and a number, got 'HumanEval/0'"),
            (SHARED_HUB | {"test_imports": "import re"}, "row 1: 'test_imports' must be a list of texts"),
            (SHARED_HUB | {"test": "for"}, r"row 1: 'code' or tests are not Python \("),
            (SHARED_HUB | {"task_id": "2"}, "row 1: needs a number 'task_id'"),
        ],
    )
    def test_broken_rows(self, row, message):
        with pytest.raises(ValueError, match=message):
            mbpp.parse_row(row, "row 1")

    def test_rows_of_the_other_benchmark(self):
        with pytest.raises(ValueError, match="row 1: 'task_id' must be HumanEval/ and a number, got 'Mbpp/2'"):
            humaneval.parse_row(SHARED, "row 1", "lenient")

    def test_prompts_of_mbpp(self):
        ending = "task: Write a function to share elements. Your code should pass these tests:\n\n assert set("
        for row in (SHARED, SHARED_HUB):
            assert ending in mbpp.parse_row(row, "row 1")["prompt"]
