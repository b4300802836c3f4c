"""GSM8K's layout, read from local files and scored on the final number.

A row is `{"question": ..., "answer": "reasoning ... #### 42"}`. One setting says where the rows are: `--metadata
data=PATH`, or the environment variable XDLM_DATA. PATH is a JSONL file, or a folder holding `gsm8k/test.jsonl` and,
if shots are wanted, `gsm8k/train.jsonl`.
"""

import json
import re
from decimal import Decimal

from datasets import Dataset, DatasetDict

from xdlm_hf.evaluation.rows import read_rows, task_file

MARKER = "####"
# A minus directly after a digit is a subtraction, not a sign: "12-5" holds 12 and 5.
NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


def load(data: str | None = None, **_metadata) -> DatasetDict:
    """Reads the rows lm-eval asks for; `_metadata` is whatever else the run was given.

    Raises:
        ValueError: If no path is set, a file is missing or empty, or a row lacks a question or a final number.
    """
    test = task_file("xdlm_gsm8k", data, "gsm8k/test.jsonl")
    train = test.with_name("train.jsonl")
    in_folder = test.name == "test.jsonl" and train.is_file()
    shots = read_rows(train, parse_row) if in_folder else []
    return DatasetDict(test=Dataset.from_list(read_rows(test, parse_row)), train=Dataset.from_list(shots))


def parse_row(row: dict, where: str) -> dict[str, str]:
    """`question` and `answer` of one row; `where` opens the message of the ValueError raised when it has none."""
    if not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        raise ValueError(f"{where}: needs the texts 'question' and 'answer', got {json.dumps(row)[:80]}")
    if final_number(row["answer"].partition(MARKER)[2]) is None:
        raise ValueError(f"{where}: the answer must end in '{MARKER} <number>', got {row['answer'][-80:]!r}")
    return {"question": row["question"], "answer": row["answer"]}


def final_number(text: str) -> Decimal | None:
    """The number after the first `####`, else the last number of the text, else None.

    Commas and `$` are dropped, and the value is compared, so `$1,000.00` equals `1000`.
    """
    marked = NUMBER.search(text, text.find(MARKER)) if MARKER in text else None
    numbers = [marked.group()] if marked else NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("$", "")) if numbers else None


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 when the answer's final number equals the row's, else 0.0."""
    return {"exact_match": float(final_number(results[0]) == final_number(doc["answer"]))}
