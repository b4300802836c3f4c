"""The plan of a run (`--plan`): parameters, operations, memory and disk; every run checks its disk space by it."""

import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig
from transformers.training_args import OptimizerNames

from xdlm_hf.loading import read_config
from xdlm_hf.models.registry import model_class
from xdlm_hf.training.adapters import add_adapters
from xdlm_hf.training.arguments import XDLMTrainingArguments
from xdlm_hf.training.optimizers import ADAMW, optimizer_of
from xdlm_hf.training.planning import (
    GIB,
    LAYOUTS,
    RESERVED,
    Layout,
    Run,
    activation_bytes,
    check_fit,
    count_parameters,
    fits,
    layout_of,
    layouts,
    loss_bytes,
    memory,
    run_flops,
)
from xdlm_hf.training.storage import Disk, check_disk, loading_bytes, number_of_saves, planned_disk

_CONFIGS = Path(__file__).parent / "configs" / "models"
# Copies of configs, for plans without a connection to the Hub.
OWN_CONFIGS = {"GSAI-ML/LLaDA-8B-Base": "llada_8b.json", "GSAI-ML/LLaDA-8B-Instruct": "llada_8b.json"}


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
    """Arguments of a run on other machines: the plan divides the global batch, not this process."""

    def _accumulation_steps(self) -> int:
        return self.gradient_accumulation_steps


def planned_config(name: str) -> tuple[PreTrainedConfig, bool]:
    """Config of a model, and whether it is the repository's copy because the Hub cannot be reached.

    Raises:
        ValueError: If it cannot be read, and there is no copy of it here.
    """
    try:
        return read_config(name), False
    except ValueError as error:
        if name not in OWN_CONFIGS or not isinstance(error.__cause__, OSError):
            raise
        return read_config(str(_CONFIGS / OWN_CONFIGS[name])), True


def planned_run(
    options: Any, args: XDLMTrainingArguments, config: PreTrainedConfig, dtype: torch.dtype, gpus: int, length: int
) -> tuple[Run, torch.nn.Module, bool]:
    """The run that options and arguments describe, its model without weights, and whether its optimizer is known.

    Args:
        options: The recipe's `ModelArguments`.
        args: Arguments of the run.
        config: The model's. Not modified.
        dtype: Dtype of the loaded weights.
        gpus: Number of processes.
        length: L, tokens per row.
    """
    config = copy.deepcopy(config)
    # Flash attention keeps the same activations as sdpa, and is not installed without a GPU.
    flash = options.attn_implementation.startswith("flash_attention")
    config._attn_implementation = "sdpa" if flash else options.attn_implementation
    with torch.device("meta"):
        model = model_class(config)(config)
        model.tie_weights()
        if options.lora_rank:
            model = add_adapters(model, options.lora_rank, options.lora_alpha)
    optimizer = optimizer_of(OptimizerNames(args.optim).value, args.optim_args)
    run = Run(
        config=model.config,
        counts=count_parameters(model, options.load_in_4bit),
        rows=args.per_device_train_batch_size,
        length=length,
        gpus=gpus,
        optimizer=optimizer or ADAMW,
        dtype=dtype,
        bf16=bool(args.bf16),
        checkpointing=bool(args.activation_checkpointing),
        fused_loss=args.fused_loss is not False,
        chunk_size=args.loss_chunk_size,
        average=args.ema_decay is not None,
    )
    return run, model, optimizer is not None


def disk_of(run: Run, layout: Layout, args: XDLMTrainingArguments, steps: int) -> Disk:
    """Disk space of a run; `steps` is 0 if unknown, for which `save_total_limit + 1` checkpoints are assumed."""
    saves = 0
    if args.save_strategy == "epoch":
        saves = math.ceil(args.num_train_epochs)
    elif args.save_strategy != "no":
        saves = number_of_saves(steps, args.save_steps) if steps > 0 else (args.save_total_limit or 0) + 1
    limit = args.save_total_limit
    if limit == 1 and (args.load_best_model_at_end or args.metric_for_best_model):
        limit = 2  # the best one is kept besides the last
    return planned_disk(run, layout, saves, limit, args.save_only_model)


def layout_of_arguments(args: XDLMTrainingArguments) -> Layout:
    """The layout in which this process is about to train; FSDP writes as much as plain data parallelism."""
    if args.deepspeed_plugin is None:
        return LAYOUTS["ddp"]
    zero = args.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    on_host = [(zero.get(f"offload_{what}") or {}).get("device") == "cpu" for what in ("optimizer", "param")]
    return Layout(zero.get("stage", 0), *on_host)


def check_space(
    options: Any, args: XDLMTrainingArguments, config: PreTrainedConfig, dtype: torch.dtype, rows: int | None
) -> None:
    """Refuse a run that is about to start if its checkpoints and model do not fit on the disk.

    Args:
        options, args, config, dtype: As in `planned_run`.
        rows: Rows of the training data; None for a stream.

    Raises:
        ValueError: With the space needed and free.
    """
    run, _, _ = planned_run(options, args, config, dtype, args.world_size, 1)
    steps = args.max_steps
    if steps <= 0:
        a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = math.ceil(args.num_train_epochs * math.ceil((rows or 0) / a_step))
    check_disk(args.output_dir, disk_of(run, layout_of_arguments(args), args, steps))


# --------------------------------------------------------------------------------------------------------------------
# Output


def show(
    plan: PlanArguments, options: Any, args: XDLMTrainingArguments, config: PreTrainedConfig, length: int, **dtypes
):
    """Print parameters, tokens, operations, memory and disk of a run.

    Args:
        plan, options, args: The options.
        config: The model's.
        length: L, tokens per row.
        dtypes: `loaded` and `stored`, the weights' dtypes in training and in the checkpoint (None: random weights).

    Raises:
        ValueError: If it cannot fit, its batches do not divide, or the model is no transformer.
    """
    if not hasattr(config, "intermediate_size"):
        raise ValueError(
            f"memory is estimated for transformers, not for model_type={config.model_type!r}; try a few steps instead."
        )
    run, model, known = planned_run(options, args, config, dtypes["loaded"], plan.plan_gpus, length)
    console = Console()
    rows = _global_rows(args, plan)
    console.print(_summary(model, run, rows, args.max_steps), highlight=False)
    assumed = "" if known else ": unknown to the plan, which assumes AdamW's 8 bytes per parameter"
    console.print(f"optimizer   {OptimizerNames(args.optim).value}{assumed}", highlight=False)
    each, shared = loading_bytes(run, dtypes["stored"])
    console.print(
        f"loading     {each / GIB:.1f} GiB of main memory in each process, and {shared / GIB:.1f} GiB of the "
        "checkpoint's pages, shared by a machine's processes",
        highlight=False,
    )
    disks = {name: disk_of(run, layout, args, args.max_steps) for name, layout in layouts(run).items()}
    console.print(memory_table(run, plan.plan_gpu_memory))
    console.print(disk_table(disks))
    console.print(choices_table(run, plan.plan_layout or "zero2"))
    check_fit(run, plan.plan_layout, plan.plan_gpu_memory)


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


def memory_table(run: Run, gpu_memory: float) -> Table:
    """GiB of one GPU in every layout, part by part, and whether it fits; `host` is one machine's main memory.

    The total counts the larger of `step` and the sum of activations and loss.
    """
    title = f"GiB of each of {run.gpus} GPUs; {gpu_memory * (1 - RESERVED):.1f} of {gpu_memory:g} can be used"
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 0))
    table.add_column("layout", no_wrap=True)
    for name in ("params", "grads", "optim", "activ", "loss", "step", "buffers", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("host", justify="right", no_wrap=True)
    for name, layout in layouts(run).items():
        needs = memory(run, layout)
        figures = [f"{value / GIB:.1f}" for value in (*needs[:-1], needs.gpu)]
        verdict = "[green]yes[/green]" if fits(run, layout, gpu_memory) else "[red]no[/red]"
        table.add_row(name, *figures, verdict, f"{needs.host / GIB:.0f}" if needs.host else "")
    return table


def disk_table(disks: dict[str, Disk]) -> Table:
    """GiB of disk in every layout: one checkpoint, most checkpoints at once, the final model, and the peak."""
    table = Table(title="GiB of disk", title_justify="left")
    for column in ("layout", "a checkpoint", "at once", "final model", "at most"):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=True)
    for name, disk in disks.items():
        figures = [f"{value / GIB:.1f}" for value in (disk.final, disk.peak)]
        table.add_row(name, f"{disk.checkpoint / GIB:.1f}", str(disk.most), *figures)
    return table


def choices_table(run: Run, name: str) -> Table:
    """GiB of activations and loss with and without checkpointing and the fused loss.

    Raises:
        ValueError: As `layout_of`.
    """
    layout = layout_of(run, name)
    table = Table(title=f"The same in {name}; * as planned", title_justify="left")
    for column in ("activations", "GiB", "loss", "GiB"):
        table.add_column(column, justify="right" if column == "GiB" else "left")
    for on, activations, loss in ((True, "recomputed", "fused"), (False, "kept", "dense")):
        marks = ["*" if planned == on else "" for planned in (run.checkpointing, run.fused_loss)]
        table.add_row(
            activations + marks[0],
            f"{activation_bytes(replace(run, checkpointing=on), layout) / GIB:.1f}",
            loss + marks[1],
            f"{loss_bytes(replace(run, fused_loss=on), layout) / GIB:.1f}",
        )
    return table
