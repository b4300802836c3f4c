"""Registration of every network with Transformers' Auto classes, done by importing this module."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from ..generation.protocol import DiffusionModel
from .configs import DiTConfig, DUOConfig, LLaDAConfig, PixelUNetConfig, UDLMConfig
from .dit.modeling_dit import DiTForDiffusionLM, DUOForDiffusionLM, UDLMForDiffusionLM
from .llada.modeling_llada import LLaDAForDiffusionLM
from .unet.modeling_unet import PixelUNetForDiffusion

# Configuration class -> class of the network with logits.
MODEL_FAMILIES: dict[type[PreTrainedConfig], type[DiffusionModel]] = {}


def register_family(config: type[PreTrainedConfig], model: type[DiffusionModel]) -> None:
    """Register a model type with the Auto classes and for loading, export and training here.

    Registered classes win over a checkpoint's remote code and need no trust_remote_code. Both AutoModel and
    AutoModelForCausalLM give the network with logits, like the auto_map of the public LLaDA checkpoints.
    """
    MODEL_FAMILIES[config] = model
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)


def model_class(config: PreTrainedConfig) -> type[DiffusionModel]:
    """The class of the network with logits for a config.

    Raises:
        ValueError: If the config is of no registered family.
    """
    if type(config) not in MODEL_FAMILIES:
        known = ", ".join(repr(family.model_type) for family in MODEL_FAMILIES)
        raise ValueError(
            f"model_type={config.model_type!r} is not a registered diffusion model; registered are {known}."
        )
    return MODEL_FAMILIES[type(config)]


register_family(LLaDAConfig, LLaDAForDiffusionLM)
register_family(DiTConfig, DiTForDiffusionLM)
register_family(UDLMConfig, UDLMForDiffusionLM)
register_family(DUOConfig, DUOForDiffusionLM)
register_family(PixelUNetConfig, PixelUNetForDiffusion)
