"""Validation of a request's fields: those of OpenAI's API that apply, and options of `generate`.

An unknown field, or one without effect here, is refused rather than ignored, unless it has a neutral value. Errors have
OpenAI's form.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..generation.options import section_names
from ..generation.spelling import check_values, flatten

MAX_STOPS = 4  # as in OpenAI's API
MAX_STOP_LENGTH = 256  # characters
MAX_SPANS = 256  # of a revision
MAX_POLISH_STEPS = 64  # each is a forward pass beyond `steps`
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields without effect here and their neutral values; 0 stands for 0.0 too. OpenAI's, then those of vLLM and SGLang.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "ignore_eos": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),  # byte-level tokens carry their spaces themselves
    "stop_token_ids": ([],),
    "top_k": (-1, 0),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
_NO_GRAMMARS = "answers are constrained by response_format, to JSON by a schema"
_NO_LOGPROBS = "log-probabilities need a left-to-right factorization, which a diffusion model does not have"
_NO_PENALTIES = "tokens are filled in no fixed order, so that none counts as a repetition; use temperature and top_p"
REASONS = {
    "best_of": "there are no log-probabilities to choose by; use n",
    "frequency_penalty": _NO_PENALTIES,
    "logprobs": _NO_LOGPROBS,
    "min_p": "use top_p and a temperature above 0",
    "presence_penalty": _NO_PENALTIES,
    "prompt_logprobs": _NO_LOGPROBS,
    "repetition_penalty": _NO_PENALTIES,
    "stop_token_ids": "use stop, which takes special tokens too",
    "tools": "the model's output is plain text",
    "top_k": "use top_p and a temperature above 0",
    "top_logprobs": _NO_LOGPROBS,
    "truncate_prompt_tokens": "shorten the prompt",
    "typical_p": "use top_p and a temperature above 0",
    "use_beam_search": "use n",
    # Fields of one route, as another refuses them.
    "n": "/v1/revise gives one revision; send several requests",
    "stream": "a revision is final at its end only",
    "suffix": "fill-in-the-middle is a field of /v1/completions",
}
for _name in (
    "ebnf",
    "grammar",
    "guided_choice",
    "guided_decoding_backend",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "json_schema",
    "regex",
    "structured_outputs",
):
    NEUTRAL[_name], REASONS[_name] = (), _NO_GRAMMARS


class RequestError(Exception):
    """A refusal, as HTTP status and OpenAI's error object."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.kind = message, status, param, code, kind

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def read_fields(body: Any, chat: bool) -> dict[str, Any]:
    """The given fields, validated one by one; null means not given.

    Raises:
        RequestError: If the body is no object, a field is unknown or its value invalid.
    """
    known = COMMON | (CHAT if chat else COMPLETION)
    fields = _read(body, known, NEUTRAL | {"add_special_tokens": (not chat,)})  # a chat template has them already
    if "stream_options" in fields and not fields.get("stream"):
        raise RequestError("stream_options needs stream=true.", 400, "stream_options")
    if fields.get("stream_drafts") and not fields.get("stream"):
        raise RequestError("stream_drafts needs stream=true.", 400, "stream_drafts")
    return fields


def read_revision_fields(body: Any) -> dict[str, Any]:
    """As `read_fields`, for /v1/revise."""
    return _read(body, REVISION, {"n": (1,), "stream": (False,)})


def _read(
    body: Any, known: Mapping[str, Callable[[str, Any], Any]], neutral: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object.")
    _check_text(body)
    fields = {}
    for name, value in body.items():
        if name in known:
            if value is not None:
                fields[name] = known[name](name, value)
        elif name not in neutral:
            raise RequestError(
                f"{name!r} is not known; known are {', '.join(sorted(known))}.", 400, name, "unknown_parameter"
            )
        elif value is not None and not any(_equal(value, it) for it in neutral[name]):
            reason = REASONS.get(name, "this server does not support it")
            message = f"{name} is not supported: {reason}; leave it out{_or_send(neutral[name])}."
            raise RequestError(message, 400, name, "unsupported_parameter")
    return fields


def _check_text(body: dict[str, Any]) -> None:
    """Refuse lone surrogates in any string, keys included: "\\ud800" is valid JSON, but cannot be encoded.

    Iterative, since JSON may be nested as deeply as Python recurses.
    """
    for field, given in [("a field's name", list(body)), *body.items()]:
        remaining = [given]
        while remaining:
            value = remaining.pop()
            if isinstance(value, dict):
                remaining += [*value, *value.values()]
            elif isinstance(value, list):
                remaining += [item for item in value if not isinstance(item, int)]
            elif isinstance(value, str) and not _is_encodable(value):
                raise RequestError(
                    f"{field} holds half of a surrogate pair, which is no text; send both halves, or UTF-8.", 400, field
                )


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _equal(value: Any, other: Any) -> bool:
    """JSON's equality: 0 is 0.0, and false is not 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _or_send(values: Sequence[Any]) -> str:
    return f" or send {json.dumps(values[0])}" if values else ""


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(least: int, most: int = 2**31 - 1) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if not is_integer(value) or not least <= value <= most:
            raise RequestError(f"{name}={_short(value)} must be an integer from {least} to {most}.", 400, name)
        return value

    return check


def _number(least: float, most: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise RequestError(f"{name}={_short(value)} must be a number from {least} to {most}.", 400, name)
        return float(value)

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name}={_short(value)} must be true or false.", 400, name)
    return value


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name}={_short(value)} must be a string.", 400, name)
    return value


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops)
    ):
        raise RequestError(
            f"{name} must be a string or up to {MAX_STOPS}, none empty or above {MAX_STOP_LENGTH} characters.",
            400,
            name,
        )
    return tuple(stops)


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    neutral = ("include_obfuscation", "continuous_usage_stats")
    if not isinstance(value, dict) or set(value) - {"include_usage", *neutral}:
        raise RequestError(f"{name} must be an object, and include_usage is all it may hold.", 400, name)
    options = {key: _boolean(f"{name}.{key}", given) for key, given in value.items() if given is not None}
    asked = [key for key in neutral if options.get(key)]
    if asked:
        raise RequestError(f"{name}.{asked[0]} is not supported; leave it out or send false.", 400, name)
    return options


def _response_format(name: str, value: Any) -> str | None:
    """The schema of the answer in JSON; None for plain text."""
    kind = value.get("type") if isinstance(value, dict) else None
    inner = value.get("json_schema") if kind == "json_schema" else {}
    if (
        kind not in ("text", "json_object", "json_schema")
        or set(value) - {"type", kind}
        or not isinstance(inner, dict)
        or set(inner) - {"name", "description", "schema", "strict"}
        or (kind == "json_schema" and not isinstance(inner.get("schema"), dict))
    ):
        raise RequestError(
            f'{name} must be {{"type": "text"}}, {{"type": "json_object"}} or {{"type": "json_schema", "json_schema": '
            '{"name": ..., "schema": {...}, "strict": true}}.',
            400,
            name,
        )
    if kind == "text":
        return None
    schema = json.dumps({"type": "object"} if kind == "json_object" else inner["schema"])
    try:
        return _option("json_schema", schema)
    except RequestError as error:
        raise RequestError(f"{name}: {error.message}", 400, name) from error


def _prompt(name: str, value: Any) -> str | list[Any]:
    if not isinstance(value, str | list):
        raise RequestError(f"{name} must be a string, token ids, or a list of either.", 400, name)
    return value


def _spans(name: str, value: Any) -> list[tuple[int, int]]:
    pairs = isinstance(value, list) and all(isinstance(span, list) and len(span) == 2 for span in value)
    if not pairs or not 0 < len(value) <= MAX_SPANS or not all(is_integer(end) for span in value for end in span):
        raise RequestError(
            f"{name}={_short(value)} must be a list of 1 to {MAX_SPANS} pairs [first, end] of characters, end not "
            "included; leave it out to revise the whole text.",
            400,
            name,
        )
    return [(first, end) for first, end in value]


def _messages(name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise RequestError(f"{name} must be a list of at least one message.", 400, name)
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]


def _message(name: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in tuple(ROLES):  # of any type, hashable or not
        raise RequestError(f"{name} must be an object whose role is one of {', '.join(ROLES)}.", 400, name)
    extra = {key for key, value in message.items() if value is not None} - {"role", "content", "name", "refusal"}
    if extra:
        raise RequestError(f"{name}.{min(extra)} is not supported; leave it out.", 400, name, "unsupported_parameter")
    return {"role": ROLES[message["role"]], "content": _content(f"{name}.content", message.get("content"))}


def _content(name: str, content: Any) -> str:
    """Text, given as a string or as a list of parts of type text."""
    if isinstance(content, str):
        return content
    parts: Sequence[Any] = content if isinstance(content, list) else [None]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"{name} must be a string or a list of parts of type text.", 400, name)
    return "".join(part["text"] for part in parts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _option(name: str, value: Any) -> Any:
    """An option of `generate`, checked alone against the table of options."""
    try:
        check_values(*flatten({name: value}))
    except ValueError as error:
        raise RequestError(str(error), 400, name) from error
    return value


def _polish_steps(name: str, value: Any) -> Any:
    if is_integer(value) and value > MAX_POLISH_STEPS:
        raise RequestError(f"{name}={_short(value)} is above this server's {MAX_POLISH_STEPS}.", 400, name)
    return _option(name, value)


# Options passed on to `generate`, which refuses combinations that do not go together.
ENGINE: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(section_names("speed", "refinement"), _option),
    "polish_steps": _polish_steps,
}
COMMON: dict[str, Callable[[str, Any], Any]] = {
    "model": _string,
    "max_tokens": _integer(1),
    "n": _integer(1, 128),
    "seed": _integer(-(2**63), 2**63 - 1),
    "response_format": _response_format,
    "stop": _stops,
    "stream": _boolean,
    "stream_drafts": _boolean,
    "stream_options": _stream_options,
    "temperature": _number(0, 2),
    "top_p": _number(1e-6, 1),
    "user": _string,
    "prompt_cache_key": _string,  # these two identify the client, as `user` does; no effect
    "safety_identifier": _string,
    **dict.fromkeys(("steps", "mixing_ratio", "block_length", "sampler"), _option),
    **ENGINE,
}
# Beyond those in common.
COMPLETION = {"prompt": _prompt, "suffix": _string}
CHAT = {"messages": _messages, "max_completion_tokens": _integer(1)}
# All of /v1/revise.
REVISION: dict[str, Callable[[str, Any], Any]] = {
    "text": _string,
    "editable": _spans,
    **{name: COMMON[name] for name in ("model", "seed", "temperature", "top_p", "user", "steps", "mixing_ratio")},
    **dict.fromkeys(("refinement", "edit_threshold", "max_edits_per_token"), _option),
}
