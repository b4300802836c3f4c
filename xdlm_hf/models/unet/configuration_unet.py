"""Configuration of the pixel U-Net: sizes, classes, and the noise it was trained with."""

from huggingface_hub.dataclasses import strict

from ..configured_noise import validate_noise
from ..format_config import FormatConfig

_POSITIVE = ("channels", "image_size", "image_channels", "residual_blocks", "num_values")
_RELEASED_ROWS = 3  # of the released vocabulary besides the values: [MASK], and two that do not occur


@strict
class PixelUNetConfig(FormatConfig):
    r"""
    Configuration of [`PixelUNetForDiffusion`]. The defaults are those of the paper's CIFAR-10 models, apart from the
    input (`mask_channels`).

    A row is an image: its values 0..`num_values` - 1, channel by channel, each row by row. The id after the values is
    [MASK].

    Args:
        channels (`int`, *optional*, defaults to 128): Width of the first level.
        channel_multipliers (`list[int]`, *optional*, defaults to `[1, 2, 2, 2]`): Width of each level over `channels`.
        residual_blocks (`int`, *optional*, defaults to 2): Blocks per level on the way down; one more on the way up.
        attention_levels (`list[int]`, *optional*, defaults to `[1]`): Levels with attention; the middle always has it.
        dropout (`float`, *optional*, defaults to 0.1): Dropout in the residual blocks.
        image_size (`int`, *optional*, defaults to 32): Height and width.
        image_channels (`int`, *optional*, defaults to 3): 3 for RGB, 1 for grey.
        num_values (`int`, *optional*, defaults to 256): V, values of a pixel.
        mask_channels (`bool`, *optional*, defaults to `True`):
            Whether the input has a plane per image channel that marks [MASK], whose value is 0. `False` is the input of
            the released weights, where [MASK] is a value slightly above the brightest.
        num_classes (`int`, *optional*):
            Number of classes for `class_labels` of `forward`; the table has one more row, the null class.
        label_dropout (`float`, *optional*, defaults to 0.1):
            Share of training rows whose label `XDLMTrainer` replaces by the null class; `forward` drops none.
        time_conditioning (`bool`, *optional*, defaults to `False`):
            Whether `forward` takes `timesteps`; otherwise sigma = 0.
        vocab_size (`int`, *optional*, defaults to V + 1, without `mask_channels` to V + 3):
            N, rows of the output layer. Without `mask_channels` it is also the scale of input and output.
        mask_token_id (`int`, *optional*, defaults to V): Id of [MASK].
        mixing_ratio (`float`, *optional*, defaults to 0.0): k in Eq. 7, the weight of uniform noise.
        noise_schedule (`str`, *optional*, defaults to `"loglinear"`):
            Name of alpha_t in [`xdlm_hf.diffusion.schedules`]; None for GIDD, which has its own.
        noise_process (`str`, *optional*, defaults to `"stationary"`): Or `"gidd"`, [`GIDDProcess`].
        p_uniform (`float`, *optional*, defaults to 0.0): Share of uniform noise at t = 1/2; for GIDD.

    Raises:
        ValueError: If a value is invalid, or two contradict each other.
        StrictDataclassFieldValidationError: If a value has the wrong type.
    """

    model_type = "pixel_unet"

    channels: int = 128
    channel_multipliers: list[int] | tuple[int, ...] = (1, 2, 2, 2)
    residual_blocks: int = 2
    attention_levels: list[int] | tuple[int, ...] = (1,)
    dropout: float | int = 0.1
    image_size: int = 32
    image_channels: int = 3
    num_values: int = 256
    mask_channels: bool = True
    num_classes: int | None = None
    label_dropout: float | int = 0.1
    time_conditioning: bool = False
    vocab_size: int | None = None
    mask_token_id: int | None = None
    mixing_ratio: float | int = 0.0
    noise_schedule: str | None = None
    noise_process: str = "stationary"
    p_uniform: float | int = 0.0

    def __post_init__(self, **kwargs):
        self.channel_multipliers = list(self.channel_multipliers)
        self.attention_levels = list(self.attention_levels)
        if self.vocab_size is None:
            self.vocab_size = self.num_values + (1 if self.mask_channels else _RELEASED_ROWS)
        if self.mask_token_id is None:
            self.mask_token_id = self.num_values
        if self.noise_schedule is None and self.noise_process == "stationary":
            self.noise_schedule = "loglinear"
        super().__post_init__(**kwargs)
        # Files may hold these fields of Transformers: there is no token embedding to tie, and `return_dict` is an
        # argument of calls.
        self.tie_word_embeddings, self.return_dict = False, True
        self.validate_unet()

    # What Transformers' standard fields mean here.

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of an image, the only length of a row."""
        return self.image_channels * self.image_size**2

    @property
    def hidden_size(self) -> int:
        return self.channels

    @property
    def num_hidden_layers(self) -> int:
        """Levels of the network."""
        return len(self.channel_multipliers)

    @property
    def num_bins(self) -> int:
        """S, bins of [-1, 1] on the scale of input and output."""
        return self.num_values if self.mask_channels else self.vocab_size

    def validate_unet(self) -> None:
        """Raise ValueError, naming field, value and remedy, if a field is invalid or contradicts another."""
        for field in _POSITIVE:
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be positive.")
        self._validate_levels()
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be positive; leave it out for no classes.")
        for field in ("dropout", "label_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must lie in [0, 1); 0 turns it off.")
        if self.mask_token_id != self.num_values:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} must be the id after the values, num_values={self.num_values}; "
                "leave it out."
            )
        if self.vocab_size <= self.num_values or (self.mask_channels and self.vocab_size != self.num_values + 1):
            wanted = f"num_values + 1 = {self.num_values + 1}" + ("" if self.mask_channels else " or more")
            raise ValueError(
                f"vocab_size={self.vocab_size} must be {wanted} with mask_channels={self.mask_channels}; leave it out."
            )
        validate_noise(self)

    def _validate_levels(self) -> None:
        levels = len(self.channel_multipliers)
        if not levels or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers={self.channel_multipliers} must be positive, one for each level.")
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"attention_levels={self.attention_levels} must lie in 0..{levels - 1}.")
        if self.image_size % 2 ** (levels - 1):
            raise ValueError(
                f"image_size={self.image_size} cannot be halved {levels - 1} times, once between {levels} levels; use "
                f"a multiple of {2 ** (levels - 1)}, or fewer channel_multipliers."
            )


__all__ = ["PixelUNetConfig"]
