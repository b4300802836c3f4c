"""File with the average of the weights of a checkpoint (`ema.safetensors`): reading, checking, and use by a model.

Evaluation reads it without importing the Trainer.
"""

from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import safe_open
from torch import Tensor, nn

EMA_FILE = "ema.safetensors"


def apply_saved_average(model: nn.Module, checkpoint: str | Path) -> bool:
    """Replace a model's weights by the average of a checkpoint.

    Returns:
        Whether the checkpoint has an average.

    Raises:
        ValueError: If it belongs to another model.
    """
    if not (Path(checkpoint) / EMA_FILE).is_file():
        return False
    weights = trained_weights(model)
    fill_weights(weights, read_average(Path(checkpoint), weights)[0])
    return True


def read_average(checkpoint: Path, weights: dict[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The average of a checkpoint by parameter name, and the settings stored with it.

    Raises:
        ValueError: If there is none, or names or shapes are not those of `weights`.
    """
    path = checkpoint / EMA_FILE
    if not path.is_file():
        raise ValueError(
            f"{checkpoint.name} has no {EMA_FILE}, the average of its weights; restore it, or start a new run from the "
            "checkpoint's weights (model_name_or_path)."
        )
    with safe_open(path, "pt") as file:
        average = {name: file.get_tensor(name) for name in file.keys()}
        settings = file.metadata()
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (average, weights)]
    if shapes[0] != shapes[1]:
        name = next(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(
            f"{path} is the average of another model: {name} has shape {shapes[0].get(name)} there, "
            f"{shapes[1].get(name)} here."
        )
    return average, settings


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained, by their names in the model without wrappers."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)  # names without a wrapper's prefix
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def fill_weights(weights: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copy tensors into the weights of the same names."""
    for name, parameter in weights.items():
        parameter.copy_(values[name])
