"""Export of a model for the Hub: weights, code files that load without this package, tokenizer and model card."""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .atomic import check_new_folder, new_folder
from .diffusion.process import StationaryProcess
from .generation.protocol import length_limit, output_rows
from .models.registry import MODEL_FAMILIES
from .models.unet.configuration_unet import PixelUNetConfig

PAPER = "arXiv 2602.01362"
_SPECIAL_TOKENS = ("mask_token_id", "eos_token_id", "pad_token_id")


def export_for_hub(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    vqvae: Any = None,
    base_model: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    measured: Sequence[Mapping[str, Any]] = (),
    published: Sequence[Mapping[str, Any]] = (),
    notes: str = "",
) -> Path:
    """Write a folder to upload to the Hub; it also loads without this package, with `trust_remote_code=True`.

    The folder holds model.safetensors (or shards), config.json with its `auto_map`, generation_config.json, the code
    files that the `auto_map` names, the tokenizer if given (that of images in `vqvae/`), and README.md, the model card.
    It is written atomically.

    Args:
        model: The model; merge adapters first.
        folder: Target folder; must not exist or be empty.
        tokenizer: Saved beside the model; its mask id, if it has one, must be the model's.
        vqvae: For a model of image codes, their tokenizer: a diffusers `VQModel` or a `PatchVQ`.
        base_model: Hub name of the checkpoint that training started from.
        license: Licence of the weights as a Hub identifier, e.g. "mit". The code files are Apache-2.0.
        repo_id: Future name of the model on the Hub, for the examples on the card; defaults to the folder's name.
        measured: Results of these weights, a dict from column to value for each row of the table: what, with which
            settings, value and error. For example {"task": "GSM8K", "steps": 32, "k": 0.1, "score": "29.3 ± 1.3"}.
        published: Results from elsewhere, in a table of their own; each row names its "source".
        notes: Markdown added to the card: data, training, limits.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder is not empty, the model is of no registered family or has an adapter, the config is
            invalid, a tokenizer does not fit the model, or a row of results lacks a column.
    """
    folder = check_new_folder(folder)
    _validate_model(model)
    _validate_config(model.config)
    if tokenizer is not None:
        _validate_tokenizer(tokenizer, model.config)
    if vqvae is not None:
        _validate_vqvae(vqvae, model.config)
    card = model_card(
        model,
        tokenizer,
        name=repo_id or folder.name,
        vqvae=vqvae,
        base_model=base_model,
        license=license,
        measured=measured,
        published=published,
        notes=notes,
    )
    with new_folder(folder) as export:
        with _auto_map(model.config, _write_code(model, export)):
            model.save_pretrained(export)
        if tokenizer is not None:
            tokenizer.save_pretrained(export)
        if vqvae is not None:
            vqvae.save_pretrained(export / "vqvae")
        (export / "README.md").write_text(card, encoding="utf-8")
    return folder


def model_card(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    name: str,
    vqvae: Any = None,
    base_model: str | None = None,
    license: str | None = None,
    measured: Sequence[Mapping[str, Any]] = (),
    published: Sequence[Mapping[str, Any]] = (),
    notes: str = "",
) -> str:
    """README.md of an export: base, k, schedule, special tokens, sizes, an example, results. See [`export_for_hub`].

    A model is one of images if its ids are pixels (a U-Net), or if `vqvae` is given. Results that were measured with
    these weights and results from elsewhere stand in sections of their own.
    """
    header = ["---", "library_name: transformers"]
    header += ["pipeline_tag: text-generation"] if tokenizer is not None else []  # images and codes have no tokenizer
    header += ["tags:", "- diffusion-language-model", "- xdlm", f"- {model.config.model_type}"]
    header += [f"base_model: {base_model}"] if base_model else []
    header += [f"license: {license}"] if license else []
    config = model.config
    facts = {
        "Base model": base_model or "none: trained from scratch",
        **_noise(model),
        "Parameters": f"{model.num_parameters():,}, {str(model.dtype).removeprefix('torch.')}",
        "Vocabulary N": f"{output_rows(config):,} rows of the output layer",
        "Training length": f"{length_limit(config):,} tokens",
    }
    images = _image_tokens(config, vqvae)
    facts |= {"Images": images} if images else {}
    facts |= {} if model.num_classes is None else {"Classes": f"{model.num_classes:,}, and none"}
    facts |= {
        field.removesuffix("_id").replace("_", " ").capitalize(): _describe(getattr(config, field, None), tokenizer)
        for field in _SPECIAL_TOKENS
    }
    table = ["| | |", "|---|---|"] + [f"| {fact} | {value} |" for fact, value in facts.items()]
    kind = "model of images" if images else "language model"
    weights = f"The weights: {license}." if license else "The weights: as stated for the base model."
    return "\n".join(
        [*header, "---", "", f"# {name}", ""]
        + [f"A discrete diffusion {kind} (`{config.model_type}`) after XDLM ({PAPER}): it starts from noise"]
        + ["and denoises all positions in parallel, in a chosen number of steps."]
        + ["", *table, "", "## Generate", "", "With the package `xdlm_hf`, no remote code:", ""]
        + (_image_usage(model, name, vqvae) if images else _text_usage(model, name))
        + ["", *_results(measured, published), *([notes.strip(), ""] if notes else [])]
        + ["## Licence", "", f"The code files: Apache-2.0. {weights}", ""]
    )


def _results(measured: Sequence[Mapping[str, Any]], published: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sections of the card with results.

    Raises:
        ValueError: If the rows of a table differ in their columns, or a published one names no source.
    """
    unsourced = next((row for row in published if not row.get("source")), None)
    if unsourced is not None:
        raise ValueError(f"published={dict(unsourced)} names no source; add 'source', a paper's table or a link.")
    lines = ["## Measured with these weights", ""]
    lines += _markdown("measured", measured) if measured else ["Nothing has been measured with these weights."]
    if published:
        lines += ["", "## Published elsewhere, not measured with these weights", "", *_markdown("published", published)]
    return [*lines, ""]


def _markdown(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of rows that have the same columns."""
    columns = list(rows[0])
    for row in rows:
        if set(row) != set(columns):
            raise ValueError(
                f"{name}: a row has the columns {sorted(row)}, the first one {sorted(columns)}; align them."
            )
    cells = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in cells]


def _noise(model: PreTrainedModel) -> dict[str, str]:
    """Rows of the card about the noise that the model was trained with."""
    process = model.noise_process()
    if not isinstance(process, StationaryProcess):
        return {"Noise": f"`{process!r}`"}
    k = process.kernel.mixing_ratio
    kind = {0: "masked noise only (MDLM)", 1: "uniform noise only (UDLM)"}.get(k, "masked and uniform noise (XDLM)")
    return {"Mixing ratio k (Eq. 7)": f"{k:g}, {kind}", "Noise schedule": process.schedule.name}


def _text_usage(model: PreTrainedModel, name: str) -> list[str]:
    by_class = "" if model.num_classes is None else " `class_labels=[0]` chooses a class, and `cfg_scale` guides by it."
    return [
        *_text_example(name, "import xdlm_hf  # registers the model type\n", ""),
        *("", "Without it, with the code files of this repository:", ""),
        *_text_example(name, "", ", trust_remote_code=True"),
        *("", "`model.generate(steps=32)` generates without a prompt. More steps take more forward passes and usually"),
        f"give better text.{by_class}",
    ]


def _text_example(name: str, first_line: str, argument: str) -> list[str]:
    return [
        "```python",
        f"{first_line}from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto"{argument})',
        'inputs = tokenizer(["The capital of France is"], return_tensors="pt").to(model.device)',
        "sequences = model.generate(**inputs, steps=32, max_new_tokens=64)",
        "print(tokenizer.batch_decode(sequences, skip_special_tokens=True))",
        "```",
    ]


def _image_tokens(config: PreTrainedConfig, vqvae: Any) -> str | None:
    """What the tokens of an image are, or None for a model of text."""
    if vqvae is not None:
        codes = len(vqvae.quantize.embedding.weight)
        return f"{length_limit(config):,} codes each, of a codebook of {codes:,}; their tokenizer is in `vqvae/`"
    if isinstance(config, PixelUNetConfig):
        size = f"{config.image_channels} x {config.image_size} x {config.image_size}"
        return f"{size} (channels, height, width), {config.num_values} values"
    return None


def _image_usage(model: PreTrainedModel, name: str, vqvae: Any) -> list[str]:
    config, by_class = model.config, model.num_classes is not None
    imports = [] if vqvae is None else ["from xdlm_hf.data.images import load_vq"]
    parts = "model" if vqvae is None else f'model, load_vq("{name}", "vqvae").vqvae'
    arguments = "class_labels=[0, 1], guidance_scale=2.0, " if by_class else ""
    if vqvae is None:
        found = f"# values 0..{config.num_values - 1}: ids.view(-1, {config.image_channels}, {config.image_size}, "
        found += f"{config.image_size})"
    else:
        found = "# codes of the tokenizer in vqvae/, row by row"
    return [
        "```python",
        *("from transformers import AutoModelForCausalLM", "from xdlm_hf import XDLMImagePipeline", *imports, ""),
        f'model = AutoModelForCausalLM.from_pretrained("{name}").eval()',
        f"pipe = XDLMImagePipeline({parts})",
        f"image = pipe({arguments}num_inference_steps=16).images[0]",
        *('image.save("image.png")', "```", "", "Without it, with the code files of this repository:", ""),
        *("```python", "from transformers import AutoModelForCausalLM", ""),
        f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)',
        f"ids = model.generate({'class_labels=[0, 1], cfg_scale=1.0, ' if by_class else ''}steps=16, "
        f"max_new_tokens={length_limit(config)})",
        *(found, "```", "", "More steps take more forward passes and usually give better images."),
        *(["`guidance_scale` is 1 + `cfg_scale`; 1 is no guidance."] if by_class else []),
    ]


def _describe(token_id: int | list[int] | None, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if token_id is None:
        return "none"
    ids = token_id if isinstance(token_id, list) else [token_id]
    tokens = [None if tokenizer is None else tokenizer.convert_ids_to_tokens(i) for i in ids]
    return ", ".join(f"{i}" if token is None else f"{i}, `{token}`" for i, token in zip(ids, tokens, strict=True))


def _validate_model(model: object) -> None:
    if hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"cannot export a {type(model).__name__}; merge the adapter first, by model.merge_and_unload()."
        )
    families = MODEL_FAMILIES.values()
    if not isinstance(model, tuple(families)):
        names = " or a ".join(family.__name__ for family in families)
        raise ValueError(f"cannot export a {type(model).__name__}; pass a {names}.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"cannot export a {type(model).__name__} with an adapter; load the base model, add the adapter by "
            "peft.PeftModel.from_pretrained, and export the result of its merge_and_unload()."
        )


def _validate_config(config: PreTrainedConfig) -> None:
    """Validate again: fields may have been set after construction."""
    try:
        config.validate()
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def _validate_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    # LLaDA's own tokenizer has no mask token; the config has its id.
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id != config.mask_token_id:
        raise ValueError(
            f"the tokenizer's mask_token_id={tokenizer.mask_token_id} differs from the model's {config.mask_token_id}; "
            "pass the tokenizer the model was trained with."
        )
    if len(tokenizer) > output_rows(config):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {output_rows(config)} rows; "
            "pass the tokenizer the model was trained with."
        )


def _validate_vqvae(vqvae: Any, config: PreTrainedConfig) -> None:
    codebook = getattr(getattr(vqvae, "quantize", None), "embedding", None)
    if codebook is None:
        raise ValueError(f"vqvae={type(vqvae).__name__} has no codebook; pass the tokenizer of the model's images.")
    codes = len(codebook.weight)
    mask = getattr(config, "mask_token_id", None)
    if codes > (output_rows(config) if mask is None else mask):
        raise ValueError(
            f"the vqvae has {codes} codes, the model {output_rows(config)} rows and mask_token_id={mask}; pass the "
            "tokenizer that the model was trained with."
        )


@contextmanager
def _auto_map(config: PreTrainedConfig, auto_map: dict[str, str]) -> Iterator[None]:
    """Set the config's `auto_map` while the context is open."""
    before = getattr(config, "auto_map", None)
    config.auto_map = auto_map
    try:
        yield
    finally:
        del config.auto_map
        if before is not None:
            config.auto_map = before


def _write_code(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Copy the modules that the model needs into `folder`; returns the `auto_map` of its classes.

    The Hub's loader follows relative imports within one folder only, so all modules are written into one folder, and
    their imports are rewritten.
    """
    names = {"AutoConfig": type(model.config), "AutoModel": type(model), "AutoModelForCausalLM": type(model)}
    for module, path in _needed_modules([cls.__module__ for cls in names.values()]).items():
        (folder / f"{_leaf(module)}.py").write_text(_flattened(module, path), encoding="utf-8")
    return {auto: f"{_leaf(cls.__module__)}.{cls.__name__}" for auto, cls in names.items()}


def _needed_modules(modules: Iterable[str]) -> dict[str, Path]:
    """Files of these modules and of all modules of the package that they import, by module name."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found[module] = Path(find_spec(module).origin)
        waiting += [target for _, target in _relative_imports(module, found[module])]
    leaves = [_leaf(module) for module in found]
    if len(set(leaves)) < len(leaves):
        raise ValueError(f"two modules of the export have the same file name; rename one of {sorted(found)}.")
    return found


def _relative_imports(module: str, path: Path) -> list[tuple[ast.ImportFrom, str]]:
    """Relative import statements of a module, each with one imported module."""
    found, package = [], module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            dots = "." * node.level
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node, resolve_name(dots + name, package)) for name in names]
    return found


def _flattened(module: str, path: Path) -> str:
    """The source of a module, with its relative imports rewritten for a single folder."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for node, target in _relative_imports(module, path):
        before = f"from {'.' * node.level}{node.module or ''} import"
        after = f"from .{_leaf(target) if node.module else ''} import"
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(before, after, 1)
    return "".join(lines)


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


__all__ = ["export_for_hub", "model_card"]
