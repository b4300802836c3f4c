"""`xdlm-fid`: FID and Inception Score of a model's images for several numbers of sampling steps.

    xdlm-fid --make_reference imagenet-val-256 --dataset path/to/imagenet --split validation --image_size 256
    xdlm-fid --model outputs/imagenet-xdlm --steps 4 8 16 32 --reference imagenet-val-256 --published imagenet
    accelerate launch --num_processes 8 -m xdlm_hf.evaluation.fid --model ...           on several GPUs

The first command writes statistics of the features of a data set, NAME.npz in the folder `--references`. The second
draws `--num_images` images, as many of each class, and compares their features with that named reference. Published
values are of 50,000 images; FID of fewer is biased upwards. `--guidance_scale` is 1 + gamma, 1 is no guidance.

Every batch has random numbers of its own, so that images depend on `--seed` and `--batch_size`, but not on the number
of processes. The report states counts, reference, extractor, k, steps, guidance and commit.
"""

import argparse
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce
from torch import Tensor, nn
from tqdm.auto import tqdm

from xdlm_hf.evaluation.image_features import (
    INCEPTION,
    INCEPTION_SIDE,
    SEEDED,
    Reference,
    extract,
    load_extractor,
    make_reference,
    read_reference,
)
from xdlm_hf.evaluation.published_images import REFERENCES, published_images
from xdlm_hf.evaluation.text_models import (
    add_weights_options,
    check_positive,
    check_trained_weights,
    device_of,
    identity,
    load_model,
)
from xdlm_hf.generation.protocol import length_limit
from xdlm_hf.loading import read_config
from xdlm_hf.training.row_noise import generator_of

SPLITS = 10  # of the Inception Score
INDEX = "model_index.json"  # of a saved pipeline


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print a table, and write the report as JSON."""
    options = _parser().parse_args(argv)
    try:
        if options.make_reference is not None:
            print(f"written to {write_reference(options)}")
            return
        report = measure(options)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"xdlm-fid: {error}") from error
    if PartialState().is_main_process:
        print(markdown(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xdlm-fid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_weights_options(parser, required=False)
    add = parser.add_argument
    add("--vqvae", help="VQ tokenizer of a model of codes, if --model is no pipeline: folder or Hub name")
    add("--steps", type=int, nargs="+", default=[4, 8, 16, 32], help="numbers of sampling steps, one cell each")
    add("--guidance_scale", type=float, nargs="+", default=[1.0], help="1 + gamma; 1 is no guidance")
    add("--num_images", type=int, default=50_000, help="images for each cell")
    add("--batch_size", type=int, default=50, help="images drawn together in a process")
    add("--seed", type=int, default=0)
    add("--generate", type=json.loads, default={}, help="further options of generate() as JSON")
    add("--reference", help="name of reference statistics in --references, or an .npz file")
    add("--references", type=Path, default=Path("references"), help="folder of reference statistics")
    add("--extractor", default=INCEPTION, help=f"{INCEPTION}, {SEEDED} (a test network), or MODULE:ATTRIBUTE")
    add("--inception_weights", help="local file of Inception's weights")
    add("--allow_few", action="store_true", help="accept as few images as features, for checks")
    add("--published", choices=REFERENCES, help="data set whose published values are printed beside")
    add("--output", type=Path, help="JSON file for the report")
    add("--make_reference", metavar="NAME", help="write reference statistics of a data set under this name")
    add("--dataset", help="for --make_reference: folder with a folder of images per class, or Hub name")
    add("--split", default="train", help="of the data set")
    add("--image_size", type=int, help="resize the shorter side, crop the centre; default: as they are")
    add("--image_channels", type=int, choices=(1, 3), default=3, help="mode of resized images: grey or RGB")
    return parser


# --------------------------------------------------------------------------------------------------------------------
# The reference


def write_reference(options: argparse.Namespace) -> Path:
    """Make statistics of a data set; returns the file.

    Raises:
        ValueError: If options are missing, the file exists, or images cannot be read or differ in mode or size.
    """
    from xdlm_hf.data.image_tokens import ImageSource
    from xdlm_hf.data.images import as_uint8, resize_and_crop

    check_positive(options, "batch_size", "image_size")
    if options.dataset is None:
        raise ValueError("--make_reference needs --dataset, a folder or Hub name.")
    path = options.references / f"{options.make_reference}.npz"
    if path.exists():
        raise ValueError(f"{path} exists; remove it, or choose another name.")
    device = device_of(options.device)
    extractor = load_extractor(options.extractor, options.inception_weights).to(device)
    source = ImageSource(options.dataset, options.split)

    def batches() -> Iterator[Tensor]:
        for start in tqdm(range(0, len(source), options.batch_size), desc=options.make_reference, leave=False):
            images = [source.read(i)[0] for i in range(start, min(start + options.batch_size, len(source)))]
            if options.image_size is not None:
                images = [resize_and_crop(image, options.image_size, options.image_channels) for image in images]
            yield as_uint8(images)

    size = options.image_size
    about = {
        "extractor": options.extractor,
        "dataset": options.dataset,
        "split": options.split,
        "transform": "none" if size is None else f"shorter side to {size} (PIL bilinear), centre crop {size}, no flip",
        **({"inception_input": INCEPTION_SIDE} if options.extractor == INCEPTION else {}),
    }
    reference = make_reference(options.make_reference, batches(), extractor, device, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    reference.save(path)
    return path


def find_reference(options: argparse.Namespace) -> Reference:
    """The reference that the options name.

    Raises:
        ValueError: If none is named, there is none of this name, or it was made with another extractor.
    """
    if options.reference is None:
        raise ValueError(
            "--reference is missing: FID compares with named statistics of a data set; make them with --make_reference."
        )
    path = Path(options.reference)
    reference = read_reference(path if path.suffix == ".npz" else options.references / f"{options.reference}.npz")
    if reference.about.get("extractor") != options.extractor:
        raise ValueError(
            f"the reference {reference.name!r} was made with the extractor {reference.about.get('extractor')!r}, not "
            f"{options.extractor!r}; pass the same --extractor."
        )
    return reference


def check_counts(options: argparse.Namespace, reference: Reference) -> None:
    """Refuse sets of images whose features have a singular covariance.

    Raises:
        ValueError: With both counts, unless `--allow_few`.
    """
    features = len(reference.total)
    for what, count in (("--num_images", options.num_images), (f"the reference {reference.name!r}", reference.count)):
        if count < 2 or (count <= features and not options.allow_few):
            raise ValueError(
                f"{what}: {count} images are too few for the covariance of {features} features; use more than "
                f"{features}, or for a check of the program --allow_few."
            )


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The report of a run. Options and inputs are checked before an image is drawn.

    Raises:
        ValueError: If an option or a file does not fit; names it and the remedy.
        ImportError: If a package of the extra `images` is missing.
    """
    check_options(options)
    reference = find_reference(options)
    check_counts(options, reference)
    state = PartialState(cpu=options.device == "cpu")
    if options.num_images <= (state.num_processes - 1) * options.batch_size:
        raise ValueError(
            f"--num_images {options.num_images} in batches of {options.batch_size} are fewer batches than processes, "
            f"{state.num_processes}; lower --batch_size."
        )
    if options.device == "auto":
        options.device = str(state.device)
    device = device_of(options.device)
    extractor = load_extractor(options.extractor, options.inception_weights).to(device)
    pipeline, folder, average = load_pipeline(options)
    shape = list(pipeline.shape)
    if reference.about.get("shape") != shape:
        raise ValueError(
            f"the reference {reference.name!r} is of images (C, H, W) = {reference.about.get('shape')}, but the model "
            f"draws {shape}; make one of that size with --image_size and --image_channels."
        )
    report = _describe(options, pipeline.transformer, folder, average, reference)
    checkpoint = re.search(r"checkpoint-(\d+)$", folder.rstrip("/"))
    trained = None if checkpoint is None else int(checkpoint[1])
    for scale in options.guidance_scale:
        for steps in options.steps:
            images = draw(options, pipeline, steps, scale, state)
            order = [i for rank in range(state.num_processes) for rows in shares(options, state, rank) for i in rows]
            cell = {"steps": steps, "guidance_scale": scale, "gamma": scale - 1, "num_images": options.num_images}
            cell |= score(images, reference, extractor, device, state, order)
            cell["published"] = published_images(options.published, report["row"], steps, scale, trained)
            report["cells"].append(cell)
            if options.output is not None and state.is_main_process:
                options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def check_options(options: argparse.Namespace) -> None:
    """Check numbers, paths and guidance.

    Raises:
        ValueError: If one is invalid, naming the option.
    """
    if options.model is None:
        raise ValueError("--model is missing: a folder or Hub name of a model of images, or of a pipeline.")
    check_positive(options, "steps", "num_images", "batch_size")
    for scale in options.guidance_scale:
        if scale < 1:
            raise ValueError(f"--guidance_scale {scale} must be at least 1, which is no guidance (1 + gamma).")
    if not isinstance(options.generate, dict):
        raise ValueError(f"--generate {options.generate!r} must be a JSON object of options of generate().")
    if options.output is not None and not options.output.parent.is_dir():
        raise ValueError(
            f"{str(options.output)!r} cannot be written: there is no folder {str(options.output.parent)!r}."
        )


def load_pipeline(options: argparse.Namespace) -> tuple[Any, str, bool]:
    """The pipeline of a model, the folder of the model, and whether its weights are the average of a checkpoint.

    `--model` is a model, or a pipeline as recipes/image_train.py writes it. A model of codes needs one of both:
    `--vqvae`, or a pipeline, which is also found in the folder `pipeline` of a model.

    Raises:
        ValueError: If guidance is asked of a model without classes, or a part cannot be read.
    """
    from xdlm_hf.data.images import load_vq
    from xdlm_hf.image_pipeline import XDLMImagePipeline

    folders = (Path(options.model), Path(options.model) / "pipeline")
    saved = next((folder for folder in folders if (folder / INDEX).is_file()), None)
    name = str(saved / "transformer") if saved == folders[0] else options.model
    config = read_config(name)
    check_trained_weights(options, config)
    if max(options.guidance_scale) > 1 and getattr(config, "num_classes", None) is None:
        raise ValueError(
            f"--guidance_scale {max(options.guidance_scale)} guides by class, but {options.model!r} has no classes; "
            "leave it out."
        )
    chosen = argparse.Namespace(**{**vars(options), "model": name})
    model, average = load_model(chosen)
    parts = {} if options.vqvae is None else {"vqvae": load_vq(options.vqvae).vqvae}
    if saved is None:
        pipeline = XDLMImagePipeline(model, **parts)
    else:
        pipeline = XDLMImagePipeline.from_pretrained(str(saved), transformer=model, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(model.device), name, average


def draw(
    options: argparse.Namespace, pipeline: Any, steps: int, guidance_scale: float, state: PartialState
) -> Iterator[Tensor]:
    """This process' share of the images, in batches of uint8 (B, C, H, W); image i is of class i mod classes."""
    classes, settings = pipeline.transformer.num_classes, dict(options.generate)
    if options.mixing_ratio is not None:
        settings["mixing_ratio"] = options.mixing_ratio
    share = shares(options, state, state.process_index)
    for rows in tqdm(share, desc=f"{steps} steps", unit=" batches", leave=False, disable=not state.is_main_process):
        labels = {"class_labels": [i % classes for i in rows]} if classes else {"num_images_per_class": len(rows)}
        yield pipeline(
            **labels,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator_of(options.seed, 0, rows.start // options.batch_size),
            output_type="uint8",
            **settings,
        ).images


def shares(options: argparse.Namespace, state: PartialState, rank: int) -> list[range]:
    """Places of the images of a process among all, in batches."""
    count, batch = options.num_images, options.batch_size
    starts = range(rank * batch, count, state.num_processes * batch)
    return [range(start, min(start + batch, count)) for start in starts]


class _Passed(nn.Module):
    """Features that were computed before, as the extractor of a metric."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def score(
    batches: Iterator[Tensor],
    reference: Reference,
    extractor: nn.Module,
    device: torch.device,
    state: PartialState,
    order: Sequence[int] | None = None,
) -> dict[str, float | None]:
    """FID against the reference and, if the extractor gives logits, the Inception Score, of all processes' images.

    `order` has the places of the images of process 0, then 1, ..., so that the splits of the score do not depend on the
    number of processes.

    Raises:
        ValueError: If the extractor's features do not fit the reference.
        ImportError: Without torchmetrics.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore
    except (ImportError, RuntimeError) as error:  # a torchvision of another build raises RuntimeError
        raise ImportError(f"xdlm-fid needs torchmetrics: pip install 'xdlm_hf[images]'. The cause: {error}") from error
    width = len(reference.total)
    fid = FrechetInceptionDistance(_Passed(width), sync_on_compute=False).to(device)
    kept = []
    for images in batches:
        features, logits = extract(extractor, images, device)
        if features.shape[-1] != width:
            raise ValueError(f"the extractor gives {features.shape[-1]} features, the reference has {width}.")
        fid.update(features, real=False)
        kept += [] if logits is None else [logits]
    for name in ("features_sum", "features_cov_sum", "features_num_samples"):
        setattr(fid, f"fake_{name}", reduce(getattr(fid, f"fake_{name}"), "sum"))
    fid.real_features_sum = torch.from_numpy(reference.total).to(device)
    fid.real_features_cov_sum = torch.from_numpy(reference.outer).to(device)
    fid.real_features_num_samples = torch.tensor(reference.count, device=device)
    fid.orig_dtype = torch.float64
    found = {"fid": fid.compute().item(), "inception_score": None, "inception_score_deviation": None}
    if not kept:
        return found
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all extracted features")
        torch.manual_seed(0)  # of the shuffle before the images are split
        metric = InceptionScore(_Passed(0), splits=SPLITS, sync_on_compute=False).to(device)
        rows = gather_rows(torch.cat(kept), state)
        metric.update(rows if order is None else rows[torch.tensor(order, device=rows.device).argsort()])
        mean, deviation = metric.compute()
    return {**found, "inception_score": mean.item(), "inception_score_deviation": deviation.item()}


def gather_rows(rows: Tensor, state: PartialState) -> Tensor:
    """The rows (n, D) of all processes, whose numbers n may differ."""
    if state.num_processes == 1:
        return rows
    counts = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = torch.cat((rows, rows.new_zeros(max(counts) - len(rows), rows.shape[1])))
    parts = gather(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


# --------------------------------------------------------------------------------------------------------------------
# The report


def _describe(
    options: argparse.Namespace, model: Any, folder: str, average: bool, reference: Reference
) -> dict[str, Any]:
    told = SimpleNamespace(model=folder, mixing_ratio=options.mixing_ratio, length=length_limit(model.config))
    return {
        **identity(told, model, average),
        "seed": options.seed,
        "batch_size": options.batch_size,
        "generate": {"sampler": model.generation_config.sampler or "confidence", **options.generate},
        "extractor": options.extractor,
        "reference": {"name": reference.name, "num_images": reference.count, **reference.about},
        "inception_score_splits": SPLITS,
        "cells": [],
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    reference = report["reference"]
    lines = [
        f"{report['model']}: {report['row']}, seed {report['seed']}. Reference: {reference['name']}, "
        f"{reference['num_images']} images. Extractor: {report['extractor']}.",
        "",
        "| steps | guidance scale | images | FID | IS | published FID | IS |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    notes = {}
    for cell in report["cells"]:
        theirs, score = cell["published"], cell["inception_score"]
        figures = [f"{cell['fid']:.3f}", "-" if score is None else f"{score:.3f}"]
        published = ["-", "-"] if theirs is None else [f"{theirs['fid']:.3f}", f"{theirs['inception_score']:.3f}"]
        counts = [str(cell["steps"]), f"{cell['guidance_scale']:g}", str(cell["num_images"])]
        lines.append("| " + " | ".join([*counts, *figures, *published]) + " |")
        if theirs is not None:
            reading = f", {theirs['reading']}" if "reading" in theirs else ""
            notes[f"{theirs['source']}: {theirs['samples']} images against the {theirs['reference']}{reading}."] = None
    return "\n".join([*lines, *(["", "Published: " + " ".join(notes)] if notes else [])])


if __name__ == "__main__":
    main()
