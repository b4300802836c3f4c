"""One model in two processes (tensor parallelism) or on two devices computes what it does in one place."""

import json
from pathlib import Path

import pytest
import torch
from models import random_dit, tiny_model
from safetensors.torch import load_file
from tensor_parallel import DRAWN, IDS, REFINED, results
from training import launch, state
from transformers import AutoModelForCausalLM

SCRIPT = str(Path(__file__).parents[1] / "tensor_parallel.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, and what two processes wrote about them."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    tiny_model(n_heads=4, n_kv_heads=2, init_std=0.3).save_pretrained(folder / "llada")
    random_dit(n_heads=4).save_pretrained(folder / "dit")
    tiny_model(n_heads=2, n_kv_heads=1).save_pretrained(folder / "kv_heads")
    tiny_model(mlp_hidden_size=47).save_pretrained(folder / "width")
    random_dit(n_heads=1).save_pretrained(folder / "dit_heads")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    status, output = launch(*torchrun, SCRIPT, str(folder))
    assert status == 0, output[-4000:]
    return folder


def of_both(folder, name):
    return [load_file(folder / f"{name}_{rank}.st") for rank in range(2)]


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            scale = tensor.abs().max().clamp_min(1e-3)
            # Sums over two halves: at most 4e-15 was measured.
            assert (ours[name] - tensor).abs().max() < 1e-12 * scale, name
        else:
            assert ours[name].equal(tensor), name


@pytest.mark.parametrize("name", ["llada", "dit"])
def test_two_processes_compute_what_one_does(folder, name):
    alone = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()
    expected = results(alone)
    first, second = of_both(folder, name)
    assert first.pop("unseeded").equal(second.pop("unseeded"))
    for ours in (first, second):
        assert_equal(ours, expected)
    assert not expected["drawn"].equal(expected["again"])  # the generator goes on


@pytest.mark.parametrize("name", ["llada", "dit"])
def test_two_processes_save_the_whole_model(folder, name):
    whole, saved = (AutoModelForCausalLM.from_pretrained(folder / part) for part in (name, f"{name}_saved"))
    written, original = (json.loads((folder / part / "config.json").read_text()) for part in (f"{name}_saved", name))
    assert written == original | {"dtype": "float64"}
    for parameter, weight in state(whole).items():
        assert state(saved)[parameter].equal(weight), parameter


def test_a_sharded_output_layer_generates_but_takes_no_fused_loss(folder):
    alone = AutoModelForCausalLM.from_pretrained(folder / "llada", dtype=torch.float64).eval()
    expected = results(alone)
    for ours in of_both(folder, "sharded"):
        assert_equal(ours, {name: expected[name] for name in ours})
    for rank in range(2):
        errors = json.loads((folder / f"errors_{rank}.json").read_text())
        assert "output_reduction needs the whole output layer in every process" in errors["loss"]
        assert "XDLMTrainer gives every process rows of its own" in errors["trainer"]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("kv_heads", "n_heads=2, n_kv_heads=1, mlp_hidden_size=48"),
        ("width", "n_heads=2, n_kv_heads=2, mlp_hidden_size=47"),
        ("dit_heads", "n_heads=1, intermediate_size=128"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(folder, name, sizes):
    for rank in range(2):
        error = json.loads((folder / f"errors_{rank}.json").read_text())[name]
        assert error == (
            f"tensor parallelism over 2 processes does not divide {sizes}; the number of processes must divide 1."
        )


@pytest.mark.parametrize(("name", "block"), [("llada", "model.transformer.blocks"), ("dit", "backbone.blocks")])
def test_an_automatic_device_map_keeps_blocks_whole(folder, name, block, tmp_path):
    alone = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()
    options = {
        "device_map": "auto",
        "max_memory": {"cpu": 0.7 * alone.get_memory_footprint()},
        "offload_folder": tmp_path,
    }
    divided = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64, **options).eval()
    assert set(map(str, divided.hf_device_map.values())) == {"cpu", "disk"}
    assert not [
        place for place in divided.hf_device_map if place.startswith(block) and place.count(".") > block.count(".") + 1
    ]
    for generation in (REFINED, DRAWN):
        tokens = (model.generate(IDS, seed=0, **generation) for model in (alone, divided))
        assert torch.equal(*tokens)
