"""GIDD: noise whose mixture of uniform and [MASK] changes with time, von Rütte et al., arXiv 2503.04482.

With B = 2^gamma p_u / (1 - p_u), p_u being the share of uniform tokens at t = 1/2:

    c_t = B t^(gamma/2) (1 - t)^(gamma/2),   C_t = 1 + c_t
    alpha_t = (1 - t) / C_t,   b_t(m) = t / C_t,   b_t(e) = u_t = c_t / ((N - 1) C_t)  for e != m

Uniform noise leaves [MASK] out. Noise jumps into e at the rate R_t(e) = b'_t(e) - (alpha'_t / alpha_t) b_t(e):

    alpha_t R_t(m) = 1 / C_t^2,   alpha_t R_t(e) = (c_t + (1 - t) c'_t) / ((N - 1) C_t^2)

The bound weights the divergences of a token z by R_t(z) / f_t(x, z). This weight diverges at t = 0 and 1; GIDD's models
are trained with bounded ones (`weighting_factor`).

t = 0 is clean, t = 1 is noise, s < t; the prior is all [MASK]. Shapes: B batch, L length, N vocabulary.
"""

import math
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from .categorical import uniform
from .checks import check_targets, validate_ids
from .noise import NoiseDistribution
from .objective import TokenTerms
from .process import NoiseProcess
from .reverse import ReverseStep

# Smallest uniform share, as in the released code: with 0, log f_t(p, e) would be undefined at e != x.
_LEAST_SHARE = math.exp(-20)
_GREATEST_WEIGHT = 2.0  # of the training losses, as in the released code


class GIDDProcess(NoiseProcess):
    """Generalized interpolating discrete diffusion with a mixture of masking and uniform noise.

    `loss` is the exact bound: alpha_t R_t(z) / f_t(x, z) times the expression in braces of `objective`, with B = 0.

    Args:
        vocab_size: N, the rows of the output layer.
        mask_token_id: m.
        p_uniform: p_u, share of uniform noise at t = 1/2, in [0, 1); raised to e^-20 if smaller.
        gamma: Twice the exponent of t (1 - t) in c_t.

    Raises:
        ValueError: If `p_uniform` leaves [0, 1), `gamma` is not positive, the vocabulary has fewer than two rows, or
            the mask id is none of them.
    """

    weightings = ("elbo", "clip", "dynamic")

    def __init__(self, vocab_size: int, mask_token_id: int, p_uniform: float, gamma: float = 1.0):
        if not isinstance(vocab_size, Integral) or vocab_size < 2:
            raise ValueError(f"vocab_size={vocab_size} must be an integer of at least 2: [MASK] and an ordinary token.")
        if not isinstance(mask_token_id, Integral) or not 0 <= mask_token_id < vocab_size:
            raise ValueError(f"mask_token_id={mask_token_id} is not in [0, {vocab_size}).")
        if not 0 <= p_uniform < 1:
            raise ValueError(f"p_uniform={p_uniform} must lie in [0, 1): 0 is masked diffusion.")
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma={gamma} must be positive and finite; GIDD uses 1.")
        self.vocab_size, self.mask_token_id = int(vocab_size), int(mask_token_id)
        self.p_uniform, self.gamma = float(p_uniform), float(gamma)
        share = max(self.p_uniform, _LEAST_SHARE)
        self._b = 2**self.gamma * share / (1 - share)

    def __repr__(self) -> str:
        return f"GIDDProcess({self.vocab_size}, {self.mask_token_id}, p_uniform={self.p_uniform}, gamma={self.gamma})"

    def alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        return (1 - t) / (1 + self._c(t))

    def noise(self, t: Tensor) -> "GIDDNoise":
        t = t.double()
        c = self._c(t)
        k = torch.where(t + c > 0, c / (t + c), 0.0)  # 0/0 at t = 0, where there is no noise
        return GIDDNoise(self.vocab_size, self.mask_token_id, k)

    def terms(self, x_0: Tensor, z_t: Tensor, t: Tensor) -> TokenTerms:
        check_targets(x_0, z_t, self.vocab_size)
        validate_ids("z_t", z_t, self.vocab_size)
        t, alpha_t = t.double(), self.alpha(t)
        b_z, b_0 = self._noise_at(z_t, t), self._noise_at(x_0, t)
        f_t = alpha_t * (z_t == x_0).double() + b_z
        scale = torch.where(b_z > 0, self._jump_weight(z_t, t) / f_t, 0.0)
        values = (x_0, z_t, scale, torch.zeros_like(f_t), 1 / f_t, alpha_t, b_z, b_0, self._u(t))
        return TokenTerms(*(value.expand(z_t.shape).reshape(-1) for value in values))

    def weighting_factor(self, x_0: Tensor, z_t: Tensor, t: Tensor, weighting: str) -> Tensor | None:
        """Weight of the released training losses over that of the bound, (B, L) float64; for gamma = 1.

        `"clip"` is the bound's weight, at most 2. `"dynamic"` is 2 for [MASK], 1 for other changed tokens, and for
        unchanged ones B/N exp(sigmoid(-t)/2), at most 2. (sigmoid(-t) stands in the released code for a logarithmic
        signal-to-noise ratio, which it is not.)

        Raises:
            ValueError: If the weighting is unknown, or bounded and gamma is not 1.
        """
        super().weighting_factor(x_0, z_t, t, weighting)
        if weighting == "elbo":
            return None
        if self.gamma != 1:
            raise ValueError(f"gidd_weighting={weighting!r} is for gamma=1, not {self.gamma}; use 'elbo'.")
        t = self._column(t, z_t).double()
        alpha_t = self.alpha(t)
        f_t = alpha_t * (z_t == x_0).double() + self._noise_at(z_t, t)
        jump_weight = self._jump_weight(z_t, t)
        # Of the bound's weight; 0 at t = 0 and 1, where the bound's integrand is 0 in float64 or the token impossible.
        inverse = torch.where(jump_weight > 0, alpha_t * f_t / jump_weight, 0.0)
        if weighting == "clip":
            return torch.minimum(torch.ones_like(inverse), _GREATEST_WEIGHT * inverse)
        unchanged = (self._b / self.vocab_size * (torch.sigmoid(-t) / 2).exp()).clamp(max=_GREATEST_WEIGHT)
        weight = torch.where(z_t == x_0, unchanged, torch.ones_like(inverse))
        return torch.where(z_t == self.mask_token_id, _GREATEST_WEIGHT, weight) * inverse

    def reverse_step(self, z_t: Tensor, s: Tensor, t: Tensor) -> ReverseStep:
        alpha_s, alpha_t = self.alpha(s), self.alpha(t)
        a_ts = torch.where(alpha_s > 0, alpha_t / alpha_s.clamp_min(1e-300), 1.0)
        b_t, b_s = self._noise_at(z_t, t.double()), self._noise_at(z_t, s.double())
        return ReverseStep(alpha_s, alpha_t, b_t, (b_t - a_ts * b_s).clamp_min(0), self.noise(s))

    def _c(self, t: Tensor) -> Tensor:
        return self._b * (t * (1 - t)) ** (self.gamma / 2)

    def _u(self, t: Tensor) -> Tensor:
        return self._c(t) / ((self.vocab_size - 1) * (1 + self._c(t)))

    def _noise_at(self, ids: Tensor, t: Tensor) -> Tensor:
        """b_t at the ids, (B, L) float64."""
        return torch.where(ids == self.mask_token_id, t / (1 + self._c(t)), self._u(t))

    def _jump_weight(self, ids: Tensor, t: Tensor) -> Tensor:
        """alpha_t R_t at the ids, (B, L) float64."""
        c = self._c(t)
        falling = self.gamma / 2 * (1 - 2 * t) * c / t.clamp_min(1e-300)  # (1 - t) c'_t
        ordinary = ((c + falling) / ((self.vocab_size - 1) * (1 + c) ** 2)).clamp_min(0)
        return torch.where(ids == self.mask_token_id, (1 + c) ** -2, ordinary)


@dataclass
class GIDDNoise(NoiseDistribution):
    """Uniform over the ordinary tokens with weight k, (B, 1), else [MASK]."""

    vocab_size: int
    mask_token_id: int
    mixing_ratio: Tensor

    def __post_init__(self) -> None:
        self.uniform_size, self.has_uniform = self.vocab_size - 1, True
        self.absorbing_ids, self.special_shares = (self.mask_token_id,), {self.mask_token_id: 1.0}

    def rate(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        validate_ids("ids", ids, self.vocab_size)
        ordinary = self.mixing_ratio / self.uniform_size
        return torch.where(ids == self.mask_token_id, 1 - self.mixing_ratio, ordinary).to(dtype)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
        choice = uniform(shape, generator, device)
        ordinary = (uniform(shape, generator, device) * self.uniform_size).long()
        ordinary += ordinary >= self.mask_token_id
        return torch.where(choice < self.mixing_ratio.to(device), ordinary, self.mask_token_id)
