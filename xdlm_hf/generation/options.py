"""The table of generation options: type, range, default, "off" value, and the samplers and tasks each applies to.

`XDLMGenerationConfig`, `generate`, the lm-eval adapter, the server and docs/generation.md use this table. The options
`refinement`, `parallel_decoding` and `cache` are groups of settings, given as a dict or, for two of them, a name. Each
setting is a row of the table; `spelling` converts between groups and rows.
"""

from dataclasses import dataclass, make_dataclass
from typing import Any

from .cache import CACHES
from .confidence import REMASKING
from .option_checks import (
    Check,
    check_boolean,
    check_count,
    check_integer,
    check_schema,
    check_strings,
    check_token_ids,
    choice_check,
    number_check,
)
from .refinement import REMASK_SCHEDULES

SAMPLERS = ("confidence", "ancestral")
REMDM_POLICIES = tuple(f"remdm_{schedule}" for schedule in REMASK_SCHEDULES)
REFINEMENTS = ("budget", "threshold", *REMDM_POLICIES, "none")
TASKS = ("answer", "holes", "revision")


_FRACTION = number_check(lambda x: 0 < x <= 1, "lie in (0, 1]")


@dataclass(frozen=True)
class Option:
    """One row of the table.

    Args:
        check: Raises ValueError for an invalid value; takes the option's name for the message, and the value.
        range: Type and range, as text.
        about: Description.
        section: "length", "sampling", "speed", "device", "refinement", "audit", "transformers" (options of Transformers
            that say what others say too), "output" or "tokens".
        default: The default, as text.
        value: The default, if it is a constant.
        off: Values that switch the option off, as None does.
        samplers: Samplers that the option applies to.
        released: Samplers that it applies to with `reference_compat`.
        given_for, stored_for: Tasks in which the value of a call, or of a checkpoint, is used.
        of: Group and key, if the row is a setting of a group.
    """

    check: Check
    range: str
    about: str
    section: str
    default: str = "none"
    value: Any = None
    off: tuple = ()
    samplers: tuple[str, ...] = SAMPLERS
    released: tuple[str, ...] = SAMPLERS
    given_for: tuple[str, ...] = TASKS
    stored_for: tuple[str, ...] = TASKS
    of: tuple[str, str] | None = None

    def is_off(self, value: Any) -> bool:
        return value is None or (value is not True and any(value == off for off in self.off))


_CONFIDENCE: dict[str, Any] = {"samplers": ("confidence",), "released": ("confidence",)}
_UNRELEASED: dict[str, Any] = {"samplers": ("confidence",), "released": ()}
_FILLING: dict[str, Any] = {**_UNRELEASED, "given_for": ("answer", "holes"), "stored_for": ("answer", "holes")}
_ANSWERS: dict[str, Any] = {"stored_for": ("answer",)}

TABLE: dict[str, Option] = {
    "max_new_tokens": Option(
        check_count,
        "int >= 1",
        "Length of the answer in tokens.",
        "length",
        "128",
        128,
        given_for=("answer",),
        **_ANSWERS,
    ),
    "steps": Option(
        check_count,
        "int >= 1",
        "Denoising steps, one forward pass each (two with `cfg_scale`), at least one for each block. They are spread "
        "evenly over the blocks; earlier blocks take the remainder.",
        "length",
        "one for each token; 8 for a revision",
        **_ANSWERS,
    ),
    "block_length": Option(
        check_count,
        "int >= 1",
        "Tokens that are filled together; blocks follow each other from left to right, the last may be shorter.",
        "length",
        "the whole answer",
        given_for=("answer", "holes"),
        **_CONFIDENCE,
        **_ANSWERS,
    ),
    "mixing_ratio": Option(
        number_check(lambda x: 0 <= x <= 1, "lie in [0, 1]: 0 is MDLM, 1 is UDLM"),
        "number in [0, 1]",
        "k in Eq. 7: 0 is MDLM, 1 is UDLM. In the confidence sampler it sets the refinement budget, k / (1 - k) edits "
        "per filled token.",
        "sampling",
        "the model's",
    ),
    "sampler": Option(
        choice_check(*SAMPLERS),
        " or ".join(f'`"{name}"`' for name in SAMPLERS),
        "Algorithm 1, or exact reverse diffusion (Eq. 11).",
        "sampling",
        '`"confidence"`; `"ancestral"` for DiT checkpoints',
        "confidence",
        stored_for=("answer", "holes"),
    ),
    "remasking": Option(
        choice_check(*REMASKING),
        " or ".join(f'`"{name}"`' for name in REMASKING),
        "Holes to fill first: those predicted with the highest confidence, or random ones.",
        "sampling",
        '`"low_confidence"`',
        **_CONFIDENCE,
    ),
    "temperature": Option(
        number_check(lambda x: x >= 0, "be 0 or above"),
        "number >= 0",
        "Above 0, tokens are drawn from softmax(logits / temperature); 0 takes the most likely one.",
        "sampling",
        "0; 1 for the ancestral sampler, which always draws",
        released=("confidence",),
    ),
    "top_k": Option(
        check_count, "int >= 1", "Draw from this many most likely tokens.", "sampling", off=(0,), released=()
    ),
    "top_p": Option(
        number_check(lambda x: 0 < x <= 1, "lie in (0, 1]; 1 keeps every token"),
        "number in (0, 1]",
        "Draw from the most likely tokens that together have this probability.",
        "sampling",
        off=(1,),
        released=(),
    ),
    "cfg_scale": Option(
        number_check(lambda x: x >= 0, "be 0 (no guidance) or above"),
        "number >= 0",
        "Classifier-free guidance, uncond + (cfg_scale + 1) (cond - uncond); the prompt of uncond is masked. With "
        "`class_labels`, uncond is the same text with the null class.",
        "sampling",
        value=0.0,
        off=(0,),
        released=("confidence",),
    ),
    "confidence_threshold": Option(
        _FRACTION,
        "number in (0, 1]",
        "A step also fills every hole predicted with at least this confidence. A block ends when it is full, so "
        "`steps` is the maximum.",
        "speed",
        off=(0,),
        of=("parallel_decoding", "threshold"),
        **_FILLING,
    ),
    "confidence_factor": Option(
        number_check(lambda x: x > 0, "be above 0"),
        "number > 0",
        "A step also fills the n most confident holes, n the largest with (n + 1) (1 - n-th confidence) < factor.",
        "speed",
        off=(0,),
        of=("parallel_decoding", "factor"),
        **_FILLING,
    ),
    "early_stop": Option(
        check_boolean,
        "bool",
        "Whether a row is done at its first end-of-text token, once no hole is left before it and a step changed no "
        "token before it.",
        "speed",
        "only if filled tokens cannot change",
        **_UNRELEASED,
    ),
    "use_cache": Option(
        choice_check(*CACHES, False),
        " or ".join(f'`"{name}"`' for name in CACHES),
        '`"prefix"` computes the current block and what follows it, `"dual"` only the block; other keys and values are '
        "those of the last full pass. Faster, and an approximation.",
        "speed",
        off=(False,),
        of=("cache", "mode"),
        **_UNRELEASED,
    ),
    "cache_refresh": Option(
        check_count,
        "int >= 1",
        "Steps from one full pass to the next; 1 is exact.",
        "speed",
        "full passes only at the start of blocks and of polishing",
        of=("cache", "refresh"),
        **_UNRELEASED,
    ),
    "compile": Option(
        choice_check("graphs", False),
        '`"graphs"`',
        "Run the forward passes at fixed shapes and, on a GPU, as CUDA graphs, captured at the first call of a batch "
        "size and length. The tokens are the same; nothing may be drawn at random.",
        "device",
        off=(False,),
        **_UNRELEASED,
    ),
    "refinement": Option(
        choice_check(*REFINEMENTS),
        ", ".join(f'`"{name}"`' for name in REFINEMENTS),
        "Policy that revises filled tokens, see below.",
        "refinement",
        '`"budget"` for k > 0, else `"none"`',
        of=("refinement", "policy"),
        **_UNRELEASED,
    ),
    "edit_threshold": Option(
        _FRACTION,
        "number in (0, 1]",
        'Minimum confidence of an edit by `"threshold"`.',
        "refinement",
        of=("refinement", "threshold"),
        **_UNRELEASED,
    ),
    "remask_rate": Option(
        _FRACTION,
        "number in (0, 1]",
        "Rate of ReMDM's schedules.",
        "refinement",
        of=("refinement", "rate"),
        **_UNRELEASED,
    ),
    "max_edits_per_token": Option(
        check_count,
        "int >= 1",
        "Maximum number of edits of a position, which also never returns to the token just replaced.",
        "refinement",
        of=("refinement", "max_edits_per_token"),
        **_UNRELEASED,
    ),
    "refinement_off_steps": Option(
        check_count,
        "int >= 1",
        "Number of last filling steps in which nothing is revised.",
        "refinement",
        off=(0,),
        of=("refinement", "off_steps"),
        **_FILLING,
    ),
    "polish_steps": Option(
        check_count, "int >= 1", "Steps after filling that only edit.", "refinement", off=(0,), **_FILLING
    ),
    "reference_compat": Option(
        check_boolean,
        "bool",
        "Run the authors' released sampler, to audit published numbers.",
        "audit",
        "False",
        False,
        off=(False,),
        given_for=("answer",),
        **_ANSWERS,
    ),
    "do_sample": Option(
        check_boolean,
        "bool",
        "True draws tokens, at temperature 1 if no other is given; False takes the most likely ones, as temperature 0 "
        "does.",
        "transformers",
        "as `temperature` says",
    ),
    "max_length": Option(
        check_count,
        "int >= 1",
        "Length of prompt, with its padding, and answer together; instead of `max_new_tokens`. Not read from a "
        "checkpoint, where it is the limit of an autoregressive model.",
        "transformers",
        given_for=("answer",),
        stored_for=(),
    ),
    "stop_strings": Option(
        check_strings,
        "str or list of str",
        "An answer ends after the token that completes one of them, as it does after an end-of-text token; pass "
        "`tokenizer=` to `generate`.",
        "transformers",
        off=([], ()),
        released=(),
        given_for=("answer",),
        **_ANSWERS,
    ),
    "json_schema": Option(
        check_schema,
        "dict, or str of JSON",
        "The answer is JSON that is valid by this schema, see below; pass `tokenizer=`. Not read from a checkpoint.",
        "output",
        released=(),
        samplers=("confidence",),
        given_for=("answer",),
        stored_for=(),
    ),
    "suppress_tokens": Option(
        check_token_ids, "list of int", "Tokens that are never predicted.", "output", off=([], ())
    ),
    "num_return_sequences": Option(check_count, "int >= 1", "Answers per prompt.", "output", "1", 1),
    "seed": Option(
        check_integer,
        "int",
        "Seed of the draws, the same on every device.",
        "output",
        "PyTorch's global generator",
    ),
    "return_dict_in_generate": Option(
        check_boolean, "bool", "Return a `DiffusionGenerateOutput`.", "output", "False", False
    ),
    "output_history": Option(
        check_boolean,
        "bool",
        "Keep the sequences of every step, and the confidences of their tokens.",
        "output",
        "False",
        False,
    ),
    "mask_token_id": Option(check_integer, "int", "The mask token.", "tokens", "the model config's"),
    "pad_token_id": Option(
        check_integer, "int", "The padding token.", "tokens", "the model config's, else end-of-text"
    ),
    "bos_token_id": Option(check_integer, "int", "The token that begins a text.", "tokens", "the model config's"),
    "eos_token_id": Option(
        check_token_ids,
        "int or list of int",
        "End-of-text tokens: what follows the first in an answer becomes padding; `[]` keeps everything.",
        "tokens",
        "the model config's",
    ),
}

GROUPS: dict[str, dict[str, str]] = {}  # group -> key -> row
for _name, _row in TABLE.items():
    if _row.of is not None:
        GROUPS.setdefault(_row.of[0], {})[_row.of[1]] = _name
MAIN_KEYS = {"refinement": "policy", "cache": "mode"}  # the key that is set by a plain name
_ABOUT_GROUPS = {
    "parallel_decoding": "Fill additional holes by confidence.",
    "cache": "Reuse keys and values from one step to the next.",
    "refinement": "Policy that revises filled tokens, with its settings.",
}
OPTIONS = tuple(dict.fromkeys(name if row.of is None else row.of[0] for name, row in TABLE.items()))
ACCEPTED = tuple(dict.fromkeys((*OPTIONS, *TABLE)))  # with the names of the settings of groups


def section_names(*sections: str) -> tuple[str, ...]:
    """Names of the options and rows in these sections."""
    rows = [(name, row) for name, row in TABLE.items() if row.section in sections]
    return tuple(dict.fromkeys([*(row.of[0] for _, row in rows if row.of), *(name for name, _ in rows)]))


def markdown_table() -> str:
    """The table in docs/generation.md."""
    lines = ["| option | value | default | off | what it does |", "| --- | --- | --- | --- | --- |"]
    for option in OPTIONS:
        if option in GROUPS:
            keys = ", ".join(f"`{key}`" for key in GROUPS[option])
            lines.append(f"| **`{option}`** | dict of {keys} | | | {_ABOUT_GROUPS[option]} |")
        for key, name in GROUPS.get(option, {"": option}).items():
            row = TABLE[name]
            shown = f"· `{key}` (also `{name}`)" if key else f"**`{name}`**"
            off = ", ".join(f"`{value!r}`" for value in row.off if value != ()) or "`None`"
            only = " Confidence sampler only." if row.samplers == ("confidence",) and not key else ""
            lines.append(f"| {shown} | {row.range} | {row.default} | {off} | {row.about}{only} |")
    return "\n".join(lines)


class Options(make_dataclass("Rows", [(name, Any, None) for name in TABLE], frozen=True)):
    """Resolved options of one call: a field for each row of the table, None if it is off."""

    @property
    def policy(self) -> str:
        """The refinement policy, see `policy`."""
        return policy(self)

    @property
    def end_of_text(self) -> list[int]:
        """`eos_token_id` as a list, empty when there is none."""
        eos = self.eos_token_id
        return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]


def policy(rows: Any) -> str:
    """The refinement policy: the one given, else "budget" for k > 0 and "none" for k = 0."""
    return rows.refinement or ("budget" if rows.mixing_ratio else "none")


def draws(rows: Any) -> bool:
    """Whether generation with these options draws random numbers."""
    return (
        rows.sampler == "ancestral"
        or bool(rows.do_sample if rows.temperature is None else rows.temperature)
        or rows.remasking == "random"
        or rows.refinement in REMDM_POLICIES
    )
