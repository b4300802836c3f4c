"""The lm-eval adapter and its GSM8K task, end to end on a tiny model and a local file."""

import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import lm_eval
import peft
import pytest
import torch
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from models import model_of, save_checkpoint

from xdlm_hf import LLaDAForDiffusionLM
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.evaluation import TASKS, cli
from xdlm_hf.evaluation.adapter import XDLMEvalModel
from xdlm_hf.evaluation.arguments import check_settings
from xdlm_hf.evaluation.tasks import bbh, gsm8k

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("XDLM_DATA", ROOT.parent / "shared" / "data"))
# Questions of different lengths, so that batches are padded and sorted; one gold number with comma and dollar sign.
ROWS = [
    {"question": "Tom has 3 apples and buys 4 more. How many has he?", "answer": "3 + 4 = 7.\n#### 7"},
    {"question": "Two?", "answer": "It is 2.\n#### 2"},
    {"question": "A car costs $900 and then $100 more. What now?", "answer": "900 + 100 = 1000.\n#### $1,000"},
    {"question": "It is 5 degrees and falls by 8. " * 3 + "How cold?", "answer": "5 - 8 = -3.\n#### -3"},
    {"question": "Half of seven?", "answer": "7 / 2 = 3.5\n#### 3.5"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([row["question"] + row["answer"] for row in ROWS], vocab_size=300)


@pytest.fixture
def model(tokenizer):
    return model_of(tokenizer, n_layers=2)


@pytest.fixture
def checkpoint(model, tokenizer, tmp_path):
    return save_checkpoint(tmp_path / "checkpoint", model, tokenizer)


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


PROMPT = "Question: {}\nLet's think step by step\nAnswer:"


def evaluate(lm, data, **kwargs):
    # Without lm-eval's own tasks, whose thousands of files take seconds to read.
    metadata = {"data": str(data), "protocol": "lenient"}
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    # And without shots, which are longer than the tiny model.
    return lm_eval.simple_evaluate(lm, tasks=["xdlm_gsm8k"], task_manager=tasks, num_fewshot=0, **kwargs)


def answers(results):
    return [sample["resps"][0][0] for sample in sorted(results["samples"]["xdlm_gsm8k"], key=lambda s: s["doc_id"])]


def request(context, **asked):
    return Instance("generate_until", doc={}, arguments=(context, asked), idx=0)


def answer_with(monkeypatch, model, tokenizer, text_for_prompt):
    """Replaces `generate` by a stub that finds the prompt of each left-padded row and writes what it is told to."""

    def generate(input_ids, attention_mask, max_new_tokens, **_):
        rows = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            assert mask == sorted(mask), "padding must be on the left"
            text = text_for_prompt(tokenizer.decode(ids[len(mask) - sum(mask) :]))
            new = tokenizer.encode(text) + [tokenizer.eos_token_id] * max_new_tokens
            rows.append(ids + new[:max_new_tokens])
        return type("Output", (), {"sequences": torch.tensor(rows), "num_forward_passes": 1})()

    monkeypatch.setattr(model, "generate", generate)


def gold(prompt):
    """The answer of the row whose question the prompt ends with, and a follow-up question to be cut away."""
    (row,) = [row for row in ROWS if prompt == PROMPT.format(row["question"])]
    return f" {row['answer']}\nQuestion: What is 9 + 9? 18"


def corrupt(text):
    """Every number one digit longer: none stays right, whichever of them is read."""
    return re.sub(r"\d+", lambda number: number.group() + "1", text)


class TestTask:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("It is 12-5, that is 7.", 7),
            ("#### 42\nand 18 more", 42),
            ("about 1,234,567 of them", 1234567),
            ("#### $1,000.00", 1000),
            ("from 5 to -3", -3),
            ("12-5", 5),
            ("a total of 3.50.", 3.5),
            ("so .5 is it", 0.5),
            ("4, 5, 6", 6),
            ("3 #### none", 3),
        ],
    )
    def test_final_number(self, text, value):
        assert gsm8k.final_number(text) == value

    @pytest.mark.parametrize("text", ["", "no number", "####", "- , $ ."])
    def test_no_number_scores_zero(self, text):
        assert gsm8k.final_number(text) is None
        assert gsm8k.process_results({**ROWS[0], "protocol": "lenient"}, [text]) == {"exact_match": 0.0}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "holds no rows"),
            ('{"question": "a"}\n', "line 1: needs the texts 'question' and 'answer'"),
            (json.dumps(ROWS[0]) + "\n[1]\n", "line 2: needs an object"),
            ("{\n", "line 1: not JSON"),
            ('{"question": "a", "answer": "5"}\n', "line 1: the answer must end in '#### <number>', got '5'"),
            ('{"question": "a", "answer": "5 #### x"}\n', "must end in '#### <number>'"),
        ],
    )
    def test_bad_file(self, tmp_path, content, message):
        # The last case has a number, but not where it belongs.
        path = tmp_path / "bad.jsonl"
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(message)):
            gsm8k.load(data=str(path))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (json.dumps(ROWS[0]).encode() + b'\n{"question": "caf\xe9"}\n', "line 2: not UTF-8 (byte 0xe9, invalid"),
            (b"\xff\xfe{", "line 1: not UTF-8 (byte 0xff, invalid start byte)"),
            (json.dumps(ROWS[0]).encode() + b'\n{"question": "a", "ans', "line 2: not JSON (Unterminated string"),
            (b'{"question": "\\ud800", "answer": "#### 1"}', "line 1: holds half a surrogate pair"),
        ],
    )
    def test_undecodable_file(self, tmp_path, content, message):
        path = tmp_path / "bad.jsonl"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
            gsm8k.load(data=str(path))

    def test_line_ends_of_windows_and_separators_within_texts(self, tmp_path):
        row = {"question": "one\u2028two\x85", "answer": "#### 1"}
        path = tmp_path / "rows.jsonl"
        path.write_bytes((json.dumps(row, ensure_ascii=False) + "\r\n").encode() * 2)
        assert list(gsm8k.load(data=str(path))["test"]) == [row | {"protocol": "opencompass"}] * 2

    def test_undecodable_files_of_bbh(self, tmp_path):
        (tmp_path / "bbh" / "tasks").mkdir(parents=True)
        (tmp_path / "bbh" / "cot-prompts").mkdir()
        shots, examples = tmp_path / "bbh" / "cot-prompts" / "snarks.txt", tmp_path / "bbh" / "tasks" / "snarks.json"
        shots.write_bytes(b"canary\n-----\n\xe9")
        with pytest.raises(ValueError, match=re.escape(f"{shots}, line 3: not UTF-8 (byte 0xe9")):
            bbh.load("snarks", data=str(tmp_path))
        shots.write_bytes(b"canary\n-----\nQ: a\nA: b")
        examples.write_bytes(b'{"examples": [\n"\xff"]}')
        with pytest.raises(ValueError, match=re.escape(f"{examples}, line 2: not UTF-8 (byte 0xff")):
            bbh.load("snarks", data=str(tmp_path))

    def test_no_setting_and_no_file(self, monkeypatch, tmp_path):
        monkeypatch.delenv("XDLM_DATA", raising=False)
        asked = []

        def no_hub(*args, **kwargs):
            asked.append((args, kwargs))
            raise ConnectionError("offline")

        monkeypatch.setattr(datasets, "load_dataset", no_hub)
        with pytest.raises(ValueError, match="cannot read openai/gsm8k from the Hub .*--metadata data=PATH or"):
            gsm8k.load()
        assert asked == [(("openai/gsm8k", "main"), {"split": "test", "revision": None})]
        with pytest.raises(ValueError, match=r"no such file: .*gsm8k.test\.jsonl"):
            gsm8k.load(data=str(tmp_path))

    def test_rows_of_the_hub(self, monkeypatch):
        monkeypatch.delenv("XDLM_DATA", raising=False)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: ROWS)
        assert list(gsm8k.load()["test"]) == [{**row, "protocol": "opencompass"} for row in ROWS]

    def test_folder_by_environment_with_shots(self, monkeypatch, model, tokenizer, tmp_path):
        (tmp_path / "gsm8k").mkdir()
        (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
        monkeypatch.setenv("XDLM_DATA", str(tmp_path))
        model.config.max_sequence_length = 20_000
        prompts = []
        answer_with(monkeypatch, model, tokenizer, lambda prompt: prompts.append(prompt) or " #### 7")
        lm = XDLMEvalModel(model, tokenizer=tokenizer, max_new_tokens=32)
        tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
        results = lm_eval.simple_evaluate(lm, tasks=["xdlm_gsm8k"], task_manager=tasks)
        (prompt,) = prompts
        assert prompt.startswith("Question: Angelo and Melanie want") and prompt.count("\n\nQuestion: ") == 4
        assert prompt.count("\nLet's think step by step\nAnswer:") == 5
        assert prompt.endswith(f"The answer is 146\n\n{PROMPT.format(ROWS[0]['question'])}")
        assert results["results"]["xdlm_gsm8k"]["exact_match,none"] == 1.0

    def test_real_gsm8k_gold_answers_score_one_and_corrupted_zero(self):
        if not (DATA / "gsm8k" / "test.jsonl").is_file():
            pytest.skip("no gsm8k/test.jsonl under XDLM_DATA")
        rows = gsm8k.load(data=str(DATA), protocol="lenient")["test"]
        assert len(rows) == 1319
        assert all(gsm8k.process_results(row, [row["answer"]])["exact_match"] == 1 for row in rows)
        assert not any(gsm8k.process_results(row, [corrupt(row["answer"])])["exact_match"] for row in rows)


class TestThroughTheHarness:
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_oracle_scores_one_and_corrupted_zero(self, monkeypatch, model, tokenizer, rows_file, batch_size):
        lm = XDLMEvalModel(model, tokenizer=tokenizer, batch_size=batch_size, max_new_tokens=100)
        answer_with(monkeypatch, model, tokenizer, gold)
        results = evaluate(lm, rows_file)
        assert results["results"]["xdlm_gsm8k"]["exact_match,none"] == 1.0
        # Whole, and in the order of the file although batches are sorted by length.
        texts = [text.partition("<|endoftext|>")[0] for text in answers(results)]
        assert texts == [gold(PROMPT.format(row["question"])) for row in ROWS]
        answer_with(monkeypatch, model, tokenizer, lambda prompt: corrupt(gold(prompt)))
        assert evaluate(lm, rows_file)["results"]["xdlm_gsm8k"]["exact_match,none"] == 0.0

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"use_cache": "dual", "cache_refresh": 2, "block_length": 12, "mixing_ratio": 0.3},
            {"confidence_threshold": 0.02, "mixing_ratio": 0.1},
            {"refinement": "remask_cap", "remask_rate": 0.5},
        ],
        ids=str,
    )
    def test_batch_size_does_not_change_answers(self, model, tokenizer, rows_file, settings):
        settings = {"steps": 8, "max_new_tokens": 24, **settings}
        one, three = (
            answers(evaluate(XDLMEvalModel(model, tokenizer=tokenizer, batch_size=n, **settings), rows_file))
            for n in (1, 3)
        )
        assert one == three
        assert len(set(one)) > 1 and all(one)

    def test_settings_reach_the_results(self, model, tokenizer, rows_file):
        lm = XDLMEvalModel(model, tokenizer=tokenizer, batch_size=2, steps=4, max_new_tokens=8, mixing_ratio=0.1)
        config = evaluate(lm, rows_file)["config"]
        assert config["generation_settings"] == {"steps": 4, "max_new_tokens": 8, "mixing_ratio": 0.1}
        assert config["num_forward_passes"] == 3 * 4  # 5 rows in batches of 2, 4 steps each

    def test_command_line_gives_what_the_model_generates(self, checkpoint, model, tokenizer, rows_file, tmp_path):
        command = Path(sys.executable).parent / "xdlm-eval"
        settings = "steps=8,max_new_tokens=16,block_length=8,mixing_ratio=0.1,dtype=float32,device=cpu"
        finished = subprocess.run(
            [command, "--tasks", "xdlm_gsm8k", "--metadata", f"data={rows_file}", "--batch_size", "2"]
            + ["--model_args", f"pretrained={checkpoint},{settings}", "--limit", "3"]
            + ["--output_path", tmp_path / "scores", "--log_samples", "--num_fewshot", "0"],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
        assert "exact_match" in finished.stdout and "Generating" in finished.stderr
        assert "Custom kwargs" not in finished.stderr and finished.stderr.count("rows are read from the Hub, or") == 1
        (results,) = (tmp_path / "scores").rglob("results_*.json")
        assert json.loads(results.read_text())["config"]["generation_settings"]["block_length"] == 8
        (samples,) = (tmp_path / "scores").rglob("samples_*.jsonl")
        logged = [json.loads(line) for line in samples.read_text().splitlines()]
        got = [sample["resps"][0][0] for sample in sorted(logged, key=lambda sample: sample["doc_id"])]
        expected = []
        for row in ROWS[:3]:
            prompt = torch.tensor([tokenizer.encode(PROMPT.format(row["question"]))])
            ids = model.generate(prompt, steps=8, max_new_tokens=16, block_length=8, mixing_ratio=0.1)[
                0, prompt.shape[1] :
            ]
            text = tokenizer.decode(ids.tolist()).split(tokenizer.eos_token)[0]
            expected.append(re.sub(r"<\|\w+\|>", "", text).split("Question:")[0])
        assert got == expected


class TestAnswers:
    def test_cut_at_stop_string_special_token_and_end_of_text(self, monkeypatch, model, tokenizer):
        texts = {"p1": "one STOP two", "p2": "one<|eot_id|>two", "p3": "one<|endoftext|>two", "p4": "one<|eot_id|>two"}
        answer_with(monkeypatch, model, tokenizer, texts.__getitem__)
        lm = XDLMEvalModel(model, tokenizer=tokenizer, batch_size=4, max_new_tokens=48)
        stops = ["STOP", "<|eot_id|>"]
        first = lm.generate_until([request(p, until=stops) for p in ("p3", "p1", "p2")])
        assert first == ["one", "one ", "one"]
        # Not a stop string of this request: the special token is only left out.
        assert lm.generate_until([request("p4", until="STOP")]) == ["onetwo"]

    def test_long_prompt_loses_its_beginning_with_one_warning(self, monkeypatch, model, tokenizer, caplog):
        prompts = []
        answer_with(monkeypatch, model, tokenizer, lambda prompt: prompts.append(prompt) or "")
        lm = XDLMEvalModel(model, tokenizer=tokenizer, batch_size=2, max_length=20, max_new_tokens=12)
        texts = [ROWS[0]["question"], "Two?", ROWS[3]["question"]]
        lm.generate_until([request(text) for text in texts])
        assert sorted(prompts) == sorted(tokenizer.decode(tokenizer.encode(text)[-8:]) for text in texts)
        assert texts[0] not in prompts and "Two?" in prompts
        warnings = [record.message for record in caplog.records if "lose their beginning" in record.message]
        assert warnings == ["prompts longer than 8 tokens lose their beginning (max_length=20)"]

    def test_no_room_for_a_prompt(self, model, tokenizer):
        with pytest.raises(ValueError, match="max_new_tokens=8 leaves no room for a prompt in max_length=8"):
            XDLMEvalModel(model, tokenizer=tokenizer, max_length=8, max_new_tokens=8)
        lm = XDLMEvalModel(model, tokenizer=tokenizer, max_length=8)
        with pytest.raises(ValueError, match="max_new_tokens=16 leaves no room for a prompt in max_length=8"):
            lm.generate_until([request("a", max_gen_toks=16)])

    def test_empty_prompt_beside_a_long_one(self, model, tokenizer):
        lm = XDLMEvalModel(model, tokenizer=tokenizer, batch_size=2, steps=4, max_new_tokens=8)
        empty, long = lm.generate_until([request(""), request("Tom has 3 apples")])
        assert empty
        assert long == lm.generate_until([request("Tom has 3 apples")])[0] != empty

    def test_the_run_wins_over_the_task_and_says_so_once(self, monkeypatch, model, tokenizer, caplog):
        asked = []
        answer_with(monkeypatch, model, tokenizer, lambda prompt: "")
        stub = model.generate
        monkeypatch.setattr(model, "generate", lambda *args, **kwargs: asked.append(kwargs) or stub(*args, **kwargs))
        lm = XDLMEvalModel(model, tokenizer=tokenizer, max_new_tokens=8, temperature=0.5)
        lm.generate_until(
            [request("a", max_gen_toks=16, do_sample=False), request("b", max_gen_toks=16, do_sample=False)]
        )
        assert [(kwargs["max_new_tokens"], kwargs["temperature"]) for kwargs in asked] == [(8, 0.5)] * 2
        assert len([r for r in caplog.records if "the run's is used" in r.message]) == 2  # one per setting
        caplog.clear()
        lm = XDLMEvalModel(model, tokenizer=tokenizer)
        lm.generate_until([request("a", max_gen_toks=16), request("b", steps=4)])
        assert [(kwargs["max_new_tokens"], kwargs.get("steps")) for kwargs in asked[2:]] == [(16, None), (256, 4)]
        assert not caplog.records

    def test_ancestral_sampler_on_a_greedy_task_and_seed(self, model, tokenizer):
        def draw(seed):
            lm = XDLMEvalModel(model, tokenizer=tokenizer, sampler="ancestral", steps=4, max_new_tokens=16, seed=seed)
            return lm.generate_until([request("Tom has", do_sample=False, temperature=0.0)])

        assert draw(1) == draw(1) != draw(2)

    def test_adapter_is_used(self, model, checkpoint, tokenizer, tmp_path):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "ff_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, config)
        adapted.save_pretrained(tmp_path / "lora")
        settings = {"steps": 4, "max_new_tokens": 16, "device": "cpu"}
        prompt = torch.tensor([tokenizer.encode("Tom has")])
        with torch.no_grad():
            expected = adapted(input_ids=prompt).logits
        plain = XDLMEvalModel(str(checkpoint), **settings)
        lm = XDLMEvalModel(str(checkpoint), peft=str(tmp_path / "lora"), **settings)
        with torch.no_grad():
            torch.testing.assert_close(lm.model(input_ids=prompt).logits, expected)
            assert not torch.allclose(plain.model(input_ids=prompt).logits, expected, atol=1e-2)
        assert lm.model.config.mixing_ratio == plain.model.config.mixing_ratio  # peft alone stores no noise
        assert lm.generate_until([request("Tom has")]) != plain.generate_until([request("Tom has")])

    def test_adapter_brings_its_mixing_ratio(self, model, checkpoint, tmp_path):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
        (tmp_path / "lora" / "xdlm_noise.json").write_text('{"mixing_ratio": 0.75, "noise_schedule": "linear"}')
        lm = XDLMEvalModel(str(checkpoint), peft=str(tmp_path / "lora"), device="cpu")
        assert lm.get_model_info()["model_mixing_ratio"] == 0.75 and lm.model.noise_kernel().mixing_ratio == 0.75

    def test_chat_template(self, model, tokenizer):
        lm = XDLMEvalModel(model, tokenizer=tokenizer)
        prompt = lm.apply_chat_template([{"role": "user", "content": "Two?"}])
        assert "Two?" in prompt and prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
        open_ended = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "It is"}]
        assert lm.apply_chat_template(open_ended, add_generation_prompt=False).endswith("It is")


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"stepz": 4}, r"unknown model arguments \['stepz'\]: xdlm knows pretrained, tokenizer, .*steps"),
            ({"trust_remote_code": True}, "trust_remote_code is neither needed nor accepted"),
            ({"pretrained": None}, "no checkpoint is named: pass --model_args pretrained="),
            ({"batch_size": "automatic"}, "batch_size='automatic' must be a positive integer or \"auto\""),
            ({"check_greedy": "no"}, "check_greedy='no' must be True or False"),
            ({"batch_all": 1}, "batch_all=1 must be True or False"),
            ({"seed": "x"}, "seed='x' must be an integer"),
            ({"device": "gpu"}, "device='gpu' is not known to PyTorch: use cpu, cuda or cuda:0"),
            ({}, "pretrained='no-such-checkpoint' cannot be read, name a folder or a Hub name: \\w"),
            ({"max_batch_size": 0}, "max_batch_size=0 must be a positive integer"),
            ({"mc_samples": 0}, "mc_samples=0 must be a positive integer"),
            ({"batch_size": 0}, "batch_size=0 must be a positive integer"),
            ({"max_length": -1}, "max_length=-1 must be a positive integer"),
            ({"dtype": "int4"}, "dtype='int4' is not known"),
            ({"mixing_ratio": 1.5}, r"mixing_ratio=1.5 must lie in \[0, 1\]"),
            ({"sampler": "beam"}, "sampler='beam' is not known"),
            ({"steps": 9, "max_new_tokens": 8}, "steps=9 is more than max_new_tokens=8"),
            ({"max_new_tokens": 8, "block_length": 3, "steps": 2}, "steps=2 is too few for the 3 blocks"),
            (
                {"max_new_tokens": 8, "block_length": 3, "reference_compat": True},
                "block_length=3 does not divide max_new_tokens=8",
            ),
        ],
    )
    def test_refused_before_anything_is_loaded(self, arguments, message):
        # The checkpoint does not exist: reaching for it would raise something else.
        with pytest.raises(ValueError, match=message):
            XDLMEvalModel(**{"pretrained": "no-such-checkpoint", **arguments})

    def test_refused_before_the_weights_are_loaded(self, monkeypatch, checkpoint, tmp_path):
        monkeypatch.setattr(LLaDAForDiffusionLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
        for arguments, message in (
            ({"max_length": 513}, "max_length=513 is more than the model's limit of 512"),
            ({"max_new_tokens": 512}, "max_new_tokens=512 leaves no room for a prompt in max_length=512"),
            ({"tokenizer": str(tmp_path / "none")}, "tokenizer='.*none' cannot be read, name a folder or a Hub name"),
            ({"peft": str(checkpoint)}, "peft='.*checkpoint' cannot be read, .*adapter_config.json"),
        ):
            with pytest.raises(ValueError, match=message):
                XDLMEvalModel(str(checkpoint), **arguments)

    def test_known_arguments_are_listed_without_inner_names(self):
        with pytest.raises(ValueError) as error:
            XDLMEvalModel("no-such-checkpoint", a=1, b=2)
        assert "['a', 'b']" in str(error.value) and "unknown," not in str(error.value)
        known = str(error.value).partition("xdlm knows ")[2].split(", ")
        assert known[0] == "pretrained" and known[-1] == "reference_compat"  # the adapter's own, then generate's
        assert "seed" in known and len(known) == len(set(known))

    def test_other_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        with pytest.raises(ValueError, match="model_type='gpt2' is not a registered .*; registered are 'llada'"):
            XDLMEvalModel(str(tmp_path))

    def test_model_without_its_tokenizer(self, model):
        with pytest.raises(ValueError, match="pass its tokenizer as well"):
            XDLMEvalModel(model)

    def test_tokenizer_of_another_model(self, model, tokenizer):
        model.config.mask_token_id = 9
        with pytest.raises(ValueError, match="mask token .* has id 5, the model's mask_token_id is 9"):
            XDLMEvalModel(model, tokenizer=tokenizer)

    def test_the_runs_length_limit_is_no_option_of_generate(self):
        check_settings({"max_length": 64, "max_new_tokens": 8, "steps": 4})
        with pytest.raises(ValueError, match="steps=9 is more than max_new_tokens=8"):
            check_settings({"max_length": 64, "max_new_tokens": 8, "steps": 9})


class TestCommandLine:
    def parse(self, monkeypatch, *arguments):
        monkeypatch.setattr(sys, "argv", ["xdlm-eval", *map(str, arguments)])
        return cli.with_defaults(HarnessCLI().parse_args())

    def test_defaults(self, monkeypatch):
        args = self.parse(monkeypatch, "--tasks", "xdlm_gsm8k", "--limit", "2")
        assert (args.model, args.include_path, args.limit) == ("xdlm", [str(TASKS)], 2)

    def test_what_the_user_says_is_kept(self, monkeypatch, tmp_path):
        args = self.parse(monkeypatch, "--tasks", "a", "--model", "hf", "--include_path", "mine")
        assert (args.model, args.include_path) == ("hf", [str(TASKS), "mine"])
        config = tmp_path / "run.yaml"
        config.write_text("model: hf\ninclude_path: theirs\ntasks: [a]\n")
        args = self.parse(monkeypatch, "--config", config)
        assert (args.model, args.include_path) == ("hf", [str(TASKS), "theirs"])

    @pytest.mark.parametrize("extra", [[], ["--limit", "2"]], ids=["file alone", "and flags"])
    def test_options_of_a_config_file(self, monkeypatch, tmp_path, extra):
        for name, content in (
            ("run.yaml", "tasks: a,b\nlimit: 5\nmodel_args:\n  steps: 3\n"),
            ("run.json", '{"tasks": "a,b", "limit": 5, "model_args": {"steps": 3}}'),
        ):
            (tmp_path / name).write_text(content)
            options = cli.merged_options(self.parse(monkeypatch, "--config", tmp_path / name, *extra))
            assert (options["model"], options["tasks"], options["model_args"]) == ("xdlm", "a,b", {"steps": 3})
            assert options["limit"] == (2 if extra else 5)

    def test_everything_is_checked_before_the_weights_are_loaded(self, monkeypatch, checkpoint, rows_file, tmp_path):
        monkeypatch.setattr(LLaDAForDiffusionLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
        arguments = f"pretrained={checkpoint}"
        good = {"model": "xdlm", "tasks": ["xdlm_gsm8k"], "include_path": [], "metadata": {"data": str(rows_file)}}
        cli.check_run({**good, "model_args": arguments, "apply_chat_template": True})
        bare = shutil.copytree(checkpoint, tmp_path / "bare")
        (bare / "chat_template.jinja").unlink()
        for options, message in (
            ({}, "no checkpoint is named: pass --model_args pretrained="),
            ({"tasks": []}, "no task is named: pass --tasks"),
            ({"model_args": f"{arguments},stepz=1"}, r"unknown model arguments \['stepz'\]"),
            ({"model_args": arguments, "batch_size": "x"}, "batch_size='x' must be a positive integer"),
            ({"model_args": arguments, "metadata": "data=nowhere"}, "no such file: nowhere"),
            ({"model_args": f"{arguments},steps=300"}, "steps=300 is more than max_new_tokens=256"),
            ({"model_args": f"{arguments},peft=nowhere"}, "peft='nowhere' cannot be read"),
            (
                {"model_args": f"{arguments},max_length=256"},
                "xdlm_gsm8k: max_new_tokens=256 leaves no room .*=256: sho",
            ),
            (
                {"model_args": arguments, "gen_kwargs": {"max_gen_toks": 512}},
                "xdlm_gsm8k: max_new_tokens=512 leaves no room for a prompt in max_length=512: shorten it",
            ),
            (
                {"model_args": arguments, "output_path": f"{rows_file}/out"},
                "output_path=.*/out cannot be written .*Not a",
            ),
            ({"model_args": arguments, "output_path": f"{rows_file}/out/a.json"}, "output_path=.* cannot be written"),
            ({"model_args": arguments, "use_cache": f"{rows_file}/out"}, "use_cache=.*/out cannot be written"),
            ({"model_args": f"{arguments},item_log={rows_file}/a"}, "item_log=.*/a cannot be written"),
            ({"model_args": arguments, "limit": 0}, "--limit 0 leaves one of 1 processes without a row"),
            ({"model_args": f"pretrained={bare}", "apply_chat_template": True}, "the tokenizer of .*bare has none"),
        ):
            with pytest.raises(ValueError, match=message):
                cli.check_run({**good, **options})
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(ValueError, match="--limit 3 leaves one of 4 processes without a row"):
            cli.check_run({**good, "model_args": arguments, "limit": 3})

    def test_places_to_write_are_tried_and_not_made(self, tmp_path):
        cli.check_places({"output_path": str(tmp_path / "a" / "b"), "use_cache": str(tmp_path / "c" / "d")})
        assert not list(tmp_path.iterdir())

    def test_the_run_shortens_what_tasks_ask_for(self, monkeypatch, checkpoint, rows_file):
        monkeypatch.setattr(LLaDAForDiffusionLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
        options = {"model": "xdlm", "tasks": "xdlm_gsm8k", "include_path": [], "metadata": f"data={rows_file}"}
        cli.check_run({**options, "model_args": f"pretrained={checkpoint},max_length=256,max_new_tokens=16"})

    def test_lengths_of_other_tasks_are_checked_against_the_config(self, monkeypatch, checkpoint, rows_file, tmp_path):
        # Without lm-eval's own tasks, whose thousands of files take seconds to read.
        monkeypatch.setattr(cli, "TaskManager", functools.partial(TaskManager, include_defaults=False))
        (checkpoint / "model.safetensors").unlink()
        task = (
            "task: {}\ndataset_path: json\noutput_type: {}\ntest_split: train\ndataset_kwargs:\n  data_files: {}\n"
            'doc_to_text: "{{{{question}}}}"\ndoc_to_target: "{{{{answer}}}}"\n'
            "generation_kwargs:\n  max_gen_toks: 600\n  until: []\n"
        )
        (tmp_path / "long.yaml").write_text(task.format("long", "generate_until", rows_file))
        (tmp_path / "scored.yaml").write_text(task.format("scored", "loglikelihood", rows_file))
        (tmp_path / "lost.yaml").write_text(task.format("lost", "generate_until", tmp_path / "nowhere.jsonl"))
        pretrained = f"pretrained={checkpoint}"
        options = {"model": "xdlm", "include_path": [str(TASKS), str(tmp_path)], "model_args": pretrained}
        for name in ("long", str(tmp_path / "lo*g.yaml")):
            with pytest.raises(ValueError, match="long: max_new_tokens=600 leaves no room .* in max_length=512: sho"):
                cli.check_run({**options, "tasks": [name]})
        with pytest.raises(ValueError, match="rows of lost cannot be read: .*nowhere"):
            cli.check_run({**options, "tasks": ["lost"]})
        with pytest.raises(ValueError, match="long: steps=601 is more than max_new_tokens=600"):
            cli.check_run({**options, "tasks": ["long"], "model_args": f"{pretrained},steps=601"})
        cli.check_run({**options, "tasks": ["scored"]})
        cli.check_run({**options, "tasks": ["long"], "model_args": f"{pretrained},max_new_tokens=16"})

    def test_wildcards_in_tasks(self, rows_file, tmp_path):
        for folder, suffix, text in (("tasks", "json", '{"examples": [{"input": "a", "target": "b"}]}'),) + (
            ("cot-prompts", "txt", "Q: a\nA: b"),
        ):
            (tmp_path / "bbh" / folder).mkdir(parents=True)
            for task in TASKS.glob("xdlm_bbh_*.yaml"):
                (tmp_path / "bbh" / folder / f"{task.stem.removeprefix('xdlm_bbh_')}.{suffix}").write_text(text)
        data = {"data": str(tmp_path)}
        assert len(cli.check_tasks(["xdlm_bbh_*"], [], data, False, {})) == 27
        assert cli.check_tasks(["xdlm_bbh_s*s", "xdlm_bbh_sn*"], [], data, False, {}) == {"xdlm_bbh_snarks": 256}
        with pytest.raises(ValueError, match=r"unknown tasks \['xdlm_b\*x'\]: this package has"):
            cli.check_tasks(["xdlm_bbh_*", "xdlm_b*x"], [], data, False, {})

    def test_one_line_for_the_hint_of_every_task(self, rows_file, caplog):
        cli._ONE_HINT.said = False
        logger = logging.getLogger("lm_eval.api.task")
        logger.addHandler(caplog.handler)
        try:
            for _ in range(3):
                cli.check_tasks(["xdlm_gsm8k"], [], {"data": str(rows_file)}, False, {})
            logger.warning("another warning")
        finally:
            logger.removeHandler(caplog.handler)
        messages = [record.getMessage() for record in caplog.records]
        assert [text for text in dict.fromkeys(messages) if messages.count(text)] == [
            "rows are read from the Hub, or as --metadata says: data=PATH or data=hub@REVISION",
            "another warning",
        ]

    def test_error_is_one_line(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sys, "argv", ["xdlm-eval", "run", "--config", str(tmp_path / "none.yaml")])
        with pytest.raises(SystemExit, match="xdlm-eval: Config file not found: .*none.yaml"):
            cli.main()

    def test_other_commands(self, monkeypatch):
        args = self.parse(monkeypatch, "ls", "tasks")
        assert args.include_path == [str(TASKS)] and "model" not in args
