"""Names and sizes of LlamaGen's VQ tokenizer, as diffusers' `VQModel` has them.

The one difference of values is in the codebook, which `xdlm_hf.convert.llamagen_vq` normalises.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Names of LlamaGen's modules, and those of diffusers.
_NAMES = (
    (r"^encoder\.conv_blocks\.", "encoder.down_blocks."),
    (r"^decoder\.conv_blocks\.", "decoder.up_blocks."),
    (r"\.mid\.0\.", ".mid_block.resnets.0."),
    (r"\.mid\.1\.", ".mid_block.attentions.0."),
    (r"\.mid\.2\.", ".mid_block.resnets.1."),
    (r"\.res\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
# Weights that determine sizes, with their dimensions; also the first convolution of each block.
_NEEDED = {"encoder.conv_in.weight": 4, "encoder.conv_out.weight": 4, "quantize.embedding.weight": 2}
_CONVOLUTION = "encoder.conv_blocks.{}.res.0.conv1.weight"


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by diffusers' names; a count of used codes, which is no weight, is left out."""
    found = {}
    for theirs, weight in weights.items():
        if theirs == "quantize.codebook_used":
            continue
        name = theirs
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        # Maps of attention are 1 x 1 convolutions there, and linear here.
        found[name] = weight.flatten(1) if ".attentions." in name and weight.ndim == 4 else weight
    return found


def vq_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `VQModel`, from LlamaGen's names and shapes.

    Raises:
        ValueError: If a weight that determines a size is missing, or is no matrix or convolution.
    """
    count = len({name.split(".")[2] for name in weights if name.startswith("encoder.conv_blocks.")})
    blocks = range(max(count, 1))
    needed = _NEEDED | {_CONVOLUTION.format(i): 4 for i in blocks}
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"the weights are not a supported VQ tokenizer: they lack {', '.join(missing)}.")
    for name, dimensions in needed.items():
        if weights[name].ndim != dimensions:
            raise ValueError(
                f"the weights are not a supported VQ tokenizer: {name} of shape {tuple(weights[name].shape)} has not "
                f"{dimensions} dimensions."
            )
    attends = [
        [f"{part}.conv_blocks.{i}.attn.0.q.weight" in weights for i in blocks] for part in ("encoder", "decoder")
    ]
    rows, width = weights["quantize.embedding.weight"].shape
    channels = weights["encoder.conv_in.weight"].shape[1]
    return {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": tuple("Attn" * attends + "DownEncoderBlock2D" for attends in attends[0]),
        "up_block_types": tuple("Attn" * attends + "UpDecoderBlock2D" for attends in attends[1]),
        "block_out_channels": tuple(len(weights[_CONVOLUTION.format(i)]) for i in blocks),
        "layers_per_block": len({x.split(".")[4] for x in weights if x.startswith("encoder.conv_blocks.0.res.")}),
        "latent_channels": len(weights["encoder.conv_out.weight"]),
        "vq_embed_dim": width,
        "num_vq_embeddings": rows,
        "norm_num_groups": 32,
        "lookup_from_codebook": True,
    }
