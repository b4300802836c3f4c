"""Training loss of a noisy batch, fused with the output layer or from logits.

Shapes: B batch, L length, D width, N rows of the output layer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..diffusion.process import NoiseProcess
from ..models.output_layer import OutputLayer


class FusedLoss:
    """`process.fused_loss` of one batch, as the `output_reduction` of a model.

    A class instead of a closure: torch.compile compares functions by identity and would recompile at every step.

    Args:
        process: The noise.
        batch: As in `weighted_loss`.
        chunk_size: Tokens per chunk; None for the default.
    """

    def __init__(self, process: NoiseProcess, batch: Mapping[str, Tensor], chunk_size: int | None):
        self.process, self.batch, self.chunk_size = process, batch, chunk_size

    @torch.compiler.disable
    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum of token_weights * loss and losses (B, L), from hidden states (B, L, D), weight (N, D) and bias (N,)."""
        x_0, z_t, t, token_weights = (self.batch[name] for name in ("input_ids", "z_t", "t", "token_weights"))
        return self.process.fused_loss(hidden, weight, x_0, z_t, t, token_weights, self.chunk_size, bias)


def uses_fused_loss(model: nn.Module, wanted: bool | None) -> bool:
    """Whether the loss is fused with the output layer of a model, or of a peft model.

    Args:
        model: The model.
        wanted: The option `fused_loss`; None fuses wherever possible.

    Raises:
        ValueError: If it is wanted where it cannot be used.
    """
    head = model.get_output_embeddings()
    # A subclass (quantised), an adapter or a patched forward computes something else than hidden @ weight.T + bias.
    possible = type(head) is OutputLayer and "forward" not in vars(head)
    if wanted and not possible:
        raise ValueError(
            f"fused_loss=True needs an output layer that is a plain OutputLayer (linear), not {head}: "
            "leave fused_loss out."
        )
    return possible if wanted is None else wanted


def weighted_loss(
    model: nn.Module,
    process: NoiseProcess,
    batch: Mapping[str, Tensor],
    fused: bool,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of token_weights * loss over a batch, and the losses of its tokens.

    Args:
        model: The network, wrapped or not.
        process: The noise.
        batch: `input_ids` and `z_t` (B, L), `t` (B,), `token_weights` (B, L); `attention_mask` (B, L), `timesteps` and
            `class_labels` (B,) if the network is to have them; `weighting` (B, L), a factor of the token weights in the
            sum.
        fused: Whether to fuse the loss with the output layer.
        chunk_size: Tokens per chunk of the fused loss; None for its default.

    Returns:
        The sum in nats, which carries the gradient, and the losses (B, L) in nats, detached.
    """
    if "weighting" in batch:
        batch = {**batch, "token_weights": batch["token_weights"] * batch["weighting"]}
    optional = {name: batch[name] for name in ("attention_mask", "timesteps", "class_labels") if name in batch}
    network_inputs = {"input_ids": batch["z_t"], **optional}
    if fused:
        outputs = model(**network_inputs, output_reduction=FusedLoss(process, batch, chunk_size))
        return outputs.loss, outputs.token_losses
    losses = process.loss(model(**network_inputs).logits, batch["input_ids"], batch["z_t"], batch["t"])
    return (batch["token_weights"] * losses).sum(), losses.detach()
