"""Logged figures of a training run: parts of the loss, its standard error, speed and memory.

All figures cover the steps since the last log, over all processes. Losses are in nats per token.

    nelbo, nelbo_standard_error               the loss of these steps as a bound, with its error over rows
    perplexity, perplexity_standard_error     exp(nelbo)
    loss_masked, loss_uniform, loss_clean     mean over positions where z_t is [MASK], another token, x_0 itself
    share_masked, share_uniform, share_clean  share of positions of each kind
    loss_t_0_25 ... loss_t_75_100             mean over rows with t in that quarter (percent)
    tokens_per_second, model_flops_utilization, peak_memory_gib

A figure without positions is left out (uniform noise at k = 0; a quarter without rows). The loss is the sum over kinds
of share x loss. A uniform draw of x_0 itself counts as clean.

Shapes: B batch, L length.
"""

import contextlib
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .nelbo import nelbo_of_sums

KINDS = ("masked", "uniform", "clean")
QUARTERS = ("0_25", "25_50", "50_75", "75_100")
# Layout of the vector of sums.
_ROW_SUMS = 6  # rows, nats, tokens, nats^2, nats tokens, tokens^2
_KIND = slice(_ROW_SUMS, _ROW_SUMS + 2 * len(KINDS))
_QUARTER = slice(_KIND.stop, _KIND.stop + 2 * len(QUARTERS))
# Dense bfloat16 peak in TFLOP/s, from the makers' data sheets; the first name that the device's contains.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def peak_tflops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of a GPU in TFLOP/s; None for a CPU or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def flops_per_token(model: nn.Module, length: int) -> float:
    """Floating-point operations that training needs per token, recomputed activations not counted.

    Two per weight and token for the forward pass, two for the gradient of the inputs, two more for the gradient of a
    trained weight; and forward and backward attention over `length` tokens: 12 layers x hidden_size x L. LLaDA-8B: 211
    TFLOP for a row of 4096. Parts that run once a row, the model's `row_modules`, are not counted. A model with
    `training_flops_per_token` counts for itself.

    Args:
        model: The model, or a peft model around it, before its parameters are sharded over processes.
        length: L, tokens per row.
    """
    if hasattr(model, "training_flops_per_token"):
        return model.training_flops_per_token()
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tables = [embedding, *(module for module in model.modules() if isinstance(module, nn.Embedding))]
    lookups = {id(p) for table in tables for p in table.parameters()} - {id(head.weight)}
    once_a_row = set(getattr(model, "row_modules", ()))
    flops = 0
    for name, parameter in model.named_parameters():
        if once_a_row.intersection(name.split(".")):
            continue
        # Matrices only; an embedding lookup multiplies nothing. ZeRO-3's empty shards and 4-bit weights store their
        # full shape.
        quantized = getattr(parameter, "quant_state", None)
        shape = getattr(parameter, "ds_shape", parameter.shape) if quantized is None else quantized.shape
        if len(shape) == 2 and id(parameter) not in lookups:
            flops += math.prod(shape) * (6 if parameter.requires_grad else 4)
    return flops + 12 * model.config.num_hidden_layers * model.config.hidden_size * length


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far, in GiB: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class TrainingMetrics:
    """Sums over the batches since the last report; the module's docstring lists the figures.

    Args:
        flops: Operations per token as a function of the row length.
        peak: Floating-point operations per second of one process' device; None leaves the utilisation out.
        device: Device of the sums.
    """

    def __init__(self, flops: Callable[[int], float], peak: float | None, device: torch.device):
        self.flops = flops
        self.peak = peak
        self.device = device
        self.reset()

    def reset(self) -> None:
        self._sums = torch.zeros(_QUARTER.stop, dtype=torch.float64, device=self.device)
        self._positions = 0
        self._flops = 0.0
        self._clock = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside the block, which is not training."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def add(
        self, x_0: Tensor, z_t: Tensor, t: Tensor, weights: Tensor, losses: Tensor, absorbing_ids: Sequence[int]
    ) -> None:
        """Add one batch, without synchronizing with the device.

        Args:
            x_0, z_t: Clean and noisy ids (B, L).
            t: Time of each row (B,).
            weights: Weight of each position in the loss (B, L).
            losses: Loss of each position in nats (B, L).
            absorbing_ids: The mask token; none at k = 1.
        """
        weights, losses = weights.double(), losses.double() * weights.double()
        nats, tokens = losses.sum(1), weights.sum(1)
        changed = z_t != x_0
        masked = torch.zeros_like(changed)
        for token_id in absorbing_ids:
            masked |= z_t == token_id
        kinds = (changed & masked, changed & ~masked, ~changed)
        quarters = (t.to(self.device) * len(QUARTERS)).long().clamp(max=len(QUARTERS) - 1)
        sums = [torch.ones_like(nats).sum(), nats.sum(), tokens.sum()]
        sums += [(nats * nats).sum(), (nats * tokens).sum(), (tokens * tokens).sum()]
        for kind in kinds:
            sums += [(losses * kind).sum(), (weights * kind).sum()]
        for quarter in range(len(QUARTERS)):
            inside = quarters == quarter
            sums += [(nats * inside).sum(), (tokens * inside).sum()]
        self._sums += torch.stack(sums)
        self._positions += x_0.numel()
        self._flops += x_0.numel() * self.flops(x_0.shape[1])

    def report(self, all_sum: Callable[[Tensor], Tensor], all_max: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The figures since the last report; every process must call it.

        Args:
            all_sum, all_max: Sum and maximum of a float64 vector over processes.
        """
        seconds = time.perf_counter() - self._clock
        counts = torch.tensor([float(self._positions), self._flops, 1.0], dtype=torch.float64, device=self.device)
        sums = all_sum(torch.cat([self._sums, counts])).tolist()
        slowest = torch.tensor([seconds, peak_memory_gib(self.device)], dtype=torch.float64, device=self.device)
        seconds, memory = all_max(slowest).tolist()
        *sums, positions, flops, processes = sums
        self.reset()
        if not sums[2]:
            return {}
        figures = {**nelbo_of_sums(*sums[:_ROW_SUMS]), **_parts(sums)}
        figures["tokens_per_second"] = positions / seconds
        if self.peak is not None:
            figures["model_flops_utilization"] = flops / seconds / (self.peak * processes)
        figures["peak_memory_gib"] = memory
        return figures


def _parts(sums: Sequence[float]) -> dict[str, float]:
    figures, tokens = {}, sums[2]
    kinds, quarters = sums[_KIND], sums[_QUARTER]
    for name, nats, count in zip(KINDS, kinds[::2], kinds[1::2], strict=True):
        if count:
            figures |= {f"loss_{name}": nats / count, f"share_{name}": count / tokens}
    for name, nats, count in zip(QUARTERS, quarters[::2], quarters[1::2], strict=True):
        if count:
            figures[f"loss_t_{name}"] = nats / count
    return figures
