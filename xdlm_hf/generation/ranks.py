"""Random draws of a model that several processes compute together (tensor parallelism).

Each process runs the same sampler on the same logits. Their draws must agree, or their texts would differ, and every
sum over the processes would mix different texts.
"""

import torch
from torch import nn
from torch.distributed import broadcast, get_global_rank


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether Transformers has sharded the layers of a model over several processes."""
    return (getattr(model, "tp_size", None) or 1) > 1


def shared_generator(model: nn.Module, generator: torch.Generator | None) -> torch.Generator | None:
    """A generator that draws the same numbers in all processes of a tensor-parallel model.

    Every process must call this.

    Returns:
        The given generator, or by default a new one, in the state of the first process; for any other model
        `generator` itself.
    """
    if not is_tensor_parallel(model):
        return generator
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    weight = next(weight for weight in model.parameters() if hasattr(weight, "device_mesh"))
    mesh = weight.device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    state = generator.get_state().to(weight.device)  # NCCL moves only tensors of its device
    broadcast(state, get_global_rank(group, 0), group=group)
    generator.set_state(state.cpu())
    return generator
