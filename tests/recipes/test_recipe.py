"""The continual-pretraining recipe: its config files, a small run from start to end, its refusals, its launchers."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import tiny_model
from peft import PeftModel
from safetensors.torch import load_file
from training import ADAM_EPSILON, CONFIGS, ENDS_CLEANLY, disk_that_takes, flags, launch, logged, partitioned
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from xdlm_hf import LLaDAConfig
from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.training.adapters import load_adapter
from xdlm_hf.training.checkpoints import UNFINISHED

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "llada_cpt.py"
sys.path.insert(0, str(RECIPE.parent))

import llada_cpt  # noqa: E402

TEXTS = [f"Sentence {i}: the {word} fox jumps over {i % 9} dogs." for i in range(40) for word in ("quick", "slow")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny LLaDA model, its tokenizer, and text."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model(vocab_size=320)
    model.save_pretrained(folder / "model")
    train_tokenizer(TEXTS, 320).save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def options(base, output_dir, **changes):
    """The command line of a small run; None leaves an option out."""
    values = {
        "model_name_or_path": base / "model",
        "data_files": base / "text.jsonl",
        "sequence_length": 16,
        "max_steps": 6,
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "adam_epsilon": ADAM_EPSILON,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "validation_fraction": 0.2,
        "validation_rows": 9,
        "report_to": "none",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "output_dir": output_dir,
        **changes,
    }
    return flags(values)


# --------------------------------------------------------------------------------------------------------------------
# Options


def test_the_papers_run(tmp_path):
    model, data, args, _ = llada_cpt.parse(["--config", str(CONFIGS / "llada_8b_xdlm.yaml"), "--use_cpu", "true"])
    assert (model.model_name_or_path, data.dataset, data.dataset_config) == (
        "GSAI-ML/LLaDA-8B-Base",
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
    )
    assert (args.mixing_ratio, args.noise_schedule, args.t_eps, args.time_sampling) == (
        0.1,
        "linear",
        1e-3,
        "independent",
    )
    assert (data.sequence_length, args.global_batch_size, args.max_steps) == (4096, 512, 600)
    assert (args.optim, args.learning_rate, args.weight_decay, args.max_grad_norm) == ("adamw_torch", 2e-5, 0.1, 1.0)
    assert (args.lr_scheduler_type, args.warmup_steps) == ("constant_with_warmup", 100)
    assert args.bf16 and model.dtype == "bfloat16" and args.activation_checkpointing
    assert args.gradient_accumulation_steps * args.per_device_train_batch_size == 512


@pytest.mark.parametrize(
    "path",
    # The others are accelerate's, and those of llada_sft.py (test_sft.py, test_demo.py).
    [path for path in sorted(CONFIGS.glob("*.yaml")) if not re.match(r"zero|fsdp|.*_sft|demo_alphabet", path.name)],
    ids=lambda path: path.name,
)
def test_every_config_file_parses(path):
    llada_cpt.parse(["--config", str(path), "--use_cpu", "true"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("zero*.yaml")), ids=lambda path: path.stem)
def test_zero_configs_are_accelerates(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    engine = config.deepspeed_config
    assert config.distributed_type == "DEEPSPEED" and engine["zero_stage"] == int(path.stem[4])
    assert engine["gradient_accumulation_steps"] == "auto"
    offloaded = "cpu" if "offload" in path.stem else "none"
    assert engine["offload_optimizer_device"] == offloaded
    assert engine["offload_param_device"] == (offloaded if engine["zero_stage"] == 3 else "none")


def test_fsdp_config_wraps_this_models_blocks():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / "fsdp2.yaml"))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    blocks = type(tiny_model().model.transformer["blocks"][0]).__name__
    assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == blocks


def test_fsdp_on_a_cpu_is_refused(base, tmp_path, monkeypatch):
    """accelerate would leave the model unwrapped and say nothing."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="use_cpu=True with FSDP: accelerate would silently train with plain DDP"):
        llada_cpt.main(options(base, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_command_line_wins_over_the_config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "learning_rate: 2e-5\nmax_steps: 7\nmixing_ratio: 0\ndata_files: [a.jsonl, b.jsonl]\nuse_cpu: true\n"
    )
    _, data, args, _ = llada_cpt.parse(["--max_steps", "9", "--config", str(path)])
    assert (args.learning_rate, args.max_steps, args.mixing_ratio) == (2e-5, 9, 0)
    assert data.data_files == ["a.jsonl", "b.jsonl"] and data.text_column == "text"


def test_controls_differ_from_the_papers_run_in_k_alone():
    _, _, run, _ = llada_cpt.parse(["--config", str(CONFIGS / "llada_8b_xdlm.yaml"), "--use_cpu", "true"])
    for name, k in (("mdlm", 0.0), ("udlm", 1.0)):
        *groups, control, _ = llada_cpt.parse(["--config", str(CONFIGS / f"llada_8b_{name}.yaml"), "--use_cpu", "true"])
        theirs, ours = control.to_dict(), run.to_dict()
        different = {option for option in ours if ours[option] != theirs[option]} - {"logging_dir"}
        assert different == {"mixing_ratio", "output_dir"} and control.mixing_ratio == k
        assert groups[1].sequence_length == 4096


def test_a_config_file_takes_over_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("max_steps: 7\nmixing_ratio: 0.5\nuse_cpu: true\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nmixing_ratio: 0.25\n")
    _, _, args, _ = llada_cpt.parse(["--config", str(tmp_path / "run.yaml")])
    assert (args.max_steps, args.mixing_ratio) == (7, 0.25)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run.yaml": "base: gone.yaml"}, r"gone\.yaml: there is no such config file"),
        (
            {"run.yaml": "base: b.yaml", "b.yaml": "max_step: 1"},
            r"b\.yaml: unknown option 'max_step'; did you mean 'max_s",
        ),
        (
            {"run.yaml": "base: b.yaml", "b.yaml": "base: run.yaml"},
            r"run\.yaml is its own base, by way of b\.yaml; remove that line",
        ),
        ({"run.yaml": "- max_steps"}, r"run\.yaml: expected one `option: value` a line, got a list"),
        ({"run.yaml": "plan: true"}, r"run\.yaml: unknown option 'plan'"),
        ({}, r"run\.yaml: there is no such config file"),
    ],
)
def test_bad_config_files_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        llada_cpt.parse(["--config", str(tmp_path / "run.yaml")])


def test_unknown_options_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("mixing_ration: 0.1\n")
    with pytest.raises(ValueError, match=r"run\.yaml: unknown option 'mixing_ration'; did you mean 'mixing_ratio'\?"):
        llada_cpt.parse(["--config", str(path)])
    with pytest.raises(ValueError, match="unknown options on the command line: --mixing_rate 0.1"):
        llada_cpt.parse(["--use_cpu", "true", "--mixing_rate", "0.1"])


# --------------------------------------------------------------------------------------------------------------------
# The plan


@pytest.fixture
def config_of_llada_8b(tmp_path):
    LLaDAConfig(mask_token_id=126336, eos_token_id=126081, pad_token_id=126081).save_pretrained(tmp_path / "8b")
    return ["--model_name_or_path", str(tmp_path / "8b"), "--plan"]  # config.json alone: no weights, no tokenizer


def test_plan_of_the_papers_run(config_of_llada_8b, capsys, tmp_path):
    options = ["--config", str(CONFIGS / "llada_8b_xdlm.yaml"), "--output_dir", str(tmp_path / "run")]
    assert llada_cpt.main([*options, *config_of_llada_8b]) is None
    text = capsys.readouterr().out
    for figure in (
        "8,015,581,184",
        "600",
        "1,258,291,200",
        "8.50e+19 FLOP",
        "8 GPUs x 4 rows x 16 passes",
        "zero3_off",
    ):
        assert figure in text, figure
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--plan_gpus", "1"],
            "plan refused: the plan does not fit: zero2 on 1 GPUs needs 1.* Any of these fits: zero2_offload",
        ),
        (["--plan_gpus", "3"], "plan refused: global_batch_size=512 is not a multiple of 12"),
        (["--plan_gpus", "0"], "plan refused: gpus=0 must be at least 1"),
        (["--global_batch_size", "516"], "plan refused: global_batch_size=516 is not a multiple of 32"),
        (
            ["--gradient_accumulation_steps", "8"],
            r"plan refused: gradient_accumulation_steps=8 disagrees with .*=512 \(.*=4 on plan_gpus=8 make 16\)",
        ),
        (["--dtype", "int8"], "plan refused: dtype='int8' is not known; choose one of float32, bfloat16"),
        (["--plan_layout", "zero9"], "plan refused: plan_layout='zero9' is not known"),
        (["--load_in_4bit", "true"], "plan refused: load_in_4bit=True freezes the weights: give lora_rank"),
        (["--sequence_length", "8192"], "plan refused: sequence_length=8192 exceeds the model's"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(config_of_llada_8b, options, message):
    with pytest.raises(SystemExit, match=message) as stop:
        llada_cpt.main(["--config", str(CONFIGS / "llada_8b_xdlm.yaml"), *config_of_llada_8b, *options])
    assert isinstance(stop.value.code, str)  # printed to stderr, and status 1


def test_a_plan_divides_the_batch_among_its_own_gpus(config_of_llada_8b, capsys):
    """Not among this process alone; and needs no library of the GPUs."""
    options = ["--gradient_accumulation_steps", "8", "--plan_gpus", "16", "--attn_implementation", "flash_attention_2"]
    llada_cpt.main(["--config", str(CONFIGS / "llada_8b_xdlm.yaml"), *config_of_llada_8b, *options])
    assert "16 GPUs x 4 rows x 8 passes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optim", "optimizer", "said"),
    # 8 and 12 bytes a parameter on one GPU: 4 of DeepSpeed's float32 weights, and 4 or 8 of states.
    [
        ("lion_32bit", "59.7", " loading"),
        ("grokadamw", "89.6", ": unknown to the plan, which assumes AdamW's 8 bytes"),
    ],
)
def test_plan_of_other_optimizers(config_of_llada_8b, capsys, optim, optimizer, said):
    options = ["--config", str(CONFIGS / "llada_8b_xdlm.yaml"), "--optim", optim, "--plan_gpus", "1"]
    llada_cpt.main([*options, *config_of_llada_8b, "--plan_layout", "zero2", "--plan_gpu_memory", "200"])
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if "zero2 " in line)
    assert f" {optimizer}│" in row and f"optimizer {optim}{said}" in " ".join(text.split())


def test_plan_of_adapters_in_4_bits(config_of_llada_8b, capsys):
    options = ["--config", str(CONFIGS / "llada_8b_mdlm.yaml"), "--lora_rank", "16", "--load_in_4bit", "true"]
    llada_cpt.main([*options, "--plan_gpus", "1", "--plan_gpu_memory", "24", *config_of_llada_8b])
    text = capsys.readouterr().out
    assert "41,943,040 trained, 6,979,321,856 in 4 bits" in text and "zero3" not in text


# --------------------------------------------------------------------------------------------------------------------
# A run


def test_run_writes_a_model_that_knows_its_noise(base, tmp_path):
    output = tmp_path / "run"
    llada_cpt.main(options(base, output, eval_strategy="steps", eval_steps=3, mixing_ratio=0.2))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.mixing_ratio == 0.2 and model.noise_kernel().mixing_ratio == 0.2
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.mask_token_id == model.config.mask_token_id
    before = load_file(base / "model" / "model.safetensors")
    after = load_file(output / "model.safetensors")
    assert before.keys() == after.keys() and all((before[n] != after[n]).any() for n in before)
    # What a loss curve and a report need.
    assert len(logged(output)) == 6 and len(logged(output, "eval_loss")) == 3
    for name in ("grad_norm", "learning_rate", "num_input_tokens_seen", "train_tokens_per_second", "eval_perplexity"):
        assert logged(output, name), name
    results = json.loads((output / "eval_results.json").read_text())
    assert results["eval_loss"] == logged(output, "eval_loss")[-1] and results["eval_loss_standard_error"] > 0


def test_run_on_pythons_documentation_by_stream(base, tmp_path):
    changes = {"data_files": None, "dataset": "python-reference", "streaming": "true", "validation_fraction": None}
    trainer = llada_cpt.main(options(base, tmp_path / "run", max_steps=2, **changes))
    assert trainer.state.global_step == 2
    text = trainer.processing_class.decode(next(iter(trainer.train_dataset))["input_ids"])
    assert text.strip()


def test_second_run_is_refused_and_resume_continues(base, tmp_path):
    output = tmp_path / "run"
    llada_cpt.main(options(base, output, max_steps=4, save_strategy="steps", save_steps=2))
    with pytest.raises(ValueError, match=r"holds another run \(checkpoint-2, checkpoint-4"):
        llada_cpt.main(options(base, output))
    llada_cpt.main(options(base, output, max_steps=6, resume_from_checkpoint="true"))
    llada_cpt.main(options(base, tmp_path / "auto", max_steps=6, resume_from_checkpoint="auto"))  # none there: starts
    assert logged(tmp_path / "auto") == logged(output)
    whole = tmp_path / "whole"
    llada_cpt.main(options(base, whole, max_steps=6))
    assert logged(output) == logged(whole)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_lora_run_writes_the_merged_model_and_the_adapter(base, tmp_path):
    output = tmp_path / "run"
    llada_cpt.main(options(base, output, lora_rank=2))
    merged = AutoModelForCausalLM.from_pretrained(output)
    assert merged.config.mixing_ratio == 0.1
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "model"), output / "adapter")
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        plain, expected = AutoModelForCausalLM.from_pretrained(base / "model")(ids).logits, adapted(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3
    assert (
        load_adapter(AutoModelForCausalLM.from_pretrained(base / "model"), output / "adapter").config.mixing_ratio
        == 0.1
    )
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    # Seven projections, two matrices each, in two blocks; the output layer, also called ff_out, has none.
    assert len(adapter) == 28 and all(".blocks." in name for name in adapter)


def test_4_bit_run_trains_adapters_and_merges_them_into_whole_weights(base, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    output = tmp_path / "run"
    # On a CPU bitsandbytes packs whole blocks of 64 for inference.
    tiny_model(vocab_size=320, d_model=64, mlp_hidden_size=128).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(base / "model").save_pretrained(tmp_path / "model")
    options_4bit = {
        "adam_epsilon": None,  # the default: gradients of new adapters are small
        "lora_rank": 2,
        "load_in_4bit": "true",
        "mixing_ratio": 0.2,
        "model_name_or_path": tmp_path / "model",
    }
    trainer = llada_cpt.main(options(base, output, **options_4bit))
    weights = {type(p).__name__ for name, p in trainer.model.named_parameters() if "base_layer" in name}
    assert weights == {"Params4bit"} and trainer._fused
    assert len(logged(output)) == 6 and logged(output)[-1] < logged(output)[0]
    merged, whole = (
        AutoModelForCausalLM.from_pretrained(output),
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
    )
    assert merged.config.mixing_ratio == 0.2 and not hasattr(merged.config, "quantization_config")
    adapted = load_adapter(whole, output / "adapter")
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
        # Trained on 4 bits, merged into what they were made from: near, not equal.
        gap = (trainer.model(ids).logits - merged(ids).logits).abs().max()
    assert 0 < gap < 0.5
    # bitsandbytes has since packed the weights for inference, which sums in another order: 80 roundings of float32.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged(output, "eval_loss")[-1], rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# A full disk at the end


def fill_disk(patch, kind, folder):
    """Let the disk be full while objects of this kind are written for `folder`."""
    save = kind.save_pretrained

    def save_on_full_disk(self, target, *args, **options):
        full = Path(target) in (folder, folder / UNFINISHED)
        with disk_that_takes(1_000) if full else contextlib.nullcontext():
            return save(self, target, *args, **options)

    patch.setattr(kind, "save_pretrained", save_on_full_disk)


@pytest.mark.parametrize(
    ("kind", "lora", "folder", "message"),
    [
        (
            PreTrainedModel,
            0,
            "",
            r"the model could not .*/run'\. It needs 0\.0 GiB\. \d+\.\d GiB are free",
        ),
        (PreTrainedTokenizerBase, 0, "", r"the model could not .*/run'\. .*\(Exception: .*os error"),
        (PeftModel, 2, "adapter", r"the model could not .*/run/adapter'\. It needs 0\.0 GiB"),
        (
            PreTrainedModel,
            2,
            "",
            r"the merged model could not .*/run'\. It needs 0\.0 .*The adapter in '.*/adapter' is whole",
        ),
        (PreTrainedTokenizerBase, 2, "", r"the merged model could not .*The adapter in '.*/adapter' is whole"),
    ],
    ids=["weights", "tokenizer", "adapter", "merged weights", "merged tokenizer"],
)
def test_full_disk_at_the_end_leaves_no_half_model(base, tmp_path, monkeypatch, kind, lora, folder, message):
    output = tmp_path / "run"
    changes = {"lora_rank": lora, "save_strategy": "steps", "save_steps": 6, "resume_from_checkpoint": "auto"}
    with monkeypatch.context() as patch:
        fill_disk(patch, kind, output / folder)
        with pytest.raises(OSError, match=f"step 6: {message}.*\\. checkpoint-6 is whole: make room and resume"):
            llada_cpt.main(options(base, output, **changes))
    left = {path.name for path in output.iterdir()} - {"trainer_state.json", "eval_results.json", "all_results.json"}
    assert left == ({"checkpoint-6", "adapter"} if lora and not folder else {"checkpoint-6"})
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(output)
    llada_cpt.main(options(base, output, **changes))
    AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)
    assert not (output / UNFINISHED).exists() and not (output / "adapter" / UNFINISHED).exists()
    if lora:
        load_adapter(AutoModelForCausalLM.from_pretrained(base / "model"), output / "adapter")


def test_full_disk_while_the_log_is_written_is_explained(base, tmp_path, monkeypatch):
    write = TrainerState.save_to_json

    def write_on_full_disk(self, path):
        with disk_that_takes(100):
            write(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", write_on_full_disk)
    message = r"the log could not be written to '.*/run'; the model in '.*/run' is whole\. \d+\.\d GiB are free"
    with pytest.raises(OSError, match=message):
        llada_cpt.main(options(base, tmp_path / "run"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


# --------------------------------------------------------------------------------------------------------------------
# Refusals: before anything is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixing_ratio": 1.5}, r"mixing_ratio=1\.5 must lie in \[0, 1\]"),
        ({"global_batch_size": 6}, "global_batch_size=6 is not a multiple of 4"),
        ({"sequence_length": 100}, "sequence_length=100 exceeds the model's limit of 64"),
        ({"text_column": "body"}, r"text\.jsonl, line 1: no column 'body'; it has \['text'\]"),
        ({"dataset": "imdb", "data_files": None, "skip_corrupted": "true"}, "skip_corrupted=True is for the lines of"),
        ({"data_files": "nowhere*.jsonl"}, r"'nowhere\*\.jsonl' matches no file"),
        ({"streaming": "true", "max_steps": None}, "max_steps=-1: a stream has no end"),
        ({"lora_rank": -1}, "lora_rank=-1 must not be negative"),
        ({"dtype": "half"}, "dtype='half' is not known; choose one of float32, bfloat16, float16, auto"),
        ({"load_in_4bit": "true"}, "load_in_4bit=True freezes the weights: give lora_rank"),
        ({"random_length_probability": 2}, r"random_length_probability=2\.0 must lie in \[0, 1\]"),
        ({"validation_fraction": 1.0}, r"validation fraction 1\.0 must lie strictly between 0 and 1"),
    ],
)
def test_bad_options_are_refused(base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        llada_cpt.main(options(base, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_another_models_tokenizer_is_refused(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    tokenizer.mask_token = "<|eot_id|>"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"mask token '<\|eot_id\|>' has id 4, the model's mask_token_id is 5"):
        llada_cpt.main(options(base, tmp_path / "run", tokenizer_name=tmp_path / "tokenizer"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_16_bit_weights_without_deepspeed_are_refused_before_they_are_read(base, tmp_path, dtype):
    stored = "bfloat16" if dtype == "auto" else dtype
    LLaDAConfig.from_pretrained(base / "model", dtype=stored).save_pretrained(tmp_path / "model")  # and no weights
    changes = {"dtype": dtype, "model_name_or_path": tmp_path / "model", "tokenizer_name": base / "model"}
    with pytest.raises(
        ValueError, match=f"the trained weights are {stored} and nothing keeps float32 copies .* bf16 tr"
    ):
        llada_cpt.main(options(base, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------------
# Launchers


def accelerate(*arguments):
    port = ("--main_process_port", "0")  # any free one
    status, output = launch("-m", "accelerate.commands.launch", *port, *arguments, HF_HUB_OFFLINE="1")
    assert status == 0, output[-3000:]


def test_accelerate_launch_with_a_config_file(base, tmp_path):
    run = options(base, tmp_path / "run", max_steps=None)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"max_steps": 3, "mixing_ratio": 0.3}))
    accelerate("--num_processes", "1", "--cpu", str(RECIPE), "--config", str(path), *run)
    assert len(logged(tmp_path / "run")) == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.mixing_ratio == 0.3


@pytest.fixture(scope="module")
def one_process(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    llada_cpt.main(options(base, output, per_device_train_batch_size=8))
    return output


def compare(output, one_process, limit=1e-5):
    assert logged(output) == pytest.approx(logged(one_process), abs=limit)
    assert logged(output, "eval_loss") == pytest.approx(logged(one_process, "eval_loss"), abs=limit)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, one_process))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < limit
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "fsdp2"])
def test_partitioned_run_takes_the_same_trajectory_and_resumes(base, one_process, tmp_path, name):
    script = RECIPE if name != "fsdp2" else Path(__file__).parents[1] / "fsdp_on_cpu.py"
    config = ("--config_file", str(partitioned(tmp_path, name)), "--num_processes", "2", ENDS_CLEANLY, str(script))
    changes = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 4}
    accelerate(*config, *options(base, tmp_path / "run", **changes))
    compare(tmp_path / "run", one_process)
    parts = {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert ("pytorch_model_fsdp_0" if name == "fsdp2" else "global_step4") in parts  # it did not quietly run DDP

    (tmp_path / "again").mkdir()
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "again" / "checkpoint-4")
    accelerate(*config, *options(base, tmp_path / "again", resume_from_checkpoint="auto", **changes))
    assert logged(tmp_path / "again") == logged(tmp_path / "run")
    compare(tmp_path / "again", one_process)


@pytest.mark.slow
def test_shipped_zero3_config_runs_as_it_is(base, one_process, tmp_path):
    config = ("--config_file", str(CONFIGS / "zero3.yaml"), "--num_processes", "2", str(RECIPE))
    accelerate(*config, *options(base, tmp_path / "run", per_device_train_batch_size=2))
    compare(tmp_path / "run", one_process)


@pytest.mark.slow
def test_lora_under_zero3_merges_whole_weights(base, tmp_path):
    config = ("--config_file", str(partitioned(tmp_path, "zero3")), "--num_processes", "2", str(RECIPE))
    accelerate(*config, *options(base, tmp_path / "run", per_device_train_batch_size=2, lora_rank=2))
    llada_cpt.main(options(base, tmp_path / "one", lora_rank=2))
    compare(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_bfloat16_stays_close(base, one_process, tmp_path, name):
    """In bfloat16 the fused loss makes the head's gradient in the backward pass: ZeRO-3 must have gathered it again."""
    config = ("--config_file", str(partitioned(tmp_path, name)), "--num_processes", "2", str(RECIPE))
    changes = {"per_device_train_batch_size": 2, "bf16": "true", "dtype": "bfloat16"}
    accelerate(*config, *options(base, tmp_path / "run", **changes))
    assert logged(tmp_path / "run") == pytest.approx(logged(one_process), rel=0.02)
    assert logged(tmp_path / "run") != logged(one_process)


@pytest.mark.slow
def test_slurm_script_starts_two_machines(base, one_process, tmp_path):
    """Slurm's two commands are stood in for: srun starts both "machines" here, one process each.

    The names of the machines come apart in time: a reader that leaves after the first would end the script.
    """
    commands = {
        "scontrol": "echo localhost; sleep 0.5; echo elsewhere",
        "accelerate": 'exec python -m accelerate.commands.accelerate_cli "$@"',
        "srun": 'shift; for i in 0 1; do SLURM_NODEID=$i "$@" & all="$all $!"; done; for p in $all; do wait $p; done',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text(f'export PATH="{tmp_path}:{Path(sys.executable).parent}:$PATH"\n')
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "two"}
    slurm |= {
        "SLURM_JOB_ID": str(os.getpid()),
        "XDLM_VENV": str(tmp_path),
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    small = {"per_device_train_batch_size": 2, "weight_decay": 0.0, "bf16": "false", "dtype": "float32", "seed": 42}
    small |= {"streaming": "false", "activation_checkpointing": "false", "eval_strategy": "no", "mixing_ratio": 0.1}
    small |= {"warmup_steps": 0, "nelbo_samples": 4, "per_device_eval_batch_size": 8}
    finished = subprocess.run(
        ["bash", ROOT / "recipes" / "slurm" / "llada_8b.sbatch", *options(base, tmp_path / "run", **small)],
        cwd=ROOT,
        env={**os.environ, **slurm},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "2 GPUs x 2 rows x 2 passes" in finished.stdout
    compare(tmp_path / "run", one_process)


@pytest.mark.slow
def test_stream_trains_over_two_processes(base, tmp_path):
    """One file is one shard: each rank packs its own half of the documents (test_data.py says which)."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ENDS_CLEANLY, str(RECIPE))
    run = options(base, tmp_path / "run", streaming="true", max_steps=4, validation_fraction=None)
    status, output = launch(*torchrun, *run)
    assert status == 0, output[-3000:]
    assert len(logged(tmp_path / "run")) == 4
    assert logged(tmp_path / "run", "num_input_tokens_seen")[-1] == 4 * 8 * 16
