"""Atomic checkpoints and resume checks.

A checkpoint is written under `_unfinished/`, flushed to the disk, and then renamed: a folder called `checkpoint-N` is
complete, whenever the process was killed. The final model's files are moved out of `_unfinished/`, the config last,
without which they cannot be loaded. Besides the files of Transformers' Trainer, a checkpoint holds

    xdlm_run.json          record of the run, compared on resuming (`check_same_run`)
    stream_state_R.json    for a stream: position of each reader of rank R
    ema.safetensors        with `ema_decay`: the average of the weights (`ema`)
    checksums.json         size and CRC-32 of every other file, compared on resuming

All are JSON. Optimizer and random states are the Trainer's `.pt` files, which it reads with `weights_only=True`, so
that no code is unpickled.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.source_files import check_same_files
from .checksums import damage

# Transformers' modules of its Trainer import peft, and with it bitsandbytes; evaluation needs neither.
if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)
UNFINISHED = "_unfinished"  # the leading underscore keeps it out of uploads to the Hub
RUN_RECORD = "xdlm_run.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # as `save_pretrained` names them
_NEW_RUN = "start a new run from the checkpoint's weights (model_name_or_path) to change it"
# Differences between a checkpoint and the resuming run that are refused, and why.
_REFUSED = {
    "mixing_ratio": "the optimizer's state belongs to another objective",
    "noise_schedule": "the optimizer's state belongs to another objective",
    "gidd_weighting": "the optimizer's state belongs to another objective",
    "tokenizer": "the same ids would mean other text",
    "data": "documents would be seen twice or never",
    "seed": "rows would come in another order, some of them a second time",
    "global_batch_size": "rows would be seen twice or never",
    "readers": "a stream is split over readers (processes x workers), each of which resumes at its own position",
    "optimizer": "another optimizer cannot use its state",
    "weight_dtype": "weights and optimizer state would be rounded to another precision",
    "lora": "the adapters' weights would have another effect",
    "ema_decay": "the average of the weights would mix two decays, or start in the middle",
}
# Differences that are allowed with a warning.
_ALLOWED = {
    "t_eps": "times are drawn differently from now on",
    "time_sampling": "times are drawn differently from now on",
    "random_length_probability": "lengths are drawn differently from now on",
    "noise_seed": "noise is drawn differently from now on",
    "learning_rate": "the former value stays in force, as part of the optimizer's state",
    "weight_decay": "the former value stays in force, as part of the optimizer's state",
    "adam_beta1": "the former value stays in force, as part of the optimizer's state",
    "adam_beta2": "the former value stays in force, as part of the optimizer's state",
    "adam_epsilon": "the former value stays in force, as part of the optimizer's state",
    "max_grad_norm": "gradients are clipped differently from now on",
    "lr_scheduler": "the learning rate follows another schedule from now on",
    "precision": "the network is computed in another precision from now on",
    "lora_dropout": "adapters are trained with other dropout from now on",
    "world_size": "the same rows and the same noise, but sums are rounded in another order and dropout is drawn anew",
}
# Values for records that are older than an option; other missing ones are not compared.
_BEFORE = {"random_length_probability": 0.0, "gidd_weighting": "elbo", "ema_decay": None}


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step in `output_dir`, or None."""
    from transformers.trainer_utils import get_last_checkpoint

    found = get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None
    return None if found is None else Path(found)


def last_whole_checkpoint(output_dir: str | Path, shared: bool = True) -> Path | None:
    """The last checkpoint whose files match their checksums. Every process must call this.

    Later ones, which are damaged, are renamed to `damaged-checkpoint-N`, with a warning that names their files:
    otherwise the rotation of checkpoints would keep them and delete whole ones.

    Args:
        output_dir: Folder of the run.
        shared: Whether all processes see the same folder.

    Returns:
        None if there is no checkpoint.

    Raises:
        ValueError: If there are checkpoints and all of them are damaged; none is renamed.
    """
    damaged = {}
    for checkpoint in _newest_first(output_dir):
        problems = _known_damage(checkpoint, shared)
        if not problems:
            _set_aside(damaged, checkpoint, shared)
            return checkpoint
        damaged[checkpoint] = problems
    if damaged:
        named = "; ".join(f"{checkpoint.name}: {problems[0]}" for checkpoint, problems in damaged.items())
        raise ValueError(
            f"output_dir={str(output_dir)!r}: every checkpoint is damaged ({named}). Restore one from a copy, or start "
            "a new run in another folder."
        )
    return None


def _newest_first(output_dir: str | Path) -> list[Path]:
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _step_of(path) is not None]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int | None:
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else None


def _set_aside(damaged: Mapping[Path, list[str]], whole: Path, shared: bool) -> None:
    state = PartialState()
    state.wait_for_everyone()
    for checkpoint, problems in damaged.items():
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        if state.is_main_process or (not shared and state.is_local_main_process):
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
        logger.warning(
            "%s is damaged (%s). It is now called %s, and may be deleted; going back to %s.",
            checkpoint,
            "; ".join(problems),
            aside.name,
            whole.name,
        )
    state.wait_for_everyone()


def refuse_other_run(output_dir: str | Path) -> None:
    """Refuse to write into a folder that holds a run or a model.

    Raises:
        ValueError: If there is a checkpoint, a model, an adapter or a trainer state in `output_dir`.
    """
    patterns = ("checkpoint-*", "*.safetensors", "config.json", "adapter_config.json", "trainer_state.json")
    found = sorted(path.name for pattern in patterns for path in Path(output_dir).glob(pattern))
    if found:
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds another run ({', '.join(found[:4])}): "
            "resume it with resume_from_checkpoint, or choose another folder."
        )


def tokenizer_checksum(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """CRC-32 of the tokenizer's tokens and their ids."""
    if tokenizer is None:
        return None
    return zlib.crc32(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


def optimization_record(args: "TrainingArguments", model: PreTrainedModel, optimizer: str | None) -> dict[str, Any]:
    """Settings of the optimization that `check_same_run` compares, as JSON.

    Args:
        args: Arguments of the run.
        model: Unwrapped; may be a peft model.
        optimizer: Class of an optimizer that was passed to the trainer; None for that of `args`.
    """
    lora = [config.to_dict() for _, config in sorted(getattr(model, "peft_config", {}).items())]
    shape = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern")
    adapters = [{name: _plain(config.get(name)) for name in shape} for config in lora]
    plain = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
    return {
        **{name: getattr(args, name) for name in plain},
        "optimizer": optimizer or ":".join(filter(None, [str(_plain(args.optim)), args.optim_args])),
        "weight_dtype": sorted({str(p.dtype) for p in model.parameters() if p.requires_grad}),
        "lr_scheduler": _schedule(args),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "as the weights",
        "lora": adapters[0] if len(adapters) == 1 else adapters or None,
        "lora_dropout": [config.get("lora_dropout") for config in lora] or None,
    }


def _schedule(args: "TrainingArguments") -> dict[str, Any]:
    schedule = {"type": str(_plain(args.lr_scheduler_type)), "kwargs": args.lr_scheduler_kwargs or {}}
    if schedule["type"] != "constant":
        schedule["warmup"] = args.warmup_steps
    if not schedule["type"].startswith("constant"):
        schedule["length"] = [args.max_steps, None if args.max_steps > 0 else args.num_train_epochs]
    return json.loads(json.dumps(schedule, default=str))


def _plain(value: Any) -> Any:
    """An enumeration by its value, a set as a list."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", value)


@contextlib.contextmanager
def explain_disk_errors(message: str, folder: Path, run_dir: Path) -> Iterator[None]:
    """Raise errors of the disk with a message, the free space and the last whole checkpoint.

    Args:
        message: A sentence saying what could not be written, with the step.
        folder: Where it was to be written.
        run_dir: Where the checkpoints are.

    Raises:
        OSError: The message, then free space, cause and last checkpoint.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        free = shutil.disk_usage(folder).free / 2**30 if folder.is_dir() else 0.0
        last = last_checkpoint(run_dir)
        kept = f"{last.name} is whole: make room and resume from it." if last else "There is no earlier checkpoint."
        raise OSError(f"{message} {free:.1f} GiB are free ({type(error).__name__}: {error}). {kept}") from error


def _is_of_the_disk(error: Exception) -> bool:
    # torch reports a full disk as RuntimeError, safetensors with an error of its own, tokenizers as a bare Exception.
    return isinstance(error, (OSError, RuntimeError, SafetensorError)) or type(error) is Exception


@contextlib.contextmanager
def unfinished_folder(folder: Path, writes: bool) -> Iterator[Path]:
    """The empty folder `_unfinished` in `folder`; the process that writes makes it, and removes it in the end."""
    unfinished = folder / UNFINISHED
    try:
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
            unfinished.mkdir(parents=True)
        yield unfinished
    finally:
        if writes:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def whole_model(folder: Path, run_dir: Path, message: str, writes: bool = True) -> Iterator[Path]:
    """A folder to write a model to; its files appear in `folder` when all of them are written, or not at all.

    Args:
        folder: The model's, which may hold other files. Files of the same names are replaced, and all weights, in
            however many files they are.
        run_dir, message: As in `explain_disk_errors`.
        writes: Whether this process writes.

    Raises:
        OSError: As `explain_disk_errors`; `folder` is as before unless moving the files failed.
    """
    is_new = not folder.exists()
    try:
        with explain_disk_errors(message, folder, run_dir), unfinished_folder(folder, writes) as unfinished:
            yield unfinished
            if writes:
                _move_out(unfinished, folder)
    except OSError:
        if writes and is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _move_out(unfinished: Path, folder: Path) -> None:
    """Flush files to the disk and move them to the folder above: outdated configs are removed first, and new ones
    moved last, so that no half model can be loaded."""
    _flush_all(unfinished)
    configs = [name for name in ("config.json", "adapter_config.json") if (unfinished / name).exists()]
    for name in configs:
        (folder / name).unlink(missing_ok=True)
    if any(_WEIGHTS.fullmatch(path.name) for path in unfinished.iterdir()):
        # An old single file would be loaded instead of new shards.
        for path in folder.iterdir():
            if _WEIGHTS.fullmatch(path.name):
                path.unlink()
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name in configs):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    unfinished.rmdir()
    _flush(folder)


def publish(unfinished: Path, target: Path) -> None:
    """Flush a written checkpoint to the disk, and rename it."""
    _flush_all(unfinished)
    if target.exists():  # of an earlier attempt, which got further than the checkpoint that this run resumed
        outdated = unfinished.with_name(f"outdated-{target.name}")
        target.rename(outdated)
        unfinished.rename(target)
        shutil.rmtree(outdated)
    else:
        unfinished.rename(target)
    _flush(target.parent)


def _flush_all(top: Path) -> None:
    for folder, _, files in os.walk(top):
        for path in [*(os.path.join(folder, file) for file in files), folder]:
            _flush(path)


def _flush(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_same_run(
    checkpoint: Path,
    run: Mapping[str, Any],
    reshards: bool,
    shared: bool = True,
    accept_repaired: bool = False,
    verified: bool = False,
) -> None:
    """Compare a checkpoint with the run that is to resume it. Every process must call this.

    Args:
        checkpoint: Its folder.
        run: The resuming run's record (`xdlm_run.json`).
        reshards: Whether this run can read weights and optimizer of another number of processes.
        shared: Whether all processes see the same folder.
        accept_repaired: Whether files of a stream may be repaired or removed (`check_same_files`).
        verified: Whether the checksums were compared already, by `last_whole_checkpoint`.

    Raises:
        ValueError: If the checkpoint is missing, incomplete or damaged, or of another run.
    """
    path = checkpoint / RUN_RECORD
    if not path.is_file():
        raise ValueError(
            f"{str(checkpoint)!r} is no checkpoint to resume from ({RUN_RECORD} is missing): it is incomplete or was "
            "written by another program. Its weights may serve as model_name_or_path of a new run."
        )
    if not verified:
        _check_files(checkpoint, shared)
    saved = _read_record(checkpoint)
    if saved["weights_only"]:
        raise ValueError(
            f"{str(checkpoint)!r} holds no optimizer state (save_only_model=True): "
            "use its weights as model_name_or_path of a new run."
        )
    if reshards:
        _check_state_files(checkpoint, saved["world_size"])
    _assume_revision(saved.get("data") or {}, run["data"])
    saved = {**_BEFORE, **saved}
    (saved, files_before), (run, files_now) = _without_files(saved), _without_files(run)
    for name, why in _REFUSED.items():
        if name in saved and saved[name] != run[name]:
            raise ValueError(
                f"{checkpoint.name} has {_difference(name, saved[name], run[name])}: {why}. "
                f"Restore the former, or {_NEW_RUN}."
            )
    if saved["world_size"] != run["world_size"] and not reshards:
        raise ValueError(
            f"{checkpoint.name} was written by {saved['world_size']} processes, this run has {run['world_size']}: "
            f"under DeepSpeed and FSDP its parts can only be read by as many. Restore the former, or {_NEW_RUN}."
        )
    if files_before and files_now:
        readers = math.prod(map(int, saved["readers"].split("x")))
        check_same_files(checkpoint, files_before, files_now, readers, accept_repaired)
    for name, why in _ALLOWED.items():
        if name in saved and saved[name] != run[name]:
            logger.warning("%s has %s: %s.", checkpoint.name, _difference(name, saved[name], run[name]), why)


def _without_files(run: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A record of a run without the files of its stream, and the files; None if it has none."""
    source = (run.get("data") or {}).get("source")
    if not isinstance(source, dict) or "root" not in source:
        return dict(run), None
    rest = {name: value for name, value in source.items() if name not in ("root", "files")}
    return {**run, "data": {**run["data"], "source": rest}}, source


def _known_damage(checkpoint: Path, shared: bool) -> list[str]:
    """`damage`; a checkpoint without checksums is taken to be whole, with a warning."""
    problems = damage(checkpoint, shared)
    if problems is None:
        logger.warning("%s has no checksums: its files are resumed from unverified.", checkpoint.name)
    return problems or []


def _check_files(checkpoint: Path, shared: bool) -> None:
    problems = _known_damage(checkpoint, shared)
    if problems:
        raise ValueError(
            f"{checkpoint.name} is damaged: {'; '.join(problems)}. Restore it from a copy, or resume from an earlier "
            "checkpoint (resume_from_checkpoint=auto takes the last whole one)."
        )


def _check_state_files(checkpoint: Path, processes: int) -> None:
    """Refuse missing states: Transformers' Trainer would silently resume without an optimizer state."""
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    missing = [name for name in ["optimizer.pt", "scheduler.pt", *random_states] if not (checkpoint / name).is_file()]
    if missing:
        raise ValueError(
            f"{checkpoint.name} has no {', '.join(missing)}: resuming would start them anew. Restore them, or "
            f"{_NEW_RUN}."
        )


def _read_record(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / RUN_RECORD).read_text(encoding="utf-8"))


def recorded_data(checkpoint: Path) -> dict[str, Any]:
    """Identity of the data in a checkpoint (`PackedStream.fingerprint`); empty if it is no checkpoint."""
    return _read_record(checkpoint).get("data") or {} if (checkpoint / RUN_RECORD).is_file() else {}


def _assume_revision(saved: dict[str, Any], ours: Mapping[str, Any]) -> None:
    """Assume that a Hub dataset of unknown revision was read at the present one."""
    before, now = saved.get("source"), ours.get("source")
    if before and now and "revision" in now and not (before.get("revision") or {}).get("commit"):
        before["revision"] = now["revision"]


def _difference(name: str, saved: Any, ours: Any) -> str:
    if isinstance(saved, dict) and isinstance(ours, dict):  # only the part that differs
        changed = next(key for key in {**saved, **ours} if saved.get(key) != ours.get(key))
        return _difference(f"{name} {changed}", saved.get(changed), ours.get(changed))
    return f"{name}={saved}, this run {ours}"
