"""MATH: rows `{"problem": ..., "solution": "... \\boxed{42} ..."}`, scored on the boxed or final answer.

Local files: math/test.jsonl and math/math500_test.jsonl. Hub: EleutherAI/hendrycks_math (seven configurations) and
HuggingFaceH4/MATH-500. Normalisation and symbolic equality are lm-eval's own (Minerva's), the latter in a process that
can be stopped.
"""

import re

from datasets import DatasetDict

try:
    from lm_eval.tasks.minerva_math import utils as minerva
except ModuleNotFoundError as error:
    raise ValueError(f"xdlm_math: {error}; install the extra: pip install 'xdlm_hf[eval]'") from error

from xdlm_hf.evaluation.equality import equivalent
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
SENTENCE = re.compile(r"final answer is(.*?)(?:\. I hope it is correct|\.?\s*(?:\n|$))", re.IGNORECASE | re.DOTALL)


def load(data: str | None = None, **_metadata) -> DatasetDict:
    """Reads the rows lm-eval asks for; `_metadata` is whatever else the run was given.

    Raises:
        ValueError: If the rows cannot be read, or one lacks a problem or a boxed answer.
    """
    inside = "math/test.jsonl"
    if local_path(data, inside) is not None:
        return as_test_split(load_rows(data, inside, (HUB, None, "test"), parse_row))
    return as_test_split([row for s in SUBJECTS for row in load_rows(data, inside, (HUB, s, "test"), parse_row)])


def load_500(data: str | None = None, **_metadata) -> DatasetDict:
    """The same for MATH-500."""
    hub = ("HuggingFaceH4/MATH-500", None, "test")
    return as_test_split(load_rows(data, "math/math500_test.jsonl", hub, parse_row))


def shots() -> list[dict]:
    """Minerva's four examples."""
    return minerva.list_fewshot_samples()


def parse_row(row: dict, where: str) -> dict[str, str]:
    """`problem`, `solution` and normalised `answer`; `where` opens the message of the ValueError for a row without."""
    require_texts(row, ("problem", "solution"), where)
    boxed = minerva.last_boxed_only_string(row["solution"])
    if boxed is None:
        raise ValueError(f"{where}: the solution must hold its answer in \\boxed{{}}, got {row['solution'][-80:]!r}")
    answer = minerva.normalize_final_answer(minerva.remove_boxed(boxed))
    return {"problem": row["problem"], "solution": row["solution"], "answer": answer}


def final_answer(text: str) -> str | None:
    """The last box of an answer, else what its sentence "The final answer is ..." names, normalised; else None."""
    boxed = minerva.last_boxed_only_string(text)
    if boxed is not None:
        return minerva.normalize_final_answer(minerva.remove_boxed(boxed))
    sentence = SENTENCE.search(text)
    return minerva.normalize_final_answer(sentence[1].strip()) if sentence else None


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 when the final answer is the row's, as text or by symbolic comparison, else 0.0."""
    answer = final_answer(results[0])
    return {"exact_match": float(bool(answer) and equivalent(answer, doc["answer"]))}
