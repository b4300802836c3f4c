"""Code shared by the training recipes: options and config files, the model with its adapters, and the run.

A config file is YAML, one option a line. The line `base: other.yaml` includes the options of another file in the same
folder; those of the file itself override them, and the command line overrides both. A base can have a base. Unknown
options are refused everywhere.
"""

import argparse
import contextlib
import dataclasses
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plan as planner
import torch
import yaml
from plan import PlanArguments, PlannedArguments
from torch.utils.data import Dataset
from transformers import HfArgumentParser, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import has_length

from xdlm_hf.data.tokenizer import check_tokenizer
from xdlm_hf.generation.protocol import length_limit
from xdlm_hf.loading import load_weights, read_config, read_tokenizer
from xdlm_hf.models.registry import model_class
from xdlm_hf.training.adapters import add_adapters, load_adapter, quantization_4bit
from xdlm_hf.training.arguments import XDLMTrainingArguments
from xdlm_hf.training.checkpointing import model_bytes
from xdlm_hf.training.checkpoints import (
    explain_disk_errors,
    last_whole_checkpoint,
    refuse_other_run,
    whole_model,
)
from xdlm_hf.training.precision import check_trained_dtype
from xdlm_hf.training.processes import run_on_main_process
from xdlm_hf.training.trainer import XDLMTrainer

DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="GSAI-ML/LLaDA-8B-Base", metadata={"help": "Hub name or local folder."})
    config_name: str | None = field(
        default=None,
        metadata={"help": "Start from random weights of this config (folder, config.json or Hub name) instead."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the weights. 16 bits need DeepSpeed ZeRO (float32 copies) or lora_rank."},
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank; 0 trains all weights."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale times rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the frozen blocks in 4 bits (QLoRA). Needs lora_rank and bitsandbytes."}
    )


# --------------------------------------------------------------------------------------------------------------------
# Options


def parse(groups: Sequence[type], argv: Sequence[str], description: str) -> tuple[Any, ...]:
    """Options from `--config FILE.yaml`, overridden by the command line, one object for each group.

    Raises:
        ValueError: If an option is unknown in either place or a file cannot be read, or options do not go together.
        SystemExit: With status 2 and a message, if a value has the wrong type.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--plan", action="store_true")
    chosen, argv = first.parse_known_args(argv)
    if chosen.plan:
        groups = [PlannedArguments if group is XDLMTrainingArguments else group for group in groups]
    parser = HfArgumentParser(
        groups, description=description, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.usage = "%(prog)s [--config FILE.yaml] [--option value ...]; --help lists the options"
    if chosen.config is not None:
        known = {option.name for group in groups for option in dataclasses.fields(group) if option.init} - {"plan"}
        values = read_options(Path(chosen.config), known).items()
        # argparse checks the types of strings only.
        parser.set_defaults(**{name: str(v) if isinstance(v, int | float) else v for name, v in values})
    if chosen.plan:
        parser.set_defaults(plan=True, use_cpu=True)  # planning needs no GPU
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, TypeError) as error:  # raised by Transformers for options that do not go together
        raise ValueError(" ".join(str(error).split())) from error
    if unknown:
        raise ValueError(f"unknown options on the command line: {' '.join(unknown)}; see --help.")
    return tuple(parsed)


def read_options(path: Path, known: set[str], included_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Options of a config file, after those of its base.

    Raises:
        ValueError: If there is no such file, it holds no options, or an unknown one, or is its own base.
    """
    if path in included_by:
        raise ValueError(f"{path} is its own base, by way of {included_by[-1].name}; remove that line `base:`.")
    options = _read_yaml(path)
    base = options.pop("base", None)
    _refuse_unknown(path, options, known)
    return options if base is None else {**read_options(path.parent / base, known, (*included_by, path)), **options}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such config file.")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected one `option: value` a line, got a {type(options).__name__}.")
    return options


def _refuse_unknown(path: Path, options: dict[str, Any], known: set[str]) -> None:
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path}: unknown option {name!r}{hint}")


def resume_point(args: XDLMTrainingArguments) -> str | bool | None:
    """The argument of `XDLMTrainer.train`; a new run must not overwrite another."""
    resume = {"true": True, "false": None, None: None}.get(args.resume_from_checkpoint, args.resume_from_checkpoint)
    if resume in ("auto", True):
        found = last_whole_checkpoint(args.output_dir, shared=not args.save_on_each_node)
        resume = resume is True if found is None else str(found)
    if not resume:
        refuse_other_run(args.output_dir)
    return resume


def load_tokenizer(options: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer that the options name.

    Raises:
        ValueError: If it or the model's config cannot be read, or random weights are asked for and none is named.
    """
    model_config(options)  # first: an error of the config would be reported as one of the tokenizer
    if options.config_name is not None and options.tokenizer_name is None:
        raise ValueError(
            f"config_name={options.config_name!r} starts from random weights, which have no tokenizer: give "
            "tokenizer_name (llada_cpt.py can train one: tokenizer_vocab_size)."
        )
    return read_tokenizer(options.tokenizer_name or options.model_name_or_path)


def model_config(options: ModelArguments) -> PreTrainedConfig:
    """Config of the model that the options name.

    Raises:
        ValueError: If it cannot be read, or is of another model.
    """
    return read_config(options.config_name or options.model_name_or_path)


# --------------------------------------------------------------------------------------------------------------------
# Model


def load_model(
    options: ModelArguments,
    args: XDLMTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    sequence_length: int,
):
    """The base model, with adapters when asked for, or a model of random weights. Checked before weights are read.

    Without a tokenizer, as for images, the config's own vocabulary applies.

    Raises:
        ValueError: If the options do not go together, the checkpoint cannot be read, trained weights would be in 16
            bits without float32 copies, or the tokenizer or the length do not fit the model.
    """
    check_model_options(options, args)
    config = model_config(options)
    check_length(sequence_length, config)
    if not options.lora_rank:
        check_trained_dtype(weights_dtype(options, config), args.deepspeed_plugin)
    if options.config_name is not None:
        return new_model(options, args, tokenizer, config)
    if tokenizer is not None:
        check_tokenizer(tokenizer, config)
    settings: dict[str, Any] = {"dtype": options.dtype, "attn_implementation": options.attn_implementation}
    if options.load_in_4bit:
        compute = torch.bfloat16 if args.bf16 else torch.float32
        settings |= {"quantization_config": quantization_4bit(args.device, compute), "device_map": {"": args.device}}
    set_seed(args.seed)  # adapters start at random
    model = load_weights(options.model_name_or_path, **settings)
    if options.lora_rank:
        # Not peft's prepare_model_for_kbit_training, which casts norms and head to float32: the norms compute in
        # float32 anyway, and a float32 head of LLaDA's vocabulary takes another GiB.
        return add_adapters(model, options.lora_rank, options.lora_alpha, options.lora_dropout)
    return model


def new_model(
    options: ModelArguments,
    args: XDLMTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PreTrainedConfig,
) -> PreTrainedModel:
    """Random weights of a config, the same for the same seed; vocabulary and special tokens are the tokenizer's.

    Raises:
        ValueError: If the config has a field that its model does not know, or the tokenizer does not fit.
    """
    refuse_unknown_fields(config)
    if tokenizer is not None:
        config.vocab_size = len(tokenizer)
        if hasattr(config, "output_rows"):
            config.output_rows = len(tokenizer)
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        check_tokenizer(tokenizer, config)
    config._attn_implementation = options.attn_implementation
    set_seed(args.seed)
    # Built by its class: from_config would shard it under ZeRO-3 while its weights are drawn.
    return model_class(config)(config).to(weights_dtype(options, config))


def refuse_unknown_fields(config: PreTrainedConfig) -> None:
    """A trained checkpoint may have fields of other code; in the sizes of a new model they are spelling mistakes."""
    default = type(config)()
    known = {*vars(default), *getattr(config, "unused_fields", ())}
    unknown = [name for name in vars(config) if name not in known and not hasattr(type(config), name)]
    if unknown:
        own = {*vars(default), *config.attribute_map} - vars(PreTrainedConfig()).keys()
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in unknown)
        raise ValueError(
            f"the config of random weights has fields that {type(config).__name__} does not know: {values}. Correct or "
            f"remove them; its fields: {', '.join(sorted(own))}."
        )


def weights_dtype(options: ModelArguments, config: PreTrainedConfig) -> torch.dtype:
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    return config.dtype if config.dtype is not None and options.config_name is None else torch.float32


def check_model_options(options: ModelArguments, args: XDLMTrainingArguments) -> None:
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype={options.dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
    named = options.model_name_or_path
    if options.config_name is not None and named != ModelArguments.model_name_or_path:
        raise ValueError(
            f"config_name={options.config_name!r} and model_name_or_path={named!r} are two models: set "
            "config_name: null in the config file for a trained one, or leave model_name_or_path out."
        )
    if options.lora_rank < 0:
        raise ValueError(f"lora_rank={options.lora_rank} must not be negative; 0 trains all weights.")
    if options.config_name is not None and options.lora_rank:
        raise ValueError(
            f"lora_rank={options.lora_rank} with config_name={options.config_name!r}: adapters on random weights learn "
            "little; leave lora_rank out, or give model_name_or_path instead of config_name."
        )
    if not options.load_in_4bit:
        return
    if not options.lora_rank:
        raise ValueError("load_in_4bit=True freezes the weights: give lora_rank, e.g. 16, to train adapters on them.")
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            "load_in_4bit=True does not go with ZeRO-3 or FSDP, which would shard packed weights: use zero2."
        )


def check_length(sequence_length: int, config: Any) -> None:
    if sequence_length > length_limit(config):
        raise ValueError(f"sequence_length={sequence_length} exceeds the model's limit of {length_limit(config)}.")


def show_plan(plan: PlanArguments, options: ModelArguments, args: XDLMTrainingArguments, sequence_length: int) -> None:
    """Print the plan of a run.

    Raises:
        SystemExit: With a message, if it cannot fit, its batches do not divide, or options do not go together.
    """
    try:
        check_model_options(options, args)
        name = options.config_name or options.model_name_or_path
        config, is_copy = planner.planned_config(name)
        if is_copy:
            print(f"model config: this repository's copy of {name}'s, since the Hub cannot be reached")
        check_length(sequence_length, config)
        stored = None if options.config_name else config.dtype or torch.float32
        planner.show(plan, options, args, config, sequence_length, loaded=weights_dtype(options, config), stored=stored)
    except ValueError as error:
        raise SystemExit(f"plan refused: {error}") from error


# --------------------------------------------------------------------------------------------------------------------
# The run


def train(
    model: torch.nn.Module,
    options: ModelArguments,
    args: XDLMTrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    train_rows: Dataset,
    validation_rows: Dataset | None,
    resume: str | bool | None,
) -> XDLMTrainer:
    """Train, evaluate if there are rows for it, and save.

    Raises:
        ValueError: If checkpoints and model will not fit on the disk.
    """
    rows = len(train_rows) if has_length(train_rows) else None
    dtype = weights_dtype(options, model.config)
    run_on_main_process(lambda: planner.check_space(options, args, model.config, dtype, rows))
    trainer = XDLMTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
    )
    found = resume != args.resume_from_checkpoint  # by `resume_point`, which has compared the checksums
    trainer.train(resume_from_checkpoint=resume, verified=found)
    metrics = None if validation_rows is None else trainer.evaluate()
    save(trainer, options, metrics)
    return trainer


def save(trainer: XDLMTrainer, options: ModelArguments, metrics: dict[str, float] | None = None) -> None:
    """Save model, tokenizer, log and, if given, metrics. Every process must call this: the weights may be sharded.

    Raises:
        OSError: If they cannot be written; the message names the whole files that there are.
    """
    output_dir, step = Path(trainer.args.output_dir), trainer.state.global_step
    what, folder = ("adapter", output_dir / "adapter") if options.lora_rank else ("model", output_dir)
    trainer.save_model(str(folder))
    message = (
        f"step {step}: the log could not be written to {str(output_dir)!r}; the {what} in {str(folder)!r} is whole."
    )
    with explain_disk_errors(message, output_dir, output_dir):
        trainer.save_state()
        if metrics is not None:
            trainer.save_metrics("eval", metrics)
    if options.lora_rank:
        save_merged(trainer, options, folder)


def save_merged(trainer: XDLMTrainer, options: ModelArguments, adapter: Path) -> None:
    """Save the base model with the trained adapters (already saved in `adapter`) merged into it, and the tokenizer."""
    output_dir = adapter.parent
    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = contextlib.nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with whole:
        if not trainer.is_world_process_zero():
            return
        if options.load_in_4bit:  # merged into the original weights, not into those rounded to 4 bits
            base = load_weights(options.model_name_or_path, dtype=options.dtype)
            model = load_adapter(base, str(adapter))
        merged = model.merge_and_unload()
        message = (
            f"step {trainer.state.global_step}: the merged model could not be written to {str(output_dir)!r}. It needs "
            f"{model_bytes(merged) / 2**30:.1f} GiB. The adapter in {str(adapter)!r} is whole."
        )
        with whole_model(output_dir, output_dir, message) as unfinished:
            merged.save_pretrained(unfinished)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(unfinished)
