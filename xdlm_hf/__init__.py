"""XDLM discrete diffusion language models in Transformers: LLaDA and DiT, noise, losses, sampling, training.

Importing the package loads neither torch nor Transformers: public names are imported on first use, and the model types
are registered when Transformers' Auto classes are used. `xdlm_hf.diffusion` needs only torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:  # for type checkers and editors; the same names as below
    from .diffusion import CosineSchedule as CosineSchedule
    from .diffusion import GIDDProcess as GIDDProcess
    from .diffusion import LinearSchedule as LinearSchedule
    from .diffusion import LogLinearSchedule as LogLinearSchedule
    from .diffusion import NoiseKernel as NoiseKernel
    from .diffusion import NoiseProcess as NoiseProcess
    from .diffusion import StationaryProcess as StationaryProcess
    from .diffusion import diffusion_loss as diffusion_loss
    from .diffusion import fused_linear_diffusion_loss as fused_linear_diffusion_loss
    from .diffusion import get_schedule as get_schedule
    from .diffusion import kl_divergence as kl_divergence
    from .diffusion import posterior as posterior
    from .diffusion import sample_posterior as sample_posterior
    from .generation.ancestral import AncestralSampler as AncestralSampler
    from .generation.confidence import ConfidenceSampler as ConfidenceSampler
    from .generation.config import XDLMGenerationConfig as XDLMGenerationConfig
    from .generation.output import DiffusionGenerateOutput as DiffusionGenerateOutput
    from .hub import export_for_hub as export_for_hub
    from .image_pipeline import XDLMImagePipeline as XDLMImagePipeline
    from .models.dit.configuration_dit import DiTConfig as DiTConfig
    from .models.dit.modeling_dit import DiTForDiffusionLM as DiTForDiffusionLM
    from .models.llada.configuration_llada import LLaDAConfig as LLaDAConfig
    from .models.llada.modeling_llada import LLaDAForDiffusionLM as LLaDAForDiffusionLM
    from .models.llada.modeling_llada import LLaDAModel as LLaDAModel
    from .models.unet.configuration_unet import PixelUNetConfig as PixelUNetConfig
    from .models.unet.modeling_unet import PixelUNetForDiffusion as PixelUNetForDiffusion
    from .training.arguments import XDLMTrainingArguments as XDLMTrainingArguments
    from .training.trainer import XDLMTrainer as XDLMTrainer

__version__ = "0.1.0"

# Public names and their modules.
_IMPORTED_ON_DEMAND = {
    **dict.fromkeys(
        (
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
        ),
        "diffusion",
    ),
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


@when_imported("transformers.models.auto.configuration_auto")
def _register_configs(_: Any) -> None:
    importlib.import_module(".models.configs", __name__)


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_IMPORTED_ON_DEMAND[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_IMPORTED_ON_DEMAND})


__all__ = sorted(_IMPORTED_ON_DEMAND)
