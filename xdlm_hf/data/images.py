"""Images as token ids and back: pixels exactly, or the codes of a VQ tokenizer.

Shapes: B batch, C channels (1 grey, 3 RGB), H height, W width, L tokens. Images are uint8, 0..255.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLOURS = 256
_MODES = {"L": 1, "RGB": 3}  # of PIL images, with their channels


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
