"""The stationary noise kernel, its prior and the corruption x_0 -> z_t (Eqs. 5-10).

    K      = (k/N) J + sum_i mu_i M_i,  k + sum_i mu_i = 1        Eq. 6 (Lemma 3.1)
    Q_t|s  = a_ts I + b_ts K                                     Eq. 5
    r(e)   = k/N + sum_i mu_i [e = i]                            Eq. 9

t = 0 is clean, t = 1 is noise. N counts every row of the output layer, [MASK] and padding rows included, so uniform
noise may draw [MASK]: r(m) = k/N + mu. With one mask token m, mu = 1 - k (Eq. 7); k = 0 is MDLM, k = 1 is UDLM.

Shapes: B batch, L length, N vocabulary. Ids are int64 of shape (B, L); alphas are (B,) or (B, 1).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Integral

import torch
from torch import Tensor

from .categorical import uniform
from .checks import as_column, validate_ids, validate_rates


def beta_ts(alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
    """b_ts = 1 - alpha_t / alpha_s, written so that nothing cancels as s -> t; 0 where both are pure noise (Eq. 5)."""
    return torch.where(alpha_s > alpha_t, (alpha_s - alpha_t) / alpha_s.clamp_min(1e-300), 0.0)


class NoiseDistribution(ABC):
    """Distribution of noise tokens: uniform with weight k, special tokens with weight 1 - k.

    Attributes:
        vocab_size: N.
        mixing_ratio: k, or k of each row, (B, 1) float64.
        uniform_size: Number of tokens in the uniform part, which may leave out the special ones.
        special_shares: Each special token's share of the weight 1 - k.
        absorbing_ids: Special tokens of positive weight. The network never predicts these (p_m = 0 whenever k < 1):
            clean text does not contain them.
        has_uniform: Whether k > 0.
    """

    vocab_size: int
    mixing_ratio: float | Tensor
    uniform_size: int
    special_shares: dict[int, float]
    absorbing_ids: tuple[int, ...]
    has_uniform: bool

    @abstractmethod
    def rate(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Probability of each of the ids, of any shape or (B, L) if k differs by row."""

    @abstractmethod
    def _draw(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
        """int64 ids of the given shape, drawn from the distribution."""

    def sample_prior(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw ids from the distribution; for a stationary kernel that is z_1 ~ r.

        Returns:
            int64 ids of the given shape on `device` (default: the generator's, else the CPU).
        """
        if device is None:
            device = generator.device if generator is not None else "cpu"
        return self._draw(tuple(shape), generator, torch.device(device))

    def corrupt(self, x_0: Tensor, alpha_t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw z_t: each token is kept with probability alpha_t, else redrawn from the noise (Eqs. 5, 10).

        Args:
            x_0: Clean ids, (B, L). Not modified.
            alpha_t: Signal rates in [0, 1], (B,) or (B, 1).
            generator: Source of randomness; may live on another device than `x_0`.

        Returns:
            Noisy ids z_t, (B, L).

        Raises:
            ValueError: If an id is negative or at least N, or alpha_t has another shape or leaves [0, 1].
        """
        validate_ids("x_0", x_0, self.vocab_size)
        alpha_t = as_column(alpha_t, x_0)
        validate_rates(alpha_t=alpha_t)
        keep = uniform(x_0.shape, generator, x_0.device) < alpha_t
        return torch.where(keep, x_0, self.sample_prior(tuple(x_0.shape), generator, x_0.device).to(x_0.dtype))


class NoiseKernel(NoiseDistribution):
    """Stochastic matrix K whose rows all equal the noise distribution r, Eq. 7.

    Args:
        vocab_size: N, the number of rows of the output layer.
        mixing_ratio: k in Eq. 7, the weight of uniform noise, in [0, 1].
        mask_token_id: m, the absorbing token; needed when k < 1. Id 0 is legal.

    Raises:
        ValueError: If `vocab_size` is not positive, k lies outside [0, 1], k < 1 comes without a mask token, or the
            mask id is not a row of the vocabulary.
    """

    def __init__(self, vocab_size: int, mixing_ratio: float, mask_token_id: int | None = None):
        if not 0 <= mixing_ratio <= 1:
            raise ValueError(f"mixing_ratio={mixing_ratio} must lie in [0, 1]: 0 is MDLM, 1 is UDLM.")
        if mixing_ratio < 1 and mask_token_id is None:
            raise ValueError(
                f"mixing_ratio={mixing_ratio} puts weight {1 - mixing_ratio:g} on a mask token: "
                "pass mask_token_id, or mixing_ratio=1 for purely uniform noise."
            )
        special_weights = {} if mask_token_id is None else {mask_token_id: 1 - mixing_ratio}
        self._set(vocab_size, mixing_ratio, special_weights)
        self.mask_token_id = None if mask_token_id is None else int(mask_token_id)

    @classmethod
    def from_special_weights(cls, vocab_size: int, special_weights: Mapping[int, float]) -> "NoiseKernel":
        """General kernel of Lemma 3.1: weight mu_i on each special token i, the rest k = 1 - sum mu_i uniform.

        `mask_token_id` is the token when there is exactly one, else None.

        Raises:
            ValueError: If a weight is negative, they sum to more than 1, or an id is not a row of the vocabulary.
        """
        total = sum(special_weights.values())
        if not all(mu >= 0 for mu in special_weights.values()) or not total <= 1 + 1e-12:  # NaN fails both
            raise ValueError(f"special_weights={dict(special_weights)} must be non-negative and sum to at most 1.")
        kernel = cls.__new__(cls)
        kernel._set(vocab_size, max(1 - total, 0.0), special_weights)
        kernel.mask_token_id = next(iter(special_weights)) if len(special_weights) == 1 else None
        return kernel

    def _set(self, vocab_size: int, mixing_ratio: float, special_weights: Mapping[int, float]) -> None:
        if not isinstance(vocab_size, Integral) or vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size} must be a positive integer.")
        for token_id in special_weights:
            if not isinstance(token_id, Integral) or not 0 <= token_id < vocab_size:
                raise ValueError(f"special token id {token_id} is not in [0, {vocab_size}); check mask_token_id.")
        self.vocab_size = int(vocab_size)
        self.mixing_ratio = float(mixing_ratio)
        self.special_weights = {int(i): float(mu) for i, mu in special_weights.items()}
        self.absorbing_ids = tuple(i for i, mu in self.special_weights.items() if mu > 0)
        self.special_shares = {i: self.special_weights[i] / (1 - self.mixing_ratio) for i in self.absorbing_ids}
        self.uniform_size, self.has_uniform = self.vocab_size, self.mixing_ratio > 0

    def __repr__(self) -> str:
        return f"NoiseKernel(vocab_size={self.vocab_size}, k={self.mixing_ratio:g}, mu={self.special_weights})"

    def rate(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Noise rate r(e) = k/N + sum_i mu_i [e = i], Eq. 9.

        Args:
            ids: Token ids e, any shape.
            dtype: Floating type of the result.

        Raises:
            ValueError: If an id is negative or at least N.
        """
        validate_ids("ids", ids, self.vocab_size)
        return self._rate(ids, dtype)

    def _rate(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        r_e = torch.full(ids.shape, self.mixing_ratio / self.vocab_size, dtype=dtype, device=ids.device)
        for token_id, mu in self.special_weights.items():
            r_e = r_e + mu * (ids == token_id).to(dtype)
        return r_e

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
        choice = uniform(shape, generator, device)
        ids = (uniform(shape, generator, device) * self.vocab_size).long()
        threshold = 0.0
        for token_id, mu in self.special_weights.items():
            ids = torch.where((choice >= threshold) & (choice < threshold + mu), token_id, ids)
            threshold += mu
        return ids
