"""HumanEval: complete a function from its docstring; scored by running the benchmark's `check`.

Local file: humaneval/HumanEval.jsonl. Hub: openai/openai_humaneval. HumanEval+, the same problems with more tests:
humaneval/HumanEvalPlus.jsonl in either form of plus.py; evalplus/humanevalplus.
"""

import functools
import re
from collections.abc import Sequence

from datasets import DatasetDict

from xdlm_hf.evaluation import opencompass
from xdlm_hf.evaluation.protocols import check_protocol, visible_text
from xdlm_hf.evaluation.rows import as_test_split, load_rows
from xdlm_hf.evaluation.sandbox import Job, require_consent
from xdlm_hf.evaluation.tasks import code, plus

process_results = code.process_results
STOPS = {"opencompass": (), "lenient": ()}
QUESTION = {"opencompass": "", "lenient": "Complete the following python code:\n"}
FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
FORMS = {"EvalPlus's own file": plus.RELEASE, "HumanEval": dict.fromkeys(FIELDS, str)}
# An unindented line after a function that does not end the program.
GOES_ON = re.compile(r"[\s@#)\]}]|(?:async +)?def |class |import |from |$")


def load(data: str | None = None, protocol: str = "opencompass", **_metadata) -> DatasetDict:
    """Reads the rows lm-eval asks for; `_metadata` is ignored.

    Raises:
        ValueError: If the rows cannot be read, one lacks a field, nobody has consented to running code, or the protocol
            is unknown.
    """
    hub = ("openai/openai_humaneval", None, "test")
    return as_test_split(_rows(data, "humaneval/HumanEval.jsonl", hub, protocol))


def load_plus(data: str | None = None, protocol: str = "opencompass", **_metadata) -> DatasetDict:
    """The same for HumanEval+, with a longer time limit."""
    hub = ("evalplus/humanevalplus", None, "test")
    rows = _rows(data, "humaneval/HumanEvalPlus.jsonl", hub, protocol)
    return as_test_split([{**row, "seconds": plus.SECONDS} for row in rows])


def _rows(data: str | None, inside: str, hub: tuple[str, str | None, str], protocol: str) -> list[dict]:
    check_protocol(protocol)
    require_consent()
    return load_rows(data, inside, hub, functools.partial(parse_row, protocol=protocol))


def parse_row(row: dict, where: str, protocol: str) -> dict:
    """One row of either form with its `context`; one of EvalPlus's own files gets a `test` that compares outputs.

    Raises:
        ValueError: If it has neither form, saying what it lacks.
    """
    release = plus.form_of(row, FORMS, where) == "EvalPlus's own file"
    if release:
        test = plus.release_test(row, "HumanEval", "candidate", where)
        row = {**row, "test": f"def check(candidate):\n    {test}\n"}
    fields = {name: row[name] for name in FIELDS}
    limit = {"seconds": plus.SECONDS} if release else {}
    return {**fields, "context": QUESTION[protocol] + row["prompt"], "protocol": protocol, **limit}


def program(doc: dict, answer: str) -> str:
    """The program of a raw answer under the row's protocol."""
    text = visible_text(answer, doc["protocol"], STOPS)
    if doc["protocol"] == "opencompass":
        return f"{doc['prompt']}{opencompass.humaneval_body(text)}\n"
    return lenient_program(doc, text)


def lenient_program(doc: dict, answer: str) -> str:
    """The program of an answer.

    An answer that defines the function is appended to the prompt, whose definition (a docstring alone) it replaces; it
    ends at the first unindented line that is not part of a definition. Any other answer is the body that continues the
    prompt, and ends at the first unindented line; a body without indentation is indented.
    """
    text = code.unfenced(answer)
    start = re.search(rf"^(?:async +)?def +{re.escape(doc['entry_point'])}\b", text, re.MULTILINE)
    lines = text.strip("\n").split("\n")
    if start:
        own = text[: start.start()].count("\n") - (len(text) - len(text.lstrip("\n")))
        end = next((i for i, line in enumerate(lines) if i > own and not GOES_ON.match(line)), len(lines))
        return f"{doc['prompt']}\n\n" + "\n".join(lines[:end]) + "\n"
    if lines[0][:1] not in (" ", "\t"):
        lines = [f"    {line}" for line in lines]
    end = next((i for i, line in enumerate(lines) if line.strip() and line[0] not in " \t"), len(lines))
    return doc["prompt"] + "\n".join(lines[:end]) + "\n"


def job(doc: dict, answer: str) -> Job:
    # The prompt is also the tests' preamble, because some tests use a helper that it defines.
    test = f"{doc['test']}\ncheck({doc['entry_point']})"
    return Job(program(doc, answer), [test], [doc["entry_point"]], preamble=doc["prompt"])


def execute(resps: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[str]]:
    return code.execute(resps, docs, job, opencompass.HUMANEVAL_SECONDS)
