"""XDLM discrete diffusion language models in Transformers: LLaDA and DiT, noise, losses, sampling, training.

`xdlm_hf.diffusion` needs only torch; names that need Transformers are imported on first use.
"""

import importlib
from typing import Any

from wrapt import when_imported

from .diffusion import (
    CosineSchedule,
    GIDDProcess,
    LinearSchedule,
    LogLinearSchedule,
    NoiseKernel,
    NoiseProcess,
    StationaryProcess,
    diffusion_loss,
    fused_linear_diffusion_loss,
    get_schedule,
    kl_divergence,
    posterior,
    sample_posterior,
)

__version__ = "0.1.0"

# Public names that need Transformers, and their modules.
_IMPORTED_ON_DEMAND = {
    "AncestralSampler": "generation.ancestral",
    "ConfidenceSampler": "generation.confidence",
    "DiTConfig": "models.dit.configuration_dit",
    "DiTForDiffusionLM": "models.dit.modeling_dit",
    "DiffusionGenerateOutput": "generation.output",
    "LLaDAConfig": "models.llada.configuration_llada",
    "LLaDAForDiffusionLM": "models.llada.modeling_llada",
    "LLaDAModel": "models.llada.modeling_llada",
    "PixelUNetConfig": "models.unet.configuration_unet",
    "PixelUNetForDiffusion": "models.unet.modeling_unet",
    "XDLMGenerationConfig": "generation.config",
    "XDLMImagePipeline": "image_pipeline",
    "XDLMTrainer": "training.trainer",
    "XDLMTrainingArguments": "training.arguments",
    "export_for_hub": "hub",
}


@when_imported("transformers")
def _register_model_types(_: Any) -> None:
    from .models.registry import register

    register()


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_IMPORTED_ON_DEMAND[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_IMPORTED_ON_DEMAND})


__all__ = [
    "AncestralSampler",
    "ConfidenceSampler",
    "CosineSchedule",
    "DiTConfig",
    "DiTForDiffusionLM",
    "DiffusionGenerateOutput",
    "GIDDProcess",
    "LLaDAConfig",
    "LLaDAForDiffusionLM",
    "LLaDAModel",
    "LinearSchedule",
    "LogLinearSchedule",
    "NoiseKernel",
    "NoiseProcess",
    "PixelUNetConfig",
    "PixelUNetForDiffusion",
    "StationaryProcess",
    "XDLMGenerationConfig",
    "XDLMImagePipeline",
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
