"""Weights that a rule makes from the name of each parameter, as recorded fixtures use instead of files of weights."""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch


def weights_by_rule(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, torch.Tensor]:
    """Float32 weights of these names and shapes; `expected.json` of the fixtures states the rule (`weights`)."""
    return {name: _weight(name, shape, seed) for name, shape in shapes.items()}


def _weight(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    i = np.arange(math.prod(shape), dtype=np.float64)
    x = np.sin((i + 1) * 12.9898 + (zlib.crc32(name.encode()) % 1000) * 0.37 + seed) * 43758.5453
    x = np.abs(x - np.trunc(x)) * 2 - 1
    x = x / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1 * x
    if len(shape) == 1 and name.endswith("weight"):
        x = x + 1
    return torch.from_numpy(x.reshape(shape)).float()
