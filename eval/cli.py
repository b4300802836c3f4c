"""`xdlm-eval`: lm-eval's own command line, with the model `xdlm` and this package's tasks registered.

lm-eval has no hook for models or tasks of other packages. Every flag is lm-eval's; two defaults differ: `--model` is
`xdlm`, and the tasks of `xdlm_hf.evaluation.TASKS` are found beside those of `--include_path`. Logged samples of
likelihoods hold their standard errors too. Before a model is loaded, the command refuses tasks that are unknown, whose
rows cannot be read or that lack the consent to run code, answers too long for the checkpoint, and output paths that
cannot be written.
"""

import argparse
import glob
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import datasets
    from lm_eval import loggers
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.task import Task
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import setup_logging, simple_parse_args_string
except ModuleNotFoundError as error:
    raise SystemExit(f"xdlm-eval: {error}; install the extra: pip install 'xdlm_hf[eval]'") from error

from xdlm_hf.evaluation import TASKS
from xdlm_hf.evaluation import adapter as adapter  # registers the model
from xdlm_hf.evaluation import oracle as oracle  # registers its own
from xdlm_hf.evaluation.arguments import (
    GENERATION,
    Arguments,
    check_checkpoint,
    check_settings,
    refuse_unrepeatable,
    task_settings,
)
from xdlm_hf.evaluation.likelihood import Estimate
from xdlm_hf.evaluation.stability import refuse_likelihoods
from xdlm_hf.generation.config import XDLMGenerationConfig
from xdlm_hf.loading import add_version_option
from xdlm_hf.training.processes import end_script


def main() -> None:
    """Parses `sys.argv` as lm-eval does, sets the two defaults, checks, and runs the command.

    Where there are several processes, it does not return: see `end_script`.
    """
    versions = argparse.ArgumentParser(prog="xdlm-eval", add_help=False, allow_abbrev=False)
    add_version_option(versions)
    versions.parse_known_args()
    setup_logging()
    loggers.EvaluationTracker = Tracker  # `execute` imports it from there
    parser = HarnessCLI()
    args = parser.parse_args()
    try:
        args = with_defaults(args)
        if "model" in args:  # the command `run`
            check_run(merged_options(args))
    except (ValueError, TypeError, FileNotFoundError) as error:  # the last two: a --config that is none
        raise SystemExit(f"xdlm-eval: {error}") from error
    parser.execute(args)
    end_script()


class Tracker(loggers.EvaluationTracker):
    """lm-eval's writer of results, which adds `standard_errors` to each logged sample of likelihoods."""

    def save_results_samples(self, task_name: str, samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            errors = standard_errors(sample["resps"])
            if any(map(any, errors)):
                sample["standard_errors"] = errors
        super().save_results_samples(task_name, samples)


def standard_errors(responses: Sequence[Sequence[Any]]) -> list[list[float | None]]:
    """Standard errors of the likelihoods in one sample's responses, nested alike; None where it is not defined."""
    values = [[one[0] if isinstance(one, tuple) else one for one in repeated] for repeated in responses]
    return [[_error(value) for value in repeated] for repeated in values]


def _error(value: Any) -> float | None:
    known = isinstance(value, Estimate) and not math.isnan(value.standard_error)
    return value.standard_error if known else None


def merged_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the command line, which win over those of its --config, as in lm-eval."""
    return {**_from_file(args), **{name: value for name, value in vars(args).items() if value or value == 0}}


def _from_file(args: argparse.Namespace) -> dict[str, Any]:
    return EvaluatorConfig.load_yaml_config(args.config) if getattr(args, "config", None) else {}


def check_run(options: Mapping[str, Any]) -> None:
    """Refuses a run that would fail after the model is loaded.

    Args:
        options: lm-eval's own, as `merged_options` gives them.

    Raises:
        ValueError: As `check_tasks` and `check_limit`, and for the model `xdlm` as `Arguments` and `check_checkpoint`.
    """
    names, settings = options.get("tasks") or [], None
    names = [name for part in ([names] if isinstance(names, str) else names) for name in part.split(",")]
    if not names:
        raise ValueError("no task is named: pass --tasks, xdlm_gsm8k for one")
    ours = options["model"] == "xdlm"
    if ours:
        settings = _as_dict(options.get("model_args"))
        flags = {name: options[name] for name in ("batch_size", "max_batch_size", "device") if name in options}
        arguments = Arguments.of({**flags, **settings})
    check_places({**(settings or {}), **options})
    confirmed, gen_kwargs = bool(options.get("confirm_run_unsafe_code")), _as_dict(options.get("gen_kwargs"))
    metadata = _as_dict(options.get("metadata"))
    lengths = check_tasks(names, options["include_path"], metadata, confirmed, settings, gen_kwargs)
    check_limit(options.get("limit"))
    if ours:
        tokenizer = check_checkpoint(arguments.pinned(), lengths)
        if options.get("apply_chat_template") and not tokenizer.chat_template:
            raise ValueError(f"--apply_chat_template: the tokenizer of {arguments.pretrained} has none; leave it out")


def check_places(options: Mapping[str, Any]) -> None:
    """Refuses paths of results, caches and logs that cannot be written, without creating them.

    lm-eval writes results at the end, and only logs that it could not.

    Raises:
        ValueError: Naming the option, the path and why.
    """
    for name in ("output_path", "use_cache", "item_log"):
        if not options.get(name):
            continue
        path = Path(options[name]).expanduser()
        folder = path if name == "output_path" and path.suffix != ".json" else path.parent
        try:
            nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            raise ValueError(
                f"{name}={options[name]} cannot be written ({error.strerror}): name another path"
            ) from error


def _as_dict(value: str | dict[str, Any] | None) -> dict[str, Any]:
    return simple_parse_args_string(value) if isinstance(value, str) else value or {}


def check_limit(limit: float | None) -> None:
    """Refuses a `limit` that leaves a process without a row, with which lm-eval fails."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if limit is not None and (limit <= 0 or 1 <= limit < processes):
        raise ValueError(f"--limit {limit:g} leaves one of {processes} processes without a row: raise it")


def check_tasks(
    names: Sequence[str],
    include_path: Sequence[str],
    metadata: dict[str, Any],
    confirmed: bool,
    settings: Mapping[str, Any] | None,
    gen_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Loads the tasks and refuses those that would fail only after the model is loaded.

    Args:
        names: Names, patterns with wildcards, or YAML files.
        include_path: Folders of other tasks than this package's.
        metadata: What the tasks are given to find their rows.
        confirmed: Whether code that a model wrote may run.
        settings: Arguments of the model `xdlm`; None for another model, for which only this package's tasks are loaded.
        gen_kwargs: What the command line asks of all tasks over their own `generation_kwargs`.

    Returns:
        Length of the answers of each task that generates, in tokens.

    Raises:
        ValueError: If a task is unknown, its rows cannot be read, it runs code and nobody confirmed that, or `settings`
            do not fit the length of its answers or ask for a `stability` that it cannot have.
    """
    lengths, tasks = {}, _load_tasks(names, include_path, metadata, others=settings is not None)
    stability = settings is not None and settings.get("stability") is not None
    if stability:
        refuse_likelihoods(tasks)
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not confirmed:
            raise ValueError(f"{name} runs code written by the model: pass --confirm_run_unsafe_code")
        if task.OUTPUT_TYPE != "generate_until" or settings is None:
            continue
        task_kwargs = {**(task.get_config("generation_kwargs") or {}), **(gen_kwargs or {})}
        asked = task_settings(task_kwargs)[0]
        length = asked["max_new_tokens"]
        lengths[name] = settings.get("max_new_tokens", length)
        if stability:
            run = {option: value for option, value in settings.items() if option in GENERATION}
            refuse_unrepeatable(XDLMGenerationConfig(), {**asked, **run}, f"{name}: ")
        try:
            check_settings({"max_new_tokens": length, **settings})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return lengths


def _load_tasks(
    names: Sequence[str], include_path: Sequence[str], metadata: dict[str, Any], others: bool
) -> dict[str, Task]:
    """The tasks by name: this package's and, if `others`, the rest too. Unknown names are refused in either case."""
    logging.getLogger("lm_eval.api.task").addFilter(_ONE_HINT)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    files = [name for name in names if name.endswith((".yaml", ".json"))]
    stock = [name for name in names if name not in files and not manager.match_tasks([name])]
    if not (stock or files) or not include_path:
        everything = None
    else:  # lm-eval's own thousands of task files take seconds to read
        everything = TaskManager(include_path=list(include_path), metadata=metadata)
    unknown = [name for name in stock if everything is None or not everything.match_tasks([name])]
    if unknown:
        ours = ", ".join(sorted(path.stem for path in TASKS.glob("xdlm_*.yaml") if "bbh_" not in path.stem))
        raise ValueError(f"unknown tasks {unknown}: this package has {ours}; `xdlm-eval ls tasks` lists all")
    own = manager.match_tasks([name for name in names if name not in files])
    tasks = manager.load(own)["tasks"] if own else {}
    if everything is not None and others:
        paths = [path for name in files for path in glob.glob(name)]
        try:
            tasks |= everything.load([*everything.match_tasks(stock), *paths])["tasks"]
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"rows of {', '.join(stock + files)} cannot be read: {error}") from error
    return tasks


class _OneHint(logging.Filter):
    """Logs once, and in other words, the warning that lm-eval gives for each task with rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "Custom kwargs can be passed to `--metadata`" not in record.getMessage():
            return True
        if self.said:
            return False
        self.said = True
        record.msg = "rows are read from the Hub, or as --metadata says: data=PATH or data=hub@REVISION"
        record.args = ()
        return True


_ONE_HINT = _OneHint()


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Sets `model` if neither the user nor their `--config` does, and adds this package's tasks to `include_path`."""
    from_file = _from_file(args)
    if "model" in args and args.model is None:
        args.model = from_file.get("model", "xdlm")
    if "include_path" in args:
        theirs = args.include_path or from_file.get("include_path")
        args.include_path = [str(TASKS), *([theirs] if theirs else [])]
    return args


if __name__ == "__main__":
    main()
