"""Parameters of the released CIFAR-10 U-Nets, as parameters of diffusers' `UNet2DModel`.

    temb_modules.{0,1}                      time_embedding.linear_{1,2}
    cond_map.embedding_table                class_embedding, without the row that was never trained
    input_conv, output_modules.{0,1}        conv_in, conv_norm_out, conv_out
    downsampling_modules.*, in order        down_blocks.l.{resnets.r, attentions.r, downsamplers.0}
    middle_modules.{0,1,2}                  mid_block.{resnets.0, attentions.0, resnets.1}
    upsampling_modules.*, in order          up_blocks.j.{resnets.r, attentions.r, upsamplers.0}
    groupnorm0, conv0, dense0               norm1, conv1, time_emb_proj
    groupnorm1, conv1, nin                  norm2, conv2, conv_shortcut
    GroupNorm_0, NIN_{0,1,2,3}              group_norm, to_q, to_k, to_v, to_out.0

The order is that of the released network's parameters.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configuration_unet import PixelUNetConfig

_RESIDUAL = {
    "groupnorm0": "norm1",
    "conv0": "conv1",
    "dense0": "time_emb_proj",
    "groupnorm1": "norm2",
    "conv1": "conv2",
}
_ATTENTION = {"NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out.0"}
_KINDS = {"residual": "conv0.weight", "attention": "NIN_0.W", "resampling": "conv.weight"}


class Released(NamedTuple):
    """Released parameter, parameter of `UNet2DModel`, and how the values differ.

    "same"; "transposed" is a matrix that is a transposed one here; "convolution" the same of a 1 x 1 convolution;
    "classes" the class table, which has one row less here.
    """

    theirs: str
    ours: str
    kind: str = "same"

    def shape(self, own: Sequence[int]) -> tuple[int, ...]:
        """Shape of the released parameter, from that of the parameter here."""
        if self.kind == "classes":
            return own[0] + 1, own[1]
        return tuple(own) if self.kind == "same" else (own[1], own[0])

    def converted(self, weight: Tensor) -> Tensor:
        """The values of the parameter here."""
        if self.kind == "classes":
            return trained_classes(weight)
        if self.kind == "convolution":
            return weight.mT[..., None, None]
        return weight.mT if self.kind == "transposed" else weight


def trained_classes(table: Tensor) -> Tensor:
    """The rows of a class table (num_classes + 2, D) that were trained: the null class is the last, not the one before.

    Raises:
        ValueError: If the table has fewer than three rows.
    """
    if table.ndim != 2 or len(table) < 3:
        raise ValueError(f"a class table of shape {tuple(table.shape)} must have a row per class and two more.")
    return torch.cat((table[:-2], table[-1:]))


def released_parameters(config: PixelUNetConfig) -> Iterator[Released]:
    """All parameters, in the order of the released network."""
    yield from _both("temb_modules.0", "time_embedding.linear_1")
    yield from _both("temb_modules.1", "time_embedding.linear_2")
    yield from _both("input_conv", "conv_in")
    yield from _downward(config)
    yield from _residual("middle_modules.0", "mid_block.resnets.0")
    yield from _attention("middle_modules.1", "mid_block.attentions.0")
    yield from _residual("middle_modules.2", "mid_block.resnets.1")
    yield from _upward(config)
    yield from _both("output_modules.0", "conv_norm_out")
    yield from _both("output_modules.1", "conv_out")
    if config.num_classes is not None:
        yield Released("cond_map.embedding_table.weight", "class_embedding.weight", "classes")


def _downward(config: PixelUNetConfig) -> Iterator[Released]:
    place, levels, before = 0, config.num_hidden_layers, 1
    for level, factor in enumerate(config.channel_multipliers):
        for block in range(config.residual_blocks):
            wider, before = factor != before, factor
            yield from _residual(f"downsampling_modules.{place}", f"down_blocks.{level}.resnets.{block}", wider)
            place += 1
            if level in config.attention_levels:
                yield from _attention(f"downsampling_modules.{place}", f"down_blocks.{level}.attentions.{block}")
                place += 1
        if level < levels - 1:
            yield from _both(f"downsampling_modules.{place}.conv", f"down_blocks.{level}.downsamplers.0.conv")
            place += 1


def _upward(config: PixelUNetConfig) -> Iterator[Released]:
    place, levels = 0, config.num_hidden_layers
    for at, level in enumerate(reversed(range(levels))):
        for block in range(config.residual_blocks + 1):
            # Its input also has a skip connection, so that the shortcut always changes the width.
            yield from _residual(f"upsampling_modules.{place}", f"up_blocks.{at}.resnets.{block}", True)
            place += 1
            if level in config.attention_levels:
                yield from _attention(f"upsampling_modules.{place}", f"up_blocks.{at}.attentions.{block}")
                place += 1
        if level:
            yield from _both(f"upsampling_modules.{place}.conv", f"up_blocks.{at}.upsamplers.0.conv")
            place += 1


def _both(theirs: str, ours: str) -> Iterator[Released]:
    for kind in ("weight", "bias"):
        yield Released(f"{theirs}.{kind}", f"{ours}.{kind}")


def _residual(theirs: str, ours: str, shortcut: bool = False) -> Iterator[Released]:
    for name, own in _RESIDUAL.items():
        yield from _both(f"{theirs}.{name}", f"{ours}.{own}")
    if shortcut:
        yield Released(f"{theirs}.nin.W", f"{ours}.conv_shortcut.weight", "convolution")
        yield Released(f"{theirs}.nin.b", f"{ours}.conv_shortcut.bias")


def _attention(theirs: str, ours: str) -> Iterator[Released]:
    yield from _both(f"{theirs}.GroupNorm_0", f"{ours}.group_norm")
    for name, own in _ATTENTION.items():
        yield Released(f"{theirs}.{name}.W", f"{ours}.{own}.weight", "transposed")
        yield Released(f"{theirs}.{name}.b", f"{ours}.{own}.bias")


# --------------------------------------------------------------------------------------------------------------------
# Sizes from the weights


def sizes_of_names(named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of the config that follow from names and shapes.

    Raises:
        ValueError: If the names are not those of the network.
    """
    first, table = named.get("input_conv.weight"), named.get("cond_map.embedding_table.weight")
    kinds = list(_kinds(named))
    if first is None or first.ndim != 4 or not kinds or kinds[0][0] != "residual":
        raise ValueError(
            "the weights are not those of a released U-Net, which have input_conv.weight and downsampling_modules.*."
        )
    levels: list[list[tuple[str, int]]] = [[]]
    for kind, width in kinds:
        if kind == "resampling":
            levels.append([])
        else:
            levels[-1].append((kind, width))
    channels = first.shape[0]
    residual = [[width for kind, width in level if kind == "residual"] for level in levels]
    if not all(residual):
        raise ValueError("the weights are not those of a released U-Net: a level of it has no residual block.")
    fields = {
        "channels": channels,
        "image_channels": first.shape[1],
        "channel_multipliers": [widths[0] // channels for widths in residual],
        "residual_blocks": len(residual[0]),
        "attention_levels": [i for i, level in enumerate(levels) if any(kind == "attention" for kind, _ in level)],
    }
    return fields | ({} if table is None else {"num_classes": len(trained_classes(table)) - 1})


def _kinds(named: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Kind and output width of each downsampling module, in order."""
    numbers = {int(found[1]) for name in named if (found := re.match(r"downsampling_modules\.(\d+)\.", name))}
    for number in sorted(numbers):
        weights = {kind: named.get(f"downsampling_modules.{number}.{name}") for kind, name in _KINDS.items()}
        yield from ((kind, len(weight)) for kind, weight in weights.items() if weight is not None)


def sizes_of_list(weights: Sequence[Tensor]) -> dict[str, Any]:
    """The same of a list of parameters; the rest are then the config's own.

    Raises:
        ValueError: If the list cannot be that of the network.
    """
    if len(weights) < 10 or weights[4].ndim != 4 or weights[-1].ndim != 2:
        raise ValueError(
            f"a list of {len(weights)} tensors is not that of a released U-Net, whose fifth is a convolution and whose "
            "last is the class table."
        )
    channels, image_channels = weights[4].shape[:2]
    return {
        "channels": channels,
        "image_channels": image_channels,
        "num_classes": len(trained_classes(weights[-1])) - 1,
    }
