"""Configuration of LLaDA checkpoints, in their own field names, plus the noise they were trained with.

A public LLaDA config.json loads and saves with its values unchanged. Two fields are added: `mixing_ratio` (k in Eq. 7
of arXiv 2602.01362) and `noise_schedule`, the noise of training; a file without them is an MDLM, k = 0.
"""

from huggingface_hub.dataclasses import strict

from ...diffusion.schedules import get_schedule
from ..format_config import FormatConfig

# Fields of the format that change the network and that no public checkpoint uses: field -> supported values.
_SUPPORTED = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "attention_layer_norm": (False,),
    "multi_query_attention": (False, None),
    "clip_qkv": (None,),
    "alibi": (False,),
    "rope": (True,),
    "rope_full_precision": (True,),
    "rope_scaling": (None,),
    "rope_parameters": (None,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    # LLaDA-MoE shares model_type "llada" but is another network.
    "num_experts": (None,),
    "expert_intermediate_size": (None,),
}
_POSITIVE = (
    "d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size", "max_sequence_length",
    "rope_theta", "rms_norm_eps",
)  # fmt: skip


@strict
class LLaDAConfig(FormatConfig):
    r"""
    Configuration of [`LLaDAModel`] and [`LLaDAForDiffusionLM`]. The defaults have the sizes of LLaDA-8B.

    Standard names (`hidden_size`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`,
    `intermediate_size`, `max_position_embeddings`, `tie_word_embeddings`, ...) read and write the LLaDA fields.

    Args:
        d_model (`int`, *optional*, defaults to 4096): Width of the residual stream.
        n_layers (`int`, *optional*, defaults to 32): Number of blocks.
        n_heads (`int`, *optional*, defaults to 32): Query heads per block.
        n_kv_heads (`int`, *optional*, defaults to `n_heads`): Key and value heads; must divide `n_heads`.
        mlp_hidden_size (`int`, *optional*, defaults to `mlp_ratio * d_model`): Width of the gated MLP.
        mlp_ratio (`int`, *optional*, defaults to 4): Used only without `mlp_hidden_size`.
        vocab_size (`int`, *optional*, defaults to 126464): Size of the vocabulary.
        embedding_size (`int`, *optional*, defaults to `vocab_size`):
            Rows of the embedding and of the output layer, at least `vocab_size`. This is N everywhere in this package.
        max_sequence_length (`int`, *optional*, defaults to 4096): Length the checkpoint was trained for, in tokens.
        rope_theta (`float`, *optional*, defaults to 500000.0): Base of the rotary frequencies.
        rms_norm_eps (`float`, *optional*, defaults to 1e-5): Added to the mean square before the root.
        weight_tying (`bool`, *optional*, defaults to `False`): Whether the output layer is the embedding.
        mask_token_id (`int`, *optional*): Id of [MASK]; needed for noise with k < 1. 0 is legal.
        eos_token_id (`int` or `list[int]`, *optional*): End of text.
        pad_token_id (`int`, *optional*): Padding; LLaDA uses its end-of-text id.
        mixing_ratio (`float`, *optional*, defaults to 0.0):
            k in Eq. 7, the weight of uniform noise: 0 is MDLM (LLaDA itself), 1 is UDLM.
        noise_schedule (`str`, *optional*, defaults to `"linear"`): Name of alpha_t in [`xdlm_hf.diffusion.schedules`].
        attention_dropout, residual_dropout, embedding_dropout (`float`, *optional*, defaults to 0.0):
            Dropout in training, on the attention weights, the two branches of a block, and the embeddings.
        init_std (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal initialisation of a new model. `init_fn`, `init_cutoff_factor`,
            `init_device`, `precision` and `flash_attention` belong to the original training code and are not used.
        use_cache (`bool`, *optional*, defaults to `False`): Not used.

    Raises:
        ValueError: If a value is invalid, or an option of the format is not supported.
        StrictDataclassFieldValidationError: If a value has the wrong type.
    """

    model_type = "llada"
    base_model_tp_plan = {
        "transformer.blocks.*.q_proj": "colwise",
        "transformer.blocks.*.k_proj": "colwise",
        "transformer.blocks.*.v_proj": "colwise",
        "transformer.blocks.*.attn_out": "rowwise",
        "transformer.blocks.*.ff_proj": "colwise",
        "transformer.blocks.*.up_proj": "colwise",
        "transformer.blocks.*.ff_out": "rowwise",
    }
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "output_rows": "embedding_size",
        "hidden_act": "activation_type",
        "initializer_range": "init_std",
        "tie_word_embeddings": "weight_tying",
    }
    # In the files of LLaDA's checkpoints; they belong to options that are off there.
    unused_fields = ("alibi_bias_max", "attention_layer_norm_with_affine", *_SUPPORTED)

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = 12288
    mlp_ratio: int | float | None = 4
    vocab_size: int = 126464
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    activation_type: str = "silu"
    block_type: str = "llama"
    block_group_size: int = 1
    rope: bool = True
    rope_full_precision: bool = True
    rope_theta: float | int = 500000.0
    alibi: bool = False
    layer_norm_type: str = "rms"
    layer_norm_with_affine: bool = True
    bias_for_layer_norm: bool | None = False
    rms_norm_eps: float | int = 1e-5
    attention_layer_norm: bool = False
    multi_query_attention: bool | None = None
    include_bias: bool = False
    include_qkv_bias: bool = False
    input_emb_norm: bool = False
    scale_logits: bool = False
    weight_tying: bool = False
    attention_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    init_fn: str = "normal"
    init_std: float | int = 0.02
    init_cutoff_factor: float | int | None = None
    init_device: str | None = None
    precision: str | None = None
    flash_attention: bool = False
    use_cache: bool = False
    mixing_ratio: float | int = 0.0
    noise_schedule: str = "linear"

    def __post_init__(self, **kwargs):
        self.take_standard_names(kwargs)
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = int(self.mlp_ratio * self.d_model)
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        _refuse_unsupported(kwargs)
        kwargs.pop("rope_scaling", None)  # it is None here, and the base class would warn
        super().__post_init__(**kwargs)
        self.validate_llada()

    def validate_llada(self) -> None:
        """Raise ValueError, naming field, value and remedy, if a field is invalid or not supported."""
        _refuse_unsupported(self.__dict__)
        for field in _POSITIVE:
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be positive.")
        self._validate_sizes()
        self._validate_token_rows()
        for field in ("attention_dropout", "residual_dropout", "embedding_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must lie in [0, 1); 0 turns it off.")
        if not 0 <= self.mixing_ratio <= 1:
            raise ValueError(f"mixing_ratio={self.mixing_ratio} must lie in [0, 1]: 0 is MDLM, 1 is UDLM.")
        get_schedule(self.noise_schedule)

    def _validate_sizes(self) -> None:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; change one.")
        if (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"d_model={self.d_model} over n_heads={self.n_heads} gives heads of odd width "
                f"{self.d_model // self.n_heads}; rotary embeddings need an even width."
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; change one.")
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"embedding_size={self.embedding_size} is smaller than vocab_size={self.vocab_size}; set it to "
                "vocab_size or more, or leave it out."
            )

    def _validate_token_rows(self) -> None:
        for field in ("mask_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is not None and not 0 <= token_id < self.embedding_size:
                    raise ValueError(
                        f"{field}={token_id} is not a row of the embedding, which has {self.embedding_size}; "
                        "give the tokenizer's id, or raise vocab_size and embedding_size."
                    )


def _refuse_unsupported(values: dict) -> None:
    for field, supported in _SUPPORTED.items():
        value = values.get(field)
        if field in values and value not in supported:
            raise ValueError(
                f"{field}={value!r} is an option of the LLaDA format that this package does not support; {field} must "
                f"be {' or '.join(map(repr, supported))}. A checkpoint trained with another value needs other code."
            )


__all__ = ["LLaDAConfig"]
