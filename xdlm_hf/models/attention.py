"""Bidirectional attention with rotary position embeddings, used by all model families.

Shapes: B batch, L length, D width, H query heads, W = D / H their width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..generation.cache import CanvasCache


def rotary_angles(position_ids: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, float32.

    Computed on every call: a buffer would be uninitialised after `from_pretrained`, which builds models on the meta
    device, and rounded by `.to(bfloat16)`, by 7 rad at position 4096.

    Args:
        position_ids: Positions, (B, L) or (1, L).
        width: W, the width of a head.
        theta: Base of the frequencies theta^(-2i/W), i < W/2.

    Returns:
        Two tensors (B or 1, 1, L, W): the frequencies twice over, for the half-rotation.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width
    angles = position_ids[:, None, :, None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + W/2}) of queries or keys (B, H, L, W) by their angles, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    """The plain computation behind every attention implementation: softmax(q k^T scaling + mask) v.

    Returns:
        The result (B, L, H, W) and the weights (B, H, L, L).
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class BidirectionalAttention(nn.Module):
    """Bidirectional attention over projected queries, keys and values.

    It has no parameters, because the checkpoint formats have the projections directly in the block.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.is_causal = False  # sdpa and flash attention are causal unless the module says so

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: CanvasCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Result (B, L, D), and with eager attention the weights, of queries (B, H, L, W), keys and values
        (B, key heads, L, W)."""
        query, key = (rotate(x, *position_embeddings) for x in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return attended.flatten(2), weights


def prepare_mask(config: PreTrainedConfig, attention_mask: Any, inputs_embeds: Tensor) -> Any:
    """The mask in the form that the attention implementation takes, or None without padding.

    Args:
        config: Configuration of the model.
        attention_mask: None, (B, L) with 1 for text and 0 for padding, or (B, 1, L, L), bool or a bias of the scores.
        inputs_embeds: (B, L, D).

    Raises:
        ValueError: If the shape does not fit, or flash attention is given a 4-D mask.
    """
    if attention_mask is None:  # compiled, older versions of Transformers would build (L, L), which fits no cache
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        return _as_bias(config, attention_mask, inputs_embeds)
    if isinstance(attention_mask, Tensor) and attention_mask.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not fit an input of shape "
            f"{tuple(inputs_embeds.shape[:2])}; pass (B, L), 1 for text and 0 for padding, or (B, 1, L, L)."
        )
    return create_bidirectional_mask(config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask)


def _as_bias(config: PreTrainedConfig, attention_mask: Tensor, inputs_embeds: Tensor) -> Tensor:
    """A (B, 1, L, L) mask as a bias of the attention scores: eager and flex would add True as 1."""
    if "flash" in config._attn_implementation:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} takes no 4-D attention_mask; "
            "pass (B, L), or load the model with attn_implementation='sdpa'."
        )
    if attention_mask.is_floating_point():
        return attention_mask.to(inputs_embeds.dtype)
    bias = torch.zeros_like(attention_mask, dtype=inputs_embeds.dtype)
    return bias.masked_fill(~attention_mask.bool(), torch.finfo(bias.dtype).min)
