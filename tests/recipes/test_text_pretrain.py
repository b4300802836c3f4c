"""Pretraining of text models from scratch, at the size of seconds: configs, data, and the models that come out."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import CONFIGS, THREE_STEPS, flags
from transformers import AutoModelForCausalLM, AutoTokenizer

from xdlm_hf import GIDDProcess, StationaryProcess
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.training.checkpointing import run_record

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import text_pretrain  # noqa: E402

SENTENCES = ["the quick brown fox jumps over the lazy dog", "a slow green turtle walks under the old bridge"]
SMALL = {"hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2, "model_length": 32, "dropout": 0.0}
# k and share of uniform noise, as the config files have them.
SYSTEMS = {"mdlm": 0.0, "udlm": 1.0, "xdlm": 0.1, "gidd": None}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Text, a tokenizer without mask token as GPT-2's, and small configs of the two kinds of noise."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(" ".join(SENTENCES * 60))
    documents = [json.dumps({"text": " ".join(SENTENCES * (1 + i % 3))}) for i in range(40)]
    (folder / "documents.jsonl").write_text("\n".join(documents))
    tokenizer = train_tokenizer(SENTENCES, 270)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, file in (("stationary", "dit_small_text8"), ("gidd", "dit_small_text8_gidd")):
        published = json.loads((CONFIGS / "models" / f"{file}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps({**published, **SMALL}))
    return folder


def options(files, name, output_dir, **changes):
    chosen = {
        "config": CONFIGS / "text" / f"{name}.yaml",
        "config_name": files / ("gidd.json" if name.endswith("gidd") else "stationary.json"),
        "output_dir": output_dir,
        **THREE_STEPS,
        "sequence_length": 24,
        "per_device_eval_batch_size": 8,
        "validation_rows": 8,
        "eval_steps": 2,
        "logging_steps": 1,
        **changes,
    }
    return flags(chosen)


@pytest.mark.parametrize("path", sorted((CONFIGS / "text").glob("*_*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_the_papers(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["--config", str(path), "--use_cpu", "true", "--per_device_train_batch_size", "512"]
    model, corpus, args, _ = text_pretrain.parse(command)
    text_pretrain.check(corpus, args)
    if path.stem == "owt_from_mdlm":
        assert (model.config_name, model.model_name_or_path) == (None, "kuleshov-group/mdlm-owt")
        return
    config = text_pretrain.recipe.model_config(model)
    name, system = path.stem.split("_")
    assert (name, corpus.sequence_length) in (("owt", 1024), ("lm1b", 128), ("text8", 256))
    sizes = {name: getattr(config, name) for name in ("hidden_dim", "n_blocks", "n_heads", "cond_dim", "dropout")}
    assert sizes == {"hidden_dim": 768, "n_blocks": 12, "n_heads": 12, "cond_dim": 128, "dropout": 0.1}
    assert (args.learning_rate, args.warmup_steps, args.max_steps, args.ema_decay) == (3e-4, 2500, 1_000_000, 0.9999)
    assert (args.weight_decay, args.adam_beta1, args.adam_beta2, args.max_grad_norm, args.seed) == (0, 0.9, 0.999, 1, 1)
    rows = {"owt": 50258, "lm1b": 30522, "text8": 35}[name]
    assert (config.model_length, config.vocab_size) == (corpus.sequence_length, rows)
    assert args.output_dir == f"outputs/{name}-{system}"
    if system == "gidd":
        assert not args.noise_given and args.gidd_weighting == "dynamic"
        assert (config.noise_process, config.p_uniform) == ("gidd", 0.0)
    else:
        assert (args.mixing_ratio, args.noise_schedule, args.gidd_weighting) == (SYSTEMS[system], "loglinear", "elbo")
        assert config.noise_process == "stationary"


@pytest.mark.parametrize("system", SYSTEMS)
def test_from_text_to_samples(files, tmp_path, system):
    """All four systems: a run on characters, its average as the model, and samples of it."""
    trainer = text_pretrain.main(options(files, f"text8_{system}", tmp_path / "run", data_files=files / "text.txt"))
    assert trainer.state.global_step == 3 and len(trainer.eval_dataset) == 8
    record = run_record(trainer)
    assert record["mixing_ratio"] == SYSTEMS[system]
    assert record["noise_schedule"] == (None if system == "gidd" else "loglinear")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    process = model.noise_process()
    if system == "gidd":
        assert isinstance(process, GIDDProcess) and process.p_uniform == 0
    else:
        assert isinstance(process, StationaryProcess) and process.kernel.mixing_ratio == SYSTEMS[system]
    assert model.config.ema_decay == 0.9999 and model.config.vocab_size == 35 and model.config.mask_token_id == 4
    saved = load_file(tmp_path / "run" / "model.safetensors")
    with trainer.averaged_weights():
        assert all(torch.equal(saved[name], value) for name, value in trainer.model.named_parameters())
    assert not all(torch.equal(saved[name], value) for name, value in trainer.model.named_parameters())
    nelbo = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert nelbo[-1] < nelbo[0] < 3.6  # of random weights: log 35 = 3.56
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = model.generate(steps=4, max_new_tokens=24, num_return_sequences=2, seed=0)
    assert ids.shape == (2, 24) and len(tokenizer.batch_decode(ids)) == 2
    assert system == "udlm" or not (ids == 4).any()


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_documents_of_a_corpus_from_local_files(files, tmp_path, streaming):
    """A tokenizer like GPT-2's gets a mask token; rows begin and end with its end-of-text token."""
    changes = {"data_files": files / "documents.jsonl", "validation_files": files / "documents.jsonl"}
    changes |= {"tokenizer_name": files / "tokenizer", "streaming": streaming, "shuffle_buffer": 4}
    trainer = text_pretrain.main(options(files, "owt_xdlm", tmp_path / "run", **changes))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.mask_token == "[MASK]" and tokenizer.mask_token_id == trainer.model.config.mask_token_id
    row = trainer.eval_dataset[0]["input_ids"]
    assert len(row) == 24 and row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id


def test_training_goes_on_at_another_k(files, tmp_path):
    run = {"data_files": files / "text.txt"}
    text_pretrain.main(options(files, "text8_mdlm", tmp_path / "mdlm", **run))
    further = tmp_path / "further.yaml"
    further.write_text(
        f"base: {CONFIGS}/text/text8_xdlm.yaml\nconfig_name: null\nmodel_name_or_path: {tmp_path}/mdlm\n"
    )
    more = {**run, "config": further, "config_name": None, "ema_decay": 0.5}
    text_pretrain.main(options(files, "text8_xdlm", tmp_path / "xdlm", **more))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "xdlm")
    assert model.noise_process().kernel.mixing_ratio == 0.1 and model.config.ema_decay == 0.5


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("owt_xdlm", {"corpus": "books"}, "corpus 'books' is not known; choose one of openwebtext, lm1b"),
        ("owt_xdlm", {"streaming": "true", "released_rows": "true"}, "released_rows=True cuts rows in memory"),
        ("text8_xdlm", {"streaming": "true"}, "corpus='text8' is cut in memory; leave streaming out"),
        ("owt_xdlm", {"max_steps": -1}, "max_steps=-1: a stream has no end"),
        ("owt_xdlm", {"validation_files": "x.txt"}, r"validation_files=\['x.txt'\] goes with data_files"),
        ("owt_xdlm", {"data_files": "x.txt"}, r"eval_strategy=.*with data_files=\['x.txt'\] needs validation_files"),
        ("owt_xdlm", {"text_column": "a"}, "text_column='a' is for data_files; leave it out"),
        ("text8_xdlm", {"corpus_revision": "a", "data_files": "TEXT"}, "corpus_revision='a' is for the Hub; leave"),
        ("owt_xdlm", {"validation_rows": 0}, "validation_rows=0 must be at least 1"),
        ("owt_xdlm", {"gidd_weighting": "dynamc"}, "gidd_weighting='dynamc' is not known; choose one of"),
        ("text8_xdlm", {"model_name_or_path": "x", "data_files": "TEXT"}, "model_name_or_path='x' are two models: set"),
        (
            "text8_gidd",
            {"mixing_ratio": 0.1, "data_files": "TEXT"},
            "mixing_ratio were given, but the model has noise of",
        ),
        ("text8_xdlm", {"gidd_weighting": "dynamic", "data_files": "TEXT"}, "gidd_weighting='dynamic' is not one of"),
        (
            "text8_xdlm",
            {"sequence_length": 33, "data_files": "TEXT"},
            "sequence_length=33 exceeds the model's limit of 32",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(files, tmp_path, config, changes, message):
    changes = {name: files / "text.txt" if value == "TEXT" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        text_pretrain.main(options(files, config, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
