"""BIG-Bench Hard: 27 subtasks of `{"input": ..., "target": ...}`, each with its own three worked examples.

Local files: bbh/tasks/NAME.json and bbh/cot-prompts/NAME.txt, as published with the benchmark. Hub: SaylorTwift/bbh,
with the worked examples from lm-eval's own task files. The protocols have the same prompts, and differ in where an
answer ends and in how its result is extracted.
"""

import functools
import json
import re
from pathlib import Path

import lm_eval.tasks
import yaml
from datasets import DatasetDict

from xdlm_hf.evaluation import opencompass
from xdlm_hf.evaluation.protocols import check_protocol, visible_text
from xdlm_hf.evaluation.rows import as_test_split, load_rows, local_path, read_text, require_texts

STOPS = {"opencompass": (), "lenient": ("\nQ:", "\n\n")}
OPENING = "Follow the given examples and answer the question.\n"
STOCK = Path(lm_eval.tasks.__file__).parent / "bbh" / "cot_fewshot"
LETTER = re.compile(r"\(([A-Z])\)")


def load(subtask: str, data: str | None = None, protocol: str = "opencompass", **_metadata) -> DatasetDict:
    """Reads one subtask with its prompts; `_metadata` is ignored.

    Raises:
        ValueError: If rows or examples cannot be read, a row lacks input or target, or the protocol is unknown.
    """
    check_protocol(protocol)
    examples = local_path(data, f"bbh/cot-prompts/{subtask}.txt")
    shots = stock_shots(subtask) if examples is None else read_shots(examples)

    def parse_row(row: dict, where: str) -> dict[str, str]:
        require_texts(row, ("input", "target"), where)
        question = f"Q: {row['input']}\nA: Let's think step by step."
        return {
            "prompt": f"{OPENING}{shots}\n\n{question}",
            "target": row["target"],
            "subtask": subtask,
            "protocol": protocol,
        }

    rows = load_rows(data, f"bbh/tasks/{subtask}.json", ("SaylorTwift/bbh", subtask, "test"), parse_row, read_examples)
    return as_test_split(rows)


def read_examples(path: Path) -> list[tuple[str, dict]]:
    """(where, row) of a file `{"examples": [...]}`."""
    text = read_text(path)
    try:
        examples = json.loads(text)["examples"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: needs an object with 'examples' ({type(error).__name__}: {error})") from error
    return [(f"{path}, example {n}", row if isinstance(row, dict) else {}) for n, row in enumerate(examples)]


def read_shots(path: Path) -> str:
    """The worked examples of a published prompt file, without its canary line."""
    if not path.is_file():
        raise ValueError(f"no such file: {path} (set by --metadata data=PATH or XDLM_DATA, which must name a folder)")
    return read_text(path).split("-----\n", 1)[-1].strip()


@functools.cache
def stock_shots(subtask: str) -> str:
    """The same from lm-eval's task file, which differs in the line breaks of sports_understanding."""
    task = yaml.safe_load((STOCK / f"{subtask}.yaml").read_text(encoding="utf-8"))
    samples = task["fewshot_config"]["samples"]
    shots = (f"Q: {shot['input']}\nA: Let's think step by step.\n{shot['target']}" for shot in samples)
    text = (task["description"] + "\n\n".join(shots)).strip()
    return text.replace("step by step.\n", "step by step. ") if subtask == "sports_understanding" else text


def final_answer(text: str, letter: bool) -> str:
    """The result after the first "answer is ": a letter in brackets, or the rest of the line without its full stop.

    Of an answer without these words, the last letter in brackets, or the first line.
    """
    before, found, after = text.partition("answer is ")
    if letter:
        letters = LETTER.findall(after) if found else LETTER.findall(before)[-1:]
        return f"({letters[0]})" if letters else after.strip().rstrip(".")
    line = (after if found else before).strip().partition("\n")[0].strip()
    bold = re.search(r"\*\*(.*?)\*\*", line)
    return bold[1] if bold else line.removesuffix(".").strip()


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 when the final answer is the target, else 0.0."""
    text, target = visible_text(results[0], doc["protocol"], STOPS), doc["target"]
    if doc["protocol"] == "lenient":
        right = final_answer(text, bool(LETTER.fullmatch(target))) == target
    elif doc["subtask"] in opencompass.BBH_FREE_FORM:
        right = opencompass.bbh_free_form(text) == target
    else:
        right = opencompass.bbh_choice(text) == opencompass.bbh_choice(target)
    return {"exact_match": float(right)}
