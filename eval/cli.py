"""`xdlm-eval`: lm-eval's own command line, with the model `xdlm` and this package's tasks registered.

lm-eval has no hook for models or tasks of other packages. Every flag is lm-eval's; two defaults differ: `--model` is
`xdlm`, and the tasks of `xdlm_hf.evaluation.TASKS` are found beside those of `--include_path`.
"""

import argparse

try:
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging
except ModuleNotFoundError as error:
    raise SystemExit(f"xdlm-eval: {error}; install the extra: pip install 'xdlm_hf[eval]'") from error

from xdlm_hf.evaluation import TASKS
from xdlm_hf.evaluation import adapter as adapter  # registers the model
from xdlm_hf.evaluation import oracle as oracle


def main() -> None:
    """Parses `sys.argv` as lm-eval does, fills in the two defaults, and runs the command."""
    setup_logging()
    parser = HarnessCLI()
    parser.execute(with_defaults(parser.parse_args()))


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Sets `model` and `include_path` where the command has them; what the user or their `--config` says is kept."""
    from_file = EvaluatorConfig.load_yaml_config(args.config) if getattr(args, "config", None) else {}
    if "model" in args and args.model is None:
        args.model = from_file.get("model", "xdlm")
    if "include_path" in args:
        theirs = args.include_path or from_file.get("include_path")
        args.include_path = [str(TASKS), *([theirs] if theirs else [])]
    return args


if __name__ == "__main__":
    main()
