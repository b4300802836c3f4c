"""The paper's comparison of noises on small images: pixels as tokens, DiTs of 0.6 million parameters.

    python benchmarks/images_small.py [--cifar10 cifar10.npz --size 8] [--output_dir outputs/images_small] [--jobs 2]

XDLM at k = 0 (MDLM), 0.1, 0.5 and 1 (UDLM), each trained from two seeds by recipes/image_train.py with
recipes/configs/images/small.yaml; models of one seed start from the same weights and see the same rows in the same
order at the same times. The images are scikit-learn's digits (8 x 8, 17 greys: 64 tokens), or with --cifar10
photographs of an .npz file (train_images, train_labels, test_images, test_labels; uint8 NHWC), averaged to `--size`
pixels in 17 greys. Then, with held-out images:

1. the bound on the likelihood, on the same noise times for all, with paired standard errors;
2. ancestral samples at 4 to 64 steps, as many of each class as held out, against the held-out images: the accuracy of
   a two-sample classifier (a random forest, cross-validated; 0.5 means that it cannot tell them apart), the Frechet
   distance of 20 principal components, and the share in which a classifier trained on real images sees the right class.

Before any model, the same figures are measured of training images, and of images whose pixels are drawn independently
from the training images' values at that place in that class: what the metrics tell apart, and what they do not. Of 597
held-out digits the forest tells training images with 0.475 +- 0.014 and independent pixels with 0.863 +- 0.010; their
Frechet distances are 0.046 and 0.220; the class is read right in 0.992 of both, which this figure does not tell apart.

About 14 CPU minutes a model of digits, on one thread each (0.45 s a training step). Every part is kept in the output
folder, so that the same command continues after an end; report.md and the pictures are written from what is there.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import matplotlib
import numpy as np
import torch
import yaml
from accelerate import PartialState
from measure import ROOT, finish_plot, run_job, run_jobs, training_curve
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC
from torch import Tensor, nn

from xdlm_hf import DiTConfig, DiTForDiffusionLM
from xdlm_hf.data.image_tokens import SETTINGS, TokenSettings, read_settings, read_tokens
from xdlm_hf.evaluation.fid import score
from xdlm_hf.evaluation.image_features import make_reference
from xdlm_hf.evaluation.perplexity import Scorer
from xdlm_hf.loading import load_weights

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

CONFIG = ROOT / "recipes" / "configs" / "images" / "small.yaml"
SIZES = ROOT / "recipes" / "configs" / "models" / "dit_pixels.json"
RATIOS = (0.0, 0.1, 0.5, 1.0)
SEEDS = (1, 2)
STEPS = (4, 8, 16, 32, 64)
TIMES = 16  # noise times of each held-out image
GREYS = 17
TRAINING_DIGITS = 1200  # of 1,797; the rest are held out
COMPONENTS = 20
GENERATION_SEED = 0
LINES = {1: "-", 2: "--"}  # by seed
INDEPENDENT, TRAINING = "independent pixels", "training images"
FIGURES = {
    "forest": "Accuracy of the two-sample forest",
    "frechet": f"Frechet distance of {COMPONENTS} components",
    "right_class": "Right class",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cifar10", type=Path, help=".npz file of photographs; default: scikit-learn's digits")
    add("--size", type=int, default=8, choices=(8, 16), help="side of the photographs")
    add("--output_dir", type=Path, default=Path("outputs/images_small"), help="also of an earlier run, to go on")
    add("--steps", type=int, help="optimizer steps of each model; default: those of the config")
    add("--held_out", type=int, help="at most so many held-out images; default: all")
    add("--jobs", type=int, default=2, help="models trained and measured at one time, on a thread each")
    add("--report", action="store_true", help="only write the report from what was measured")
    add("--measure", help=argparse.SUPPRESS)  # name of a trained model, or of a baseline; how a job measures it
    options = parser.parse_args()
    options.output_dir = options.output_dir.resolve()  # jobs run in the repository's folder
    if options.measure is not None:
        return measure(options.output_dir, options.measure)
    if not options.report:
        prepare(options)
        run_jobs(comparison_jobs(options), options.jobs)
    write_report(options.output_dir)
    return None


def model_name(k: float, seed: int) -> str:
    return f"k{k:g}-{seed}"


NAMES = {model_name(k, seed): (k, seed) for seed in SEEDS for k in RATIOS}

# --------------------------------------------------------------------------------------------------------------------
# Images


def prepare(options: argparse.Namespace) -> None:
    """Write the folders train/ and held_out/, as recipes/image_tokens.py does, of images in random order."""
    folder = options.output_dir
    if (folder / "held_out" / SETTINGS).exists():
        return
    name, classes, parts = digits() if options.cifar10 is None else photographs(options.cifar10, options.size)
    for part, (images, labels) in parts.items():
        chosen = slice(options.held_out if part == "held_out" else None)
        images, labels = images[chosen], labels[chosen]
        rows = {"input_ids": images.reshape(len(images), -1).astype(np.uint8), "class_label": labels.astype(np.int64)}
        datasets.Dataset.from_dict(rows).save_to_disk(folder / part)
        settings = TokenSettings(
            dataset=name,
            split=part,
            fingerprint="",
            images=len(images),
            tokens=GREYS,
            channels=1,
            height=images.shape[1],
            width=images.shape[2],
            grid=None,
            vqvae=None,
            classes=classes,
            image_size=None,
            flips=False,
            skip_damaged=False,
        )
        (folder / part / SETTINGS).write_text(settings.to_json())


Parts = dict[str, tuple[np.ndarray, np.ndarray]]


def digits() -> tuple[str, tuple[str, ...], Parts]:
    """Name, classes, and images (n, 8, 8) in 0..16 with their labels."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    cut = {"train": order[:TRAINING_DIGITS], "held_out": order[TRAINING_DIGITS:]}
    parts = {part: (found.images[index], found.target[index]) for part, index in cut.items()}
    return "scikit-learn digits", tuple(map(str, range(10))), parts


def photographs(file: Path, size: int) -> tuple[str, tuple[str, ...], Parts]:
    """The same of photographs: grey, averaged to `size` pixels, in steps of 1/16."""
    with np.load(file) as found:
        names = tuple(map(str, found["class_names"])) if "class_names" in found.files else None
        parts, classes = {}, int(found["train_labels"].max()) + 1
        for part, theirs in (("train", "train"), ("held_out", "test")):
            grey = found[f"{theirs}_images"].astype(np.float64) @ [0.299, 0.587, 0.114]
            block = grey.shape[1] // size
            means = grey.reshape(len(grey), size, block, size, block).mean((2, 4))
            order = np.random.default_rng(0).permutation(len(grey))
            values = np.rint(means * ((GREYS - 1) / 255)).clip(0, GREYS - 1)
            parts[part] = (values[order], found[f"{theirs}_labels"][order])
    return f"{file.name}, {size} x {size}", names or tuple(map(str, range(classes))), parts


def images_of(folder: Path, part: str) -> tuple[Tensor, np.ndarray]:
    """Ids (n, L) int64 and labels (n,)."""
    rows = read_tokens(folder / part)[:]
    return torch.from_numpy(np.stack(rows["input_ids"])).long(), np.asarray(rows["class_label"])


def independent_pixels(ids: Tensor, labels: np.ndarray, wanted: np.ndarray) -> Tensor:
    """Ids of the wanted classes, each value drawn from those of the images of its class at its place."""
    rng = np.random.default_rng(GENERATION_SEED)
    drawn = [rng.choice(np.flatnonzero(labels == label), ids.shape[1]) for label in wanted]
    return torch.stack([ids[torch.from_numpy(rows), torch.arange(ids.shape[1])] for rows in drawn])


# --------------------------------------------------------------------------------------------------------------------
# Jobs: training is the recipe in a process of its own, and so is measuring


def comparison_jobs(options: argparse.Namespace) -> list[Callable[[], None]]:
    folder, steps = options.output_dir, {} if options.steps is None else {"max_steps": options.steps}

    def job(name: str) -> None:
        if name in NAMES:
            k, seed = NAMES[name]
            train(folder, name, {"mixing_ratio": k, **steps, "seed": seed})
        run_job(
            [
                sys.executable,
                str(ROOT / "benchmarks" / "images_small.py"),
                "--output_dir",
                str(folder),
                "--measure",
                name,
            ],
            folder / "logs" / name,
        )

    return [partial(job, name) for name in ("baselines", *NAMES)]


def train(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Train a model, unless that is done; go on where an earlier run ended."""
    output, start = folder / "models" / name, folder / "start" / name
    if (output / "pipeline" / "model_index.json").exists():
        return
    if not (start / "model.safetensors").exists():
        initial_model(read_settings(folder / "train"), settings["seed"]).save_pretrained(start)
    config = {"base": str(CONFIG), "config_name": None, "model_name_or_path": str(start), "output_dir": str(output)}
    config |= {"data": str(folder / "train"), "validation_data": str(folder / "held_out"), "disable_tqdm": True}
    file = start / "run.yaml"
    file.write_text(yaml.safe_dump({**config, **settings}))
    command = [sys.executable, str(ROOT / "recipes" / "image_train.py"), "--config", str(file)]
    run_job([*command, "--resume_from_checkpoint", "auto"], folder / "logs" / name)


def initial_model(settings: TokenSettings, seed: int) -> DiTForDiffusionLM:
    """The random weights of a seed, the same for every k."""
    torch.manual_seed(seed)
    sizes = json.loads(SIZES.read_text()) | {"model_length": settings.length, "num_classes": len(settings.classes)}
    sizes.pop("model_type")
    return DiTForDiffusionLM(DiTConfig(**sizes))


# --------------------------------------------------------------------------------------------------------------------
# Measuring


class Judges:
    """The metrics of samples against the held-out images, fitted to training images and held-out images alone."""

    def __init__(self, folder: Path):
        self.train, self.train_labels = images_of(folder, "train")
        self.held_out, self.labels = images_of(folder, "held_out")
        self.reader = SVC().fit(self._scaled(self.train), self.train_labels)
        self.components = _Components(PCA(min(COMPONENTS, len(self.held_out) - 1)).fit(self._scaled(self.train)))
        as_images = [self.held_out[..., None, None]]
        self.reference = make_reference("held-out images", as_images, self.components, torch.device("cpu"), {})

    @staticmethod
    def _scaled(ids: Tensor) -> np.ndarray:
        return ids.numpy() / (GREYS - 1)

    def figures(self, ids: Tensor, labels: np.ndarray) -> dict[str, float]:
        """`forest`, `frechet`, `right_class` of ids (n, L) of these classes, and standard errors over images."""
        pixels = np.concatenate((self._scaled(self.held_out), self._scaled(ids)))
        made = np.repeat((0, 1), (len(self.held_out), len(ids)))
        folds = StratifiedKFold(min(5, len(ids)), shuffle=True, random_state=0)
        forest = RandomForestClassifier(200, random_state=0)
        told = cross_val_score(forest, pixels, made, cv=folds, scoring="balanced_accuracy").mean()
        batches = iter([ids[..., None, None]])
        frechet = score(batches, self.reference, self.components, torch.device("cpu"), PartialState(cpu=True))["fid"]
        right = float((self.reader.predict(self._scaled(ids)) == labels).mean())
        return {
            "forest": float(told),
            "forest_standard_error": (told * (1 - told) / len(made)) ** 0.5,
            "frechet": frechet,
            "right_class": right,
            "right_class_standard_error": (right * (1 - right) / len(ids)) ** 0.5,
        }


class _Components(nn.Module):
    """Ids (n, L, 1, 1) to principal components, as the extractor of the Frechet distance."""

    def __init__(self, pca: PCA):
        super().__init__()
        self.pca = pca

    def forward(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.pca.transform(ids[..., 0, 0].numpy() / (GREYS - 1)))


def measure(folder: Path, name: str) -> None:
    """Measure what is missing in measured/NAME.json; it is written after every cell."""
    file = folder / "measured" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    found = json.loads(file.read_text()) if file.exists() else {"cells": {}}
    judges = Judges(folder)

    def keep() -> None:
        file.write_text(json.dumps(found) + "\n")

    if name not in NAMES:
        found["cells"] = baselines(judges)
        return keep()
    model = load_weights(str(folder / "models" / name)).eval()
    if "nats" not in found:
        settings = SimpleNamespace(mixing_ratio=None, nelbo_samples=TIMES, batch_size=64, seed=GENERATION_SEED)
        rows = [
            {"input_ids": row, "class_label": int(label)}
            for row, label in zip(judges.held_out, judges.labels, strict=True)
        ]
        nats, tokens = Scorer(model, None, settings).bound_by_row(rows)
        found |= {"parameters": model.num_parameters(), "nats": (nats / tokens).tolist()}
        found["training"] = training_curve(folder / "models" / name)
        keep()
    for steps in STEPS:
        if str(steps) not in found["cells"]:
            ids, labels = samples(model, steps, judges.labels), judges.labels
            found["cells"][str(steps)] = judges.figures(ids, labels)
            np.save(folder / "measured" / f"{name}-{steps}.npy", ids.numpy().astype(np.uint8))
            keep()
    return None


def baselines(judges: Judges) -> dict[str, dict[str, float]]:
    """Figures of real images and of independent pixels, of the classes of the held-out images."""
    # Without repetition, by which a classifier would know them.
    order = np.random.default_rng(1).permutation(len(judges.train_labels))
    waiting = {label: [i for i in order if judges.train_labels[i] == label] for label in np.unique(judges.labels)}
    real = [waiting[label].pop() for label in judges.labels]
    drawn = independent_pixels(judges.train, judges.train_labels, judges.labels)
    return {
        TRAINING: judges.figures(judges.train[real], judges.labels),
        INDEPENDENT: judges.figures(drawn, judges.labels),
    }


def samples(model: Any, steps: int, labels: np.ndarray) -> Tensor:
    """Ids (n, L) of images of these classes."""
    generator = torch.Generator().manual_seed(GENERATION_SEED)
    return torch.cat(
        [model.generate(class_labels=part, steps=steps, generator=generator) for part in torch.tensor(labels).split(64)]
    )


# --------------------------------------------------------------------------------------------------------------------
# The report


def write_report(folder: Path) -> None:
    """Write report.md and the pictures from all that was measured."""
    found = {
        name: json.loads((folder / "measured" / f"{name}.json").read_text())
        for name in ("baselines", *NAMES)
        if (folder / "measured" / f"{name}.json").exists()
    }
    if "baselines" not in found:
        raise SystemExit(f"images_small: nothing was measured in {folder}; leave --report out.")
    baseline, held_out = found.pop("baselines")["cells"], read_settings(folder / "held_out")
    tables = [
        f"{held_out.dataset}: {read_settings(folder / 'train').images} images to train on, {held_out.images} held out.",
        baseline_table(baseline),
    ]
    if found:
        tables += [likelihood_table(found), *(steps_table(found, name) for name in FIGURES)]
        draw_curves(found, baseline, folder / "steps.png")
        draw_training(found, folder / "training.png")
        draw_grid(folder, found, folder / "grid.png")
    (folder / "report.md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))


def by_ratio(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What was measured of each k, by seed."""
    measured = {f"k = {k:g}": [found.get(model_name(k, seed)) for seed in SEEDS] for k in RATIOS}
    return {name: [each for each in models if each] for name, models in measured.items() if any(models)}


def baseline_table(cells: dict[str, dict[str, float]]) -> str:
    lines = ["| images against the held-out ones | " + " | ".join(FIGURES.values()) + " |", "| --- |" + " ---: |" * 3]
    for name in (TRAINING, INDEPENDENT):
        lines.append(f"| {name} | " + " | ".join(value(cells[name], figure) for figure in FIGURES) + " |")
    return "\n".join(lines)


def value(cell: dict[str, float], figure: str) -> str:
    error = cell.get(f"{figure}_standard_error")
    return f"{cell[figure]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def likelihood_table(found: dict[str, Any]) -> str:
    """Bounds of the seeds with standard errors over images, and paired differences to k = 0."""
    lines = [
        f"Bound, nats per pixel, {TIMES} times an image; differences to k = 0 of the same seed are of the same images.",
        "",
        "| noise | " + " | ".join(f"seed {seed} | difference" for seed in SEEDS) + " |",
        "| --- |" + " ---: |" * (2 * len(SEEDS)),
    ]
    for k in RATIOS:
        line = [f"k = {k:g}"]
        for seed in SEEDS:
            own, base = (found.get(model_name(ratio, seed)) for ratio in (k, RATIOS[0]))
            nats = None if own is None else np.array(own["nats"])
            line.append("" if nats is None else mean_and_error(nats))
            paired = nats is not None and base is not None and own is not base
            line.append(mean_and_error(nats - np.array(base["nats"])) if paired else "")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def mean_and_error(values: np.ndarray) -> str:
    return f"{values.mean():.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def steps_table(found: dict[str, Any], figure: str) -> str:
    """A figure by k and steps, of each seed."""
    lines = [
        f"{FIGURES[figure]}, ancestral samples; the seeds one after the other.",
        "",
        "| noise | " + " | ".join(f"{n} steps" for n in STEPS) + " |",
        "| --- |" + " ---: |" * len(STEPS),
    ]
    for name, models in by_ratio(found).items():
        cells = [[m["cells"][str(n)][figure] for m in models if str(n) in m["cells"]] for n in STEPS]
        lines.append(f"| {name} | " + " | ".join(" / ".join(f"{v:.3f}" for v in cell) for cell in cells) + " |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_curves(found: dict[str, Any], baseline: dict[str, dict[str, float]], file: Path) -> None:
    figure, axes = pyplot.subplots(1, len(FIGURES), figsize=(14, 4))
    for place, (name, title) in zip(axes, FIGURES.items(), strict=True):
        for number, k in enumerate(RATIOS):
            for seed in SEEDS:
                cells = found.get(model_name(k, seed), {"cells": {}})["cells"]
                points = {n: cells[str(n)] for n in STEPS if str(n) in cells}
                errors = [cell.get(f"{name}_standard_error", 0.0) for cell in points.values()]
                style = {"color": f"C{number}", "linestyle": LINES[seed], "marker": "o", "markersize": 3, "capsize": 2}
                label = f"k = {k:g}" if seed == SEEDS[0] else None
                place.errorbar(list(points), [cell[name] for cell in points.values()], errors, label=label, **style)
        for of, style in ((TRAINING, ":"), (INDEPENDENT, "-.")):
            place.axhline(baseline[of][name], color="grey", linestyle=style, label=of)
        place.set_xscale("log", base=2)
        place.set_xticks(STEPS, map(str, STEPS))
        finish_plot(figure, place, "sampling steps", title, file)


def draw_training(found: dict[str, Any], file: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for number, k in enumerate(RATIOS):
        for seed in SEEDS:
            curve = found.get(model_name(k, seed), {}).get("training", {"steps": [], "nelbo": []})
            label = f"k = {k:g}" if seed == SEEDS[0] else None
            axes.plot(curve["steps"], curve["nelbo"], f"C{number}", linestyle=LINES[seed], label=label)
    finish_plot(figure, axes, "optimizer step", "bound on held-out images, nats per pixel", file)


def draw_grid(folder: Path, found: dict[str, Any], file: Path) -> None:
    """Held-out images, independent pixels, and the samples of seed 1: a row for each k, a block for each step count."""
    settings, (held_out, labels) = read_settings(folder / "held_out"), images_of(folder, "held_out")
    first = [np.flatnonzero(labels == label)[0] for label in np.unique(labels)]
    drawn = independent_pixels(*images_of(folder, "train"), labels[first])
    rows = {"held out": {0: held_out[first].numpy(), 1: drawn.numpy()}}
    for k in RATIOS:
        files = {n: folder / "measured" / f"{model_name(k, SEEDS[0])}-{n}.npy" for n in STEPS}
        rows[f"k = {k:g}"] = {i: np.load(path)[first] for i, path in enumerate(files.values()) if path.exists()}
    figure, axes = pyplot.subplots(len(rows), len(STEPS), figsize=(3 * len(STEPS), 1.4 * len(rows)), squeeze=False)
    half = -(-len(first) // 2)
    for line, (name, blocks) in zip(axes, rows.items(), strict=True):
        for i, place in enumerate(line):
            place.axis("off")
            if i not in blocks:
                continue
            images = blocks[i].reshape(-1, settings.height, settings.width)
            blank = np.zeros((2 * half - len(images), *images.shape[1:]), images.dtype)
            padded = np.pad(np.concatenate((images, blank)), ((0, 0), (1, 1), (1, 1)))  # a margin around each
            tiles = padded.reshape(2, half, *padded.shape[1:])
            picture = np.concatenate([np.concatenate(list(row), axis=1) for row in tiles])
            place.imshow(picture, cmap="gray_r", vmin=0, vmax=GREYS - 1, interpolation="nearest")
            of = ("held out", INDEPENDENT)[i] if name == "held out" else f"{name}, {STEPS[i]} steps"
            place.set_title(of, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
