"""Registration of every model type with Transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .llada.configuration_llada import LLaDAConfig
from .llada.modeling_llada import LLaDAForDiffusionLM

# Configuration, and the network with logits.
MODEL_FAMILIES = ((LLaDAConfig, LLaDAForDiffusionLM),)


def register() -> None:
    """Make the Auto classes know the model types.

    Registered classes win over a checkpoint's remote code and need no trust_remote_code. Both Auto classes of models
    give the network with logits, as the auto_map of the public checkpoints does.
    """
    for config, model in MODEL_FAMILIES:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
