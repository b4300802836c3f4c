"""What a client may ask of `xdlm-serve`: a request as prompts and options of `generate`, checked against the limits."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..generation.blocks import check_blocks
from ..generation.config import XDLMGenerationConfig
from ..generation.protocol import length_limit, output_rows
from ..generation.resolution import draws_with
from ..generation.spelling import flatten
from .fields import ENGINE, RequestError, read_fields
from .prompts import PromptReader, TokenFloor, check_rows


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
    # As the checkpoint has it: what fits a request, and whether its seed matters, depends on it.
    stored: XDLMGenerationConfig = field(default_factory=XDLMGenerationConfig)

    @classmethod
    def of(
        cls, stored: XDLMGenerationConfig, max_tokens: int, block_length: int | None, tokens_per_step: int
    ) -> "Defaults":
        """The server's options over what the checkpoint stores."""
        block_length = stored.block_length if block_length is None else block_length
        return cls(max_tokens, block_length, tokens_per_step, stored)

    def draws(self, fields: Mapping[str, Any]) -> bool:
        """Whether generation with these fields draws random numbers, so that a seed has an effect."""
        return draws_with(self.stored, {name: fields[name] for name in _DRAWING if name in fields})


_DRAWING = ("sampler", "temperature", *ENGINE)


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
    seed: int | None  # None where nothing is drawn
    engine: tuple[tuple[str, Any], ...] = ()  # of `ENGINE`, as rows of the table of options

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
    floor: TokenFloor | None = None,
) -> GenerationRequest:
    """Check a request and tokenize its prompts, which comes last: it can take seconds.

    Args:
        body: The JSON value received.
        chat: Whether it came to /v1/chat/completions, else to /v1/completions.
        model_name: The name that `model` must have.
        tokenizer, config: The model's.
        limits, defaults: The server's.
        floor: The tokenizer's, to refuse prompts that are far too long without tokenizing them.

    Raises:
        RequestError: If anything in it cannot be done, naming the field.
    """
    fields = read_fields(body, chat)
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
    n, canvas = fields.get("n", 1), settings.max_new_tokens
    check_rows(1, n, limits.max_rows)
    room = length_limit(config) - canvas
    room = room if limits.max_prompt_tokens is None else min(room, limits.max_prompt_tokens)
    reader = PromptReader(tokenizer, output_rows(config), canvas, room, floor)
    prompts = reader.conversation(fields) if chat else reader.prompts(fields, n, limits.max_rows)
    return GenerationRequest(
        chat,
        prompts,
        n,
        max_tokens,
        fields.get("stop", ()),
        fields.get("stream", False),
        fields.get("stream_options", {}).get("include_usage", False),
        settings,
    )


def _settings(fields: Mapping[str, Any], max_tokens: int, limits: Limits, defaults: Defaults) -> Settings:
    """Options of `generate`: a canvas of whole blocks that holds `max_tokens`, and steps that fit it."""
    ancestral = fields.get("sampler", defaults.stored.sampler) == "ancestral"
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
    if top_p is not None and not ancestral and not fields.get("temperature", defaults.stored.temperature):
        raise RequestError(f"top_p={top_p} filters a draw and needs a temperature above 0.", 400, "top_p")
    most = max(canvas, limits.max_new_tokens)
    if steps > most:
        raise RequestError(f"steps={steps} is above this server's {most}.", 400, "steps")
    own = [fields.get(name) for name in ("mixing_ratio", "sampler")]
    seed = fields.get("seed") if defaults.draws(fields) else None
    try:
        engine = tuple(sorted(flatten({name: fields[name] for name in ENGINE if name in fields})[0].items()))
        settings = Settings(canvas, steps, block, *own, temperature, top_p, seed, engine)
        XDLMGenerationConfig(**settings.options())
        if not ancestral:
            check_blocks(steps, canvas, block or canvas)
    except ValueError as error:
        raise RequestError(str(error)) from error
    return settings
