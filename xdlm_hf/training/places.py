"""Places of a batch's rows in the run, and checks of the data layouts for which they are known."""

import math
import os

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils.data import Dataset
from transformers.trainer_utils import has_length

from ..data.packing import PackedDataset
from ..data.stream import PackedStream
from .arguments import XDLMTrainingArguments


def check_layout(args: XDLMTrainingArguments, train_dataset: Dataset | None) -> None:
    """Refuse data layouts in which `sample_index` would be wrong, or rows could not be cut to random lengths.

    Raises:
        ValueError: Naming the option.
    """
    _check_processes(args)
    config = args.accelerator_config
    if config.split_batches or not config.even_batches:
        raise ValueError(
            f"accelerator_config split_batches={config.split_batches}, even_batches={config.even_batches} is not "
            "supported: leave them at False and True; set global_batch_size instead."
        )
    if config.dispatch_batches and has_length(train_dataset):
        raise ValueError("dispatch_batches=True is only supported for streams: leave it out.")
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy='batch_rebalance' is not supported, since it moves rows: leave it out."
        )
    if args.random_length_probability and not isinstance(train_dataset, PackedDataset | PackedStream | None):
        raise ValueError(
            f"random_length_probability={args.random_length_probability} needs packed rows (PackedDataset or "
            "PackedStream), which all have one length and no prompt: set it to 0."
        )
    if isinstance(train_dataset, PackedStream):
        _check_stream(args, train_dataset)


def _check_processes(args: XDLMTrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start with accelerate launch (one process per GPU), "
            "or show one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and args.use_cpu:
        spread = args.distributed_state.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)
        if not spread:
            raise ValueError(
                "use_cpu=True with FSDP: accelerate would silently train with plain DDP. Use GPUs, a ZeRO config, "
                "or no config file."
            )


def _check_stream(args: XDLMTrainingArguments, stream: PackedStream) -> None:
    if (stream.rank, stream.world_size) != (args.process_index, args.world_size):
        raise ValueError(
            f"the stream was built for rank {stream.rank} of {stream.world_size}, but this is "
            f"rank {args.process_index} of {args.world_size}: pass rank=args.process_index, "
            "world_size=args.world_size to PackedStream."
        )
    if not stream.repeat:
        raise ValueError("a PackedStream with repeat=False ends on some ranks before others: use repeat=True.")


def place_in_global_batch(micro_batch: int, rows: int, batch_size: int, process: int, processes: int) -> Tensor:
    """Places (rows,) in the global batch of the rows of one process' micro-batch.

    Accelerate deals batches out in turn, so place p of the global batch is row p % b of batch p // b, read by process
    (p // b) % W.
    """
    return (micro_batch * processes + process) * batch_size + torch.arange(rows)


def repeated_rows(place: Tensor, step: int, global_batch: int, epoch_rows: int) -> Tensor:
    """Rows that only fill up the last global batch of an epoch, (rows,) bool.

    At the end of an epoch accelerate repeats the first rows, so that all processes have as many.
    """
    step_in_epoch = step % math.ceil(epoch_rows / global_batch)
    return step_in_epoch * global_batch + place >= epoch_rows
