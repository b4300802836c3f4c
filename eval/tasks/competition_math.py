"""MATH: rows `{"problem": ..., "solution": "... \\boxed{42} ..."}`, scored on the boxed or final answer.

Local files: math/test.jsonl and math/math500_test.jsonl. Hub: EleutherAI/hendrycks_math (seven configurations) and
HuggingFaceH4/MATH-500. Under `opencompass` the shots are Minerva's four as OpenCompass has them (every brace doubled,
some line breaks lost) and math-verify compares. Under `lenient` shots and normalisation are Minerva's and sympy
compares. Both comparisons run in a process with a time limit (equality.py).
"""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

from datasets import DatasetDict

try:
    from lm_eval.tasks.minerva_math import utils as minerva
except ModuleNotFoundError as error:
    raise ValueError(f"xdlm_math: {error}; install the extra: pip install 'xdlm_hf[eval]'") from error

from xdlm_hf.evaluation.equality import equivalent, verified
from xdlm_hf.evaluation.protocols import check_protocol, visible_text
from xdlm_hf.evaluation.rows import as_test_split, load_rows, local_path, require_texts

HUB = "EleutherAI/hendrycks_math"
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
STOPS = {"opencompass": ("Problem:",), "lenient": ("Problem:",)}
SENTENCE = re.compile(r"final answer is(.*?)(?:\. I hope it is correct|\.?\s*(?:\n|$))", re.IGNORECASE | re.DOTALL)
# In characters. Minerva's normalisation takes time quadratic in the length; the longest gold answer of MATH has 81.
MAX_ANSWER = 2000


def load(data: str | None = None, protocol: str = "opencompass", **_metadata) -> DatasetDict:
    """Reads the rows lm-eval asks for; `_metadata` is ignored.

    Raises:
        ValueError: If the rows cannot be read, one lacks a problem or a boxed answer, or the protocol is unknown.
    """
    inside, parse = "math/test.jsonl", row_parser(protocol)
    if local_path(data, inside) is not None:
        return as_test_split(load_rows(data, inside, (HUB, None, "test"), parse))
    return as_test_split([row for s in SUBJECTS for row in load_rows(data, inside, (HUB, s, "test"), parse)])


def load_500(data: str | None = None, protocol: str = "opencompass", **_metadata) -> DatasetDict:
    """The same for MATH-500."""
    hub = ("HuggingFaceH4/MATH-500", None, "test")
    return as_test_split(load_rows(data, "math/math500_test.jsonl", hub, row_parser(protocol)))


def row_parser(protocol: str) -> Callable[[dict, str], dict[str, str]]:
    """`parse_row` with the protocol's prompt."""
    check_protocol(protocol)

    def with_prompt(row: dict, where: str) -> dict[str, str]:
        parsed = parse_row(row, where)
        return {**parsed, "context": prompt(parsed["problem"], protocol), "protocol": protocol}

    return with_prompt


def prompt(problem: str, protocol: str) -> str:
    """Four solved problems and this one; OpenCompass's prompt ends with a line break, Minerva's does not."""
    if protocol == "opencompass":
        return "\n".join([*opencompass_shots(), f"Problem:\n{problem}\nSolution:\n"])
    solved = [f"Problem:\n{shot['problem']}\nSolution:\n{shot['solution']}" for shot in minerva.list_fewshot_samples()]
    return "\n\n".join([*solved, f"Problem:\n{problem}\nSolution:"])


@functools.cache
def opencompass_shots() -> list[str]:
    """OpenCompass's rounds: problem, solution, problem, ..."""
    prompts = Path(__file__).with_name("opencompass_prompts.json").read_text(encoding="utf-8")
    return json.loads(prompts)["math"]


def parse_row(row: dict, where: str) -> dict[str, str]:
    """`problem`, `solution` and its boxed `answer`; `where` begins the message of the ValueError if it has none."""
    require_texts(row, ("problem", "solution"), where)
    answer = last_boxed(row["solution"])
    if answer is None:
        raise ValueError(f"{where}: the solution must hold its answer in \\boxed{{}}, got {row['solution'][-80:]!r}")
    return {"problem": row["problem"], "solution": row["solution"], "answer": answer}


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed`, or without one of the last `\fbox`; None if there is no closed box.

    MATH's rule: in braces up to the closing one; without braces (`\boxed 5`) up to the next dollar sign, or, if none
    follows on the line, up to the first blank outside of brackets.
    """
    for command in ("\\boxed", "\\fbox"):
        _, found, rest = text.rpartition(command)
        if found:
            return _braced(rest) if rest.lstrip().startswith("{") else _unbraced(rest.lstrip(" "))
    return None


def _braced(text: str) -> str | None:
    depth = 0
    for match in re.finditer(r"[{}]", text):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[text.index("{") + 1 : match.start()]
    return None


def _unbraced(text: str) -> str | None:
    line = text.partition("\n")[0]
    before, dollar, _ = line.partition("$")
    if dollar:
        return before.strip() or None
    depth = 0
    for place, character in enumerate(line):
        depth += (character in "([{") - (character in ")]}")
        if character.isspace() and depth <= 0:
            return line[:place] or None
    return line or None


def normalize(answer: str) -> str:
    r"""Minerva's normalisation, which does not handle `.5`, units in `\mathrm` and blanks in matrices, after these."""
    answer = re.sub(r"(?<![\d.])\.(?=\d)", "0.", answer)
    answer = re.sub(r"\\mathrm\{(?!th\})[\s~]*", r"\\text{", answer).replace("~", " ").replace("\\,", " ")
    # Before Minerva's rules, which read the backslash and blank of "\\ 3" as LaTeX's command for a blank.
    answer = re.sub(r"\s+", " ", answer).replace("\\\\ ", "\\\\").replace(" \\\\", "\\\\")
    return minerva.normalize_final_answer(answer)


def final_answer(text: str) -> str | None:
    """The last box of an answer, else the rest of its sentence "The final answer is ...", normalised; else None."""
    answer = last_boxed(text)
    if answer is None:
        sentence = SENTENCE.search(text)
        answer = sentence and sentence[1].strip()
    return None if answer is None or len(answer) > MAX_ANSWER else normalize(answer)


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 when the final answer is the row's by the protocol's comparison, else 0.0."""
    text = visible_text(results[0], doc["protocol"], STOPS)
    if doc["protocol"] == "opencompass":
        return {"exact_match": float(verified(text, doc["answer"]))}
    answer = final_answer(text)
    return {"exact_match": float(bool(answer) and equivalent(answer, normalize(doc["answer"])))}
