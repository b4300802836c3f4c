"""Output layer that can apply a reduction of its input and weight, such as the fused loss, instead of computing logits.

Shapes: B batch, n positions, D width, N rows of the output layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

Reduction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class OutputLayer(nn.Linear):
    """Linear layer without bias; with `reduction`, returns `reduction(hidden, weight)` instead of logits.

    The reduction runs in the layer's forward, because DDP, FSDP and ZeRO-3 gather weights and reduce gradients in hooks
    on module calls; outside of the call, ZeRO-3's weight is an empty shard.
    """

    def __init__(self, in_features: int, out_features: int, **options):
        super().__init__(in_features, out_features, bias=False, **options)

    @classmethod
    def around(cls, layer: nn.Module) -> nn.Module:
        """An output layer that shares the weight of a plain `nn.Linear` without bias; any other module unchanged."""
        if type(layer) is not nn.Linear or layer.bias is not None:
            return layer
        output_layer = cls(layer.in_features, layer.out_features, device="meta")
        output_layer.weight = layer.weight
        return output_layer

    def forward(self, hidden: Tensor, reduction: Reduction | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, n, N) of hidden states (B, n, D), or the two tensors that `reduction` returns."""
        return super().forward(hidden) if reduction is None else reduction(hidden, self.weight)


@dataclass
class ReducedOutput(ModelOutput):
    """Output of a network whose output layer applied a reduction.

    Args:
        loss (`torch.FloatTensor` of shape `()`): The reduced loss; carries the gradient.
        token_losses (`torch.FloatTensor` of shape `(B, n)`): Loss of each position, detached.
        hidden_states, attentions: As everywhere in Transformers.
    """

    loss: torch.FloatTensor | None = None
    token_losses: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
