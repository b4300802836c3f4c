"""Planned disk space and main memory against checkpoints that are really written and models that are really loaded."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_planning import llada_8b, model_like, run_of
from training import trainer

from xdlm_hf.training.optimizers import optimizer_of
from xdlm_hf.training.planning import GIB, LAYOUTS
from xdlm_hf.training.storage import (
    Disk,
    check_disk,
    checkpoint_bytes,
    final_bytes,
    loading_bytes,
    number_of_saves,
    planned_disk,
)

DDP = LAYOUTS["ddp"]
BILLION = 8_015_581_184  # LLaDA-8B


@pytest.mark.parametrize("lora", [0, 8])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_a_checkpoint_has_the_planned_bytes(tmp_path, optim, lora):
    """Tensor for tensor exactly; the files as a whole within headers, names and the small files beside them."""
    model = model_like(lora=lora, vocab_size=4096)
    run = trainer(tmp_path, model=model, max_steps=1, optim=optim, save_strategy="steps", save_steps=1)
    run.train()
    planned = run_of(model, optimizer=optimizer_of(optim))
    folder = tmp_path / "checkpoint-1"
    weights = load_file(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
    states = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
    left_out = ("step", "RMS")  # a number for each tensor
    tensors = [x for state in states for name, x in state.items() if name not in left_out and x is not None]
    tensors = [*weights.values(), *(x for x in tensors if isinstance(x, torch.Tensor))]
    assert sum(x.nbytes for x in tensors) == checkpoint_bytes(planned, DDP)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 0 < written - checkpoint_bytes(planned, DDP) < 300 * len(tensors) + 60_000


@pytest.mark.parametrize("lora", [0, 8])
def test_the_final_model_has_the_planned_bytes(tmp_path, lora):
    model = model_like(lora=lora)
    planned = run_of(model)
    written = 0
    if lora:
        model.save_pretrained(tmp_path / "adapter")
        written = sum(x.nbytes for x in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())
        model = model.merge_and_unload()
    model.save_pretrained(tmp_path)
    written += sum(x.nbytes for x in load_file(tmp_path / "model.safetensors").values())
    assert written == final_bytes(planned, DDP)


def test_disk_of_llada_8b_by_hand():
    """As measured for 7.6 million parameters on two processes: ZeRO-2 writes 2 + 2 + 12 bytes a parameter, ZeRO-3
    2 + 12, and 2 at the end, with float32 weights too where passes are in bfloat16."""
    run = llada_8b()
    for one in (run, replace(run, dtype=torch.float32)):
        assert checkpoint_bytes(one, LAYOUTS["zero2"]) == 16 * BILLION
        assert checkpoint_bytes(one, LAYOUTS["zero3"]) == 14 * BILLION
        assert final_bytes(one, LAYOUTS["zero3"]) == 2 * BILLION
    assert checkpoint_bytes(replace(run, dtype=torch.float32), DDP) == 12 * BILLION
    adapted = run_of(model_like("llada_8b", lora=16, dtype=torch.bfloat16), bf16=True)
    assert checkpoint_bytes(adapted, DDP) == 12 * adapted.counts.trainable
    assert final_bytes(adapted, DDP) == 4 * adapted.counts.trainable + 2 * BILLION


@pytest.mark.parametrize(
    ("saves", "limit", "most", "kept"), [(6, 2, 3, 2), (6, None, 6, 6), (2, 2, 2, 2), (1, 2, 1, 1), (0, 2, 0, 0)]
)
def test_one_checkpoint_more_than_are_kept(saves, limit, most, kept):
    run = llada_8b()
    disk = planned_disk(run, LAYOUTS["zero2"], saves, limit)
    assert (disk.most, disk.kept) == (most, kept)
    assert disk.peak == max(most * 16, kept * 16 + 2) * BILLION
    assert planned_disk(run, LAYOUTS["zero2"], saves, limit, weights_only=True).checkpoint == 2 * BILLION


@pytest.mark.parametrize(("steps", "every", "saves"), [(600, 100, 6), (601, 100, 7), (10, 0.25, 4), (6, 500, 1)])
def test_saves_of_a_run(steps, every, saves):
    assert number_of_saves(steps, every) == saves


def test_saves_of_a_run_are_those_that_are_written(tmp_path):
    trainer(tmp_path, max_steps=7, save_strategy="steps", save_steps=3).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == number_of_saves(7, 3) == 3


def test_a_run_that_does_not_fit_on_the_disk_is_refused(tmp_path, monkeypatch):
    disk = Disk(checkpoint=2 * GIB, most=3, kept=2, final=GIB)
    free = {"bytes": 6 * GIB}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free["bytes"]))
    check_disk(tmp_path / "not" / "there", disk)
    free["bytes"] = 5 * GIB
    message = (
        r"run needs 6\.0 GiB of disk \(3 checkpoints at once of 2\.0 GiB, 2 of them kept, the final model 1\.0 GiB\) "
        r"and 5\.0 GiB are free: make room"
    )
    with pytest.raises(ValueError, match=message):
        check_disk(tmp_path, disk)
    (tmp_path / "checkpoint-2").mkdir()  # of the run that is resumed
    with open(tmp_path / "checkpoint-2" / "model.safetensors", "wb") as file:
        file.truncate(GIB)
    check_disk(tmp_path, disk)
    free["bytes"] -= 1
    with pytest.raises(ValueError, match="run needs 6.0 GiB"):
        check_disk(tmp_path, disk)


# --------------------------------------------------------------------------------------------------------------------
# Loading

CHILD = """
import json, sys
import torch
from xdlm_hf.loading import load_weights

def kilobytes(name):
    return int(dict(line.split(":") for line in open("/proc/self/status"))[name].split()[0])

load_weights(sys.argv[1])  # libraries that are imported by then
peaks = {}
for dtype in ("float32", "bfloat16"):
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak
    before = kilobytes("VmRSS")
    load_weights(sys.argv[2], dtype=dtype)
    peaks[dtype] = 1024 * (kilobytes("VmHWM") - before)
print(json.dumps(peaks))
"""


def test_loading_takes_what_is_planned(tmp_path):
    """Peak of the process, in which the file's pages are counted; 21 million parameters, within 10 % and 8 MiB."""
    model_like().save_pretrained(tmp_path / "small")
    model = model_like(vocab_size=32768, d_model=256, mlp_hidden_size=1024)
    model.save_pretrained(tmp_path / "large")
    command = [sys.executable, "-c", CHILD, tmp_path / "small", tmp_path / "large"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-2000:]
    peaks = json.loads(finished.stdout.splitlines()[-1])
    whole = loading_bytes(run_of(model), torch.float32)
    cast = loading_bytes(replace(run_of(model), dtype=torch.bfloat16), torch.float32)
    assert whole == (0, model.num_parameters() * 4) and cast == (model.num_parameters() * 2, whole.shared)
    assert peaks["float32"] < 8 * 2**20  # mapped, and read when it is used
    assert peaks["bfloat16"] == pytest.approx(cast.each + cast.shared, rel=0.1, abs=8 * 2**20)


def test_loading_of_adapters_and_random_weights():
    adapted = run_of(model_like("llada_8b", lora=16, dtype=torch.bfloat16))
    assert loading_bytes(adapted, torch.bfloat16) == (0, 2 * BILLION)
    assert loading_bytes(replace(llada_8b(), dtype=torch.float32), torch.bfloat16) == (4 * BILLION, 2 * BILLION)
    assert loading_bytes(llada_8b(), None) == (4 * BILLION, 0)
    assert math.isclose(loading_bytes(llada_8b(), torch.bfloat16).shared / GIB, 14.93, abs_tol=0.01)
