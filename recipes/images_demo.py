"""Draw digits from their class on two CPU cores. `make demo-images` runs it, in about five minutes, without a download.

The images are scikit-learn's `load_digits`: 1,797 of 8 x 8 pixels. In order:

1. a tokenizer: 64 patches of 2 x 2 pixels by k-means, so that an image is 16 codes; codes by recipes/image_tokens.py;
2. three models, alike but for the noise: k = 0 (MDLM), 0.1 (XDLM) and 1 (UDLM), by recipes/image_train.py with
   recipes/configs/demo_digits.yaml, at the same time; what the runs print goes to k0.log, k0.1.log and k1.log;
3. images of each class in 1, 2, 4, 8 and 16 steps by `XDLMImagePipeline`;
4. scores: the bound on held-out images, images read as the class that was asked for, and a classifier that tells
   held-out images from drawn ones (0.5: it cannot), beside training images and codes drawn independently;
5. pictures: steps.png (rows k, columns steps), path.png and path.html (an image over its steps), holes.png (parts drawn
   anew), and report.json.

    python recipes/images_demo.py [--output_dir outputs/demo-images] [--steps_scale 1.0]
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import datasets
import image_tokens
import numpy as np
import torch
from demo_runs import Training, fresh_folder, run_all, scaled_steps
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.rule import Rule
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.svm import SVC
from torch import Tensor

from xdlm_hf import XDLMImagePipeline
from xdlm_hf.data.image_tokens import read_tokens
from xdlm_hf.data.images import load_vq
from xdlm_hf.data.patch_vq import PatchVQ
from xdlm_hf.watch.pictures import save_image_grid
from xdlm_hf.watch.trace import save_trace

CONFIG = Path(__file__).parent / "configs" / "demo_digits.yaml"
MODEL = Path(__file__).parent / "configs" / "models" / "dit_digits.json"
K = (0.0, 0.1, 1.0)
STEPS = (1, 2, 4, 8, 16)
GUIDANCE = 2.0  # 1 + gamma
GUIDED_STEPS = (4, 16)
TRAINING_IMAGES = 1400
KINDS = (("plain", 1.0, STEPS), ("guided", GUIDANCE, GUIDED_STEPS))
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-images"))
    parser.add_argument("--steps_scale", type=float, default=1.0, help="scales the training steps, at least 2 a run")
    options = parser.parse_args()
    disable_progress_bar()
    start = time.perf_counter()
    folder = fresh_folder(options.output_dir)
    console.print(Rule("1. digits as codes"))
    tokenize(folder)
    console.print(Rule("2. training"))
    train(folder, options.steps_scale)
    console.print(Rule("3. and 4. images and scores"))
    report = {"models": {f"{k:g}": score(folder, k) for k in K}, **bounds(folder)}
    console.print(Rule("5. pictures"))
    draw_pictures(folder)
    report |= {"seconds": time.perf_counter() - start, "cpu_seconds": sum(os.times()[:4])}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    console.print(f"Written to {folder}: report.json, steps.png, path.png, path.html, holes.png, and the models.")


# --------------------------------------------------------------------------------------------------------------------
# Data and models


def tokenize(folder: Path) -> None:
    """Write the images, a tokenizer fitted to those for training, and the codes of both parts."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    for part, rows in (("train", order[:TRAINING_IMAGES]), ("test", order[TRAINING_IMAGES:])):
        columns = {"image": [Image.fromarray(image) for image in pixels[rows]], "label": digits.target[rows]}
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder / "images" / part))
    vqvae = PatchVQ(num_codes=64, patch_size=2)
    images = torch.from_numpy(pixels[order[:TRAINING_IMAGES]])[:, None]
    patches = vqvae.encode(images.float() / 127.5 - 1).latents.permute(0, 2, 3, 1).flatten(0, 2)
    centres = KMeans(64, n_init=1, random_state=0).fit(patches.numpy()).cluster_centers_
    vqvae.quantize.embedding.weight.data = torch.from_numpy(centres).float()
    vqvae.save_pretrained(folder / "vqvae")
    for part in ("train", "test"):
        source, output = str(folder / "images" / part), str(folder / "codes" / part)
        common = ["--vqvae", str(folder / "vqvae"), "--no-flips"]  # a mirrored digit is not a digit
        image_tokens.main(["--dataset", source, "--output_dir", output, *common])


def train(folder: Path, steps_scale: float) -> None:
    """Train the models at the same time."""
    steps = scaled_steps(CONFIG, steps_scale, least=2)
    runs = [Training(f"k = {k:g}", training_command(folder, k, steps), folder / f"k{k:g}.log", steps) for k in K]
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        bars = {run.label: progress.add_task(run.label, total=steps) for run in runs}
        for run in runs:
            shown = "$ " + " ".join(["python", *run.command[1:]])
            progress.console.print(shown, style="dim", highlight=False, soft_wrap=True)
        run_all(
            [[run] for run in runs],
            at_a_time=len(runs),
            watch=lambda run: progress.update(bars[run.label], completed=steps_done(run.log, steps)),
        )


def training_command(folder: Path, k: float, steps: int) -> list[str]:
    """One run of the recipe, which trains the paper's ImageNet models too."""
    command = [sys.executable, str(Path(__file__).with_name("image_train.py"))]
    command += ["--config", str(CONFIG), "--config_name", str(MODEL), "--mixing_ratio", str(k)]
    command += ["--data", str(folder / "codes" / "train"), "--validation_data", str(folder / "codes" / "test")]
    command += ["--output_dir", str(folder / f"k{k:g}"), "--max_steps", str(steps)]
    command += ["--warmup_steps", str(min(50, steps // 2)), "--logging_steps", str(max(1, steps // 12))]
    return command


def steps_done(log: Path, steps: int) -> int:
    """Steps of a run, by the progress bar in its output."""
    return max(map(int, re.findall(rf"\b(\d+)/{steps} \[", log.read_text())), default=0)


def pipeline(folder: Path, k: float) -> XDLMImagePipeline:
    pipe = XDLMImagePipeline.from_pretrained(folder / f"k{k:g}" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --------------------------------------------------------------------------------------------------------------------
# Scores


def score(folder: Path, k: float) -> dict:
    """The bound, and for each number of steps the images that are read right and told from held-out ones."""
    evaluation = json.loads((folder / f"k{k:g}" / "eval_results.json").read_text())
    figures = {"nelbo": evaluation["eval_loss"], "nelbo_standard_error": evaluation["eval_loss_standard_error"]}
    pipe, (real, labels), judge = pipeline(folder, k), held_out(folder), fit_judge(folder)
    for kind, scale, grid in KINDS:
        rows = {}
        for steps in grid:
            generator = torch.Generator().manual_seed(0)
            images = pipe(labels, steps, scale, generator=generator, output_type="uint8").images
            rows[steps] = {"right_class": right_class(judge, images, labels), "told_apart": told_apart(real, images)}
        figures[kind] = rows
    return figures


def bounds(folder: Path) -> dict:
    """The same figures for training images, and for codes drawn independently by class and place."""
    (real, labels), judge = held_out(folder), fit_judge(folder)
    rows = read_tokens(folder / "codes" / "train")[:]
    codes, classes = rows["input_ids"].astype(np.int64), rows["class_label"]
    generator = np.random.default_rng(0)
    pools = [list(generator.permutation(np.flatnonzero(classes == label))) for label in range(10)]
    alike = [pools[label].pop() for label in labels.tolist()]  # none twice, which a forest would notice
    places = [
        [generator.choice(codes[classes == label, place]) for place in range(codes.shape[1])]
        for label in labels.tolist()
    ]
    tokenizer = load_vq(str(folder / "vqvae"))
    found = {}
    for name, ids in (("training images", codes[alike]), ("independent codes", np.array(places))):
        images = tokenizer.decode(torch.from_numpy(ids))
        found[name] = {"right_class": right_class(judge, images, labels), "told_apart": told_apart(real, images)}
    return {"bounds": found, "held_out_images": len(labels), "reads_held_out": right_class(judge, real, labels)}


def held_out(folder: Path) -> tuple[Tensor, Tensor]:
    """Held-out images as the tokenizer decodes them, which a model could draw exactly, and their labels."""
    rows = read_tokens(folder / "codes" / "test")[:]
    codes = torch.from_numpy(rows["input_ids"].astype(np.int64))
    return load_vq(str(folder / "vqvae")).decode(codes), torch.from_numpy(rows["class_label"])


def fit_judge(folder: Path) -> SVC:
    """A classifier of the training images."""
    rows = datasets.load_from_disk(str(folder / "images" / "train"))
    pixels = np.stack([np.asarray(image) for image in rows["image"]]).reshape(len(rows), -1)
    return SVC(gamma=0.001, C=10).fit(pixels / 16, rows["label"])


def right_class(judge: SVC, images: Tensor, labels: Tensor) -> float:
    return float((judge.predict(images.flatten(1).numpy() / 16) == labels.numpy()).mean())


def told_apart(real: Tensor, drawn: Tensor) -> float:
    """Share of images that a random forest, cross-validated, assigns rightly to real or drawn; 0.5 is chance."""
    pixels = torch.cat([real, drawn]).flatten(1).numpy()
    truth = np.repeat([0, 1], [len(real), len(drawn)])
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    forest = RandomForestClassifier(100, random_state=0)
    return float((cross_val_predict(forest, pixels, truth, cv=folds) == truth).mean())


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_pictures(folder: Path) -> None:
    """steps.png, path.png, path.html and holes.png."""
    pipes, rows = {k: pipeline(folder, k) for k in K}, []
    for k in K:
        rows.append([])
        for steps in STEPS:
            digits = pipes[k](list(range(10)), steps, GUIDANCE, generator=torch.Generator().manual_seed(1)).images
            framed = [np.pad(digit, 1, constant_values=110) for digit in digits]
            rows[-1].append(np.vstack([np.hstack(framed[:5]), np.hstack(framed[5:])]))
    titles = [f"k = {k:g}" for k in K], [counted(steps) for steps in STEPS]
    save_image_grid(folder / "steps.png", rows, *titles, title=f"guidance_scale = {GUIDANCE:g}", cell=1.8)
    draw_path(pipes[0.1], folder)
    draw_holes(pipes[0.1], folder)


def draw_path(pipe: XDLMImagePipeline, folder: Path, label: int = 3, steps: int = 8) -> None:
    """One image after each of its steps, and the page with a slider."""
    seen, ids = [], []

    def keep(_, step, t, values):
        seen.append(values["images"][0])
        ids.append(values["ids"])

    common = {"generator": torch.Generator().manual_seed(2), "guidance_scale": GUIDANCE}
    pipe(label, steps, callback_on_step_end=keep, **common)
    titles = [f"t = {1 - (i + 1) / steps:g}" for i in range(steps)]
    save_image_grid(folder / "path.png", [seen], None, titles, title="grey: not drawn yet")
    mask = pipe.transformer.config.mask_token_id
    begun = torch.full_like(ids[0], mask)
    note = f"class {label}, k = {pipe.transformer.config.mixing_ratio:g}, {steps} steps, guidance_scale = {GUIDANCE:g}"
    images = {"images": pipe.preview, "grid": (4, 4)}
    save_trace(folder / "path.html", [begun, *ids], None, mask, title="A digit, step by step", note=note, **images)


def draw_holes(pipe: XDLMImagePipeline, folder: Path) -> None:
    """The lower half of held-out digits, drawn anew for their own class."""
    images, labels = held_out(folder)
    chosen = torch.stack([(labels == label).nonzero()[0, 0] for label in range(10)])
    images, holes = images[chosen], torch.zeros(8, 8, dtype=torch.bool)
    holes[4:] = True
    rows = [images[:, 0].numpy(), torch.where(holes, 128, images[:, 0]).numpy()]
    for seed in range(3):
        given = {"image": images, "holes": holes, "generator": torch.Generator().manual_seed(seed)}
        rows.append([np.asarray(image) for image in pipe(list(range(10)), 8, **given).images])
    save_image_grid(folder / "holes.png", rows, ["held out", "given", "drawn", "drawn", "drawn"])


def counted(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def show(report: dict) -> None:
    table = Table("k", "NELBO, nats/token", "guidance", "figure", *map(counted, STEPS))
    for k, figures in report["models"].items():
        bound = f"{figures['nelbo']:.3f} ± {figures['nelbo_standard_error']:.3f}"
        for kind, scale, _ in KINDS:
            for name, title in (("right_class", "right class"), ("told_apart", "told from held-out")):
                values = [f"{figures[kind][s][name]:.3f}" if s in figures[kind] else "" for s in STEPS]
                table.add_row(k, bound, f"{scale:g}", title, *values)
                k = bound = ""
    console.print(table)
    for name, figures in report["bounds"].items():
        console.print(f"{name}: right class {figures['right_class']:.3f}, told apart {figures['told_apart']:.3f}")
    error = 0.5 / (2 * report["held_out_images"]) ** 0.5
    console.print(
        f"{report['held_out_images']} images each; the judge reads {report['reads_held_out']:.3f} of the held-out ones "
        f"right; a share near 0.5 has a standard error of {error:.3f}. Chance tells 0.5 apart."
    )
    console.print(f"{report['seconds']:.0f} seconds, {report['cpu_seconds']:.0f} of CPU time")


if __name__ == "__main__":
    main()
