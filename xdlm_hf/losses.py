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
excluded when k < 1, alone. Six numbers a token say all that the loss needs of p (`_Reading`), and with them the
gradient is closed-form, row by row: the logits are read once for the loss and once for the gradient, a few rows at a
time through two scratch buffers, and nothing else of size N exists. Tokens without a loss are not read at all.

Per-token scalars are float64, passes over the vocabulary float32 (float64 for float64 logits), whatever the model's
dtype.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel import NoiseKernel, as_column, validate_ids, validate_rates
from .posterior import check_shapes, check_step

# Below this rho takes its series: 1 - log1p(y)/y has lost half its digits there.
_SERIES_BELOW = 1e-2
# Elements of one row block, for each CPU thread: two float32 buffers of that size stay in cache, or fill a GPU.
_BLOCK_ELEMENTS = {"cpu": 2**18, "other": 2**26}
# Tokens whose logits the fused loss holds at a time.
_CHUNK_TOKENS = {"cpu": 192, "other": 1024}


# The public functions run outside torch.compile's graphs, which would unroll their loops over blocks and chunks.
@torch.compiler.disable
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


@torch.compiler.disable
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


@torch.compiler.disable
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

    The logits of a chunk of tokens are made, read and dropped. In float32 the same pass adds the chunk's share to the
    gradients. A trained float16 or bfloat16 head would round its gradient at every chunk: there the backward pass
    makes the logits again, a slice of the vocabulary for all tokens at a time, so that each row is rounded once.

    Args:
        hidden: Last hidden states, (B, L, D).
        weight: Output layer without bias, (N, D).
        x_0, z_t, alpha_t, d_alpha_t, kernel: As in `diffusion_loss`.
        token_weights: Weight of each token in the sum, (B, L); default 1 for all.
        chunk_size: Tokens per chunk; default 192 on a CPU, 1024 on a GPU.

    Returns:
        `(total, per_token)`: the scalar sum of token_weights * loss, which carries the gradient to `hidden` and
        `weight`, and the unweighted losses in nats, (B, L), detached. float64 for float64 `hidden`, else float32.

    Raises:
        ValueError: As `diffusion_loss`, or if `weight`, its dtype, `token_weights` or `chunk_size` do not fit.

    Under autocast the product runs in autocast's dtype, as that of `torch.nn.functional.linear`.
    """
    if hidden.ndim != 3 or tuple(hidden.shape[:2]) != tuple(x_0.shape):
        raise ValueError(f"hidden of shape {tuple(hidden.shape)} must be (B, L, D) for ids {tuple(x_0.shape)}.")
    if tuple(weight.shape) != (kernel.vocab_size, hidden.shape[-1]):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} must be (N, D) = ({kernel.vocab_size}, {hidden.shape[-1]})."
        )
    hidden, weight = _as_autocast_would(hidden), _as_autocast_would(weight)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one, or run under autocast.")
    if chunk_size is None:
        chunk_size = _per_device(_CHUNK_TOKENS, hidden)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be positive.")
    if token_weights is None:
        token_weights = torch.ones(x_0.shape, dtype=torch.float64, device=hidden.device)
    if tuple(token_weights.shape) != tuple(x_0.shape):
        raise ValueError(f"token_weights of shape {tuple(token_weights.shape)} must be {tuple(x_0.shape)}.")
    terms = _limit_terms(x_0, z_t, alpha_t, d_alpha_t, kernel)
    tokens, token_weights = hidden.reshape(-1, hidden.shape[-1]), token_weights.detach().double().reshape(-1)
    scored = terms.scale > 0
    if not scored.all():  # at k = 0 the masked positions alone go through the output layer
        tokens, token_weights, terms = tokens[scored], token_weights[scored], terms.rows(scored)
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    objective = _Objective(terms, token_weights, kernel, chunk_size)
    total, losses = _FusedLinearLoss.apply(tokens, weight, objective, with_gradient)
    per_token = torch.zeros(scored.shape, dtype=losses.dtype, device=losses.device)
    per_token[scored] = losses
    return total, per_token.reshape(x_0.shape)


# --------------------------------------------------------------------------------------------------------------------
# Scalars of one token: everything but p


class _PerToken:
    """A dataclass of tensors with one entry, or one row, per token."""

    def rows(self, rows: slice | Tensor):
        return type(self)(**{name: value[rows] for name, value in vars(self).items()})

    @classmethod
    def joined(cls, parts: list):
        return cls(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class _TokenTerms(_PerToken):
    """What the formula needs of each token besides the logits; ids (M,) int64, the rest (M,) float64."""

    x_0: Tensor
    z_t: Tensor
    scale: Tensor  # factor before the braces: B alpha_s, or -alpha'_t r(z)/f_t(x,z)
    step: Tensor  # B = b_ts r(z)/f_t(x,z), the probability under q of not staying; 0 in the limit
    stay: Tensor  # (1 - B)/f(x,z), which is a_ts/f_t(x,z)
    alpha: Tensor
    r_z: Tensor
    r_0: Tensor


def _finite_step_terms(x_0: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel) -> _TokenTerms:
    """Scalars of Eqs. 12, 13: rates at s, scale B alpha_s with B = b_ts r(z_t) / f_t(x, z_t)."""
    alpha_s, alpha_t = alpha_s.double(), alpha_t.double()
    r_z = kernel._rate(z_t, torch.float64)
    b_ts = torch.where(alpha_s > alpha_t, (alpha_s - alpha_t) / alpha_s.clamp_min(1e-300), 0.0)
    f_t = _f(alpha_t, (z_t == x_0).double(), r_z)
    step = torch.where(b_ts * r_z > 0, b_ts * r_z / f_t, 0.0)
    return _token_terms(x_0, z_t, step * alpha_s, step, (1 - b_ts) / f_t, alpha_s, kernel)


def _limit_terms(x_0: Tensor, z_t: Tensor, alpha_t: Tensor, d_alpha_t: Tensor, kernel: NoiseKernel) -> _TokenTerms:
    """Validated scalars of Eqs. 14, 15: rates at t, scale -alpha'_t r(z_t) / f_t(x, z_t), B = 0."""
    _check_targets(x_0, z_t, kernel)
    validate_ids("z_t", z_t, kernel.vocab_size)
    alpha_t, d_alpha_t = as_column(alpha_t, z_t).double(), as_column(d_alpha_t, z_t).double()
    validate_rates(alpha_t=alpha_t)
    rising = ~(d_alpha_t <= 0)  # so that NaN is refused too
    if rising.any():
        raise ValueError(f"d_alpha_t holds {d_alpha_t[rising][0].item():g}; a signal rate falls: alpha'_t <= 0.")
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
    y_large = torch.where(small, 1.0, y).clamp_max(torch.finfo(y.dtype).max)
    log = torch.log1p(y_large) if log_1_plus_y is None else log_1_plus_y
    return torch.where(small, _rho_series(torch.where(small, y, 0.0)), 1 - log / y_large)


def _rho_series(y: Tensor) -> Tensor:
    """y/2 - y^2/3 + y^3/4 - ...: below 1e-2 the eighth term is under 1e-16 of the first."""
    total = torch.zeros_like(y)
    for n in range(9, 1, -1):
        total = (1 / n - total) * y
    return total


# --------------------------------------------------------------------------------------------------------------------
# Passes over the vocabulary: the logits are read here and nowhere else


@dataclass(frozen=True)
class _Reading(_PerToken):
    """What the formula needs of the logits, each (M,) float64; meaningless for tokens without a loss."""

    top: Tensor  # largest logit
    total: Tensor  # sum of exp(logit - top): p = exp(logit - top) / total
    log_p_0: Tensor
    p_z: Tensor
    rho: Tensor  # sum_{e not special} p_e rho(y_e), y_e = alpha p_e / u
    share: Tensor  # sum_{e not special} p_e y_e / (1 + y_e); only where a gradient is wanted


def _read_logits(logits: Tensor, terms: _TokenTerms, kernel: NoiseKernel, with_gradient: bool) -> _Reading:
    """One pass over the logits (M, N) of the tokens that have a loss, a second over those near t = 1.

    With exp = exp(logit - top), total its sum and floor = u / alpha: p = exp / total and y = p / floor. As sum p = 1,

        sum p rho(y) = 1 - floor sum log(1 + y),    sum p y/(1 + y) = 1 - floor sum y/(1 + y)

    Where y is small throughout, these differences cancel: such rows are summed term by term.
    """
    floor, scored = _floor(terms, kernel, logits), terms.scale > 0
    floor_column = floor.to(_work_dtype(logits))[:, None]
    sums = torch.ones(logits.shape[0], 4, dtype=floor_column.dtype, device=logits.device)
    for rows, exp, scratch in _row_blocks(logits, scored, kernel.absorbing_ids):
        top = exp.amax(-1, keepdim=True)
        total = _exp_from_top(exp, top).sum(-1, keepdim=True)
        logs, shares = total, total
        if kernel.mixing_ratio > 0:
            y = exp.mul_((floor_column[rows] * total).reciprocal_())
            logs, shares = _vocabulary_sums(y, scratch, with_gradient)
        sums[rows] = torch.cat((top, total, logs, shares), -1)
    top, total, logs, shares = sums.double().unbind(-1)
    rho, share = 1 - floor * logs, 1 - floor * shares

    faint = scored & (floor * max(64, logits.shape[-1] / 16) > 1)
    for rows, exp, _ in _row_blocks(logits, faint, kernel.absorbing_ids):
        y = _exp_from_top(exp, sums[rows, :1]) / (floor_column[rows] * sums[rows, 1:2])
        rho[rows] = (exp * _rho(y)).sum(-1).double() / total[rows]
        share[rows] = (exp * (y / (1 + y))).sum(-1).double() / total[rows]
    log_p_0, log_p_z = (_log_p(logits, ids, top + total.log(), kernel) for ids in (terms.x_0, terms.z_t))
    return _Reading(top, total, log_p_0, log_p_z.exp(), rho, share)


def _vocabulary_sums(y: Tensor, scratch: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """sum log(1 + y) and sum y/(1 + y), (M, 1) each, of a block of even width; overwrites both buffers.

    One logarithm, of a product, serves two tokens: y <= 1e18 keeps the product within float32.
    """
    f, half = torch.add(y, 1.0, out=scratch if with_gradient else y), y.shape[-1] // 2
    shares = y.div_(f).sum(-1, keepdim=True) if with_gradient else y[:, :1]
    logs = f[:, :half].mul_(f[:, half:]).log_().sum(-1, keepdim=True)
    return logs, shares


def _exp_from_top(logits: Tensor, top: Tensor, exact_zero: bool = False) -> Tensor:
    """exp(logits - top) in place, no less than 1e-26, or 0 there.

    Sums do not feel the difference. A CPU takes a hundred times as long for numbers that leave float32's normal range.
    """
    exp = logits.sub_(top).clamp_min_(-60.0).exp_()
    return torch.threshold_(exp, 1e-26, 0.0) if exact_zero else exp


def _log_p(logits: Tensor, ids: Tensor, log_total: Tensor, kernel: NoiseKernel) -> Tensor:
    log_p = logits.gather(-1, ids[:, None]).squeeze(-1).double() - log_total
    for token_id in kernel.absorbing_ids:
        log_p[ids == token_id] = -torch.inf
    return log_p


@dataclass(frozen=True)
class _GradientTerms(_PerToken):
    """dloss/dlogit_e = factor exp (exp / (exp + t) - mean), but at z_t and x_0; exp = exp(logit - top)."""

    top: Tensor  # this and the next three: (M, 1) in the working dtype
    t: Tensor
    mean: Tensor
    factor: Tensor
    z_t: Tensor  # this and the rest: (M,)
    x_0: Tensor
    at_z: Tensor  # the gradient at z_t, 0 if that is x_0; float64
    at_0: Tensor
    active: Tensor  # tokens that have a gradient, bool


def _row_gradients(logits: Tensor, out: Tensor, terms: _GradientTerms, kernel: NoiseKernel, first: int = 0) -> None:
    """Write the gradient of the logits (M, n) of tokens [first, first + n) to `out`, which may be `logits` itself.

    Its entries at z_t and x_0 are for `_set_peaks`.
    """
    width = logits.shape[-1]
    if not terms.active.all():
        out[~terms.active] = 0.0
    absorbing = [i - first for i in kernel.absorbing_ids if first <= i < first + width]
    in_place = out.dtype == _work_dtype(out) and bool(terms.active.all())
    for rows, exp, f in _row_blocks(logits, terms.active, absorbing, out if in_place else None):
        _exp_from_top(exp, terms.top[rows], exact_zero=True)
        if kernel.mixing_ratio > 0:
            f = f[:, : exp.shape[-1]]
            torch.div(exp, torch.add(exp, terms.t[rows], out=f), out=f)
            exp.mul_(f.sub_(terms.mean[rows])).mul_(terms.factor[rows])
        else:
            exp.mul_((1 - terms.mean[rows]) * terms.factor[rows])
        if not in_place:
            out[rows] = exp[:, :width] if isinstance(rows, slice) else exp[:, :width].to(out.dtype)


def _set_peaks(out: Tensor, terms: _GradientTerms, first: int = 0, to_zero: bool = False) -> None:
    """Set the entries at z_t and x_0 of a gradient that `_row_gradients` wrote."""
    for ids, value in ((terms.z_t, terms.at_z), (terms.x_0, terms.at_0)):
        inside = ((ids >= first) & (ids < first + out.shape[-1])).nonzero().squeeze(-1)
        # Not scatter_, which costs as much as a pass over `out` in bfloat16.
        out[inside, ids[inside] - first] = 0.0 if to_zero else value[inside].to(out.dtype)


def _add_peaks(grad_hidden: Tensor, weight: Tensor, terms: _GradientTerms) -> None:
    """Add what the entries at z_t and x_0 contribute to the gradient of the hidden states, (M, D), float32 or wider."""
    for ids, value in ((terms.z_t, terms.at_z), (terms.x_0, terms.at_0)):
        grad_hidden.addcmul_(value[:, None].to(grad_hidden.dtype), weight[ids].to(grad_hidden.dtype))


def _floor(terms: _TokenTerms, kernel: NoiseKernel, logits: Tensor) -> Tensor:
    """u / alpha with u = beta k / N, (M,): f(p, e) = alpha (p_e + floor). Kept above 0, so that 0/0 cannot arise."""
    u = (1 - terms.alpha) * (kernel.mixing_ratio / kernel.vocab_size)
    return torch.where(u > 0, u / terms.alpha, 0.0).clamp_min(1e-100 if logits.dtype == torch.float64 else 1e-18)


def _row_blocks(
    logits: Tensor, active: Tensor, absorbing: Sequence[int], out: Tensor | None = None
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Yield (rows, block, scratch): the active rows, some at a time, as slice or indices, and two buffers.

    `block` is a float32-or-wider copy of those rows with -inf in absorbing columns and in the one that makes the width
    even; or these very rows of `out`, if given: then all must be active.
    """
    index = None if active.all() else active.nonzero().squeeze(-1)
    count, width = logits.shape[0] if index is None else len(index), logits.shape[-1]
    threads = torch.get_num_threads() if logits.device.type == "cpu" else 1
    size = max(1, min(count, threads * _per_device(_BLOCK_ELEMENTS, logits) // width))
    buffers = torch.empty(2, size, width + width % 2, dtype=_work_dtype(logits), device=logits.device)
    for start in range(0, count, size):
        stop = min(start + size, count)
        rows = slice(start, stop) if index is None else index[start:stop]
        block, scratch = buffers[:, : stop - start]
        block = block if out is None else out[rows]
        if out is not logits:
            block[:, :width] = logits[rows]
        for column in (*absorbing, *range(width, block.shape[-1])):
            block[:, column] = -torch.inf
        yield rows, block, scratch


# --------------------------------------------------------------------------------------------------------------------
# The formula and its gradient


@dataclass(frozen=True)
class _TokenState:
    """Both predictions at z_t and x_0, each (M,) float64."""

    log_p_0: Tensor
    f_x_z: Tensor  # f(x, z)
    f_p_z: Tensor  # f(p, z)
    f_p_0: Tensor  # f(p, x_0)
    w: Tensor


def _token_state(reading: _Reading, terms: _TokenTerms) -> _TokenState:
    x_z = (terms.z_t == terms.x_0).double()
    f_x_z, f_p_z = _f(terms.alpha, x_z, terms.r_z), _f(terms.alpha, reading.p_z, terms.r_z)
    f_p_0 = _f(terms.alpha, reading.log_p_0.exp(), terms.r_0)
    w = torch.where(x_z == reading.p_z, 0.0, (x_z - reading.p_z) / f_p_z)
    return _TokenState(reading.log_p_0, f_x_z, f_p_z, f_p_0, w)


def _losses(reading: _Reading, terms: _TokenTerms) -> Tensor:
    """Losses, (M,) float64."""
    state = _token_state(reading, terms)
    u_0 = (1 - terms.alpha) * terms.r_0
    # log f(x,x_0)/f(p,x_0) = log1p(alpha (1 - p_0) / f(p,x_0)); at u_0 = 0 it is -log p_0, also where p_0 underflows.
    gain = terms.alpha * -torch.expm1(state.log_p_0) / torch.where(u_0 > 0, state.f_p_0, 1.0)
    ratio = torch.where(u_0 > 0, torch.log1p(gain), -state.log_p_0)
    peak = _rho(torch.where(u_0 > 0, terms.alpha / u_0, torch.inf))
    braces = _stay_gap(state, terms) + ratio + reading.rho - peak
    # A token that cannot change (r(z) = 0: unmasked at k = 0) has no loss, whatever its probability.
    return torch.where(terms.scale > 0, terms.scale * braces, 0.0)


def _stay_gap(state: _TokenState, terms: _TokenTerms) -> Tensor:
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


def _gradient_terms(
    reading: _Reading, terms: _TokenTerms, kernel: NoiseKernel, token_weights: Tensor, logits: Tensor
) -> _GradientTerms:
    """Gradient of the sum of token_weights * loss in the logits, but for the pass over the vocabulary.

        dloss/dp_e     = scale { y_e/(1 + y_e) + [e = z] S_z + [e = x_0] S_0 },  y_e = alpha p_e / u
        dloss/dlogit_e = p_e (dloss/dp_e - sum_j p_j dloss/dp_j)

    up to a constant in the first line, which the second removes. S_0 = -alpha/f(p, x_0), and S_z is dT/dp_z of
    T = w [rho(alpha w) - rho(B alpha w)]. At z and x_0 the second line is taken in float64.
    """
    state, floor = _token_state(reading, terms), _floor(terms, kernel, logits)
    s_z = -terms.alpha * state.w * terms.stay / (terms.stay * state.f_p_z + terms.step)
    p_s_z = torch.where(reading.p_z > 0, reading.p_z * s_z, 0.0)
    # alpha p_0 / f(p, x_0) tends to 1, not 0/0, where u_0 = 0 and p_0 underflows.
    u_0, p_0 = (1 - terms.alpha) * terms.r_0, state.log_p_0.exp()
    p_s_0 = -torch.where(u_0 > 0, terms.alpha * p_0 / torch.where(u_0 > 0, state.f_p_0, 1.0), 1.0)
    mean = reading.share + p_s_z + p_s_0

    same = terms.z_t == terms.x_0
    at_z = reading.p_z * (reading.p_z / (reading.p_z + floor) - mean) + p_s_z
    at_0 = p_0 * (p_0 / (p_0 + floor) - mean) + p_s_0 + torch.where(same, p_s_z, 0.0)
    weight = torch.where(terms.scale > 0, terms.scale * token_weights, 0.0)
    active = weight != 0
    columns = (reading.top, floor * reading.total, mean, weight / reading.total)
    columns = (column.to(_work_dtype(logits))[:, None] for column in columns)
    at_z, at_0 = torch.where(active & ~same, weight * at_z, 0.0), torch.where(active, weight * at_0, 0.0)
    return _GradientTerms(*columns, terms.z_t, terms.x_0, at_z, at_0, active)


# --------------------------------------------------------------------------------------------------------------------
# Whole tensors: logits given, and head fused in


def _dense_loss(logits: Tensor, terms: _TokenTerms, kernel: NoiseKernel) -> Tensor:
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    per_token = _DiffusionLoss.apply(logits.reshape(-1, logits.shape[-1]), terms, kernel, with_gradient)
    return per_token.reshape(logits.shape[:-1])


class _DiffusionLoss(torch.autograd.Function):
    """Losses (M,) of logits (M, N). Keeps the logits and six numbers a token; the backward pass reads them again."""

    @staticmethod
    def forward(ctx, logits: Tensor, terms: _TokenTerms, kernel: NoiseKernel, with_gradient: bool) -> Tensor:
        reading = _read_logits(logits, terms, kernel, with_gradient)
        ctx.save_for_backward(logits)
        ctx.reading, ctx.terms, ctx.kernel = reading, terms, kernel
        return _losses(reading, terms).to(_work_dtype(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses: Tensor):
        (logits,) = ctx.saved_tensors
        terms = _gradient_terms(ctx.reading, ctx.terms, ctx.kernel, grad_losses.double(), logits)
        gradient = torch.empty_like(logits)
        _row_gradients(logits, gradient, terms, ctx.kernel)
        _set_peaks(gradient, terms)
        return gradient, None, None, None


@dataclass(frozen=True)
class _Objective:
    """What the fused loss needs besides hidden states and head."""

    terms: _TokenTerms
    token_weights: Tensor  # (M,) float64
    kernel: NoiseKernel
    chunk_size: int


class _FusedLinearLoss(torch.autograd.Function):
    """Weighted sum and losses (M,) of hidden (M, D) through the head (N, D)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, objective: _Objective, with_gradient: bool):
        # Chunks may add up their shares of a gradient that is float32 or wider, and need not where none is added up.
        full_precision = weight.dtype in (torch.float32, torch.float64)
        ctx.by_chunks = full_precision or (weight.dtype == torch.bfloat16 and not ctx.needs_input_grad[1])
        ctx.save_for_backward(hidden, weight)
        ctx.dtype, ctx.objective = hidden.dtype, objective
        needed = ctx.needs_input_grad[:2] if with_gradient and ctx.by_chunks else (False, False)
        ctx.reading, *ctx.gradients = _by_chunks(hidden, weight, needed, with_gradient, objective)
        losses = _losses(ctx.reading, objective.terms)
        total, per_token = (x.to(_work_dtype(hidden)) for x in ((objective.token_weights * losses).sum(), losses))
        ctx.mark_non_differentiable(per_token)
        return total, per_token

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total: Tensor, _):
        needed = ctx.needs_input_grad[:2]
        if ctx.by_chunks:
            # Handed over and not copied, being as large as the head: a second backward pass makes them anew.
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                _, *gradients = _by_chunks(*ctx.saved_tensors, needed, True, ctx.objective)
            gradients = [gradient if gradient is None else gradient.mul_(grad_total) for gradient in gradients]
        else:
            gradients = _by_slices(*ctx.saved_tensors, needed, grad_total, ctx.reading, ctx.objective)
        return *(gradient if gradient is None else gradient.to(ctx.dtype) for gradient in gradients), None, None


def _by_chunks(
    hidden: Tensor, weight: Tensor, needed: tuple[bool, bool], with_gradient: bool, objective: _Objective
) -> tuple[_Reading, Tensor | None, Tensor | None]:
    """Reading of the logits hidden @ weight.T, and the gradients needed, from the logits of some tokens at a time."""
    tokens, kernel = hidden.shape[0], objective.kernel
    size = math.ceil(tokens / max(1, math.ceil(tokens / objective.chunk_size)))  # no small chunk is left over
    grad_hidden = torch.empty_like(hidden, dtype=_work_dtype(hidden)) if needed[0] else None
    grad_weight = torch.empty_like(weight) if needed[1] else None
    buffer, readings = hidden.new_empty(size, weight.shape[0]), []
    for start in range(0, max(1, tokens), max(1, size)):
        rows = slice(start, start + size)
        chunk, terms = hidden[rows], objective.terms.rows(rows)
        logits = torch.mm(chunk, weight.T, out=buffer[: chunk.shape[0]])
        readings.append(_read_logits(logits, terms, kernel, with_gradient))
        if any(needed):
            gradient_terms = _gradient_terms(readings[-1], terms, kernel, objective.token_weights[rows], logits)
            _row_gradients(logits, logits, gradient_terms, kernel)
        if grad_hidden is not None:
            _set_peaks(logits, gradient_terms, to_zero=True)
            grad_hidden[rows] = torch.mm(logits, weight)
            _add_peaks(grad_hidden[rows], weight, gradient_terms)
        if grad_weight is not None:
            _set_peaks(logits, gradient_terms)
            grad_weight.addmm_(logits.T, chunk, beta=int(start > 0))
    return _Reading.joined(readings), grad_hidden, grad_weight


def _by_slices(
    hidden: Tensor,
    weight: Tensor,
    needed: tuple[bool, bool],
    grad_total: Tensor,
    reading: _Reading,
    objective: _Objective,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients needed, from the logits of all tokens for a slice of the vocabulary at a time."""
    token_weights, kernel = objective.token_weights * grad_total.double(), objective.kernel
    gradient_terms = _gradient_terms(reading, objective.terms, kernel, token_weights, hidden)
    grad_hidden = torch.zeros_like(hidden, dtype=_work_dtype(hidden)) if needed[0] else None
    grad_weight = torch.empty_like(weight) if needed[1] else None
    # An eighth of a chunk, as it stands beside the gradient of the weight; products like multiples of 64.
    width = 64 * math.ceil(objective.chunk_size * weight.shape[0] / (8 * 64 * max(1, hidden.shape[0])))
    buffer = hidden.new_empty(min(width, weight.shape[0]) * hidden.shape[0])
    for first in range(0, weight.shape[0], width):
        part = weight[first : first + width]
        logits = buffer[: hidden.shape[0] * part.shape[0]].view(hidden.shape[0], part.shape[0])
        torch.mm(hidden, part.T, out=logits)
        _row_gradients(logits, logits, gradient_terms, kernel, first)
        if grad_hidden is not None:
            _set_peaks(logits, gradient_terms, first, to_zero=True)
            grad_hidden += torch.mm(logits, part)
        if grad_weight is not None:
            _set_peaks(logits, gradient_terms, first)
            torch.mm(logits.T, hidden, out=grad_weight[first : first + width])
    if grad_hidden is not None:
        _add_peaks(grad_hidden, weight, gradient_terms)
    return grad_hidden, grad_weight


def _as_autocast_would(x: Tensor) -> Tensor:
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if casts else x


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_device(table: dict[str, int], x: Tensor) -> int:
    return table["cpu" if x.device.type == "cpu" else "other"]
