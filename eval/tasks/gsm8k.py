"""GSM8K: rows `{"question": ..., "answer": "reasoning ... #### 42"}`, scored on the final number.

Local file: gsm8k/test.jsonl. Hub: openai/gsm8k. The protocols have the same prompts, and differ in where an answer ends
and in which number is extracted.
"""

import json
import re
from decimal import Decimal
from pathlib import Path

from datasets import DatasetDict

from xdlm_hf.evaluation import opencompass
from xdlm_hf.evaluation.protocols import check_protocol, visible_text
from xdlm_hf.evaluation.rows import as_test_split, load_rows, require_texts

STOPS = {"opencompass": (), "lenient": ("Question:",)}
MARKER = "####"
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
# A minus directly after a digit is a subtraction, not a sign: "12-5" holds 12 and 5. A fraction is one number.
NUMBER = re.compile(rf"((?:(?<!\d)-)?\$?{_UNSIGNED})(?: ?/ ?(\$?{_UNSIGNED}))?")


def load(data: str | None = None, protocol: str = "opencompass", **_metadata) -> DatasetDict:
    """Reads the rows lm-eval asks for; `_metadata` is ignored.

    Raises:
        ValueError: If the rows cannot be read, one lacks a question or a final number, or the protocol is unknown.
    """
    check_protocol(protocol)

    def with_protocol(row: dict, where: str) -> dict[str, str]:
        return {**parse_row(row, where), "protocol": protocol}

    return as_test_split(load_rows(data, "gsm8k/test.jsonl", ("openai/gsm8k", "main", "test"), with_protocol))


def shots() -> list[dict[str, str]]:
    """The four worked examples before every question."""
    prompts = Path(__file__).with_name("opencompass_prompts.json").read_text(encoding="utf-8")
    return json.loads(prompts)["gsm8k"]


def parse_row(row: dict, where: str) -> dict[str, str]:
    """`question` and `answer` of one row; `where` begins the message of the ValueError if it has none."""
    require_texts(row, ("question", "answer"), where)
    if final_number(row["answer"].partition(MARKER)[2]) is None:
        raise ValueError(f"{where}: the answer must end in '{MARKER} <number>', got {row['answer'][-80:]!r}")
    return {"question": row["question"], "answer": row["answer"]}


def final_number(text: str) -> Decimal | None:
    """The number after the first `####`, else the last number of the text's first paragraph, else None.

    Commas and `$` are dropped, and values compared: `$1,000.00` equals `1000`, and `1/2` is a half. Later paragraphs
    are left out because a base model continues with another question.
    """
    marked = NUMBER.search(text, text.find(MARKER)) if MARKER in text else None
    first_paragraph = text.strip().split("\n\n")[0]
    numbers = [marked.groups()] if marked else NUMBER.findall(first_paragraph)
    if not numbers:
        return None
    try:
        numerator, denominator = (Decimal(re.sub(r"[,$]", "", part or "1")) for part in numbers[-1])
        return numerator / denominator if denominator != 1 else numerator
    except ArithmeticError:  # division by 0, or overflow of a Decimal
        return None


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 when the answer's final number equals the row's, else 0.0."""
    text = visible_text(results[0], doc["protocol"], STOPS)
    if doc["protocol"] == "opencompass":
        right = opencompass.gsm8k_equal(opencompass.gsm8k_number(text), opencompass.gsm8k_gold(doc["answer"]))
    else:
        right = final_number(text) == final_number(doc["answer"])
    return {"exact_match": float(right)}
