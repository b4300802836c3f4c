"""The paper's comparison of noises at a small size: characters of real text, models of 1.0 million parameters.

    python benchmarks/text_small.py --texts FILES... [--output_dir outputs/text_small] [--jobs 2]

XDLM at k = 0 (MDLM), 0.1, 0.5 and 1 (UDLM), and GIDD with p_u = 0.1, each trained from two seeds by
recipes/text_pretrain.py with recipes/configs/text/small.yaml; models of one seed start from the same weights and see
the same rows in the same order at the same times. Then, with held-out text:

1. the bound on the likelihood (`xdlm-perplexity`), on the same noise times for all, with paired standard errors;
2. ancestral samples at 4 to 128 steps (`xdlm-gen-ppl`): perplexity by a 6-gram judge of the training text, entropy,
   repetitions; beside them the same figures of the text itself;
3. greedy continuations of 16 held-out characters by 48, in 2 to 32 steps of the confidence sampler, refined by
   Algorithm 1's budget, by edits above a threshold, or not at all: the same figures of the continuations.

About 20 CPU minutes a model, on one thread each. Every part is kept in the output folder, so that the same command
continues after an end; report.md, report.json and the pictures are written from what is there.

Without --texts the text is Python's own documentation.
"""

import argparse
import csv
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import matplotlib
import torch
import yaml
from measure import ROOT, finish_plot, run_job, run_jobs, training_curve
from transformers import AutoTokenizer

from xdlm_hf.data.corpora import corpus_rows
from xdlm_hf.data.readers import load_documents, python_reference_documents
from xdlm_hf.data.text8 import as_text8, text8_documents, text8_tokenizer
from xdlm_hf.evaluation.generative_perplexity import draw
from xdlm_hf.evaluation.perplexity import Scorer
from xdlm_hf.evaluation.text_judges import NgramJudge, entropies, perplexity
from xdlm_hf.loading import load_weights
from xdlm_hf.models.dit.configuration_dit import DiTConfig
from xdlm_hf.models.dit.modeling_dit import DiTForDiffusionLM

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

LINES = {1: "-", 2: "--"}  # by seed
CONFIG = ROOT / "recipes" / "configs" / "text" / "small.yaml"
SIZES = ROOT / "recipes" / "configs" / "models" / "dit_tiny_text8.json"
SEEDS = (1, 2)
LENGTH, PROMPT, ROWS, TIMES, SAMPLES = 64, 16, 3000, 4, 320
ANCESTRAL_STEPS = (4, 8, 16, 32, 64, 128)
CONFIDENCE_STEPS = (2, 4, 8, 16, 32)
GENERATION_SEED = 0
REFINEMENTS: dict[str, dict[str, Any] | str] = {
    "none": "none",
    "budget": "budget",
    **{f"threshold {p}": {"policy": "threshold", "threshold": p} for p in (0.1, 0.3, 0.5, 0.7, 0.9)},
}
CONTINUED = {
    "k = 0": ("none", "threshold 0.9"),
    "k = 0.1": tuple(REFINEMENTS),
    "k = 0.5": ("none", "budget", "threshold 0.9"),
}


class System(NamedTuple):
    """A row of the comparison: name, settings of the recipe, and of the model."""

    name: str
    training: dict[str, Any]
    model: dict[str, Any] = {}


SYSTEMS = (
    *(System(f"k = {k:g}", {"mixing_ratio": k}) for k in (0.0, 0.1, 0.5, 1.0)),
    System(
        "GIDD p_u = 0.1",
        {"noise_schedule": None, "gidd_weighting": "dynamic"},
        {"noise_process": "gidd", "p_uniform": 0.1},
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--texts", nargs="+", type=Path, help=".txt, .jsonl (column text) and .csv (last column) files")
    add("--output_dir", type=Path, default=Path("outputs/text_small"), help="also of an earlier run, to go on")
    add("--steps", type=int, help="optimizer steps of each model; default: those of the config")
    add("--jobs", type=int, default=2, help="models trained and measured at one time, on a thread each")
    add("--report", action="store_true", help="only write the report from what was measured")
    add("--measure", help=argparse.SUPPRESS)  # name of a trained model; how a job measures it
    options = parser.parse_args()
    options.output_dir = options.output_dir.resolve()  # jobs run in the repository's folder
    if options.measure is not None:
        return measure(options.output_dir, options.measure)
    if not options.report:
        prepare(options.output_dir, options.texts)
        run_jobs(comparison_jobs(options), options.jobs)
    write_report(options.output_dir)
    return None


def model_name(system: System, seed: int) -> str:
    return f"{system.name.split(' p_u')[0].replace(' = ', '')}-{seed}".lower()


NAMES = {model_name(system, seed): (system, seed) for seed in SEEDS for system in SYSTEMS}

# --------------------------------------------------------------------------------------------------------------------
# Text


def prepare(folder: Path, texts: Sequence[Path] | None) -> None:
    """Write text.txt: documents in random order, so that all parts have all sources."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "text.txt").exists():
        return
    files = [(str(path), read_documents(path)) for path in texts or []]
    files = files or [("Python's documentation", [row["text"] for row in python_reference_documents()])]
    documents = [document for _, part in files for document in part if document.strip()]
    random.Random(0).shuffle(documents)
    sources = {Path(name).name: len(part) for name, part in files}
    (folder / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")
    (folder / "text.txt").write_text(as_text8("\n".join(documents)))


def read_documents(path: Path) -> list[str]:
    """Documents of a file: rows of a table, articles of WikiText, else lines."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return [row[-1] for row in csv.reader(file)]
    if path.suffix == ".jsonl":
        return [row["text"] for row in load_documents(data_files=[str(path)])]
    text = path.read_text(encoding="utf-8")
    return re.split(r"\n(?= = [^=])", text) if text.lstrip().startswith("= ") else text.splitlines()


# --------------------------------------------------------------------------------------------------------------------
# Jobs: training is the recipe in a process of its own, and so is measuring


def comparison_jobs(options: argparse.Namespace) -> list[Callable[[], None]]:
    steps = {} if options.steps is None else {"max_steps": options.steps}

    def job(name: str) -> None:
        system, seed = NAMES[name]
        train(options.output_dir, name, system, {**system.training, **steps, "seed": seed})
        command = [sys.executable, __file__, "--output_dir", str(options.output_dir), "--measure", name]
        run_job(command, options.output_dir / "models" / name)

    return [partial(job, name) for name in NAMES]


def train(folder: Path, name: str, system: System, settings: dict[str, Any]) -> None:
    """Train a model, unless that is done; go on where an earlier run ended."""
    output, start = folder / "models" / name, folder / "start" / name
    if (output / "model.safetensors").exists():
        return
    if not (start / "model.safetensors").exists():
        initial_model(system, settings["seed"]).save_pretrained(start)
        text8_tokenizer().save_pretrained(start)
    config = {"base": str(CONFIG), "config_name": None, "model_name_or_path": str(start), "output_dir": str(output)}
    config |= {"data_files": [str(folder / "text.txt")], "disable_tqdm": True, **settings}
    file = start / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "recipes" / "text_pretrain.py"), "--config", str(file)]
    run_job([*command, "--resume_from_checkpoint", "auto"], output)


def initial_model(system: System, seed: int) -> DiTForDiffusionLM:
    """The random weights of a seed, the same for all systems.

    Gates of the blocks' branches start at zero in the published networks (adaLN-zero). In a run as short as this one
    the branches then learn late; with gates of one they are ordinary residual branches from the beginning.
    """
    torch.manual_seed(seed)
    model = DiTForDiffusionLM(DiTConfig(**json.loads(SIZES.read_text()) | system.model))
    for block in model.backbone.blocks:
        bias = block.adaLN_modulation.bias.detach().view(6, -1)  # shift, scale and gate of attention and MLP
        bias[2], bias[5] = 1.0, 1.0
    return model


# --------------------------------------------------------------------------------------------------------------------
# Measuring one model


def measure(folder: Path, name: str) -> None:
    """Measure what is missing in measured/NAME.json; it is written after every cell."""
    system, _ = NAMES[name]
    file = folder / "measured" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    found = json.loads(file.read_text()) if file.exists() else {"cells": {}}
    model = load_weights(str(folder / "models" / name)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "models" / name)
    held_out = corpus_rows(
        "text8", tokenizer, LENGTH, "test", [str(folder / "text.txt")], insert_eos=False, max_rows=ROWS
    )
    judge = NgramJudge(row["text"] for row in text8_documents("train", str(folder / "text.txt")))

    def keep() -> None:
        file.write_text(json.dumps(found) + "\n")

    if "nats" not in found:
        nats, tokens = Scorer(model, tokenizer, settings(nelbo_samples=TIMES)).bound_by_row(held_out)
        found |= {"parameters": model.num_parameters(), "nats": (nats / tokens).tolist()}
        found["training"] = training_curve(folder / "models" / name)
        keep()
    rows = torch.stack([held_out[i]["input_ids"] for i in range(SAMPLES)])
    if "text" not in found:
        found["text"] = {"whole": figures(judge, tokenizer, rows), "continued": figures(judge, tokenizer, rows, PROMPT)}
        keep()
    for steps in ANCESTRAL_STEPS:
        if f"ancestral {steps}" not in found["cells"]:
            ids, _ = draw(settings(samples=SAMPLES, generate={}), model, steps, LENGTH)
            found["cells"][f"ancestral {steps}"] = figures(judge, tokenizer, ids)
            keep()
    for policy in CONTINUED.get(system.name, ()):
        for steps in CONFIDENCE_STEPS:
            if f"{policy} {steps}" not in found["cells"]:
                ids = continued(model, rows[:, :PROMPT], steps, REFINEMENTS[policy])
                found["cells"][f"{policy} {steps}"] = figures(judge, tokenizer, ids, PROMPT)
                keep()


def continued(model: Any, prompts: torch.Tensor, steps: int, refinement: dict[str, Any] | str) -> torch.Tensor:
    """Prompts (R, P) with their greedy continuations, (R, L)."""
    options = {"sampler": "confidence", "temperature": 0.0, "refinement": refinement, "eos_token_id": []}
    return torch.cat(
        [model.generate(p, steps=steps, max_new_tokens=LENGTH - PROMPT, **options) for p in prompts.split(64)]
    )


def settings(**changes: Any) -> SimpleNamespace:
    """Options of the two commands' functions."""
    common = {"mixing_ratio": None, "batch_size": 64, "seed": GENERATION_SEED, "reference_compat": False}
    return SimpleNamespace(**common, **changes)


def figures(judge: NgramJudge, tokenizer: Any, ids: torch.Tensor, prompt: int = 0) -> dict[str, Any]:
    """Perplexity, entropy, repetitions and loops of rows (R, L) behind a prompt, with standard errors; two as text."""
    texts = characters(tokenizer, ids)
    answers = [text[prompt:] for text in texts]
    nats, tokens = judge.score(texts, LENGTH)
    given, given_tokens = judge.score([text[:prompt] for text in texts], LENGTH)
    found = perplexity(nats - given, tokens - given_tokens)
    values = {"entropy": entropies(ids[:, prompt:])}
    for name, of in (("repeated", repeated), ("looping", looping)):
        values[name] = torch.tensor([of(text) for text in answers], dtype=torch.float64)
    for name, each in values.items():
        found |= {name: each.mean().item(), f"{name}_standard_error": each.std().item() / len(ids) ** 0.5}
    return {**found, "texts": [f"{text[:prompt]}|{text[prompt:]}" if prompt else text for text in texts[:2]]}


def characters(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    """Rows (R, L) as texts of L characters; special tokens, which the text does not have, are "?"."""
    symbols = [token if len(token) == 1 else "?" for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    return ["".join(symbols[i] for i in row) for row in ids.tolist()]


def repeated(text: str, n: int = 6) -> float:
    """Share of the n-grams of characters that occurred before in the text."""
    grams = [text[at : at + n] for at in range(len(text) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def looping(text: str) -> bool:
    """Whether something of 2 to 16 characters stands there three times in succession."""
    return re.search(r"(.{2,16}?)\1\1", text) is not None


# --------------------------------------------------------------------------------------------------------------------
# The report


def write_report(folder: Path) -> None:
    """Write report.md and the pictures from all that was measured."""
    found = {
        name: json.loads((folder / "measured" / f"{name}.json").read_text())
        for name in NAMES
        if (folder / "measured" / f"{name}.json").exists()
    }
    if not found:
        raise SystemExit(f"text_small: nothing was measured in {folder}; leave --report out.")
    tables = [likelihood_table(found), ancestral_table(found), confidence_table(found), examples(found)]
    (folder / "report.md").write_text("\n\n".join(tables) + "\n")
    draw_training(found, folder / "training.png")
    draw_ancestral(found, folder / "steps.png")
    draw_pareto(found, folder / "pareto.png")
    draw_confidence(found, folder / "refinement.png")
    print("\n\n".join(tables))


def by_system(found: dict[str, Any]) -> dict[str, list[dict[str, Any] | None]]:
    """What was measured of each system's models, by seed; None for a model that is missing."""
    measured = {system.name: [found.get(model_name(system, seed)) for seed in SEEDS] for system in SYSTEMS}
    return {name: each for name, each in measured.items() if any(each)}


def likelihood_table(found: dict[str, Any]) -> str:
    """Bounds of both seeds with standard errors over rows, and paired differences to k = 0."""
    lines = [
        f"Bound, nats per character, {ROWS} held-out rows x {TIMES} times; differences to k = 0 are of the same rows.",
        "",
        "| system | " + " | ".join(f"seed {seed} | difference" for seed in SEEDS) + " | mean difference |",
        "| --- |" + " ---: |" * (2 * len(SEEDS) + 1),
    ]
    base = by_system(found).get(SYSTEMS[0].name, [None] * len(SEEDS))
    for name, each in by_system(found).items():
        line, differences = [name], []
        for own, other in zip(each, base, strict=True):
            line += ["-" if own is None else mean_and_error(torch.tensor(own["nats"])), ""]
            if own is not None and other is not None and own is not other:
                differences.append(torch.tensor(own["nats"]) - torch.tensor(other["nats"]))
                line[-1] = mean_and_error(differences[-1])
        whole = len(differences) == len(SEEDS)
        line.append(mean_and_error(torch.stack(differences).mean(0)) if whole else "")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def mean_and_error(values: torch.Tensor) -> str:
    return f"{values.mean():.4f} ± {values.std() / len(values) ** 0.5:.4f}"


def ancestral_table(found: dict[str, Any]) -> str:
    """Judge perplexity and entropy of ancestral samples by steps."""
    systems = by_system(found)
    rows = {name: [cell_rows(each, "ancestral", steps) for steps in ANCESTRAL_STEPS] for name, each in systems.items()}
    title = f"{SAMPLES} ancestral samples of {LENGTH} characters a model"
    return "\n\n".join(
        f"{what}, {title}; both seeds, ± the standard error of their mean over samples.\n\n"
        + table("system", ANCESTRAL_STEPS, rows, figure, digits, text_of(found, "whole", figure, digits))
        for what, figure, digits in (
            ("Judge perplexity per character", "perplexity", 1),
            ("Entropy of a sample's characters, nats", "entropy", 3),
            ("Repeated 6-grams of a sample, share", "repeated", 4),
        )
    )


def confidence_table(found: dict[str, Any]) -> str:
    """The same of greedy continuations, by policy."""
    rows = {
        f"{system}, {policy}": [cell_rows(each, policy, steps) for steps in CONFIDENCE_STEPS]
        for system, each in by_system(found).items()
        for policy in CONTINUED.get(system, ())
    }
    title = f"{SAMPLES} greedy continuations of {PROMPT} held-out characters by {LENGTH - PROMPT} a model"
    return "\n\n".join(
        f"{what}, {title}; both seeds, ± the standard error of their mean over samples.\n\n"
        + table(
            "system, refinement", CONFIDENCE_STEPS, rows, figure, digits, text_of(found, "continued", figure, digits)
        )
        for what, figure, digits in (
            ("Judge perplexity per character", "perplexity", 2),
            ("Entropy of a continuation's characters, nats", "entropy", 3),
            ("Repeated 6-grams of a continuation, share", "repeated", 3),
            ("Continuations that loop, share", "looping", 3),
        )
    )


def cell_rows(measured: Sequence[dict[str, Any] | None], kind: str, steps: int) -> list[dict[str, Any] | None]:
    """A cell of each seed; None for one that is missing."""
    return [None if each is None else each["cells"].get(f"{kind} {steps}") for each in measured]


def table(
    head: str, steps: Sequence[int], rows: dict[str, list[list[dict[str, Any]]]], figure: str, digits: int, text: str
) -> str:
    lines = [
        f"| {head} | " + " | ".join(f"{n} steps" for n in steps) + " |",
        "| --- |" + " ---: |" * len(steps),
    ]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(both_seeds(cell, figure, digits) for cell in cells) + " |")
    return "\n".join([*lines, f"| held-out text | {text} |" + " |" * (len(steps) - 1)])


def both_seeds(cells: Sequence[dict[str, Any] | None], figure: str, digits: int) -> str:
    if not any(cells):
        return "-"
    values = " / ".join("-" if cell is None else f"{cell[figure]:.{digits}f}" for cell in cells)
    return f"{values} ± {mean_of(cells, figure)[1]:.{digits}f}"


def mean_of(cells: Sequence[dict[str, Any] | None], figure: str) -> tuple[float, float]:
    """Mean over the seeds that there are, and its standard error over samples."""
    cells = [cell for cell in cells if cell is not None]
    errors = [cell[f"{figure}_standard_error"] for cell in cells]
    return sum(cell[figure] for cell in cells) / len(cells), sum(e * e for e in errors) ** 0.5 / len(cells)


def text_of(found: dict[str, Any], part: str, figure: str, digits: int) -> str:
    text = next(iter(found.values()))["text"][part]
    return f"{text[figure]:.{digits}f} ± {text[f'{figure}_standard_error']:.{digits}f}"


def examples(found: dict[str, Any]) -> str:
    """The first sample of some cells, seed 1."""
    chosen = ("ancestral 8", "ancestral 128", "none 4", "budget 4", "threshold 0.5 4", "budget 32")
    lines = ["First samples of seed 1; | ends the prompt.", ""]
    for system, (first, *_) in by_system(found).items():
        cells = first["cells"] if first else {}
        lines += [f"    {system:14} {c:16} {cells[c]['texts'][0]}" for c in chosen if c in cells]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_training(found: dict[str, Any], file: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for number, (system, each) in enumerate(by_system(found).items()):
        for seed, measured in zip(SEEDS, each, strict=True):
            if measured is not None:
                points, label = measured["training"], system if seed == SEEDS[0] else None
                axes.plot(points["steps"], points["nelbo"], f"C{number}", label=label, linestyle=LINES[seed])
    finish_plot(figure, axes, "optimizer step", "bound on validation rows, nats per character", file)


def draw_ancestral(found: dict[str, Any], file: Path) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for place, name in zip(axes, ("perplexity", "entropy"), strict=True):
        for system, each in by_system(found).items():
            cells = {steps: cell_rows(each, "ancestral", steps) for steps in ANCESTRAL_STEPS}
            curve(place, system, {steps: mean_of(cell, name) for steps, cell in cells.items() if any(cell)})
        place.axhline(next(iter(found.values()))["text"]["whole"][name], color="grey", linestyle=":", label="text")
        label_steps(place, ANCESTRAL_STEPS)
    axes[0].set_yscale("log")
    finish_plot(figure, axes[0], "sampling steps", "judge perplexity of samples", None)
    finish_plot(figure, axes[1], "sampling steps", "entropy of samples, nats", file)


def draw_pareto(found: dict[str, Any], file: Path, steps: Sequence[int] = (8, 32)) -> None:
    figure, axes = pyplot.subplots(1, len(steps), figsize=(5 * len(steps), 4))
    for place, number in zip(axes, steps, strict=True):
        for color, (system, each) in enumerate(by_system(found).items()):
            cells = cell_rows(each, "ancestral", number)
            for seed, measured, cell in zip(SEEDS, each, cells, strict=True):
                if cell is not None:
                    nats = torch.tensor(measured["nats"])
                    error = {"xerr": (nats.std() / len(nats) ** 0.5).item(), "yerr": cell["perplexity_standard_error"]}
                    label = system if seed == SEEDS[0] else None
                    place.errorbar(nats.mean(), cell["perplexity"], **error, fmt=f"C{color}o", label=label)
        finish_plot(figure, place, "bound, nats per character", f"judge perplexity, {number} steps", file)


def draw_confidence(found: dict[str, Any], file: Path) -> None:
    """Perplexity, entropy and loops of the continuations at k = 0.1 by steps."""
    measured = by_system(found).get("k = 0.1")
    if measured is None:
        return
    names = {"perplexity": "judge perplexity", "entropy": "entropy, nats", "looping": "share that loops"}
    figure, axes = pyplot.subplots(1, len(names), figsize=(14, 4))
    for place, (name, title) in zip(axes, names.items(), strict=True):
        for policy in REFINEMENTS:
            cells = {steps: cell_rows(measured, policy, steps) for steps in CONFIDENCE_STEPS}
            curve(place, policy, {steps: mean_of(cell, name) for steps, cell in cells.items() if any(cell)})
        place.axhline(next(iter(found.values()))["text"]["continued"][name], color="grey", linestyle=":", label="text")
        label_steps(place, CONFIDENCE_STEPS)
        place.set_yscale("log" if name == "perplexity" else "linear")
        finish_plot(figure, place, "steps", title, file)


def label_steps(axes: Axes, steps: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(n) for n in steps])


def curve(axes: Axes, label: str, points: dict[int, tuple[float, float]]) -> None:
    values, errors = zip(*points.values(), strict=True) if points else ((), ())
    axes.errorbar(list(points), values, errors, marker="o", markersize=3, capsize=2, label=label)


if __name__ == "__main__":
    main()
