"""The reverse step q(z_s | z_t, x), dense and as an exact draw from four parts (Eqs. 11, 16, 18).

    f_t(x, e) = alpha_t x_e + beta_t r(e)                                     Eq. 10
    q(z_s = e | z_t, x) = f_s(x, e) f_ts(e, z_t) / f_t(x, z_t)                Eq. 11
    f_ts(e, z) = a_ts [e = z] + b_ts r(z),  a_ts = alpha_t / alpha_s,  b_ts = 1 - a_ts

t = 0 is clean, t = 1 is noise, s < t. N counts every row of the output layer, [MASK] included.
Shapes: B batch, L length, N vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernel import NoiseKernel, as_column, uniform, validate_ids, validate_rates

# Logits that are read in float32 at a time: what stays in a CPU's cache, 64 MB on a GPU.
_BLOCK_ELEMENTS = {"cpu": 2**18, "other": 2**24}


def posterior(p_x0: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel) -> Tensor:
    """Distribution of z_s given z_t and a (predicted) clean distribution, Eq. 11.

        q(z_s = e | z_t, x) = f_s(x, e) f_ts(e, z_t) / f_t(x, z_t)

    Args:
        p_x0: Clean-token probabilities, (B, L, N), zero at [MASK] when k < 1.
        z_t: Noisy token ids, (B, L). Not modified.
        alpha_s, alpha_t: Signal rates, (B,) or (B, 1), 0 <= alpha_t <= alpha_s <= 1.
        kernel: The noise kernel.

    Returns:
        Probabilities, (B, L, N), summing to 1 over N; float64 for a float64 `p_x0`, float32 otherwise.

    Raises:
        ValueError: If some alpha_s < alpha_t, a rate leaves [0, 1], an id is not in [0, N), or shapes disagree.

    Source: Lemma 3.3. k = 0 gives Eq. 16 (MDLM), k = 1 gives Eq. 18 (UDLM).
    """
    alpha_s, alpha_t = check_step(p_x0, z_t, alpha_s, alpha_t, kernel)
    z_t = z_t.long()
    p_x0 = p_x0 if p_x0.dtype == torch.float64 else p_x0.float()
    p_z = p_x0.gather(-1, z_t[..., None]).squeeze(-1).double()
    stay, from_p, from_uniform, to_special = four_way_weights(p_z, z_t, alpha_s, alpha_t, kernel)

    probs = from_p[..., None].to(p_x0.dtype) * p_x0
    probs += (from_uniform / kernel.vocab_size)[..., None].to(p_x0.dtype)
    for token_id in kernel.absorbing_ids:
        share = kernel.special_weights[token_id] / (1 - kernel.mixing_ratio)
        probs[..., token_id] += (to_special * share).to(p_x0.dtype)
    return probs.scatter_add_(-1, z_t[..., None], stay[..., None].to(p_x0.dtype))


def sample_posterior(
    logits: Tensor,
    z_t: Tensor,
    alpha_s: Tensor,
    alpha_t: Tensor,
    kernel: NoiseKernel,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw z_s exactly from Eq. 11 with x = softmax(logits), without a [B, L, N] posterior.

    Eq. 11 is a mixture of four draws: stay, draw from p, draw uniformly, go to [MASK]. Choosing among them needs p
    only at z_t, and a bound on it settles most positions: the vocabulary is read only where the draw needs p.

    Args:
        logits: Network output, (B, L, N), float of any dtype; the rows of absorbing tokens are ignored. Not modified.
        z_t: Noisy token ids, (B, L). Not modified.
        alpha_s, alpha_t: Signal rates, (B,) or (B, 1), 0 <= alpha_t <= alpha_s <= 1.
        kernel: The noise kernel.
        generator: Source of randomness; may live on another device than `logits`.

    Returns:
        Token ids z_s, (B, L), of the dtype of `z_t`.

    Raises:
        ValueError: As `posterior`, or if logits that the draw needs are NaN or all -inf.
    """
    alpha_s, alpha_t = check_step(logits, z_t, alpha_s, alpha_t, kernel)
    draw = begin_step(z_t.long(), alpha_s, alpha_t, kernel, generator)
    rows, logits = draw.needs_p.flatten().nonzero().squeeze(-1), logits.flatten(0, 1)
    chunks = (logits[rows[part]] for part in row_blocks(len(rows), logits))
    return finish_step(draw, chunks, kernel, generator).to(z_t.dtype)


@dataclass(frozen=True)
class StepDraw:
    """A reverse step up to the point where it needs the network; (B, L) each."""

    z_t: Tensor  # int64
    noise: Tensor  # int64, a draw from r: where "uniformly" or "to [MASK]" would lead
    choice: Tensor  # float64 in [0, 1): below b_ts r(z) alpha_s / f_t takes p, below b_ts r(z) / f_t leaves z_t
    most: Tensor  # float64, b_ts / beta_t: the largest probability of leaving that any p can give
    needs_p: Tensor  # bool, where the answer depends on p
    rates: tuple[Tensor, Tensor]  # alpha_s, alpha_t, (B, 1) float64


def begin_step(
    z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel, generator: torch.Generator | None = None
) -> StepDraw:
    """Draw all that Eq. 11 leaves to chance but the token from p, and see where p matters.

    f_t(p, z) >= beta_t r(z), so z_t is left with probability b_ts / beta_t at most, and at an absorbing token, where p
    is 0, with exactly that. Most positions are thus settled without logits: a choice above the bound stays, and a
    [MASK] that does not choose p needs none. Rates are (B, 1); nothing is validated and no device is waited for.
    """
    alpha_s, alpha_t = alpha_s.double(), alpha_t.double()
    can_leave = kernel._rate(z_t, torch.float64) > 0
    most = torch.where(can_leave & (alpha_t < 1), _b_ts(alpha_s, alpha_t) / (1 - alpha_t), 0.0)
    absorbing = torch.zeros_like(can_leave)
    for token_id in kernel.absorbing_ids:
        absorbing |= z_t == token_id
    choice = uniform(z_t.shape, generator, z_t.device)
    noise = kernel.sample_prior(z_t.shape, generator, z_t.device).to(z_t.dtype)
    needs_p = choice < torch.where(absorbing, most * alpha_s, most)
    return StepDraw(z_t, noise, choice, most, needs_p, (alpha_s, alpha_t))


def finish_step(
    draw: StepDraw,
    chunks: Iterable[Tensor],
    kernel: NoiseKernel,
    generator: torch.Generator | None = None,
) -> Tensor:
    """z_s, (B, L), from the logits of the M positions in `draw.needs_p`, in row-major order.

    They come in chunks (m, N) of any lengths, so that the head's product need never exist whole; what is drawn does not
    depend on how they are cut. The token from p is drawn where it is needed: p at z_t may still say that the position
    stays, or takes noise.

    Raises:
        ValueError: As `refuse_undefined`.
    """
    z_s = torch.where(draw.choice < draw.most, draw.noise, draw.z_t)
    alpha_s, alpha_t = (rate.expand(draw.z_t.shape)[draw.needs_p] for rate in draw.rates)
    z_t, noise, choice = (x[draw.needs_p] for x in (draw.z_t, draw.noise, draw.choice))
    r_z = kernel._rate(z_t, torch.float64)
    u = uniform((len(z_t), 1), generator, z_t.device)
    drawn, undefined = torch.empty_like(z_t), torch.zeros_like(choice, dtype=torch.bool)
    for part, weights in _chunk_blocks(chunks, kernel):
        p_z = (weights.gather(-1, z_t[part, None]) / weights.sum(-1, keepdim=True)).squeeze(-1).double()
        f_t = alpha_t[part] * p_z + (1 - alpha_t[part]) * r_z[part]
        leave = _b_ts(alpha_s[part], alpha_t[part]) * r_z[part] / f_t
        otherwise = torch.where(choice[part] < leave, noise[part], z_t[part])
        from_p = choice[part] < leave * alpha_s[part]
        drawn[part] = torch.where(from_p, draw_from_weights(weights, u[part]), otherwise)
        undefined[part] = p_z.isnan()
    refuse_undefined(undefined)
    z_s[draw.needs_p] = drawn
    return z_s


def four_way_weights(
    p_z: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 11 as a mixture of four draws; the weights sum to 1.

        stay at z_t       a_ts f_s(p, z_t) / f_t(p, z_t)
        draw from p       b_ts r(z_t) alpha_s / f_t(p, z_t)
        draw uniformly    b_ts r(z_t) beta_s k / f_t(p, z_t)
        go to a special   b_ts r(z_t) beta_s (1 - k) / f_t(p, z_t)

    Args:
        p_z: p at z_t, (B, L).
        z_t: Noisy ids, (B, L).
        alpha_s, alpha_t: Signal rates, (B, 1).

    Returns:
        Four (B, L) float64 tensors, in the order above.
    """
    alpha_s, alpha_t = alpha_s.double(), alpha_t.double()
    f_t = alpha_t * p_z + (1 - alpha_t) * kernel._rate(z_t, torch.float64)
    leave = _b_ts(alpha_s, alpha_t) * kernel._rate(z_t, torch.float64)
    # r(z_t) = 0 (an unmasked token at k = 0) stays for certain, also where p_z and with it f_t vanish.
    leave = torch.where(leave > 0, leave / f_t, 0.0)
    from_p = leave * alpha_s
    from_noise = leave * (1 - alpha_s)
    k = kernel.mixing_ratio
    return 1 - from_p - from_noise, from_p, from_noise * k, from_noise * (1 - k)


def _b_ts(alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
    """b_ts = 1 - alpha_t / alpha_s, so written that nothing cancels as s -> t; 0 where both are pure noise."""
    return torch.where(alpha_s > alpha_t, (alpha_s - alpha_t) / alpha_s.clamp_min(1e-300), 0.0)


def masked_logits(logits: Tensor, kernel: NoiseKernel) -> Tensor:
    """A float32-or-wider copy of the logits with the rows of absorbing tokens at -inf (p_m = 0 when k < 1)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(dtype, copy=True)
    for token_id in kernel.absorbing_ids:
        logits[..., token_id] = -torch.inf
    return logits


def refuse_undefined(undefined: Tensor) -> None:
    """Raise ValueError if any of the positions has no distribution: logits that are NaN or inf, or -inf throughout.

    Waits for the device, so it is asked once, about as much as possible.
    """
    if undefined.any():
        raise ValueError(
            "cannot draw a token: some logits are NaN or inf, or every token of a position is excluded (-inf). "
            "Weights in float16 may overflow, bfloat16 does not; a logits processor may exclude too much."
        )


def draw_from_weights(weights: Tensor, u: Tensor) -> Tensor:
    """The token at quantile u of each row, by inverting the cumulative sum in float64 on two levels.

    Groups of about sqrt(N) tokens first, then within the group: one cheap sum over the vocabulary, no random numbers
    of its size, and every token keeps its probability to 1e-7 (float32 noise would starve rare ones).

    Args:
        weights: (M, N), not negative, float32 or float64; each row's sum is positive.
        u: (M, 1) float64 in [0, 1).

    Returns:
        Token ids, (M,); never one of weight 0. Any id for a row whose sum is NaN: nothing waits for the device here,
        see `refuse_undefined`.
    """
    n = weights.shape[-1]
    group = math.isqrt(n - 1) + 1
    whole = n - n % group
    sums = weights[:, :whole].unflatten(-1, (-1, group)).sum(-1)
    if whole < n:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=-1)
    chosen, rest = _invert(sums.double(), u)
    columns = chosen * group + torch.arange(group, device=weights.device)
    inside = torch.where(columns < n, weights.gather(-1, columns.clamp_max(n - 1)), 0.0)
    within, _ = _invert(inside.double(), rest)
    return (chosen * group + within).squeeze(-1).clamp_max(n - 1)  # beyond it where NaN


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative weight exceeds u of the total, and where in its own weight u falls; (M, 1) each."""
    cdf = weights.cumsum(-1)
    # Strictly below the total also after rounding, so that an index of weight 0 is never the answer.
    target = torch.minimum(u * cdf[:, -1:], torch.nextafter(cdf[:, -1:], torch.zeros_like(u)))
    index = torch.searchsorted(cdf, target, right=True).clamp_max(weights.shape[-1] - 1)  # beyond it where NaN
    weight = weights.gather(-1, index)
    return index, ((target - (cdf.gather(-1, index) - weight)) / weight).clamp(0, 1)


def _chunk_blocks(chunks: Iterable[Tensor], kernel: NoiseKernel) -> Iterator[tuple[slice, Tensor]]:
    """`_weight_blocks` of logits that come in chunks; the slices count through all of them."""
    start = 0
    for chunk in chunks:
        for part, weights in _weight_blocks(chunk, kernel):
            yield slice(start + part.start, start + part.stop), weights
        start += len(chunk)
        del chunk  # before the next one is made


def _weight_blocks(logits: Tensor, kernel: NoiseKernel) -> Iterator[tuple[slice, Tensor]]:
    """Yield (part, exp(logit - max)) of logits (M, N), a few rows at a time, absorbing tokens 0."""
    for part in row_blocks(len(logits), logits):
        block = masked_logits(logits[part], kernel)
        yield part, block.sub_(block.amax(-1, keepdim=True)).exp_()


def row_blocks(m: int, logits: Tensor) -> Iterator[slice]:
    """Slices of m rows, each of as many rows of `logits` (..., N) as are read at a time."""
    return row_slices(m, logits.shape[-1], logits.device, _BLOCK_ELEMENTS)


def row_slices(m: int, vocab_size: int, device: torch.device, elements: Mapping[str, int]) -> Iterator[slice]:
    """Slices of m rows of N numbers, each of about `elements["cpu"]` or, on any other device, `elements["other"]`."""
    rows = max(1, elements["cpu" if device.type == "cpu" else "other"] // vocab_size)
    return (slice(start, min(start + rows, m)) for start in range(0, m, rows))


def check_step(
    values: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel
) -> tuple[Tensor, Tensor]:
    """Validate one reverse step; returns the rates as (B, 1) columns.

    Raises:
        ValueError: If shapes disagree, an id is not in [0, N), a rate leaves [0, 1], or some alpha_s < alpha_t.
    """
    check_shapes(values, z_t, kernel)
    validate_ids("z_t", z_t, kernel.vocab_size)
    alpha_s, alpha_t = as_column(alpha_s, z_t), as_column(alpha_t, z_t)
    validate_rates(alpha_s=alpha_s, alpha_t=alpha_t)
    backward = alpha_s < alpha_t
    if backward.any():
        raise ValueError(
            f"alpha_s={alpha_s[backward][0].item():g} < alpha_t={alpha_t[backward][0].item():g}: "
            "s must be the earlier, cleaner time (s < t)."
        )
    return alpha_s, alpha_t


def check_shapes(values: Tensor, ids: Tensor, kernel: NoiseKernel) -> None:
    """Raise ValueError unless `values` is (B, L, N) for the (B, L) `ids` and the kernel's N."""
    expected = (*ids.shape, kernel.vocab_size)
    if ids.ndim != 2 or tuple(values.shape) != expected:
        raise ValueError(
            f"expected ids (B, L) and logits or probabilities (B, L, {kernel.vocab_size}); "
            f"got {tuple(ids.shape)} and {tuple(values.shape)}."
        )
