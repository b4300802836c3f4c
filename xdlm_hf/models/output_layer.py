"""Output layer that can apply a reduction of its input and weight, such as the fused loss, instead of computing logits.

Shapes: B batch, n positions, D width, N rows of the output layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.utils import ModelOutput

from ..generation.ranks import is_tensor_parallel

# Takes hidden states (B, n, D), weight (N, D) and, where the layer has one, bias (N,).
Reduction = Callable[..., tuple[Tensor, Tensor]]


class OutputLayer(nn.Linear):
    """Linear layer; with `reduction`, returns `reduction(hidden, weight[, bias])` instead of logits.

    The reduction runs in the layer's forward, because DDP, FSDP and ZeRO-3 gather weights and reduce gradients in hooks
    on module calls; outside of the call, ZeRO-3's weight is an empty shard.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **options):
        super().__init__(in_features, out_features, bias=bias, **options)

    @classmethod
    def around(cls, layer: nn.Module) -> nn.Module:
        """An output layer that shares weight and bias of a plain `nn.Linear`; any other module unchanged."""
        if type(layer) is not nn.Linear:
            return layer
        output_layer = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        output_layer.weight, output_layer.bias = layer.weight, layer.bias
        return output_layer

    def forward(self, hidden: Tensor, reduction: Reduction | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, n, N) of hidden states (B, n, D), or the two tensors that `reduction` returns."""
        if reduction is None:
            return super().forward(hidden)
        return reduction(hidden, self.weight) if self.bias is None else reduction(hidden, self.weight, self.bias)


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


def check_reduction(model: nn.Module, reduction: Reduction | None) -> None:
    """Raise ValueError if a reduction is given and the output layer was replaced, or a process has a part of it."""
    if reduction is None:
        return
    head = model.get_output_embeddings()
    if not isinstance(head, OutputLayer):
        raise ValueError(f"output_reduction needs an OutputLayer, but the output layer is {head}; leave it out.")
    if is_tensor_parallel(model) and hasattr(head.weight, "device_mesh"):
        raise ValueError(
            "output_reduction needs the whole output layer in every process, but the tp_plan shards it; load the model "
            "with tp_plan='auto', which does not."
        )


def run_output_layer(
    head: nn.Module, hidden: Tensor, reduction: Reduction | None, outputs: BaseModelOutput
) -> MaskedLMOutput | ReducedOutput:
    """Output of a network: logits of hidden states (B, n, D), or the reduced loss.

    Args:
        head: The output layer.
        hidden: Last hidden states at the positions of `logits_to_keep`, (B, n, D).
        reduction: The `output_reduction` of the call, which `check_reduction` accepts, or None for logits.
        outputs: Output of the backbone, with the requested hidden states and attentions.
    """
    captured = outputs.hidden_states, outputs.attentions
    if reduction is None:
        return MaskedLMOutput(None, head(hidden), *captured)
    return ReducedOutput(*head(hidden, reduction=reduction), *captured)
