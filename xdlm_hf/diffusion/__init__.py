"""The paper's mathematics, with torch alone: noise, posterior, losses, exact draws. In the order to read:

schedules    alpha_t and its derivative
noise        the stationary kernel: rates, corruption, prior (Eqs. 5-10)
reverse      one reverse step: the posterior, dense and as an exact draw (Eq. 11)
losses       the objective and the finite-step divergence (Eqs. 12-15)
process      schedule and noise together: times in
gidd         GIDD's noise, whose mixture of uniform and [MASK] changes with time
objective    the formula of both losses, per token
ops          fast evaluation of the losses: sums over the vocabulary, fused output layer
categorical  exact draws from categorical distributions
checks       validation of ids, rates and shapes; the dtype of computations
"""

from .gidd import GIDDProcess
from .losses import diffusion_loss, kl_divergence
from .noise import NoiseKernel
from .ops.fused import fused_linear_diffusion_loss
from .process import NoiseProcess, StationaryProcess
from .reverse import posterior, sample_posterior
from .schedules import CosineSchedule, LinearSchedule, LogLinearSchedule, get_schedule

__all__ = [
    "CosineSchedule",
    "GIDDProcess",
    "LinearSchedule",
    "LogLinearSchedule",
    "NoiseKernel",
    "NoiseProcess",
    "StationaryProcess",
    "diffusion_loss",
    "fused_linear_diffusion_loss",
    "get_schedule",
    "kl_divergence",
    "posterior",
    "sample_posterior",
]
