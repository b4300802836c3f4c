"""The LLaDA network as a Transformers model, with the parameter names of the public checkpoints.

With these names (`model.transformer.blocks.0.q_proj.weight`, ...) files load and save without conversion, and LoRA
adapters trained with other LLaDA tools fit. One block is

    x = x + attn_out(attention(rope(q), rope(k), v))       of h = attn_norm(x), bidirectional, no biases
    x = x + ff_out(silu(ff_proj(h)) * up_proj(h))          of h = ff_norm(x)

RMSNorm and rotary embeddings are computed in float32 whatever the model's dtype.

Shapes: B batch, L length, D = d_model, H query heads, W = D / H their width, N = rows of the output layer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ...generation.cache import CanvasCache, check_cache_attention
from ...generation.generate import XDLMGenerationMixin
from ...generation.protocol import plain_output_layer
from ..attention import BidirectionalAttention, prepare_mask, rotary_angles
from ..format_config import PackageCode
from ..network_inputs import (
    check_rows_hold_mask,
    check_text,
    kept_positions,
    refuse_unknown_arguments,
    text_positions,
)
from ..output_layer import OutputLayer, ReducedOutput, Reduction, check_reduction, run_output_layer
from ..strict_loading import StrictLoading
from .configuration_llada import LLaDAConfig


class LLaDARMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32 or wider, cast back, then scaled by the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class LLaDABlock(GradientCheckpointingLayer):
    """One pre-norm block: bidirectional attention, then the gated MLP (`ff_proj` is the gate)."""

    def __init__(self, config: LLaDAConfig, layer_idx: int):
        super().__init__()
        width = config.d_model // config.n_heads
        self.head_width = width
        self.residual_dropout = config.residual_dropout
        self.attn_norm = LLaDARMSNorm(config.d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.d_model, config.n_heads * width, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_heads * width, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_heads * width, bias=False)
        self.attention = BidirectionalAttention(config, layer_idx)
        self.attn_out = nn.Linear(config.n_heads * width, config.d_model, bias=False)
        self.ff_norm = LLaDARMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Residual stream (B, L, D) after the block."""
        h = self.attn_norm(hidden_states)
        query, key, value = (  # with tensor parallelism, a process has a part of the heads
            project(h).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        h, _ = self.attention(query, key, value, position_embeddings, attention_mask, **kwargs)
        hidden_states = hidden_states + self._drop(self.attn_out(h))
        h = self.ff_norm(hidden_states)
        h = self.ff_out(nn.functional.silu(self.ff_proj(h)) * self.up_proj(h))
        return hidden_states + self._drop(h)

    def _drop(self, branch: Tensor) -> Tensor:
        return nn.functional.dropout(branch, self.residual_dropout, self.training)


class LLaDAPreTrainedModel(StrictLoading, PackageCode, PreTrainedModel):
    """Base of both LLaDA classes: strict loading, embeddings, supported features of Transformers."""

    config: LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]
    tensor_parallel_sizes = ("n_heads", "n_kv_heads", "mlp_hidden_size")
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": LLaDABlock, "attentions": BidirectionalAttention}

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        config.validate_llada()  # fields may have been set after construction

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.transformer.wte = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Transformers' method; also updates `embedding_size`.

        Raises:
            ValueError: If the mask token's row would be removed.
        """
        check_rows_hold_mask(kwargs.get("new_num_tokens", args[0] if args else None), self.config.mask_token_id)
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = self.config.vocab_size
        if self.get_output_embeddings() is not None:  # Transformers replaced it by a new nn.Linear
            self.set_output_embeddings(OutputLayer.around(self.get_output_embeddings()))
        return embeddings


class LLaDAModel(LLaDAPreTrainedModel):
    """Embedding, blocks and final norm: token ids (B, L) to hidden states (B, L, D), no output layer."""

    # The output layer of a checkpoint is ignored when it is loaded into the backbone.
    _keys_to_ignore_on_load_unexpected = [r"^(model\.)?transformer\.ff_out\.weight$"]

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(LLaDABlock(config, i) for i in range(config.n_layers)),
                "ln_f": LLaDARMSNorm(config.d_model, config.rms_norm_eps),
            }
        )
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: CanvasCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Hidden states after the final norm; the arguments are those of [`LLaDAForDiffusionLM`]."""
        refuse_unknown_arguments("LLaDA", kwargs)
        check_text(input_ids, inputs_embeds)
        if past_key_values is not None:
            _check_cache(past_key_values, self.config)
            kwargs["past_key_values"] = past_key_values
        if inputs_embeds is None:
            inputs_embeds = self.transformer.wte(input_ids)
        width = self.config.d_model // self.config.n_heads
        position_embeddings = rotary_angles(text_positions(position_ids, inputs_embeds), width, self.config.rope_theta)
        if past_key_values is not None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            # All positions are keys; only some are queries. The mask is the same for every query.
            attention_mask = attention_mask[:, None, None, :]
        attention_mask = prepare_mask(self.config, attention_mask, inputs_embeds)
        hidden_states = nn.functional.dropout(inputs_embeds, self.config.embedding_dropout, self.training)
        for block in self.transformer.blocks:
            # The residual stream is the first positional argument: reentrant checkpointing and output capture need it.
            hidden_states = block(hidden_states, position_embeddings, attention_mask=attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.transformer.ln_f(hidden_states))


class LLaDAForDiffusionLM(XDLMGenerationMixin, LLaDAPreTrainedModel):
    """LLaDA with its output layer: token ids (B, L), noisy or masked, to logits of the clean tokens (B, L, N).

    `noise_process()` is the noise that the checkpoint was trained with, and computes the loss; `generate()` samples.
    """

    _tied_weights_keys = {"model.transformer.ff_out.weight": "model.transformer.wte.weight"}
    supports_canvas_cache = True
    # The block's projections; a bare `ff_out` would also match the output layer, which must not get an adapter.
    lora_targets = r".*blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)"

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        # In the format the output layer is beside the embedding, under the name of the blocks' down projection.
        self.model.transformer.ff_out = OutputLayer(config.d_model, config.embedding_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.transformer.ff_out

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.model.transformer.ff_out = value

    @plain_output_layer
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: CanvasCache | None = None,
        logits_to_keep: int | Tensor = 0,
        output_reduction: Reduction | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput | ReducedOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Noisy token ids z_t.
            attention_mask (`torch.Tensor`, *optional*):
                `(B, L)`, 1 for text and 0 for padding, or `(B, 1, L, L)`: bool (True attends) or numbers to add.
            position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*, defaults to 0..L-1):
                Positions. Rotary embeddings see only differences, so left padding needs none.
            inputs_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): Instead of `input_ids`.
            past_key_values ([`CanvasCache`], *optional*):
                Keys and values of all T columns; `input_ids` and `position_ids` are then those of the columns set by
                its `at`, and `attention_mask` is still `(B, T)`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Positions of the output layer: the last n, 0 for all; a LongTensor of columns, logits `(B, n, N)`; or a
                bool mask `(B, L)`, logits `(number selected, N)` in row-major order.
            output_reduction (`Callable`, *optional*):
                Function of the output layer's input `(B, n, D)` and weight `(N, D)` that returns a loss and the losses
                of the positions, such as the fused loss; it replaces the logits.
            output_hidden_states, output_attentions (`bool`, *optional*): As in other Transformers models.

        Returns:
            [`~transformers.modeling_outputs.MaskedLMOutput`] with `logits`, in the model's dtype, and no loss; with
            `output_reduction` a [`ReducedOutput`].

        Raises:
            ValueError: If the inputs do not fit together, an argument is unknown, or `output_reduction` is given
                but the output layer was replaced or is sharded over processes.
        """
        check_text(input_ids, inputs_embeds, logits_to_keep)
        check_reduction(self, output_reduction)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            **kwargs,
        )
        kept = kept_positions(outputs.last_hidden_state, logits_to_keep)
        return run_output_layer(self.model.transformer.ff_out, kept, output_reduction, outputs)


def _check_cache(cache: Any, config: LLaDAConfig) -> None:
    if not isinstance(cache, CanvasCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, which only grows, but denoising changes any position; pass "
            "an xdlm_hf.generation.cache.CanvasCache, or generate with use_cache='prefix' or 'dual'."
        )
    check_cache_attention(config._attn_implementation)


__all__ = ["LLaDAForDiffusionLM", "LLaDAModel", "LLaDAPreTrainedModel"]
