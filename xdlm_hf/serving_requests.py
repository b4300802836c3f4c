"""What a client may ask of `xdlm-serve`: the fields of OpenAI's API that apply, and the sampler's own.

A field that is not known, or known and without effect here, is refused rather than ignored, unless it has the value
that asks for nothing. Errors have OpenAI's form.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .cache import CACHES
from .generation_config import REFINEMENTS, SAMPLERS, XDLMGenerationConfig
from .samplers import check_blocks

MAX_STOPS = 4  # as OpenAI has it
MAX_STOP_LENGTH = 256  # characters
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields of OpenAI's that do nothing here, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
REASONS = {
    "response_format": "answers cannot be bound to a JSON schema or grammar: a diffusion model does not write from "
    "left to right, as constrained decoding needs it",
    "tools": "tools are not supported",
    "logprobs": "log-probabilities are not supported: the order of filling leaves no factors to report",
}
for _name in ("guided_json", "guided_regex", "guided_grammar", "guided_choice", "structured_outputs", "grammar"):
    NEUTRAL[_name], REASONS[_name] = (), REASONS["response_format"]


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


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; in tokens, and rows of a batch."""

    max_new_tokens: int = 1024
    max_prompt_tokens: int | None = None  # what the model's length leaves, by default
    max_rows: int = 8  # prompts times n


@dataclass(frozen=True)
class Defaults:
    """What holds where a request says nothing."""

    max_tokens: int = 128
    block_length: int | None = None
    tokens_per_step: int = 1
    sampler: str | None = None  # these two as the checkpoint has them: what fits a request depends on them
    temperature: float | None = None

    @classmethod
    def of(
        cls, stored: XDLMGenerationConfig, max_tokens: int, block_length: int | None, tokens_per_step: int
    ) -> "Defaults":
        """The server's options over what the checkpoint stores."""
        block_length = stored.block_length if block_length is None else block_length
        return cls(max_tokens, block_length, tokens_per_step, stored.sampler, stored.temperature)


@dataclass(frozen=True)
class Settings:
    """Options of `generate`; requests with equal settings can share a batch."""

    max_new_tokens: int
    steps: int
    block_length: int | None
    mixing_ratio: float | None
    sampler: str | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    engine: tuple[tuple[str, Any], ...] = ()  # of `ENGINE`, by name

    def options(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self).items() if value is not None and name != "engine"}
        return {**own, **dict(self.engine)}

    @property
    def shares_batches(self) -> bool:
        """A seed gives the same answer only in the same batch, so its request runs alone."""
        return self.seed is None


@dataclass(frozen=True)
class GenerationRequest:
    """A request that was understood: prompts as ids, each answered `n` times."""

    chat: bool
    prompts: tuple[tuple[int, ...], ...]
    n: int
    max_tokens: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    settings: Settings

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def parse(
    body: Any,
    chat: bool,
    model_name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    limits: Limits,
    defaults: Defaults,
) -> GenerationRequest:
    """Check a request and tokenize its prompts.

    Args:
        body: The JSON value received.
        chat: Whether it came to /v1/chat/completions, else to /v1/completions.
        model_name: The name that `model` must have.
        tokenizer, config: The model's.
        limits, defaults: The server's.

    Raises:
        RequestError: If anything in it cannot be done, naming the field.
    """
    fields = _fields(body, chat)
    if fields.get("model") != model_name:
        given = fields.get("model")
        raise RequestError(f"model={given!r} is not served here; use {model_name!r}.", 404, "model", "model_not_found")
    length_field = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    max_tokens = fields.get(length_field, min(defaults.max_tokens, limits.max_new_tokens))
    if max_tokens > limits.max_new_tokens:
        raise RequestError(
            f"{length_field}={max_tokens} is above this server's {limits.max_new_tokens}.", 400, length_field
        )
    settings = _settings(fields, max_tokens, limits, defaults)
    prompts = _chat_prompt(fields, tokenizer) if chat else _prompts(fields, tokenizer, config.embedding_size)
    request = GenerationRequest(
        chat,
        prompts,
        fields.get("n", 1),
        max_tokens,
        fields.get("stop", ()),
        fields.get("stream", False),
        fields.get("stream_options", {}).get("include_usage", False),
        settings,
    )
    _check_size(request, limits, config.max_sequence_length)
    return request


def _fields(body: Any, chat: bool) -> dict[str, Any]:
    """The fields given, checked one by one; null means not given."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object.")
    known = COMMON | (CHAT if chat else COMPLETION)
    fields = {}
    for name, value in body.items():
        if name in known:
            if value is not None:
                fields[name] = known[name](name, value)
        elif name not in NEUTRAL:
            raise RequestError(
                f"{name!r} is not known; known are {', '.join(sorted(known))}.", 400, name, "unknown_parameter"
            )
        elif value is not None and not any(type(value) is type(it) and value == it for it in NEUTRAL[name]):
            reason = REASONS.get(name, "this server does not support it")
            raise RequestError(f"{name} is not supported: {reason}; leave it out.", 400, name, "unsupported_parameter")
    if "stream_options" in fields and not fields.get("stream"):
        raise RequestError("stream_options needs stream=true.", 400, "stream_options")
    return fields


def _settings(fields: Mapping[str, Any], max_tokens: int, limits: Limits, defaults: Defaults) -> Settings:
    """Options of `generate`: a canvas of whole blocks that holds `max_tokens`, and steps that fit it."""
    ancestral = fields.get("sampler", defaults.sampler) == "ancestral"
    block = fields.get("block_length", None if ancestral else defaults.block_length)
    canvas, blocks = max_tokens, 1
    if block is not None and not ancestral:
        block = min(block, max_tokens)
        blocks = math.ceil(max_tokens / block)
        canvas = blocks * block
    steps = fields.get("steps")
    if steps is None:
        steps = max(1, canvas // defaults.tokens_per_step // blocks) * blocks
    temperature, top_p = fields.get("temperature"), fields.get("top_p")
    if top_p == 1:
        top_p = None  # keeps every token
    if top_p is not None and not ancestral and not fields.get("temperature", defaults.temperature):
        raise RequestError(f"top_p={top_p} filters a draw and needs a temperature above 0.", 400, "top_p")
    most = max(canvas, limits.max_new_tokens)
    if steps > most:
        raise RequestError(f"steps={steps} is above this server's {most}.", 400, "steps")
    own = [fields.get(name) for name in ("mixing_ratio", "sampler")]
    engine = tuple((name, fields[name]) for name in ENGINE if name in fields)
    settings = Settings(canvas, steps, block, *own, temperature, top_p, fields.get("seed"), engine)
    try:
        XDLMGenerationConfig(**settings.options())
        if not ancestral:
            check_blocks(steps, canvas, block or canvas)
    except ValueError as error:
        raise RequestError(str(error)) from error
    return settings


def _prompts(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[tuple[int, ...], ...]:
    """`prompt`: a string, token ids, or a list of either."""
    prompt = fields.get("prompt")
    if prompt is None:
        raise RequestError("prompt is missing.", 400, "prompt")
    alone = isinstance(prompt, str) or (bool(prompt) and all(_is_integer(item) for item in prompt))
    found = []
    for item in [prompt] if alone else prompt:
        ids = tokenizer(_encodable("prompt", item))["input_ids"] if isinstance(item, str) else item
        if not isinstance(ids, list) or not all(_is_integer(token_id) for token_id in ids):
            raise RequestError("prompt must be a string, token ids, or a list of either.", 400, "prompt")
        outside = [token_id for token_id in ids if not 0 <= token_id < rows]
        if outside:
            raise RequestError(f"prompt holds {outside[0]}, which is no token id of this model.", 400, "prompt")
        found.append(tuple(ids))
    if not found:
        raise RequestError("prompt is an empty list; pass a string or token ids.", 400, "prompt")
    return tuple(found)


def _chat_prompt(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    """The conversation through the tokenizer's chat template, open for the assistant's answer."""
    if "messages" not in fields:
        raise RequestError("messages is missing.", 400, "messages")
    if not tokenizer.chat_template:
        raise RequestError(
            "this model's tokenizer has no chat template, so it is a base model; use /v1/completions.", 400, "messages"
        )
    try:
        text = tokenizer.apply_chat_template(fields["messages"], tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise RequestError(f"messages do not fit this model's chat template: {error}", 400, "messages") from error
    return (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]),)


def _check_size(request: GenerationRequest, limits: Limits, max_length: int) -> None:
    if request.rows > limits.max_rows:
        raise RequestError(
            f"{len(request.prompts)} prompts with n={request.n} are {request.rows} answers, more than this server's "
            f"{limits.max_rows} per request.",
            400,
            "n",
        )
    canvas, longest = request.settings.max_new_tokens, max(map(len, request.prompts))
    room = max_length - canvas
    room = room if limits.max_prompt_tokens is None else min(room, limits.max_prompt_tokens)
    if longest > room:
        raise RequestError(
            f"a prompt of {longest} tokens is too long: with {canvas} tokens for the answer, {max(room, 0)} are left "
            f"of this server's limits; shorten the prompt or max_tokens.",
            400,
            "messages" if request.chat else "prompt",
            "context_length_exceeded",
        )


# --------------------------------------------------------------------------------------------------------------------
# Checks of single fields: (name, value) -> value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(least: int, most: int = 2**31 - 1) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if not _is_integer(value) or not least <= value <= most:
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


def _choice(*choices: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise RequestError(f"{name}={_short(value)} is not known; choose one of {', '.join(choices)}.", 400, name)
        return value

    return check


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
    if not isinstance(value, dict) or set(value) - {"include_usage"}:
        raise RequestError(f"{name} must be an object, and include_usage is all it may hold.", 400, name)
    return {key: _boolean(f"{name}.{key}", given) for key, given in value.items() if given is not None}


def _prompt(name: str, value: Any) -> str | list[Any]:
    if not isinstance(value, str | list):
        raise RequestError(f"{name} must be a string, token ids, or a list of either.", 400, name)
    return value


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
    """Text, or a list of parts of type text, as OpenAI's clients send it too."""
    if isinstance(content, str):
        return _encodable(name, content)
    parts: Sequence[Any] = content if isinstance(content, list) else [None]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"{name} must be a string or a list of parts of type text.", 400, name)
    return _encodable(name, "".join(part["text"] for part in parts))


def _encodable(name: str, text: str) -> str:
    """JSON can name halves of characters, which no text holds and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} holds half of a surrogate pair, which is no text.", 400, name) from error
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# Options of `generate` that a client passes as they are; what does not go together `generate` refuses.
ENGINE: dict[str, Callable[[str, Any], Any]] = {
    "confidence_threshold": _number(1e-6, 1),
    "confidence_factor": _number(1e-6, 1e6),
    "early_stop": _boolean,
    "use_cache": _choice(*CACHES),
    "cache_refresh": _integer(1),
    "refinement": _choice(*REFINEMENTS),
    "edit_threshold": _number(1e-6, 1),
    "remask_rate": _number(1e-6, 1),
    "max_edits_per_token": _integer(1),
    "refinement_off_steps": _integer(1),
    "polish_steps": _integer(1, 64),  # each is a forward pass beyond `steps`
}
COMMON: dict[str, Callable[[str, Any], Any]] = {
    "model": _string,
    "max_tokens": _integer(1),
    "n": _integer(1, 128),
    "seed": _integer(-(2**63), 2**63 - 1),
    "stop": _stops,
    "stream": _boolean,
    "stream_options": _stream_options,
    "temperature": _number(0, 2),
    "top_p": _number(1e-6, 1),
    "user": _string,
    "steps": _integer(1),
    "mixing_ratio": _number(0, 1),
    "block_length": _integer(1),
    "sampler": _choice(*SAMPLERS),
    **ENGINE,
}
COMPLETION = {"prompt": _prompt}
CHAT = {"messages": _messages, "max_completion_tokens": _integer(1)}
