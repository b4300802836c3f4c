"""A VQ tokenizer without a network: a codebook of image patches. For small images, such as 8 x 8 digits.

It has the methods of diffusers' `VQModel` that `VQCodes` and `XDLMImagePipeline` use.

Shapes: B batch, C channels, H height, W width, P side of a patch, h = H / P, w = W / P.
"""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, VectorQuantizer
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class PatchVQ(ModelMixin, ConfigMixin):
    """Codes are indices of the nearest patch of the codebook, `quantize.embedding.weight` (num_codes, C P P).

    Args:
        num_codes (`int`): Rows of the codebook.
        patch_size (`int`): P.
        in_channels (`int`): C.
    """

    @register_to_config
    def __init__(self, num_codes: int, patch_size: int, in_channels: int = 1, lookup_from_codebook: bool = True):
        super().__init__()
        self.quantize = VectorQuantizer(num_codes, in_channels * patch_size**2, beta=0.25)

    def encode(self, x: Tensor) -> VQEncoderOutput:
        """Patches (B, C P P, h, w) of images (B, C, H, W) in [-1, 1]."""
        return VQEncoderOutput(latents=pixel_unshuffle(x, self.config.patch_size))

    def decode(self, h: Tensor, force_not_quantize: bool = True, shape: tuple[int, ...] | None = None) -> DecoderOutput:
        """Images (B, C, H, W) of codes (B, h, w)."""
        return DecoderOutput(sample=pixel_shuffle(self.quantize.get_codebook_entry(h, shape), self.config.patch_size))
