"""XDLM discrete diffusion language models in Transformers: LLaDA checkpoints, noise, losses, sampling, training."""

import types
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import posterior
from .configuration_llada import LLaDAConfig
from .generation import DiffusionGenerateOutput, XDLMGenerationConfig
from .hub import export_for_hub
from .kernel import NoiseKernel
from .losses import diffusion_loss, fused_linear_diffusion_loss, kl_divergence
from .modeling_llada import LLaDAForDiffusionLM, LLaDAModel
from .posterior import sample_posterior
from .samplers import AncestralSampler, ConfidenceSampler
from .schedules import CosineSchedule, LinearSchedule, LogLinearSchedule, get_schedule

__version__ = "0.1.0"

# Registered classes win over a checkpoint's remote code and need no trust_remote_code. Both model classes give the
# network with logits, as the auto_map of the public checkpoints does.
AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
AutoModel.register(LLaDAConfig, LLaDAForDiffusionLM, exist_ok=True)
AutoModelForCausalLM.register(LLaDAConfig, LLaDAForDiffusionLM, exist_ok=True)


class _PosteriorModule(types.ModuleType):
    """`xdlm_hf.posterior` names a module and the function in it; this lets one name be both."""

    def __call__(self, *args: Any, **kwargs: Any):
        return self.posterior(*args, **kwargs)


posterior.__class__ = _PosteriorModule


def __getattr__(name: str) -> Any:
    # Training needs accelerate and datasets, which loading and generating do without.
    if name in ("XDLMTrainer", "XDLMTrainingArguments"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AncestralSampler",
    "ConfidenceSampler",
    "CosineSchedule",
    "DiffusionGenerateOutput",
    "LLaDAConfig",
    "LLaDAForDiffusionLM",
    "LLaDAModel",
    "LinearSchedule",
    "LogLinearSchedule",
    "NoiseKernel",
    "XDLMGenerationConfig",
    "XDLMTrainer",
    "XDLMTrainingArguments",
    "diffusion_loss",
    "export_for_hub",
    "fused_linear_diffusion_loss",
    "get_schedule",
    "kl_divergence",
    "posterior",
    "sample_posterior",
]
