"""Noise that the config of a model states: stationary (`mixing_ratio`, `noise_schedule`) or GIDD (`p_uniform`)."""

from typing import Any

from torch import Tensor

from ..diffusion.gidd import GIDDProcess
from ..diffusion.process import NoiseProcess
from ..diffusion.schedules import get_schedule
from ..generation.protocol import DiffusionModel

NOISE_PROCESSES = ("stationary", "gidd")
# sigma = -log alpha_t is infinite at alpha = 0; the models were trained with a schedule that ends at alpha = 1e-3.
LEAST_ALPHA = 1e-3


def validate_noise(config: Any) -> None:
    """Check `mixing_ratio`, `noise_schedule`, `noise_process`, `p_uniform` and `mask_token_id` of a config.

    Raises:
        ValueError: If one is invalid or contradicts another; names field, value and remedy.
    """
    if not 0 <= config.mixing_ratio <= 1:
        raise ValueError(f"mixing_ratio={config.mixing_ratio} must lie in [0, 1]: 0 is MDLM, 1 is UDLM.")
    if config.noise_process not in NOISE_PROCESSES:
        raise ValueError(f"noise_process={config.noise_process!r} is not known; choose one of {NOISE_PROCESSES}.")
    if config.noise_process == "stationary":
        if config.p_uniform:
            raise ValueError(
                f"p_uniform={config.p_uniform} is GIDD's share of uniform noise; use noise_process='gidd', or "
                "mixing_ratio for a ratio that is constant in time."
            )
        if config.mixing_ratio < 1 and config.mask_token_id is None:
            raise ValueError(
                f"mixing_ratio={config.mixing_ratio} needs a mask_token_id; pass the tokenizer's, or mixing_ratio=1."
            )
        get_schedule(config.noise_schedule)
        return
    if config.mixing_ratio:
        raise ValueError(
            f"mixing_ratio={config.mixing_ratio} does not apply to noise_process='gidd', whose ratio changes with "
            "time; leave it out and set p_uniform."
        )
    if config.noise_schedule is not None:
        raise ValueError(
            f"noise_schedule={config.noise_schedule!r}: noise_process='gidd' has its own schedule; leave it out."
        )
    if config.mask_token_id is None:
        raise ValueError("noise_process='gidd' needs a mask_token_id; pass the tokenizer's.")
    GIDDProcess(config.vocab_size, config.mask_token_id, config.p_uniform)


class ConfiguredNoise(DiffusionModel):
    """Members of [`DiffusionModel`] of a model whose config has these fields and `time_conditioning`."""

    @property
    def conditioning(self) -> tuple[str, ...]:
        return ("timesteps",) if self.config.time_conditioning else ()

    @property
    def stationary_noise(self) -> bool:
        return self.config.noise_process == "stationary"

    def noise_process(
        self, mixing_ratio: float | None = None, noise_schedule: str | None = None, mask_token_id: int | None = None
    ) -> NoiseProcess:
        """The noise that the model was trained with; see [`DiffusionModel`].

        Raises:
            ValueError: Also if k or a schedule is given for GIDD, which has neither.
        """
        config = self.config
        if self.stationary_noise:
            return super().noise_process(mixing_ratio, noise_schedule, mask_token_id)
        for name, value in (("mixing_ratio", mixing_ratio), ("noise_schedule", noise_schedule)):
            if value:  # generation passes k = 0 for every model without one
                raise ValueError(
                    f"{name}={value!r} does not apply to noise_process='gidd', whose ratio changes with time and "
                    "whose schedule is its own; leave it out."
                )
        mask = config.mask_token_id if mask_token_id is None else mask_token_id
        return GIDDProcess(config.vocab_size, mask, config.p_uniform)

    def timesteps(self, t: Tensor) -> Tensor:
        """sigma_t = -log max(alpha_t, 1e-3) of the times t (B,), (B,) float32."""
        return -self.noise_process().alpha(t.double()).clamp_min(LEAST_ALPHA).log().float()
