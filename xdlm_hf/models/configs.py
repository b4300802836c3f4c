"""The config of every model type, and their registration with AutoConfig, done by importing this module.

Apart from the networks: a config or a tokenizer is read without loading them.
"""

from transformers import AutoConfig

from .dit.configuration_dit import DiTConfig, DUOConfig, UDLMConfig
from .llada.configuration_llada import LLaDAConfig
from .unet.configuration_unet import PixelUNetConfig

for config in (LLaDAConfig, DiTConfig, UDLMConfig, DUOConfig, PixelUNetConfig):
    AutoConfig.register(config.model_type, config, exist_ok=True)

__all__ = ["DUOConfig", "DiTConfig", "LLaDAConfig", "PixelUNetConfig", "UDLMConfig"]
