"""The image demo at the size of seconds: one model of twelve steps, its scores and pictures."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.ensemble import RandomForestClassifier

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import images_demo  # noqa: E402


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "images"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images_demo, "K", (0.1,))
        patch.setattr(images_demo, "STEPS", (1, 2))
        patch.setattr(images_demo, "KINDS", (("plain", 1.0, (1, 2)), ("guided", 2.0, (2,))))
        patch.setattr(images_demo, "RandomForestClassifier", lambda _, **options: RandomForestClassifier(20, **options))
        patch.setattr(sys, "argv", ["images_demo.py", "--output_dir", str(folder), "--steps_scale", "0.01"])
        images_demo.main()
    return folder


def test_scores_and_pictures_are_there(demo):
    report = json.loads((demo / "report.json").read_text())
    figures = report["models"]["0.1"]
    assert 0 < figures["nelbo"] < 6 and 0 < figures["nelbo_standard_error"] < 0.2
    assert set(figures["plain"]) == {"1", "2"} and set(figures["guided"]) == {"2"}
    assert report["held_out_images"] == 397
    for name in ("steps.png", "path.png", "holes.png"):
        assert Image.open(demo / name).size[0] > 200
    assert "image after step" in (demo / "path.html").read_text()


def test_the_scores_know_real_images(demo):
    """The judge reads digits; the forest tells 397 held-out images from noise, and hardly from 397 others."""
    report = json.loads((demo / "report.json").read_text())
    bounds = report["bounds"]
    assert report["reads_held_out"] > 0.95
    # 0.018 is the standard error of a share of 794 at chance; 0.62 is more than 6 of them away from it.
    assert bounds["training images"]["told_apart"] < 0.62 < report["models"]["0.1"]["plain"]["1"]["told_apart"]
    real, labels = images_demo.held_out(demo)
    noise = torch.randint(0, 256, real.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert images_demo.told_apart(real, noise) > 0.95
    assert images_demo.right_class(images_demo.fit_judge(demo), noise, labels) < 0.3


def test_a_run_that_fails_ends_the_others(tmp_path, monkeypatch):
    programs = {0.0: "import time; time.sleep(600)", 0.1: "print('no space left'); raise SystemExit(3)"}
    monkeypatch.setattr(images_demo, "K", tuple(programs))
    monkeypatch.setattr(images_demo, "training_command", lambda folder, k, steps: [sys.executable, "-c", programs[k]])
    started, start = [], subprocess.Popen

    def popen(*args, **options):
        started.append(start(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(SystemExit, match="training failed with status 3; see .*k0.1.log"):
        images_demo.train(tmp_path, 1.0)
    assert (tmp_path / "k0.1.log").read_text() == "no space left\n"
    assert [run.poll() for run in started] == [-signal.SIGTERM, 3]


def test_steps_are_read_off_the_progress_bar(tmp_path):
    log = tmp_path / "log"
    log.write_text(" 0%| | 0/12 [00:00<?]\r 42%|## | 5/12 [00:01<00:02]\n{'loss': 1}\r100%| | 7/7 [00:01<00:00]")
    assert images_demo.steps_done(log, 12) == 5
    log.write_text("loading")
    assert images_demo.steps_done(log, 12) == 0
