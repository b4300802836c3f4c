"""Scores name what they were made with, and models and rows are read at one commit of the Hub.

The Hub is stood in for by its cache: branches and snapshots on the disk, as a download leaves them.
"""

import json
import logging
import re
from types import SimpleNamespace

import datasets
import huggingface_hub
import lm_eval
import peft
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError
from lm_eval.tasks import TaskManager
from models import model_of, save_checkpoint

from xdlm_hf import LLaDAForDiffusionLM
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.evaluation import TASKS, manifest, rows, table16
from xdlm_hf.evaluation.adapter import XDLMEvalModel
from xdlm_hf.evaluation.tasks import bbh, competition_math

OLD, NEW, ADAPTER = "a" * 40, "b" * 40, "c" * 40
NAME, LORA = "someone/model", "someone/lora"
ROWS = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(3)]
SETTINGS = {"steps": 4, "max_new_tokens": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([row["question"] + row["answer"] for row in ROWS], vocab_size=270)


def save_model(folder, tokenizer, seed):
    model = model_of(tokenizer, seed=seed, max_sequence_length=128)
    save_checkpoint(folder, model, tokenizer)
    return model


def name_commit(cache, repository, branch, commit):
    """Lets a branch of the stand-in name a commit."""
    refs = cache / f"models--{repository.replace('/', '--')}" / "refs"
    refs.mkdir(exist_ok=True)
    (refs / branch).write_text(commit)


@pytest.fixture
def hub(tmp_path, monkeypatch, tokenizer):
    """A cache with two commits of a model, of which `main` names the old one, and an adapter with k = 0.75."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshots = cache / "models--someone--model" / "snapshots"
    for seed, commit in enumerate((OLD, NEW)):
        save_model(snapshots / commit, tokenizer, seed)
    name_commit(cache, NAME, "main", OLD)
    name_commit(cache, NAME, "v2", NEW)
    lora = cache / "models--someone--lora" / "snapshots" / ADAPTER
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(LLaDAForDiffusionLM.from_pretrained(snapshots / OLD), config).save_pretrained(lora)
    (lora / "xdlm_noise.json").write_text('{"mixing_ratio": 0.75, "noise_schedule": "linear"}')
    name_commit(cache, LORA, "v1", ADAPTER)
    return cache


@pytest.fixture
def data(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def weights(folder):
    return LLaDAForDiffusionLM.from_pretrained(folder).get_input_embeddings().weight


class TestRevisionsOfModels:
    def test_a_revision_is_read_and_named(self, hub, caplog):
        snapshots = hub / "models--someone--model" / "snapshots"
        for revision, commit in ((None, OLD), ("main", OLD), ("v2", NEW), (NEW, NEW)):
            lm = XDLMEvalModel(NAME, revision=revision, **SETTINGS)
            torch.testing.assert_close(lm.model.get_input_embeddings().weight, weights(snapshots / commit))
            info = lm.get_model_info()
            assert (info["model_revision"], info["model_sha"]) == (revision, commit)

    def test_a_branch_that_moves_while_loading_is_read_at_one_commit(self, hub, monkeypatch):
        check = manifest.cached_file

        def then_move(*args, **kwargs):
            found = check(*args, **kwargs)
            name_commit(hub, NAME, "main", NEW)
            return found

        monkeypatch.setattr(manifest, "cached_file", then_move)
        lm = XDLMEvalModel(NAME, **SETTINGS)
        old = hub / "models--someone--model" / "snapshots" / OLD
        torch.testing.assert_close(lm.model.get_input_embeddings().weight, weights(old))
        assert lm.get_model_info()["model_sha"] == OLD

    def test_adapter_and_tokenizer_have_their_own(self, hub):
        arguments = {"peft": LORA, "peft_revision": "v1", "tokenizer": NAME, "tokenizer_revision": "v2"}
        lm = XDLMEvalModel(NAME, **arguments, **SETTINGS)
        info = lm.get_model_info()
        assert (info["model_sha"], info["peft_sha"], info["tokenizer_sha"]) == (OLD, ADAPTER, NEW)
        assert info["model_mixing_ratio"] == 0.75  # the noise is read at the adapter's revision too

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"revision": "v9"}, f"pretrained='{NAME}' at revision 'v9' cannot be read"),
            ({"peft": LORA}, f"peft='{LORA}' cannot be read"),  # it has no branch main
            ({"peft": LORA, "peft_revision": "v2"}, f"peft='{LORA}' at revision 'v2' cannot be read"),
            ({"peft_revision": "v2"}, "peft_revision='v2' needs peft, the name of a repository"),
            ({"tokenizer_revision": "v2"}, "tokenizer_revision='v2' needs tokenizer, the name of a repository"),
        ],
    )
    def test_unknown_ones_are_refused(self, hub, monkeypatch, arguments, message):
        monkeypatch.setattr(LLaDAForDiffusionLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
        with pytest.raises(ValueError, match=re.escape(message)):
            XDLMEvalModel(NAME, **arguments, **SETTINGS)

    def test_a_folder_has_none(self, hub):
        folder = str(hub / "models--someone--model" / "snapshots" / OLD)
        with pytest.raises(ValueError, match="revision: '.*' is a local folder, which has no revisions: leave"):
            XDLMEvalModel(folder, revision="v2", **SETTINGS)


class TestKit:
    def arguments(self, data, *more):
        folder = ["--data", str(data), "--output_dir", str(data / "out"), "--device", "cpu"]
        cell = ["--row", "llada-xdlm", "--checkpoint", NAME, "--steps", "4", "--tasks", "gsm8k", "--limit", "2"]
        return [*cell, "--max_new_tokens", "8", *folder, *more]

    def test_a_changed_checkpoint_is_not_mixed_into_a_folder(self, hub, data):
        table16.main(self.arguments(data))
        name_commit(hub, NAME, "main", NEW)
        with pytest.raises(SystemExit, match=f"other settings .model_sha='{OLD}', now '{NEW}'.: name another"):
            table16.main(self.arguments(data))
        name_commit(hub, NAME, "stable", OLD)  # the same commit under another name
        table16.main(self.arguments(data, "--revision", "stable"))
        with pytest.raises(SystemExit, match=f"model_sha='{OLD}', now '{NEW}'"):
            table16.main(self.arguments(data, "--revision", "v2"))
        with pytest.raises(SystemExit, match=f"peft_sha=None, now '{ADAPTER}'"):
            table16.main(self.arguments(data, "--revision", OLD, "--peft", LORA, "--peft_revision", "v1"))

    def test_manifest(self, hub, data, monkeypatch):
        monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
        table16.main(self.arguments(data))
        found = json.loads((data / "out" / "llada-xdlm-4" / "manifest.json").read_text())
        run = found["runs"]["xdlm_gsm8k"]
        assert found["settings"]["model_sha"] == run["model"]["model_sha"] == OLD
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", run["date"])
        read = run["model"]["data"][str(data / "gsm8k" / "test.jsonl")]
        assert re.fullmatch("[0-9a-f]{64}", read["sha256"])
        hardware = run["model"]["hardware"]
        assert (hardware["device"], hardware["torch"], hardware["cuda"]) == ("cpu", torch.__version__, None)
        assert hardware["name"] and hardware["threads"] == torch.get_num_threads()
        assert run["model"]["sandbox_layers"] is None


class TestHashes:
    def test_of_a_folder_cover_all_that_decides_answers(self, tokenizer, tmp_path):
        model = save_model(tmp_path, tokenizer, 0)
        first = manifest.content_sha(str(tmp_path), None)
        assert re.fullmatch("[0-9a-f]{64}", first)
        (tmp_path / "README.md").write_text("words")
        assert manifest.content_sha(str(tmp_path), None) == first
        path = tmp_path / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # one bit in the middle of the weights
        path.write_bytes(content)
        second = manifest.content_sha(str(tmp_path), None)
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
        third = manifest.content_sha(str(tmp_path), None)
        model.config.mixing_ratio = 0.1
        model.config.save_pretrained(tmp_path)
        assert len({first, second, third, manifest.content_sha(str(tmp_path), None)}) == 4

    def test_of_a_folder_are_those_of_the_weights_that_were_loaded(self, tokenizer, tmp_path):
        save_model(tmp_path, tokenizer, 0)
        before = manifest.content_sha(str(tmp_path), None)
        lm = XDLMEvalModel(str(tmp_path), **SETTINGS)
        save_model(tmp_path, tokenizer, 1)
        assert lm.get_model_info()["model_sha"] == before != manifest.content_sha(str(tmp_path), None)

    def test_layers_of_the_sandbox(self, monkeypatch):
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
        assert "limits" in manifest.sandbox_layers()

        def broken():
            raise ValueError("the sandbox does not work on this machine")

        monkeypatch.setattr(manifest, "layers", broken)
        assert manifest.sandbox_layers() == ["none: the sandbox does not work on this machine"]


class TestRevisionsOfRows:
    @pytest.fixture
    def dataset(self, monkeypatch):
        """openai/gsm8k with two commits; what was loaded is in `loaded`."""
        fake = SimpleNamespace(offline=False, loaded=[], names={None: OLD, "v2": NEW, OLD: OLD, NEW: NEW})

        def dataset_info(_, name, revision=None, timeout=None):
            if fake.offline:
                raise OfflineModeIsEnabled("the Hub is out of reach")
            if revision not in fake.names:
                raise RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
            return SimpleNamespace(sha=fake.names[revision])

        def load_dataset(name, config, split, revision):
            fake.loaded.append(revision)
            return ROWS[:2] if revision == NEW else ROWS

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.delenv("XDLM_DATA", raising=False)
        monkeypatch.setattr(rows, "READ", {})
        rows._pinned.cache_clear()
        yield fake
        rows._pinned.cache_clear()

    def read(self, setting):
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": setting})
        return len(manager.load(["xdlm_gsm8k"])["tasks"]["xdlm_gsm8k"].dataset["test"])

    @pytest.mark.parametrize(
        ("setting", "commit"), [(None, OLD), ("hub", OLD), ("hub@v2", NEW), (f"hub@{NEW}", NEW), (f"hub@{OLD}", OLD)]
    )
    def test_rows_are_read_at_a_commit(self, dataset, setting, commit):
        assert self.read(setting) == (2 if commit == NEW else 3)
        assert dataset.loaded == [commit]
        assert rows.READ["openai/gsm8k main test"]["commit"] == commit

    def test_tasks_of_several_files(self, dataset, monkeypatch):
        rows_of = {"SaylorTwift/bbh": {"input": "a", "target": "b"}}
        problem = {"problem": "What is $1 + 1$?", "solution": "It is $\\boxed{2}$."}

        def load_dataset(name, config, split, revision):
            dataset.loaded.append(revision)
            return [rows_of.get(name, problem)]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert len(competition_math.load(data="hub@v2")["test"]) == 7
        assert len(bbh.load("snarks", data="hub@v2")["test"]) == 1
        assert dataset.loaded == [NEW] * 8

    def test_a_branch_that_moves_between_check_and_run(self, dataset):
        assert self.read("hub@v2") == 2
        dataset.names["v2"] = OLD
        assert self.read("hub@v2") == 2

    def test_the_setting_wins_over_the_environment(self, dataset, monkeypatch):
        monkeypatch.setenv("XDLM_DATA", "nowhere")
        assert self.read(f"hub@{NEW}") == 2
        monkeypatch.setenv("XDLM_DATA", "hub@v2")
        assert self.read(None) == 2

    def test_hash_tells_rows_apart_offline_too(self, dataset, caplog):
        dataset.offline = True
        with caplog.at_level(logging.WARNING):
            self.read("hub@v2")
        assert "openai/gsm8k is not pinned to a revision: the Hub did not say which commit 'v2' is" in caplog.text
        first = rows.READ["openai/gsm8k main test"]
        assert dataset.loaded == ["v2"] and first["commit"] is None
        dataset.offline = False
        rows._pinned.cache_clear()
        self.read("hub@v2")
        assert rows.READ["openai/gsm8k main test"]["sha256"] != first["sha256"]

    def test_unknown_revision(self, dataset):
        with pytest.raises(ValueError, match="dataset 'openai/gsm8k' has no revision 'v9' on the Hub"):
            self.read("hub@v9")


class TestResults:
    def test_of_the_command_line(self, hub, data):
        lm = XDLMEvalModel(NAME, **SETTINGS)
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(data)})
        results = lm_eval.simple_evaluate(lm, tasks=["xdlm_gsm8k"], task_manager=manager, num_fewshot=0)
        config = results["config"]
        assert config["model_sha"] == OLD and config["hardware"]["device"] == "cpu"
        assert str(data / "gsm8k" / "test.jsonl") in config["data"] and "sandbox_layers" in config
