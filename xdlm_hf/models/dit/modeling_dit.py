"""The DiT of MDLM, UDLM, Duo and the paper's text models, with the parameter names of the public checkpoints.

With these names (`backbone.blocks.0.attn_qkv.weight`, ...), in the order of the released EMA files, files load and save
without conversion. With c the conditioning vector,

    c = silu( sigma_map(sigma) + y_embedder(label) )       sigma = 0 without time conditioning
    sh1, sc1, g1, sh2, sc2, g2 = adaLN_modulation(c)       for each block
    x = x + g1 attn_out(attention(rope(q), rope(k), v))    q, k, v = attn_qkv(h), h = norm1(x) (1 + sc1) + sh1
    x = x + g2 mlp(h)                                      h = norm2(x) (1 + sc2) + sh2
    logits = linear( norm_final(x) (1 + sc) + sh )         with a bias

x starts as vocab_embed(token), plus position_embed(position) with `use_absolute_position_embeddings`, which no public
checkpoint has.

Norms and rotary embeddings are computed in float32 whatever the model's dtype. Maps of c, the output layer and its bias
start at zero, so that a new model's blocks are the identity and its logits 0.

Shapes: B batch, L length, D = hidden_dim, C = cond_dim, H heads, W = D / H their width, N rows of the output layer.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, silu
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ...generation.generate import XDLMGenerationMixin
from ...generation.protocol import plain_output_layer
from ..attention import BidirectionalAttention, prepare_mask, rotary_angles
from ..configured_noise import ConfiguredNoise
from ..format_config import PackageCode
from ..network_inputs import (
    check_conditions,
    check_positions,
    check_rows_hold_mask,
    check_text,
    kept_positions,
    refuse_unknown_arguments,
    text_positions,
)
from ..output_layer import OutputLayer, ReducedOutput, Reduction, check_reduction, run_output_layer
from ..strict_loading import StrictLoading
from .configuration_dit import DiTConfig, DUOConfig, UDLMConfig
from .layers_dit import (
    AdaLN,
    DiTEmbedding,
    DiTLayerNorm,
    FoldsConstants,
    LabelEmbedder,
    TimestepEmbedder,
    modulate,
    modulation,
)

ROTARY_BASE = 10000.0


class DiTBlock(FoldsConstants, GradientCheckpointingLayer):
    """One block: bidirectional attention, then the MLP, each modulated by the conditioning vector."""

    def __init__(self, config: DiTConfig, layer_idx: int):
        super().__init__()
        width = config.hidden_dim
        self.head_width, self.dropout = width // config.n_heads, config.dropout
        self.norm1 = DiTLayerNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = DiTLayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.intermediate_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.intermediate_size, width),
        )
        self.mlp[0].tensor_parallel_style, self.mlp[2].tensor_parallel_style = "colwise", "rowwise"
        self.adaLN_modulation = AdaLN(config.cond_dim, 6 * width)
        self.attention = BidirectionalAttention(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        condition: Tensor,
        constant: bool,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """New residual stream (B, L, D); with `constant`, `condition` (1, C) depends only on weights."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation(self, condition, constant, 6)
        h = modulate(self.norm1(hidden_states), shift_1, scale_1).to(hidden_states.dtype)
        qkv = self.attn_qkv(h).unflatten(-1, (3, -1, self.head_width))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        h, _ = self.attention(query, key, value, position_embeddings, attention_mask, **kwargs)
        hidden_states = hidden_states + gate_1 * self._drop(self.attn_out(h))
        h = modulate(self.norm2(hidden_states), shift_2, scale_2).to(hidden_states.dtype)
        return hidden_states + gate_2 * self._drop(self.mlp(h))

    def _drop(self, branch: Tensor) -> Tensor:
        return dropout(branch, self.dropout, self.training)


class DiTOutputLayer(FoldsConstants):
    """Final norm and modulation; holds the output layer `linear`, which `DiTForDiffusionLM` runs."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm_final = DiTLayerNorm(config.hidden_dim)
        self.linear = OutputLayer(config.hidden_dim, config.vocab_size, bias=True)
        self.adaLN_modulation = AdaLN(config.cond_dim, 2 * config.hidden_dim)

    def forward(self, hidden_states: Tensor, condition: Tensor, constant: bool) -> Tensor:
        """Input of `linear`, (B, L, D)."""
        shift, scale = modulation(self, condition, constant, 2)
        return modulate(self.norm_final(hidden_states), shift, scale).to(hidden_states.dtype)


class DiTPreTrainedModel(StrictLoading, PackageCode, PreTrainedModel):
    """Loading, initialisation and capabilities of both DiT classes."""

    config: DiTConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]
    tensor_parallel_sizes = ("n_heads", "intermediate_size")
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DiTBlock, "attentions": BidirectionalAttention}
    # A buffer of the original code; here the angles are computed from the positions.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        config.validate_dit()  # fields may have been set after construction

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's default initialisation; zero for `AdaLN` and the output layer."""
        if isinstance(module, AdaLN | OutputLayer):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, DiTEmbedding):
            init.kaiming_uniform_(module.embedding, a=math.sqrt(5))
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, DiTLayerNorm):
            init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.vocab_embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.vocab_embed = DiTEmbedding.around(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Transformers' method.

        Raises:
            ValueError: If the mask token's row would be removed.
        """
        check_rows_hold_mask(kwargs.get("new_num_tokens", args[0] if args else None), self.config.mask_token_id)
        return super().resize_token_embeddings(*args, **kwargs)


class DiTModel(DiTPreTrainedModel):
    """Embedding, conditioning, blocks and final norm: token ids (B, L) to hidden states (B, L, D).

    As in the checkpoint format, it holds the output layer, but does not run it.
    """

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.vocab_embed = DiTEmbedding(config.vocab_size, config.hidden_dim)
        if config.use_absolute_position_embeddings:
            self.position_embed = DiTEmbedding(config.model_length, config.hidden_dim)
        self.sigma_map = TimestepEmbedder(config.cond_dim)
        if config.num_classes is not None:
            self.y_embedder = LabelEmbedder(config.num_classes, config.cond_dim)
        self.blocks = nn.ModuleList(DiTBlock(config, i) for i in range(config.n_blocks))
        self.output_layer = DiTOutputLayer(config)
        self.constants = FoldsConstants()
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        timesteps: Tensor | None = None,
        class_labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Input of the output layer, (B, L, D); the arguments are those of [`DiTForDiffusionLM`]."""
        refuse_unknown_arguments("DiT", kwargs)
        check_text(input_ids, inputs_embeds)
        rows = len(input_ids if inputs_embeds is None else inputs_embeds)
        check_conditions(self.config, rows, timesteps, class_labels)
        if inputs_embeds is None:
            inputs_embeds = self.vocab_embed(input_ids)
        positions = text_positions(position_ids, inputs_embeds)
        if self.config.use_absolute_position_embeddings:
            check_positions(position_ids, inputs_embeds, self.config.model_length)
            inputs_embeds = inputs_embeds + self.position_embed(positions)
        width = self.config.hidden_dim // self.config.n_heads
        position_embeddings = rotary_angles(positions, width, ROTARY_BASE)
        attention_mask = prepare_mask(self.config, attention_mask, inputs_embeds)
        condition, constant = self._condition(timesteps, class_labels, inputs_embeds.device)
        hidden_states = inputs_embeds
        for block in self.blocks:
            # The residual stream is the first positional argument: reentrant checkpointing and output capture need it.
            hidden_states = block(
                hidden_states, condition, constant, position_embeddings, attention_mask=attention_mask, **kwargs
            )
        return BaseModelOutput(last_hidden_state=self.output_layer(hidden_states, condition, constant))

    def _condition(
        self, timesteps: Tensor | None, class_labels: Tensor | None, device: torch.device
    ) -> tuple[Tensor, bool]:
        """Conditioning vector c, (B or 1, C), and whether it depends only on weights."""
        embedders = [self.sigma_map]
        if self.config.num_classes is not None:
            embedders.append(self.y_embedder)

        def compute() -> Tensor:
            sigma = torch.zeros(1, device=device) if timesteps is None else timesteps
            c = self.sigma_map(sigma)
            if self.config.num_classes is not None:
                null = torch.full((len(sigma),), self.config.num_classes, device=device)
                c = c + self.y_embedder(null if class_labels is None else class_labels)
            return silu(c)

        if timesteps is None and class_labels is None:
            return self.constants.folded(embedders, None, compute), True
        return compute(), False


class DiTForDiffusionLM(ConfiguredNoise, XDLMGenerationMixin, DiTPreTrainedModel):
    """DiT with its output layer: token ids (B, L), noisy or masked, to logits of the clean tokens (B, L, N).

    `noise_process()` gives the noise that the checkpoint was trained with and the objective; `generate()` samples, by
    default with the ancestral sampler.
    """

    lora_targets = r".*blocks\.\d+\.(attn_qkv|attn_out|mlp\.0|mlp\.2)"
    row_modules = ("sigma_map", "y_embedder", "adaLN_modulation")  # of the conditioning, one vector a row

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        self.backbone = DiTModel(config)
        self.generation_config.sampler = "ancestral"
        self.post_init()

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        super().adjust_generation_fn(*args, **kwargs)
        if self.generation_config.sampler is None:
            self.generation_config.sampler = "ancestral"

    def get_output_embeddings(self) -> nn.Linear:
        return self.backbone.output_layer.linear

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.backbone.output_layer.linear = OutputLayer.around(value)

    @plain_output_layer
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        timesteps: Tensor | None = None,
        class_labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_reduction: Reduction | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput | ReducedOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Noisy token ids z_t.
            attention_mask (`torch.Tensor`, *optional*):
                `(B, L)`, 1 for text and 0 for padding, or `(B, 1, L, L)`: bool (True attends) or a bias of the scores.
            timesteps (`torch.FloatTensor` of shape `(B,)`, *optional*):
                Noise level sigma of each row; required with the config's `time_conditioning`, else refused.
            class_labels (`torch.LongTensor` of shape `(B,)`, *optional*, defaults to the null class `num_classes`):
                Only for a config with `num_classes`.
            position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*, defaults to 0..L-1):
                Positions. Rotary embeddings depend only on differences, so left padding needs no `position_ids`, unless
                the config has `use_absolute_position_embeddings`.
            inputs_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): Instead of `input_ids`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Positions of the output layer: the last n, 0 for all; a LongTensor of columns, logits `(B, n, N)`; or a
                bool mask `(B, L)`, logits `(number selected, N)` in row-major order.
            output_reduction (`Callable`, *optional*):
                Function of the output layer's input `(B, n, D)`, weight `(N, D)` and bias `(N,)` that returns a loss
                and the losses of the positions, such as the fused loss; it replaces the logits.
            output_hidden_states, output_attentions (`bool`, *optional*): As in other Transformers models.

        Returns:
            [`~transformers.modeling_outputs.MaskedLMOutput`] with `logits`, in the model's dtype, and no loss; with
            `output_reduction` a [`ReducedOutput`].

        Raises:
            ValueError: If the inputs do not fit together or the config, an argument is unknown, or `output_reduction`
                is given but the output layer was replaced or is sharded over processes.
        """
        check_text(input_ids, inputs_embeds, logits_to_keep)
        check_reduction(self, output_reduction)
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            timesteps=timesteps,
            class_labels=class_labels,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = kept_positions(outputs.last_hidden_state, logits_to_keep)
        return run_output_layer(self.get_output_embeddings(), kept, output_reduction, outputs)


class UDLMForDiffusionLM(DiTForDiffusionLM):
    """The same network for checkpoints of the `udlm` format; the Auto classes need a class for each config."""

    config: UDLMConfig


class DUOForDiffusionLM(DiTForDiffusionLM):
    """The same network for checkpoints of the `DUO` format."""

    config: DUOConfig


__all__ = ["DUOForDiffusionLM", "DiTForDiffusionLM", "DiTModel", "DiTPreTrainedModel", "UDLMForDiffusionLM"]
