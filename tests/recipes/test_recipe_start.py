"""How the recipes start: from random weights, on a disk with room, and with one line for every mistake of the user."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import model_of, tiny_model
from safetensors.torch import load_file
from test_recipe import RECIPE, TEXTS, base, options  # noqa: F401
from training import launch, logged
from transformers import AutoModelForCausalLM, AutoTokenizer

from xdlm_hf import LLaDAConfig
from xdlm_hf.training.processes import run_script

sys.path.insert(0, str(RECIPE.parent))

import llada_cpt  # noqa: E402
import plan  # noqa: E402

SIZES = {"d_model": 32, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 48, "max_sequence_length": 64}


@pytest.fixture
def config(tmp_path):
    LLaDAConfig(**SIZES).save_pretrained(tmp_path / "config")
    return tmp_path / "config" / "config.json"


# --------------------------------------------------------------------------------------------------------------------
# Random weights


def test_random_weights_and_a_tokenizer_trained_on_the_data(base, tmp_path, config):  # noqa: F811
    changes = {"model_name_or_path": None, "config_name": config, "tokenizer_vocab_size": 320}
    changes |= {"save_strategy": "steps", "save_steps": 3, "resume_from_checkpoint": "auto"}
    llada_cpt.main(options(base, tmp_path / "whole", **changes))
    llada_cpt.main(options(base, tmp_path / "run", **changes | {"max_steps": 3}))
    llada_cpt.main(options(base, tmp_path / "run", **changes))  # reads the checkpoint's tokenizer, trains none
    assert logged(tmp_path / "run") == logged(tmp_path / "whole") and len(logged(tmp_path / "run")) == 6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.vocab_size == len(tokenizer) > 262 and model.config.mask_token_id == tokenizer.mask_token_id
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0])  # it has learned words of the data
    assert model.config.embedding_size == len(tokenizer)  # whatever the config's own vocabulary was


def test_random_weights_with_a_given_tokenizer_are_those_of_the_seed(base, tmp_path, config):  # noqa: F811
    changes = {"model_name_or_path": None, "config_name": config, "tokenizer_name": base / "model", "learning_rate": 0}
    changes |= {"max_steps": 1, "validation_fraction": None}
    llada_cpt.main(options(base, tmp_path / "run", seed=5, **changes))
    llada_cpt.main(options(base, tmp_path / "other", seed=6, **changes))
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    expected = model_of(tokenizer, seed=5, **SIZES, init_std=LLaDAConfig().init_std).state_dict()
    written, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "other"))
    assert all(torch.equal(written[name], expected[name]) for name in written)
    assert any(not torch.equal(written[name], other[name]) for name in written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer_name": None},
            r"starts from random weights, which have no tokenizer: give tokenizer_name \(llada_cpt",
        ),
        (
            {"tokenizer_vocab_size": 320},
            "tokenizer_vocab_size=320 trains a tokenizer for random weights: give config_name",
        ),
        ({"lora_rank": 2}, "lora_rank=2 with config_name=.*: adapters on random weights"),
        ({"sequence_length": 100}, "sequence_length=100 exceeds the model's limit of 64"),
    ],
)
def test_random_weights_that_cannot_be_are_refused(base, tmp_path, config, changes, message):  # noqa: F811
    values = {"model_name_or_path": None, "config_name": config, "tokenizer_name": base / "model", **changes}
    with pytest.raises(ValueError, match=message):
        llada_cpt.main(options(base, tmp_path / "run", **values))
    assert not (tmp_path / "run").exists()


def test_sizes_with_a_misspelt_field_are_refused(base, tmp_path, config):  # noqa: F811
    """The fields that LLaDA's own files have beside those of the class are no mistake."""
    sizes = json.loads(config.read_text())
    config.write_text(json.dumps({**sizes, "alibi_bias_max": 8.0, "attention_layer_norm_with_affine": True}))
    values = {"model_name_or_path": None, "config_name": config, "tokenizer_name": base / "model", "max_steps": 1}
    llada_cpt.main(options(base, tmp_path / "run", **values))
    config.write_text(json.dumps({**sizes, "n_layer": 3}))
    message = "fields that LLaDAConfig does not know: n_layer=3. Correct or remove them; its fields: .*n_layers"
    with pytest.raises(ValueError, match=message):
        llada_cpt.main(options(base, tmp_path / "other", **values))
    assert not (tmp_path / "other").exists()


# --------------------------------------------------------------------------------------------------------------------
# Disk, logging, and the plan without the Hub


def test_a_run_starts_only_where_its_checkpoints_fit(base, tmp_path, monkeypatch):  # noqa: F811
    changes = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    weights = 4 * tiny_model(vocab_size=320).num_parameters()
    needed = 2 * 3 * weights  # two checkpoints at once: weights and two moments
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(
        ValueError, match=r"output_dir='.*/run': the run needs 0\.0 GiB of disk \(2 checkpoints at once"
    ):
        llada_cpt.main(options(base, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    llada_cpt.main(options(base, tmp_path / "run", **changes))


def test_a_loss_is_logged_after_the_first_step(base, tmp_path):  # noqa: F811
    llada_cpt.main(options(base, tmp_path / "run", logging_steps=None, max_steps=12))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 10]


def test_a_plan_needs_no_hub_for_llada_8b(capsys, monkeypatch):
    """And the copy here is what the public checkpoint has (test_planning.py: its number of parameters)."""
    llada_cpt.main(["--plan", "--dtype", "bfloat16", "--bf16", "true", "--lora_rank", "8", "--plan_gpu_memory", "400"])
    text = capsys.readouterr().out
    assert "this repository's copy of GSAI-ML/LLaDA-8B-Base's" in text and "loading" in text and "GiB of disk" in text
    config, is_copy = plan.planned_config("GSAI-ML/LLaDA-8B-Instruct")
    assert is_copy and config.mask_token_id == 126336 and config.dtype == torch.bfloat16
    defaults = LLaDAConfig(mask_token_id=126336, eos_token_id=126081, pad_token_id=126081)
    for name in ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "embedding_size", "max_sequence_length"):
        assert getattr(config, name) == getattr(defaults, name), name
    with pytest.raises(ValueError, match="model='someone/else' cannot be read as a folder or Hub name"):
        plan.planned_config("someone/else")


# --------------------------------------------------------------------------------------------------------------------
# One line for a mistake


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_name_or_path": "{base}/gone"},
            "model='.*/gone' cannot be read as a folder or Hub name of a checkpoint: ",
        ),
        ({"tokenizer_name": "{base}/gone"}, "the tokenizer of '.*/gone' cannot be read: "),
        ({"config_name": "gone.json", "tokenizer_name": "{base}"}, "model='gone.json' cannot be read as a folder"),
        ({"eval_strategy": "sometimes"}, "'sometimes' is not a valid IntervalStrategy|invalid .* value"),
        (
            {"load_best_model_at_end": "true", "eval_strategy": "no", "save_strategy": "steps"},
            "load_best_model_at_end requires the save and eval",
        ),
    ],
)
def test_mistakes_are_one_line(base, tmp_path, changes, message):  # noqa: F811
    changes = {name: str(value).format(base=base / "model") for name, value in changes.items()}
    with pytest.raises((ValueError, SystemExit)) as error:
        llada_cpt.main(options(base, tmp_path / "run", **changes))
    if isinstance(error.value, ValueError):
        error.match(message)
        assert "\n" not in str(error.value)
    else:
        assert error.value.code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "the weights of '.*' cannot be read: "),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{broken}", "the weights of '.*' cannot be read: "),
        ("config.json", b"{", "cannot be read as a folder or Hub name of a checkpoint: "),
        ("config.json", b'{"model_type": "llada", "d_model": "wide"}', "cannot be read as .*d_model"),
        ("config.json", b'{"model_type": "bert"}', "model_type='bert' is not a registered diffusion model"),
    ],
)
def test_damaged_checkpoints_are_one_line(base, tmp_path, file, content, message):  # noqa: F811
    shutil.copytree(base / "model", tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    if content is not None:
        (tmp_path / "model" / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        llada_cpt.main(options(base, tmp_path / "run", model_name_or_path=tmp_path / "model"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"max_steps: [1, 2", r"run\.yaml cannot be read as YAML: while parsing .* line 1"),
        (b"max_steps: \xff", r"run\.yaml cannot be read as YAML: .*utf-8"),
    ],
)
def test_unreadable_config_files_are_one_line(tmp_path, content, message):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        llada_cpt.parse(["--config", str(tmp_path / "run.yaml")])
    assert "\n" not in str(error.value)


def test_values_of_another_type_are_refused_in_config_files_too(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("max_steps: 1.5\n")
    with pytest.raises(SystemExit) as stop:
        llada_cpt.parse(["--config", str(tmp_path / "run.yaml")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "invalid int value: '1.5'" in said and said.count("\n") < 4


def test_the_script_ends_with_one_line_and_status_1(base, tmp_path):  # noqa: F811
    status, output = launch(str(RECIPE), *options(base, tmp_path / "run", model_name_or_path=tmp_path / "gone"))
    said = [line for line in output.splitlines() if "/gone" in line]
    assert status == 1 and "Traceback" not in output
    assert len(said) == 1 and said[0].startswith("llada_cpt.py: error: ")


def a_bug():
    raise TypeError("not a message")


@pytest.mark.parametrize("error", [a_bug, lambda: int("x"), lambda: json.loads("{")])
def test_defects_keep_their_traceback(error):
    """Also errors of the same classes, if neither this package nor the script raises them."""
    with pytest.raises((TypeError, ValueError)):
        run_script(error)


def test_a_message_of_the_package_becomes_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(Path("somewhere") / "script.py")])
    with pytest.raises(SystemExit, match=r"^script\.py: error: .*mixing_ratio=2.* must lie in \[0, 1\]"):
        run_script(lambda: LLaDAConfig(mask_token_id=1).__class__ and __import__("xdlm_hf").NoiseKernel(8, 2.0, 1))
