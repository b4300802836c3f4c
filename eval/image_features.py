"""Features of images for FID and Inception Score, and statistics of the features of a reference set.

An extractor is a module from uint8 images (B, C, H, W) to features (B, D), or to features and logits (B, classes); FID
uses the features, the Inception Score the logits. Its numbers compare only with those of the same extractor.

Shapes: B images, C channels, D features.
"""

import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xdlm_hf.convert import read_weights

INCEPTION, SEEDED = "inception", "seeded"
INCEPTION_SIDE = "bilinear to 299 x 299 like TensorFlow 1 (antialias=False), as the published values"


class SeededFeatures(nn.Module):
    """A small convolutional network of fixed random weights, for tests and checks without Inception's weights."""

    num_features = 24

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = ((12, 3, 3, 3), (self.num_features, 12, 3, 3), (10, self.num_features))
        for name, size in zip(("first", "second", "last"), sizes, strict=True):
            weight = torch.randn(size, generator=generator) * np.prod(size[1:]) ** -0.5
            self.register_buffer(name, weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = as_rgb(images).float() / 127.5 - 1
        x = torch.nn.functional.conv2d(x, self.first, stride=2, padding=1).relu()
        features = torch.nn.functional.conv2d(x, self.second, padding=1).relu().mean((2, 3))
        return features, features @ self.last.T


class InceptionFeatures(nn.Module):
    """Inception-v3 of the published values: pool features and logits without bias, by torchmetrics and torch-fidelity.

    Args:
        weights: File of torch-fidelity's `inception-v3-compat`; by default it downloads it.

    Raises:
        ImportError: Without torchmetrics or torch-fidelity.
        ValueError: If the file is not one of tensors alone.
    """

    num_features = 2048

    def __init__(self, weights: str | None = None):
        super().__init__()
        if weights is not None:
            read_weights(weights)  # torch-fidelity would run code that the file holds
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            # By default torchmetrics smooths images before it shrinks them, which gives other features.
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights, antialias=False)
        except (ImportError, RuntimeError) as error:  # a torchvision of another build raises RuntimeError
            raise ImportError(
                f"the Inception network needs torchmetrics, torch-fidelity and the torchvision of this torch "
                f"({torch.__version__}): pip install 'xdlm_hf[images]' torch-fidelity torchvision, or choose another "
                f"--extractor. The cause: {error}"
            ) from error

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network(as_rgb(images))
        return features, features @ self.network.fc.weight.T


def as_rgb(images: Tensor) -> Tensor:
    """Grey images (B, 1, H, W) as three equal channels; others unchanged."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def load_extractor(name: str, weights: str | None = None) -> nn.Module:
    """An extractor in evaluation mode.

    Args:
        name: "inception", "seeded", or `module:attribute`, a module or a function without arguments that returns one.
        weights: File of Inception's weights.

    Raises:
        ValueError: If there is none of this name.
        ImportError: If a package is missing.
    """
    if weights is not None and name != INCEPTION:
        raise ValueError(f"--inception_weights {weights} is for the extractor {INCEPTION!r}, not {name!r}.")
    if name in (INCEPTION, SEEDED):
        return (InceptionFeatures(weights) if name == INCEPTION else SeededFeatures()).eval()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"--extractor {name!r} is not known; choose {INCEPTION}, {SEEDED} or MODULE:ATTRIBUTE.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--extractor {name!r} cannot be imported: {error}.") from error
    extractor = found if isinstance(found, nn.Module) else found()
    if not isinstance(extractor, nn.Module):
        raise ValueError(f"--extractor {name!r} is a {type(extractor).__name__}, not a torch.nn.Module.")
    return extractor.eval()


@torch.no_grad()
def extract(extractor: nn.Module, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Features (B, D) float64 and logits (B, classes), if the extractor gives them, of uint8 images."""
    outputs = extractor(images.to(device))
    features, logits = outputs if isinstance(outputs, tuple) else (outputs, None)
    return features.double(), logits


# --------------------------------------------------------------------------------------------------------------------
# Statistics of a reference set


@dataclass(frozen=True)
class Reference:
    """Statistics of the features of a named set of images.

    Args:
        name: Of the set, such as "imagenet-val-256"; reported with every FID.
        count: Images.
        total: Sum of the features, (D,) float64.
        outer: Sum of their outer products, (D, D) float64.
        about: extractor, source, transform, image shape (C, H, W), and versions of libraries.
    """

    name: str
    count: int
    total: np.ndarray
    outer: np.ndarray
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        np.savez(path, name=self.name, count=self.count, sum=self.total, outer=self.outer, about=json.dumps(self.about))


def read_reference(path: str | Path) -> Reference:
    """The reference of an .npz file.

    Raises:
        ValueError: If there is no such file, it is another kind of file, or it has no name.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--reference {path} is not a file; make one with --make_reference.")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        missing = {"name", "count", "sum", "outer", "about"} - found.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        about = json.loads(str(found["about"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"--reference {path} cannot be read as reference statistics: {error}.") from error
    if not str(found["name"]).strip():
        raise ValueError(f"--reference {path} has no name; make it again with --make_reference NAME.")
    return Reference(str(found["name"]), int(found["count"]), found["sum"], found["outer"], about)


def make_reference(
    name: str, batches: Iterable[Tensor], extractor: nn.Module, device: torch.device, about: dict[str, Any]
) -> Reference:
    """Statistics of images, given in batches of uint8 (B, C, H, W).

    Raises:
        ValueError: If the name is empty, or images differ in size.
    """
    if not name.strip():
        raise ValueError("a reference needs a name, which is reported with every FID; pass one to --make_reference.")
    count, total, outer, shape = 0, 0.0, 0.0, None
    for images in batches:
        shape = shape or tuple(images.shape[1:])
        if tuple(images.shape[1:]) != shape:
            raise ValueError(
                f"an image of shape {tuple(images.shape[1:])} differs from the first, {shape}; resize all."
            )
        features, _ = extract(extractor, images, device)
        count, total, outer = count + len(features), total + features.sum(0), outer + features.T @ features
    if not count:
        raise ValueError("the reference set has no images.")
    versions = {package: version(package) for package in ("torch", "torchmetrics", "numpy")}
    return Reference(
        name, count, total.cpu().numpy(), outer.cpu().numpy(), {**about, "shape": list(shape), "versions": versions}
    )
