"""What the training recipes share: options and config files, the model with its adapters, the plan, and the end.

A config file is YAML, one option a line. Its line `base: other.yaml` takes over the options of another file in the same
folder; those of the file itself win, and the command line wins over both. A base has no base of its own, and a name
that is no option is refused wherever it stands.
"""

import argparse
import contextlib
import dataclasses
import difflib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.training_args import OptimizerNames

from xdlm_hf.adapters import add_adapters, load_adapter, quantization_4bit
from xdlm_hf.checkpoints import UNFINISHED, explained_failure, last_whole_checkpoint, refuse_other_run, whole_model
from xdlm_hf.data import check_tokenizer
from xdlm_hf.planning import (
    ADAMW,
    LAYOUTS,
    Run,
    check_fit,
    choices_table,
    count_parameters,
    memory_table,
    optimizer_of,
    run_flops,
)
from xdlm_hf.trainer import XDLMTrainer, XDLMTrainingArguments, model_bytes

logger = logging.getLogger("recipe")

DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="GSAI-ML/LLaDA-8B-Base", metadata={"help": "Hub name or local folder."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the weights. bfloat16 is for DeepSpeed, which keeps float32 copies, and for LoRA."},
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank; 0 trains all weights."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale times rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the frozen blocks in 4 bits (QLoRA). Needs lora_rank and bitsandbytes."}
    )


@dataclass
class PlanArguments:
    plan: bool = field(default=False, metadata={"help": "Print what the run needs and stop; no weights are read."})
    plan_gpus: int = field(default=8, metadata={"help": "GPUs of the planned run."})
    plan_gpu_memory: float = field(default=80.0, metadata={"help": "Memory of one of them in GiB."})
    plan_layout: str | None = field(
        default=None,
        metadata={"help": f"Refuse the plan unless this fits: {', '.join(LAYOUTS)}. Default: any of them."},
    )


class PlannedArguments(XDLMTrainingArguments):
    """Arguments of a run on other machines than this one: the plan divides their global batch, not this process."""

    def _accumulation_steps(self) -> int:
        return self.gradient_accumulation_steps


# --------------------------------------------------------------------------------------------------------------------
# Options


def parse(groups: Sequence[type], argv: Sequence[str], description: str) -> tuple[Any, ...]:
    """Options from `--config FILE.yaml`, overridden by the command line, one object for each group.

    Raises:
        ValueError: If an option is unknown in either place, or a base is.
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
    if chosen.config is not None:
        known = {option.name for group in groups for option in dataclasses.fields(group) if option.init} - {"plan"}
        parser.set_defaults(**read_config(Path(chosen.config), known))
    if chosen.plan:
        parser.set_defaults(plan=True, use_cpu=True)  # planning a run for GPUs needs none
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown options on the command line: {' '.join(unknown)}; see --help.")
    return tuple(parsed)


def read_config(path: Path, known: set[str]) -> dict[str, Any]:
    """Options of a config file, after those of its base.

    Raises:
        ValueError: If there is no such file, it holds no options, or an unknown one.
    """
    options = _read_yaml(path)
    base = options.pop("base", None)
    _refuse_unknown(path, options, known)
    if base is None:
        return options
    shared = _read_yaml(path.parent / base)
    if "base" in shared:
        raise ValueError(f"{path}: its base {base} names a base of its own ({shared['base']}); name that one, or none.")
    _refuse_unknown(path.parent / base, shared, known)
    return {**shared, **options}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such config file.")
    options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
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
    """What `XDLMTrainer.train` is to resume from; a new run must not write over another."""
    resume = {"true": True, "false": None, None: None}.get(args.resume_from_checkpoint, args.resume_from_checkpoint)
    if resume in ("auto", True):
        found = last_whole_checkpoint(args.output_dir, shared=not args.save_on_each_node)
        resume = resume is True if found is None else str(found)
    if not resume:
        refuse_other_run(args.output_dir)
    return resume


def load_tokenizer(options: ModelArguments) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(options.tokenizer_name or options.model_name_or_path)


# --------------------------------------------------------------------------------------------------------------------
# Model


def load_model(
    options: ModelArguments, args: XDLMTrainingArguments, tokenizer: PreTrainedTokenizerBase, sequence_length: int
):
    """The base model, with adapters when asked for.

    Raises:
        ValueError: If the options do not go together, or the tokenizer or the length do not fit the model.
    """
    check_model_options(options, args)
    settings: dict[str, Any] = {"dtype": options.dtype, "attn_implementation": options.attn_implementation}
    if options.load_in_4bit:
        compute = torch.bfloat16 if args.bf16 else torch.float32
        settings |= {"quantization_config": quantization_4bit(args.device, compute), "device_map": {"": args.device}}
    set_seed(args.seed)  # adapters start at random
    model = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, **settings)
    check_tokenizer(tokenizer, model.config)
    check_length(sequence_length, model.config)
    if options.lora_rank:
        # Not peft's prepare_model_for_kbit_training, which makes norms and head float32: the norms compute in float32
        # whatever their dtype, and a float32 head of LLaDA's vocabulary takes another GiB.
        return add_adapters(model, options.lora_rank, options.lora_alpha, options.lora_dropout)
    if options.dtype not in ("float32", "auto") and args.deepspeed_plugin is None:
        logger.warning(
            "weights in %s without DeepSpeed: updates smaller than their rounding are lost; use dtype float32 with "
            "--bf16 true",
            options.dtype,
        )
    return model


def check_model_options(options: ModelArguments, args: XDLMTrainingArguments) -> None:
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype={options.dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
    if options.lora_rank < 0:
        raise ValueError(f"lora_rank={options.lora_rank} must not be negative; 0 trains all weights.")
    if not options.load_in_4bit:
        return
    if not options.lora_rank:
        raise ValueError("load_in_4bit=True freezes the weights: give lora_rank, e.g. 16, to train adapters on them.")
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            "load_in_4bit=True does not go with ZeRO-3 or FSDP, which would cut packed weights: use zero2."
        )


def check_length(sequence_length: int, config: Any) -> None:
    if sequence_length > config.max_sequence_length:
        raise ValueError(
            f"sequence_length={sequence_length} exceeds the model's max_sequence_length={config.max_sequence_length}."
        )


# --------------------------------------------------------------------------------------------------------------------
# The plan


def show_plan(plan: PlanArguments, options: ModelArguments, args: XDLMTrainingArguments, sequence_length: int) -> None:
    """Print parameters, tokens, operations and memory of a run.

    Raises:
        SystemExit: With a message, if it cannot fit or its batches do not divide.
    """
    try:
        check_model_options(options, args)
        config = AutoConfig.from_pretrained(options.model_name_or_path)
        check_length(sequence_length, config)
        # Flash attention keeps what sdpa keeps, and is not installed where there is no GPU.
        flash = options.attn_implementation.startswith("flash_attention")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa" if flash else options.attn_implementation
            )
            model.tie_weights()
            if options.lora_rank:
                model = add_adapters(model, options.lora_rank, options.lora_alpha)
        optim = OptimizerNames(args.optim).value
        optimizer = optimizer_of(optim, args.optim_args)
        run = Run(
            config=model.config,
            counts=count_parameters(model, options.load_in_4bit),
            rows=args.per_device_train_batch_size,
            length=sequence_length,
            gpus=plan.plan_gpus,
            optimizer=optimizer or ADAMW,
            dtype=getattr(torch, options.dtype) if options.dtype != "auto" else config.dtype or torch.float32,
            bf16=bool(args.bf16),
            checkpointing=bool(args.activation_checkpointing),
            fused_loss=args.fused_loss is not False,
            chunk_size=args.loss_chunk_size,
        )
        rows = _global_rows(args, plan)
        console = Console()
        console.print(_summary(model, run, rows, args.max_steps), highlight=False)
        assumed = "" if optimizer else ": not known to the plan, which takes AdamW's 8 bytes a parameter"
        console.print(f"optimizer   {optim}{assumed}", highlight=False)
        console.print(memory_table(run, plan.plan_gpu_memory))
        console.print(choices_table(run, plan.plan_layout or "zero2"))
        check_fit(run, plan.plan_layout, plan.plan_gpu_memory)
    except ValueError as error:
        raise SystemExit(f"plan refused: {error}") from error


def _global_rows(args: XDLMTrainingArguments, plan: PlanArguments) -> int:
    together, passes = args.per_device_train_batch_size * plan.plan_gpus, args.gradient_accumulation_steps
    rows = args.global_batch_size or together * passes
    layout = f"per_device_train_batch_size={args.per_device_train_batch_size} on plan_gpus={plan.plan_gpus}"
    if rows % together:
        raise ValueError(
            f"global_batch_size={rows} is not a multiple of {together} ({layout}): change one of the three."
        )
    if passes not in (1, rows // together):
        raise ValueError(
            f"gradient_accumulation_steps={passes} disagrees with global_batch_size={rows} ({layout} make "
            f"{rows // together}): leave one of them out."
        )
    return rows


def _summary(model: torch.nn.Module, run: Run, rows: int, max_steps: int) -> str:
    steps = max_steps if max_steps > 0 else 1
    tokens = steps * rows * run.length
    flops = run_flops(model, run.counts, run.length, tokens, run.checkpointing)
    trained = f"{run.counts.trainable:,} trained"
    quantized = f", {run.counts.quantized:,} in 4 bits" if run.counts.quantized else ""
    passes = rows // (run.rows * run.gpus)
    return (
        f"parameters  {run.counts.total:,}: {trained}{quantized}\n"
        f"steps       {steps if max_steps > 0 else 'as many as the data gives; figures are for one'}\n"
        f"a step      {rows} rows x {run.length} tokens; {run.gpus} GPUs x {run.rows} rows x {passes} passes\n"
        f"tokens      {tokens:,}\n"
        f"operations  {flops:.2e} FLOP{', recomputed activations included' if run.checkpointing else ''}"
    )


# --------------------------------------------------------------------------------------------------------------------
# The run


def train(
    model: torch.nn.Module,
    options: ModelArguments,
    args: XDLMTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    validation_rows: Dataset | None,
    resume: str | bool | None,
) -> XDLMTrainer:
    """Train, evaluate if there are rows for it, and save."""
    trainer = XDLMTrainer(
        model=model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    metrics = None if validation_rows is None else trainer.evaluate()
    save(trainer, options, metrics)
    return trainer


def save(trainer: XDLMTrainer, options: ModelArguments, metrics: dict[str, float] | None = None) -> None:
    """Final model, tokenizer, log and, if given, evaluation. Every process must call this: the weights may be spread.

    Raises:
        OSError: If they cannot be written. What is there is whole, and the message says what that is.
    """
    output_dir, step = Path(trainer.args.output_dir), trainer.state.global_step
    what, folder = ("adapter", output_dir / "adapter") if options.lora_rank else ("model", output_dir)
    trainer.save_model(str(folder))
    kept = f"the {what} in {str(folder)!r} is whole"
    with explained_failure(step, output_dir / UNFINISHED, output_dir, False, "the log", also_kept=kept):
        trainer.save_state()
        if metrics is not None:
            trainer.save_metrics("eval", metrics)
    if options.lora_rank:
        save_merged(trainer, options, folder, kept)


def save_merged(trainer: XDLMTrainer, options: ModelArguments, adapter: Path, kept: str) -> None:
    """The base with the trained adapters, saved in `adapter` before, merged into it, and the tokenizer."""
    output_dir = adapter.parent
    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = contextlib.nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with whole:
        if not trainer.is_world_process_zero():
            return
        if options.load_in_4bit:  # into the weights as they were, not into what 4 bits left of them
            base = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=options.dtype)
            model = load_adapter(base, str(adapter))
        merged, step = model.merge_and_unload(), trainer.state.global_step
        with whole_model(
            output_dir, output_dir, step, model_bytes(merged), what="the merged model", also_kept=kept
        ) as unfinished:
            merged.save_pretrained(unfinished)
            trainer.processing_class.save_pretrained(unfinished)
