"""Output layer that can hand its input and weight to a reduction, such as the fused loss, instead of making logits.

Shapes: B batch, n positions, D width, N rows of the output layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

Reduction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class OutputLayer(nn.Linear):
    """Linear layer without bias; with `reduction`, returns `reduction(hidden, weight)` and makes no logits.

    The reduction runs inside the layer's own forward, because DDP, FSDP and ZeRO-3 gather weights and reduce gradients
    in hooks on module calls: outside of them ZeRO-3's weight is an empty shard.
    """

    def __init__(self, in_features: int, out_features: int, **options):
        super().__init__(in_features, out_features, bias=False, **options)

    @classmethod
    def around(cls, layer: nn.Module) -> nn.Module:
        """A plain `nn.Linear` without bias as an output layer that shares its weight; any other module as it is."""
        if type(layer) is not nn.Linear or layer.bias is not None:
            return layer
        ours = cls(layer.in_features, layer.out_features, device="meta")
        ours.weight = layer.weight
        return ours

    def forward(self, hidden: Tensor, reduction: Reduction | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, n, N) of hidden states (B, n, D), or the two tensors that `reduction` makes of them."""
        return super().forward(hidden) if reduction is None else reduction(hidden, self.weight)


@dataclass
class ReducedOutput(ModelOutput):
    """Output of a network whose output layer was given a reduction.

    Args:
        loss (`torch.FloatTensor` of shape `()`): What the reduction sums up; carries the gradient.
        token_losses (`torch.FloatTensor` of shape `(B, n)`): Its parts by position, detached.
        hidden_states, attentions: As everywhere in Transformers.
    """

    loss: torch.FloatTensor | None = None
    token_losses: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
