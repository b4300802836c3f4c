"""`xdlm-eval`: lm-eval's own command line, with the model `xdlm` and this package's tasks registered.

lm-eval has no hook for models or tasks of other packages. Every flag is lm-eval's; two defaults differ: `--model` is
`xdlm`, and the tasks of `xdlm_hf.evaluation.TASKS` are found beside those of `--include_path`. Logged samples of
likelihoods hold their standard errors too. And one thing comes earlier: tasks that are unknown, lack their files or
lack the consent to run code, answers too long for the checkpoint, and places that cannot be written are refused before
a model is loaded.
"""

import argparse
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    from lm_eval import loggers
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import setup_logging, simple_parse_args_string
except ModuleNotFoundError as error:
    raise SystemExit(f"xdlm-eval: {error}; install the extra: pip install 'xdlm_hf[eval]'") from error

from xdlm_hf.evaluation import TASKS
from xdlm_hf.evaluation import adapter as adapter  # registers the model
from xdlm_hf.evaluation import oracle as oracle  # registers its own
from xdlm_hf.evaluation.arguments import DEFAULT_MAX_NEW_TOKENS, Arguments, check_checkpoint, check_settings
from xdlm_hf.evaluation.likelihood import Estimate
from xdlm_hf.training.processes import end_script


def main() -> None:
    """Parses `sys.argv` as lm-eval does, fills in the two defaults, and runs the command. One of several processes does
    not return: see `end_script`."""
    setup_logging()
    loggers.EvaluationTracker = Tracker  # `execute` imports it from there
    parser = HarnessCLI()
    args = parser.parse_args()
    try:
        args = with_defaults(args)
        if "model" in args:  # the command `run`
            check_run(asked(args))
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
    """Of the likelihoods in one sample's responses, nested alike; None where there is none or it is not defined."""
    values = [[one[0] if isinstance(one, tuple) else one for one in repeated] for repeated in responses]
    return [[_error(value) for value in repeated] for repeated in values]


def _error(value: Any) -> float | None:
    known = isinstance(value, Estimate) and not math.isnan(value.standard_error)
    return value.standard_error if known else None


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks for and, where it says nothing, its --config: the way lm-eval merges them."""
    return {**_from_file(args), **{name: value for name, value in vars(args).items() if value or value == 0}}


def _from_file(args: argparse.Namespace) -> dict[str, Any]:
    return EvaluatorConfig.load_yaml_config(args.config) if getattr(args, "config", None) else {}


def check_run(options: Mapping[str, Any]) -> None:
    """Refuses a run that would fail after the model is loaded.

    Args:
        options: lm-eval's own, as `asked` gives them.

    Raises:
        ValueError: As `check` and `check_limit`, and for the model `xdlm` as `Arguments` and `check_checkpoint` of
            adapter.py.
    """
    names, settings = options.get("tasks") or [], {}
    names = [name for part in ([names] if isinstance(names, str) else names) for name in part.split(",")]
    if not names:
        raise ValueError("no task is named: pass --tasks, xdlm_gsm8k for one")
    ours = options["model"] == "xdlm"
    if ours:
        settings = _as_dict(options.get("model_args"))
        flags = {name: options[name] for name in ("batch_size", "max_batch_size", "device") if name in options}
        arguments = Arguments.of({**flags, **settings})
    check_places({**settings, **options})
    confirmed, asked_of_all = bool(options.get("confirm_run_unsafe_code")), _as_dict(options.get("gen_kwargs"))
    metadata = _as_dict(options.get("metadata"))
    lengths = check(names, options["include_path"], metadata, confirmed, settings, asked_of_all)
    check_limit(options.get("limit"))
    if ours:
        tokenizer = check_checkpoint(arguments.pinned(), lengths)
        if options.get("apply_chat_template") and not tokenizer.chat_template:
            raise ValueError(f"--apply_chat_template: the tokenizer of {arguments.pretrained} has none; leave it out")


def check_places(options: Mapping[str, Any]) -> None:
    """Refuses places of results, caches and logs that cannot be written; leaves none of them behind.

    lm-eval writes results when all is done, and goes on without them where it cannot.

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
            why = f"cannot be written ({error.strerror})"
            raise ValueError(f"{name}={options[name]} {why}: name another place") from error


def _as_dict(value: str | dict[str, Any] | None) -> dict[str, Any]:
    return simple_parse_args_string(value) if isinstance(value, str) else value or {}


def check_limit(limit: float | None) -> None:
    """Refuses a `limit` that leaves a process without a row, which lm-eval does not survive."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if limit is not None and (limit <= 0 or 1 <= limit < processes):
        raise ValueError(f"--limit {limit:g} leaves one of {processes} processes without a row: raise it")


def check(
    names: Sequence[str],
    include_path: Sequence[str],
    metadata: dict[str, Any],
    confirmed: bool,
    settings: Mapping[str, Any],
    gen_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Refuses tasks that would fail only after the model is loaded; this package's own are read on the way.

    Args:
        names: Names, or patterns with wildcards.
        include_path: Where tasks of others are.
        metadata: What the tasks are given to find their rows.
        confirmed: Whether code that a model wrote may run.
        settings: Model arguments.
        gen_kwargs: What the command line asks of all tasks over their own `generation_kwargs`.

    Returns:
        Length of the answers of this package's own tasks, in tokens.

    Raises:
        ValueError: If a task is unknown, its rows cannot be read, it runs code and nobody confirmed that, or the
            model arguments `settings` do not fit the length of its answers.
    """
    logging.getLogger("lm_eval.api.task").addFilter(_ONE_HINT)
    # lm-eval's own thousands of task files take seconds to read, so only where they are needed.
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    others = [name for name in names if not manager.match_tasks([name]) and not name.endswith((".yaml", ".json"))]
    everything = TaskManager(include_path=list(include_path), metadata=metadata) if others and include_path else None
    unknown = [name for name in others if everything is None or not everything.match_tasks([name])]
    if unknown:
        ours = ", ".join(sorted(path.stem for path in TASKS.glob("xdlm_*.yaml") if "bbh_" not in path.stem))
        raise ValueError(f"unknown tasks {unknown}: this package has {ours}; `xdlm-eval ls tasks` lists all")
    own, lengths = manager.match_tasks(list(names)), {}
    for name, task in manager.load(own)["tasks"].items() if own else ():
        if getattr(task, "UNSAFE_CODE", False) and not confirmed:
            raise ValueError(f"{name} runs code written by the model: pass --confirm_run_unsafe_code")
        asked_for = {**(task.get_config("generation_kwargs") or {}), **(gen_kwargs or {})}
        length = normalize_gen_kwargs(asked_for, DEFAULT_MAX_NEW_TOKENS)["max_gen_toks"]
        lengths[name] = settings.get("max_new_tokens", length)
        check_settings({"max_new_tokens": length, **settings})
    return lengths


class _OneHint(logging.Filter):
    """One line in place of the warning that lm-eval prints whenever a task reads its own rows; all else passes."""

    def __init__(self) -> None:
        super().__init__()
        self.said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "Custom kwargs can be passed to `--metadata`" not in record.getMessage():
            return True
        if self.said:
            return False
        self.said = True
        record.msg, record.args = "tasks find their rows by --metadata: data=PATH, data=hub@REVISION, or the Hub's", ()
        return True


_ONE_HINT = _OneHint()


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Sets `model` and `include_path` where the command has them; what the user or their `--config` says is kept."""
    from_file = _from_file(args)
    if "model" in args and args.model is None:
        args.model = from_file.get("model", "xdlm")
    if "include_path" in args:
        theirs = args.include_path or from_file.get("include_path")
        args.include_path = [str(TASKS), *([theirs] if theirs else [])]
    return args


if __name__ == "__main__":
    main()
