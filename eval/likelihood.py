"""Monte Carlo estimates of the evidence lower bound (Eq. 15) of a continuation, given its context.

    log p(y | x) >= -E_t E_{z_t} sum_i loss_i,   z_t = (x, y noised at t),   t ~ U(0, 1)

The context x is never noised. The expectation is estimated with `mc_samples` draws per request, one t in each of as
many equal slices of (0, 1). The plain estimate has infinite variance, because the loss grows as 1 / t while the
probability of any noise goes to 0. So the case that no token is redrawn, of probability alpha_t^n, is computed exactly
(one more forward pass; at k = 0 its loss is 0), and the draws are conditional on the other case, with weight
1 - alpha_t^n.

At k = 0 and the linear schedule, the LLaDA repository estimates the same expectation by masking l of the n tokens, l
uniform in 1..n, with weight n / l: both are sum_l (1 / l) E[sum of -log p over l masked tokens].

The noise of each request is seeded by its own tokens, so an estimate depends neither on the batch nor on the process.

Shapes: B rows (draws of requests), T context and continuation, n continuation, N rows of the output layer.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xdlm_hf.diffusion.process import NoiseProcess
from xdlm_hf.generation.layout import padded
from xdlm_hf.generation.protocol import check_conditioning, input_device, logits_at, padding_inputs


class Estimate(float):
    """A log-likelihood bound in nats, with the standard error of its estimate."""

    standard_error: float

    def __new__(cls, value: float, standard_error: float) -> "Estimate":
        estimate = super().__new__(cls, value)
        estimate.standard_error = standard_error
        return estimate

    def __reduce__(self) -> tuple:
        return Estimate, (float(self), self.standard_error)


def seeded_generator(*parts: Any, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, seeded by the printed form of `parts`, which must be plain values."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class Pair:
    """Context and continuation, as token ids."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def generator(self, seed: int) -> torch.Generator:
        """A generator that depends on the ids and the run's seed alone."""
        return seeded_generator(seed, self.context, self.continuation)


@dataclass(frozen=True)
class _Draw:
    pair: Pair
    t: float
    z_t: Tensor  # (n,)
    weight: float = 1.0


@torch.no_grad()
def log_likelihoods(
    model: Any,
    pairs: Sequence[Pair],
    mc_samples: int,
    batch_size: int,
    seed: int = 0,
    pad_token_id: int = 0,
    mixing_ratio: float | None = None,
) -> Iterator[Estimate]:
    """Estimates for `pairs`, in their order, each as soon as it is complete.

    Args:
        model: A `DiffusionModel`; its config names the schedule.
        pairs: Requests, sorted by length to save padding.
        mc_samples: Draws of t and noise per pair, each one row of a forward pass.
        batch_size: Rows per forward pass; the estimates do not depend on it.
        seed: Seed of the noise.
        pad_token_id: Any id; it is hidden by the attention mask.
        mixing_ratio: k of the noise; by default the model's own. For any k it is a bound on the likelihood under the
            generative process that the network and this k define, which the ancestral sampler draws from.

    Raises:
        ValueError: If mc_samples is not positive, k < 1 and the model has no mask token, or the model needs inputs that
            a likelihood does not have.
    """
    if mc_samples < 1:
        raise ValueError(f"mc_samples={mc_samples} must be positive: it is the number of draws per likelihood")
    check_conditioning(model, ("timesteps",), "a likelihood")
    process = model.noise_process(mixing_ratio)
    waiting: list[_Draw] = []
    losses: list[float] = []  # of the draws already computed
    clean: list[float] = []  # of all draws so far, with no token redrawn
    for last, pair in enumerate(pairs, 1 - len(pairs)):
        draws = _draw(pair, mc_samples, process, seed)
        clean += _clean_losses(model, draws, process, batch_size)
        waiting += draws
        while len(waiting) >= batch_size or (waiting and last == 0):
            batch, waiting = waiting[:batch_size], waiting[batch_size:]
            losses += _losses(model, batch, process, pad_token_id)
        while len(losses) >= mc_samples:
            yield _estimate([sum(both) for both in zip(losses[:mc_samples], clean[:mc_samples], strict=True)])
            losses, clean = losses[mc_samples:], clean[mc_samples:]


def _draw(pair: Pair, mc_samples: int, process: NoiseProcess, seed: int) -> list[_Draw]:
    """`mc_samples` noisy continuations with at least one token redrawn, t stratified."""
    n, generator = len(pair.continuation), pair.generator(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    t = (torch.arange(mc_samples) + uniform(mc_samples)) / mc_samples
    alpha_t = process.alpha(t)
    log_alpha = alpha_t.log()
    weight = -torch.expm1(n * log_alpha)
    # The first redrawn token, given that one is redrawn: a truncated geometric distribution.
    first = (torch.log1p(-uniform(mc_samples) * weight) / log_alpha).long().clamp(0, max(n - 1, 0))[:, None]
    columns = torch.arange(n)
    redrawn = (columns == first) | ((columns > first) & (uniform(mc_samples, n) >= alpha_t[:, None]))
    noise = process.noise(t[:, None]).sample_prior((mc_samples, n), generator)
    z_t = torch.where(redrawn, noise, torch.tensor(pair.continuation, dtype=torch.long))
    return [_Draw(pair, *row) for row in zip(t.tolist(), z_t, weight.tolist(), strict=True)]


def _clean_losses(model: Any, draws: Sequence[_Draw], process: NoiseProcess, batch_size: int) -> list[float]:
    """Loss of the clean continuation at the t of every draw, times the probability alpha_t^n that none is redrawn.

    One forward pass for all draws, or one for each if the network takes times.
    """
    pair, device = draws[0].pair, input_device(model)
    times = _times(draws, device)
    if not pair.continuation or not process.noise(times[:1, None]).has_uniform:
        return [0.0] * len(draws)
    n = len(pair.continuation)
    ids = torch.tensor([[*pair.context, *pair.continuation]], device=device)
    x_0, losses = ids[:, -n:], []
    logits = None if model.conditioning else logits_at(model, {"input_ids": ids}, n)
    for t in times.split(batch_size):
        x = x_0.expand(len(t), -1)
        if model.conditioning:
            logits = logits_at(model, {"input_ids": ids.expand(len(t), -1), **_conditioning(model, t)}, n)
        per_token = process.loss(logits.expand(len(t), -1, -1), x, x, t)
        losses += (per_token.double().sum(-1) * process.alpha(t) ** n).tolist()
    return losses


def _times(draws: Sequence[_Draw], device: torch.device) -> Tensor:
    """t of each draw, (B,) float64."""
    return torch.tensor([draw.t for draw in draws], dtype=torch.float64, device=device)


def _conditioning(model: Any, t: Tensor) -> dict[str, Tensor]:
    """Inputs of the network besides ids, at the times t (B,)."""
    return {"timesteps": model.timesteps(t)} if "timesteps" in model.conditioning else {}


def _losses(model: Any, draws: Sequence[_Draw], process: NoiseProcess, pad_token_id: int) -> list[float]:
    """Loss of every draw in nats, summed over its continuation; the rows are padded on the left."""
    n = max(len(draw.pair.continuation) for draw in draws)
    if n == 0:
        return [0.0] * len(draws)
    device = input_device(model)
    noisy = [[*draw.pair.context, *draw.z_t.tolist()] for draw in draws]
    ids, attention_mask = padded(noisy, pad_token_id)
    clean, scored = padded([draw.pair.continuation for draw in draws], pad_token_id)
    t = _times(draws, device)
    inputs = {"input_ids": ids.to(device), **_conditioning(model, t)}
    inputs |= padding_inputs(model, attention_mask.to(device))
    logits = logits_at(model, inputs, n)
    per_token = process.loss(logits, clean.to(device), ids[:, -n:].to(device), t)
    losses = (per_token.double() * scored.to(device)).sum(-1).tolist()
    return [loss * draw.weight for loss, draw in zip(losses, draws, strict=True)]


def _estimate(losses: Sequence[float]) -> Estimate:
    """Minus the mean, and its standard error from the differences of neighbouring slices of t.

    The plain standard deviation would also count how the expected loss changes with t, which stratification removes.
    """
    count = len(losses)
    squares = sum((after - before) ** 2 for before, after in zip(losses, losses[1:], strict=False))
    variance = squares / (2 * (count - 1) * count) if count > 1 else math.nan
    return Estimate(-sum(losses) / count, math.sqrt(variance))
