"""A task whose answers anyone can check: the alphabet, onwards or backwards, from any letter.

    k>w>z>r>b>e>:ijklmnopqrstuvwxyzabcdefghijklmn      ">" after six random letters: 32 letters of the alphabet
    t<b<q<v<d<y<:srqponmlkjihgfedcbazyxwvutsrqpon      "<": backwards

Any of the 26 letters may come first, so a model that fills many positions at once contradicts itself: each token is
probable and the row is wrong. Once some letters stand, the others follow from them, which is what edits can use.
"""

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

from datasets import DatasetDict
from transformers import PreTrainedTokenizerFast

from xdlm_hf.data.tokenizer import symbol_tokenizer
from xdlm_hf.evaluation.rows import as_test_split, read_lines, require_texts

LETTERS = string.ascii_lowercase
GIVEN, ANSWER = 6, 32  # letters of the prompt and of the answer
# Prompt and completion one after the other, as for a base model: every character is one token.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def problems(number: int, seed: int) -> Iterator[dict[str, str]]:
    """Rows `{"prompt": ..., "completion": ...}`, the completion being one of the 26 right ones."""
    draw = random.Random(seed)
    for _ in range(number):
        sign = draw.choice("<>")
        given = "".join(letter + sign for letter in draw.choices(LETTERS, k=GIVEN))
        yield {"prompt": given + ":", "completion": answer(sign, draw.randrange(26))}


def answer(sign: str, first: int) -> str:
    """The right answer that begins with letter number `first`."""
    step = 1 if sign == ">" else -1
    return "".join(LETTERS[(first + step * place) % 26] for place in range(ANSWER))


def is_right(prompt: str, text: str) -> bool:
    sign = ">" if ">" in prompt else "<"
    return text[:1] in set(LETTERS) and text == answer(sign, LETTERS.index(text[0]))


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character: 26 letters, "<", ">", ":", with [MASK] and an end of text. N = 31."""
    special = {"mask_token": "[MASK]", "eos_token": "[EOS]", "pad_token": "[EOS]"}
    return symbol_tokenizer([*LETTERS, *"<>:", "[MASK]", "[EOS]"], "[EOS]", chat_template=TEMPLATE, **special)


def write(path: Path, number: int, seed: int) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in problems(number, seed)), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------
# For lm-eval: xdlm_alphabet.yaml


def load(data: str | None = None, **_metadata) -> DatasetDict:
    """Rows of the file that `--metadata` names; `_metadata` is ignored.

    Raises:
        ValueError: If no file is named, it cannot be read, or a row has no prompt.
    """
    if data is None:
        raise ValueError(
            "xdlm_alphabet needs its problems: --metadata data=PATH of a JSONL file with a 'prompt' a line."
        )
    rows = read_lines(Path(data))
    for where, row in rows:
        require_texts(row, ["prompt"], where)
    return as_test_split([{"prompt": row["prompt"]} for _, row in rows])


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return {"exact_match": float(is_right(doc["prompt"], results[0]))}
