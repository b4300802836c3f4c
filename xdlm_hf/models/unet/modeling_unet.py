"""The pixel U-Net: ids of an image's values, noisy or masked, to logits of the clean values.

The network is diffusers' `UNet2DModel` (extra `images`, imported when a model is built), in the form of DDPM and of the
released CIFAR-10 models: sums with a residual branch are divided by sqrt 2. It gives two numbers (a, b) per value, and
`LogisticHead` turns (mu, b) with mu = tanh(y + a) into logits, y being the value at the input on the scale [-1, 1].

Shapes: B batch, C image channels, S image size, L = C S^2 tokens, N rows of the output layer.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...diffusion.checks import work_dtype
from ...generation.generate import XDLMGenerationMixin
from ...generation.protocol import plain_output_layer
from ..configured_noise import ConfiguredNoise
from ..format_config import PackageCode
from ..network_inputs import check_conditions, check_text, kept_positions, refuse_unknown_arguments
from ..strict_loading import StrictLoading
from .configuration_unet import PixelUNetConfig
from .logistic_unet import LogisticHead

_TIME_SCALE = 1000  # of sigma, for the sinusoids of the time embedding


def make_unet(config: PixelUNetConfig) -> nn.Module:
    """diffusers' `UNet2DModel` of a config, with the released network's residual sums and groups of norms.

    Sums are divided by sqrt 2. A norm over c channels has min(c / 4, 32) groups, or the next smaller divisor of c,
    which is 32 in all norms of the paper's network.

    Raises:
        ImportError: Without diffusers.
    """
    try:
        from diffusers import UNet2DModel
        from diffusers.models.attention_processor import Attention
        from diffusers.models.resnet import ResnetBlock2D
    except ImportError as error:
        raise ImportError("PixelUNetForDiffusion needs diffusers: pip install 'xdlm_hf[images]'.") from error
    attention = [level in config.attention_levels for level in range(config.num_hidden_layers)]
    unet = UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.image_channels * (2 if config.mask_channels else 1),
        out_channels=2 * config.image_channels,
        block_out_channels=tuple(config.channels * factor for factor in config.channel_multipliers),
        layers_per_block=config.residual_blocks,
        down_block_types=tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        up_block_types=tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        norm_num_groups=1,  # set below
        attention_head_dim=None,
        dropout=float(config.dropout),
        num_class_embeds=None if config.num_classes is None else config.num_classes + 1,
    )
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.output_scale_factor = math.sqrt(2)
        elif isinstance(module, Attention):
            module.rescale_output_factor = math.sqrt(2)
            module.to_out[0].starts_at_zero = True
        elif isinstance(module, nn.GroupNorm):
            largest = max(1, min(module.num_channels // 4, 32))
            module.num_groups = next(n for n in range(largest, 0, -1) if module.num_channels % n == 0)
    unet.conv_out.starts_at_zero = True
    return unet


class PixelUNetPreTrainedModel(StrictLoading, PackageCode, PreTrainedModel):
    """Loading, initialisation and capabilities of both U-Net classes."""

    config: PixelUNetConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UNet2DModel"]
    _supports_sdpa = True

    def __init__(self, config: PixelUNetConfig):
        super().__init__(config)
        config.validate_unet()  # fields may have been set after construction

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's default initialisation; zero for the last convolution and the output maps of attention."""
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Conv2d:
        """The first convolution, which takes the place of a token embedding."""
        return self.base_model.unet.conv_in

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise ValueError("the pixel U-Net has no token embedding to replace.")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Not supported.

        Raises:
            ValueError: Always.
        """
        raise ValueError("the rows of a pixel U-Net are the values of its pixels; build another model instead.")


class PixelUNetModel(PixelUNetPreTrainedModel):
    """Ids (B, L) to mean and log-scale (mu, b) of each value, (B, L, 2): the input of `LogisticHead`."""

    def __init__(self, config: PixelUNetConfig):
        super().__init__(config)
        self.unet = make_unet(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None = None,
        class_labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """(mu, b), (B, L, 2) float32 or wider; the arguments are those of [`PixelUNetForDiffusion`]."""
        refuse_unknown_arguments("PixelUNet", kwargs)
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise ValueError(f"{name}=True is not supported by the pixel U-Net; leave it out.")
        self._check_inputs(input_ids, timesteps, class_labels)
        config = self.config
        ids = input_ids.reshape(-1, config.image_channels, config.image_size, config.image_size)
        values, sample = self._scaled(ids)
        sigma = torch.zeros(len(ids), device=ids.device) if timesteps is None else timesteps
        inputs = {"sample": sample.to(self.unet.conv_in.weight.dtype), "timestep": _TIME_SCALE * sigma}
        if config.num_classes is not None:
            null = torch.full((len(ids),), config.num_classes, device=ids.device)
            inputs["class_labels"] = null if class_labels is None else class_labels
        a, b = self.unet(**inputs).sample.chunk(2, dim=1)
        mu = torch.tanh(values + a.to(work_dtype(a)))
        return BaseModelOutput(last_hidden_state=torch.stack((mu, b.to(mu.dtype)), -1).flatten(1, 3))

    def _scaled(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Values on the scale [-1, 1], (B, C, S, S), and the network's input, with planes of [MASK] (B, 2 C, S, S)."""
        if not self.config.mask_channels:
            values = 2 * ids.float() / self.config.num_bins - 1
            return values, values
        masked = ids == self.config.mask_token_id
        values = ((2 * ids.float() + 1) / self.config.num_bins - 1).masked_fill(masked, 0.0)
        return values, torch.cat((values, masked.float()), dim=1)

    def _check_inputs(self, input_ids: Tensor, timesteps: Tensor | None, class_labels: Tensor | None) -> None:
        """Raise ValueError for ids that are no image, and times and labels that the network does not take."""
        config, length = self.config, self.config.max_position_embeddings
        check_text(input_ids, None)
        if input_ids.ndim != 2 or input_ids.shape[1] != length:
            raise ValueError(
                f"input_ids of shape {tuple(input_ids.shape)} must be (B, {length}), the values of an image of "
                f"{config.image_channels} x {config.image_size} x {config.image_size}; generate with "
                f"max_new_tokens={length}."
            )
        check_conditions(config, len(input_ids), timesteps, class_labels)


class PixelUNetForDiffusion(ConfiguredNoise, XDLMGenerationMixin, PixelUNetPreTrainedModel):
    """The pixel U-Net: ids of images (B, L), noisy or masked, to logits of the clean values (B, L, N).

    `unet` is diffusers' network. `noise_process()` gives the noise that the checkpoint was trained with and the
    objective; `generate()` samples whole images, by default with the ancestral sampler.
    """

    def __init__(self, config: PixelUNetConfig):
        super().__init__(config)
        self.backbone = PixelUNetModel(config)
        self.head = LogisticHead(config.num_values, config.num_bins, config.vocab_size)
        self._set_generation_defaults()
        self.post_init()

    @property
    def unet(self) -> nn.Module:
        """diffusers' `UNet2DModel`."""
        return self.backbone.unet

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        super().adjust_generation_fn(*args, **kwargs)
        self._set_generation_defaults()

    def _set_generation_defaults(self) -> None:
        if self.generation_config.sampler is None:
            self.generation_config.sampler = "ancestral"
        if self.generation_config.max_new_tokens is None:
            self.generation_config.max_new_tokens = self.config.max_position_embeddings

    def get_output_embeddings(self) -> LogisticHead:
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    def training_flops_per_token(self) -> float:
        """Floating-point operations that training needs per token: three forward passes over an image, by its tokens.

        Convolutions use a weight once per position of their level, so that they cannot be counted from the weights.
        """
        length = self.config.max_position_embeddings
        with torch.device("meta"):
            model, ids = PixelUNetModel(self.config), torch.zeros(1, length, dtype=torch.long)
            sigma = torch.zeros(1) if self.config.time_conditioning else None
        with FlopCounterMode(display=False) as counter:
            model(ids, timesteps=sigma)
        return 3 * counter.get_total_flops() / length

    @plain_output_layer
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None = None,
        class_labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Noisy ids z_t of whole images, channel by channel, each row by row.
            timesteps (`torch.FloatTensor` of shape `(B,)`, *optional*):
                Noise level sigma of each row; required with the config's `time_conditioning`, else refused.
            class_labels (`torch.LongTensor` of shape `(B,)`, *optional*, defaults to the null class `num_classes`):
                Only for a config with `num_classes`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Positions of the output layer: the last n, 0 for all; a LongTensor of columns, logits `(B, n, N)`; or a
                bool mask `(B, L)`, logits `(number selected, N)` in row-major order.

        Returns:
            [`~transformers.modeling_outputs.MaskedLMOutput`] with `logits`, float32 or wider, and no loss. Those of
            [MASK] and of rows without a value are -inf.

        Raises:
            ValueError: If the ids are no image of the config's size, the inputs do not fit the config, or an argument
                is unknown.
        """
        check_text(input_ids, None, logits_to_keep)
        hidden = self.backbone(input_ids, timesteps=timesteps, class_labels=class_labels, **kwargs).last_hidden_state
        return MaskedLMOutput(logits=self.head(kept_positions(hidden, logits_to_keep)))


__all__ = ["PixelUNetForDiffusion", "PixelUNetModel", "PixelUNetPreTrainedModel"]
