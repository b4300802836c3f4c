"""Images as token ids and back: pixels exactly, or the codes of a VQ tokenizer.

Shapes: B batch, C channels (1 grey, 3 RGB), H height, W width, L tokens. Images are uint8, 0..255.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLOURS = 256
_MODES = {"L": 1, "RGB": 3}  # of PIL images, with their channels


@contextlib.contextmanager
def images_extra() -> Iterator[None]:
    """Around the import of a package of the extra `images`: the error names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; install the extra: pip install 'xdlm_hf[images]'") from error


def pixel_ids(images: Tensor | Any | Sequence[Any]) -> Tensor:
    """Ids of the pixels of images, channel by channel, each row by row; exact.

    Args:
        images: uint8 (B, C, H, W), a PIL image, or a list of PIL images of one size, of mode "L" or "RGB".

    Returns:
        (B, C * H * W) int64, in 0..255.

    Raises:
        ValueError: If the images are of another dtype, shape or mode, or differ from each other.
    """
    return as_uint8(images).flatten(1).long()


def ids_to_images(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Images of pixel ids; the inverse of `pixel_ids`.

    Args:
        ids: (B, C * H * W), integers in 0..255.
        shape: (C, H, W).

    Returns:
        uint8 (B, C, H, W), on the device of the ids.

    Raises:
        ValueError: If an id is not a colour (such as [MASK]), or the number of ids is not that of the pixels.
    """
    channels, height, width = shape
    if ids.ndim != 2 or ids.shape[1] != channels * height * width:
        raise ValueError(
            f"ids of shape {tuple(ids.shape)} must be (B, {channels * height * width}), one for each value of images "
            f"of {channels} x {height} x {width}."
        )
    check_token_range(ids, COLOURS, "a colour")
    return ids.to(torch.uint8).view(-1, channels, height, width)


def as_uint8(images: Tensor | Any | Sequence[Any]) -> Tensor:
    """The images as uint8 (B, C, H, W); the argument and the errors are those of `pixel_ids`."""
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in _MODES.values():
            raise ValueError(
                f"images of shape {tuple(images.shape)} {images.dtype} must be uint8 (B, C, H, W) with C = 1 or 3."
            )
        return images
    images = list(images) if isinstance(images, Sequence) else [images]
    if not images:
        raise ValueError("the list of images is empty; pass at least one.")
    first = images[0]
    for i, image in enumerate(images):
        if getattr(image, "mode", None) not in _MODES:
            what = getattr(image, "mode", None) or type(image).__name__
            raise ValueError(f"image {i} is {what!r}, not a PIL image of mode 'L' or 'RGB'; use image.convert('RGB').")
        if (image.mode, image.size) != (first.mode, first.size):
            raise ValueError(
                f"image {i} is {image.mode} {image.size[0]} x {image.size[1]}, but image 0 is {first.mode} "
                f"{first.size[0]} x {first.size[1]}; a batch needs one mode and size."
            )
    pixels = [np.array(image).reshape(image.size[1], image.size[0], _MODES[image.mode]) for image in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def check_token_range(ids: Tensor, count: int, what: str) -> None:
    """Raise ValueError for the first id outside [0, count), which is not `what`."""
    wrong = (ids < 0) | (ids >= count)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"id {int(ids[row, column])} at row {row} column {column} is not {what}: these are 0..{count - 1}. In a "
            "sample, such ids are of rows without data; list these rows as suppress_tokens."
        )


def pil_images(images: Tensor) -> list[Any]:
    """uint8 images (B, C, H, W) as PIL images of mode "L" or "RGB"."""
    with images_extra():
        from PIL import Image

    pixels = as_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def resize_and_crop(image: Any, size: int, channels: int = 3) -> Any:
    """A PIL image in the mode of `channels`, its shorter side resized to `size` (bilinear), its centre cropped."""
    with images_extra():
        from PIL import Image

    image = image.convert({count: mode for mode, count in _MODES.items()}[channels])
    width, height = image.size
    shorter = min(width, height)
    width, height = int(size * width / shorter), int(size * height / shorter)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


class VQCodes:
    """Images to codes of a VQ tokenizer and back, in float32 whatever the surrounding autocast.

    Args:
        vqvae: A diffusers `VQModel`, or a `PatchVQ`. Its encoder's result is looked up in its codebook.

    Raises:
        ValueError: If it has no codebook, is of another kind, or not in float32.
    """

    def __init__(self, vqvae: Any):
        quantizer = getattr(vqvae, "quantize", None)
        if not hasattr(quantizer, "embedding") or not vqvae.config.lookup_from_codebook:
            raise ValueError(
                f"vqvae={type(vqvae).__name__} has no codebook that decodes codes; pass a diffusers VQModel with "
                "lookup_from_codebook=True."
            )
        if quantizer.embedding.weight.dtype != torch.float32:
            raise ValueError(
                f"the tokenizer's weights are {quantizer.embedding.weight.dtype}, in which codes are not exact; load "
                "it in float32, a pipeline for example with torch_dtype={'transformer': torch.bfloat16}."
            )
        self.vqvae = vqvae
        self.num_codes, self.width = quantizer.embedding.weight.shape
        self.channels = vqvae.config.in_channels

    @property
    def device(self) -> torch.device:
        return self.vqvae.quantize.embedding.weight.device

    @property
    def factor(self) -> int:
        """Pixels of a code's side."""
        config = self.vqvae.config
        return getattr(config, "patch_size", None) or 2 ** (len(config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes of images, row by row.

        Args:
            images: uint8 (B, C, H, W), H and W multiples of `factor`.

        Returns:
            (B, H W / factor^2) int64, in 0..num_codes - 1.

        Raises:
            ValueError: If the images are not uint8, or their channels or size do not fit the tokenizer.
        """
        images = as_uint8(images)
        _, channels, height, width = images.shape
        if channels != self.channels or height % self.factor or width % self.factor:
            raise ValueError(
                f"images of {channels} x {height} x {width} do not fit the tokenizer, which takes {self.channels} "
                f"channels and sides that are multiples of {self.factor}."
            )
        with torch.autocast(self.device.type, enabled=False):
            latents = self.vqvae.encode(images.to(self.device).float() / 127.5 - 1).latents
            codes = self.vqvae.quantize(latents)[2][2]
        return codes.view(len(images), -1).to(images.device)

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Images of codes, rounded to uint8.

        Args:
            codes: (B, L).
            grid: Rows and columns of codes; by default a square.

        Returns:
            uint8 (B, C, H, W), on the device of the codes.

        Raises:
            ValueError: If an id is not a code (such as [MASK]), or L is not the number of codes of the grid.
        """
        rows, columns = grid or (int(codes.shape[1] ** 0.5),) * 2
        if codes.ndim != 2 or rows * columns != codes.shape[1]:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)} are not (B, L) with L = {rows} x {columns}; give grid."
            )
        check_token_range(codes, self.num_codes, "a code")
        with torch.autocast(self.device.type, enabled=False):
            shape = (len(codes), rows, columns, self.width)
            images = self.vqvae.decode(
                codes.to(self.device).view(shape[:3]), force_not_quantize=True, shape=shape
            ).sample
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).to(codes.device)


def load_vq(path: str, subfolder: str | None = None) -> VQCodes:
    """The VQ tokenizer of a folder or Hub name, a diffusers `VQModel` or a `PatchVQ`, in float32.

    Raises:
        ValueError: If it cannot be read.
    """
    with images_extra():
        from diffusers import VQModel

        from .patch_vq import PatchVQ

    kinds = {kind.__name__: kind for kind in (VQModel, PatchVQ)}
    where = {"subfolder": subfolder} if subfolder else {}
    try:
        name = VQModel.load_config(path, **where).get("_class_name")
        if name not in kinds:
            raise ValueError(f"it is a {name}, not one of {', '.join(kinds)}")
        return VQCodes(kinds[name].from_pretrained(path, use_safetensors=True, **where).eval())
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"vqvae={path!r} cannot be read as a folder or Hub name of a VQ tokenizer: {cause}") from error
