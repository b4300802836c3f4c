"""Scores stored answers by another protocol, without a model:

    python -m eval.rescore outputs/table16 --protocol lenient --confirm_run_unsafe_code
    python -m eval.rescore scores --protocol lenient      # the --output_path of xdlm-eval --log_samples

Extraction, comparison and MBPP's setup code are those of the new protocol; the prompts remain those of the run, which
for MATH and HumanEval differ. Rows must be those of the run (the same `--data`). Each folder of answers gets a file
rescored_PROTOCOL.json with scores and items.
"""

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, hash_string

from xdlm_hf.evaluation import TASKS
from xdlm_hf.evaluation.protocols import PROTOCOLS
from xdlm_hf.evaluation.table16 import write


@dataclass
class Recording:
    """Raw answers of one folder, by task and number of the row, and the hashes of their rows."""

    source: Path
    protocol: str
    answers: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    doc_hashes: dict[str, dict[int, str]] = field(default_factory=dict)

    def add(self, task: str, doc_id: int, answers: list[str], doc_hash: str) -> None:
        self.answers.setdefault(task, {})[doc_id] = answers
        self.doc_hashes.setdefault(task, {})[doc_id] = doc_hash


class RecordedModel(LM):
    """Answers requests with the recorded answers; repetitions of a request get its answers in order."""

    def __init__(self, recording: Recording):
        super().__init__()
        self.answers = recording.answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        seen: Counter[tuple[str, int]] = Counter()
        texts = []
        for request in requests:
            place = (request.task_name, request.doc_id)
            texts.append(self.answers[request.task_name][request.doc_id][seen[place]])
            seen[place] += 1
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise ValueError("rescore has no likelihoods: choose tasks with output_type generate_until")

    loglikelihood_rolling = loglikelihood


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of eval.table16, one of its cells, or of xdlm-eval --log_samples")
    parser.add_argument("--protocol", required=True, choices=PROTOCOLS)
    parser.add_argument("--data", default=os.environ.get("XDLM_DATA"), help="folder of local files instead of the Hub")
    parser.add_argument("--confirm_run_unsafe_code", action="store_true", help="for humaneval and mbpp, see the docs")
    options = parser.parse_args(arguments)
    try:
        for recording in recordings(options.folder):
            check_rows(recording, options.data)
            rescored = rescore(recording, options.protocol, options.data, options.confirm_run_unsafe_code)
            write(recording.source / f"rescored_{options.protocol}.json", rescored)
            print(table(recording.source, rescored))
    except ValueError as error:
        raise SystemExit(f"rescore: {error}") from error


def recordings(folder: Path) -> list[Recording]:
    """The recordings in a folder.

    Raises:
        ValueError: If there are none, or they are not of raw answers.
    """
    manifests = sorted(folder.glob("manifest.json")) + sorted(folder.glob("*/manifest.json"))
    found = [of_manifest(path) for path in manifests]
    logs: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("samples_*.jsonl")):
        logs.setdefault(path.parent, []).append(path)
    found += [of_samples(parent, paths) for parent, paths in logs.items()]
    if not found:
        raise ValueError(f"{folder} holds no answers: neither manifest.json of eval.table16 nor samples_*.jsonl")
    return found


def of_manifest(path: Path) -> Recording:
    """Answers of one cell of eval.table16."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if "protocol" not in manifest:
        raise ValueError(f"{path} holds no raw answers, because an earlier version cut them: run it again")
    recording = Recording(path.parent, manifest["protocol"])
    for task, items in manifest["items"].items():
        for item in items:
            recording.add(task, item["doc_id"], [item["answer"]], item["doc_hash"])
    return recording


def of_samples(folder: Path, paths: list[Path]) -> Recording:
    """Answers of one run with --log_samples; of several runs of a task, the last one's."""
    recording = Recording(folder, "")
    for path in paths:  # sorted by task and time
        task = re.sub(r"_\d{4}-\d\d-\d\dT.*", "", path.stem.removeprefix("samples_"))
        recording.answers.pop(task, None)
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            asked = sample["arguments"]["gen_args_0"].get("arg_1")
            if not isinstance(asked, dict) or asked.get("until") != [] or asked.get("eos_token_id") != []:
                raise ValueError(f"{path} holds no raw answers, because its task cut them: run it again")
            recording.protocol = sample["doc"].get("protocol", "")
            recording.add(task, sample["doc_id"], sample["resps"][0], sample["doc_hash"])
    return recording


def check_rows(recording: Recording, data: str | None) -> None:
    """Refuses rows other than those that were answered.

    Raises:
        ValueError: Naming the first row that differs.
    """
    tasks = manager(recording.protocol, data).load(list(recording.answers))["tasks"]
    for name, hashes in recording.doc_hashes.items():
        docs = list(tasks[name].test_docs())
        for doc_id, expected in hashes.items():
            if doc_id >= len(docs) or doc_hash(docs[doc_id]) != expected:
                raise ValueError(
                    f"row {doc_id} of {name} differs from the one answered in {recording.source}: pass the same --data"
                )


def doc_hash(doc: dict[str, Any]) -> str:
    """Hash of a row, as lm-eval computes it for its samples."""
    return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))


def manager(protocol: str, data: str | None) -> TaskManager:
    metadata = {"protocol": protocol, **({"data": data} if data else {})}
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)


def rescore(recording: Recording, protocol: str, data: str | None, confirmed: bool) -> dict[str, Any]:
    """Scores and items under `protocol`, by lm-eval itself."""
    rescored: dict[str, Any] = {
        "protocol": protocol,
        "generated_with_protocol": recording.protocol,
        "scores": {},
        "groups": {},
        "items": {},
    }
    for names, limit in evaluations(recording):
        results = lm_eval.simple_evaluate(
            RecordedModel(recording),
            tasks=names,
            task_manager=manager(protocol, data),
            limit=limit,
            confirm_run_unsafe_code=confirmed,
        )
        rescored["scores"] |= results["results"]
        rescored["groups"] |= results.get("groups", {})
        for task, samples in results["samples"].items():
            rescored["items"][task] = [
                {"doc_id": sample["doc_id"], **{name: sample[name] for name in sample["metrics"]}} for sample in samples
            ]
    return rescored


def evaluations(recording: Recording) -> Iterator[tuple[list[str], int]]:
    """(tasks, number of first rows) to score together: BBH as a group if all of its subtasks were answered.

    Raises:
        ValueError: If other rows than the first ones were answered.
    """
    counts = {task: len(answers) for task, answers in recording.answers.items()}
    for task, answers in recording.answers.items():
        if set(answers) != set(range(counts[task])):
            raise ValueError(f"{recording.source}: {task} must hold answers to its first rows without gaps")
    subtasks = {path.stem for path in TASKS.glob("xdlm_bbh_*.yaml")}
    if subtasks <= counts.keys():
        yield ["xdlm_bbh"], max(counts.pop(task) for task in sorted(subtasks))
    yield from (([task], count) for task, count in counts.items())


def table(source: Path, rescored: dict[str, Any]) -> str:
    """Scores as Markdown."""
    lines = [
        f"{source}: generated with protocol={rescored['generated_with_protocol']}, "
        f"scored with protocol={rescored['protocol']}",
        "",
        "| task | rows | metric | score |",
        "| --- | ---: | --- | ---: |",
    ]
    for task, scores in sorted((rescored["scores"] | rescored["groups"]).items()):
        rows = len(rescored["items"].get(task, [])) or "group"
        for name, value in scores.items():
            if isinstance(value, float) and "stderr" not in name and "," in name:
                lines.append(f"| {task} | {rows} | {name.partition(',')[0]} | {value:.4f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
