"""The supervised fine-tuning recipe: its config, a small run of the script itself, adapters, and its refusals."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file
from training import ADAM_EPSILON, ENDS_CLEANLY, flags, launch, logged
from transformers import AutoModelForCausalLM, AutoTokenizer

from xdlm_hf.data.tokenizer import train_tokenizer
from xdlm_hf.training.adapters import load_adapter

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "llada_sft.py"
CONFIG = RECIPE.parent / "configs" / "llada_8b_sft.yaml"
sys.path.insert(0, str(RECIPE.parent))

import llada_sft  # noqa: E402

ANSWERS = {"red": "stop", "green": "go", "amber": "wait"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(vocab_size=300).save_pretrained(folder / "model")
    train_tokenizer([f"The light is {light}: {what}" for light, what in ANSWERS.items()], 300).save_pretrained(
        folder / "model"
    )
    rows = [{"prompt": f"{i}: {light}", "completion": ANSWERS[light]} for i in range(16) for light in ANSWERS]
    rows += [{"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "stop"}]}] * 2
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(base, output_dir, **changes):
    values = {
        "model_name_or_path": base / "model",
        "data_files": base / "rows.jsonl",
        "sequence_length": 48,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "mixing_ratio": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "output_dir": output_dir,
        **changes,
    }
    return flags(values)


def test_the_config_of_llada_8b():
    model, data, args, plan = llada_sft.parse(["--config", str(CONFIG), "--use_cpu", "true"])
    assert (args.global_batch_size, args.learning_rate, args.num_train_epochs, args.weight_decay) == (
        256,
        2.5e-5,
        3,
        0.1,
    )
    assert (args.mixing_ratio, data.eos_in_loss, data.loss_weighting) == (0.0, "one", "rows")
    assert model.dtype == "bfloat16" and args.bf16 and plan.plan_layout == "zero2"


def test_it_learns_answers(base, tmp_path):
    """At a rate and with batches at which the trajectory is stable: sums in another order move the loss by 1e-6 of it.

    The last ten losses are 0.31 of the first ten, and the held-out loss 0.34 of a uniform network's, ln(N - 1).
    """
    output = tmp_path / "run"
    stable = {"learning_rate": 2e-3, "per_device_train_batch_size": 16, "time_sampling": "stratified"}
    llada_sft.main(options(base, output, max_steps=60, validation_fraction=0.2, **stable))
    losses = logged(output)
    assert len(losses) == 60 and sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert json.loads((output / "eval_results.json").read_text())["eval_loss"] < 0.5 * math.log(299)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.config.mixing_ratio == 0.1 and tokenizer.chat_template
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3: green"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, steps=4, max_new_tokens=4)
    assert answer.shape[1] == asked["input_ids"].shape[1] + 4


@pytest.mark.slow
def test_two_processes_of_the_script_take_the_same_trajectory(base, tmp_path):
    """Rows of unequal length and weight, in batches of 2 x 2 and of 4."""
    rows = [{"prompt": "red" * (i % 5), "completion": "stop " * (1 + i % 4)} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"data_files": tmp_path / "rows.jsonl", "global_batch_size": 4, "adam_epsilon": ADAM_EPSILON}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ENDS_CLEANLY, str(RECIPE))
    run = options(base, tmp_path / "two", per_device_train_batch_size=2, **shared)
    status, output = launch(*torchrun, *run, HF_HUB_OFFLINE="1")
    assert status == 0, output[-3000:]
    llada_sft.main(options(base, tmp_path / "one", **shared))
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), abs=1e-5)


def test_prompts_stay_clean_and_padding_is_not_scored(base, tmp_path):
    trainer = llada_sft.main(options(base, tmp_path / "run", max_steps=1, t_eps=0.999, mixing_ratio=0.0))
    rows = [trainer.train_dataset[i] for i in (0, len(trainer.train_dataset) - 1)]
    batch = trainer.data_collator(rows)
    z_t, _ = trainer.row_noise.draw(batch["input_ids"], batch["noise_mask"], [0, 1], 2)
    answer = batch["noise_mask"]
    assert torch.equal(z_t[~answer], batch["input_ids"][~answer])
    assert (z_t[answer] == trainer.model.config.mask_token_id).float().mean() > 0.8
    assert (batch["token_weights"] > 0).equal(answer) and (batch["attention_mask"] == 0).any()


def test_equal_rows_are_a_mean_of_means(base, tmp_path):
    """LLaDA's loss of a row: the sum over its answer, divided by the length of the answer; then the mean over rows."""
    trainer = llada_sft.main(options(base, tmp_path / "run", max_steps=1))
    uneven = [
        trainer.train_dataset[0],
        {**trainer.train_dataset[1], "input_ids": trainer.train_dataset[1]["input_ids"]},
    ]
    uneven[1] = {name: value[:-1] for name, value in uneven[1].items()}
    uneven[1]["token_weights"] = uneven[1]["token_weights"] / uneven[1]["token_weights"].sum()
    batches, tokens = trainer.get_batch_samples(iter([trainer.data_collator(uneven)]), 1, "cpu")
    assert float(tokens) == pytest.approx(2)
    loss, outputs = trainer.compute_loss(trainer.model, batches[0], return_outputs=True, num_items_in_batch=tokens)
    answer = batches[0]["noise_mask"]
    means = (outputs["token_losses"] * answer).sum(1) / answer.sum(1)
    assert loss.item() == pytest.approx(means.mean().item(), rel=1e-5)


def test_adapters_are_trained_and_merged(base, tmp_path):
    output = tmp_path / "run"
    llada_sft.main(options(base, output, lora_rank=2, mixing_ratio=0.25))
    merged = AutoModelForCausalLM.from_pretrained(output)
    adapted = load_adapter(AutoModelForCausalLM.from_pretrained(base / "model"), output / "adapter")
    assert merged.config.mixing_ratio == 0.25 == adapted.config.mixing_ratio
    ids = torch.arange(6, 30)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)


def test_resuming_repeats_the_run(base, tmp_path):
    llada_sft.main(options(base, tmp_path / "whole"))
    llada_sft.main(options(base, tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=3))
    llada_sft.main(options(base, tmp_path / "run", resume_from_checkpoint="auto"))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="has data loss_weighting=rows, this run tokens"):
        changes = {"loss_weighting": "tokens", "resume_from_checkpoint": tmp_path / "run" / "checkpoint-3"}
        llada_sft.main(options(base, tmp_path / "run", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 8}, r"rows\.jsonl, line 1: a prompt of \d+ tokens and .* nothing to learn in a row of 8"),
        ({"sequence_length": 100}, "sequence_length=100 exceeds the model's limit of 64"),
        ({"eos_in_loss": "yes"}, "eos_in_loss='yes' is not known"),
        ({"chat_template": "gone"}, "chat_template='gone' is neither 'llada' nor a file"),
        ({"data_files": None}, "give one of dataset and data_files, not dataset=None and"),
        ({"random_length_probability": 0.01}, r"random_length_probability=0\.01 needs packed rows"),
        ({"load_in_4bit": "true"}, "load_in_4bit=True freezes the weights: give lora_rank"),
    ],
)
def test_bad_options_are_refused(base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        llada_sft.main(options(base, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
