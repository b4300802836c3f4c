"""Re-runs cells of the paper's Table 16, from the repository's root:

    python -m eval.table16 --row llada-xdlm --checkpoint PATH --steps 32 --tasks gsm8k,mbpp --limit 20
    accelerate launch -m eval.table16 --row llada --steps 32,64,128,256 --confirm_run_unsafe_code

A run that was killed goes on where it stopped: every finished answer is in lm-eval's response cache. Each row and
number of steps has a folder with manifest.json (versions, commit, seeds, all settings, every answer with its score,
seconds and forward passes); table16.md puts all of them beside the published figures. Under a launcher of several
processes, each takes its share. Protocol, cost and what is known not to match: docs/evaluation.md.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from xdlm_hf.evaluation import TASKS
from xdlm_hf.evaluation.adapter import XDLMEvalModel
from xdlm_hf.evaluation.cli import check
from xdlm_hf.evaluation.published import BENCHMARKS, PUBLISHED, markdown_table

BASE = "GSAI-ML/LLaDA-8B-Base"
# Checkpoint (None: --checkpoint must name it, since none is public) and sampler settings of each row.
ROWS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "llada": (BASE, {"mixing_ratio": 0.0}),
    "llada-xdlm-infer": (BASE, {"mixing_ratio": 0.1}),
    "llada-mdlm": (None, {"mixing_ratio": 0.0}),
    "llada-xdlm": (None, {"mixing_ratio": 0.1}),
}
NEW_TOKENS = 256
PACKAGES = ("xdlm_hf", "torch", "transformers", "lm_eval", "datasets", "accelerate", "peft", "sympy")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", required=True, choices=ROWS)
    parser.add_argument("--checkpoint", help="folder or Hub name; by default the row's own, where that is public")
    parser.add_argument("--peft", help="folder or Hub name of a LoRA adapter")
    parser.add_argument("--steps", default="32", help="one or more, e.g. 32,64,128,256")
    parser.add_argument("--tasks", default=",".join(BENCHMARKS), help=f"some of {','.join(BENCHMARKS)}")
    parser.add_argument("--limit", type=int, help="only the first rows of each task (of each subtask of bbh)")
    parser.add_argument("--data", default=os.environ.get("XDLM_DATA"), help="folder of local files instead of the Hub")
    parser.add_argument("--reference_compat", action="store_true", help="the authors' sampler, token for token")
    parser.add_argument("--max_new_tokens", type=int, default=NEW_TOKENS, help="256 in the paper")
    parser.add_argument("--batch_size", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--confirm_run_unsafe_code", action="store_true", help="for humaneval and mbpp, see the docs")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/table16"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        steps, tasks = check_options(options)
        for count in steps:
            run_cell(options, count, tasks)
    except ValueError as error:
        raise SystemExit(f"table16: {error}") from error


def check_options(options: argparse.Namespace) -> tuple[list[int], list[str]]:
    """Steps and names of tasks; refuses what would fail after the model is loaded.

    Raises:
        ValueError: For an unknown task, steps that do not fit, a row without checkpoint, and as `cli.check`.
    """
    steps = [int(part) if part.isdecimal() else 0 for part in options.steps.split(",")]
    if not all(1 <= count <= options.max_new_tokens for count in steps):
        raise ValueError(f"--steps {options.steps} must be whole numbers from 1 to {options.max_new_tokens}")
    unknown = [name for name in options.tasks.split(",") if name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"--tasks: unknown {unknown}, choose of {','.join(BENCHMARKS)}")
    if options.checkpoint is None and ROWS[options.row][0] is None:
        raise ValueError(f"the checkpoint of {options.row} is not public: name yours with --checkpoint")
    tasks = [f"xdlm_{name}" for name in options.tasks.split(",")]
    check(tasks, [], _metadata(options), options.confirm_run_unsafe_code)
    return steps, tasks


def run_cell(options: argparse.Namespace, steps: int, tasks: list[str]) -> None:
    """One row at one number of steps: from cache or model to manifest and table."""
    settings = model_settings(options, steps)
    suffix = "-reference_compat" if options.reference_compat else ""
    folder = options.output_dir / f"{options.row}-{steps}{suffix}"
    rank = int(os.environ.get("RANK", "0"))
    claim(folder, settings, write=rank == 0)
    lm = XDLMEvalModel(
        **settings,
        batch_size=options.batch_size,
        device=options.device,
        item_log=str(folder / f"items_rank{rank}.jsonl"),
    )
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=_metadata(options))
    results = lm_eval.simple_evaluate(
        lm,
        tasks=tasks,
        task_manager=manager,
        limit=options.limit,
        use_cache=str(folder / "answers"),
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
    )
    lm.barrier()
    if results is None:  # not the first process
        return
    manifest = make_manifest(options, steps, settings, results, item_costs(folder))
    text = json.dumps(manifest, indent=1, default=handle_non_serializable, ensure_ascii=False)
    partial = folder / "manifest.json.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(folder / "manifest.json")
    manifests = [json.loads(path.read_text("utf-8")) for path in sorted(options.output_dir.glob("*/manifest.json"))]
    table = markdown_table(manifests)
    (options.output_dir / "table16.md").write_text(table, encoding="utf-8")
    print(table)


def model_settings(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Arguments of the adapter that decide what is answered."""
    checkpoint, sampler = ROWS[options.row]
    settings = {
        "pretrained": options.checkpoint or checkpoint,
        "peft": options.peft,
        "dtype": options.dtype,
        "steps": steps,
        "max_new_tokens": options.max_new_tokens,
        "block_length": options.max_new_tokens,
        "temperature": 0.0,
        "seed": options.seed,
        "reference_compat": options.reference_compat or None,
    }
    return {name: value for name, value in (settings | sampler).items() if value is not None}


def claim(folder: Path, settings: dict[str, Any], write: bool) -> None:
    """Marks the folder as holding answers made with these settings.

    Raises:
        ValueError: If it holds answers made with others.
    """
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))
        if changed:
            was = {name: before.get(name) for name in changed}
            raise ValueError(f"{folder} holds answers made with other settings ({was}): name another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    if write:
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def item_costs(folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds, forward passes and rows of the batch of every answer, by the hash of its prompt."""
    costs = {}
    for path in sorted(folder.glob("items_rank*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line in which a run was killed
                continue
            costs[entry.pop("prompt_hash")] = entry
    return costs


def make_manifest(
    options: argparse.Namespace, steps: int, settings: dict[str, Any], results: dict[str, Any], costs: dict[str, dict]
) -> dict[str, Any]:
    """All that is needed to say what was run and to check it item by item."""
    ordered = {task: sorted(group, key=lambda s: s["doc_id"]) for task, group in results["samples"].items()}
    items = {task: [_item(sample, costs) for sample in group] for task, group in ordered.items()}
    everything = [item for group in items.values() for item in group]
    return {
        "row": options.row,
        "steps": steps,
        "reference_compat": options.reference_compat,
        "limit": options.limit,
        "settings": settings,
        "command": vars(options),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "commit": _commit(),
        "seed": options.seed,
        "published": PUBLISHED.get((options.row, steps)),
        "scores": results["results"],
        "groups": results.get("groups", {}),
        "task_configs": results["configs"],
        "model": results["config"],
        "seconds": sum(item.get("seconds", 0.0) for item in everything),
        "items": items,
    }


def _item(sample: dict[str, Any], costs: dict[str, dict]) -> dict[str, Any]:
    scores = {name: sample[name] for name in sample["metrics"]}
    item = {"doc_id": sample["doc_id"], "prompt_hash": sample["prompt_hash"], "answer": sample["resps"][0][0]}
    verdict = {"verdict": sample["filtered_resps"][0]} if sample["filter"] != "none" else {}
    return {**item, **scores, **verdict, **costs.get(sample["prompt_hash"], {})}


def _metadata(options: argparse.Namespace) -> dict[str, str]:
    return {"data": options.data} if options.data else {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The repository's commit, with "+changes" where the tree is not clean."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--abbrev=40"]
    described = subprocess.run([*command, "--dirty=+changes"], capture_output=True, text=True, check=False)
    return described.stdout.strip() or None


if __name__ == "__main__":
    main()
