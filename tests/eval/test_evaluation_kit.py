"""The reproduction kit and what it rests on: processes, caches, automatic batches, likelihoods through the harness."""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from models import model_of, save_checkpoint
from training import ENDS_CLEANLY

from xdlm_hf import LLaDAForDiffusionLM
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.evaluation import TASKS, cli, published, rescore, table16
from xdlm_hf.evaluation.adapter import XDLMEvalModel
from xdlm_hf.evaluation.likelihood import Estimate
from xdlm_hf.evaluation.protocols import END_OF_TEXT

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"question": f"{'Well. ' * (n % 4)}What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(7)]
SETTINGS = {"steps": 4, "max_new_tokens": 8, "mixing_ratio": 0.1}
DRAWN = [{"temperature": 0.8}, {"sampler": "ancestral"}, {"remasking": "random", "temperature": 0.5}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([row["question"] + row["answer"] for row in ROWS], vocab_size=270)


@pytest.fixture
def model(tokenizer):
    return model_of(tokenizer, max_sequence_length=128)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    model = model_of(tokenizer, max_sequence_length=128)
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), model, tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "gsm8k").mkdir()
    (folder / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def evaluate(lm, data, **kwargs):
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(data)})
    return lm_eval.simple_evaluate(lm, tasks=["xdlm_gsm8k"], task_manager=manager, num_fewshot=0, **kwargs)


def answers(results):
    samples = results["samples"]["xdlm_gsm8k"]
    return {sample["doc_id"]: sample["resps"][0][0] for sample in samples}


def by_row(sample):
    return sample["doc_id"]


def generation(context, **asked):
    return Instance("generate_until", doc={}, arguments=(context, {"until": [], **asked}), idx=0)


def likelihood(*arguments):
    return Instance("loglikelihood", doc={}, arguments=arguments, idx=0)


class TestBatchesAndCaches:
    def test_automatic_batches_halve_until_they_fit(self, monkeypatch, model, tokenizer, caplog):
        expected = XDLMEvalModel(model, tokenizer=tokenizer, **SETTINGS)
        requests = [generation(row["question"]) for row in ROWS]
        wanted = expected.generate_until(requests)
        sizes, generate = [], model.generate

        def small_memory(input_ids, **kwargs):
            sizes.append(len(input_ids))
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return generate(input_ids, **kwargs)

        monkeypatch.setattr(model, "generate", small_memory)
        lm = XDLMEvalModel(model, tokenizer=tokenizer, batch_size="auto", max_batch_size=7, **SETTINGS)
        assert lm.generate_until(requests) == wanted
        assert sizes == [7, 4, 2, 2, 2, 1] and lm.batch_size == 2
        assert "out of memory with 7 rows: batch_size=4" in caplog.text
        fixed = XDLMEvalModel(model, tokenizer=tokenizer, batch_size=7, **SETTINGS)
        with pytest.raises(torch.OutOfMemoryError):
            fixed.generate_until(requests)

    def test_response_cache_and_limit(self, monkeypatch, model, tokenizer, data, tmp_path):
        lm = XDLMEvalModel(model, tokenizer=tokenizer, batch_size=2, **SETTINGS)
        first = evaluate(lm, data, limit=3, use_cache=str(tmp_path / "cache"))
        assert len(answers(first)) == 3 and lm.num_forward_passes == 2 * 4
        again = evaluate(lm, data, use_cache=str(tmp_path / "cache"))
        # Four new rows in two batches; the first three come from the cache.
        assert lm.num_forward_passes == 4 * 4
        assert answers(again).items() >= answers(first).items() and len(answers(again)) == len(ROWS)

    def test_automatic_batches_of_likelihoods_halve_too(self, monkeypatch, model, tokenizer):
        requests = [likelihood(row["question"], f" {n} or so") for n, row in enumerate(ROWS)]
        expected = XDLMEvalModel(model, tokenizer=tokenizer, mc_samples=4).loglikelihood(requests)
        sizes, forward = [], model.forward

        def small_memory(input_ids, **kwargs):
            sizes.append(len(input_ids))
            if len(input_ids) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(input_ids, **kwargs)

        monkeypatch.setattr(model, "forward", small_memory)
        automatic = {"batch_size": "auto", "max_batch_size": 10}
        lm = XDLMEvalModel(model, tokenizer=tokenizer, mc_samples=4, **automatic)
        got = lm.loglikelihood(requests)
        assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
        assert sizes[:3] == [7, 4, 2] and max(sizes[3:]) == 2  # greedy decoding comes first, one row per request
        sizes.clear()
        lm = XDLMEvalModel(model, tokenizer=tokenizer, mc_samples=4, check_greedy=False, **automatic)
        assert [value for value, _ in lm.loglikelihood(requests)] == pytest.approx([v for v, _ in expected], abs=1e-4)
        assert sizes[:3] == [10, 5, 3] and max(sizes[3:]) == 3 and len(lm.likelihoods.estimates) == len(ROWS)

    @pytest.mark.parametrize("drawn", [{}, *DRAWN, {"reference_compat": True}], ids=str)
    def test_scores_at_batch_sizes_1_3_8(self, model, tokenizer, data, drawn):
        runs = [
            evaluate(XDLMEvalModel(model, tokenizer=tokenizer, batch_size=n, **SETTINGS, **drawn), data)
            for n in (1, 3, 8)
        ]
        assert answers(runs[0]) == answers(runs[1]) == answers(runs[2])
        assert len(set(answers(runs[0]).values())) > 1

    @pytest.mark.parametrize("drawn", DRAWN, ids=str)
    def test_draws_depend_on_request_repetition_and_seed(self, model, tokenizer, drawn):
        def draw(*requests, **arguments):
            lm = XDLMEvalModel(model, tokenizer=tokenizer, batch_size=4, **SETTINGS, **drawn, **arguments)
            return lm.generate_until(list(requests)), lm.num_forward_passes

        one, other = generation("What is 2 + 2?"), generation("What is 3 + 3?")
        # lm-eval repeats a request by listing the same object; the same text in another row is another object.
        texts, passes = draw(one, other, one, one, generation("What is 2 + 2?"))
        assert len(set(texts[:1] + texts[2:4])) == 3 and texts[4] == texts[0]
        assert 4 * 4 < passes <= 5 * 4  # one by one; the ancestral sampler skips steps in which nothing changes
        assert draw(other, one)[0] == texts[1::-1]
        assert draw(one, seed=1)[0] != texts[:1]
        # In one batch on request: fewer forward passes, and draws that depend on the batch.
        together, passes = draw(one, other, one, one, batch_all=True)
        assert passes <= 4 and together == draw(one, other, one, one, batch_all=True)[0] != texts[:4]

    def test_seed_of_the_command_line(self, checkpoint, data, tmp_path):
        write_choice_task(tmp_path)
        manager = TaskManager(
            include_path=[str(TASKS), str(tmp_path)], include_defaults=False, metadata={"data": str(data)}
        )
        settings = {"pretrained": str(checkpoint), "mc_samples": 4, "temperature": 0.8, "device": "cpu", **SETTINGS}

        def run(seed, /, **arguments):
            """Answers and likelihoods as lm-eval's command makes them for --seed."""
            results = lm_eval.simple_evaluate(
                "xdlm",
                model_args={**settings, **arguments},
                tasks=["xdlm_gsm8k", "choice"],
                task_manager=manager,
                num_fewshot=0,
                torch_random_seed=seed,
            )
            assert results["config"]["seed"] == arguments.get("seed", seed)
            return answers(results), [row["resps"] for row in results["samples"]["choice"]]

        first, other = run(7), run(8)
        assert run(7) == first
        assert first[0] != other[0] and first[1] != other[1]
        assert run(8, seed=7) == first  # the model argument wins

    def test_what_the_checkpoint_says_about_draws(self, monkeypatch, model, tokenizer):
        monkeypatch.setattr(model.generation_config, "sampler", "ancestral")
        lm = XDLMEvalModel(model, tokenizer=tokenizer, steps=4, max_new_tokens=8, batch_size=2)
        asked = []
        monkeypatch.setattr(
            lm.generation, "_answer", lambda contexts, how, *_: asked.append((len(contexts), how.settings)) or [""]
        )
        lm.generate_until([generation("a", do_sample=False), generation("b", do_sample=False)])
        lm.generate_until([generation("a", do_sample=True, temperature=0.5)])
        # One by one, and without the temperature 0 that greedy tasks ask for; another one is the task's own.
        assert [rows for rows, _ in asked] == [1, 1, 1]
        assert [settings.get("temperature") for _, settings in asked] == [None, None, 0.5]

    def test_whole_answers_show_their_end_of_text(self, monkeypatch, model, tokenizer):
        lm, generate = XDLMEvalModel(model, tokenizer=tokenizer, **SETTINGS), model.generate
        first, second, eos = lm.tok_encode("W")[0], lm.tok_encode("h")[0], tokenizer.eos_token_id

        def fixed(**kwargs):
            output = generate(**kwargs)
            output.sequences[:, -8:] = torch.tensor([first, eos, eos, second, eos, tokenizer.mask_token_id, eos, eos])
            return output

        monkeypatch.setattr(model, "generate", fixed)
        end = END_OF_TEXT
        assert lm.generate_until([generation("What", eos_token_id=[])]) == [f"W{end}{end}h{end}{end}{end}"]
        assert lm.generate_until([generation("What")]) == ["W"]


class TestLikelihoodThroughTheHarness:
    def test_results_carry_their_error_and_keep_their_order(self, model, tokenizer):
        lm = XDLMEvalModel(model, tokenizer=tokenizer, batch_size=5, mc_samples=16)
        pairs = [("What is", " 2 + 2?"), ("", "What"), ("What is 1 + 1?", " It is 2, of course"), ("What is ", "3")]
        together = lm.loglikelihood([likelihood(*pair) for pair in pairs])
        alone = [lm.loglikelihood([likelihood(*pair)])[0] for pair in pairs]
        assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
        assert all(isinstance(value, Estimate) and value < 0 for value, _ in together)
        summary = lm.get_model_info()["likelihoods"]
        assert summary["count"] == 8 and 0 < summary["mean_standard_error"] <= summary["max_standard_error"]

    def test_mixing_ratio_of_the_run(self, model, tokenizer, caplog):
        requests = [likelihood("What is", " 2 + 2?"), likelihood("", "What")]

        def values(**arguments):
            return XDLMEvalModel(model, tokenizer=tokenizer, mc_samples=8, **arguments).loglikelihood(requests)

        own, asked = values(), values(mixing_ratio=0.3)
        assert [r.message for r in caplog.records if "bounds under" in r.message] == [
            "likelihoods are bounds under mixing_ratio=0.3; the checkpoint was trained at 0.0"
        ]
        caplog.clear()
        model.config.mixing_ratio = 0.3
        assert values() == values(mixing_ratio=0.3) == asked != own and not caplog.records
        rolling = XDLMEvalModel(model, tokenizer=tokenizer, mc_samples=8, mixing_ratio=0.0).loglikelihood_rolling
        assert rolling([likelihood("What")]) != XDLMEvalModel(
            model, tokenizer=tokenizer, mc_samples=8
        ).loglikelihood_rolling([likelihood("What")])

    def test_logged_samples_hold_standard_errors(self, model, tokenizer, data, tmp_path):
        write_choice_task(tmp_path)
        manager = TaskManager(
            include_path=[str(TASKS), str(tmp_path)], include_defaults=False, metadata={"data": str(data)}
        )

        def logged(mc_samples):
            lm = XDLMEvalModel(model, tokenizer=tokenizer, mc_samples=mc_samples, **SETTINGS)
            tracker = cli.Tracker(output_path=str(tmp_path / str(mc_samples)))
            results = lm_eval.simple_evaluate(
                lm, tasks=["choice", "xdlm_gsm8k"], task_manager=manager, num_fewshot=0, evaluation_tracker=tracker
            )
            samples = results.pop("samples")
            expected = [[[one.standard_error for one, _ in part] for part in row["resps"]] for row in samples["choice"]]
            tracker.save_results_aggregated(results=results, samples=samples)
            rows = {}
            for task in samples:
                tracker.save_results_samples(task_name=task, samples=samples[task])
                (path,) = (tmp_path / str(mc_samples)).rglob(f"samples_{task}_*.jsonl")
                rows[task] = [json.loads(line) for line in path.read_text().splitlines()]
            return rows, expected

        rows, expected = logged(8)
        assert [row["standard_errors"] for row in rows["choice"]] == expected
        assert all(error > 0 for row in expected for ((error,), _) in [row])
        assert not any("standard_errors" in row for row in rows["xdlm_gsm8k"])
        # One draw has no standard error, and no NaN gets into the file.
        assert not any("standard_errors" in row for row in logged(1)[0]["choice"])

    def test_greedy(self, model, tokenizer):
        lm = XDLMEvalModel(model, tokenizer=tokenizer, mc_samples=2)
        prompt = "What is"
        ids = model.generate(torch.tensor([lm.tok_encode(prompt)]), max_new_tokens=3, eos_token_id=[])[0, -3:].tolist()
        pair = type("P", (), {"context": tuple(lm.tok_encode(prompt)), "continuation": tuple(ids)})
        other = type("P", (), {"context": pair.context, "continuation": (*ids[:2], (ids[2] + 1) % 200)})
        assert lm.likelihoods.are_greedy([pair, other, pair]) == [True, False, True]

    def test_rolling_counts_every_token_once(self, model, tokenizer):
        text = "".join(row["question"] for row in ROWS)
        lm = XDLMEvalModel(model, tokenizer=tokenizer, mc_samples=4, max_length=24, batch_size=4)
        seen, bounds = [], lm.likelihoods.bounds
        lm.likelihoods.bounds = lambda pairs: seen.extend(pairs) or bounds(pairs)
        (value,) = lm.loglikelihood_rolling([likelihood(text)])
        assert sum((pair.continuation for pair in seen), ()) == tuple(lm.tok_encode(text))
        assert len(seen) > 1 and all(len(pair.context) + len(pair.continuation) <= 24 for pair in seen)
        assert value < 0 and value.standard_error > 0
        assert lm.loglikelihood_rolling([likelihood("")]) == [0.0]

    def test_long_context_and_too_long_continuation(self, model, tokenizer, caplog):
        lm = XDLMEvalModel(model, tokenizer=tokenizer, mc_samples=2, max_length=16)
        lm.loglikelihood([likelihood(ROWS[3]["question"] * 4, " 7"), likelihood(ROWS[3]["question"] * 4, " 8")])
        assert len([r for r in caplog.records if "contexts lose their beginning" in r.message]) == 1
        with pytest.raises(ValueError, match="a continuation of .* tokens is longer than max_length=16"):
            lm.loglikelihood([likelihood("a", ROWS[3]["question"] * 4)])

    def test_a_multiple_choice_task(self, model, tokenizer, tmp_path):
        write_choice_task(tmp_path)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        scores = []
        for batch_size in (1, 5):
            lm = XDLMEvalModel(model, tokenizer=tokenizer, mc_samples=8, batch_size=batch_size)
            results = lm_eval.simple_evaluate(lm, tasks=["choice"], task_manager=manager)
            scores.append(results["results"]["choice"]["acc,none"])
        assert scores[0] == scores[1] and 0 <= scores[0] <= 1


def write_choice_task(folder):
    """A multiple-choice task `choice` of two rows."""
    rows = [{"q": "What is 1 + 1?", "choices": ["2", "3"], "a": 0}, {"q": "Well.", "choices": ["4", "5"], "a": 1}]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(
        "task: choice\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\ndataset_kwargs:\n"
        f"  data_files: {folder / 'choice.jsonl'}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{a}}"\n'
        "metric_list:\n  - metric: acc\n"
    )


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    + ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
}


class TestProcesses:
    @pytest.mark.parametrize(
        ("launcher", "drawn"),
        [
            pytest.param("accelerate", {}, id="accelerate-greedy"),
            pytest.param("torchrun", {"temperature": 0.8}, id="torchrun-drawn", marks=pytest.mark.slow),
        ],
    )
    def test_two_processes_give_the_answers_of_one(self, checkpoint, data, tmp_path, launcher, drawn):
        write_choice_task(tmp_path)
        settings = {**SETTINGS, **drawn, "mc_samples": 4}
        lm = XDLMEvalModel(str(checkpoint), batch_size=3, device="cpu", **settings)
        manager = TaskManager(
            include_path=[str(TASKS), str(tmp_path)], include_defaults=False, metadata={"data": str(data)}
        )
        one = lm_eval.simple_evaluate(lm, tasks=["xdlm_gsm8k", "choice"], task_manager=manager, num_fewshot=0)
        arguments = ",".join(f"{name}={value}" for name, value in settings.items())
        port = ["--main_process_port", free_port()] if launcher == "accelerate" else []
        done = subprocess.run(
            [sys.executable, *LAUNCHERS[launcher], *port, ENDS_CLEANLY, "xdlm_hf.evaluation.cli", "run"]
            + ["--tasks", "xdlm_gsm8k,choice", "--include_path", str(tmp_path), "--num_fewshot", "0"]
            + ["--model_args", f"pretrained={checkpoint},{arguments}", "--batch_size", "3", "--device", "cpu"]
            + ["--metadata", json.dumps({"data": str(data)}), "--log_samples", "--output_path", str(tmp_path / "out")],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        two = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
        for task in ("xdlm_gsm8k", "choice"):
            lines = next(tmp_path.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
            rows, expected = [json.loads(line) for line in lines], sorted(one["samples"][task], key=by_row)
            assert [row["doc_id"] for row in rows] == [row["doc_id"] for row in expected]
            if task == "choice":  # bounds and whether greedy decoding gives the choice
                got, want = ([pair for row in part for (pair,) in row["resps"]] for part in (rows, expected))
                assert [float(value) for value, _ in got] == pytest.approx([value for value, _ in want], abs=1e-4)
                assert [greedy for _, greedy in got] == [str(greedy) for _, greedy in want]
                errors = [error for row in rows for (error,) in row["standard_errors"]]
                assert errors == pytest.approx([value.standard_error for value, _ in want], abs=1e-4)
            else:
                assert [row["resps"][0][0] for row in rows] == [row["resps"][0][0] for row in expected]
                assert len({row["resps"][0][0] for row in rows}) > 1
        assert two["results"]["xdlm_gsm8k"]["exact_match,none"] == one["results"]["xdlm_gsm8k"]["exact_match,none"]
        assert two["results"]["choice"]["acc,none"] == one["results"]["choice"]["acc,none"]
        assert two["config"]["num_processes"] == 2
        # Seven rows: four here, three there. In batches of three two batches, one by one four; four steps each.
        assert two["config"]["num_forward_passes"] == (4 if drawn else 2) * 4


def cached_answers(folder):
    """Answers that are safe on disk."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{folder}/answers_rank0.db?mode=rw", uri=True)) as cache:
            return cache.execute("SELECT count(*) FROM unnamed").fetchone()[0]
    except sqlite3.OperationalError:  # not there yet
        return 0


# As `python -m eval.table16` runs it in a checkout; kills its own process group in pass 40 of 16 for each answer.
KILLED_IN_THE_THIRD_ANSWER = """
import os, runpy, signal, sys
from xdlm_hf import LLaDAForDiffusionLM

forward, passes = LLaDAForDiffusionLM.forward, []

def killed(self, *args, **kwargs):
    passes.append(1)
    if len(passes) == 40:
        os.killpg(0, signal.SIGKILL)
    return forward(self, *args, **kwargs)

LLaDAForDiffusionLM.forward = killed
runpy.run_module("eval.table16", run_name="__main__", alter_sys=True)
"""


def item_lines(folder):
    return len((folder / "items_rank0.jsonl").read_text().splitlines())


class TestTable16:
    def arguments(self, checkpoint, data, folder, *more):
        arguments = ["--row", "llada-xdlm", "--checkpoint", str(checkpoint), "--steps", "4", "--tasks", "gsm8k"]
        arguments += ["--data", str(data), "--max_new_tokens", "8", "--device", "cpu", "--output_dir", str(folder)]
        return [*arguments, *more]

    def test_the_row_of_edits_above_a_threshold(self, checkpoint, data, tmp_path, capsys):
        """The same weights as llada-xdlm; only the refinement differs, and there is no published score beside it."""
        settings = []
        for row in ("llada-xdlm", "llada-xdlm-edit"):
            table16.main([*self.arguments(checkpoint, data, tmp_path, "--limit", "1"), "--row", row])
            settings.append(json.loads((tmp_path / f"{row}-4" / "settings.json").read_text()))
        threshold = {"policy": "threshold", "threshold": table16.EDIT_THRESHOLD}
        assert settings[1] == {**settings[0], "refinement": threshold}
        assert "| 4 | llada-xdlm-edit | 1 (limited) | - / - | 0.00 / - |" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="refinement"):
            table16.main(
                [*self.arguments(checkpoint, data, tmp_path, "--reference_compat"), "--row", "llada-xdlm-edit"]
            )

    def test_run_kill_and_go_on(self, monkeypatch, checkpoint, data, tmp_path, capsys):
        calls, generate = [], LLaDAForDiffusionLM.generate

        def killed_after_two(self, *args, **kwargs):
            if len(calls) == 2 and kwargs.pop("kill", True):
                raise KeyboardInterrupt
            calls.append(kwargs)
            return generate(self, *args, **kwargs)

        arguments = self.arguments(checkpoint, data, tmp_path, "--batch_size", "2")
        monkeypatch.setattr(LLaDAForDiffusionLM, "generate", killed_after_two)
        with pytest.raises(KeyboardInterrupt):
            table16.main(arguments)
        assert not list(tmp_path.rglob("manifest.json"))
        calls.clear()
        monkeypatch.setattr(LLaDAForDiffusionLM, "generate", lambda *a, **k: calls.append(k) or generate(*a, **k))
        table16.main(arguments)
        assert len(calls) == 2  # three rows are left of seven: four were done
        manifest = json.loads((tmp_path / "llada-xdlm-4" / "manifest.json").read_text())
        items = manifest["items"]["xdlm_gsm8k"]
        assert [item["doc_id"] for item in items] == list(range(7))
        assert all(item["seconds"] > 0 and item["forward_passes"] == 4 and item["batch_rows"] <= 2 for item in items)
        assert all({"answer", "exact_match", "prompt_hash"} <= item.keys() for item in items)
        assert manifest["settings"]["mixing_ratio"] == 0.1 and manifest["settings"]["block_length"] == 8
        run = manifest["runs"]["xdlm_gsm8k"]
        assert run["versions"]["torch"] and run["commit"] and run["limit"] is None and manifest["seed"] == 0
        assert "| 4 | llada-xdlm | 7 |" in capsys.readouterr().out
        # The same answers as an undisturbed run.
        table16.main(self.arguments(checkpoint, data, tmp_path / "whole", "--batch_size", "7"))
        whole = json.loads((tmp_path / "whole" / "llada-xdlm-4" / "manifest.json").read_text())
        assert [i["answer"] for i in whole["items"]["xdlm_gsm8k"]] == [i["answer"] for i in items]

    def test_kill_of_the_whole_group_and_go_on(self, checkpoint, data, tmp_path):
        """Killed in the middle of the third answer."""
        one_by_one = ["--batch_size", "1", "--steps", "16", "--max_new_tokens", "16"]
        arguments = self.arguments(checkpoint, data, tmp_path / "killed", *one_by_one)
        folder = tmp_path / "killed" / "llada-xdlm-16"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", KILLED_IN_THE_THIRD_ANSWER, *arguments]
        run = subprocess.run(command, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
        assert run.returncode == -signal.SIGKILL
        done, before = cached_answers(folder), item_lines(folder)
        assert done == before == 2 and not (folder / "manifest.json").exists()
        table16.main(arguments)
        assert item_lines(folder) - before == len(ROWS) - done  # only what was missing is generated
        table16.main(self.arguments(checkpoint, data, tmp_path / "whole", *one_by_one))
        assert self.without_times(folder) == self.without_times(tmp_path / "whole" / folder.name)

    def without_times(self, folder):
        """The manifest without times, and without its folder's name."""
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest.pop("seconds") > 0 and manifest["forward_passes"] == len(ROWS) * 16
        run = manifest["runs"]["xdlm_gsm8k"]
        assert run["command"].pop("output_dir") and run["model"].pop("use_cache") and run.pop("date")
        assert run["model"].pop("data")  # of all that this process has read, in other tests too
        assert all(item.pop("seconds") > 0 for item in manifest["items"]["xdlm_gsm8k"])
        return manifest

    def test_cell_by_cell(self, checkpoint, data, tmp_path, capsys):
        (tmp_path / "math").mkdir()
        row = {"problem": "What is $1 + 1$?", "solution": "It is $\\boxed{2}$."}
        (tmp_path / "math" / "test.jsonl").write_text(json.dumps(row) + "\n")
        table16.main(self.arguments(checkpoint, data, tmp_path / "out", "--limit", "2"))
        math_alone = self.arguments(checkpoint, tmp_path, tmp_path / "out")
        math_alone[math_alone.index("gsm8k")] = "math"
        table16.main(math_alone)
        manifest = json.loads((tmp_path / "out" / "llada-xdlm-4" / "manifest.json").read_text())
        assert {task: len(items) for task, items in manifest["items"].items()} == {"xdlm_gsm8k": 2, "xdlm_math": 1}
        assert [manifest["runs"][task]["limit"] for task in ("xdlm_gsm8k", "xdlm_math")] == [2, None]
        assert manifest["scores"].keys() == manifest["items"].keys() and manifest["forward_passes"] == 2 * 4
        assert "| 4 | llada-xdlm | 3 (limited) | - / - | 0.00 / - | 0.00 / - |" in capsys.readouterr().out

    def test_go_on_with_another_number_of_processes(self, monkeypatch, checkpoint, data, tmp_path):
        arguments = self.arguments(checkpoint, data, tmp_path)
        table16.main(arguments)
        folder = tmp_path / "llada-xdlm-4"
        (folder / "answers_rank0.db").rename(folder / "answers_rank5.db")
        monkeypatch.setattr(LLaDAForDiffusionLM, "generate", lambda *args, **kwargs: pytest.fail("done again"))
        table16.main(arguments)

    @pytest.mark.slow
    def test_two_processes_write_the_manifest_of_one(self, checkpoint, data, tmp_path):
        run = subprocess.run(
            [sys.executable, *LAUNCHERS["torchrun"], ENDS_CLEANLY, "eval.table16"]
            + self.arguments(checkpoint, data, tmp_path / "two", "--batch_size", "1"),
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        assert "| 4 | llada-xdlm | 7 |" in run.stdout
        table16.main(self.arguments(checkpoint, data, tmp_path / "one", "--batch_size", "1"))
        two, one = (json.loads((tmp_path / n / "llada-xdlm-4" / "manifest.json").read_text()) for n in ("two", "one"))
        kept = ("doc_id", "answer", "exact_match", "forward_passes")
        for ours, theirs in zip(two["items"]["xdlm_gsm8k"], one["items"]["xdlm_gsm8k"], strict=True):
            assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}
        assert two["scores"] == one["scores"]

    def test_retrained_checkpoint_does_not_get_the_former_ones_answers(self, checkpoint, data, tmp_path):
        mine = shutil.copytree(checkpoint, tmp_path / "checkpoint")
        table16.main(self.arguments(mine, data, tmp_path / "out", "--limit", "1"))
        model = LLaDAForDiffusionLM.from_pretrained(mine)
        model.get_input_embeddings().weight.data[0, 0] += 1
        model.save_pretrained(mine)
        with pytest.raises(
            SystemExit, match="answers made with other settings .model_sha='[0-9a-f]{64}', now '[0-9a-f]{64}'"
        ):
            table16.main(self.arguments(mine, data, tmp_path / "out", "--limit", "1"))

    def test_other_settings_do_not_mix(self, checkpoint, data, tmp_path):
        table16.main(self.arguments(checkpoint, data, tmp_path, "--limit", "1"))
        with pytest.raises(SystemExit, match=r"answers made with other settings \(seed=0, now 1\): name another"):
            table16.main(self.arguments(checkpoint, data, tmp_path, "--limit", "1", "--seed", "1"))

    def test_other_protocol(self, checkpoint, data, tmp_path, capsys):
        table16.main(self.arguments(checkpoint, data, tmp_path, "--limit", "2"))
        with pytest.raises(SystemExit, match=r"other settings \(protocol='opencompass', now 'lenient'\)"):
            table16.main(self.arguments(checkpoint, data, tmp_path, "--limit", "2", "--protocol", "lenient"))
        rescore.main([str(tmp_path), "--protocol", "lenient", "--data", str(data)])
        rescored = json.loads((tmp_path / "llada-xdlm-4" / "rescored_lenient.json").read_text())
        assert [item["doc_id"] for item in rescored["items"]["xdlm_gsm8k"]] == [0, 1]
        assert "generated with protocol=opencompass, scored with protocol=lenient" in capsys.readouterr().out

    def test_the_authors_sampler(self, monkeypatch, checkpoint, data, tmp_path):
        asked, generate = [], LLaDAForDiffusionLM.generate
        monkeypatch.setattr(LLaDAForDiffusionLM, "generate", lambda *a, **k: asked.append(k) or generate(*a, **k))
        table16.main(self.arguments(checkpoint, data, tmp_path, "--limit", "2", "--reference_compat"))
        assert all(kwargs["reference_compat"] is True for kwargs in asked) and asked
        manifest = json.loads((tmp_path / "llada-xdlm-4-reference_compat" / "manifest.json").read_text())
        assert manifest["reference_compat"] and manifest["settings"]["reference_compat"]

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--steps", "9"], "--steps 9 must be whole numbers from 1 to 8"),
            (["--steps", "4,x"], "--steps 4,x must be whole numbers"),
            (["--tasks", "gsm8k,arc"], r"--tasks: unknown \['arc'\], choose of bbh,gsm8k"),
            (["--data", "nowhere"], "no such file: nowhere"),
        ],
    )
    def test_refused_before_the_model_is_loaded(self, checkpoint, data, tmp_path, more, message):
        with pytest.raises(SystemExit, match=message):
            table16.main(self.arguments("no-such-checkpoint", data, tmp_path, *more))
        assert not list(tmp_path.iterdir())

    def test_row_without_public_checkpoint(self, data, tmp_path):
        with pytest.raises(SystemExit, match="checkpoint of llada-mdlm is not public: name yours with --checkpoint"):
            table16.main(["--row", "llada-mdlm", "--tasks", "gsm8k", "--data", str(data)])


class TestPublished:
    def test_sixteen_lines_and_their_counts(self):
        assert len(published.PUBLISHED) == 16
        for (row, steps), scores in published.PUBLISHED.items():
            counted = sum(scores[f"mbpp {name}"] for name in published.MBPP_COUNTS)
            assert 496 <= counted <= 500, (row, steps)
            assert math.isclose(scores["mbpp pass"] / 5, scores["mbpp"]), (row, steps)

    def test_table(self):
        manifest = {
            "row": "llada",
            "steps": 32,
            "reference_compat": False,
            "protocol": "opencompass",
            "runs": {"xdlm_gsm8k": {"limit": None}, "xdlm_mbpp": {"limit": None}},
            "scores": {"xdlm_gsm8k": {"exact_match,none": 0.25}, "xdlm_mbpp": {"pass_at_1,executed": 0.5}},
            "groups": {},
            "items": {
                "xdlm_mbpp": [
                    {"pass_at_1": 1.0, "failed": 0.0, "wrong": 0.0},
                    {"pass_at_1": 0.0, "failed": 1.0, "wrong": 0.0},
                ]
            },
        }
        line = published.markdown_table([manifest]).splitlines()[-1]
        percents = "- / 42.68 | 25.00 / 24.49 | - / 4.80 | - / 5.49 | 50.00 / 6.80"
        assert line == f"| 32 | llada | 2 | {percents} | 1 / 429 | 0 / 37 | 1 / 34 |"
