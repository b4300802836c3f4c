"""Reproduces cells of the paper's Table 16; from the repository's root:

    python -m eval.table16 --row llada-xdlm --checkpoint PATH --steps 32 --tasks gsm8k,mbpp --limit 20
    accelerate launch -m eval.table16 --row llada --steps 32,64,128,256 --confirm_run_unsafe_code

A killed run resumes where it stopped, because every finished answer is in lm-eval's response cache. Each row and number
of steps has a folder with manifest.json (versions, commit, date, seeds, all settings, hashes of model and data, device,
layers of the sandbox, every raw answer with its score, seconds and forward passes), to which other tasks can be added
later; table16.md shows all of them beside the published scores. `python -m eval.rescore` scores a folder by another
protocol. Several processes share the rows. docs/evaluation.md describes protocols, cost and known differences.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sqlite3
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from xdlm_hf.atomic import write_whole
from xdlm_hf.evaluation import TASKS
from xdlm_hf.evaluation.adapter import XDLMEvalModel
from xdlm_hf.evaluation.arguments import Arguments
from xdlm_hf.evaluation.cli import check_run
from xdlm_hf.evaluation.protocols import PROTOCOLS
from xdlm_hf.evaluation.published import BENCHMARKS, PUBLISHED, markdown_table
from xdlm_hf.training.processes import end_script

BASE = "GSAI-ML/LLaDA-8B-Base"
EDIT_THRESHOLD = 0.3  # helped two small models at 8 steps: docs/generation.md
EDITS = {"policy": "threshold", "threshold": EDIT_THRESHOLD}
# Checkpoint (None: --checkpoint must name it, since none is public) and sampler settings of each row. The paper lacks
# the last row: edits above a confidence in place of Algorithm 1's budget.
ROWS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "llada": (BASE, {"mixing_ratio": 0.0}),
    "llada-xdlm-infer": (BASE, {"mixing_ratio": 0.1}),
    "llada-mdlm": (None, {"mixing_ratio": 0.0}),
    "llada-xdlm": (None, {"mixing_ratio": 0.1}),
    "llada-xdlm-edit": (None, {"mixing_ratio": 0.1, "refinement": EDITS}),
}
NEW_TOKENS = 256
ANSWERS = "answers"  # lm-eval adds _rank<n>.db
PACKAGES = ("xdlm_hf", "torch", "transformers", "lm_eval", "datasets", "accelerate", "peft", "sympy")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", required=True, choices=ROWS)
    parser.add_argument("--checkpoint", help="folder or Hub name; by default the row's own, where that is public")
    parser.add_argument("--peft", help="folder or Hub name of a LoRA adapter")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint on the Hub")
    parser.add_argument("--peft_revision", help="the same of the adapter")
    parser.add_argument("--steps", default="32", help="one or more, e.g. 32,64,128,256")
    parser.add_argument("--tasks", default=",".join(BENCHMARKS), help=f"some of {','.join(BENCHMARKS)}")
    parser.add_argument("--protocol", default=PROTOCOLS[0], choices=PROTOCOLS, help="how to ask and score")
    parser.add_argument("--limit", type=int, help="only the first rows of each task (of each subtask of bbh)")
    parser.add_argument("--data", default=os.environ.get("XDLM_DATA"), help="folder of local files, or hub@REVISION")
    parser.add_argument("--reference_compat", action="store_true", help="the authors' sampler (docs/generation.md)")
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
            check_folder(cell_folder(options, count), shared_settings(options, count))
    except ValueError as error:
        raise SystemExit(f"table16: {error}") from error
    for count in steps:
        run_cell(options, count, tasks)
    end_script()


def check_options(options: argparse.Namespace) -> tuple[list[int], list[str]]:
    """Numbers of steps and names of tasks, checked before the model is loaded.

    Raises:
        ValueError: For an unknown task, steps that do not fit, a row without checkpoint, and as `cli.check_run`.
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
    check_run(
        {
            "model": "xdlm",
            "model_args": {**model_settings(options, steps[0]), **adapter_settings(options)},
            "tasks": tasks,
            "include_path": [],
            "metadata": _metadata(options),
            "confirm_run_unsafe_code": options.confirm_run_unsafe_code,
            "limit": options.limit,
            "output_path": str(options.output_dir),
        }
    )
    pin(options, steps[0])
    return steps, tasks


def pin(options: argparse.Namespace, steps: int) -> None:
    """Replaces revisions by their current commits, so that all cells use the same weights."""
    pinned = Arguments.of(model_settings(options, steps)).pinned()
    options.revision, options.peft_revision = pinned.revision, pinned.peft_revision


def run_cell(options: argparse.Namespace, steps: int, tasks: list[str]) -> None:
    """Runs one row at one number of steps, and writes manifest and table."""
    settings, folder = model_settings(options, steps), cell_folder(options, steps)
    rank = int(os.environ.get("RANK", "0"))
    shared = shared_settings(options, steps)
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write(folder / "settings.json", shared)
    copy_cached_answers(folder, rank)
    item_log = folder / f"items_rank{rank}.jsonl"
    lm = XDLMEvalModel(**settings, **adapter_settings(options), item_log=str(item_log))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=_metadata(options))
    results = lm_eval.simple_evaluate(
        lm,
        tasks=tasks,
        task_manager=manager,
        limit=options.limit,
        use_cache=str(folder / ANSWERS),
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
    )
    lm.barrier()
    if results is None:  # not the first process
        return
    manifest = make_manifest(options, steps, shared, results, item_costs(folder))
    write(folder / "manifest.json", with_earlier_tasks(manifest, folder / "manifest.json"))
    manifests = [json.loads(path.read_text("utf-8")) for path in sorted(options.output_dir.glob("*/manifest.json"))]
    table = markdown_table(manifests)
    (options.output_dir / "table16.md").write_text(table, encoding="utf-8")
    print(table)


def model_settings(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Arguments of the adapter on which answers depend."""
    checkpoint, sampler = ROWS[options.row]
    settings = {
        "pretrained": options.checkpoint or checkpoint,
        "revision": options.revision,
        "peft": options.peft,
        "peft_revision": options.peft_revision,
        "dtype": options.dtype,
        "steps": steps,
        "max_new_tokens": options.max_new_tokens,
        "block_length": options.max_new_tokens,
        "temperature": 0.0,
        "seed": options.seed,
        "reference_compat": options.reference_compat or None,
    }
    return {name: value for name, value in (settings | sampler).items() if value is not None}


def adapter_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the adapter on which only speed depends."""
    return {"batch_size": options.batch_size, "device": options.device}


def cell_folder(options: argparse.Namespace, steps: int) -> Path:
    suffix = "-reference_compat" if options.reference_compat else ""
    return options.output_dir / f"{options.row}-{steps}{suffix}"


def shared_settings(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """What all answers of a folder must share: settings, hashes of the model, and the protocol."""
    return {**with_shas(model_settings(options, steps)), "protocol": options.protocol}


def with_shas(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with commits or content hashes, `model_sha` and `peft_sha`, in place of revisions."""
    named = {name: value for name, value in settings.items() if name not in ("revision", "peft_revision")}
    return {**named, **Arguments.of(settings).shas()}


def copy_cached_answers(folder: Path, rank: int) -> None:
    """Copies the response caches of other processes to this one's, for a run resumed with another number of them."""
    own, others = f"{ANSWERS}_rank{rank}.db", sorted(folder.glob(f"{ANSWERS}_rank*.db"))
    for path in others:
        if path.name == own:
            continue
        with contextlib.closing(sqlite3.connect(folder / own)) as cache:
            cache.execute("CREATE TABLE IF NOT EXISTS unnamed (key TEXT PRIMARY KEY, value BLOB)")  # sqlitedict's table
            cache.execute("ATTACH ? AS other", (str(path),))
            if cache.execute("SELECT 1 FROM other.sqlite_master WHERE name = 'unnamed'").fetchone():
                cache.execute("INSERT OR IGNORE INTO unnamed SELECT key, value FROM other.unnamed")
            cache.commit()


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder that holds answers made with other settings.

    Raises:
        ValueError: Naming each setting that differs, with both values.
    """
    path = folder / "settings.json"
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    names = sorted(before.keys() | settings.keys())
    other = [f"{n}={before.get(n)!r}, now {settings.get(n)!r}" for n in names if before.get(n) != settings.get(n)]
    if other:
        raise ValueError(
            f"{folder} holds answers made with other settings ({'; '.join(other)}): name another --output_dir"
        )


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(content, indent=1, default=handle_non_serializable, ensure_ascii=False)
    # A half surrogate in an answer becomes its JSON escape.
    write_whole(path, (text + "\n").encode("utf-8", "backslashreplace"))


def item_costs(folder: Path) -> dict[str, dict[str, Any]]:
    """Seconds, forward passes and rows of the batch of every answer, by the hash of its prompt."""
    costs = {}
    for path in sorted(folder.glob("items_rank*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the run was killed while it wrote this line
                continue
            costs[entry.pop("prompt_hash")] = entry
    return costs


def make_manifest(
    options: argparse.Namespace, steps: int, settings: dict[str, Any], results: dict[str, Any], costs: dict[str, dict]
) -> dict[str, Any]:
    """Settings, provenance, scores and single answers of one cell."""
    ordered = {task: sorted(group, key=lambda s: s["doc_id"]) for task, group in results["samples"].items()}
    run = {
        "limit": options.limit,
        "command": vars(options),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "commit": _commit(),
        "date": datetime.fromtimestamp(results["date"], UTC).isoformat(timespec="seconds"),
        # Without num_forward_passes, which lacks the answers that came from the cache.
        "model": {name: value for name, value in results["config"].items() if name != "num_forward_passes"},
    }
    return {
        "row": options.row,
        "steps": steps,
        "reference_compat": options.reference_compat,
        "settings": settings,
        "protocol": options.protocol,
        "seed": options.seed,
        "published": PUBLISHED.get((options.row, steps)),
        "runs": {task: run for task in ordered},
        "scores": results["results"],
        "groups": results.get("groups", {}),
        "task_configs": results["configs"],
        "items": {task: [_item(sample, costs) for sample in group] for task, group in ordered.items()},
    }


def with_earlier_tasks(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """The manifest joined with other tasks of the one at `path`, and the total cost; `runs` has the run of each task.

    All answers in the folder have the same model and settings (`check_folder`).
    """
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts = ("runs", "scores", "groups", "task_configs", "items")
    manifest |= {part: {**before.get(part, {}), **manifest[part]} for part in parts}
    timed = [item for group in manifest["items"].values() for item in group if "seconds" in item]
    manifest["forward_passes"] = sum(item["forward_passes"] / item["batch_rows"] for item in timed)
    manifest["seconds"] = sum(item["seconds"] for item in timed)
    return manifest


def _item(sample: dict[str, Any], costs: dict[str, dict]) -> dict[str, Any]:
    """One raw answer with its scores and cost."""
    scores = {name: sample[name] for name in sample["metrics"]}
    item = {name: sample[name] for name in ("doc_id", "doc_hash", "prompt_hash")} | {"answer": sample["resps"][0][0]}
    verdict = {"verdict": sample["filtered_resps"][0][0]} if sample["filter"] != "none" else {}
    return {**item, **scores, **verdict, **costs.get(sample["prompt_hash"], {})}


def _metadata(options: argparse.Namespace) -> dict[str, str]:
    return {"protocol": options.protocol, **({"data": options.data} if options.data else {})}


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
