"""Pictures of the paper's text figures from reports."""

import json
import math

import pytest

from xdlm_hf.evaluation import text_figures
from xdlm_hf.evaluation.generative_perplexity import RELEASED
from xdlm_hf.evaluation.text_figures import Curve, by_steps, likelihoods_by_training, pareto, samples_by_training


def samples(model, row="XDLM k=0.1", steps=(8, 32, 128), sampling="exact"):
    cells = [
        {"steps": n, "perplexity": 900 / n, "perplexity_standard_error": 9 / n, "entropy": 5.0 + n / 1000}
        for n in steps
    ]
    held_out = {"corpus": "openwebtext", "rows": 4, "perplexity": 20.0, "entropy": 5.4}
    return {"model": model, "row": row, "sampling": sampling, "cells": cells[::-1], "held_out": held_out}


def likelihoods(model, perplexity, row="XDLM k=0.1"):
    found = {"perplexity": perplexity, "perplexity_standard_error": 0.5}
    return {"model": model, "row": row, "sets": {}, "zero_shot_average": {"bound": found}}


def test_curves_hold_the_values_of_the_reports():
    found = by_steps([samples("out/a"), samples("out/b", sampling=RELEASED)], None, "perplexity")
    assert [curve.label for curve in found] == [
        "XDLM k=0.1 (out/a)",
        "text, openwebtext",
        "XDLM k=0.1 (out/b, released sampler)",
    ]
    assert found[0].x == [8, 32, 128] and found[0].y == pytest.approx([112.5, 28.125, 7.03125])
    assert found[0].errors == pytest.approx([1.125, 0.28125, 0.0703125]) and found[1].y == [20.0, 20.0]
    assert by_steps([samples("out/a")], None, "entropy")[0].errors == [0, 0, 0]
    both = pareto([samples("out/a"), samples("out/b")], [likelihoods("out/a", 54.0)], None, 32)
    assert both == [Curve("XDLM k=0.1 (out/a)", [54.0], [28.125], [0.28125])]
    # A path may end in a slash, and a model may be measured as another row by --mixing_ratio.
    again = [likelihoods("out/a/", 54.0), likelihoods("out/a", 60.0, row="UDLM")]
    assert pareto([samples("out/a")], again, None, 32) == both


def test_models_whose_folders_have_the_same_name_have_a_curve_each():
    models = ["out/owt/checkpoint-5", "out/lm1b/checkpoint-5"]
    found = by_steps([samples(model) for model in models], None, "perplexity")
    labels = [curve.label for curve in found]
    assert labels == [f"XDLM k=0.1 ({models[0]})", "text, openwebtext", f"XDLM k=0.1 ({models[1]})"]
    other = samples("out/b", sampling="the confidence sampler (not exact)")
    other["held_out"]["perplexity"] = 30.0  # of another judge
    labels = [curve.label for curve in by_steps([samples("out/a"), other], None, "perplexity")]
    assert labels[2] == "XDLM k=0.1 (out/b, the confidence sampler (not exact))"
    assert labels[1] == labels[3] == "text, openwebtext"


def test_training_curves_join_the_checkpoints_of_a_run():
    models = [f"out/a/checkpoint-{step}" for step in (20, 9)]
    (curve,) = samples_by_training([samples(model) for model in [*models, "out/a"]], None)
    assert curve.x == [9, 20] and curve.label == "XDLM k=0.1 (out/a)"
    others = [samples("out/b/checkpoint-20"), samples(models[0], sampling=RELEASED), samples(models[0], row="MDLM")]
    curves = samples_by_training([*map(samples, models), *others], None)
    assert [(curve.label, curve.x) for curve in curves] == [
        ("XDLM k=0.1 (out/a)", [9, 20]),
        ("XDLM k=0.1 (out/b)", [20]),
        ("XDLM k=0.1 (out/a, released sampler)", [20]),
        ("MDLM (out/a)", [20]),
    ]
    (curve,) = likelihoods_by_training([likelihoods(models[0], 50.0), likelihoods(models[1], 60.0)], None)
    assert (curve.x, curve.y, curve.errors) == ([9, 20], [60, 50], [0.5, 0.5])


def test_published_values_alone_are_drawn(tmp_path, capsys):
    text_figures.main(["--output", str(tmp_path / "owt"), "--corpus", "openwebtext"])
    text_figures.main(["--output", str(tmp_path / "lm1b"), "--corpus", "lm1b"])
    drawn = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    expected = ["lm1b/steps.png", "lm1b/training.png", "owt/pareto.png", "owt/steps.png", "owt/training.png"]
    assert drawn == expected and len(capsys.readouterr().out.splitlines()) == 5
    table = {curve.label: curve for curve in by_steps([], "openwebtext", "perplexity")}
    assert table["XDLM k=0.1, published"].y[2] == 114.795 and table["XDLM k=0.1, published"].x[2] == 32
    points = {curve.label: curve for curve in pareto([], [], "openwebtext", 32)}
    assert points["UDLM, published"][1:3] == ([59.574], [88.632])
    years = {curve.label: curve for curve in likelihoods_by_training([], "openwebtext")}
    assert years["MDLM, published"].x[-1] == 1e6 and years["MDLM, published"].y[0] == 64.209


def test_reports_are_drawn(tmp_path, capsys):
    reports = {"a": samples("out/a"), "b": likelihoods("out/a", 54.0), "c": samples("out/a/checkpoint-5")}
    for name, report in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    text_figures.main([*(str(tmp_path / f"{name}.json") for name in reports), "--output", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"steps.png", "pareto.png", "training.png"}


AGAIN = "run the command again with --output"


def without(report, name):
    return {key: value for key, value in report.items() if key != name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a report"),
        ('{"row": "MDLM"}', f"is no report of xdlm-gen-ppl or xdlm-perplexity; {AGAIN}"),
        (json.dumps(likelihoods("a", 54.0) | {"zero_shot_average": {}}), f"is no whole report, at 'bound'; {AGAIN}"),
        (json.dumps(likelihoods("a", math.inf)), f"has the value inf, which cannot be drawn; {AGAIN}"),
        (json.dumps(samples("a") | {"cells": []}), f"has no cells; {AGAIN}"),
        (json.dumps(samples("a") | {"cells": None}), f"has no cells; {AGAIN}"),
        (json.dumps(samples("a") | {"cells": [3]}), f"is no whole report, at .*; {AGAIN}"),
        (json.dumps(samples("a") | {"cells": [{"steps": 8}]}), f"is no whole report, at 'perplexity'; {AGAIN}"),
        (json.dumps(samples("a", steps=(8, math.nan))), f"has the value nan, which cannot be drawn; {AGAIN}"),
        (json.dumps(samples("a") | {"model": None}), f"has the value None, which cannot be drawn; {AGAIN}"),
        (
            json.dumps(samples("a") | {"held_out": {}, "sampling": 3}),
            f"has the value 3, which cannot be drawn; {AGAIN}",
        ),
        *((json.dumps(without(samples("a"), name)), f"at '{name}'; {AGAIN}") for name in ("sampling", "held_out")),
        (json.dumps(without(likelihoods("a", 54.0), "zero_shot_average")), "of xdlm-perplexity, reports of zero-shot"),
        (None, "nothing to draw; pass reports .*, or --corpus"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, content, message):
    reports = []
    if content is not None:
        (tmp_path / "report.json").write_text(content)
        reports = [str(tmp_path / "report.json")]
    with pytest.raises(SystemExit, match=message):
        text_figures.main([*reports, "--output", str(tmp_path / "out")])
