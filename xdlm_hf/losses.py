"""What training minimises: the finite-step divergence (Eqs. 12, 13) and its continuous-time limit (Eqs. 14, 15).

t = 0 is clean, t = 1 is noise, s < t. Losses are in nats per token. N counts every row of the output layer, [MASK] and
padding rows included. Shapes: B batch, L length, N vocabulary, M tokens of one row block.

Both losses are one formula. With phi(y) = y - log(1 + y) and rho(y) = phi(y) / y, every term that cancels in the
printed form is a value of rho, and rho loses nothing near 0 (derivation: docs/equations.md):

    w = (x_z - p_z) / f(p, z),   u = beta k / N,   u_0 = beta r(x_0),   B = b_ts r(z_t) / f_t(x, z_t)
    H = log[f(x, x_0) / f(p, x_0)] + sum_{e not special} p_e rho(alpha p_e / u) - rho(alpha / u_0)

    Eqs. 12, 13, everything at s:    KL   = B alpha_s              { w [rho(alpha w) - rho(B alpha w)] + H }
    Eqs. 14, 15, everything at t:    loss = -alpha'_t r(z)/f_t(x,z) { w  rho(alpha w)                   + H }

so the limit is the first line with B = 0 inside the braces. The network enters through p = softmax(logits), [MASK] row
excluded when k < 1, alone; the gradient is closed-form and reads the logits once more.

Per-token scalars are float64, passes over the vocabulary float32 (float64 for float64 logits), whatever the model's
dtype.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel import NoiseKernel, as_column, validate_ids, validate_rates
from .posterior import check_shapes, check_step

# Below this alpha / u the vocabulary sum takes the series of rho: 1 - log1p(y)/y has lost half its digits there.
_SERIES_BELOW = 1e-2
# Elements of one row block: small enough to stay in a CPU's cache, large enough to fill a GPU.
_BLOCK_ELEMENTS = {"cpu": 2**18, "other": 2**26}
# Tokens whose logits the fused loss holds at a time.
_CHUNK_TOKENS = {"cpu": 256, "other": 1024}


def kl_divergence(
    logits: Tensor, x_0: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel
) -> Tensor:
    """Divergence of one reverse step, D_KL(q(z_s | z_t, x_0) || p_theta(z_s | z_t)), Eqs. 12, 13.

    Args:
        logits: Network output, (B, L, N), float of any dtype. Not modified.
        x_0: Clean ids, (B, L).
        z_t: Noisy ids, (B, L), drawn from q(z_t | x_0).
        alpha_s, alpha_t: Signal rates, (B,) or (B, 1), 0 <= alpha_t <= alpha_s <= 1.
        kernel: The noise kernel.

    Returns:
        Nats per token, (B, L), float64 for float64 logits and float32 otherwise; differentiable in `logits`.

    Raises:
        ValueError: If some alpha_s < alpha_t, a rate leaves [0, 1], an id is not in [0, N), or shapes disagree.

    Source: Lemma 3.4. k = 0 gives Eq. 17.
    """
    alpha_s, alpha_t = check_step(logits, z_t, alpha_s, alpha_t, kernel)
    _check_targets(x_0, z_t, kernel)
    return _dense_loss(logits, _finite_step_terms(x_0, z_t, alpha_s, alpha_t, kernel), kernel)


def diffusion_loss(
    logits: Tensor, x_0: Tensor, z_t: Tensor, alpha_t: Tensor, d_alpha_t: Tensor, kernel: NoiseKernel
) -> Tensor:
    """Integrand of the continuous-time bound, Eq. 15: its mean over t ~ U(0, 1) and z_t is the NELBO per token.

        loss = -alpha'_t r(z_t) / f_t(x, z_t) * h_t(x, z_t, p)

    Args:
        logits: Network output, (B, L, N), float of any dtype. Not modified.
        x_0: Clean ids, (B, L).
        z_t: Noisy ids, (B, L), drawn from q(z_t | x_0).
        alpha_t: Signal rates, (B,) or (B, 1), in [0, 1].
        d_alpha_t: Slopes alpha'_t, (B,) or (B, 1), not positive.
        kernel: The noise kernel.

    Returns:
        Nats per token, (B, L), float64 for float64 logits and float32 otherwise; differentiable in `logits`.

    Raises:
        ValueError: If a rate leaves [0, 1], a slope is positive, an id is not in [0, N), or shapes disagree.

    Source: Eqs. 14, 15. k = 0 is the MDLM loss (Eq. 17), k = 1 the UDLM loss (Eq. 19 with its signs corrected).
    """
    check_shapes(logits, z_t, kernel)
    terms = _limit_terms(x_0, z_t, alpha_t, d_alpha_t, kernel)
    return _dense_loss(logits, terms, kernel)


def fused_linear_diffusion_loss(
    hidden: Tensor,
    weight: Tensor,
    x_0: Tensor,
    z_t: Tensor,
    alpha_t: Tensor,
    d_alpha_t: Tensor,
    kernel: NoiseKernel,
    token_weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`diffusion_loss(hidden @ weight.T, ...)` without the logits of more than `chunk_size` tokens at a time.

    Gradients are formed in the forward pass, chunk by chunk, so the logits exist once and are never stored.

    Args:
        hidden: Last hidden states, (B, L, D).
        weight: Output layer without bias, (N, D).
        x_0, z_t, alpha_t, d_alpha_t, kernel: As in `diffusion_loss`.
        token_weights: Weight of each token in the sum, (B, L); default 1 for all.
        chunk_size: Tokens per chunk; default 256 on a CPU, 1024 on a GPU.

    Returns:
        `(total, per_token)`: the scalar sum of token_weights * loss, which carries the gradient to `hidden` and
        `weight`, and the unweighted losses in nats, (B, L), detached. float64 for float64 `hidden`, else float32.

    Raises:
        ValueError: As `diffusion_loss`, or if `weight`, `token_weights` or `chunk_size` do not fit.
    """
    if hidden.ndim != 3 or tuple(hidden.shape[:2]) != tuple(x_0.shape) or hidden.shape[0] == 0:
        raise ValueError(f"hidden of shape {tuple(hidden.shape)} must be (B, L, D) for ids {tuple(x_0.shape)}.")
    if tuple(weight.shape) != (kernel.vocab_size, hidden.shape[-1]):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} must be (N, D) = ({kernel.vocab_size}, {hidden.shape[-1]})."
        )
    if chunk_size is None:
        chunk_size = _per_device(_CHUNK_TOKENS, hidden)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be positive.")
    if token_weights is None:
        token_weights = torch.ones(x_0.shape, dtype=torch.float64, device=hidden.device)
    if tuple(token_weights.shape) != tuple(x_0.shape):
        raise ValueError(f"token_weights of shape {tuple(token_weights.shape)} must be {tuple(x_0.shape)}.")
    terms = _limit_terms(x_0, z_t, alpha_t, d_alpha_t, kernel)
    total, per_token = _FusedLinearLoss.apply(
        hidden, weight, terms, token_weights.detach().double().reshape(-1), kernel, chunk_size
    )
    return total, per_token.reshape(x_0.shape)


# --------------------------------------------------------------------------------------------------------------------
# Scalars of one token: everything but p


@dataclass(frozen=True)
class _TokenTerms:
    """What the formula needs of each token besides the logits; ids (B*L,) int64, the rest (B*L,) float64."""

    x_0: Tensor
    z_t: Tensor
    scale: Tensor  # factor before the braces: B alpha_s, or -alpha'_t r(z)/f_t(x,z)
    step: Tensor  # B = b_ts r(z)/f_t(x,z), the probability under q of not staying; 0 in the limit
    stay: Tensor  # (1 - B)/f(x,z), which is a_ts/f_t(x,z)
    alpha: Tensor
    r_z: Tensor
    r_0: Tensor

    def rows(self, start: int, stop: int) -> "_TokenTerms":
        return _TokenTerms(**{name: value[start:stop] for name, value in vars(self).items()})


def _finite_step_terms(
    x_0: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel
) -> _TokenTerms:
    """Scalars of Eqs. 12, 13: rates at s, scale B alpha_s with B = b_ts r(z_t) / f_t(x, z_t)."""
    alpha_s, alpha_t = alpha_s.double(), alpha_t.double()
    r_z = kernel._rate(z_t, torch.float64)
    b_ts = torch.where(alpha_s > alpha_t, (alpha_s - alpha_t) / alpha_s.clamp_min(1e-300), 0.0)
    f_t = _f(alpha_t, (z_t == x_0).double(), r_z)
    step = torch.where(b_ts * r_z > 0, b_ts * r_z / f_t, 0.0)
    return _token_terms(x_0, z_t, step * alpha_s, step, (1 - b_ts) / f_t, alpha_s, kernel)


def _limit_terms(
    x_0: Tensor, z_t: Tensor, alpha_t: Tensor, d_alpha_t: Tensor, kernel: NoiseKernel
) -> _TokenTerms:
    """Validated scalars of Eqs. 14, 15: rates at t, scale -alpha'_t r(z_t) / f_t(x, z_t), B = 0."""
    _check_targets(x_0, z_t, kernel)
    validate_ids("z_t", z_t, kernel.vocab_size)
    alpha_t, d_alpha_t = as_column(alpha_t, z_t).double(), as_column(d_alpha_t, z_t).double()
    validate_rates(alpha_t=alpha_t)
    if (d_alpha_t > 0).any():
        raise ValueError(f"d_alpha_t holds {d_alpha_t.max().item():g}; a signal rate falls with t, so alpha'_t <= 0.")
    r_z = kernel._rate(z_t, torch.float64)
    f_t = _f(alpha_t, (z_t == x_0).double(), r_z)
    weight = torch.where(r_z > 0, r_z / f_t, 0.0)
    return _token_terms(x_0, z_t, -d_alpha_t * weight, torch.zeros_like(r_z), 1 / f_t, alpha_t, kernel)


def _token_terms(
    x_0: Tensor, z_t: Tensor, scale: Tensor, step: Tensor, stay: Tensor, alpha: Tensor, kernel: NoiseKernel
) -> _TokenTerms:
    r_z, r_0 = (kernel._rate(ids, torch.float64) for ids in (z_t, x_0))
    values = (x_0, z_t, scale, step, stay, alpha, r_z, r_0)
    return _TokenTerms(*(value.expand(z_t.shape).reshape(-1) for value in values))


def _check_targets(x_0: Tensor, z_t: Tensor, kernel: NoiseKernel) -> None:
    if tuple(x_0.shape) != tuple(z_t.shape) or x_0.ndim != 2:
        raise ValueError(f"x_0 {tuple(x_0.shape)} and z_t {tuple(z_t.shape)} must both be (B, L).")
    validate_ids("x_0", x_0, kernel.vocab_size)


def _f(alpha: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """f_t(x, e) = alpha_t x_e + beta_t r(e), Eq. 10."""
    return alpha * p + (1 - alpha) * r


def _rho(y: Tensor, log_1_plus_y: Tensor | None = None) -> Tensor:
    """rho(y) = 1 - log(1 + y)/y for y > -1, with rho(0) = 0 and rho(inf) = 1; the series takes over near 0."""
    small = y.abs() < _SERIES_BELOW
    y_large = torch.where(small, 1.0, y).clamp_max(1e300)
    log = torch.log1p(y_large) if log_1_plus_y is None else log_1_plus_y
    return torch.where(small, _rho_series(torch.where(small, y, 0.0)), 1 - log / y_large)


def _rho_series(y: Tensor) -> Tensor:
    """y/2 - y^2/3 + y^3/4 - ...: below 1e-2 the eighth term is under 1e-16 of the first."""
    total = torch.zeros_like(y)
    for n in range(9, 1, -1):
        total = (1 / n - total) * y
    return total


# --------------------------------------------------------------------------------------------------------------------
# One block of rows: the formula and its gradient


@dataclass(frozen=True)
class _RowState:
    """p of a row block, unnormalised, and what loss and gradient share; `exp` is (M, N), the rest (M,) float64."""

    exp: Tensor  # exp(logit - max), absorbing rows 0: p = exp / total
    total: Tensor
    p_z: Tensor
    log_p_0: Tensor
    f_x_z: Tensor  # f(x, z)
    f_p_z: Tensor  # f(p, z), 1 where the token has no loss
    f_p_0: Tensor  # f(p, x_0)
    w: Tensor


def _row_state(logits: Tensor, terms: _TokenTerms, kernel: NoiseKernel) -> _RowState:
    """Read one block of logits, (M, N). `logits` is overwritten when it is float32 or float64 already."""
    for token_id in kernel.absorbing_ids:
        logits[:, token_id] = -torch.inf
    top = logits.amax(-1, keepdim=True)
    log_0 = (logits.gather(-1, terms.x_0[:, None]) - top).squeeze(-1).double()
    log_z = (logits.gather(-1, terms.z_t[:, None]) - top).squeeze(-1).double()
    exp = logits.sub_(top).exp_()
    total = exp.sum(-1).double()
    log_p_0 = log_0 - total.log()
    p_z = log_z.exp() / total

    has_loss = terms.scale > 0
    x_z = (terms.z_t == terms.x_0).double()
    f_x_z = torch.where(has_loss, _f(terms.alpha, x_z, terms.r_z), 1.0)
    f_p_z = torch.where(has_loss, _f(terms.alpha, p_z, terms.r_z), 1.0)
    f_p_0 = _f(terms.alpha, log_p_0.exp(), terms.r_0)
    w = torch.where(x_z == p_z, 0.0, (x_z - p_z) / f_p_z)
    return _RowState(exp, total, p_z, log_p_0, f_x_z, f_p_z, f_p_0, w)


def _row_losses(state: _RowState, terms: _TokenTerms, kernel: NoiseKernel, buffer: Tensor) -> Tensor:
    """Losses of one block, (M,) float64; `buffer` is (M, N) scratch."""
    u_0 = (1 - terms.alpha) * terms.r_0
    # log f(x,x_0)/f(p,x_0) = log1p(alpha (1 - p_0) / f(p,x_0)); at u_0 = 0 it is -log p_0, also where p_0 underflows.
    gain = terms.alpha * -torch.expm1(state.log_p_0) / torch.where(u_0 > 0, state.f_p_0, 1.0)
    ratio = torch.where(u_0 > 0, torch.log1p(gain), -state.log_p_0)
    peak = _rho(torch.where(u_0 > 0, terms.alpha / u_0, torch.inf))
    entropy_gap = _vocabulary_sum(state, terms, kernel, buffer) - peak
    # A token that cannot change (r(z) = 0: unmasked at k = 0) has no loss, whatever its probability.
    return torch.where(terms.scale > 0, terms.scale * (_stay_gap(state, terms) + ratio + entropy_gap), 0.0)


def _stay_gap(state: _RowState, terms: _TokenTerms) -> Tensor:
    """T = w [rho(alpha w) - rho(B alpha w)], (M,): what p gets wrong about staying at z."""
    y, step_y = terms.alpha * state.w, terms.step * terms.alpha * state.w
    # 1 + alpha w = f(x,z)/f(p,z); formed from w it would cancel where p is sure of a wrong z. At s = 0 it is 1/p_0 for
    # z = x_0, also where p_0 underflows.
    log_ratio = torch.where(state.f_p_z > 0, (state.f_x_z / state.f_p_z).log(), -state.log_p_0)
    gap = state.w * (_rho(y, log_ratio) - _rho(step_y))
    # Where p is sure of a wrong z and q all but certainly leaves, both rho diverge together; where p all but excludes a
    # z that may well be x_0, both tend to 1. There the same T from f_t(p,z)/f_t(x,z).
    stays = terms.stay * state.f_x_z
    log_ratio_t = -(terms.stay * state.f_p_z + terms.step).log()
    other = (torch.where(stays > 0, stays * log_ratio, 0.0) - log_ratio_t) / (terms.alpha * terms.step)
    return torch.where(((y < -0.5) & (terms.step > 0.5)) | (step_y > 1), other, gap)


def _amplification(terms: _TokenTerms, kernel: NoiseKernel) -> Tensor:
    """alpha / u with u = beta k / N, (M,), capped so that 0 * inf cannot arise in float32."""
    u = (1 - terms.alpha) * (kernel.mixing_ratio / kernel.vocab_size)
    return (terms.alpha / u).clamp_max(1e30)


def _vocabulary_sum(state: _RowState, terms: _TokenTerms, kernel: NoiseKernel, buffer: Tensor) -> Tensor:
    """sum_{e not special} p_e rho(alpha p_e / u), (M,) float64; 1 at u = 0."""
    if kernel.mixing_ratio == 0:
        return torch.ones_like(state.total)
    a = _amplification(terms, kernel)
    torch.mul(state.exp, _column(a / state.total, state.exp), out=buffer)
    # sum p - sum log1p(a p)/a, where sum p = 1 by construction: `total` is the very sum of `exp`.
    plain = 1 - buffer.log1p_().sum(-1).double() / a
    near_zero = a < _SERIES_BELOW
    if not near_zero.any():
        return plain
    torch.mul(state.exp, _column(a / state.total, state.exp), out=buffer)
    series = (_rho_series(buffer.clamp_(max=_SERIES_BELOW)) * state.exp).sum(-1).double() / state.total
    return torch.where(near_zero, series, plain)


def _row_gradients(
    state: _RowState, terms: _TokenTerms, kernel: NoiseKernel, row_weights: Tensor, buffer: Tensor
) -> Tensor:
    """d(sum of row_weights * loss)/d logits of one block, (M, N); overwrites `state.exp` and returns it.

        dloss/dp_e     = scale { y_e/(1 + y_e) + [e = z] S_z + [e = x_0] S_0 },  y_e = alpha p_e / u
        dloss/dlogit_e = p_e (dloss/dp_e - sum_j p_j dloss/dp_j)

    up to a constant in the first line, which the second removes. S_0 = -alpha/f(p, x_0), and S_z is dT/dp_z of
    T = w [rho(alpha w) - rho(B alpha w)].
    """
    p = state.exp.mul_(_column(1 / state.total, state.exp))
    if kernel.mixing_ratio == 0:
        buffer.fill_(1.0)
        mean = torch.ones_like(state.total)
    else:
        torch.mul(p, _column(_amplification(terms, kernel), p), out=buffer)
        buffer.div_(1 + buffer)
        mean = torch.linalg.vecdot(buffer, p).double()

    s_z = -terms.alpha * state.w * terms.stay / (terms.stay * state.f_p_z + terms.step)
    p_s_z = torch.where(state.p_z > 0, state.p_z * s_z, 0.0)
    # alpha p_0 / f(p, x_0) tends to 1, not 0/0, where u_0 = 0 and p_0 underflows.
    u_0 = (1 - terms.alpha) * terms.r_0
    p_0 = state.log_p_0.exp()
    p_s_0 = -torch.where(u_0 > 0, terms.alpha * p_0 / torch.where(u_0 > 0, state.f_p_0, 1.0), 1.0)
    mean = mean + p_s_z + p_s_0

    gradient = buffer.sub_(_column(mean, p)).mul_(p)
    gradient.scatter_add_(-1, terms.z_t[:, None], _column(p_s_z, p))
    gradient.scatter_add_(-1, terms.x_0[:, None], _column(p_s_0, p))
    scale = torch.where(terms.scale > 0, terms.scale * row_weights, 0.0)
    gradient.mul_(_column(scale, p))
    gradient.masked_fill_(_column(scale, p) == 0, 0.0)
    for token_id in kernel.absorbing_ids:
        gradient[:, token_id] = 0.0
    return gradient


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype)[:, None]


# --------------------------------------------------------------------------------------------------------------------
# Whole tensors: logits given, and head fused in


def _dense_loss(logits: Tensor, terms: _TokenTerms, kernel: NoiseKernel) -> Tensor:
    per_token = _DiffusionLoss.apply(logits.reshape(-1, logits.shape[-1]), terms, kernel)
    return per_token.reshape(logits.shape[:-1])


class _DiffusionLoss(torch.autograd.Function):
    """Losses (M,) of logits (M, N). Saves the logits alone; the backward pass reads them again, block by block."""

    @staticmethod
    def forward(ctx, logits: Tensor, terms: _TokenTerms, kernel: NoiseKernel) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.terms, ctx.kernel = terms, kernel
        losses = torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device)
        for start, stop, block, buffer in _row_blocks(logits):
            rows = terms.rows(start, stop)
            losses[start:stop] = _row_losses(_row_state(block, rows, kernel), rows, kernel, buffer)
        return losses.to(_work_dtype(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses: Tensor):
        (logits,) = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for start, stop, block, buffer in _row_blocks(logits):
            rows = ctx.terms.rows(start, stop)
            state = _row_state(block, rows, ctx.kernel)
            gradient[start:stop] = _row_gradients(
                state, rows, ctx.kernel, grad_losses[start:stop].double(), buffer
            )
        return gradient, None, None


class _FusedLinearLoss(torch.autograd.Function):
    """Weighted sum and losses of hidden (B, L, D) through the head (N, D); gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, terms: _TokenTerms, token_weights: Tensor, kernel: NoiseKernel, chunk_size: int):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        flat = hidden.reshape(-1, hidden.shape[-1])
        grad_hidden = torch.empty_like(flat) if need_hidden else None
        # Summed over chunks in float32: in bfloat16 the small late contributions would vanish.
        grad_weight = torch.zeros_like(weight, dtype=_work_dtype(weight)) if need_weight else None
        losses = torch.empty(flat.shape[0], dtype=torch.float64, device=hidden.device)
        for start in range(0, flat.shape[0], chunk_size):
            stop = min(start + chunk_size, flat.shape[0])
            tokens = flat[start:stop]
            logits = tokens @ weight.T
            for first, last, block, buffer in _row_blocks(logits):
                rows = terms.rows(start + first, start + last)
                state = _row_state(block, rows, kernel)
                losses[start + first : start + last] = _row_losses(state, rows, kernel, buffer)
                if need_hidden or need_weight:
                    row_weights = token_weights[start + first : start + last]
                    # The block's logits have been read for the last time: their gradient takes their place.
                    logits[first:last] = _row_gradients(state, rows, kernel, row_weights, buffer)
            if need_hidden:
                grad_hidden[start:stop] = logits @ weight
            if need_weight:
                grad_weight += logits.T @ tokens
        ctx.grad_hidden = grad_hidden.reshape(hidden.shape) if need_hidden else None
        ctx.grad_weight = grad_weight.to(weight.dtype) if need_weight else None
        per_token = losses.to(_work_dtype(hidden))
        ctx.mark_non_differentiable(per_token)
        return (token_weights * losses).sum().to(_work_dtype(hidden)), per_token

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor, _):
        scaled = (None if g is None else g * grad_total.to(g.dtype) for g in (ctx.grad_hidden, ctx.grad_weight))
        return (*scaled, None, None, None, None)


def _row_blocks(logits: Tensor):
    """Yield (start, stop, block, buffer): a float32-or-wider scratch copy of rows [start, stop) and scratch like it."""
    rows = max(1, math.ceil(_per_device(_BLOCK_ELEMENTS, logits) / logits.shape[-1]))
    rows = max(1, min(rows, logits.shape[0]))
    scratch = torch.empty(2, rows, logits.shape[-1], dtype=_work_dtype(logits), device=logits.device)
    for start in range(0, logits.shape[0], rows):
        stop = min(start + rows, logits.shape[0])
        block, buffer = scratch[:, : stop - start]
        yield start, stop, block.copy_(logits[start:stop]), buffer


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_device(table: dict[str, int], x: Tensor) -> int:
    return table["cpu" if x.device.type == "cpu" else "other"]
