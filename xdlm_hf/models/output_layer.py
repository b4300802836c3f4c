"""Output layer that can hand its input and weight to a reduction, such as the fused loss, instead of making logits.

Shapes: B batch, n positions, D width, N rows of the output layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.utils import ModelOutput

# Takes hidden states (B, n, D), weight (N, D) and, where the layer has one, bias (N,).
Reduction = Callable[..., tuple[Tensor, Tensor]]


class OutputLayer(nn.Linear):
    """Linear layer; with `reduction`, returns `reduction(hidden, weight[, bias])` and makes no logits.

    The reduction runs inside the layer's own forward, because DDP, FSDP and ZeRO-3 gather weights and reduce gradients
    in hooks on module calls: outside of them ZeRO-3's weight is an empty shard.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **options):
        super().__init__(in_features, out_features, bias=bias, **options)

    @classmethod
    def around(cls, layer: nn.Module) -> nn.Module:
        """A plain `nn.Linear` as an output layer that shares its weight and bias; any other module as it is."""
        if type(layer) is not nn.Linear:
            return layer
        ours = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        ours.weight, ours.bias = layer.weight, layer.bias
        return ours

    def forward(self, hidden: Tensor, reduction: Reduction | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, n, N) of hidden states (B, n, D), or the two tensors that `reduction` makes of them."""
        if reduction is None:
            return super().forward(hidden)
        return reduction(hidden, self.weight) if self.bias is None else reduction(hidden, self.weight, self.bias)


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


def run_output_layer(
    head: nn.Module, hidden: Tensor, reduction: Reduction | None, outputs: BaseModelOutput
) -> MaskedLMOutput | ReducedOutput:
    """Output of a network: logits of hidden states (B, n, D), or what the reduction makes of them.

    Args:
        head: The output layer.
        hidden: Last hidden states, at the positions whose logits are wanted.
        reduction: In place of logits, or None.
        outputs: Of the backbone, with the hidden states and attentions that were asked for.

    Raises:
        ValueError: If the output layer was replaced by one that takes no reduction.
    """
    captured = outputs.hidden_states, outputs.attentions
    if reduction is None:
        return MaskedLMOutput(None, head(hidden), *captured)
    if not isinstance(head, OutputLayer):
        raise ValueError(f"output_reduction needs an OutputLayer, and the output layer is {head}: leave it out.")
    return ReducedOutput(*head(hidden, reduction=reduction), *captured)
