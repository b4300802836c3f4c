"""Noise processes: schedule and noise together, as functions of time.

    q(z_t = e | x) = alpha_t x_e + b_t(e),   sum_e b_t(e) = beta_t = 1 - alpha_t

b_t is one value for all ordinary tokens. A subclass defines the noise; corruption, loss, posterior and sampling are the
same for all processes (`objective`, `reverse`).

t = 0 is clean, t = 1 is noise, s < t. Times are (B,) or (B, 1). Shapes: B batch, L length, D width, N vocabulary.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .checks import as_column, check_shapes, check_step, validate_times
from .losses import dense_loss
from .noise import NoiseDistribution, NoiseKernel
from .objective import TokenTerms, limit_terms
from .ops.fused import fused_loss
from .reverse import ReverseStep, dense_posterior, draw_posterior, stationary_step
from .schedules import Schedule


class NoiseProcess(ABC):
    """Interface of a noise process; a subclass defines `alpha`, `noise`, `terms` and `reverse_step`.

    Attributes:
        vocab_size: N, the rows of the output layer.
        mask_token_id: m, or None.
        weightings: Names that `weighting_factor` takes.
    """

    vocab_size: int
    mask_token_id: int | None
    weightings: tuple[str, ...] = ("elbo",)

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal rate alpha_t, of the shape of `t`."""

    @abstractmethod
    def noise(self, t: Tensor) -> NoiseDistribution:
        """b_t / beta_t, the distribution of noise tokens at time t, (B, 1)."""

    @abstractmethod
    def terms(self, x_0: Tensor, z_t: Tensor, t: Tensor) -> TokenTerms:
        """Noise terms of the loss for the tokens (B, L) in row-major order; validates the ids."""

    @abstractmethod
    def reverse_step(self, z_t: Tensor, s: Tensor, t: Tensor) -> ReverseStep:
        """Noise terms of the posterior of z_t (B, L) between the times s <= t, (B, 1)."""

    @property
    def prior(self) -> NoiseDistribution:
        """The noise at t = 1, where no signal is left."""
        return self.noise(torch.ones(1, 1, dtype=torch.float64))

    @property
    def absorbing_ids(self) -> tuple[int, ...]:
        """Tokens with noise of their own, such as [MASK]; the same at all times."""
        return self.prior.absorbing_ids

    def corrupt(self, x_0: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw z_t ~ q(z_t | x_0), (B, L): Eqs. 5, 10 at alpha_t.

        Raises:
            ValueError: If an id is not in [0, N), or a time leaves [0, 1] or does not fit the ids.
        """
        t = self._column(t, x_0)
        return self.noise(t).corrupt(x_0, self.alpha(t), generator)

    def sample_prior(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw z_1, int64 ids of the given shape on `device` (default: the generator's, else the CPU)."""
        return self.prior.sample_prior(shape, generator, device)

    def loss(self, logits: Tensor, x_0: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Integrand of the continuous-time bound, (B, L) nats; its mean over t and z_t is the NELBO per token.

        See `diffusion_loss`, which this is for a stationary process (Eqs. 14, 15).
        """
        check_shapes(logits, z_t, self.vocab_size)
        t = self._column(t, z_t)
        return dense_loss(logits, self.terms(x_0, z_t, t), self.noise(t))

    def fused_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        x_0: Tensor,
        z_t: Tensor,
        t: Tensor,
        token_weights: Tensor | None = None,
        chunk_size: int | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`loss` of the logits hidden @ weight.T + bias, in chunks of tokens: see `fused_linear_diffusion_loss`."""
        t = self._column(t, x_0)
        terms = self.terms(x_0, z_t, t)
        return fused_loss(hidden, weight, tuple(x_0.shape), terms, self.noise(t), token_weights, chunk_size, bias)

    def weighting_factor(self, x_0: Tensor, z_t: Tensor, t: Tensor, weighting: str) -> Tensor | None:
        """Weight of a training loss over that of the bound, (B, L) float64, to multiply `loss` with; None for 1.

        Raises:
            ValueError: As `check_weighting`.
        """
        self.check_weighting(weighting)
        return None

    def check_weighting(self, weighting: str) -> None:
        """Raise ValueError if `weighting` is none of `weightings`."""
        if weighting not in self.weightings:
            raise ValueError(f"gidd_weighting={weighting!r} is not one of {self.weightings}, those of {self!r}.")

    def posterior(self, p_x0: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """q(z_s | z_t, x) with x = p_x0, (B, L, N): see `reverse.posterior` (Eq. 11).

        Raises:
            ValueError: If some s > t, a time leaves [0, 1], an id is not in [0, N), or shapes disagree.
        """
        return dense_posterior(p_x0, z_t, self._checked_step(p_x0, z_t, s, t))

    def sample_posterior(
        self, logits: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw z_s, (B, L), exactly from Eq. 11 with x = softmax(logits): see `reverse.sample_posterior`.

        Raises:
            ValueError: As `posterior`, or if logits that the draw needs are NaN or all -inf.
        """
        return draw_posterior(logits, z_t, self._checked_step(logits, z_t, s, t), generator)

    def _checked_step(self, values: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> ReverseStep:
        s, t = self._column(s, z_t), self._column(t, z_t)
        check_step(values, z_t, self.alpha(s), self.alpha(t), self.vocab_size)
        return self.reverse_step(z_t, s, t)

    @staticmethod
    def _column(t: Tensor, ids: Tensor) -> Tensor:
        t = as_column(t, ids)
        validate_times(t)
        return t


class StationaryProcess(NoiseProcess):
    """One noise distribution at all times: XDLM, with MDLM at k = 0 and UDLM at k = 1 (Eqs. 5-10).

    Args:
        kernel: The noise.
        schedule: alpha_t.
    """

    def __init__(self, kernel: NoiseKernel, schedule: Schedule):
        self.kernel, self.schedule = kernel, schedule
        self.vocab_size, self.mask_token_id = kernel.vocab_size, kernel.mask_token_id

    def __repr__(self) -> str:
        return f"StationaryProcess({self.kernel!r}, {self.schedule!r})"

    def alpha(self, t: Tensor) -> Tensor:
        return self.schedule(t)[0]

    def noise(self, t: Tensor) -> NoiseKernel:
        return self.kernel

    def terms(self, x_0: Tensor, z_t: Tensor, t: Tensor) -> TokenTerms:
        return limit_terms(x_0, z_t, *self.schedule(t), self.kernel)

    def reverse_step(self, z_t: Tensor, s: Tensor, t: Tensor) -> ReverseStep:
        return stationary_step(z_t, self.alpha(s), self.alpha(t), self.kernel)
