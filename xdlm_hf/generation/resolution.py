"""Resolution of the options of call, config and checkpoint: precedence and conflicts.

`RULES` lists the conflicts. An option in conflict is refused if the call or its config set it, and switched off if only
the checkpoint stores it.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from transformers.generation import GenerationConfig

from ..diffusion.checks import validate_ids
from .cache import check_cache_attention
from .graphs import check_capture
from .option_checks import shown
from .options import REMDM_POLICIES, TABLE, Options, draws, policy
from .protocol import check_cache, check_conditioning, default_mixing_ratio, output_rows
from .spelling import canonical, check_values, flatten

# Options whose default is the field of the same name in the model's config.json.
_FROM_MODEL_CONFIG = ("mixing_ratio", "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")


class DraftOptions(SimpleNamespace):
    """Options that are being resolved, and the names under which the user gave them."""

    labels: Mapping[str, str] = {}

    def assignment(self, name: str) -> str:
        """`name=value` as the user wrote it, for messages."""
        return f"{self.labels.get(name, canonical(name))}={shown(getattr(self, name))}"


@dataclass(frozen=True)
class Rule:
    """A conflict of an option with others.

    Args:
        option: The row that is refused or switched off.
        conflicts: Whether there is a conflict; called only if `option` is on.
        message: The error message.
        instead: The row to switch off instead, if only the checkpoint stores it.
        refuse_stored: Whether to refuse the option also if only the checkpoint stores it.
    """

    option: str
    conflicts: Callable[[Any], bool]
    message: Callable[[Any], str]
    instead: str | None = None
    refuse_stored: bool = False


def _not_in_sampler(name: str) -> Rule:
    return Rule(
        name,
        lambda o: o.sampler is not None and o.sampler not in TABLE[name].samplers,
        lambda o: f"sampler={o.sampler!r} has no option {o.assignment(name)}; leave it out.",
    )


def _not_released(name: str) -> Rule:
    return Rule(
        name,
        # Temperature 1 is the default of the ancestral sampler.
        lambda o: (
            bool(o.reference_compat)
            and (o.sampler or "confidence") not in TABLE[name].released
            and getattr(o, name) is not False
            and not (name == "temperature" and o.temperature in (0, 1))
        ),
        lambda o: (
            f"the released sampler, which reference_compat=True reproduces, has no option {o.assignment(name)}; leave "
            "out one of them."
        ),
    )


def _needs_sampling(name: str) -> Rule:
    return Rule(
        name,
        lambda o: o.sampler == "confidence" and (o.temperature == 0 or o.do_sample is False),
        lambda o: (
            f"top_k={o.top_k}, top_p={o.top_p} need sampling, but "
            f"{'do_sample=False' if o.do_sample is False else 'temperature=0'} is greedy; set a temperature above 0 or "
            "leave them out."
        ),
    )


def _needs_confidence_order(name: str) -> Rule:
    return Rule(
        name,
        lambda o: o.remasking == "random",
        lambda o: (
            f"remasking='random' chooses holes at random, {o.assignment(name)} by confidence; leave out one of them."
        ),
        instead="remasking",
    )


def _policy_setting(name: str, policies: tuple[str, ...]) -> tuple[Rule, ...]:
    """Rules for a required setting of some refinement policies."""
    key = TABLE[name].of[1]
    return (
        Rule(
            name,
            lambda o: o.refinement not in policies,
            lambda o: (
                f"{o.assignment(name)} is a setting of refinement={' or '.join(map(repr, policies))}; add it or leave "
                "the setting out."
            ),
        ),
        Rule(
            "refinement",
            lambda o: o.refinement in policies and getattr(o, name) is None,
            lambda o: (
                f"refinement={o.refinement!r} needs {name}, a number in (0, 1]: "
                f"refinement={{'policy': {o.refinement!r}, {key!r}: ...}}."
            ),
        ),
    )


def _needs_refinement(name: str, without: tuple[str, ...]) -> Rule:
    return Rule(
        name,
        lambda o: (o.refinement is not None or o.mixing_ratio is not None) and policy(o) in without,
        lambda o: (
            f"{o.assignment(name)} has no effect with mixing_ratio={o.mixing_ratio} and refinement={o.refinement!r}; "
            "leave it out."
        ),
    )


def _not_with_schema(name: str, reason: str) -> Rule:
    return Rule(
        name,
        lambda o: o.json_schema is not None,
        lambda o: f"{o.assignment(name)} {reason}, so it does not go with json_schema; leave out one of them.",
    )


def _drawing(rows: DraftOptions) -> str:
    """The row because of which the confidence sampler draws random numbers."""
    return "temperature" if rows.temperature else "remasking" if rows.remasking == "random" else "refinement"


RULES: tuple[Rule, ...] = (
    *(_not_in_sampler(name) for name, row in TABLE.items() if len(row.samplers) < 2),
    *(_not_released(name) for name, row in TABLE.items() if len(row.released) < 2 and name != "block_length"),
    Rule(
        "do_sample",
        lambda o: o.do_sample is False and o.sampler == "ancestral",
        lambda _: "sampler='ancestral' always draws; leave out do_sample=False, or use sampler='confidence'.",
    ),
    Rule(
        "do_sample",
        lambda o: o.temperature is not None and o.do_sample != bool(o.temperature > 0),
        lambda o: (
            f"do_sample={o.do_sample} {'draws tokens' if o.do_sample else 'takes the most likely tokens'}, but "
            f"temperature={o.temperature} {'draws them' if o.temperature else 'takes the most likely ones'}; leave out "
            "one of them."
        ),
        instead="temperature",
    ),
    Rule(
        "temperature",
        lambda o: o.sampler == "ancestral" and o.temperature == 0,
        lambda o: f"{o.assignment('temperature')} must be positive for sampler='ancestral'; leave it out.",
    ),
    Rule(
        "remasking",
        lambda o: bool(o.reference_compat) and o.remasking == "random" and bool(o.mixing_ratio),
        lambda o: (
            f"remasking='random' with mixing_ratio={o.mixing_ratio} raises an error in the released sampler, which "
            "reference_compat=True reproduces. Leave out reference_compat or remasking, or set mixing_ratio=0."
        ),
    ),
    Rule(
        "reference_compat",
        lambda o: o.sampler == "confidence" and o.mixing_ratio == 1,
        lambda _: (
            "reference_compat=True with mixing_ratio=1: the released edit budget k / (1 - k) divides by 0. Leave out "
            "reference_compat, or use sampler='ancestral'."
        ),
        refuse_stored=True,
    ),
    _needs_sampling("top_k"),
    _needs_sampling("top_p"),
    _needs_confidence_order("confidence_threshold"),
    _needs_confidence_order("confidence_factor"),
    Rule(
        "compile",
        lambda o: o.sampler != "ancestral" and draws(o),
        lambda o: (
            f"compile={o.compile!r} pads the passes to fixed shapes, so that a seed would give other draws, and "
            f"{o.assignment(_drawing(o))} draws; leave out one of them."
        ),
    ),
    _not_with_schema("block_length", "does not predict the whole answer in each step"),
    _not_with_schema("use_cache", "does not recompute the whole answer in each step"),
    _not_with_schema("compile", "pads the positions of a step"),
    _not_with_schema("top_k", "may exclude all tokens that continue the answer's JSON"),
    _not_with_schema("top_p", "may exclude all tokens that continue the answer's JSON"),
    _not_with_schema("stop_strings", "may cut the answer"),
    Rule(
        "cache_refresh",
        lambda o: o.use_cache is None,
        lambda o: f"{o.assignment('cache_refresh')} needs a cache; add use_cache='prefix' or 'dual'.",
    ),
    Rule(
        "refinement",
        lambda o: o.refinement == "budget" and o.mixing_ratio == 0,
        lambda _: "refinement='budget' allows no edits at mixing_ratio=0; pass a larger mixing_ratio.",
    ),
    *_policy_setting("edit_threshold", ("threshold",)),
    *_policy_setting("remask_rate", REMDM_POLICIES),
    _needs_refinement("max_edits_per_token", ("none", *REMDM_POLICIES)),
    _needs_refinement("refinement_off_steps", ("none",)),
    Rule(
        "polish_steps",
        lambda o: o.refinement in ("none", *REMDM_POLICIES),
        lambda o: (
            f"{o.assignment('polish_steps')} only edit, but refinement={o.refinement!r} does not edit; leave one out."
        ),
    ),
    Rule(
        "polish_steps",
        lambda o: o.refinement is None and o.mixing_ratio == 0,
        lambda o: (
            f"{o.assignment('polish_steps')} only edit, but mixing_ratio=0 does not edit; pass mixing_ratio, or "
            "refinement='threshold' with edit_threshold."
        ),
    ),
)


def resolve_conflicts(rows: DraftOptions, chosen: Collection[str]) -> None:
    """Apply `RULES`: switch off conflicting rows that are not in `chosen`.

    Raises:
        ValueError: If a conflicting row is in `chosen`.
    """
    for rule in RULES:
        if TABLE[rule.option].is_off(getattr(rows, rule.option)) or not rule.conflicts(rows):
            continue
        if rule.option not in chosen and not rule.refuse_stored:
            setattr(rows, rule.option, None)
        elif rule.instead is not None and rule.instead not in chosen:
            setattr(rows, rule.instead, None)
        else:
            raise ValueError(rule.message(rows))


def check_options(values: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    """Raise ValueError for options, as `flatten` returns them, that are invalid for every model."""
    check_values(values, labels)
    on = {name: value for name, value in values.items() if not TABLE[name].is_off(value)}
    _choose_length(on, dict.fromkeys(on, 0))
    resolve_conflicts(DraftOptions(**dict.fromkeys(TABLE) | on, labels=labels), TABLE)


def _choose_length(on: dict[str, Any], source_of: Mapping[str, int]) -> None:
    """Of `max_length` and `max_new_tokens`, remove the one whose source gives way to the other's.

    Raises:
        ValueError: If one source gives both.
    """
    if not {"max_length", "max_new_tokens"} <= set(on):
        return
    if source_of["max_length"] == source_of["max_new_tokens"]:
        raise ValueError(
            f"max_length={on['max_length']} and max_new_tokens={on['max_new_tokens']} both set the length of the "
            "answer; leave out one of them."
        )
    on.pop(max(("max_length", "max_new_tokens"), key=source_of.__getitem__))


def _given_options(given: Any) -> dict[str, Any]:
    """The options that a generation config sets, Transformers' own `GenerationConfig` included.

    Raises:
        ValueError: If it is no generation config.
    """
    if given is None:
        return {}
    if hasattr(given, "given"):
        return given.given()
    if not isinstance(given, GenerationConfig):
        raise ValueError(f"generation_config must be an XDLMGenerationConfig, not {type(given).__name__}.")
    set_values = {name: value for name, value in given.to_diff_dict().items() if value is not None}
    return {name: value for name, value in set_values.items() if name[0] != "_" and name != "transformers_version"}


def merged(*sources: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[int]]:
    """Rows of several sources, of which the first that has a row wins, also with None.

    Returns:
        The values, the user's names of the rows, and the index of the source of each row.
    """
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    source_of: dict[str, int] = {}
    for number, source in enumerate(sources):
        rows, names = flatten(source)
        for name, value in rows.items():
            if name not in values:
                values[name], labels[name], source_of[name] = value, names[name], number
    return values, labels, source_of


def draws_with(config: Any, call: Mapping[str, Any]) -> bool:
    """Whether a call with these options over a generation config draws random numbers."""
    values, _, _ = merged(call, config.given())
    return draws(SimpleNamespace(**dict.fromkeys(TABLE) | values))


def resolve(
    model: Any, given: Any, call: Mapping[str, Any], generator: torch.Generator | None = None, task: str = "answer"
) -> Options:
    """Options of one call. Its keywords win over the config given, that over the model's, that over the defaults.

    Args:
        model: Has `config` and `generation_config`.
        given: An `XDLMGenerationConfig`, or a `GenerationConfig` of Transformers whose options exist here, or None.
        call: Keywords; None or an "off" value switches off a stored option.
        generator: The caller's generator, which replaces a stored seed.
        task: "answer", "holes" or "revision"; some stored options apply to answers only.

    Raises:
        ValueError: Names the value and the remedy.
    """
    stored, _ = flatten(model.generation_config.given())
    stored = {name: value for name, value in stored.items() if task in TABLE[name].stored_for}
    values, labels, source_of = merged(call, _given_options(given), stored)
    check_values(values, labels)
    on = {name: value for name, value in values.items() if not TABLE[name].is_off(value)}
    _choose_length(on, source_of)
    chosen = {name for name in on if source_of[name] < 2}
    defaults = {name: row.value for name, row in TABLE.items()}
    defaults |= {name: getattr(model.config, name, None) for name in _FROM_MODEL_CONFIG}
    defaults["mixing_ratio"] = default_mixing_ratio(model.config)
    rows = DraftOptions(**defaults | on, labels={name: labels[name] for name in chosen})
    _check_task(rows, chosen, task)
    if rows.temperature is None:
        rows.temperature = _default_temperature(rows.sampler, rows.do_sample)
    if generator is not None and "seed" not in chosen:
        rows.seed = None
    resolve_conflicts(rows, chosen)
    # Rows that the rules switched off get their defaults.
    final = {name: defaults[name] if getattr(rows, name) is None else getattr(rows, name) for name in TABLE}
    if final["temperature"] is None:
        final["temperature"] = _default_temperature(final["sampler"], final["do_sample"])
    options = Options(**{name: copy.copy(value) for name, value in final.items()})
    if options.pad_token_id is None:
        options = replace(options, pad_token_id=next(iter(options.end_of_text), None))
    _check_against_model(model, options)
    # The released samplers do not pad what follows end-of-text.
    return replace(options, eos_token_id=[]) if options.reference_compat else options


def _default_temperature(sampler: str, do_sample: bool | None) -> float:
    return 1.0 if sampler == "ancestral" or do_sample else 0.0


def _check_task(rows: DraftOptions, chosen: Collection[str], task: str) -> None:
    """Refuse options that do not apply to the task."""
    for name in TABLE:
        if name in chosen and task not in TABLE[name].given_for:
            without = "a revision" if task == "revision" else "generation with holes"
            raise ValueError(f"{rows.assignment(name)} does not apply to {without}; leave it out.")


def _check_against_model(model: Any, options: Options) -> None:
    """Raise ValueError for options that this model does not support."""
    if options.sampler == "confidence" and options.mask_token_id is None:
        raise ValueError(
            "sampler='confidence' needs a mask token, and neither the model config nor the call gives "
            "mask_token_id; for a uniform-noise model (k = 1) use sampler='ancestral'."
        )
    if options.cfg_scale and options.mask_token_id is None and model.num_classes is None:
        raise ValueError(f"cfg_scale={options.cfg_scale} masks the prompt; pass mask_token_id.")
    check_conditioning(
        model,
        ("timesteps",) if options.sampler == "ancestral" and not options.reference_compat else (),
        f"generation with sampler={options.sampler!r}"
        + (", reference_compat=True" if options.reference_compat else ""),
    )
    if options.sampler == "ancestral" and model.attention != "full":
        raise ValueError(
            f"sampler='ancestral' denoises all positions at once, and {type(model).__name__} has "
            f"attention={model.attention!r}; use sampler='confidence' with the block_length of its training."
        )
    if options.json_schema is not None and model.attention != "full":
        raise ValueError(
            f"json_schema decodes the whole answer at once, and {type(model).__name__} has "
            f"attention={model.attention!r}; leave it out."
        )
    if options.compile:
        check_capture(model)
    if options.use_cache:
        check_cache(model, options.use_cache)
        check_cache_attention(model.config._attn_implementation)
        if model.training and model.is_gradient_checkpointing:
            raise ValueError(
                f"use_cache={options.use_cache!r} does not work with gradient checkpointing in training mode; call "
                "model.eval() first."
            )
    rows = output_rows(model.config)
    for name in ("mask_token_id", "pad_token_id"):
        if getattr(options, name) is not None:
            validate_ids(name, torch.tensor([getattr(options, name)]), rows)
    if options.pad_token_id is not None and options.pad_token_id == options.mask_token_id:
        raise ValueError(f"pad_token_id={options.pad_token_id} is the mask token; pass another pad_token_id.")
    if options.suppress_tokens:
        validate_ids("suppress_tokens", torch.tensor(options.suppress_tokens), rows)
        if len({options.mask_token_id, *options.suppress_tokens} - {None}) == rows:
            raise ValueError(f"suppress_tokens excludes all {rows} tokens; suppress fewer.")
