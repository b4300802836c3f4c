"""GSM8K: rows `{"question": ..., "answer": "reasoning ... #### 42"}`, scored on the final number.

Local file: gsm8k/test.jsonl. Hub: openai/gsm8k.
"""

import json
import re
from decimal import Decimal
from pathlib import Path

from datasets import DatasetDict

from xdlm_hf.evaluation.rows import as_test_split, load_rows, require_texts

MARKER = "####"
# A minus directly after a digit is a subtraction, not a sign: "12-5" holds 12 and 5.
NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


def load(data: str | None = None, **_metadata) -> DatasetDict:
    """Reads the rows lm-eval asks for; `_metadata` is whatever else the run was given.

    Raises:
        ValueError: If the rows cannot be read, or one lacks a question or a final number.
    """
    return as_test_split(load_rows(data, "gsm8k/test.jsonl", ("openai/gsm8k", "main", "test"), parse_row))


def shots() -> list[dict[str, str]]:
    """The four worked examples before every question."""
    prompts = Path(__file__).with_name("opencompass_prompts.json").read_text(encoding="utf-8")
    return json.loads(prompts)["gsm8k"]


def parse_row(row: dict, where: str) -> dict[str, str]:
    """`question` and `answer` of one row; `where` opens the message of the ValueError raised when it has none."""
    require_texts(row, ("question", "answer"), where)
    if final_number(row["answer"].partition(MARKER)[2]) is None:
        raise ValueError(f"{where}: the answer must end in '{MARKER} <number>', got {row['answer'][-80:]!r}")
    return {"question": row["question"], "answer": row["answer"]}


def final_number(text: str) -> Decimal | None:
    """The number after the first `####`, else the last number of the text's first paragraph, else None.

    Commas and `$` are dropped, and the value is compared, so `$1,000.00` equals `1000`. What follows a blank line is
    left out because a base model goes on with another question.
    """
    marked = NUMBER.search(text, text.find(MARKER)) if MARKER in text else None
    first_paragraph = text.strip().split("\n\n")[0]
    numbers = [marked.group()] if marked else NUMBER.findall(first_paragraph)
    return Decimal(numbers[-1].replace(",", "").replace("$", "")) if numbers else None


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 when the answer's final number equals the row's, else 0.0."""
    return {"exact_match": float(final_number(results[0]) == final_number(doc["answer"]))}
