"""Requests of `xdlm-serve`: JSON to prompts and options of `generate`, checked against the server's limits."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..generation.blocks import check_blocks, num_blocks
from ..generation.config import XDLMGenerationConfig
from ..generation.protocol import length_limit, output_rows
from ..generation.resolution import draws_with
from ..generation.spelling import flatten
from .fields import ENGINE, RequestError, read_fields
from .prompts import PromptReader, TokenFloor, check_rows


@dataclass(frozen=True)
class Limits:
    """Limits of one request, in tokens and rows of a batch."""

    max_new_tokens: int = 1024
    max_prompt_tokens: int | None = None  # default: the model's length limit less the answer
    max_rows: int = 8  # prompts times n


@dataclass(frozen=True)
class Defaults:
    """Values for what a request leaves out."""

    max_tokens: int = 128
    block_length: int | None = None
    tokens_per_step: int = 1
    # The checkpoint's: which options go together, and whether a seed has an effect, depends on it.
    stored: XDLMGenerationConfig = field(default_factory=XDLMGenerationConfig)

    @classmethod
    def of(
        cls, stored: XDLMGenerationConfig, max_tokens: int, block_length: int | None, tokens_per_step: int
    ) -> "Defaults":
        """The server's options, which override those that the checkpoint stores."""
        block_length = stored.block_length if block_length is None else block_length
        return cls(max_tokens, block_length, tokens_per_step, stored)

    def draws(self, fields: Mapping[str, Any]) -> bool:
        """Whether generation with these fields draws random numbers, so that a seed has an effect."""
        return draws_with(self.stored, {name: fields[name] for name in _DRAWING if name in fields})


_DRAWING = ("sampler", "temperature", *ENGINE)


@dataclass(frozen=True)
class Settings:
    """Task and options of `generate` or `revise`; requests with equal settings can share a batch."""

    max_new_tokens: int  # 0 for a revision
    steps: int
    block_length: int | None
    mixing_ratio: float | None
    sampler: str | None
    temperature: float | None
    top_p: float | None
    seed: int | None  # None where nothing is drawn
    engine: tuple[tuple[str, Any], ...] = ()  # of `ENGINE`, as rows of the table of options
    task: str = "answer"  # or "holes", between prompt and suffix, or "revision"
    json_schema: str | None = None  # in JSON, because the order of its properties counts

    def options(self) -> dict[str, Any]:
        left_out = {"engine", "task"} if self.task == "answer" else {"engine", "task", "max_new_tokens"}
        own = {name: value for name, value in asdict(self).items() if value is not None and name not in left_out}
        return {**own, **dict(self.engine)}

    @property
    def total_steps(self) -> int:
        """Steps at most."""
        return self.steps + (dict(self.engine).get("polish_steps") or 0)

    @property
    def shares_batches(self) -> bool:
        """A seed gives the same answer only in the same batch, so its request runs alone."""
        return self.seed is None


@dataclass(frozen=True)
class GenerationRequest:
    """A valid request: prompts as ids, each answered `n` times, or a text to revise.

    Attributes:
        prompts: Of a revision the text.
        drafts: Whether the stream has the canvas of every step.
        suffix: Ids that follow every answer.
        editable: For each token of a text to revise whether it may change.
    """

    chat: bool
    prompts: tuple[tuple[int, ...], ...]
    n: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    settings: Settings
    drafts: bool = False
    suffix: tuple[int, ...] = ()
    editable: tuple[bool, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) + len(self.suffix) for prompt in self.prompts)

    def canvas(self, row: int) -> tuple[list[int], list[bool]]:
        """Ids of one row as `generate` or `revise` takes them, and where they are holes or may change."""
        prompt = list(self.prompts[row // self.n])
        if self.settings.task == "revision":
            return prompt, list(self.editable)
        if self.settings.task == "answer":
            return prompt, [False] * len(prompt)
        hole, after = self.settings.max_new_tokens, len(self.suffix)
        return prompt + [0] * hole + list(self.suffix), [False] * len(prompt) + [True] * hole + [False] * after

    def columns(self, row: int, padding: int) -> slice:
        """Where a row's answer is in what a streamer gets: after the prompt of an answer, else in the padded canvas."""
        if self.settings.task == "answer":
            return slice(None)
        if self.settings.task == "revision":
            return slice(padding, None)
        first = padding + len(self.prompts[row // self.n])
        return slice(first, first + self.settings.max_new_tokens)


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
    """Check a request, then tokenize its prompts, which can take seconds.

    Args:
        body: The JSON value received.
        chat: Whether it came to /v1/chat/completions, else to /v1/completions.
        model_name: The name that `model` must have.
        tokenizer, config: The model's.
        limits, defaults: The server's.
        floor: The tokenizer's, to refuse prompts that are far too long without tokenizing them.

    Raises:
        RequestError: If the request is invalid or beyond the limits, naming the field.
    """
    fields = read_fields(body, chat)
    check_model(fields, model_name)
    length_field = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    max_tokens = fields.get(length_field, min(defaults.max_tokens, limits.max_new_tokens))
    if max_tokens > limits.max_new_tokens:
        raise RequestError(
            f"{length_field}={max_tokens} is above this server's {limits.max_new_tokens}.", 400, length_field
        )
    settings = _settings(fields, max_tokens, limits, defaults)
    n = fields.get("n", 1)
    check_rows(1, n, limits.max_rows)
    room = length_limit(config) - max_tokens
    room = room if limits.max_prompt_tokens is None else min(room, limits.max_prompt_tokens)
    reader = PromptReader(tokenizer, output_rows(config), max_tokens, room, floor)
    suffix = reader.suffix(fields)
    reader = replace(reader, suffix_tokens=len(suffix), room=room - len(suffix))
    prompts = reader.conversation(fields) if chat else reader.prompts(fields, n, limits.max_rows)
    return GenerationRequest(
        chat,
        prompts,
        n,
        fields.get("stop", ()),
        fields.get("stream", False),
        fields.get("stream_options", {}).get("include_usage", False),
        settings,
        fields.get("stream_drafts", False),
        suffix,
    )


def check_model(fields: Mapping[str, Any], model_name: str) -> None:
    """Raise RequestError unless the request names this server's model."""
    given = fields.get("model")
    if given != model_name:
        raise RequestError(f"model={given!r} is not served here; use {model_name!r}.", 404, "model", "model_not_found")


def _settings(fields: Mapping[str, Any], max_tokens: int, limits: Limits, defaults: Defaults) -> Settings:
    """Options of `generate` for an answer of `max_tokens`; by default as many steps for each block."""
    ancestral = fields.get("sampler", defaults.stored.sampler) == "ancestral"
    task = "holes" if fields.get("suffix") else "answer"
    schema = fields.get("response_format")
    if task == "holes":
        for name, why in (
            ("block_length", "what stands before it is filled as one block"),
            ("response_format", "JSON is a whole answer"),
        ):
            if fields.get(name) is not None:
                raise RequestError(f"{name} does not go with suffix: {why}; leave it out.", 400, name)
    whole = ancestral or task == "holes" or schema is not None  # one block; a request's own is refused below
    block = fields.get("block_length", None if whole else defaults.block_length)
    blocks = 1
    if block is not None and not ancestral:
        block = min(block, max_tokens)
        blocks = num_blocks(max_tokens, block)
    steps = fields.get("steps")
    if steps is None:
        steps = max(1, max_tokens // defaults.tokens_per_step // blocks) * blocks
    temperature, top_p = fields.get("temperature"), fields.get("top_p")
    if top_p == 1:
        top_p = None  # keeps every token
    if top_p is not None and not ancestral and not fields.get("temperature", defaults.stored.temperature):
        raise RequestError(f"top_p={top_p} filters a draw and needs a temperature above 0.", 400, "top_p")
    if schema is not None and "stop" in fields:
        raise RequestError("stop may cut the JSON that response_format asks for; leave out one of them.", 400, "stop")
    if steps > limits.max_new_tokens:
        raise RequestError(f"steps={steps} is above this server's {limits.max_new_tokens}.", 400, "steps")
    own = [fields.get(name) for name in ("mixing_ratio", "sampler")]
    seed = fields.get("seed") if defaults.draws(fields) else None
    try:
        engine = tuple(sorted(flatten({name: fields[name] for name in ENGINE if name in fields})[0].items()))
        settings = Settings(
            max_tokens, steps, block, *own, temperature, top_p, seed, engine, task=task, json_schema=schema
        )
        XDLMGenerationConfig(**settings.options())
        if not ancestral:
            check_blocks(steps, max_tokens, block or max_tokens)
    except ValueError as error:
        raise RequestError(str(error)) from error
    return settings
