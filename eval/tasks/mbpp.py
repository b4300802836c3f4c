"""MBPP: write a function that passes three assertions; scored by running them.

Local file: mbpp/mbpp.jsonl, of which the test split (task_id 11 to 510) is used. Hub: google-research-datasets/mbpp.
The protocols have the same prompts and extract programs differently; `opencompass` does not run `test_setup_code`.
MBPP+, 378 of the problems with more tests: mbpp/MbppPlus.jsonl in either form of plus.py; evalplus/mbppplus.
"""

import ast
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import DatasetDict

from xdlm_hf.evaluation import opencompass
from xdlm_hf.evaluation.judge import top_level_names
from xdlm_hf.evaluation.protocols import check_protocol, visible_text
from xdlm_hf.evaluation.rows import as_test_split, load_rows
from xdlm_hf.evaluation.sandbox import Job, require_consent
from xdlm_hf.evaluation.tasks import code, plus

process_results = code.process_results
STOPS = {"opencompass": ("[DONE]",), "lenient": ("[DONE]",)}
TEST_IDS = range(11, 511)
FORMS = {
    "EvalPlus's own file": plus.RELEASE,
    "evalplus/mbppplus": dict.fromkeys(("prompt", "code", "test"), str),
    "MBPP": dict.fromkeys(("text", "code"), str),
}


def load(data: str | None = None, protocol: str = "opencompass", **_metadata) -> DatasetDict:
    """Reads the rows lm-eval asks for; `_metadata` is ignored.

    Raises:
        ValueError: If the rows cannot be read, one lacks a field, nobody has consented to running code, or the protocol
            is unknown.
    """
    return _load(data, "mbpp/mbpp.jsonl", ("google-research-datasets/mbpp", "full", "test"), protocol)


def load_plus(data: str | None = None, protocol: str = "opencompass", **_metadata) -> DatasetDict:
    """The same for MBPP+, with all rows."""
    return _load(data, "mbpp/MbppPlus.jsonl", ("evalplus/mbppplus", None, "test"), protocol)


def _load(data: str | None, inside: str, hub: tuple[str, str | None, str], protocol: str) -> DatasetDict:
    check_protocol(protocol)
    require_consent()
    rows = load_rows(data, inside, hub, functools.partial(parse_row, protocol=protocol))
    rows = [row for row in rows if "seconds" in row or row["task_id"] in TEST_IDS]
    if not rows:
        raise ValueError(f"mbpp: no rows with task_id {TEST_IDS[0]} to {TEST_IDS[-1]}, the test split")
    return as_test_split(rows)


def parse_row(row: dict, where: str, protocol: str = "opencompass") -> dict:
    """One row of any form with its `prompt`, and the `names` that its tests use and its solution defines.

    Rows of MBPP+ have a time limit of their own, `seconds`.

    Raises:
        ValueError: If it has no known form, naming what it lacks, or its code or tests are not Python.
    """
    form = plus.form_of(row, FORMS, where)
    if form == "EvalPlus's own file":
        return parse_release(row, where, protocol)
    shown = row.get("test_list")
    if not isinstance(row.get("task_id"), int) or not shown or not all(isinstance(test, str) for test in shown):
        raise ValueError(f"{where}: needs a number 'task_id' and a list of texts 'test_list'")
    imports = row.get("test_imports") or []
    if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
        raise ValueError(f"{where}: 'test_imports' must be a list of texts, got {imports!r}")
    if form == "MBPP":
        setup, tests, limit = row.get("test_setup_code") or "", shown, {}
    else:
        setup, tests, limit = "\n".join(imports), [row["test"]], {"seconds": plus.SECONDS}
    try:
        used = {n.id for test in (setup, *tests) for n in ast.walk(ast.parse(test)) if isinstance(n, ast.Name)}
        own = top_level_names("\n".join(tests))  # helpers of the tests, which the solution may define too
        names = sorted(used & top_level_names(row["code"]) - own)
    except SyntaxError as error:
        raise ValueError(f"{where}: 'code' or tests are not Python ({error})") from error
    return {
        "task_id": row["task_id"],
        "prompt": prompt(row.get("text") if form == "MBPP" else row["prompt"], shown),
        "code": row["code"],
        "names": names,
        "tests": [setup if protocol == "lenient" or limit else "", *tests],
        "protocol": protocol,
        **limit,
    }


def parse_release(row: dict, where: str, protocol: str) -> dict:
    """A row of EvalPlus's own file, whose prompt is a docstring: the task, then an assertion."""
    own_test = plus.release_test(row, "Mbpp", row["entry_point"], where)
    text, found, test = row["prompt"].strip().strip('"').strip().partition("\nassert ")
    return {
        "task_id": int(row["task_id"].partition("/")[2]),
        "prompt": prompt(text, [f"assert {test}"] if found else []),
        "code": row["canonical_solution"],
        "names": [row["entry_point"]],
        "tests": ["", own_test],
        "protocol": protocol,
        "seconds": plus.SECONDS,
    }


def prompt(text: str, tests: Sequence[str]) -> str:
    """OpenCompass's prompt, blanks included: three tasks with solutions, then this one."""
    parts = [part for shot in shots() for part in (shot["task"], shot["solution"])]
    task = f"You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:"
    return "\n".join([*parts, f"{task}\n\n " + "\n".join(tests) + "  \n", "[BEGIN]\n"])


@functools.cache
def shots() -> list[dict[str, str]]:
    prompts = Path(__file__).with_name("opencompass_prompts.json").read_text(encoding="utf-8")
    return json.loads(prompts)["mbpp"]


def program(doc: dict, answer: str) -> str:
    """The program in a raw answer under the row's protocol."""
    text = visible_text(answer, doc["protocol"], STOPS)
    return opencompass.mbpp_program(text) if doc["protocol"] == "opencompass" else lenient_program(text)


def lenient_program(answer: str) -> str:
    """The program in an answer: between [BEGIN] and [DONE] where they stand, without fences or quotes around it."""
    text = answer.partition("[BEGIN]")[2] if "[BEGIN]" in answer else answer
    text = re.split(r"\[?DONE\]?", text)[0]
    text = code.unfenced(text).strip().replace("\\_", "_")
    return text.removeprefix("'").removesuffix("'").strip("\n") if text.startswith("'") else text


def job(doc: dict, answer: str) -> Job:
    return Job(program(doc, answer), doc["tests"], doc["names"])


def execute(resps: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[str]]:
    return code.execute(resps, docs, job, opencompass.MBPP_SECONDS)
