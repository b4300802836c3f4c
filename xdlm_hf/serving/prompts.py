"""Prompts of a request as token ids, within the length limit.

Tokenizing takes about a second per megabyte, so a prompt that cannot fit is refused from a count of its bytes where
the tokenizer allows one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .fields import RequestError, is_integer

# Pre-tokenizers that split a text, all of which they can keep.
SPLITTING = ("Digits", "Punctuation", "Split")


class TokenFloor:
    """A lower bound on the tokens of a text, from counts of its bytes, without tokenizing it.

    Every byte of the text lies in one token. Share a token of n bytes out, 1 / n to each of them. A byte b lies in no
    token of more than L(b) bytes, L(b) the length of the longest token that holds it, so its share is at least
    1 / L(b), and

        tokens >= sum over the bytes b of 1 / L(b)

    Args:
        shares: 1 / L(b) for every byte, (256,) float64; 0 for bytes that may be lost.
    """

    def __init__(self, shares: np.ndarray):
        self.shares = shares

    def __call__(self, text: str) -> int:
        counts = np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
        return int(np.ceil(counts @ self.shares - 1e-6))  # the sum is rounded, by far less

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenFloor | None":
        """The bound for byte-level BPE that keeps the whole text; None for any other tokenizer."""
        if not tokenizer.is_fast:
            return None
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        model, added = backend["model"], backend["added_tokens"]
        if (
            model["type"] != "BPE"
            or model.get("continuing_subword_prefix")
            or model.get("end_of_word_suffix")
            or backend["normalizer"] is not None
            or not _is_byte_level(backend["pre_tokenizer"])
            or any(token["lstrip"] or token["rstrip"] for token in added)
        ):
            return None
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        alone = {byte_of[token] for token in model["vocab"] if token in byte_of}
        longest = np.full(256, np.inf)
        longest[sorted(alone)] = 1
        spelled = [
            [byte_of[character] for character in token] for token in model["vocab"] if set(token) <= set(byte_of)
        ]
        for token in [*spelled, *(list(token["content"].encode()) for token in added)]:
            longest[token] = np.maximum(longest[token], len(token))
        return cls(1 / longest)


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether the pre-tokenizer turns text into bytes without dropping any."""
    if pre_tokenizer is None:
        return False
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kept = all(part["type"] == "ByteLevel" or _keeps_text(part) for part in parts)
    return kept and any(part["type"] == "ByteLevel" for part in parts)


def _keeps_text(part: dict[str, Any]) -> bool:
    return part["type"] in SPLITTING and part.get("behavior") != "Removed"


@dataclass(frozen=True)
class PromptReader:
    """Turns prompts into ids.

    Args:
        tokenizer: The model's.
        rows: Rows of its embedding; ids must be below.
        answer: Tokens of an answer, for messages.
        room: Tokens that a prompt may have.
        floor: The tokenizer's `TokenFloor`, if there is one.
        suffix_tokens: Tokens that follow the answer, for messages.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: int
    answer: int
    room: int
    floor: TokenFloor | None = None
    suffix_tokens: int = 0

    def suffix(self, fields: Mapping[str, Any]) -> tuple[int, ...]:
        """`suffix`: the text that follows every answer, if any."""
        text = fields.get("suffix", "")
        return self._tokenize(text, "suffix", add_special_tokens=False) if text else ()

    def prompts(self, fields: Mapping[str, Any], n: int, most: int) -> tuple[tuple[int, ...], ...]:
        """`prompt`: a string, token ids, or a list of either, each to be answered `n` times, `most` answers in all."""
        prompt = fields.get("prompt")
        if prompt is None:
            raise RequestError("prompt is missing.", 400, "prompt")
        alone = isinstance(prompt, str) or (bool(prompt) and all(map(is_integer, prompt)))
        prompts = [prompt] if alone else prompt
        if not prompts:
            raise RequestError("prompt is an empty list; pass a string or token ids.", 400, "prompt")
        check_rows(len(prompts), n, most)
        return tuple(self._ids(item) for item in prompts)

    def conversation(self, fields: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
        """`messages` through the tokenizer's chat template, open for the assistant's answer."""
        if "messages" not in fields:
            raise RequestError("messages is missing.", 400, "messages")
        if not self.tokenizer.chat_template:
            raise RequestError(
                "this model's tokenizer has no chat template, so it is a base model; use /v1/completions.",
                400,
                "messages",
            )
        try:
            text = self.tokenizer.apply_chat_template(fields["messages"], tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise RequestError(f"messages do not fit this model's chat template: {error}", 400, "messages") from error
        return (self._tokenize(text, "messages", add_special_tokens=False),)

    def _ids(self, item: Any) -> tuple[int, ...]:
        if isinstance(item, str):
            return self._tokenize(item, "prompt")
        if not isinstance(item, list) or not all(map(is_integer, item)):
            raise RequestError("prompt must be a string, token ids, or a list of either.", 400, "prompt")
        outside = [token_id for token_id in item if not 0 <= token_id < self.rows]
        if outside:
            raise RequestError(f"prompt holds {outside[0]}, which is no token id of this model.", 400, "prompt")
        self._check_length("", len(item), "prompt")
        return tuple(item)

    def _tokenize(self, text: str, field: str, **options: Any) -> tuple[int, ...]:
        if self.floor is not None:
            self._check_length("at least ", self.floor(text), field)
        ids = tuple(self.tokenizer(text, return_attention_mask=False, **options)["input_ids"])
        self._check_length("", len(ids), field)
        return ids

    def _check_length(self, about: str, tokens: int, field: str) -> None:
        if tokens > self.room:
            part = "suffix" if field == "suffix" else "prompt"
            suffix = f" and {self.suffix_tokens} of the suffix" if self.suffix_tokens else ""
            raise RequestError(
                f"a {part} of {about}{tokens} tokens is too long: with {self.answer} tokens for the answer{suffix}, "
                f"{max(self.room, 0)} are left of this server's limits; shorten the {part} or max_tokens.",
                400,
                field,
                "context_length_exceeded",
            )


def check_rows(prompts: int, n: int, most: int) -> None:
    """Refuse more answers than fit a batch.

    Raises:
        RequestError: If `prompts` times `n` is more than `most`.
    """
    if prompts * n > most:
        raise RequestError(
            f"{prompts} prompts with n={n} are {prompts * n} answers, more than this server's {most} per request.",
            400,
            "n",
        )
