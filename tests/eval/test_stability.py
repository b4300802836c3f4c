"""Repetitions with perturbed logits: the interval's coverage, and whole runs through lm-eval and its command line."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager
from models import model_of, save_checkpoint

from xdlm_hf import LLaDAForDiffusionLM
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.evaluation import TASKS, cli
from xdlm_hf.evaluation.adapter import XDLMEvalModel
from xdlm_hf.evaluation.distributed import _sort_samples
from xdlm_hf.evaluation.generation_requests import PERTURBATION
from xdlm_hf.evaluation.stability import add_report, item_statistics, run_statistics

ROWS = [{"question": f"{'Well. ' * (n % 4)}What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(7)]
# The weights are random; whether an answer has an even number of digits and letters e changes with the noise.
TASK = """
task: {name}
dataset_path: json
test_split: train
dataset_kwargs:
  data_files: {rows}
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: {shots}
fewshot_split: train
process_results: !function scorer.process_results
generation_kwargs:
  until: []
  max_gen_toks: 8
metric_list:
  - metric: even
    aggregation: mean
    higher_is_better: true
"""
SCORER = """
def process_results(doc, answers):
    return {"even": float(sum(character in "0123456789e" for character in answers[0]) % 2 == 0)}
"""
SETTINGS = {"steps": 4, "mixing_ratio": 0.1, "stability": 3, "stability_noise": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([row["question"] + row["answer"] for row in ROWS], vocab_size=270)


@pytest.fixture
def model(tokenizer):
    return model_of(tokenizer, max_sequence_length=256)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Tasks `even` and `shots`, the second with two random examples, the group `both`, and a checkpoint."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "scorer.py").write_text(SCORER)
    for name, shots in (("even", 0), ("shots", 2)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=rows, shots=shots))
    aggregate = "aggregate_metric_list:\n  - metric: even\n    aggregation: mean\n    weight_by_size: false\n"
    (folder / "both.yaml").write_text(f"group: both\ntask:\n  - even\n  - shots\n{aggregate}metadata:\n  version: 1\n")
    save_checkpoint(folder / "checkpoint", model_of(tokenizer, max_sequence_length=256), tokenizer)
    return folder


def evaluate(lm, folder, name="even", cache=None, **options):
    # Not by simple_evaluate, which takes seconds to describe the machine.
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load([name])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(1234)
    return evaluator.evaluate(lm=CachingLM(lm, str(cache)) if cache else lm, task_dict=loaded, **options)


def lm(model, tokenizer, **settings):
    return XDLMEvalModel(model, tokenizer=tokenizer, **{**SETTINGS, **settings})


def by_row(results, task="even"):
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


class TestStatistics:
    def test_worked_example(self):
        # Four items in two repetitions; v is 0.5 for the third and fourth: V = 1 / 16, and the half width is
        # 1.96 sqrt(1.5 / 16). Three of the eight perturbed scores differ, of three items.
        found = item_statistics([1, 1, 0, 1], [[1, 0, 0, 0], [1, 0, 1, 1]])
        assert found["score"] == 0.75 and found["perturbed"] == 0.5 and found["scores"] == [0.25, 0.75]
        assert found["deviation"] == 0.25
        assert found["interval"] == pytest.approx([0.5 - 0.600114, 0.5 + 0.600114], abs=1e-5)
        assert found["flip_rate"] == 4 / 8 and found["items_flipped"] == 3 / 4

    def test_without_flips_the_interval_is_a_point(self):
        found = item_statistics([1, 0], [[1, 0]] * 3)
        assert found["interval"] == [0.5, 0.5] and found["flip_rate"] == found["items_flipped"] == 0

    def test_statistics_of_an_aggregate_use_student_t(self):
        found = run_statistics(0.4, [0.3, 0.5, 0.4])  # deviation 0.1; t with 2 degrees of freedom: 4.3027
        half = 4.3027 * 0.1 * (4 / 3) ** 0.5
        assert found["interval"] == pytest.approx([0.4 - half, 0.4 + half], abs=1e-4) and found["score"] == 0.4

    @pytest.mark.parametrize(("statistics", "repetitions"), [("items", 3), ("items", 20), ("runs", 5), ("runs", 20)])
    def test_the_interval_contains_a_new_repetition_in_95_percent(self, statistics, repetitions):
        # Some items nearly always right, some nearly always wrong, others in between. The score is discrete, so the
        # exact coverage is 0.948 to 0.954; 4,000 trials have a standard error of 0.0034. Without the factor 1 + 1/R
        # or with a biased variance, the coverage at R = 3 is below 0.92.
        rng, p = np.random.default_rng(repetitions), np.linspace(0.01, 0.99, 40)
        inside = 0
        for _ in range(4000):
            scores = (rng.random((repetitions + 1, 40)) < p).astype(float)
            if statistics == "items":
                low, high = item_statistics(scores[0], scores[1:])["interval"]
            else:
                low, high = run_statistics(0.0, scores[1:].mean(1).tolist())["interval"]
            inside += low <= scores[0].mean() <= high
        assert 0.935 < inside / 4000 < 0.965

    def test_metrics_that_are_no_means_over_the_same_items(self):
        def run(scores, aggregate):
            samples = [{"doc_id": n, "filter": "none", "resps": [[str(s)]]} for n, s in enumerate(scores)]
            for sample, score in zip(samples, scores, strict=True):
                sample |= {"metrics": [] if score is None else ["m"], "m": score}
            return {"samples": {"t": samples}, "results": {"t": {"m,none": aggregate, "alias": "t"}}}

        for scores, aggregate in (([1, None], 1.0), ([(1, 2), (3, 4)], 0.7), ([1, 0], 0.9)):
            results = run(scores, aggregate)
            add_report(results, [run([1, 0], 0.5), run([0, 0], 0.25)], 0.1)
            assert results["stability"]["tasks"]["t"]["m,none"] == run_statistics(aggregate, [0.5, 0.25])
            assert results["samples"]["t"][0]["perturbed_scores"] == {"m": [1, 0]}
            assert "m_flip_rate,none" not in results["results"]["t"]


class TestRuns:
    def test_report_agrees_with_the_samples(self, model, tokenizer, folder):
        results = evaluate(lm(model, tokenizer, batch_size=3), folder, "both")
        report = results["stability"]
        assert (report["repetitions"], report["noise"], report["confidence"]) == (3, 1.0, 0.95)
        for task in ("even", "shots"):
            base = [sample["even"] for sample in by_row(results, task)]
            perturbed = np.transpose([sample["perturbed_scores"]["even"] for sample in by_row(results, task)])
            found = report["tasks"][task]["even,none"]
            assert found == item_statistics(base, perturbed)
            assert found["score"] == results["results"][task]["even,none"]
            assert 0 < found["flip_rate"] < 1 and report["answers_changed"][task] > 0.5
            rows = results["results"][task]
            assert [rows[f"even_interval_{side},none"] for side in ("low", "high")] == found["interval"]
            assert rows["even_perturbed,none"] == found["perturbed"]
            assert rows["even_flip_rate,none"] == found["flip_rate"]
        means = np.mean([report["tasks"][task]["even,none"]["scores"] for task in ("even", "shots")], axis=0)
        assert report["groups"]["both"]["even,none"]["scores"] == pytest.approx(means.tolist())
        assert (
            results["groups"]["both"]["even_interval_low,none"] == report["groups"]["both"]["even,none"]["interval"][0]
        )
        json.dumps(report)

    def test_scores_are_those_of_perturbed_answers(self, model, tokenizer, folder):
        harness = lm(model, tokenizer, batch_size=2)
        results = evaluate(harness, folder)
        scorer = {}
        exec(SCORER, scorer)
        for sample in by_row(results):
            context, asked = sample["arguments"][0]
            requests = [
                Instance("generate_until", {}, (context, {**asked, PERTURBATION: {"repetition": r, "noise": 1.0}}), 0)
                for r in (1, 2, 3)
            ]
            scores = [scorer["process_results"]({}, [answer])["even"] for answer in harness.generate_until(requests)]
            assert scores == sample["perturbed_scores"]["even"]
            assert PERTURBATION not in asked

    def test_unperturbed_answers_are_those_of_a_run_without_stability(self, model, tokenizer, folder):
        plain = evaluate(lm(model, tokenizer, stability=None, stability_noise=None), folder)
        repeated = evaluate(lm(model, tokenizer), folder)
        assert [one["resps"] for one in by_row(plain)] == [one["resps"] for one in by_row(repeated)]
        assert "stability" not in plain and not any("perturbed" in name for name in plain["results"]["even"])

    @pytest.mark.parametrize(
        "settings",
        [
            {"use_cache": "dual", "block_length": 4, "refinement": {"policy": "threshold", "threshold": 0.02}},
            {"confidence_threshold": 0.05, "block_length": 4},
            {"reference_compat": True},
        ],
        ids=["cache", "threshold", "released"],
    )
    def test_batch_size_does_not_change_scores(self, model, tokenizer, folder, settings):
        one, three = (
            [
                sample["perturbed_scores"]
                for sample in by_row(evaluate(lm(model, tokenizer, batch_size=n, stability=2, **settings), folder))
            ]
            for n in (1, 3)
        )
        assert one == three

    def test_noise_that_is_tiny_changes_nothing(self, model, tokenizer, folder):
        results = evaluate(lm(model.double(), tokenizer, stability_noise=1e-12), folder)
        assert results["stability"]["answers_changed"]["even"] == 0
        assert results["stability"]["tasks"]["even"]["even,none"]["flip_rate"] == 0

    def test_repetitions_have_the_examples_of_the_run(self, monkeypatch, model, tokenizer, folder):
        harness, asked = lm(model, tokenizer), []
        generate = harness.generation.answers
        monkeypatch.setattr(
            harness.generation,
            "answers",
            lambda requests: asked.append([r.args[0] for r in requests]) or generate(requests),
        )
        evaluate(harness, folder, "shots")
        assert len(asked) == 4 and asked[1:] == [asked[0]] * 3
        monkeypatch.setattr(random.Random, "__deepcopy__", lambda self, memo: self, raising=False)
        del asked[:]
        evaluate(harness, folder, "shots")
        assert asked[1] != asked[0]  # so the examples are random, and the copies needed

    def test_a_killed_run_resumes(self, monkeypatch, model, tokenizer, folder, tmp_path):
        whole = lm(model, tokenizer, batch_size=2)
        expected = evaluate(whole, folder)["stability"]
        forward, passes = LLaDAForDiffusionLM.forward, []

        def killed(self, *args, **kwargs):
            passes.append(1)
            if len(passes) == 40:  # 16 passes a run of seven rows: in the third run
                raise KeyboardInterrupt
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(LLaDAForDiffusionLM, "forward", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(lm(model, tokenizer, batch_size=2), folder, cache=tmp_path / "answers.db")
        resumed = lm(model, tokenizer, batch_size=2)
        found = evaluate(resumed, folder, cache=tmp_path / "answers.db")["stability"]
        assert found == expected
        assert (whole.num_forward_passes, resumed.num_forward_passes) == (64, 64 - 36)
        more = lm(model, tokenizer, batch_size=2, stability=4)
        found = evaluate(more, folder, cache=tmp_path / "answers.db")["stability"]
        assert more.num_forward_passes == 16
        assert found["tasks"]["even"]["even,none"]["scores"][:3] == expected["tasks"]["even"]["even,none"]["scores"]

    def test_processes_share_the_rows(self, monkeypatch, model, tokenizer, folder):
        # The second process runs first, and leaves what it sends for the first.
        expected = evaluate(lm(model, tokenizer, batch_size=2), folder)
        sent, results = [], {}
        for rank in (1, 0):
            harness = lm(model, tokenizer, batch_size=2)
            harness._rank, harness._world_size = rank, 2
            monkeypatch.setattr(harness, "barrier", lambda: None)
            monkeypatch.setattr(harness, "all_gather", lambda tensor: torch.tensor([4, 3]))  # of seven rows
            receive, send = (
                (lambda part, dst: _sort_samples([part, sent.pop(0)])),
                (lambda part, dst: sent.append(part)),
            )
            monkeypatch.setattr(harness, "gather_object", send if rank else receive)
            results[rank] = evaluate(harness, folder)
        assert results[1] is None and not sent
        assert results[0]["stability"] == expected["stability"]

    def test_command_line(self, monkeypatch, folder, tmp_path, capsys):
        settings = ",".join(f"{name}={value}" for name, value in SETTINGS.items())
        arguments = ["--model_args", f"pretrained={folder / 'checkpoint'},{settings}", "--device", "cpu"]
        arguments += ["--tasks", "even", "--include_path", str(folder), "--limit", "4", "--output_path", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["xdlm-eval", *arguments])
        monkeypatch.setattr(cli, "TaskManager", lambda **kwargs: TaskManager(**{**kwargs, "include_defaults": False}))
        monkeypatch.setattr("lm_eval.tasks.TaskManager", cli.TaskManager)
        monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # takes seconds
        cli.main()
        printed = capsys.readouterr().out
        (path,) = tmp_path.rglob("results_*.json")
        results = json.loads(path.read_text())
        found = results["stability"]["tasks"]["even"]["even,none"]
        assert results["config"]["stability"] == 3 and results["config"]["stability_noise"] == 1.0
        assert results["n-samples"]["even"]["effective"] == 4 and len(found["scores"]) == 3
        for name in ("even_flip_rate", "even_interval_high", "even_interval_low", "even_perturbed"):
            assert name in printed
        assert not list(tmp_path.rglob("samples_*"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"stability": 1}, "stability=1 must be an integer of 2 or more, or be left out"),
            ({"stability": -3}, "stability=-3 must be an integer of 2 or more"),
            ({"stability": 0}, "stability=0 must be an integer of 2 or more"),
            ({"stability": 2.5}, "stability=2.5 must be an integer of 2 or more"),
            ({"stability": True}, "stability=True must be an integer of 2 or more"),
            ({"stability_noise": 0}, "stability_noise=0 must be a positive number"),
            ({"stability_noise": -0.1}, "stability_noise=-0.1 must be a positive number"),
            ({"stability_noise": float("nan")}, "stability_noise=nan must be a positive number"),
            ({"stability_noise": "a"}, "stability_noise='a' must be a positive number"),
            ({"stability": None}, "stability_noise=1.0 needs the number of repetitions: add stability=20"),
            ({"temperature": 0.5}, "these settings draw random numbers .* run several seeds instead"),
            ({"sampler": "ancestral"}, "stability repeats greedy answers"),
        ],
    )
    def test_bad_arguments(self, settings, message):
        with pytest.raises(ValueError, match=message):  # the checkpoint does not exist
            XDLMEvalModel("no-such-checkpoint", **{**SETTINGS, **settings})

    def test_answers_drawn_by_task_or_checkpoint(self, monkeypatch, model, tokenizer):
        request = Instance("generate_until", {}, ("Two?", {"temperature": 0.8, "do_sample": True}), 0)
        harness = lm(model, tokenizer)
        monkeypatch.setattr(model, "generate", lambda *args, **kwargs: pytest.fail("generated"))
        with pytest.raises(ValueError, match="leave out stability, and run several seeds"):
            harness.generate_until([request])
        model.generation_config.temperature = 0.7
        with pytest.raises(ValueError, match="leave out stability, and run several seeds"):
            harness.generate_until([Instance("generate_until", {}, ("Two?", {}), 0)])
        model.generation_config.temperature = 0
        model.generation_config.compile = "graphs"
        with pytest.raises(ValueError, match="remove compile from the checkpoint's generation_config.json"):
            harness.generate_until([Instance("generate_until", {}, ("Two?", {}), 0)])

    def test_likelihood_tasks(self, monkeypatch, model, tokenizer, folder, tmp_path):
        scored = (folder / "even.yaml").read_text().replace("task: even", "task: scored")
        (tmp_path / "scored.yaml").write_text(scored.replace("generate_until", "loglikelihood"))
        (tmp_path / "scorer.py").write_text(SCORER)
        monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("computed"))
        with pytest.raises(
            ValueError, match="repeats generated answers only, and scored scores likelihoods: leave out"
        ):
            evaluate(lm(model, tokenizer), tmp_path, "scored")

    def test_the_command_line_refuses_before_the_weights_are_loaded(self, monkeypatch, folder, tmp_path):
        monkeypatch.setattr(LLaDAForDiffusionLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
        monkeypatch.setattr(cli, "TaskManager", lambda **kwargs: TaskManager(**{**kwargs, "include_defaults": False}))
        text = (folder / "even.yaml").read_text()
        (tmp_path / "scorer.py").write_text(SCORER)
        (tmp_path / "scored.yaml").write_text(
            text.replace("generate_until", "loglikelihood").replace("even\n", "s\n", 1)
        )
        drawn = text.replace("until: []", "until: []\n  do_sample: true\n  temperature: 0.8").replace(
            "even\n", "d\n", 1
        )
        (tmp_path / "drawn.yaml").write_text(drawn)
        good = {"model": "xdlm", "include_path": [str(TASKS), str(tmp_path)], "tasks": ["d"]}
        arguments = f"pretrained={folder / 'checkpoint'}"
        cli.check_run({**good, "tasks": ["d", "s"], "model_args": arguments})
        for tasks, message in ((["d"], "d: stability repeats greedy answers"), (["s"], "and s scores likelihoods")):
            with pytest.raises(ValueError, match=message):
                cli.check_run({**good, "tasks": tasks, "model_args": f"{arguments},stability=20"})
