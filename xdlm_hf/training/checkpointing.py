"""A Trainer with atomic checkpoints, whose resumed runs equal uninterrupted ones bit for bit."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length, rotate_checkpoints

from ..data.stream import PackedStream, StreamPosition, stream_loader
from .adapters import save_noise
from .arguments import XDLMTrainingArguments
from .checkpoints import (
    RUN_RECORD,
    UNFINISHED,
    check_same_run,
    explain_disk_errors,
    last_checkpoint,
    last_whole_checkpoint,
    optimization_record,
    publish,
    refuse_other_run,
    tokenizer_checksum,
    unfinished_folder,
    whole_model,
)
from .checksums import write_checksums
from .ema import ExponentialMovingAverage, named_in_config
from .precision import NonFiniteError, first_of, non_finite_weights
from .preemption import Preempted, SaveOnRequest

# Arguments in the record of a run as they are.
_RECORDED = (
    "mixing_ratio",
    "noise_schedule",
    "gidd_weighting",
    "t_eps",
    "time_sampling",
    "random_length_probability",
    "noise_seed",
    "ema_decay",
)


class CheckpointingTrainer(Trainer):
    """Transformers' Trainer with atomic checkpoints, exact resuming (of streams too) and saving on SIGTERM.

    Weights are checked before each save, so that no checkpoint and no model holds a NaN. See `checkpoints` for the
    files.

    Args:
        args: Arguments of the run.
        optimizers: As in `Trainer`.
        others: As in `Trainer`, by keyword.
    """

    args: XDLMTrainingArguments

    def __init__(self, args: XDLMTrainingArguments, optimizers: tuple = (None, None), **others):
        super().__init__(args=args, optimizers=optimizers, **others)
        self._saving = False
        self._stream_position = StreamPosition()
        self._optimizer_given = None if optimizers[0] is None else type(optimizers[0]).__name__
        self._save_on_request = SaveOnRequest(args.save_seconds, self._all_sum, args.device)
        self.add_callback(self._save_on_request)
        self.ema = None if args.ema_decay is None else ExponentialMovingAverage(args.ema_decay)
        if self.ema is not None:
            self.add_callback(self.ema)
        vars(self._unwrapped_model().config).pop("ema_decay", None)  # of the average that this run starts from

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
            put_on_device=False,
            dispatch_batches=False,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *, verified: bool = False, **kwargs):
        """As in `Trainer`; resuming repeats the uninterrupted run bit for bit, a stream without re-reading.

        Args:
            resume_from_checkpoint: A folder, or True for the last whole checkpoint in `output_dir`.
            verified: Whether `last_whole_checkpoint` returned that folder, so that its checksums were compared.
            kwargs: As in `Trainer`.

        Raises:
            ValueError: If `output_dir` holds another run and `resume_from_checkpoint` is not given, or the checkpoint
                is missing, incomplete or of another run (`checkpoints.check_same_run` says what may differ).
            NonFiniteError: If a loss, a gradient or a weight to be saved is not finite.
            OSError: If a checkpoint cannot be written; earlier ones are kept.
            Preempted: If SIGTERM arrived, after the current step and its checkpoint.
        """
        self._save_on_request.catch_signals()
        try:
            return self._train(resume_from_checkpoint, verified, **kwargs)
        finally:
            self._save_on_request.release()

    def _train(self, resume_from_checkpoint: str | bool | None, verified: bool, **kwargs):
        if not resume_from_checkpoint:
            refuse_other_run(self.args.output_dir)
            self._stream_position = StreamPosition()
            if self.ema is not None:
                self.ema.reset()
            return super().train(**kwargs)
        checkpoint, shared = resume_from_checkpoint, not self.args.save_on_each_node
        if checkpoint is True:
            checkpoint, verified = last_whole_checkpoint(self.args.output_dir, shared), True
            if checkpoint is None:
                raise ValueError(f"output_dir={str(self.args.output_dir)!r} holds no complete checkpoint to resume.")
        checkpoint = Path(checkpoint)
        reshards = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        check_same_run(checkpoint, run_record(self), reshards, shared, self.args.accept_repaired_data, verified)
        if self.ema is not None:
            self.ema.load(checkpoint, self._unwrapped_model())
        if not isinstance(self.train_dataset, PackedStream):
            return super().train(resume_from_checkpoint=str(checkpoint), **kwargs)
        path = checkpoint / f"stream_state_{self.args.process_index}.json"
        self._stream_position = StreamPosition(**json.loads(path.read_text(encoding="utf-8")))
        # The stream itself resumes at its position: no batches are to be skipped.
        self.args.ignore_data_skip, before = True, self.args.ignore_data_skip
        try:
            return super().train(resume_from_checkpoint=str(checkpoint), **kwargs)
        finally:
            self.args.ignore_data_skip = before

    def _run_epoch(self, *args, **kwargs) -> None:
        """As in `Trainer`, which takes one step too many when it resumes from the last step's checkpoint."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """As in `Trainer`; ends training after the checkpoint that SIGTERM asked for.

        Not at the end of `train`, where the Trainer deletes the last checkpoint with `save_total_limit=1` and
        `load_best_model_at_end`.
        """
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._save_on_request.stopping:
            step = self.state.global_step
            raise Preempted(step, str(Path(self.args.output_dir) / f"checkpoint-{step}"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; under FSDP too one whole safetensors model, unlike in checkpoints.

        With `ema_decay` the model is the average of the weights, and its config records the decay.

        Raises:
            OSError: If it cannot be written; the folder and the checkpoints are not changed.
            NonFiniteError: If a weight is not finite; nothing is changed either.
        """
        if self._saving:  # part of a checkpoint
            return super().save_model(output_dir, _internal_call)
        run_dir = Path(self.args.output_dir)
        model = self._unwrapped_model()
        folder, needs = Path(output_dir or run_dir), model_bytes(model, trained_only=hasattr(model, "peft_config"))
        message = (
            f"step {self.state.global_step}: the model could not be written to {str(folder)!r}. It needs "
            f"{needs / 2**30:.1f} GiB."
        )
        with self.averaged_weights(), self._average_named(model.config):
            self._check_weights()
            with whole_model(folder, run_dir, message, self.args.should_save) as unfinished:
                self.accelerator.wait_for_everyone()
                self._save_whole_model(str(unfinished))
                self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """With `ema_decay`, the average in place of the weights inside the block; else nothing."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied(self._unwrapped_model())

    def _average_named(self, config: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else named_in_config(config, self.ema.decay)

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
        """As in `Trainer`; beside an adapter also the noise, which is otherwise only in the model's config."""
        super()._save(output_dir, state_dict)
        model = self._unwrapped_model()
        if self.args.should_save and hasattr(model, "peft_config"):
            save_noise(model.config, output_dir or self.args.output_dir)

    def _check_weights(self) -> None:
        """Refuse to save weights that are not finite. Every process must call this, and all agree.

        Raises:
            NonFiniteError: Naming the step and the parameters.
        """
        model = self._unwrapped_model()
        bad = non_finite_weights(model, lambda flags: self._all_sum(flags.to(self.args.device)))
        if bad:
            last = last_checkpoint(self.args.output_dir)
            raise NonFiniteError(
                f"step {self.state.global_step}: the weights are not finite ({first_of(bad)}), so nothing was saved. "
                f"The last whole checkpoint is {last.name if last else 'none'}; lower learning_rate, or check the data."
            )

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = Path(super()._get_output_dir(trial))
        return str(run_dir / UNFINISHED if self._saving else run_dir)

    @contextlib.contextmanager
    def _redirected_output(self) -> Iterator[None]:
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`, under another name until it is complete, and only with finite weights."""
        self._check_weights()
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        message = f"step {self.state.global_step}: the checkpoint could not be written to {str(run_dir)!r}."
        with (
            explain_disk_errors(message, run_dir, run_dir),
            unfinished_folder(run_dir, self.args.should_save) as aside,
        ):
            unfinished = aside / name
            if self.args.should_save:
                unfinished.mkdir()
            self.accelerator.wait_for_everyone()
            with self._redirected_output():
                super()._save_checkpoint(model, trial)
            self._save_record(unfinished, run_dir)
            self.accelerator.wait_for_everyone()
            write_checksums(unfinished, shared=not self.args.save_on_each_node)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(unfinished, run_dir / name)
                rotate_checkpoints(
                    output_dir=str(run_dir),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                )
        self.accelerator.wait_for_everyone()

    def _save_record(self, unfinished: Path, run_dir: Path) -> None:
        """Write this class' files of a checkpoint, each process its own."""
        if isinstance(self.train_dataset, PackedStream):
            position = json.dumps(self._stream_position.as_json())
            (unfinished / f"stream_state_{self.args.process_index}.json").write_text(position, encoding="utf-8")
        if self.ema is not None and self.args.should_save:
            self.ema.save(unfinished)
        best = self.state.best_global_step
        if best:  # the Trainer looked for it in the unfinished folder
            folder = run_dir / f"checkpoint-{best}"
            found = best == self.state.global_step or folder.is_dir()
            self.state.best_model_checkpoint = str(folder) if found else None
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            (unfinished / RUN_RECORD).write_text(json.dumps(run_record(self), indent=1), encoding="utf-8")

    def _unwrapped_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _all_sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")


def run_record(trainer: CheckpointingTrainer) -> dict[str, Any]:
    """The record that `check_same_run` compares, as JSON."""
    args, data, model = trainer.args, trainer.train_dataset, trainer._unwrapped_model()
    stream = isinstance(data, PackedStream)
    fingerprint = getattr(data, "fingerprint", None) or {"rows": len(data) if has_length(data) else None}
    no_such_noise = () if model.stationary_noise else ("mixing_ratio", "noise_schedule")  # the arguments' defaults
    return {
        **{name: None if name in no_such_noise else getattr(args, name) for name in _RECORDED},
        **optimization_record(args, model, trainer._optimizer_given),
        "seed": None if stream else args.seed if args.data_seed is None else args.data_seed,
        "global_batch_size": trainer.get_total_train_batch_size(args),
        "world_size": args.world_size,
        "readers": f"{args.world_size}x{max(1, args.dataloader_num_workers)}" if stream else None,
        "tokenizer": tokenizer_checksum(trainer.processing_class),
        "data": json.loads(json.dumps(fingerprint)),
        "weights_only": args.save_only_model,
    }


def model_bytes(model: nn.Module, trained_only: bool = False) -> int:
    """Bytes of a model's parameters, including the parts that ZeRO-3 keeps in other processes."""
    return sum(
        getattr(p, "ds_numel", p.numel()) * p.element_size()
        for p in model.parameters()
        if p.requires_grad or not trained_only
    )
