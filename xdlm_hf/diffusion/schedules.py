"""Signal rates alpha_t and their derivatives, returned together.

Time runs from t = 0 (clean) to t = 1 (noise), and s < t throughout the package. `schedule(t)` returns (alpha_t,
d alpha_t / dt), because the objective (Eq. 15) needs both.

alpha_t falls from exactly 1 at t = 0 to exactly 0 at t = 1, in `LogLinearSchedule` to its eps. Results are float32 or
wider whatever the dtype of t: bfloat16 would round 0.9985 to 1.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .checks import work_dtype


class Schedule(ABC):
    """Interface of a noise schedule; stateless and shape-preserving."""

    name: str

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal rate and its slope.

        Args:
            t: Times in [0, 1], any shape, float of any dtype.

        Returns:
            `(alpha_t, d_alpha_t)`, each of the shape of `t`; float64 for a float64 `t`, float32 otherwise.
        """

    @abstractmethod
    def inverse(self, alpha_t: Tensor) -> Tensor:
        """Time t at which the signal rate is `alpha_t`, of the same shape; float32 or wider."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _at_least_float32(x: Tensor | float) -> Tensor:
    x = torch.as_tensor(x)
    return x.to(work_dtype(x))


class LinearSchedule(Schedule):
    """alpha_t = 1 - t, the schedule of LLaDA and of the paper's experiments."""

    name = "linear"

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = _at_least_float32(t)
        return 1 - t, -torch.ones_like(t)

    def inverse(self, alpha_t: Tensor) -> Tensor:
        return 1 - _at_least_float32(alpha_t)


class CosineSchedule(Schedule):
    """alpha_t = cos(pi t / 2), written as sin(pi (1 - t) / 2) so that alpha_1 is exactly 0."""

    name = "cosine"

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = _at_least_float32(t)
        quarter_turn = math.pi / 2
        return torch.sin(quarter_turn * (1 - t)), -quarter_turn * torch.sin(quarter_turn * t)

    def inverse(self, alpha_t: Tensor) -> Tensor:
        return torch.acos(_at_least_float32(alpha_t)) / (math.pi / 2)


class LogLinearSchedule(Schedule):
    """alpha_t = 1 - (1 - eps) t, MDLM's "log-linear" schedule, that of the paper's models trained from scratch.

    alpha_1 = eps, not 0. Ancestral sampling still starts from pure noise, and the bound on the likelihood omits the KL
    divergence at t = 1.

    Args:
        eps: alpha_1, in [0, 1); 0 gives `LinearSchedule`.

    Raises:
        ValueError: If eps is not in [0, 1).
    """

    name = "loglinear"

    def __init__(self, eps: float = 1e-3):
        if not 0 <= eps < 1:
            raise ValueError(f"eps={eps} must lie in [0, 1): it is alpha at t = 1.")
        self.eps = eps

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = _at_least_float32(t)
        return 1 - (1 - self.eps) * t, torch.full_like(t, self.eps - 1)

    def inverse(self, alpha_t: Tensor) -> Tensor:
        return (1 - _at_least_float32(alpha_t)) / (1 - self.eps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(eps={self.eps:g})"


SCHEDULES: dict[str, type[Schedule]] = {cls.name: cls for cls in (LinearSchedule, CosineSchedule, LogLinearSchedule)}


def get_schedule(name: str) -> Schedule:
    """Schedule by the name that a checkpoint's `noise_schedule` stores.

    Raises:
        ValueError: If no schedule has that name.
    """
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(f"noise_schedule={name!r} is not known; choose one of {sorted(SCHEDULES)}.")
    return SCHEDULES[name]()
