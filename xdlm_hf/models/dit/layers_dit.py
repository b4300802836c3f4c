"""Parts of the DiT's blocks: embeddings, norm, modulation, and constants cached at inference.

Shapes: B batch, L length, D = hidden_dim, C = cond_dim.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers.utils import is_tracing

FREQUENCIES = 128  # of the time embedding, each with its cosine and sine


class DiTEmbedding(nn.Embedding):
    """Embedding whose weight is named `embedding`, as that of the tokens is in the checkpoint format."""

    def __init__(self, rows: int, width: int, **options: Any):
        super().__init__(rows, width, **options)
        self.register_parameter("embedding", self._parameters.pop("weight"))

    @classmethod
    def around(cls, module: nn.Module) -> nn.Module:
        """A `DiTEmbedding` that shares the weight of a plain `nn.Embedding`; any other module unchanged."""
        if type(module) is not nn.Embedding:
            return module
        embedding = cls(module.num_embeddings, module.embedding_dim, device="meta")
        embedding.embedding = module.weight
        return embedding

    @property
    def weight(self) -> nn.Parameter:
        return self.embedding


class DiTLayerNorm(nn.Module):
    """Layer norm without bias; the result is float32 or wider, for the modulation that follows."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), eps=1e-5)


class AdaLN(nn.Linear):
    """Linear map of the conditioning vector (B, C) to shifts, scales and gates; initialised to zero."""


class TimestepEmbedder(nn.Module):
    """Noise levels sigma (B,) to vectors (B, C), by cosines and sines of 128 frequencies."""

    def __init__(self, cond_dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        dtype = self.mlp[0].weight.dtype
        exponents = torch.arange(FREQUENCIES, device=sigma.device, dtype=torch.promote_types(dtype, torch.float32))
        angles = sigma[:, None].to(exponents.dtype) * torch.exp(-math.log(10000) / FREQUENCIES * exponents)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))


class LabelEmbedder(nn.Module):
    """Class labels (B,) to vectors (B, C); the last row of the table is the null class."""

    def __init__(self, num_classes: int, cond_dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, cond_dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class FoldsConstants(nn.Module):
    """Caches a tensor that depends only on weights, until they change; it is not part of the state dict.

    It is computed on every call in training, when gradients are recorded, in compiled and captured graphs, and if
    weights are offloaded, sharded or quantised.
    """

    _folded: tuple | None = None

    def train(self, mode: bool = True):
        self._folded = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self._folded = None
        return super()._apply(fn, recurse)

    def folded(self, modules: Sequence[nn.Module], condition: Tensor | None, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, or its cached result for the same weights of `modules` and the same tensor `condition`."""
        if self.training or torch.is_grad_enabled() or is_tracing():
            return compute()
        version = _weights_version(modules)
        if version is None:
            return compute()
        if self._folded is None or self._folded[0] != version or self._folded[1] is not condition:
            self._folded = (version, condition, compute())
        return self._folded[2]


def _weights_version(modules: Sequence[nn.Module]) -> tuple | None:
    """A value that changes if a weight is replaced or changed in place; None if changes cannot be detected."""
    weights = [weight for module in modules for weight in module.parameters()]
    for weight in weights:
        plain = type(weight) in (nn.Parameter, Tensor) and not weight.is_meta and not weight.is_inference()
        if not plain or not weight.numel():
            return None
    if not weights:
        return None
    device = weights[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, *((weight.data_ptr(), weight._version) for weight in weights)


def modulation(module: FoldsConstants, condition: Tensor, constant: bool, parts: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates, (B or 1, 1, D) each; cached if the condition is constant."""

    def compute() -> Tensor:
        return module.adaLN_modulation(condition)[:, None]

    whole = module.folded([module.adaLN_modulation], condition, compute) if constant else compute()
    return whole.chunk(parts, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift
