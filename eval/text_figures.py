"""Draws the paper's text figures from reports of `xdlm-gen-ppl` and `xdlm-perplexity`, beside the published values.

    python -m eval.text_figures reports/*.json --output figures --corpus openwebtext

    steps.png      Figure 2: perplexity and entropy of samples by sampling steps
    pareto.png     Figure 1, right: perplexity of samples at `--steps` by zero-shot perplexity, lower left is better
    training.png   Figures 4a and 8: both by training step, for reports of checkpoint-N folders

Published values are dashed, measured ones solid, with bars of one standard error. Without reports, only the published
values are drawn. Published samples are judged by gpt2-large; compare those of another judge only with each other.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from xdlm_hf.evaluation import published_text as published
from xdlm_hf.evaluation.generative_perplexity import EXACT, RELEASED

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import LogFormatter, StrMethodFormatter  # noqa: E402

CORPORA = {
    "openwebtext": (published.OPENWEBTEXT_PERPLEXITY, published.OPENWEBTEXT_ENTROPY),
    "lm1b": (published.LM1B_PERPLEXITY, published.LM1B_ENTROPY),
}
REMEDY = "run the command again with --output."
DYNAMICS_STEPS = 128  # sampling steps of Figure 4a


class Curve(NamedTuple):
    """Values by x, with their standard errors if measured."""

    label: str
    x: list[float]
    y: list[float]
    errors: list[float] | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, draw, and print the files that were written."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.text_figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", nargs="*", type=Path, help="JSON reports of the two commands")
    parser.add_argument("--output", type=Path, default=Path("figures"), help="folder for the pictures")
    parser.add_argument("--corpus", choices=CORPORA, help="corpus of the published samples to draw, too")
    parser.add_argument("--steps", type=int, default=32, help="sampling steps of pareto.png")
    options = parser.parse_args(argv)
    try:
        for path in draw(options.reports, options.output, options.corpus, options.steps):
            print(path)
    except (ValueError, OSError) as error:
        raise SystemExit(f"text_figures: {error}") from error


def draw(reports: Sequence[Path], output: Path, corpus: str | None, steps: int) -> list[Path]:
    """Draw every picture that there are values for.

    Args:
        reports: JSON reports of `xdlm-gen-ppl` and `xdlm-perplexity`, in any order.
        output: Folder for the pictures, made if missing.
        corpus: Corpus of the published samples; None for none.
        steps: Sampling steps of the Pareto picture.

    Returns:
        The files.

    Raises:
        ValueError: If a file is no such report, or there is nothing to draw.
    """
    read = [read_report(path) for path in reports]
    samples = [report for report in read if "cells" in report]
    likelihoods = [report for report in read if "zero_shot_average" in report]
    panels = {
        "steps.png": [
            ("perplexity of samples", "sampling steps", by_steps(samples, corpus, "perplexity")),
            ("entropy of samples (nats)", "sampling steps", by_steps(samples, corpus, "entropy")),
        ],
        "pareto.png": [
            (
                f"perplexity of samples, {steps} steps",
                "zero-shot perplexity",
                pareto(samples, likelihoods, corpus, steps),
            )
        ],
        "training.png": [
            (f"perplexity of samples, {DYNAMICS_STEPS} steps", "training step", samples_by_training(samples, corpus)),
            ("zero-shot perplexity", "training step", likelihoods_by_training(likelihoods, corpus)),
        ],
    }
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, parts in panels.items():
        if any(curves for _, _, curves in parts):
            _picture(output / name, [part for part in parts if part[2]])
            written.append(output / name)
    if not written:
        raise ValueError(
            "nothing to draw; pass reports (of xdlm-perplexity, reports of zero-shot are drawn), or --corpus for the "
            "published values."
        )
    return written


def read_report(path: Path) -> dict[str, Any]:
    """A report of either command.

    Raises:
        ValueError: If the file is none, or a value to draw is missing or no finite number.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a report: {error}") from error
    if not isinstance(report, dict) or "row" not in report or not {"cells", "sets"} & set(report):
        raise ValueError(f"{path} is no report of xdlm-gen-ppl or xdlm-perplexity; {REMEDY}")
    try:
        names, numbers = _drawn_values(report)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no whole report, at {error}; {REMEDY}") from error
    odd = [name for name in names if not isinstance(name, str)]
    odd += [x for x in numbers if not isinstance(x, int | float) or not math.isfinite(x)]
    if odd:
        raise ValueError(f"{path} has the value {odd[0]}, which cannot be drawn; {REMEDY}")
    if not report.get("cells", True):
        raise ValueError(f"{path} has no cells; {REMEDY}")
    return report


def _drawn_values(report: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """What the curves read of a report: names, and numbers.

    Raises:
        KeyError, TypeError, AttributeError: If something is missing, or of another form.
    """
    names, numbers = [report["model"], report["row"]], []
    if "cells" in report:
        names.append(report["sampling"])
        for cell in report["cells"] or []:
            errors = [value for name, value in cell.items() if name.endswith("_standard_error")]
            numbers += [cell["steps"], cell["perplexity"], cell["entropy"], *errors]
        if report["held_out"]:
            held_out = report["held_out"]
            names.append(held_out["corpus"])
            numbers += [held_out["perplexity"], held_out["entropy"]]
    if "zero_shot_average" in report:
        bound = report["zero_shot_average"]["bound"]
        numbers += [bound["perplexity"], bound.get("perplexity_standard_error", 0.0)]
    return names, numbers


# --------------------------------------------------------------------------------------------------------------------
# Curves


def by_steps(samples: Iterable[dict[str, Any]], corpus: str | None, figure: str) -> list[Curve]:
    """Perplexity or entropy by sampling steps; held-out text as a horizontal line."""
    curves = []
    if corpus is not None:
        table = CORPORA[corpus][figure == "entropy"]
        curves += [Curve(f"{row}, published", [*map(float, cells)], [*cells.values()]) for row, cells in table.items()]
    for report in samples:
        cells = sorted(report["cells"], key=lambda cell: cell["steps"])
        steps = [float(cell["steps"]) for cell in cells]
        errors = [cell.get(f"{figure}_standard_error", 0.0) for cell in cells]
        curves.append(Curve(label(report), steps, [cell[figure] for cell in cells], errors))
        if report["held_out"]:
            value = report["held_out"][figure]
            line = Curve(f"text, {report['held_out']['corpus']}", [steps[0], steps[-1]], [value, value])
            # Reports of one corpus have the same text.
            if not any((line.label, line.y) == (curve.label, curve.y) for curve in curves):
                curves.append(line)
    return curves


def pareto(
    samples: Iterable[dict[str, Any]], likelihoods: Iterable[dict[str, Any]], corpus: str | None, steps: int
) -> list[Curve]:
    """One point for each model that has both values."""
    points = []
    if corpus == "openwebtext":
        table = published.OPENWEBTEXT_PERPLEXITY
        points = [
            Curve(f"{row}, published", [published.ZERO_SHOT[row]["average"]], [cells[str(steps)]])
            for row, cells in table.items()
            if str(steps) in cells
        ]
    averages = {_weights(report): report["zero_shot_average"]["bound"]["perplexity"] for report in likelihoods}
    for report in samples:
        cell = next((cell for cell in report["cells"] if cell["steps"] == steps), None)
        if cell is not None and _weights(report) in averages:
            error = [cell.get("perplexity_standard_error", 0.0)]
            points.append(Curve(label(report), [averages[_weights(report)]], [cell["perplexity"]], error))
    return points


def _weights(report: dict[str, Any]) -> tuple[str, str]:
    """What two reports of one model share: its path and, since k can be chosen, its row."""
    return str(Path(report["model"])), report["row"]


def samples_by_training(samples: Iterable[dict[str, Any]], corpus: str | None) -> list[Curve]:
    """Perplexity of samples at 128 steps by training step."""
    curves = _published_training(published.LM1B_BY_STEP_PERPLEXITY) if corpus == "lm1b" else []
    cells = [
        (report, cell["perplexity"], cell.get("perplexity_standard_error", 0.0))
        for report in samples
        for cell in report["cells"]
        if cell["steps"] == DYNAMICS_STEPS
    ]
    return curves + _measured_training(cells)


def likelihoods_by_training(likelihoods: Iterable[dict[str, Any]], corpus: str | None) -> list[Curve]:
    """Zero-shot perplexity by training step."""
    curves = _published_training(published.ZERO_SHOT_BY_STEP) if corpus == "openwebtext" else []
    averages = [(report, report["zero_shot_average"]["bound"]) for report in likelihoods]
    cells = [(report, found["perplexity"], found.get("perplexity_standard_error", 0.0)) for report, found in averages]
    return curves + _measured_training(cells)


def _published_training(table: dict[str, dict[str, float]]) -> list[Curve]:
    factor = {"k": 1e3, "M": 1e6}
    return [
        Curve(f"{row}, published", [float(name[:-1]) * factor[name[-1]] for name in cells], [*cells.values()])
        for row, cells in table.items()
    ]


def _measured_training(cells: Iterable[tuple[dict[str, Any], float, float]]) -> list[Curve]:
    """One curve for each run and way of sampling, from reports of the run's checkpoints."""
    runs: dict[str, list[tuple[float, float, float]]] = {}
    for report, value, error in cells:
        step = re.search(r"checkpoint-(\d+)/?$", report["model"])
        if step is not None:
            run = label({**report, "model": str(Path(report["model"]).parent)})
            runs.setdefault(run, []).append((float(step[1]), value, error))
    return [Curve(run, *map(list, zip(*sorted(points), strict=True))) for run, points in runs.items()]


def label(report: dict[str, Any]) -> str:
    """Row of the paper, model and how its samples were drawn."""
    return f"{report['row']} ({report['model']}{_drawn(report)})"


def _drawn(report: dict[str, Any]) -> str:
    """How samples were drawn, for a label: nothing for exact sampling, or a report without samples."""
    sampling = report.get("sampling", EXACT)
    if sampling == RELEASED:
        return ", released sampler"
    return "" if sampling == EXACT else f", {sampling}"


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def _picture(path: Path, parts: Sequence[tuple[str, str, list[Curve]]]) -> None:
    figure, axes = pyplot.subplots(1, len(parts), figsize=(7 * len(parts), 5), squeeze=False, constrained_layout=True)
    for axis, (title, x_label, curves) in zip(axes[0], parts, strict=True):
        _panel(axis, curves)
        axis.set(title=title, xlabel=x_label)
        if title.startswith("perplexity") and x_label != "zero-shot perplexity":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        if x_label == "sampling steps":
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _panel(axis: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        measured = curve.errors is not None
        axis.errorbar(
            curve.x,
            curve.y,
            yerr=curve.errors,
            label=curve.label,
            marker="o" if measured or len(curve.x) == 1 else None,
            linestyle="-" if measured else ("--" if curve.label.endswith("published") else ":"),
            capsize=2 if measured else 0,
        )


if __name__ == "__main__":
    main()
