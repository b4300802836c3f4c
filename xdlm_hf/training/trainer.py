"""Transformers' Trainer with the XDLM objective (Eqs. 14, 15) and the NELBO as evaluation loss.

One optimizer step minimises, over the whole global batch (all processes, all accumulation steps),

    sum of token_weights * loss  /  sum of token_weights        in nats per token,

whatever the way the batch is split. Noise level and noise of a row come from a generator seeded by (noise seed, global
sample index), on the CPU: the index is the row's place in the run, so the training trajectory depends neither on the
number of processes, nor on accumulation, nor on the device, nor on the global random state.

t = 0 is clean, t = 1 is noise. Shapes: B batch, L length, N vocabulary (rows of the output layer).
"""

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalPrediction, has_length, rotate_checkpoints

from ..data.collator import DiffusionCollator
from ..data.packing import PackedDataset
from ..data.stream import PackedStream, StreamPosition, stream_loader
from ..data.tokenizer import check_tokenizer
from ..diffusion.losses import diffusion_loss
from ..diffusion.ops.fused import fused_linear_diffusion_loss
from ..diffusion.schedules import get_schedule
from ..generation.protocol import check_trainable
from .adapters import save_noise
from .arguments import XDLMTrainingArguments
from .checkpoints import (
    RUN_RECORD,
    UNFINISHED,
    check_same_run,
    explained_failure,
    last_checkpoint,
    last_whole_checkpoint,
    optimization_record,
    publish,
    refuse_other_run,
    tokenizer_checksum,
    whole_model,
)
from .checksums import write_checksums
from .metrics import TrainingMetrics, flops_per_token, peak_tflops
from .optimizers import OPTIMIZERS
from .precision import NonFiniteError, check_trained_weights, non_finite_weights
from .preemption import Preempted, SaveOnRequest

logger = logging.getLogger(__name__)
# Second word of the seed: training and evaluation draw from unrelated streams.
_TRAIN_ROW, _TRAIN_STEP, _EVAL_ROW, _EVAL_SHIFT, _TRAIN_LENGTH = range(5)


class _Bookkeeping(TrainerCallback):
    """Starts the clock when training does, and keeps the logged epoch of a stream right.

    A stream that resumes where it stood counts its steps from zero in the Trainer.
    """

    def __init__(self, metrics: TrainingMetrics, stream: bool):
        self.metrics = metrics
        self.stream = stream

    def on_train_begin(self, args, state, control, **kwargs):
        self.metrics.start_anew()

    def on_step_end(self, args, state, control, **kwargs):
        if self.stream:
            state.epoch = state.global_step / state.max_steps


class XDLMTrainer(Trainer):
    """Trains a masked, uniform or mixed diffusion language model, and evaluates its NELBO.

    `evaluate()` reports, under the usual prefix: `loss`, the NELBO in nats per token; `loss_standard_error` over rows
    (conservative: noise levels are stratified); `perplexity` = exp(NELBO) and `perplexity_standard_error`; `tokens`.
    It depends on the noise seed and the data, not on batch size or the number of processes.

    Training logs what `training_metrics` lists. A loss or gradient that is not finite stops the run, with an error
    that names step, rows and times; weights are checked before each save, so that no checkpoint and no model holds a
    NaN. Checkpoints are whole or absent, and resuming repeats the uninterrupted run bit for bit; see `checkpoints`.

    Args:
        model: A `DiffusionModel` or a peft model around it. Its config is given the run's `mixing_ratio` and
            `noise_schedule`, so that checkpoints know them.
        args: The run.
        data_collator: By default a `DiffusionCollator` with the tokenizer's, else the model's padding id.
        train_dataset: Rows with `input_ids`: a `PackedDataset`, a `PackedStream` (built for this rank, repeating;
            needs `max_steps`), or any dataset of such rows.
        eval_dataset: As above, with a length.
        processing_class: The tokenizer; saved with the model.
        callbacks, optimizers: As in `Trainer`.

    Raises:
        ValueError: If k < 1 and the model has no mask token, the tokenizer does not belong to the model, several GPUs
            are visible to one process, a data-loading option would move rows to other places, trained weights are in 16
            bits without float32 copies (`precision`), an optimizer other than AdamW is to be in main memory, or the
            fused loss is asked for where it cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: XDLMTrainingArguments,
        data_collator: Callable[[list], dict[str, Tensor]] | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
    ):
        if not isinstance(args, XDLMTrainingArguments):
            raise ValueError(f"args must be XDLMTrainingArguments, got {type(args).__name__}.")
        check_trainable(model)
        self.kernel = model.noise_kernel(args.mixing_ratio)
        self.schedule = get_schedule(args.noise_schedule)
        self.noise_seed = args.seed if args.noise_seed is None else args.noise_seed
        if processing_class is not None:
            check_tokenizer(processing_class, model.config)
        self._check_layout(args, train_dataset)
        check_trained_weights(model, args.deepspeed_plugin)
        if optimizers[0] is None:
            self._check_offload(args)
        self._fused = self._use_fused_loss(model, args)
        if data_collator is None:
            # With k = 1 no token absorbs, and none is special.
            mask_id = self.kernel.mask_token_id if self.kernel.absorbing_ids else None
            data_collator = DiffusionCollator(_pad_token_id(processing_class, model.config), mask_id)
        fixed = flops_per_token(model, 0)
        per_length = flops_per_token(model, 1) - fixed
        model.config.mixing_ratio = args.mixing_ratio
        model.config.noise_schedule = args.noise_schedule
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=nelbo_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the global batch
        self._strata: tuple[int, Tensor] = (-1, torch.empty(0))
        self._eval_batches = 0
        self._saving = False
        self._stream_position = StreamPosition()
        self._drawn: list[tuple[list[int], list[float]]] = []  # sample indices and times of the current step's batches
        peak = args.peak_tflops or peak_tflops(args.device)
        self.metrics = TrainingMetrics(
            lambda length: fixed + per_length * length, None if peak is None else peak * 1e12, args.device
        )
        self.add_callback(_Bookkeeping(self.metrics, isinstance(train_dataset, PackedStream)))
        self._optimizer_given = None if optimizers[0] is None else type(optimizers[0]).__name__
        self._save_on_request = SaveOnRequest(args.save_seconds, self._all_sum, args.device)
        self.add_callback(self._save_on_request)

    @staticmethod
    def _check_offload(args: XDLMTrainingArguments) -> None:
        """Refuse an optimizer in main memory that is not AdamW: accelerate would quietly train with another one."""
        config = args.deepspeed_plugin.deepspeed_config if args.deepspeed_plugin is not None else {}
        device = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") or "none"
        replaced = device != "none" and "optimizer" not in config and config.get("zero_force_ds_cpu_optimizer", True)
        known = OPTIMIZERS.get(args.optim)
        if replaced and not (known and known.offloads):
            raise ValueError(
                f"optim={args.optim.value!r} with offload_optimizer to {device}: accelerate would train with "
                "DeepSpeed's CPU Adam in its place. Use optim='adamw_torch', or a configuration that does not offload."
            )

    @staticmethod
    def _check_layout(args: XDLMTrainingArguments, train_dataset: Dataset | None) -> None:
        """Refuse what breaks `_sample_index`: it must know which row of the global batch each row is."""
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
        config = args.accelerator_config
        if config.split_batches or not config.even_batches:
            raise ValueError(
                f"accelerator_config split_batches={config.split_batches}, even_batches={config.even_batches} is not "
                "supported: leave them at False and True; set global_batch_size instead."
            )
        if config.dispatch_batches and has_length(train_dataset):
            raise ValueError("dispatch_batches=True is only supported for streams: leave it out.")
        if args.train_sampling_strategy == "batch_rebalance":
            raise ValueError("train_sampling_strategy='batch_rebalance' is not supported: rows are packed evenly.")
        if args.random_length_probability and not isinstance(train_dataset, PackedDataset | PackedStream | None):
            raise ValueError(
                f"random_length_probability={args.random_length_probability} needs packed rows (PackedDataset or "
                "PackedStream), which all have one length and no prompt: set it to 0."
            )
        if isinstance(train_dataset, PackedStream):
            if (train_dataset.rank, train_dataset.world_size) != (args.process_index, args.world_size):
                raise ValueError(
                    f"the stream was built for rank {train_dataset.rank} of {train_dataset.world_size}, but this is "
                    f"rank {args.process_index} of {args.world_size}: pass rank=args.process_index, "
                    "world_size=args.world_size to PackedStream."
                )
            if not train_dataset.repeat:
                raise ValueError("a PackedStream with repeat=False ends on some ranks before others: use repeat=True.")

    @staticmethod
    def _use_fused_loss(model: nn.Module, args: XDLMTrainingArguments) -> bool:
        head = model.get_output_embeddings()
        # A subclass (quantised), an adapter or a patched forward computes something else than hidden @ weight.T.
        plain = type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)
        if args.fused_loss and not plain:
            raise ValueError(
                f"fused_loss=True needs an output layer that is a plain nn.Linear without bias, not {head}: "
                "leave fused_loss out."
            )
        return plain if args.fused_loss is None else args.fused_loss

    # ----------------------------------------------------------------------------------------------------------------
    # Data: which row is which

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`, except that a `PackedStream`, sharded by itself, is not sharded a second time."""
        if not isinstance(self.train_dataset, PackedStream):
            return super().get_train_dataloader()
        loader = stream_loader(
            self.train_dataset,
            self._stream_position,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """The batches of one optimizer step, with `sample_index`, and the token count of the global batch.

        Raises:
            ValueError: If no token of the global batch is to be scored.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        tokens = torch.zeros((), dtype=torch.float64, device=device)
        self._drawn = []
        length = self._random_length(self.state.global_step)
        for number, batch in enumerate(batches):
            if length is not None:
                batch.update(
                    {name: x[:, :length] for name, x in batch.items() if isinstance(x, Tensor) and x.ndim == 2}
                )
            if "stream_state" in batch:
                self._stream_position.advance(batch.pop("stream_state"))
            index, repeated = self._sample_index(number, len(batch["input_ids"]))
            batch["sample_index"] = index
            batch["token_weights"][repeated.to(batch["token_weights"].device)] = 0
            tokens += batch["token_weights"].sum(dtype=torch.float64).to(device)
        tokens = self.accelerator.gather(tokens).sum()
        if tokens == 0:
            raise ValueError(
                f"step {self.state.global_step + 1}: no token of the global batch is to be scored; every position is "
                "prompt or padding. Raise the row length, or remove such rows."
            )
        return batches, tokens

    def _random_length(self, step: int) -> int | None:
        """Length to which the rows of a step are cut; None for whole rows. A function of noise seed and step alone."""
        if not self.args.random_length_probability:
            return None
        choice, place = torch.rand(2, generator=self._generator(_TRAIN_LENGTH, step), dtype=torch.float64).tolist()
        cut = choice < self.args.random_length_probability
        return 1 + int(place * self.train_dataset.length) if cut else None

    def _sample_index(self, micro_batch: int, rows: int) -> tuple[Tensor, Tensor]:
        """Places of a batch's rows in the run, and which rows only fill up the last global batch of an epoch.

        Accelerate deals batches out in turn, so place p of the global batch is row p % b of batch p // b, read by
        process (p // b) % W. At the end of an epoch it repeats first rows to make all processes equal.
        """
        batch_size, world_size = self._train_batch_size, self.accelerator.num_processes
        global_batch = self.get_total_train_batch_size(self.args)
        place = (micro_batch * world_size + self.accelerator.process_index) * batch_size + torch.arange(rows)
        index = self.state.global_step * global_batch + place
        if not has_length(self.train_dataset) or self.args.dataloader_drop_last:
            return index, torch.zeros(rows, dtype=torch.bool)
        epoch_rows = len(self.train_dataset)
        step_in_epoch = self.state.global_step % math.ceil(epoch_rows / global_batch)
        return index, step_in_epoch * global_batch + place >= epoch_rows

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        weights = inputs["token_weights"]
        prepared = super()._prepare_inputs(inputs)
        # Under DeepSpeed every float input is cast to the model's dtype: bfloat16 would round the weights.
        prepared["token_weights"] = weights.to(self.args.device)
        return prepared

    # ----------------------------------------------------------------------------------------------------------------
    # Objective

    def _generator(self, stream: int, index: int) -> torch.Generator:
        """Generator of its own for one row (or step), unrelated to that of any other."""
        state = np.random.SeedSequence((self.noise_seed, stream, index)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    def _training_noise(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Draw t and z_t for one batch; (z_t, alpha_t, d_alpha_t) of shapes (B, L), (B,), (B,)."""
        indices = inputs["sample_index"].tolist()
        generators = [self._generator(_TRAIN_ROW, index) for index in indices]
        t = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        if self.args.time_sampling == "stratified":
            global_batch = self.get_total_train_batch_size(self.args)
            strata = [self._stratum(*divmod(index, global_batch), global_batch) for index in indices]
            t = (torch.tensor(strata, dtype=torch.float64) + t) / global_batch
        t = (1 - self.args.t_eps) * t + self.args.t_eps
        self._drawn.append((indices, t.tolist()))
        return self._corrupt(inputs, t, generators)

    def _stratum(self, step: int, place: int, global_batch: int) -> int:
        if self._strata[0] != step:
            self._strata = (step, torch.randperm(global_batch, generator=self._generator(_TRAIN_STEP, step)))
        return int(self._strata[1][place])

    def _corrupt(
        self, inputs: dict[str, Tensor], t: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z_t at times t (B,), each row from its own generator; prompt and padding stay as they are."""
        x_0 = inputs["input_ids"]
        # float64 throughout: near t = 0, 1 - alpha_t in float32 has lost the digits that weigh the loss.
        alpha_t, d_alpha_t = self.schedule(t)
        z_t, noise_mask = x_0.cpu().clone(), inputs["noise_mask"].cpu()
        for row, (generator, alpha, free) in enumerate(zip(generators, alpha_t, noise_mask, strict=True)):
            # Only the free positions are drawn: the padding, which depends on the batch, must not shift the noise.
            z_t[row, free] = self.kernel.corrupt(z_t[row : row + 1, free], alpha, generator=generator)[0]
        z_t = z_t.to(x_0.device)
        return z_t, alpha_t.to(x_0.device), d_alpha_t.to(x_0.device)

    def _weighted_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], noise: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Sum of token_weights * loss, a scalar that carries the gradient, and the losses (B, L), detached."""
        x_0, weights = inputs["input_ids"], inputs["token_weights"]
        z_t, alpha_t, d_alpha_t = noise
        network_inputs = {"input_ids": z_t}
        if "attention_mask" in inputs:
            network_inputs["attention_mask"] = inputs["attention_mask"]
        if not self._fused:
            logits = model(**network_inputs).logits
            losses = diffusion_loss(logits, x_0, z_t, alpha_t, d_alpha_t, self.kernel)
            return (weights * losses).sum(), losses.detach()

        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        losses = []

        def loss_instead_of_logits(hidden: Tensor) -> Tensor:
            total, per_token = fused_linear_diffusion_loss(
                hidden,
                head.weight,
                x_0,
                z_t,
                alpha_t,
                d_alpha_t,
                self.kernel,
                token_weights=weights,
                chunk_size=self.args.loss_chunk_size,
            )
            losses.append(per_token)
            return total

        with _replaced_forward(head, loss_instead_of_logits):
            total = model(**network_inputs).logits
        return total, losses[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """This batch's share of the loss of the global batch, times the number of processes.

        Processes average their gradients, and the Trainer its logged losses, so the factor makes both the sum over
        processes: the loss in nats per token of the global batch.
        """
        noise = self._training_noise(inputs)
        total, losses = self._weighted_loss(model, inputs, noise)
        self._check_finite(losses)
        z_t, alpha_t, _ = noise
        self.metrics.add(
            inputs["input_ids"],
            z_t,
            self.schedule.inverse(alpha_t),
            inputs["token_weights"],
            losses,
            self.kernel.absorbing_ids,
        )
        if num_items_in_batch is None:
            loss = total / inputs["token_weights"].sum()
        else:
            loss = total * (self.accelerator.num_processes / num_items_in_batch).to(total.dtype)
        return (loss, {"token_losses": losses}) if return_outputs else loss

    # ----------------------------------------------------------------------------------------------------------------
    # Refusing what is not finite

    def _check_finite(self, losses: Tensor) -> None:
        indices, times = self._drawn[-1]
        bad = [row for row, finite in enumerate(torch.isfinite(losses).all(1).tolist()) if not finite]
        if bad:
            self._stop(
                "the loss is not finite", [indices[row] for row in bad], [times[row] for row in bad], "its rows have"
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> float | Tensor:
        """As in `Trainer`; a norm that is not finite stops the run, except where a loss scaler deals with it."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16 and grad_norm is not None and not math.isfinite(grad_norm):
            indices, times = ([x for part in parts for x in part] for parts in zip(*self._drawn, strict=True))
            self._stop(f"the gradient's norm is {float(grad_norm)}", indices, times, "this process' rows had")
        return grad_norm

    def _stop(self, what: str, indices: list[int], times: list[float], whose: str) -> None:
        shown = ", ".join(f"{index} (t = {t:.6g})" for index, t in list(zip(indices, times, strict=True))[:16])
        more = ", ..." if len(indices) > 16 else ""
        last = last_checkpoint(self.args.output_dir)
        weights = non_finite_weights(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        why = f" Nor are the weights, since an earlier step ({_first(weights)})." if weights else ""
        raise NonFiniteError(
            f"step {self.state.global_step + 1}: {what}; {whose} the sample indices {shown}{more}.{why} No checkpoint "
            f"was written from it; the last whole one is {last.name if last else 'none'}."
        )

    def _check_weights(self) -> None:
        """Refuse to save weights that are not finite. Every process must call this, and all agree.

        Raises:
            NonFiniteError: Naming the step and the parameters.
        """
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        bad = non_finite_weights(model, lambda flags: self._all_sum(flags.to(self.args.device)))
        if bad:
            last = last_checkpoint(self.args.output_dir)
            raise NonFiniteError(
                f"step {self.state.global_step}: the weights are not finite ({_first(bad)}), so nothing was saved. The "
                f"last whole checkpoint is {last.name if last else 'none'}; lower learning_rate, or check the data."
            )

    # ----------------------------------------------------------------------------------------------------------------
    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; the logs of training steps are joined by the figures that `training_metrics` lists."""
        if "loss" in logs:
            logs = {**logs, **self.metrics.report(self._all_sum, self._all_max)}
        super().log(logs, start_time)

    def _all_sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")

    def _all_max(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values[None]).amax(0)

    # ----------------------------------------------------------------------------------------------------------------
    # Evaluation

    def evaluation_loop(self, dataloader: DataLoader, *args, **kwargs):
        """As in `Trainer`, over data of known length: rows are numbered, for their noise.

        Raises:
            ValueError: If the data has no length.
        """
        if not has_length(dataloader.dataset):
            raise ValueError("the NELBO needs a dataset with a length: use PackedDataset(..., max_rows=...).")
        self._eval_batches = 0
        start = time.perf_counter()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        self.metrics.leave_out(time.perf_counter() - start)
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """NELBO of each row: (None, nats summed over its tokens (B,), its tokens (B,)); `nelbo_metrics` adds up."""
        inputs = self._prepare_inputs(inputs)
        rows = len(inputs["input_ids"])
        first = self._eval_batches * self.accelerator.num_processes + self.accelerator.process_index
        indices = range(first * self.args.eval_batch_size, first * self.args.eval_batch_size + rows)
        self._eval_batches += 1
        nats = torch.zeros(rows, dtype=torch.float64, device=inputs["input_ids"].device)
        for sample in range(self.args.nelbo_samples):
            noise = self._evaluation_noise(inputs, indices, sample)
            with torch.no_grad(), self.compute_loss_context_manager():
                _, losses = self._weighted_loss(model, inputs, noise)
            nats += (inputs["token_weights"] * losses).sum(1, dtype=torch.float64) / self.args.nelbo_samples
        return None, nats, inputs["token_weights"].sum(1, dtype=torch.float64)

    def _evaluation_noise(
        self, inputs: dict[str, Tensor], indices: range, sample: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Times stratified over (0, 1] within a row and across rows, the same at every evaluation.

        Sample j of row i has t = 1 - (j + v_i) / S with v the van der Corput sequence, shifted by a random number
        that depends on the seed alone: any number of rows covers time evenly, and the estimate has no bias.
        """
        samples = self.args.nelbo_samples
        shift = torch.rand((), generator=self._generator(_EVAL_SHIFT, 0), dtype=torch.float64)
        v = torch.tensor([_van_der_corput(index) for index in indices], dtype=torch.float64)
        t = 1 - (sample + (v + shift) % 1) / samples
        generators = [self._generator(_EVAL_ROW, index * samples + sample) for index in indices]
        return self._corrupt(inputs, t, generators)

    # ----------------------------------------------------------------------------------------------------------------

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As in `Trainer`; resuming repeats the uninterrupted run bit for bit, a stream without re-reading.

        Raises:
            ValueError: If `output_dir` holds another run and `resume_from_checkpoint` is not given, or the checkpoint
                is missing, incomplete or of another run (`checkpoints.check_same_run` says what may differ).
            NonFiniteError: If a loss, a gradient or a weight to be saved is not finite.
            OSError: If a checkpoint cannot be written; earlier ones stay as they are.
            Preempted: If SIGTERM arrived, after the step that was running and a checkpoint of it.
        """
        self._save_on_request.catch_signals()
        try:
            return self._train(resume_from_checkpoint, **kwargs)
        finally:
            self._save_on_request.release()

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs):
        if not resume_from_checkpoint:
            refuse_other_run(self.args.output_dir)
            self._stream_position = StreamPosition()
            return super().train(**kwargs)
        checkpoint, shared = resume_from_checkpoint, not self.args.save_on_each_node
        if checkpoint is True:
            checkpoint = last_whole_checkpoint(self.args.output_dir, shared)
            if checkpoint is None:
                raise ValueError(f"output_dir={str(self.args.output_dir)!r} holds no complete checkpoint to resume.")
        checkpoint = Path(checkpoint)
        reshards = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        check_same_run(checkpoint, self._run_record(), reshards, shared, self.args.accept_repaired_data)
        if not isinstance(self.train_dataset, PackedStream):
            return super().train(resume_from_checkpoint=str(checkpoint), **kwargs)
        path = checkpoint / f"stream_state_{self.args.process_index}.json"
        self._stream_position = StreamPosition(**json.loads(path.read_text(encoding="utf-8")))
        # The stream starts where it stood: nothing is to be read and thrown away.
        self.args.ignore_data_skip, before = True, self.args.ignore_data_skip
        try:
            return super().train(resume_from_checkpoint=str(checkpoint), **kwargs)
        finally:
            self.args.ignore_data_skip = before

    def _run_epoch(self, *args, **kwargs) -> None:
        """As in `Trainer`, which takes a step too many when it resumes from the checkpoint of the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """As in `Trainer`; leaves training here once what SIGTERM asked for is saved.

        Not at the end of training, where the Trainer deletes the last checkpoint with `save_total_limit=1` and
        `load_best_model_at_end`.
        """
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._save_on_request.stopping:
            step = self.state.global_step
            raise Preempted(step, str(Path(self.args.output_dir) / f"checkpoint-{step}"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; one whole safetensors model under FSDP too, whose checkpoints hold a part per process.

        Raises:
            OSError: If it cannot be written; the folder and the checkpoints stay as they are.
            NonFiniteError: If a weight is not finite; they stay as they are too.
        """
        if self._saving:  # part of a checkpoint
            return super().save_model(output_dir, _internal_call)
        self._check_weights()
        run_dir = Path(self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        needs = model_bytes(model, trained_only=hasattr(model, "peft_config"))
        with whole_model(
            Path(output_dir or run_dir), run_dir, self.state.global_step, needs, self.args.should_save
        ) as unfinished:
            self.accelerator.wait_for_everyone()
            self._save_whole_model(str(unfinished))
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_whole_model(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call=True)
        plugin = self.accelerator.state.fsdp_plugin
        before = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir, _internal_call=True)
        finally:
            plugin.set_state_dict_type(before)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in `Trainer`; beside an adapter also the noise, which else only the whole model's config would know."""
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.should_save and hasattr(model, "peft_config"):
            save_noise(model.config, output_dir or self.args.output_dir)

    def _run_record(self) -> dict[str, Any]:
        """What `check_same_run` compares, as JSON."""
        args, data = self.args, self.train_dataset
        stream = isinstance(data, PackedStream)
        fingerprint = getattr(data, "fingerprint", None) or {"rows": len(data) if has_length(data) else None}
        plain = ("mixing_ratio", "noise_schedule", "t_eps", "time_sampling", "random_length_probability")
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return {
            **{name: getattr(args, name) for name in plain},
            **optimization_record(args, model, self._optimizer_given),
            "noise_seed": self.noise_seed,
            "seed": None if stream else args.seed if args.data_seed is None else args.data_seed,
            "global_batch_size": self.get_total_train_batch_size(args),
            "world_size": args.world_size,
            "readers": f"{args.world_size}x{max(1, args.dataloader_num_workers)}" if stream else None,
            "tokenizer": tokenizer_checksum(self.processing_class),
            "data": json.loads(json.dumps(fingerprint)),
            "weights_only": args.save_only_model,
        }

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = Path(super()._get_output_dir(trial))
        return str(run_dir / UNFINISHED if self._saving else run_dir)

    @contextlib.contextmanager
    def _written_aside(self) -> Iterator[None]:
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`, but under another name until it is complete, and never with weights that are not finite."""
        start = time.perf_counter()
        self._check_weights()
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        unfinished = run_dir / UNFINISHED / name
        with explained_failure(self.state.global_step, run_dir / UNFINISHED, run_dir, self.args.should_save):
            if self.args.should_save:  # what a killed process left
                shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
                unfinished.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            with self._written_aside():
                super()._save_checkpoint(model, trial)
            self._save_record(unfinished, run_dir)
            self.accelerator.wait_for_everyone()
            write_checksums(unfinished, shared=not self.args.save_on_each_node)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(unfinished, run_dir / name)
                shutil.rmtree(run_dir / UNFINISHED)
                rotate_checkpoints(
                    output_dir=str(run_dir),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                )
        self.accelerator.wait_for_everyone()
        self.metrics.leave_out(time.perf_counter() - start)

    def _save_record(self, unfinished: Path, run_dir: Path) -> None:
        """What this class adds to a checkpoint, each process its own part."""
        if isinstance(self.train_dataset, PackedStream):
            position = json.dumps(self._stream_position.as_json())
            (unfinished / f"stream_state_{self.args.process_index}.json").write_text(position, encoding="utf-8")
        best = self.state.best_global_step
        if best:  # the Trainer looked for it beside the unfinished one
            folder = run_dir / f"checkpoint-{best}"
            found = best == self.state.global_step or folder.is_dir()
            self.state.best_model_checkpoint = str(folder) if found else None
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            (unfinished / RUN_RECORD).write_text(json.dumps(self._run_record(), indent=1), encoding="utf-8")


def nelbo_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """NELBO in nats per token from per-row sums, a ratio estimate, with its standard error over rows.

    Args:
        prediction: `predictions` nats per row, `label_ids` tokens per row.

    Returns:
        `loss`, `perplexity`, `tokens`; with two rows or more also `loss_standard_error` and
        `perplexity_standard_error` (delta method).
    """
    nats, tokens = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    rows, total = len(nats), tokens.sum()
    nelbo = nats.sum() / total
    perplexity = np.exp(nelbo)
    metrics = {"loss": float(nelbo), "perplexity": float(perplexity), "tokens": float(total)}
    if rows > 1:
        residuals = nats - nelbo * tokens
        error = np.sqrt((residuals**2).sum() * rows / (rows - 1)) / total
        metrics["loss_standard_error"] = float(error)
        metrics["perplexity_standard_error"] = float(perplexity * error)
    return metrics


def model_bytes(model: nn.Module, trained_only: bool = False) -> int:
    """Bytes of a model's parameters, also where ZeRO-3 keeps only a part of each in this process."""
    return sum(
        getattr(p, "ds_numel", p.numel()) * p.element_size()
        for p in model.parameters()
        if p.requires_grad or not trained_only
    )


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _van_der_corput(index: int) -> float:
    """Bits of `index` mirrored at the binary point: 0, 1/2, 1/4, 3/4, 1/8, ..."""
    return int(f"{index:b}"[::-1], 2) / 2 ** index.bit_length() if index else 0.0


def _pad_token_id(tokenizer: PreTrainedTokenizerBase | None, config: Any) -> int:
    """Any id will do where there is none: padding is neither attended to, noised nor scored."""
    candidates = (getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None))
    return next((token_id for token_id in candidates if token_id is not None), 0)


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `module(x)` return `forward(x)` for the time being.

    The module is still called as a module inside the wrapped model's forward, which is what DDP, FSDP and ZeRO-3 hang
    their gathering and reduction on; reading `module.weight` from outside would find an empty shard under ZeRO-3.
    """
    patched = vars(module).get("forward")  # by a library that replaced it on the instance after the trainer was built
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if patched is not None:
            module.forward = patched
