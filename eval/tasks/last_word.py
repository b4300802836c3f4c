"""LAMBADA: rows `{"text": ...}`, whose last word is to be found.

Local file: text/lambada_openai_test.jsonl. Hub: EleutherAI/lambada_openai.
"""

import json
from string import punctuation

from datasets import DatasetDict

from xdlm_hf.evaluation.rows import as_test_split, load_rows


def load(data: str | None = None, **_metadata) -> DatasetDict:
    """Reads the rows lm-eval asks for, split before the last space; `_metadata` is ignored.

    Raises:
        ValueError: If the rows cannot be read, or one has no text of two words.
    """
    hub = ("EleutherAI/lambada_openai", "default", "test")
    return as_test_split(load_rows(data, "text/lambada_openai_test.jsonl", hub, parse_row))


def parse_row(row: dict, where: str) -> dict[str, str]:
    """`context` and `word` of one row; `where` begins the message of the ValueError if it has none."""
    context, _, word = str(row.get("text", "")).rstrip().rpartition(" ")
    if not context or not bare(word):
        raise ValueError(f"{where}: needs a 'text' of two words or more, got {json.dumps(row)[:80]}")
    return {"context": context, "word": word}


def bare(word: str) -> str:
    return word.strip(punctuation)


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 when the first word of the answer is the row's, punctuation around either left out, else 0.0."""
    words = results[0].split()
    return {"exact_match": float(bool(words) and bare(words[0]) == bare(doc["word"]))}
