"""OpenCompass's protocol against recordings of it, raw answers, scoring again, pass@k."""

import functools
import hashlib
import itertools
import json
import os
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from xdlm_hf.evaluation import TASKS, equality, opencompass, oracle, rescore, sandbox
from xdlm_hf.evaluation.protocols import END_OF_TEXT, check_protocol, visible_text
from xdlm_hf.evaluation.tasks import bbh, code, competition_math, gsm8k, humaneval, mbpp

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("XDLM_DATA", ROOT.parent / "shared" / "data"))
RECORDED = Path(__file__).parents[1] / "fixtures" / "opencompass"
EXAMPLES = json.loads((RECORDED / "worked_examples.json").read_text(encoding="utf-8"))
HASHES = json.loads((RECORDED / "prompt_hashes.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def consent(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.delenv("XDLM_DATA", raising=False)


def need(inside):
    if not (DATA / inside).exists():
        pytest.skip(f"no {inside} under XDLM_DATA")


def examples(benchmark):
    return [pytest.param(example, id=example["note"][:40]) for example in EXAMPLES[benchmark]]


@functools.cache
def with_id(load, task_id):
    return next(row for row in load(data=str(DATA))["test"] if row["task_id"] == task_id)


class TestWorkedExamples:
    @pytest.mark.parametrize("example", examples("gsm8k"))
    def test_gsm8k(self, example):
        text = visible_text(example["output"], "opencompass", gsm8k.STOPS)
        assert opencompass.gsm8k_number(text) == example["extracted"]
        doc = {"answer": f"so it is #### {example['gold']}", "protocol": "opencompass"}
        assert gsm8k.process_results(doc, [example["output"]])["exact_match"] == (example["verdict"] == "right")

    @pytest.mark.parametrize("example", examples("math"))
    def test_math(self, example):
        text = visible_text(example["output"], "opencompass", competition_math.STOPS)
        answer, gold = equality.extract(text, example["gold"])
        assert (str(answer), str(gold)) == (example["extracted"], example["gold_parsed"])
        doc = {"answer": example["gold"], "protocol": "opencompass"}
        scores = competition_math.process_results(doc, [example["output"]])
        assert scores["exact_match"] == (example["verdict"] == "right")

    @pytest.mark.parametrize("example", examples("bbh"))
    def test_bbh(self, example):
        free = example["kind"] == "free"
        text = visible_text(example["output"], "opencompass", bbh.STOPS)
        assert (opencompass.bbh_free_form if free else opencompass.bbh_choice)(text) == example["extracted"]
        assert free or opencompass.bbh_choice(example["gold"]) == example["gold_processed"]
        doc = {"target": example["gold"], "subtask": "navigate" if free else "snarks", "protocol": "opencompass"}
        assert bbh.process_results(doc, [example["output"]])["exact_match"] == (example["verdict"] == "right")

    @pytest.mark.parametrize("example", examples("humaneval"))
    def test_humaneval(self, example):
        assert opencompass.humaneval_body(example["output"]) == example["extracted"]
        need("humaneval/HumanEval.jsonl")
        doc = with_id(humaneval.load, example["task_id"])
        (verdict,) = humaneval.execute([[example["output"]]], [doc])[0]
        assert (verdict == "pass") is (example["verdict"] == "passed"), verdict
        if "while True" in example["output"]:
            assert verdict == "timeout: not done after 3 s"

    @pytest.mark.parametrize("example", examples("mbpp"))
    def test_mbpp(self, example):
        text = visible_text(example["output"], "opencompass", mbpp.STOPS)
        assert opencompass.mbpp_program(text) == example["extracted"]
        need("mbpp/mbpp.jsonl")
        (verdict,) = mbpp.execute([[example["output"]]], [with_id(mbpp.load, example["task_id"])])[0]
        assert verdict.partition(":")[0] == example["verdict"].removesuffix("_answer"), verdict


class TestPrompts:
    @pytest.mark.parametrize(
        ("benchmark", "file", "rows"),
        [
            ("gsm8k", "gsm8k/test.jsonl", [0, 1318]),
            ("math", "math/test.jsonl", [0, 4999]),
            ("humaneval", "humaneval/HumanEval.jsonl", [0, 53]),
            ("mbpp", "mbpp/mbpp.jsonl", [0, 6, 499]),
        ],
    )
    def test_rendered_as_opencompass_does(self, benchmark, file, rows):
        need(file)
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(DATA)})
        task = manager.load([f"xdlm_{benchmark}"])["tasks"][f"xdlm_{benchmark}"]
        task.build_all_requests(limit=None, samples=rows, rank=0, world_size=1)
        rendered = [hashlib.sha256(request.args[0].encode()).hexdigest() for request in task.instances]
        assert rendered == HASHES[benchmark]
        assert all(request.args[1]["until"] == request.args[1]["eos_token_id"] == [] for request in task.instances)

    @pytest.mark.parametrize("subtask", HASHES["bbh"])
    def test_bbh(self, subtask):
        need("bbh/tasks")
        first = bbh.load(subtask, data=str(DATA))["test"][0]
        assert hashlib.sha256(first["prompt"].encode()).hexdigest() == HASHES["bbh"][subtask]

    def test_lenient_prompts(self):
        need("humaneval/HumanEval.jsonl")
        asked = humaneval.load(data=str(DATA), protocol="lenient")["test"][0]
        assert asked["context"] == "Complete the following python code:\n" + asked["prompt"]
        prompt = competition_math.prompt("What is $1 + 1$?", "lenient")
        assert prompt.count("Problem:\n") == 5 and prompt.endswith("What is $1 + 1$?\nSolution:") and "{{" not in prompt

    @pytest.mark.parametrize("load", [gsm8k.load, competition_math.load, competition_math.load_500, humaneval.load])
    def test_unknown_protocol(self, load):
        with pytest.raises(ValueError, match="protocol='openc' is not known: choose one of opencompass, lenient"):
            load(data="nowhere", protocol="openc")
        with pytest.raises(ValueError, match="protocol='' is not known"):
            bbh.load("navigate", data="nowhere", protocol="")


class TestRawAnswers:
    def test_end_of_text(self):
        raw = f"The answer{END_OF_TEXT}{END_OF_TEXT} is 5[DONE] more"
        assert visible_text(raw, "opencompass", mbpp.STOPS) == "The answer is 5"
        assert visible_text(raw, "lenient", mbpp.STOPS) == "The answer"
        assert check_protocol("lenient") == "lenient"

    def test_gsm8k_on_either_side_of_it(self):
        raw = f"The answer is 4{END_OF_TEXT}2\nQuestion: The answer is 7"
        scores = {p: gsm8k.process_results({"answer": "#### 42", "protocol": p}, [raw]) for p in gsm8k.STOPS}
        assert scores == {"opencompass": {"exact_match": 1.0}, "lenient": {"exact_match": 0.0}}


class TestPassAtK:
    @pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (5, 2, 3), (6, 1, 2), (4, 4, 3), (5, 0, 5)])
    def test_is_the_share_of_draws_with_a_right_one(self, n, c, k):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert code.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)

    @pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1)])
    def test_refused(self, n, c, k):
        with pytest.raises(ValueError, match=rf"1 <= k <= n and 0 <= c <= n, got k={k} with {c} of n={n}"):
            code.pass_at_k(n, c, k)

    def test_counts(self):
        scores = code.process_results({}, [["pass", "wrong", "failed: NameError: x", "pass", "timeout"]])
        assert scores == {"pass_at_1": 0.4, "pass_at_5": 1.0, "wrong": 0.2, "failed": 0.2, "timeout": 0.2}

    def test_ten_samples_through_the_harness(self, tmp_path, monkeypatch):
        row = {"task_id": "a/1", "prompt": 'def f(x):\n    """Doc."""\n', "canonical_solution": "", "entry_point": "f"}
        (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "test": "def check(c):\n    assert c(1) == 1\n"}))
        count = itertools.count()
        monkeypatch.setattr(oracle, "gold", lambda task, doc: f"    return x * {1 + next(count)}\n")
        results = lm_eval.simple_evaluate(
            oracle.OracleModel(),
            tasks=["xdlm_humaneval_10"],
            task_manager=rescore.manager("opencompass", str(tmp_path / "rows.jsonl")),
            confirm_run_unsafe_code=True,
        )
        scores = results["results"]["xdlm_humaneval_10"]  # only the first of ten samples is right
        assert scores["pass_at_1,executed"] == pytest.approx(0.1) and scores["pass_at_10,executed"] == 1.0
        assert scores["pass_at_5,executed"] == 0.5 and scores["wrong,executed"] == pytest.approx(0.9)


ROWS = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(4)]


class TestRescore:
    @pytest.fixture
    def data(self, tmp_path):
        (tmp_path / "data" / "gsm8k").mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text(lines)
        return tmp_path / "data"

    def record(self, data, folder, answers):
        """A folder as eval.table16 leaves it, with these answers."""
        tasks = rescore.manager("opencompass", str(data)).load(["xdlm_gsm8k"])["tasks"]
        docs = list(tasks["xdlm_gsm8k"].test_docs())
        items = [{"doc_id": n, "doc_hash": rescore.doc_hash(docs[n]), "answer": text} for n, text in enumerate(answers)]
        (folder / "cell").mkdir(parents=True)
        manifest = {"protocol": "opencompass", "items": {"xdlm_gsm8k": items}}
        (folder / "cell" / "manifest.json").write_text(json.dumps(manifest))

    def test_scores_by_the_other_protocol(self, data, tmp_path, capsys):
        # "$2" is read by one protocol alone, "4 <end> 4" is 44 for the other.
        self.record(data, tmp_path / "runs", ["The answer is 0", "The answer is $2, so 3.", f"It is 4{END_OF_TEXT}4"])
        scores = {}
        for protocol in ("opencompass", "lenient"):
            rescore.main([str(tmp_path / "runs"), "--protocol", protocol, "--data", str(data)])
            written = json.loads((tmp_path / "runs" / "cell" / f"rescored_{protocol}.json").read_text())
            scores[protocol] = [item["exact_match"] for item in written["items"]["xdlm_gsm8k"]]
            assert written["generated_with_protocol"] == "opencompass"
        assert scores == {"opencompass": [1.0, 0.0, 0.0], "lenient": [1.0, 0.0, 1.0]}
        assert "| xdlm_gsm8k | 3 | exact_match | 0.6667 |" in capsys.readouterr().out

    def test_other_rows(self, data, tmp_path):
        self.record(data, tmp_path / "runs", ["The answer is 0", "The answer is 2"])
        changed = [ROWS[0], {**ROWS[1], "question": "What?"}]
        (data / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(SystemExit, match="row 1 of xdlm_gsm8k differs from the one answered in .*cell"):
            rescore.main([str(tmp_path / "runs"), "--protocol", "lenient", "--data", str(data)])

    def test_folder_without_raw_answers(self, data, tmp_path):
        with pytest.raises(SystemExit, match="holds no answers: neither manifest.json of eval.table16 nor samples_"):
            rescore.main([str(tmp_path), "--protocol", "lenient", "--data", str(data)])
        (tmp_path / "manifest.json").write_text(json.dumps({"items": {"xdlm_gsm8k": [{"doc_id": 0, "answer": "a"}]}}))
        with pytest.raises(SystemExit, match=r"manifest.json holds no raw answers, .*: run it again"):
            rescore.main([str(tmp_path), "--protocol", "lenient", "--data", str(data)])

    def test_samples_of_the_harness(self, data, tmp_path):
        results = lm_eval.simple_evaluate(
            oracle.OracleModel(),
            tasks=["xdlm_gsm8k"],
            task_manager=rescore.manager("lenient", str(data)),
        )
        samples = results["samples"]["xdlm_gsm8k"]
        for sample in samples:  # as lm-eval's EvaluationTracker writes them
            sample["arguments"] = {"gen_args_0": dict(zip(("arg_0", "arg_1"), sample["arguments"][0], strict=True))}
        path = tmp_path / "out" / "model" / "samples_xdlm_gsm8k_2026-01-01T00-00-00.000000.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(sample, default=str) + "\n" for sample in samples))
        rescore.main([str(tmp_path / "out"), "--protocol", "opencompass", "--data", str(data)])
        rescored = json.loads((path.parent / "rescored_opencompass.json").read_text())
        assert rescored["scores"]["xdlm_gsm8k"]["exact_match,none"] == 1.0 and len(rescored["items"]["xdlm_gsm8k"]) == 4
        samples[0]["arguments"]["gen_args_0"]["arg_1"]["until"] = ["Question:"]
        path.write_text("".join(json.dumps(sample, default=str) + "\n" for sample in samples))
        with pytest.raises(SystemExit, match="because its task cut them"):
            rescore.main([str(tmp_path / "out"), "--protocol", "opencompass", "--data", str(data)])


def test_own_assertion_before_the_tests():
    doc = {"tests": ["", "assert f() == 1"], "names": ["f"], "protocol": "opencompass"}
    program = 'def f():\n    return 1\nassert f() == 2, "no"\n[DONE]'
    assert mbpp.execute([[program]], [doc]) == [["wrong: AssertionError: no"]]
    assert mbpp.execute([[program]], [{**doc, "protocol": "lenient"}]) == [["failed: AssertionError: no"]]
    assert sandbox.Limits().seconds == 10.0
