"""The reverse step q(z_s | z_t, x), dense and as an exact draw from four parts (Eqs. 11, 16, 18).

    f_t(x, e) = alpha_t x_e + beta_t r(e)                                     Eq. 10
    q(z_s = e | z_t, x) = f_s(x, e) f_ts(e, z_t) / f_t(x, z_t)                Eq. 11
    f_ts(e, z) = a_ts [e = z] + b_ts r(z),  a_ts = alpha_t / alpha_s,  b_ts = 1 - a_ts

`ReverseStep` holds the noise terms of Eq. 11: b_t(z_t), b_ts(z_t) and the distribution of noise at s. The formulas hold
for every process whose noise is constant over ordinary tokens, f_t(x, e) = alpha_t x_e + b_t(e).

t = 0 is clean, t = 1 is noise, s < t. N counts every row of the output layer, [MASK] included.
Shapes: B batch, L length, N vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .categorical import draw_from_weights, refuse_undefined, row_blocks, uniform, weight_blocks
from .checks import check_step, work_dtype
from .noise import NoiseDistribution, NoiseKernel, beta_ts
from .ops.kernels import triton_rows


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
    alpha_s, alpha_t = check_step(p_x0, z_t, alpha_s, alpha_t, kernel.vocab_size)
    return dense_posterior(p_x0, z_t, stationary_step(z_t, alpha_s, alpha_t, kernel))


def sample_posterior(
    logits: Tensor,
    z_t: Tensor,
    alpha_s: Tensor,
    alpha_t: Tensor,
    kernel: NoiseKernel,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw z_s exactly from Eq. 11 with x = softmax(logits), without a [B, L, N] posterior.

    Eq. 11 is a mixture of four draws: stay, draw from p, draw uniformly, go to [MASK]. The choice depends on p only at
    z_t, and a bound on p decides it for most positions; logits are read only at the others.

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
    alpha_s, alpha_t = check_step(logits, z_t, alpha_s, alpha_t, kernel.vocab_size)
    return draw_posterior(logits, z_t, stationary_step(z_t, alpha_s, alpha_t, kernel), generator)


# --------------------------------------------------------------------------------------------------------------------
# The noise between s and t


@dataclass(frozen=True)
class ReverseStep:
    """Noise terms of Eq. 11 for one reverse step; float64."""

    alpha_s: Tensor  # (B, 1)
    alpha_t: Tensor  # (B, 1)
    b_t: Tensor  # (B, L), noise at z_t: f_t(p, z_t) = alpha_t p(z_t) + b_t
    b_ts: Tensor  # (B, L), noise into z_t between s and t: f_ts(e, z_t) = a_ts [e = z_t] + b_ts
    noise_s: NoiseDistribution  # b_s(e) / beta_s


def stationary_step(z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel) -> ReverseStep:
    """The step of a stationary kernel, whose noise is r at every time: b_t = beta_t r and b_ts = (1 - a_ts) r."""
    alpha_s, alpha_t = alpha_s.double(), alpha_t.double()
    r_z = kernel._rate(z_t, torch.float64)
    b_ts = beta_ts(alpha_s, alpha_t)
    return ReverseStep(alpha_s, alpha_t, (1 - alpha_t) * r_z, b_ts * r_z, kernel)


# --------------------------------------------------------------------------------------------------------------------
# Dense


def dense_posterior(p_x0: Tensor, z_t: Tensor, step: ReverseStep) -> Tensor:
    """Eq. 11 as probabilities (B, L, N), of the dtype of `p_x0` but float32 at least; see `posterior`."""
    z_t, noise = z_t.long(), step.noise_s
    p_x0 = p_x0.to(work_dtype(p_x0))
    p_z = p_x0.gather(-1, z_t[..., None]).squeeze(-1).double()
    stay, from_p, from_uniform, to_special = four_way_weights(p_z, step)

    probs = from_p[..., None].to(p_x0.dtype) * p_x0
    probs += (from_uniform / noise.uniform_size)[..., None].to(p_x0.dtype)
    for token_id, share in noise.special_shares.items():
        if noise.uniform_size < probs.shape[-1]:  # uniform noise leaves special tokens out
            probs[..., token_id] = 0.0
        probs[..., token_id] += (to_special * share).to(p_x0.dtype)
    return probs.scatter_add_(-1, z_t[..., None], stay[..., None].to(p_x0.dtype))


def four_way_weights(p_z: Tensor, step: ReverseStep) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eq. 11 as a mixture of four draws; the weights sum to 1.

        stay at z_t       a_ts f_s(p, z_t) / f_t(p, z_t)
        draw from p       b_ts(z_t) alpha_s / f_t(p, z_t)
        draw uniformly    b_ts(z_t) beta_s k / f_t(p, z_t)
        go to a special   b_ts(z_t) beta_s (1 - k) / f_t(p, z_t)

    Args:
        p_z: p at z_t, (B, L).
        step: The noise; k is its uniform share at s.

    Returns:
        Four (B, L) float64 tensors, in the order above.
    """
    # With b_ts = 0 (an unmasked token at k = 0) a token stays with probability 1, also where f_t(p, z_t) = 0.
    leave = torch.where(step.b_ts > 0, step.b_ts / (step.alpha_t * p_z + step.b_t), 0.0)
    from_p, from_noise = leave * step.alpha_s, leave * (1 - step.alpha_s)
    k = step.noise_s.mixing_ratio
    return 1 - from_p - from_noise, from_p, from_noise * k, from_noise * (1 - k)


# --------------------------------------------------------------------------------------------------------------------
# As an exact draw


def draw_posterior(logits: Tensor, z_t: Tensor, step: ReverseStep, generator: torch.Generator | None = None) -> Tensor:
    """z_s, (B, L), drawn from Eq. 11 with x = softmax(logits); see `sample_posterior`."""
    draw = begin_step(z_t.long(), step, generator)
    rows, logits = draw.needs_p.flatten().nonzero().squeeze(-1), logits.flatten(0, 1)
    chunks = (logits[rows[part]] for part in row_blocks(len(rows), logits))
    return finish_step(draw, chunks, generator).to(z_t.dtype)


@dataclass(frozen=True)
class StepDraw:
    """Random choices of a reverse step, drawn before the network is evaluated; (B, L) each."""

    z_t: Tensor  # int64
    step: ReverseStep
    noise: Tensor  # int64, a draw from the noise at s: the token of "uniformly" and "to a special"
    choice: Tensor  # float64 in [0, 1): below b_ts alpha_s / f_t takes p, below b_ts / f_t leaves z_t
    leave_bound: Tensor  # float64, b_ts / b_t: upper bound over all p of the probability of leaving z_t
    needs_p: Tensor  # bool, where z_s depends on p


def begin_step(z_t: Tensor, step: ReverseStep, generator: torch.Generator | None = None) -> StepDraw:
    """Draw all random numbers of Eq. 11 except the token from p, and mark the positions that depend on p.

    f_t(p, z) >= b_t(z), so the probability of leaving z_t is at most b_ts / b_t, with equality at an absorbing token,
    where p is 0. Hence a choice above the bound stays, and a [MASK] that does not choose p needs no logits. Does not
    validate, and does not synchronize with the device.
    """
    leave_bound = torch.where(step.b_t > 0, step.b_ts / step.b_t, 0.0)
    absorbing = torch.zeros_like(z_t, dtype=torch.bool)
    for token_id in step.noise_s.absorbing_ids:
        absorbing |= z_t == token_id
    choice = uniform(z_t.shape, generator, z_t.device)
    noise = step.noise_s.sample_prior(z_t.shape, generator, z_t.device).to(z_t.dtype)
    needs_p = choice < torch.where(absorbing, leave_bound * step.alpha_s, leave_bound)
    return StepDraw(z_t, step, noise, choice, leave_bound, needs_p)


def finish_step(draw: StepDraw, chunks: Iterable[Tensor], generator: torch.Generator | None = None) -> Tensor:
    """z_s, (B, L), from the logits of the M positions in `draw.needs_p`, in row-major order.

    The logits come in chunks (m, N), so that those of all positions need not be in memory at once; the chunk sizes do
    not change the result. Depending on p at z_t, a position in `needs_p` may still stay or take noise.

    Raises:
        ValueError: As `refuse_undefined`.
    """
    step, needed = draw.step, draw.needs_p
    z_s = torch.where(draw.choice < draw.leave_bound, draw.noise, draw.z_t)
    alpha_s, alpha_t = (rate.expand(needed.shape)[needed] for rate in (step.alpha_s, step.alpha_t))
    z_t, noise, choice, b_t, b_ts = (x[needed] for x in (draw.z_t, draw.noise, draw.choice, step.b_t, step.b_ts))
    u = uniform((len(z_t), 1), generator, z_t.device)
    drawn, undefined = torch.empty_like(z_t), torch.zeros_like(choice, dtype=torch.bool)
    for part, p_z, from_p in _draws(chunks, z_t, u, step.noise_s.absorbing_ids):
        leave = b_ts[part] / (alpha_t[part] * p_z + b_t[part])
        otherwise = torch.where(choice[part] < leave, noise[part], z_t[part])
        drawn[part] = torch.where(choice[part] < leave * alpha_s[part], from_p, otherwise)
        undefined[part] = p_z.isnan()
    refuse_undefined(undefined)
    z_s[needed] = drawn
    return z_s


def _draws(
    chunks: Iterable[Tensor], z_t: Tensor, u: Tensor, absorbing_ids: Sequence[int]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For some of the M positions at a time: their slice, p(z_t) in float64, and the token at the quantile u of p."""
    start = 0
    for chunk in chunks:
        part, kernels = slice(start, start + len(chunk)), triton_rows(chunk, absorbing_ids)
        if kernels is None:
            yield from _weighted_draws(chunk, start, z_t, u, absorbing_ids)
        else:
            tokens, p_z = kernels.draw(chunk, z_t[part], u[part, 0], next(iter(absorbing_ids), -1))
            yield part, p_z.double(), tokens
        start = part.stop
        del chunk  # frees it before the next one is computed


def _weighted_draws(
    chunk: Tensor, start: int, z_t: Tensor, u: Tensor, absorbing_ids: Sequence[int]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """`_draws` of one chunk, whose first position is `start`."""
    for rows, weights in weight_blocks(chunk, absorbing_ids):
        part = slice(start + rows.start, start + rows.stop)
        p_z = (weights.gather(-1, z_t[part, None]) / weights.sum(-1, keepdim=True)).squeeze(-1).double()
        yield part, p_z, draw_from_weights(weights, u[part])
