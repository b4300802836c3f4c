"""Released files as checkpoints: every format, in a fresh process; what is refused before anything is written."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xdlm_hf import DiTConfig, DiTForDiffusionLM
from xdlm_hf.convert import main, read_weights, released_dit

FIXTURE = Path(__file__).parent / "fixtures" / "tiny-dit"
WEIGHTS = load_file(FIXTURE / "model.safetensors")
ORDER = json.loads((FIXTURE / "expected.json").read_text())["parameter_order_of_ema_shadow_params"]
EXPECTED = load_file(FIXTURE / "expected.safetensors")
SIZES = ["--n_heads", "3", "--model_length", "24"]  # of the fixture; the paper's sizes are known
LOADS = """
import sys
import torch, xdlm_hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
inputs = load_file(sys.argv[2])
with torch.no_grad():
    save_file({"logits": model(inputs["zt"]).logits}, sys.argv[3])
"""


def averages(factor=1.0):
    return {"decay": 0.9999, "num_updates": 7, "shadow_params": [factor * WEIGHTS[name] for name in ORDER]}


def with_buffer(factor=1.0):
    tensors = {name: factor * weight for name, weight in WEIGHTS.items()}
    return {**tensors, "backbone.rotary_emb.inv_freq": 10000 ** -(torch.arange(0, 16, 2) / 16)}


# What is to be read comes out right; other weights beside it are twice as large.
FILES = {
    "lightning.ckpt": {
        "state_dict": with_buffer(2.0), "ema": averages(), "epoch": 3, "global_step": 10, "optimizer_states": [{}],
    },
    "small.pt": {"ema": averages()},
    "state.pt": {"state_dict": with_buffer()},
    "flat.pt": {name.removeprefix("backbone."): weight for name, weight in WEIGHTS.items()},
    "flat.safetensors": with_buffer(),
}  # fmt: skip


def written(tmp_path, name, content=None):
    content = FILES[name] if content is None else content
    (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
    return tmp_path / name


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "xdlm_hf.convert", "dit", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_recorded_network(tmp_path, name, capsys):
    source, folder = written(tmp_path, name), tmp_path / "out"
    heads = SIZES if name in ("lightning.ckpt", "small.pt", "flat.pt") else SIZES[2:]  # the buffer tells the heads
    main(["dit", "--from", str(source), "--to", str(folder), *heads])
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    read = load_file(folder / "model.safetensors")
    assert read.keys() == WEIGHTS.keys() and all(read[name].equal(WEIGHTS[name]) for name in WEIGHTS)
    config = DiTConfig.from_pretrained(folder)
    assert (config.n_heads, config.model_length, config.vocab_size, config.mask_token_id) == (3, 24, 61, 60)
    assert (config.mixing_ratio, config.noise_schedule, config.time_conditioning) == (0.0, "loglinear", False)
    printed = capsys.readouterr().out
    averaged = name in ("lightning.ckpt", "small.pt")
    assert ("read the moving average: 77,741 parameters" in printed) == averaged
    assert "LogLinearSchedule(eps=0.001)), assumed" in printed


def test_the_command_and_a_fresh_process(tmp_path):
    ran = command("--from", written(tmp_path, "lightning.ckpt"), "--to", tmp_path / "out", *SIZES, "--mixing_ratio=0.1")
    assert ran.returncode == 0, ran.stderr
    assert "k=0.1" in ran.stdout and "assumed" not in ran.stdout
    outputs = tmp_path / "logits.safetensors"
    subprocess.run(
        [sys.executable, "-c", LOADS, tmp_path / "out", FIXTURE / "expected.safetensors", outputs], check=True
    )
    assert (load_file(outputs)["logits"] - EXPECTED["logits_sigma_zero"]).abs().max() < 1e-5


def test_the_weights_beside_the_moving_average(tmp_path):
    source = written(tmp_path, "lightning.ckpt")
    weights, which = read_weights(source, ema=False)
    assert which == "raw" and weights["backbone.vocab_embed.embedding"].equal(
        2 * WEIGHTS["backbone.vocab_embed.embedding"]
    )
    with pytest.raises(ValueError, match="has no moving average"):
        read_weights(written(tmp_path, "state.pt"), ema=True)


@pytest.mark.parametrize("rows, length, mask", [(50258, 1024, 50257), (30522, 128, 103), (35, 256, 4)])
def test_what_the_papers_models_have_is_known(rows, length, mask):
    """Heads by width, length and [MASK] by vocabulary."""
    sizes = {"hidden_dim": 256, "cond_dim": 8, "n_blocks": 1, "n_heads": 8, "vocab_size": rows}
    wanted = DiTForDiffusionLM(DiTConfig(**sizes, mask_token_id=mask))
    config = released_dit(wanted.state_dict()).config
    assert (config.n_heads, config.model_length, config.mask_token_id) == (8, length, mask)
    uniform = released_dit(list(wanted.parameters()), {"mixing_ratio": 1.0}).config
    assert (uniform.model_type, uniform.mask_token_id, uniform.time_conditioning) == ("udlm", None, False)


def test_class_tables_and_gidd():
    sizes = {"hidden_dim": 24, "cond_dim": 8, "n_blocks": 2, "n_heads": 2, "vocab_size": 35, "num_classes": 5}
    model = DiTForDiffusionLM(DiTConfig(**sizes))
    for weights in (model.state_dict(), list(model.parameters())):
        found = released_dit(
            weights,
            {"n_heads": 2, "model_length": 8, "noise_process": "gidd", "p_uniform": 0.2, "time_conditioning": True},
        )
        assert found.config.num_classes == 5 and found.conditioning == ("timesteps",)
        assert found.noise_process().p_uniform == 0.2
        assert all(a.equal(b) for a, b in zip(found.parameters(), model.parameters(), strict=True))


def renamed(old, new):
    return {name.replace(old, new): weight for name, weight in WEIGHTS.items()}


def without(name):
    return {other: weight for other, weight in WEIGHTS.items() if other != name}


@pytest.mark.parametrize(
    "content, message",
    [
        (renamed("vocab_embed", "embed_tokens"), "not a supported DiT: it lacks vocab_embed.embedding and holds"),
        (renamed("attn_qkv", "qkv_proj"), r"lack blocks.0.attn_qkv.*; they hold unknown blocks.0.qkv_proj"),
        (without("backbone.blocks.1.mlp.2.bias"), "they lack blocks.1.mlp.2.bias"),
        ({**WEIGHTS, "cond_map.weight": torch.ones(2)}, r"unknown names next to backbone.\*: cond_map.weight"),
        ({**WEIGHTS, "backbone.cond_map.weight": torch.ones(2)}, "they hold unknown cond_map.weight"),
        (
            {**WEIGHTS, "backbone.blocks.0.norm1.weight": torch.ones(47)},
            r"hold blocks.0.norm1.weight \(47,\) instead of \(48,\)",
        ),
        (
            {**WEIGHTS, "backbone.blocks.0.norm1.weight": torch.ones(48).long()},
            "blocks.0.norm1.weight: weights must be floating-point",
        ),
        ({"ema": {**averages(), "shadow_params": averages()["shadow_params"][:-1]}}, "a list of 29 tensors"),
        ({"ema": {**averages(), "shadow_params": averages()["shadow_params"][::-1]}}, "list of 30 tensors|they hold"),
        (
            {"ema": {**averages(), "shadow_params": [*averages()["shadow_params"][:-1], torch.ones(95)]}},
            r"output_layer.adaLN_modulation.bias \(95,\) instead of \(96,\)",
        ),
        (
            {"step": 3, "model": "none"},
            "has neither named tensors nor ema.shadow_params; its entries are step, model",
        ),
        ([1, 2], "contains a list, not a dictionary"),
        (
            {"state_dict": WEIGHTS, "hyper_parameters": argparse.Namespace(k=1)},
            r"refused, because it contains objects of argparse\.Namespace",
        ),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, content, message):
    source = written(tmp_path, "file.ckpt", content)
    with pytest.raises(ValueError, match=message):
        released_dit(read_weights(source)[0], {"n_heads": 3, "model_length": 24})


def test_a_file_that_would_run_code_does_not_run_it(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    source = written(tmp_path, "file.ckpt", {"state_dict": WEIGHTS, "hyper_parameters": Harmful()})
    with pytest.raises(ValueError, match="is refused.* loading them could run any code"):
        read_weights(source)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cut.ckpt", "cut.safetensors"])
def test_a_file_cut_short_is_refused(tmp_path, name):
    source = written(tmp_path, name, WEIGHTS)
    source.write_bytes(source.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a complete"):
        read_weights(source)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--from", "nowhere.ckpt"], "error: nowhere.ckpt is not a file"),
        (SIZES[2:], "error: n_heads does not follow from the shapes; pass --n_heads"),
        (SIZES[:2], "error: model_length does not follow from the shapes; pass --model_length"),
        ([*SIZES, "--mixing_ratio", "0.1", "--p_uniform", "0.1"], "error: mixing_ratio=0.1 does not apply to"),
        ([*SIZES, "--mixing_ratio", "2"], "error: mixing_ratio=2.0 must lie in"),
        (["--n_heads", "5", "--model_length", "24"], "error: hidden_dim=48 is not a multiple of n_heads=5"),
        ([*SIZES, "--mask_token_id", "61"], "error: mask_token_id=61 is not a row"),
    ],
)
def test_the_command_ends_with_one_line(tmp_path, arguments, message):
    source, folder = written(tmp_path, "small.pt"), tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main(["dit", "--from", str(source), "--to", str(folder), *arguments])
    assert str(stopped.value).startswith(message) and "\n" not in str(stopped.value)
    assert not folder.exists()


def test_heads_that_contradict_the_buffer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="n_heads=6 contradicts the shapes, which give 3"):
        released_dit(read_weights(written(tmp_path, "state.pt"))[0], {"n_heads": 6, "model_length": 24})


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(SystemExit, match="out exists and is not an empty folder"):
        main(["dit", "--from", str(written(tmp_path, "small.pt")), "--to", str(tmp_path / "out"), *SIZES])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
