"""The reverse step q(z_s | z_t, x), dense and as an exact draw from four parts (Eqs. 11, 16, 18).

    f_t(x, e) = alpha_t x_e + beta_t r(e)                                     Eq. 10
    q(z_s = e | z_t, x) = f_s(x, e) f_ts(e, z_t) / f_t(x, z_t)                Eq. 11
    f_ts(e, z) = a_ts [e = z] + b_ts r(z),  a_ts = alpha_t / alpha_s,  b_ts = 1 - a_ts

t = 0 is clean, t = 1 is noise, s < t. N counts every row of the output layer, [MASK] included.
Shapes: B batch, L length, N vocabulary.
"""

import torch
from torch import Tensor

from .kernel import NoiseKernel, as_column, uniform, validate_ids, validate_rates

# Rows of the vocabulary that one categorical draw widens to float64 at a time: bounds its memory to 2^25 numbers.
_DRAW_ELEMENTS = 2**25


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
    only at z_t; the vocabulary is read again on the positions that chose p, and there alone.

    Args:
        logits: Network output, (B, L, N), float of any dtype; the rows of absorbing tokens are ignored. Not modified.
        z_t: Noisy token ids, (B, L). Not modified.
        alpha_s, alpha_t: Signal rates, (B,) or (B, 1), 0 <= alpha_t <= alpha_s <= 1.
        kernel: The noise kernel.
        generator: Source of randomness; may live on another device than `logits`.

    Returns:
        Token ids z_s, (B, L).

    Raises:
        ValueError: As `posterior`.
    """
    alpha_s, alpha_t = check_step(logits, z_t, alpha_s, alpha_t, kernel)
    p_z = log_prob(logits, z_t, kernel).exp().double()
    stay, from_p, from_uniform, _ = four_way_weights(p_z, z_t, alpha_s, alpha_t, kernel)

    choice = uniform(z_t.shape, generator, z_t.device)
    noise = kernel.sample_prior(z_t.shape, generator, z_t.device).to(z_t.dtype)  # z ~ r: uniform or to [MASK]
    z_s = torch.where(choice < stay, z_t, noise)
    chose_p = (choice >= stay) & (choice < stay + from_p)
    z_s[chose_p] = sample_categorical(logits[chose_p], kernel, generator).to(z_t.dtype)
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
    # (alpha_s - alpha_t) / alpha_s, not 1 - a_ts: nothing cancels as s -> t. At alpha_s = 0 both times are pure noise.
    b_ts = torch.where(alpha_s > alpha_t, (alpha_s - alpha_t) / alpha_s.clamp_min(1e-300), 0.0)
    f_t = alpha_t * p_z + (1 - alpha_t) * kernel._rate(z_t, torch.float64)
    leave = b_ts * kernel._rate(z_t, torch.float64)
    # r(z_t) = 0 (an unmasked token at k = 0) stays for certain, also where p_z and with it f_t vanish.
    leave = torch.where(leave > 0, leave / f_t, 0.0)
    from_p = leave * alpha_s
    from_noise = leave * (1 - alpha_s)
    k = kernel.mixing_ratio
    return 1 - from_p - from_noise, from_p, from_noise * k, from_noise * (1 - k)


def log_prob(logits: Tensor, ids: Tensor, kernel: NoiseKernel) -> Tensor:
    """log p at `ids` with absorbing rows excluded, (B, L), float32 or wider; one row block in memory at a time."""
    flat = logits.reshape(-1, logits.shape[-1])
    flat_ids = ids.reshape(-1, 1)
    blocks = []
    for block, block_ids in zip(_row_blocks(flat), flat_ids.split(_rows_per_block(flat)), strict=True):
        masked = masked_logits(block, kernel)
        # Not log_softmax: the fused kernel's row sum is off by 2e-5 at 126464 entries in float32.
        blocks.append(masked.gather(-1, block_ids) - masked.logsumexp(-1, keepdim=True))
    return torch.cat(blocks).reshape(ids.shape)


def masked_logits(logits: Tensor, kernel: NoiseKernel) -> Tensor:
    """A float32-or-wider copy of the logits with the rows of absorbing tokens at -inf (p_m = 0 when k < 1)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(dtype, copy=True)
    for token_id in kernel.absorbing_ids:
        logits[..., token_id] = -torch.inf
    return logits


def sample_categorical(
    logits: Tensor, kernel: NoiseKernel | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Exact draws from softmax(logits) by inverting the cumulative distribution in float64.

    Args:
        logits: (M, N), float of any dtype.
        kernel: If given, the rows of its absorbing tokens are ignored.

    Returns:
        Token ids, (M,).
    """
    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.long, device=logits.device)
    u = uniform((logits.shape[0], 1), generator, logits.device)
    draws = []
    for block, u_block in zip(_row_blocks(logits), u.split(_rows_per_block(logits)), strict=True):
        masked = block if kernel is None else masked_logits(block, kernel)
        cdf = (masked.double() - masked.amax(-1, keepdim=True)).exp_().cumsum(-1)
        # side="right": the first entry above u, so that a token of probability zero is never the answer.
        draws.append(torch.searchsorted(cdf, u_block * cdf[:, -1:], right=True).squeeze(-1))
    return torch.cat(draws).clamp_max(logits.shape[-1] - 1)


def _rows_per_block(logits: Tensor) -> int:
    return max(1, _DRAW_ELEMENTS // logits.shape[-1])


def _row_blocks(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split(_rows_per_block(logits))


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
