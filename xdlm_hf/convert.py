"""Conversion of released weights into checkpoints that `from_pretrained` loads.

    python -m xdlm_hf.convert dit --from FILE --to DIR        models of text, of the paper and of MDLM, UDLM and Duo
    python -m xdlm_hf.convert unet --from FILE --to DIR       models of CIFAR-10 images
    python -m xdlm_hf.convert llamagen-vq --from FILE --to DIR    LlamaGen's tokenizer of images, as a diffusers model

read a Lightning checkpoint (`state_dict`, `ema`), a file with only `ema`, a plain dictionary of tensors, or
safetensors. Files of `torch.save` are read with `weights_only=True`, which builds only tensors and plain containers and
runs no code of the file.

Sizes are read from the shapes. What they do not determine (heads, length, noise, [MASK], image size) is set by options,
or by default as in the paper's models of the same sizes.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from .atomic import check_new_folder, new_folder
from .data.images import VQCodes, images_extra
from .data.llamagen import renamed, vq_sizes
from .loading import add_version_option
from .models.dit.configuration_dit import DiTConfig, UDLMConfig
from .models.dit.modeling_dit import DiTForDiffusionLM, UDLMForDiffusionLM
from .models.unet.configuration_unet import PixelUNetConfig
from .models.unet.modeling_unet import PixelUNetForDiffusion
from .models.unet.released_unet import released_parameters, sizes_of_list, sizes_of_names

PREFIX = "backbone."
_DROPPED = "rotary_emb.inv_freq"
# Values of the paper's models: heads by width; length and [MASK] by rows of the embedding.
_HEADS = {256: 8, 768: 12, 1024: 16}
_LENGTHS = {50258: 1024, 30522: 128, 35: 256}
_MASKS = {30522: 103, 35: 4}


def released_dit(weights: Mapping[str, Tensor] | Sequence[Tensor], config: Mapping[str, Any] | None = None):
    """The model with released weights.

    Args:
        weights: Tensors by name, with or without the prefix `backbone.`; or the list of an EMA file, in the order of
            the network's parameters.
        config: Fields of [`DiTConfig`] that shapes do not determine; `mixing_ratio=1` gives a `udlm` checkpoint.

    Returns:
        [`DiTForDiffusionLM`], float32, in evaluation mode.

    Raises:
        ValueError: If a name or a shape differs from the network's, or heads or length are unknown.
    """
    if isinstance(weights, Mapping):
        named = _without_prefix(weights)
        fields = _sizes_of_names(named)
    else:
        named, fields = None, _sizes_of_list(weights)
    given = dict(config or {})
    _check_sizes(given, fields)
    udlm = given.get("mixing_ratio") == 1
    fields |= {"time_conditioning": False, "mask_token_id": None if udlm else _MASKS.get(fields["vocab_size"])}
    gidd = given.get("noise_process") == "gidd"  # its models have another length than the paper's
    length = None if gidd else _LENGTHS.get(fields["vocab_size"])
    known = {"n_heads": _HEADS.get(fields["hidden_dim"]), "model_length": length}
    fields = {**{name: value for name, value in known.items() if value is not None}, **fields, **given}
    for name in known:
        if name not in fields:
            raise ValueError(f"{name} does not follow from the shapes; pass --{name}.")
    config_class, model_class = (UDLMConfig, UDLMForDiffusionLM) if udlm else (DiTConfig, DiTForDiffusionLM)
    model = model_class(config_class(**fields)).eval()
    wanted = {name.removeprefix(PREFIX): weight for name, weight in model.named_parameters()}
    if named is None:
        named = dict(zip(wanted, weights, strict=True))
    _check(named, wanted, "DiT")
    with torch.no_grad():
        for name, weight in wanted.items():
            weight.copy_(named[name])
    return model


def llamagen_vq(weights: Mapping[str, Tensor]):
    """LlamaGen's VQ tokenizer (`vq_ds16_c2i.pt`: 16,384 codes, of 16 x 16 pixels each) as a diffusers `VQModel`.

    The rows of the codebook are normalised. LlamaGen normalises them, and the encoder's output z, at each use; the
    nearest row of length 1 to z is that to z / |z|, so that diffusers' plain search and look-up give LlamaGen's codes
    and images.

    Args:
        weights: Tensors by LlamaGen's names.

    Returns:
        A `VQModel`, float32, in evaluation mode.

    Raises:
        ValueError: If a name is missing or unknown, or a shape differs from the network's.
    """
    with images_extra():
        from diffusers import VQModel

    model = VQModel(**vq_sizes(weights)).eval()
    named, wanted = renamed(weights), model.state_dict()
    _check(named, wanted, "VQ tokenizer")
    codebook = "quantize.embedding.weight"
    named[codebook] = torch.nn.functional.normalize(named[codebook].double(), dim=-1)
    with torch.no_grad():
        for name, weight in wanted.items():
            weight.copy_(named[name])
    return model


def released_unet(
    weights: Mapping[str, Tensor] | Sequence[Tensor], config: Mapping[str, Any] | PixelUNetConfig | None = None
) -> PixelUNetForDiffusion:
    """The pixel U-Net with released weights; the released class table's row that was never trained is left out.

    Args:
        weights: Tensors by name, with or without the prefix `backbone.`; or the list of an EMA file, in the order of
            the network's parameters.
        config: A [`PixelUNetConfig`], or fields of it that shapes do not determine.

    Returns:
        [`PixelUNetForDiffusion`], float32, in evaluation mode, with `mask_channels=False`.

    Raises:
        ValueError: If a name or a shape differs from the network's, or the config contradicts the shapes.
    """
    named = _without_prefix(weights) if isinstance(weights, Mapping) else None
    fields = sizes_of_list(weights) if named is None else sizes_of_names(named)
    fields["mask_channels"] = False
    given = dict(config or {}) if not isinstance(config, PixelUNetConfig) else _fields(config)
    _check_sizes(given, fields)
    model = PixelUNetForDiffusion(PixelUNetConfig(**{**fields, **given})).eval()
    own = dict(model.unet.named_parameters())
    released = list(released_parameters(model.config))
    if named is None:
        if len(weights) != len(released):
            raise ValueError(f"a list of {len(weights)} tensors does not fit a U-Net of {len(released)} parameters.")
        named = {each.theirs: weight for each, weight in zip(released, weights, strict=True)}
    wanted = {each.theirs: torch.empty(each.shape(own[each.ours].shape), device="meta") for each in released}
    _check(named, wanted, "U-Net")
    with torch.no_grad():
        for each in released:
            own[each.ours].copy_(each.converted(named[each.theirs]))
    return model


def _fields(config: PixelUNetConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in PixelUNetConfig.__annotations__}


def _check_sizes(given: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a field that contradicts the one read from the shapes."""
    for name in fields.keys() & given.keys():
        if fields[name] != given[name]:
            raise ValueError(f"{name}={given[name]} contradicts the shapes, which give {fields[name]}; leave it out.")


def _without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefixed = [name for name in weights if name.startswith(PREFIX)]
    if prefixed and len(prefixed) < len(weights):
        raise ValueError(f"unknown names next to {PREFIX}*: {_some(set(weights) - set(prefixed))}.")
    return {name.removeprefix(PREFIX): weight for name, weight in weights.items()}


def _sizes_of_names(named: dict[str, Tensor]) -> dict[str, Any]:
    """Sizes from the shapes; removes the rotary buffer, which determines the heads, from the weights."""
    first = ("vocab_embed.embedding", "sigma_map.mlp.0.weight")
    missing = [name for name in first if name not in named or named[name].ndim != 2]
    if missing:
        raise ValueError(f"the file is not a supported DiT: it lacks {_some(missing)} and holds {_some(named)}.")
    (rows, width), cond_dim = named[first[0]].shape, len(named[first[1]])
    fields = {"vocab_size": rows, "hidden_dim": width, "cond_dim": cond_dim}
    fields["n_blocks"] = len({name.split(".")[1] for name in named if re.match(r"blocks\.\d+\.", name)})
    table = named.get("y_embedder.embedding_table.weight")
    if table is not None:
        fields["num_classes"] = len(table) - 1
    frequencies = named.pop(_DROPPED, None)
    if frequencies is not None:
        fields["n_heads"] = width // (2 * len(frequencies))
    return fields


def _sizes_of_list(weights: Sequence[Tensor]) -> dict[str, Any]:
    """Sizes from a list of parameters: 10 outside the blocks, 10 in each block, and optionally a class table."""
    blocks, classes = divmod(len(weights) - 10, 10)
    if blocks < 1 or classes > 1 or any(weights[i].ndim != 2 for i in (0, 1, 5)[: 2 + classes]):
        shapes = [tuple(weight.shape) for weight in weights[:6]]
        raise ValueError(
            f"a list of {len(weights)} tensors, the first of shapes {shapes}, is not a supported DiT, which has 10 "
            "parameters per block and 10 others, or 11 with class labels."
        )
    (rows, width), cond_dim = weights[0].shape, len(weights[1])
    fields = {"vocab_size": rows, "hidden_dim": width, "cond_dim": cond_dim, "n_blocks": blocks}
    return fields | ({"num_classes": len(weights[5]) - 1} if classes else {})


def _check(named: Mapping[str, Tensor], wanted: Mapping[str, Tensor], network: str) -> None:
    problems = []
    for verb, names in (("lack", wanted.keys() - named.keys()), ("hold unknown", named.keys() - wanted.keys())):
        problems += [f"{verb} {_some(names)}"] if names else []
    both = [(name, tuple(named[name].shape), tuple(wanted[name].shape)) for name in wanted if name in named]
    shapes = [f"{name} {theirs} instead of {ours}" for name, theirs, ours in both if theirs != ours]
    problems += [f"hold {_some(shapes)}"] if shapes else []
    if problems:
        raise ValueError(f"the weights are not a supported {network}: they {'; they '.join(problems)}.")
    strange = [name for name, weight in named.items() if not weight.is_floating_point()]
    if strange:
        raise ValueError(f"{_some(strange)}: weights must be floating-point numbers.")


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --------------------------------------------------------------------------------------------------------------------
# Files


def read_weights(path: str | Path, ema: bool | None = None) -> tuple[dict[str, Tensor] | list[Tensor], str]:
    """Weights of a file and their kind, "ema" or "raw".

    Args:
        path: A file of `torch.save` or safetensors.
        ema: Whether to read the moving average; by default if there is one.

    Raises:
        ValueError: If there is no such file, it would run code when loaded, or it lacks these weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; pass the checkpoint file.")
    whole = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    averages = whole.get("ema")
    if isinstance(averages, Mapping):
        averages = averages.get("shadow_params")
    has_average = isinstance(averages, list) and averages and all(isinstance(x, Tensor) for x in averages)
    if ema and not has_average:
        raise ValueError(f"{path} has no moving average (ema.shadow_params); leave out --ema.")
    if has_average and ema is not False:
        return averages, "ema"
    raw = whole.get("state_dict", whole.get("model", whole))
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(x, Tensor) for x in raw.values()):
        what = ", ".join(map(str, list(whole)[:6]))
        raise ValueError(f"{path} has neither named tensors nor ema.shadow_params; its entries are {what}.")
    return dict(raw), "raw"


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); copy or download it again.") from error


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a complete file of torch.save ({' '.join(str(error).split())}); copy or download it again."
        ) from error
    if unsafe:
        raise ValueError(
            f"{path} is refused, because it contains objects of {_some(unsafe)}, and loading them could run any code. "
            "If you trust it, save only the tensors where these classes are installed: whole = torch.load(FILE, "
            "weights_only=False); torch.save({'state_dict': whole['state_dict'], 'ema': whole['ema']}, NEW)."
        )
    whole = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(whole, Mapping):
        raise ValueError(f"{path} contains a {type(whole).__name__}, not a dictionary of tensors.")
    return dict(whole)


# --------------------------------------------------------------------------------------------------------------------
# Command


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m xdlm_hf.convert", description="Convert released weights.")
    add_version_option(main)
    kinds = main.add_subparsers(dest="kind", required=True)
    dit = kinds.add_parser("dit", help="the text models of the paper")
    unet = kinds.add_parser("unet", help="the CIFAR-10 models of the paper")
    vq = kinds.add_parser("llamagen-vq", help="LlamaGen's VQ tokenizer (vq_ds16_c2i.pt)")
    for kind in (dit, unet, vq):
        kind.add_argument("--from", dest="source", required=True, metavar="FILE", help="of torch.save, or safetensors")
        kind.add_argument("--to", dest="folder", required=True, metavar="DIR", help="new folder")
    for kind in (dit, unet):
        kind.add_argument(
            "--ema", action=argparse.BooleanOptionalAction, help="read the moving average (default: if there is one)"
        )
        kind.add_argument("--mixing_ratio", type=float, help="k of the noise: 0 MDLM (default), 1 UDLM")
        kind.add_argument("--p_uniform", type=float, help="noise of GIDD with this share of uniform noise")
        kind.add_argument("--time_conditioning", action="store_true", help="the network was trained with times")
    for name in ("n_heads", "model_length", "mask_token_id"):
        dit.add_argument(f"--{name}", type=int, help="default: as in the paper's models of these sizes")
    unet.add_argument("--image_size", type=int, help="height and width of the images; default: 32")
    return main


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = vars(parser().parse_args(arguments))
    kind, source, folder = (options.pop(name) for name in ("kind", "source", "folder"))
    try:
        check_new_folder(folder)
        model, report = _convert_vq(source) if kind == "llamagen-vq" else _convert_network(kind, source, **options)
        with new_folder(folder) as unfinished:
            model.save_pretrained(unfinished)
    except (ValueError, ImportError, StrictDataclassError) as error:
        sys.exit(f"error: {' '.join(str(error.__cause__ or error).split())}")
    print(f"{report}\nwritten to {folder}")


def _convert_network(kind: str, source: str, ema: bool | None, **options: Any) -> tuple[PreTrainedModel, str]:
    """The model of a file, and what was read."""
    config = {name: value for name, value in options.items() if value is not None}
    if "p_uniform" in config:
        config["noise_process"] = "gidd"
    weights, which = read_weights(source, ema)
    model = {"dit": released_dit, "unet": released_unet}[kind](weights, config)
    kinds = {"ema": "the moving average", "raw": "the trained weights, not a moving average"}
    assumed = "" if config.keys() & {"mixing_ratio", "p_uniform"} else ", assumed"
    read = f"read {kinds[which]}: {model.num_parameters():,} parameters, N = {model.config.vocab_size}"
    return model, f"{read}\nnoise: {model.noise_process()!r}{assumed}"


def _convert_vq(source: str) -> tuple[Any, str]:
    """The tokenizer of a file, and what was read."""
    vqvae = llamagen_vq(read_weights(source, ema=False)[0])
    codes = VQCodes(vqvae)
    sizes = f"{codes.num_codes:,} codes of width {codes.width}, of {codes.factor} x {codes.factor} pixels each"
    return vqvae, f"read a VQ tokenizer: {vqvae.num_parameters():,} parameters, {sizes}"


if __name__ == "__main__":
    main()
