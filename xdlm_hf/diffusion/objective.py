"""The finite-step divergence and its continuous-time limit, from a few numbers per token (Eqs. 12-15).

t = 0 is clean, t = 1 is noise, s < t. Losses are in nats per token. Shapes: B batch, L length, N vocabulary, M tokens.

Both losses are one formula. With phi(y) = y - log(1 + y) and rho(y) = phi(y) / y, all terms that cancel in the printed
form become values of rho, which is accurate near 0 (derivation: docs/equations.md):

    w = (x_z - p_z) / f(p, z),   u = beta k / N,   u_0 = beta r(x_0),   B = b_ts r(z_t) / f_t(x, z_t)
    H = log[f(x, x_0) / f(p, x_0)] + sum_{e not special} p_e rho(alpha p_e / u) - rho(alpha / u_0)

    Eqs. 12, 13, everything at s:    KL   = B alpha_s              { w [rho(alpha w) - rho(B alpha w)] + H }
    Eqs. 14, 15, everything at t:    loss = -alpha'_t r(z)/f_t(x,z) { w  rho(alpha w)                   + H }

so the limit is the first line with B = 0 inside the braces. `TokenTerms` holds the noise terms of each token,
`LogitStatistics` six numbers computed from p = softmax(logits); all of them are float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import as_column, check_targets, validate_ids, validate_rates
from .noise import NoiseKernel, beta_ts

# Below this, rho is computed by its series: 1 - log1p(y)/y would lose half its digits.
_SERIES_BELOW = 1e-2


class PerToken:
    """A dataclass of tensors with one entry, or one row, per token."""

    def rows(self, rows: slice | Tensor):
        return type(self)(**{name: value[rows] for name, value in vars(self).items()})

    @classmethod
    def joined(cls, parts: list):
        return cls(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class TokenTerms(PerToken):
    """Noise terms of each token; ids (M,) int64, the rest (M,) float64.

    f(x, e) = alpha x_e + b(e), with noise b that is one value u for all ordinary tokens.
    """

    x_0: Tensor
    z_t: Tensor
    scale: Tensor  # factor before the braces: B alpha_s, or the rate alpha_t R_t(z)/f_t(x,z) of jumps into z
    step: Tensor  # B = b_ts(z)/f_t(x,z), the probability under q of not staying; 0 in the limit
    stay: Tensor  # (1 - B)/f(x,z), which is a_ts/f_t(x,z)
    alpha: Tensor
    b_z: Tensor
    b_0: Tensor
    u: Tensor


def finite_step_terms(x_0: Tensor, z_t: Tensor, alpha_s: Tensor, alpha_t: Tensor, kernel: NoiseKernel) -> TokenTerms:
    """Scalars of Eqs. 12, 13: rates at s, scale B alpha_s with B = b_ts r(z_t) / f_t(x, z_t)."""
    alpha_s, alpha_t = alpha_s.double(), alpha_t.double()
    r_z = kernel._rate(z_t, torch.float64)
    b_ts = beta_ts(alpha_s, alpha_t)
    f_t = _f(alpha_t, (z_t == x_0).double(), (1 - alpha_t) * r_z)
    step = torch.where(b_ts * r_z > 0, b_ts * r_z / f_t, 0.0)
    return _stationary_terms(x_0, z_t, step * alpha_s, step, (1 - b_ts) / f_t, alpha_s, kernel)


def limit_terms(x_0: Tensor, z_t: Tensor, alpha_t: Tensor, d_alpha_t: Tensor, kernel: NoiseKernel) -> TokenTerms:
    """Validated scalars of Eqs. 14, 15: rates at t, scale -alpha'_t r(z_t) / f_t(x, z_t), B = 0."""
    check_targets(x_0, z_t, kernel.vocab_size)
    validate_ids("z_t", z_t, kernel.vocab_size)
    alpha_t, d_alpha_t = as_column(alpha_t, z_t).double(), as_column(d_alpha_t, z_t).double()
    validate_rates(alpha_t=alpha_t)
    rising = ~(d_alpha_t <= 0)  # so that NaN is refused too
    if rising.any():
        raise ValueError(f"d_alpha_t holds {d_alpha_t[rising][0].item():g}; a signal rate falls: alpha'_t <= 0.")
    r_z = kernel._rate(z_t, torch.float64)
    f_t = _f(alpha_t, (z_t == x_0).double(), (1 - alpha_t) * r_z)
    weight = torch.where(r_z > 0, r_z / f_t, 0.0)
    return _stationary_terms(x_0, z_t, -d_alpha_t * weight, torch.zeros_like(r_z), 1 / f_t, alpha_t, kernel)


def _stationary_terms(
    x_0: Tensor, z_t: Tensor, scale: Tensor, step: Tensor, stay: Tensor, alpha: Tensor, kernel: NoiseKernel
) -> TokenTerms:
    """Terms where the noise is beta r, r being the kernel's distribution (Eq. 10)."""
    b_z, b_0 = ((1 - alpha) * kernel._rate(ids, torch.float64) for ids in (z_t, x_0))
    u = (1 - alpha) * (kernel.mixing_ratio / kernel.vocab_size)
    values = (x_0, z_t, scale, step, stay, alpha, b_z, b_0, u)
    return TokenTerms(*(value.expand(z_t.shape).reshape(-1) for value in values))


def _f(alpha: Tensor, p: Tensor, b: Tensor) -> Tensor:
    """f_t(x, e) = alpha_t x_e + b_t(e), with b_t = beta_t r for a stationary kernel: Eq. 10."""
    return alpha * p + b


def rho(y: Tensor, log_1_plus_y: Tensor | None = None) -> Tensor:
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


@dataclass(frozen=True)
class LogitStatistics(PerToken):
    """Statistics of the logits of each token, (M,) float64; undefined for tokens without a loss."""

    top: Tensor  # largest logit
    total: Tensor  # sum of exp(logit - top): p = exp(logit - top) / total
    log_p_0: Tensor
    p_z: Tensor
    rho: Tensor  # sum_{e not special} p_e rho(y_e), y_e = alpha p_e / u
    share: Tensor  # sum_{e not special} p_e y_e / (1 + y_e); only where a gradient is wanted


@dataclass(frozen=True)
class _TokenState:
    """f(x, .) and f(p, .) at z_t and x_0, each (M,) float64."""

    log_p_0: Tensor
    f_x_z: Tensor  # f(x, z)
    f_p_z: Tensor  # f(p, z)
    f_p_0: Tensor  # f(p, x_0)
    w: Tensor


def token_state(statistics: LogitStatistics, terms: TokenTerms) -> _TokenState:
    x_z = (terms.z_t == terms.x_0).double()
    f_x_z, f_p_z = _f(terms.alpha, x_z, terms.b_z), _f(terms.alpha, statistics.p_z, terms.b_z)
    f_p_0 = _f(terms.alpha, statistics.log_p_0.exp(), terms.b_0)
    w = torch.where(x_z == statistics.p_z, 0.0, (x_z - statistics.p_z) / f_p_z)
    return _TokenState(statistics.log_p_0, f_x_z, f_p_z, f_p_0, w)


def token_losses(statistics: LogitStatistics, terms: TokenTerms) -> Tensor:
    """Losses, (M,) float64."""
    state = token_state(statistics, terms)
    u_0 = terms.b_0
    # log f(x,x_0)/f(p,x_0) = log1p(alpha (1 - p_0) / f(p,x_0)); at u_0 = 0 it is -log p_0, also where p_0 underflows.
    gain = terms.alpha * -torch.expm1(state.log_p_0) / torch.where(u_0 > 0, state.f_p_0, 1.0)
    ratio = torch.where(u_0 > 0, torch.log1p(gain), -state.log_p_0)
    peak = rho(torch.where(u_0 > 0, terms.alpha / u_0, torch.inf))
    braces = _stay_term(state, terms) + ratio + statistics.rho - peak
    # A token that cannot change (r(z) = 0: unmasked at k = 0) has no loss, whatever its probability.
    return torch.where(terms.scale > 0, terms.scale * braces, 0.0)


def _stay_term(state: _TokenState, terms: TokenTerms) -> Tensor:
    """T = w [rho(alpha w) - rho(B alpha w)], (M,): the term of the divergence for staying at z."""
    y, step_y = terms.alpha * state.w, terms.step * terms.alpha * state.w
    # 1 + alpha w = f(x,z)/f(p,z); computed from w it would cancel as p(z) -> 1 for z != x_0. At s = 0 it is 1/p_0 for
    # z = x_0, also where p_0 underflows.
    log_ratio = torch.where(state.f_p_z > 0, (state.f_x_z / state.f_p_z).log(), -state.log_p_0)
    gap = state.w * (rho(y, log_ratio) - rho(step_y))
    # As p(z) -> 1 for z != x_0 and B -> 1, both rho diverge; as p(z) -> 0 for z = x_0, both tend to 1. In these two
    # regions T is computed from f_t(p,z)/f_t(x,z).
    stays = terms.stay * state.f_x_z
    log_ratio_t = -(terms.stay * state.f_p_z + terms.step).log()
    other = (torch.where(stays > 0, stays * log_ratio, 0.0) - log_ratio_t) / (terms.alpha * terms.step)
    return torch.where(((y < -0.5) & (terms.step > 0.5)) | (step_y > 1), other, gap)
