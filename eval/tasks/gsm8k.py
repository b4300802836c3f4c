"""GSM8K's layout, read from local files and scored on the final number.

A row is `{"question": ..., "answer": "reasoning ... #### 42"}`. One setting says where the rows are: `--metadata
data=PATH`, or the environment variable XDLM_DATA. PATH is a JSONL file, or a folder holding `gsm8k/test.jsonl` and,
if shots are wanted, `gsm8k/train.jsonl`.
"""

import json
import os
import re
from decimal import Decimal
from pathlib import Path

from datasets import Dataset, DatasetDict

MARKER = "####"
# A minus directly after a digit is a subtraction, not a sign: "12-5" holds 12 and 5.
NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


def load(data: str | None = None, **_metadata) -> DatasetDict:
    """Reads the rows lm-eval asks for; `_metadata` is whatever else the run was given.

    Raises:
        ValueError: If no path is set, a file is missing or empty, or a row lacks a question or a final number.
    """
    setting = data or os.environ.get("XDLM_DATA")
    if not setting:
        raise ValueError(
            "xdlm_gsm8k reads local files and none are set: pass --metadata data=PATH or set XDLM_DATA, PATH "
            "being a JSONL file or a folder with gsm8k/test.jsonl"
        )
    path = Path(setting).expanduser()
    if path.is_dir():
        test, train = path / "gsm8k" / "test.jsonl", path / "gsm8k" / "train.jsonl"
    else:
        test, train = path, None
    shots = read_rows(train) if train is not None and train.is_file() else []
    return DatasetDict(test=Dataset.from_list(read_rows(test)), train=Dataset.from_list(shots))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a JSONL file, each checked, with the fields `question` and `answer` and no others."""
    if not path.is_file():
        raise ValueError(f"no such file: {path} (set by --metadata data=PATH or XDLM_DATA)")
    with path.open(encoding="utf-8") as lines:
        rows = [parse_row(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def parse_row(line: str, where: str) -> dict[str, str]:
    """One row; `where` opens the message of the ValueError raised when it is not one."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        raise ValueError(f"{where}: needs the texts 'question' and 'answer', got {line[:80]!r}")
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
