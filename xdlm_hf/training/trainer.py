"""Transformers' Trainer with the XDLM objective (Eqs. 14, 15) and the NELBO as evaluation loss.

One optimizer step minimises, over the whole global batch (all processes, all accumulation steps),

    sum of token_weights * loss  /  sum of token_weights        in nats per token,

however the batch is split. Time and noise of a row are functions of the noise seed and the row's place in the run
(`row_noise`), so the training trajectory depends neither on the number of processes, nor on accumulation, nor on the
device, nor on the global random state. One training step:

1. `get_batch_samples` reads its batches on the CPU and adds `sample_index`, `t` and `z_t`
2. `_prepare_inputs` moves them to the device
3. `compute_loss` computes the loss by `batch_loss.weighted_loss`, and raises an error if it is not finite

t = 0 is clean, t = 1 is noise. Shapes: B batch, L length, N vocabulary (rows of the output layer).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import has_length

from ..data.collator import DiffusionCollator
from ..data.stream import PackedStream
from ..data.tokenizer import check_tokenizer
from ..diffusion.process import NoiseProcess, StationaryProcess
from ..generation.protocol import check_trainable
from .arguments import XDLMTrainingArguments
from .batch_loss import uses_fused_loss, weighted_loss
from .checkpointing import CheckpointingTrainer
from .checkpoints import last_checkpoint
from .ema import check_ema
from .metrics import TrainingMetrics, flops_per_token, peak_tflops
from .nelbo import evaluation_noise, nelbo_metrics
from .optimizers import check_offload
from .places import check_layout, place_in_global_batch, repeated_rows
from .precision import NonFiniteError, check_trained_weights, first_of, non_finite_weights
from .row_noise import RowNoise

# Columns that DeepSpeed must not have cast to the model's dtype: bfloat16 would round weights and times.
_EXACT_COLUMNS = ("token_weights", "t", "weighting")


class _ClockAndEpoch(TrainerCallback):
    """Starts the clock of the metrics with training, and corrects the logged epoch of a stream.

    For a resumed stream, the Trainer counts the steps of the epoch from zero.
    """

    def __init__(self, metrics: TrainingMetrics, stream: bool):
        self.metrics = metrics
        self.stream = stream

    def on_train_begin(self, args, state, control, **kwargs):
        self.metrics.reset()

    def on_step_end(self, args, state, control, **kwargs):
        if self.stream:
            state.epoch = state.global_step / state.max_steps


class XDLMTrainer(CheckpointingTrainer):
    """Trains a masked, uniform or mixed diffusion language model, and evaluates its NELBO.

    `evaluate()` reports, under the usual prefix: `loss`, the NELBO in nats per token; `loss_standard_error` over rows
    (conservative: noise levels are stratified); `perplexity` = exp(NELBO) and `perplexity_standard_error`; `tokens`.
    It depends on the noise seed and the data, not on batch size or the number of processes. With `ema_decay` it is that
    of the averaged weights, also during training.

    Training logs the figures of `metrics`. A loss or gradient that is not finite stops the run, and weights that are
    not finite are not saved. Checkpoints are atomic, and a resumed run equals the uninterrupted one bit for bit.

    Args:
        model: A `DiffusionModel`, or a peft model of it; its noise is `noise_process(mixing_ratio, noise_schedule)`.
            Both are stored in its config if that is a `StationaryProcess`; others ignore them. With "timesteps" in its
            `conditioning` it is given `model.timesteps(t)`.
        data_collator: By default a `DiffusionCollator` with the tokenizer's, else the model's padding id.
        train_dataset: Rows with `input_ids`: a `PackedDataset`, a `PackedStream` (built for this rank, repeating;
            needs `max_steps`), or any dataset of such rows. With `num_classes` they may have a `class_label`; training
            replaces the share `label_dropout` of them by the null class.
        eval_dataset: As above, with a length.
        processing_class: The tokenizer; saved with the model.
        args, callbacks, optimizers: As in `Trainer`.

    Raises:
        ValueError: If k < 1 and the model has no mask token, the model needs class labels, the tokenizer does not
            belong to the model, several GPUs are visible to one process, a data-loading option would move rows to other
            places, trained weights are in 16 bits without float32 copies (`precision`), an optimizer other than AdamW
            is to be in main memory, or the fused loss is asked for where it cannot be used.
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
        self.process = training_process(model, args)
        self._absorbing_ids = self.process.absorbing_ids
        self._timesteps = model.timesteps if "timesteps" in model.conditioning else None
        stratified = args.time_sampling == "stratified"
        self.row_noise = RowNoise(self.process, args.noise_seed, args.t_eps, stratified, args.random_length_probability)
        if processing_class is not None:
            check_tokenizer(processing_class, model.config)
        check_layout(args, train_dataset)
        check_trained_weights(model, args.deepspeed_plugin)
        check_ema(model, args)
        if optimizers[0] is None:
            check_offload(args)
        self._label_dropout = getattr(model.config, "label_dropout", 0.0), model.num_classes
        self._fused = uses_fused_loss(model, args.fused_loss)
        if data_collator is None:
            data_collator = _collator(self.process, processing_class, model)
        self.metrics = _metrics(model, args)
        if isinstance(self.process, StationaryProcess):  # other noise has no k and no schedule to store
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
        self._eval_batches = 0
        self._drawn: list[tuple[list[int], list[float]]] = []  # sample indices and times of the current step's batches
        self.add_callback(_ClockAndEpoch(self.metrics, isinstance(train_dataset, PackedStream)))

    # ----------------------------------------------------------------------------------------------------------------
    # Data: the batches of a step, with their noise

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        """As in `Trainer`, with batches left on the CPU: `_prepare_inputs` moves them once their noise is drawn."""
        self.accelerator.device_placement, before = False, self.accelerator.device_placement
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.accelerator.device_placement = before

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """The batches of one optimizer step, noise included, and the token count of the global batch.

        Each batch gains `sample_index` (B,), the places of its rows in the run, `t` (B,) and `z_t` (B, L).

        Raises:
            ValueError: If no token of the global batch is to be scored.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._drawn = []
        length = self._random_length(self.state.global_step)
        for number, batch in enumerate(batches):
            if length is not None:
                cut = {name: x[:, :length] for name, x in batch.items() if isinstance(x, Tensor) and x.ndim == 2}
                batch.update(cut)
            if "stream_state" in batch:
                self._stream_position.advance(batch.pop("stream_state"))
            self._place_rows(batch, number)
            self._add_noise(batch)
        tokens = sum(batch["token_weights"].sum(dtype=torch.float64) for batch in batches).to(device)
        tokens = self.accelerator.gather(tokens).sum()
        if tokens == 0:
            raise ValueError(
                f"step {self.state.global_step + 1}: no token of the global batch is to be scored; every position is "
                "prompt or padding. Raise the row length, or remove such rows."
            )
        return batches, tokens

    def _random_length(self, step: int) -> int | None:
        """Length to which the rows of a step are cut; None for whole rows."""
        return self.row_noise.length(step, self.train_dataset.length) if self.args.random_length_probability else None

    def _place_rows(self, batch: dict[str, Tensor], number: int) -> None:
        """Add `sample_index`, and give rows that only fill up the last global batch of an epoch no weight."""
        step, global_batch = self.state.global_step, self.get_total_train_batch_size(self.args)
        rows, process, processes = len(batch["input_ids"]), self.args.process_index, self.args.world_size
        place = place_in_global_batch(number, rows, self._train_batch_size, process, processes)
        batch["sample_index"] = step * global_batch + place
        if has_length(self.train_dataset) and not self.args.dataloader_drop_last:
            batch["token_weights"][repeated_rows(place, step, global_batch, len(self.train_dataset))] = 0

    def _add_noise(self, batch: dict[str, Tensor]) -> None:
        """Add `z_t` and `t` to a batch that has its `sample_index`, and drop labels."""
        indices, global_batch = batch["sample_index"].tolist(), self.get_total_train_batch_size(self.args)
        batch["z_t"], batch["t"] = self.row_noise.draw(batch["input_ids"], batch["noise_mask"], indices, global_batch)
        if "class_labels" in batch:
            batch["class_labels"] = self.row_noise.drop_labels(batch["class_labels"], indices, *self._label_dropout)
        weighting = self.process.weighting_factor(
            batch["input_ids"], batch["z_t"], batch["t"], self.args.gidd_weighting
        )
        if weighting is not None:
            batch["weighting"] = weighting.float()
        self._drawn.append((indices, batch["t"].tolist()))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As in `Trainer`, which under DeepSpeed casts every float to the model's dtype; `_EXACT_COLUMNS` are not."""
        exact = {name: inputs[name].to(self.args.device) for name in _EXACT_COLUMNS if name in inputs}
        return {**super()._prepare_inputs(inputs), **exact}

    # ----------------------------------------------------------------------------------------------------------------
    # Objective

    def _weighted_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self._timesteps is not None:
            inputs = {**inputs, "timesteps": self._timesteps(inputs["t"])}
        return weighted_loss(model, self.process, inputs, self._fused, self.args.loss_chunk_size)

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
        total, losses = self._weighted_loss(model, inputs)
        self._check_finite(inputs, losses)
        x_0, z_t, t, weights = (inputs[name] for name in ("input_ids", "z_t", "t", "token_weights"))
        self.metrics.add(x_0, z_t, t, weights, losses, self._absorbing_ids)
        if num_items_in_batch is None:
            loss = total / weights.sum()
        else:
            loss = total * (self.accelerator.num_processes / num_items_in_batch).to(total.dtype)
        return (loss, {"token_losses": losses}) if return_outputs else loss

    def _check_finite(self, inputs: dict[str, Tensor], losses: Tensor) -> None:
        bad = ~torch.isfinite(losses).all(1)
        if bad.any():
            rows = _list_rows(*(inputs[name][bad].tolist() for name in ("sample_index", "t")))
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the loss is not finite; its rows have the sample indices {rows}."
                f"{_state_of_weights(self._unwrapped_model(), self.args.output_dir)}"
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> float | Tensor:
        """As in `Trainer`; a norm that is not finite stops the run, unless a loss scaler (fp16) handles it."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16 and grad_norm is not None and not math.isfinite(grad_norm):
            rows = _list_rows(*(itertools.chain(*parts) for parts in zip(*self._drawn, strict=True)))
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the gradient's norm is {float(grad_norm)}; this process' rows had "
                f"the sample indices {rows}.{_state_of_weights(self._unwrapped_model(), self.args.output_dir)}"
            )
        return grad_norm

    # ----------------------------------------------------------------------------------------------------------------
    # Logging and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; logs of training steps also hold the figures of `metrics`."""
        if "loss" in logs:
            logs = {**logs, **self.metrics.report(self._all_sum, lambda x: self.accelerator.gather(x[None]).amax(0))}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.metrics.paused():
            super()._save_checkpoint(model, trial)

    def evaluation_loop(self, dataloader: DataLoader, *args, **kwargs):
        """As in `Trainer`, over data of known length: rows are numbered, for their noise.

        Raises:
            ValueError: If the data has no length.
        """
        if not has_length(dataloader.dataset):
            raise ValueError("the NELBO needs a dataset with a length: use PackedDataset(..., max_rows=...).")
        self._eval_batches = 0
        with self.metrics.paused(), self.averaged_weights():
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """NELBO of each row: (None, nats summed over its tokens (B,), its tokens (B,)); `nelbo_metrics` adds up."""
        rows, samples = len(inputs["input_ids"]), self.args.nelbo_samples
        first = self._eval_batches * self.accelerator.num_processes + self.accelerator.process_index
        indices = range(first * self.args.eval_batch_size, first * self.args.eval_batch_size + rows)
        self._eval_batches += 1
        nats = torch.zeros(rows, dtype=torch.float64, device=self.args.device)
        x_0, noise_mask = inputs["input_ids"], inputs["noise_mask"]
        for sample in range(samples):
            z_t, t = evaluation_noise(self.process, self.args.noise_seed, x_0, noise_mask, indices, sample, samples)
            batch = self._prepare_inputs({**inputs, "z_t": z_t, "t": t})
            with torch.no_grad(), self.compute_loss_context_manager():
                _, losses = self._weighted_loss(model, batch)
            nats += (batch["token_weights"] * losses).sum(1, dtype=torch.float64) / samples
        return None, nats, batch["token_weights"].sum(1, dtype=torch.float64)


def training_process(model: nn.Module, args: XDLMTrainingArguments) -> NoiseProcess:
    """The noise of a run: with the arguments' k and schedule, or as the model has it if it is of another kind.

    Raises:
        ValueError: If k or schedule are given for such a model, or it has no such `gidd_weighting`.
    """
    process = model.noise_process(*((args.mixing_ratio, args.noise_schedule) if model.stationary_noise else ()))
    if args.noise_given and not isinstance(process, StationaryProcess):
        raise ValueError(
            f"{' and '.join(args.noise_given)} were given, but the model has noise of another kind, {process!r}: "
            "leave them out."
        )
    process.check_weighting(args.gidd_weighting)
    return process


def _metrics(model: nn.Module, args: XDLMTrainingArguments) -> TrainingMetrics:
    """Metrics of the run; operations are counted before the weights are sharded over processes."""
    fixed = flops_per_token(model, 0)
    per_length = flops_per_token(model, 1) - fixed
    peak = args.peak_tflops or peak_tflops(args.device)
    return TrainingMetrics(
        lambda length: fixed + per_length * length, None if peak is None else peak * 1e12, args.device
    )


def _collator(process: NoiseProcess, tokenizer: PreTrainedTokenizerBase | None, model: nn.Module) -> DiffusionCollator:
    """A collator with the tokenizer's, else the model's padding id, which refuses the mask id, if any, in the text.

    Without a padding id, 0 is used: padding is neither attended to, noised nor scored.
    """
    candidates = (getattr(tokenizer, "pad_token_id", None), getattr(model.config, "pad_token_id", None))
    pad_token_id = next((token_id for token_id in candidates if token_id is not None), 0)
    mask_token_id = process.mask_token_id if process.absorbing_ids else None
    return DiffusionCollator(pad_token_id, mask_token_id, model.num_classes)


def _list_rows(indices: Iterable[int], times: Iterable[float]) -> str:
    """Places and times of at most 16 rows, for a message."""
    rows = [f"{index} (t = {t:.6g})" for index, t in zip(indices, times, strict=True)]
    return ", ".join(rows[:16] + (["..."] if len(rows) > 16 else []))


def _state_of_weights(model: nn.Module, output_dir: str) -> str:
    """Sentences for an error: whether the weights are finite, and the last checkpoint."""
    weights = non_finite_weights(model)
    why = f" Nor are the weights, since an earlier step ({first_of(weights)})." if weights else ""
    last = last_checkpoint(output_dir)
    return f"{why} No checkpoint was written from it; the last whole one is {last.name if last else 'none'}."
