"""Configuration of DiT checkpoints, in their own field names, plus the noise they were trained with.

One network, three public formats: `mdlm` (kuleshov-group/mdlm-owt), `udlm` (kuleshov-group/udlm-lm1b) and `DUO`
(s-sahoo/duo). They differ only in defaults: vocabulary, time conditioning, and the noise, which the files do not state.
"""

from typing import Any

from huggingface_hub.dataclasses import strict

from ..configured_noise import validate_noise
from ..format_config import FormatConfig

_POSITIVE = ("hidden_dim", "cond_dim", "n_blocks", "n_heads", "model_length", "vocab_size")


@strict
class DiTConfig(FormatConfig):
    r"""
    Configuration of [`DiTForDiffusionLM`]. The defaults are those of kuleshov-group/mdlm-owt.

    Standard names (`hidden_size`, `num_hidden_layers`, `num_attention_heads`, `max_position_embeddings`) read and write
    the format's fields.

    Args:
        hidden_dim (`int`, *optional*, defaults to 768): Width of the residual stream.
        cond_dim (`int`, *optional*, defaults to 128): Width of the conditioning vector.
        n_blocks (`int`, *optional*, defaults to 12): Number of blocks.
        n_heads (`int`, *optional*, defaults to 12): Attention heads per block.
        model_length (`int`, *optional*, defaults to 1024): Length the checkpoint was trained for, in tokens.
        vocab_size (`int`, *optional*, defaults to 50258): N, rows of the embedding and of the output layer.
        dropout (`float`, *optional*, defaults to 0.1): Dropout in training, on the two branches of a block.
        time_conditioning (`bool`, *optional*, defaults to `False`):
            Whether `forward` takes `timesteps`; otherwise sigma = 0.
        use_absolute_position_embeddings (`bool`, *optional*, defaults to `False`):
            Whether to add a learned vector for each position to the token embeddings, from a table of `model_length`
            rows. Not part of the public formats, whose only positions are rotary: those depend on differences, and
            cannot tell the positions of a row apart whose tokens are all [MASK].
        num_classes (`int`, *optional*):
            Number of classes for `class_labels` of `forward`; the table has one more row, the null class.
        label_dropout (`float`, *optional*, defaults to 0.1):
            Share of training rows whose label `XDLMTrainer` replaces by the null class; `forward` drops none.
        mask_token_id (`int`, *optional*, defaults to `vocab_size - 1` for model type `mdlm`): Id of [MASK].
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): As in other Transformers models.
        mixing_ratio (`float`, *optional*, defaults to 0.0, for `udlm` and `DUO` to 1.0):
            k in Eq. 7, the weight of uniform noise: 0 is MDLM, 1 is UDLM.
        noise_schedule (`str`, *optional*, defaults to `"loglinear"`):
            Name of alpha_t in [`xdlm_hf.diffusion.schedules`]; None for GIDD, which has its own.
        noise_process (`str`, *optional*, defaults to `"stationary"`): Or `"gidd"`, [`GIDDProcess`].
        p_uniform (`float`, *optional*, defaults to 0.0): Share of uniform noise at t = 1/2; for GIDD.

    Raises:
        ValueError: If a value is invalid, or two contradict each other.
        StrictDataclassFieldValidationError: If a value has the wrong type.
    """

    model_type = "mdlm"
    base_model_tp_plan = {  # the styles that are not Transformers' are those of models/tensor_parallel.py
        "blocks.*.attn_qkv": "packed_qkv",
        "blocks.*.attn_out": "rowwise",
        "blocks.*.mlp.*": "style_of_module",
    }
    attribute_map = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }

    hidden_dim: int = 768
    cond_dim: int = 128
    n_blocks: int = 12
    n_heads: int = 12
    model_length: int = 1024
    vocab_size: int = 50258
    dropout: float | int = 0.1
    time_conditioning: bool = False
    use_absolute_position_embeddings: bool = False
    num_classes: int | None = None
    label_dropout: float | int = 0.1
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mixing_ratio: float | int = 0.0
    noise_schedule: str | None = None
    noise_process: str = "stationary"
    p_uniform: float | int = 0.0

    def __post_init__(self, **kwargs):
        self.take_standard_names(kwargs)
        if self.mask_token_id is None and self.model_type == "mdlm":
            self.mask_token_id = self.vocab_size - 1
        if self.noise_schedule is None and self.noise_process == "stationary":
            self.noise_schedule = "loglinear"
        super().__post_init__(**kwargs)
        # Files may hold these fields of Transformers: the format never ties embeddings, and `return_dict` is an
        # argument of calls.
        self.tie_word_embeddings, self.return_dict = False, True
        self.validate_dit()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        if cls is DiTConfig:  # the file may be of one of the other formats
            formats = {family.model_type: family for family in DiTConfig.__subclasses__()}
            family = formats.get(config_dict.get("model_type"))
            if family is not None:
                return family.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    # Standard fields of Transformers that this format fixes.

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""
        return 4 * self.hidden_dim

    @property
    def num_key_value_heads(self) -> int:
        return self.n_heads

    @property
    def attention_dropout(self) -> float:
        return 0.0

    def validate_dit(self) -> None:
        """Raise ValueError, naming field, value and remedy, if a field is invalid or contradicts another."""
        for field in _POSITIVE:
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be positive.")
        if self.hidden_dim % self.n_heads:
            raise ValueError(f"hidden_dim={self.hidden_dim} is not a multiple of n_heads={self.n_heads}; change one.")
        if (self.hidden_dim // self.n_heads) % 2:
            raise ValueError(
                f"hidden_dim={self.hidden_dim} over n_heads={self.n_heads} gives heads of odd width "
                f"{self.hidden_dim // self.n_heads}; rotary embeddings need an even width."
            )
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be positive; leave it out for a model of text.")
        for field in ("dropout", "label_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must lie in [0, 1); 0 turns it off.")
        self._validate_tokens()
        validate_noise(self)

    def _validate_tokens(self) -> None:
        for field in ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{field}={token_id} is not a row of the embedding, which has {self.vocab_size}; give the "
                        "tokenizer's id, or raise vocab_size."
                    )


@strict
class UDLMConfig(DiTConfig):
    r"""
    Configuration of the `udlm` format: k = 1, time conditioning, and the sizes of kuleshov-group/udlm-lm1b.

    Args:
        cfg (`bool`, *optional*, defaults to `False`):
            Class labels by the map of UDLM's own code, which is not supported; must be False.
        cfg_num_classes (`int`, *optional*, defaults to -1): Not used.

    See [`DiTConfig`] for the other fields.
    """

    model_type = "udlm"

    vocab_size: int = 30522
    model_length: int = 128
    time_conditioning: bool = True
    mixing_ratio: float | int = 1.0
    cfg: bool = False
    cfg_num_classes: int = -1

    def validate_dit(self) -> None:
        super().validate_dit()
        if self.cfg:
            raise ValueError(
                "cfg=True: the class labels of UDLM's own code (`cond_map`) are not supported; load a checkpoint "
                "without them."
            )


@strict
class DUOConfig(DiTConfig):
    r"""
    Configuration of the `DUO` format: k = 1, time conditioning, and the sizes of s-sahoo/duo.

    Args:
        causal (`bool`, *optional*, defaults to `False`): Autoregressive baseline of the format; must be False.
        var_min (`bool`, *optional*, defaults to `True`): Not used; an option of the original training code.

    See [`DiTConfig`] for the other fields.
    """

    model_type = "DUO"

    time_conditioning: bool = True
    mixing_ratio: float | int = 1.0
    causal: bool = False
    var_min: bool = True

    def validate_dit(self) -> None:
        super().validate_dit()
        if self.causal:
            raise ValueError(
                "causal=True is the format's autoregressive baseline, not a diffusion model; load another checkpoint."
            )


__all__ = ["DUOConfig", "DiTConfig", "UDLMConfig"]
