"""`xdlm-eval`: lm-eval's own command line, with the model `xdlm` and this package's tasks registered.

lm-eval has no hook for models or tasks of other packages. Every flag is lm-eval's; two defaults differ: `--model` is
`xdlm`, and the tasks of `xdlm_hf.evaluation.TASKS` are found beside those of `--include_path`. And one thing comes
earlier: tasks that are unknown, lack their files or lack the consent to run code are refused before a model is loaded.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

try:
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import setup_logging, simple_parse_args_string
except ModuleNotFoundError as error:
    raise SystemExit(f"xdlm-eval: {error}; install the extra: pip install 'xdlm_hf[eval]'") from error

from xdlm_hf.evaluation import TASKS
from xdlm_hf.evaluation import adapter as adapter  # registers the model
from xdlm_hf.evaluation import oracle as oracle  # registers its own
from xdlm_hf.evaluation.arguments import DEFAULT_MAX_NEW_TOKENS, Arguments, check_checkpoint, check_settings
from xdlm_hf.processes import end_script


def main() -> None:
    """Parses `sys.argv` as lm-eval does, fills in the two defaults, and runs the command. One of several processes does
    not return: see `end_script`."""
    setup_logging()
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
            arguments.py.
    """
    names, settings = options.get("tasks") or [], {}
    names = names.split(",") if isinstance(names, str) else names
    if not names:
        raise ValueError("no task is named: pass --tasks, xdlm_gsm8k for one")
    ours = options["model"] == "xdlm"
    if ours:
        settings = _as_dict(options.get("model_args"))
        flags = {name: options[name] for name in ("batch_size", "max_batch_size", "device") if name in options}
        arguments = Arguments.of({**flags, **settings})
    confirmed = bool(options.get("confirm_run_unsafe_code"))
    check(names, options["include_path"], _as_dict(options.get("metadata")), confirmed, settings)
    check_limit(options.get("limit"))
    if ours:
        tokenizer = check_checkpoint(arguments.pinned())
        if options.get("apply_chat_template") and not tokenizer.chat_template:
            raise ValueError(f"--apply_chat_template: the tokenizer of {arguments.pretrained} has none; leave it out")


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
) -> None:
    """Refuses tasks that would fail only after the model is loaded; this package's own are read on the way.

    Raises:
        ValueError: If a task is unknown, its rows cannot be read, it runs code and nobody confirmed that, or the
            model arguments `settings` do not fit the length of its answers.
    """
    # lm-eval's own thousands of task files take seconds to read, so only where they are needed.
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    own = [name for name in names if manager.match_tasks([name])]
    others = [name for name in names if name not in own and not name.endswith((".yaml", ".json"))]
    everything = TaskManager(include_path=list(include_path), metadata=metadata) if others and include_path else None
    unknown = [name for name in others if everything is None or not everything.match_tasks([name])]
    if unknown:
        ours = ", ".join(sorted(path.stem for path in TASKS.glob("xdlm_*.yaml") if "bbh_" not in path.stem))
        raise ValueError(f"unknown tasks {unknown}: this package has {ours}; `xdlm-eval ls tasks` lists all")
    for name, task in manager.load(own)["tasks"].items() if own else ():
        if getattr(task, "UNSAFE_CODE", False) and not confirmed:
            raise ValueError(f"{name} runs code written by the model: pass --confirm_run_unsafe_code")
        length = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", DEFAULT_MAX_NEW_TOKENS)
        check_settings({"max_new_tokens": length, **settings})


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
