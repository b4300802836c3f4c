"""Pictures, traces and the page of the demo: loss.svg, steps.svg, traces of generations, index.html."""

import html
import json
from pathlib import Path
from string import Template

import matplotlib
from matplotlib import pyplot

matplotlib.use("Agg")

PAGE = Path(__file__).with_name("demo_page.html")
COLOURS = {"base": "tab:gray", "xdlm": "tab:blue"}
LABELS = {"base": "k = 0", "xdlm": "continued at k = 0.1"}


def write_page(folder: Path, report: dict) -> None:
    """Write loss.svg, steps.svg and index.html, which shows them and the traces in the folder."""
    draw_losses(folder, report["text"])
    draw_answers(folder / "steps.svg", report["alphabet"])
    refined, unrefined = (report["lm_eval"][name] for name in ("refined", "unrefined"))
    text = report["text"]
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        refined=f"{100 * refined['right']:.1f}",
        unrefined=f"{100 * unrefined['right']:.1f}",
        nelbo=f"{text['xdlm']['nelbo']:.2f} ± {text['xdlm']['standard_error']:.2f}",
        unigram=f"{text['unigram']:.2f}",
        samples=html.escape("\n".join(report["samples"]["texts"])),
        rows="".join(answer_row(name, cells) for name, cells in report["alphabet"].items() if len(cells) > 1),
        heads="".join(f"<th>{steps} steps</th>" for steps in next(iter(report["alphabet"].values()))),
        seconds=f"{report['seconds']:.0f}",
    )
    (folder / "index.html").write_text(page, encoding="utf-8")


def answer_row(name: str, cells: dict[int, dict]) -> str:
    values = "".join(f"<td>{100 * cell['right']:.1f}</td>" for cell in cells.values())
    return f"<tr><th>{html.escape(name)}</th>{values}</tr>\n"


def history(model: Path) -> list[dict]:
    """What the Trainer logged of a run, by its output folder."""
    return json.loads((model / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def draw_losses(folder: Path, figures: dict) -> None:
    """Training loss of both text runs, their bounds on held-out text, and the level of token frequencies."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    offset = 0
    for run, label in LABELS.items():
        points = [(entry["step"], entry["loss"]) for entry in history(folder / run) if "loss" in entry]
        steps, losses = zip(*points, strict=True)
        axes.plot([offset + step for step in steps], losses, ".-", label=f"{label}: training", color=COLOURS[run])
        offset += steps[-1]
        bound = figures[run]
        axes.errorbar(
            offset,
            bound["nelbo"],
            2 * bound["standard_error"],
            fmt="s",
            capsize=4,
            color=COLOURS[run],
            label=f"{label}: held out, two standard errors",
        )
    axes.axhline(figures["unigram"], ls="--", color="tab:red", label="frequencies of letters, held out")
    axes.set(xlabel="optimizer step", ylabel="nats per letter", title="Text: Python's documentation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.svg")
    pyplot.close(figure)


def draw_answers(path: Path, found: dict[str, dict]) -> None:
    """Right answers against forward passes, one line for each decoding."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, cells in found.items():
        points = sorted((cell["passes"], 100 * cell["right"], 200 * cell["standard_error"]) for cell in cells.values())
        passes, right, errors = zip(*points, strict=True)
        axes.errorbar(passes, right, errors, fmt="o-" if len(points) > 1 else "*", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="forward passes for 32 letters", ylabel="right answers, %", title="Alphabet: quality against passes"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)
