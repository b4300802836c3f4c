"""Requests to /v1/revise: a text, and which of its characters may change."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..generation.config import XDLMGenerationConfig
from ..generation.protocol import length_limit
from ..generation.spans import character_mask, text_encoding
from ..generation.spelling import flatten
from .fields import ENGINE, RequestError, read_revision_fields
from .prompts import TokenFloor
from .requests import Defaults, GenerationRequest, Limits, Settings, check_model

STEPS = 8  # by default, as `revise`


def parse_revision(
    body: Any,
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    limits: Limits,
    defaults: Defaults,
    floor: TokenFloor | None = None,
) -> GenerationRequest:
    """As `requests.parse`, for /v1/revise; its characters are Unicode code points."""
    fields = read_revision_fields(body)
    check_model(fields, model_name)
    text = fields.get("text")
    if not text:
        raise RequestError(f"text is {'missing' if text is None else 'empty'}.", 400, "text")
    settings = _settings(fields, limits, defaults)
    room = length_limit(config)
    room = room if limits.max_prompt_tokens is None else min(room, limits.max_prompt_tokens)
    if floor is not None:
        _check_length("at least ", floor(text), room)
    try:
        encoding = text_encoding([text], tokenizer)
    except ValueError as error:
        raise RequestError(str(error), 400, "text") from error
    ids = encoding["input_ids"][0]
    _check_length("", len(ids), room)
    spans = fields.get("editable", [(0, len(text))])
    try:
        (editable,) = character_mask("editable", [spans], [text], encoding, torch.ones(1, len(ids))).tolist()
    except ValueError as error:
        raise RequestError(str(error), 400, "editable") from error
    if not any(editable):
        raise RequestError("no token lies wholly inside the editable spans; widen them.", 400, "editable")
    return GenerationRequest(False, (tuple(ids),), 1, (), False, False, settings, editable=tuple(editable))


def _settings(fields: dict[str, Any], limits: Limits, defaults: Defaults) -> Settings:
    steps, temperature, top_p = fields.get("steps", STEPS), fields.get("temperature"), fields.get("top_p")
    if steps > limits.max_new_tokens:
        raise RequestError(f"steps={steps} is above this server's {limits.max_new_tokens}.", 400, "steps")
    seed = fields.get("seed") if defaults.draws(fields) else None
    try:
        engine = tuple(sorted(flatten({name: fields[name] for name in ENGINE if name in fields})[0].items()))
        k = fields.get("mixing_ratio")
        settings = Settings(0, steps, None, k, None, temperature, top_p, seed, engine, task="revision")
        XDLMGenerationConfig(**settings.options())
    except ValueError as error:
        raise RequestError(str(error)) from error
    return settings


def _check_length(about: str, tokens: int, room: int) -> None:
    if tokens > room:
        raise RequestError(
            f"a text of {about}{tokens} tokens is too long: this server takes {room}; shorten it.",
            400,
            "text",
            "context_length_exceeded",
        )
