"""XDLM discrete diffusion language models in Transformers: LLaDA checkpoints, noise, losses, sampling."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_llada import LLaDAConfig
from .hub import export_for_hub
from .kernel import NoiseKernel
from .modeling_llada import LLaDAForDiffusionLM, LLaDAModel
from .schedules import CosineSchedule, LinearSchedule, get_schedule

__version__ = "0.1.0"

# Registered classes win over a checkpoint's remote code and need no trust_remote_code. Both model classes give the
# network with logits, as the auto_map of the public checkpoints does.
AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
AutoModel.register(LLaDAConfig, LLaDAForDiffusionLM, exist_ok=True)
AutoModelForCausalLM.register(LLaDAConfig, LLaDAForDiffusionLM, exist_ok=True)

__all__ = [
    "CosineSchedule",
    "LLaDAConfig",
    "LLaDAForDiffusionLM",
    "LLaDAModel",
    "LinearSchedule",
    "NoiseKernel",
    "export_for_hub",
    "get_schedule",
]
