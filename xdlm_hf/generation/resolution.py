"""From what a call, a config and a checkpoint say to one set of options: precedence, and what does not go together.

One list of rules serves all: where two options do not go together, what the call chose is refused and what only the
checkpoint stores is switched off.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from ..diffusion.checks import validate_ids
from ..diffusion.process import StationaryProcess
from .cache import check_cache_attention
from .options import REMDM_POLICIES, TABLE, Options, draws, policy
from .protocol import check_cache, check_conditioning, default_mixing_ratio, output_rows
from .spelling import canonical, check_values, flatten

# What a checkpoint's config.json says when no generation config does.
_FROM_MODEL_CONFIG = ("mixing_ratio", "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
_WHAT = {"holes": "holes are", "revision": "a revision is"}


class Rows(SimpleNamespace):
    """Rows of the table while they are settled, with what the user called them."""

    labels: Mapping[str, str] = {}

    def say(self, name: str) -> str:
        return f"{self.labels.get(name, canonical(name))}={getattr(self, name)!r}"


@dataclass(frozen=True)
class Rule:
    """Options that do not go together.

    Args:
        loser: The row that is switched off, or refused if the call chose it.
        broken: Whether the rule is broken; called only where `loser` is on.
        message: Names values and remedy.
        other: The row that is switched off instead, if the call chose `loser` and not this one.
        always: Refuse also what the checkpoint stores.
    """

    loser: str
    broken: Callable[[Any], bool]
    message: Callable[[Any], str]
    other: str | None = None
    always: bool = False


def _unfit_for_sampler(name: str) -> Rule:
    return Rule(
        name,
        lambda o: o.sampler is not None and o.sampler not in TABLE[name].samplers,
        lambda o: f"sampler={o.sampler!r} has no option {o.say(name)}; leave it out.",
    )


def _not_released(name: str) -> Rule:
    return Rule(
        name,
        # The ancestral sampler's own temperature is 1.
        lambda o: (
            bool(o.reference_compat)
            and (o.sampler or "confidence") not in TABLE[name].released
            and getattr(o, name) is not False
            and not (name == "temperature" and o.temperature in (0, 1))
        ),
        lambda o: (
            f"the released sampler, which reference_compat=True reproduces, has no option {o.say(name)}; leave one "
            "of them out."
        ),
    )


def _no_draw(name: str) -> Rule:
    return Rule(
        name,
        lambda o: o.sampler == "confidence" and o.temperature == 0,
        lambda o: (
            f"top_k={o.top_k}, top_p={o.top_p} filter a draw, and temperature=0 draws nothing; set a temperature above "
            "0 or leave them out."
        ),
    )


def _by_chance(name: str) -> Rule:
    return Rule(
        name,
        lambda o: o.remasking == "random",
        lambda o: f"remasking='random' chooses holes by chance, {o.say(name)} by confidence; leave out one of the two.",
        other="remasking",
    )


def _belongs(name: str, policies: tuple[str, ...]) -> tuple[Rule, ...]:
    def lacks(o: Any) -> bool:
        return o.refinement in policies and getattr(o, name) is None

    key = TABLE[name].of[1]
    return (
        Rule(
            name,
            lambda o: o.refinement not in policies,
            lambda o: f"{o.say(name)} belongs to refinement={' or '.join(map(repr, policies))}.",
        ),
        Rule(
            "refinement",
            lacks,
            lambda o: (
                f"refinement={o.refinement!r} needs {name}, a number in (0, 1]: "
                f"refinement={{'policy': {o.refinement!r}, {key!r}: ...}}."
            ),
        ),
    )


def _bounds(name: str, without: tuple[str, ...]) -> Rule:
    return Rule(
        name,
        lambda o: (o.refinement is not None or o.mixing_ratio is not None) and policy(o) in without,
        lambda o: (
            f"{o.say(name)} bounds a refinement, and there is none to bound with mixing_ratio={o.mixing_ratio} and "
            f"refinement={o.refinement!r}; leave it out."
        ),
    )


RULES: tuple[Rule, ...] = (
    *(_unfit_for_sampler(name) for name, row in TABLE.items() if len(row.samplers) < 2),
    *(_not_released(name) for name, row in TABLE.items() if len(row.released) < 2 and name != "block_length"),
    Rule(
        "temperature",
        lambda o: o.sampler == "ancestral" and o.temperature == 0,
        lambda o: f"{o.say('temperature')} must be positive for sampler='ancestral', which draws; leave it out.",
    ),
    Rule(
        "remasking",
        lambda o: bool(o.reference_compat) and o.remasking == "random" and bool(o.mixing_ratio),
        lambda o: (
            f"remasking='random' with mixing_ratio={o.mixing_ratio}: the released sampler, which "
            "reference_compat=True reproduces, ends with an error there, because its edits need confidences. Leave out "
            "reference_compat or remasking, or set mixing_ratio=0."
        ),
    ),
    Rule(
        "reference_compat",
        lambda o: o.sampler == "confidence" and o.mixing_ratio == 1,
        lambda _: (
            "mixing_ratio=1 has no released sampler to reproduce: its edit budget k / (1 - k) divides by 0. Leave out "
            "reference_compat, or use sampler='ancestral'."
        ),
        always=True,
    ),
    _no_draw("top_k"),
    _no_draw("top_p"),
    _by_chance("confidence_threshold"),
    _by_chance("confidence_factor"),
    Rule(
        "cache_refresh",
        lambda o: o.use_cache is None,
        lambda o: f"{o.say('cache_refresh')} refreshes no cache; add use_cache='prefix' or 'dual'.",
    ),
    Rule(
        "refinement",
        lambda o: o.refinement == "budget" and o.mixing_ratio == 0,
        lambda _: "refinement='budget' allows k / (1 - k) edits, none at mixing_ratio=0; pass a larger one.",
    ),
    *_belongs("edit_threshold", ("threshold",)),
    *_belongs("remask_rate", REMDM_POLICIES),
    _bounds("max_edits_per_token", ("none", *REMDM_POLICIES)),
    _bounds("refinement_off_steps", ("none",)),
    Rule(
        "polish_steps",
        lambda o: o.refinement in ("none", *REMDM_POLICIES),
        lambda o: f"{o.say('polish_steps')} only edit, and refinement={o.refinement!r} edits nothing.",
    ),
    Rule(
        "polish_steps",
        lambda o: o.refinement is None and o.mixing_ratio == 0,
        lambda o: (
            f"{o.say('polish_steps')} only edit, and mixing_ratio=0 edits nothing; pass mixing_ratio, or "
            "refinement='threshold' with edit_threshold."
        ),
    ),
)


def settle(rows: Rows, chosen: Collection[str]) -> None:
    """Switch off what the checkpoint stores and what the call chose contradicts.

    Raises:
        ValueError: If what the call chose contradicts itself or the model.
    """
    for rule in RULES:
        if TABLE[rule.loser].is_off(getattr(rows, rule.loser)) or not rule.broken(rows):
            continue
        if rule.loser not in chosen and not rule.always:
            setattr(rows, rule.loser, None)
        elif rule.other is not None and rule.other not in chosen:
            setattr(rows, rule.other, None)
        else:
            raise ValueError(rule.message(rows))


def check_options(values: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    """Raise ValueError for options, as `flatten` gives them, that are wrong whatever the model."""
    check_values(values, labels)
    on = {name: value for name, value in values.items() if not TABLE[name].is_off(value)}
    settle(Rows(**dict.fromkeys(TABLE) | on, labels=labels), TABLE)


def merged(*sources: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[int]]:
    """Rows of several sources, the first that says something, also None, winning: values, labels, and by which."""
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    by: dict[str, int] = {}
    for number, source in enumerate(sources):
        rows, names = flatten(source)
        for name, value in rows.items():
            if name not in values:
                values[name], labels[name], by[name] = value, names[name], number
    return values, labels, by


def stored_under(config: Any, call: Mapping[str, Any]) -> SimpleNamespace:
    """What is in force with these options in a call over a generation config, but for defaults and conflicts."""
    values, _, _ = merged(call, config.given())
    return SimpleNamespace(**dict.fromkeys(TABLE) | values)


def draws_with(config: Any, call: Mapping[str, Any]) -> bool:
    """Whether a call with these options over a generation config draws random numbers."""
    return draws(stored_under(config, call))


def resolve(
    model: Any, given: Any, call: Mapping[str, Any], generator: torch.Generator | None = None, task: str = "answer"
) -> Options:
    """Options of one call: its keywords over the config given, over the model's, over the defaults; then checked.

    Args:
        model: Has `config` and `generation_config`.
        given: An `XDLMGenerationConfig`, or None.
        call: Keywords; None and an "off" value switch off what the configs say.
        generator: The caller's, which takes the place of a seed.
        task: "answer", "holes" or "revision"; some of what a checkpoint stores is about answers alone.

    Raises:
        ValueError: Names the value and the remedy.
    """
    if given is not None and not hasattr(given, "given"):
        raise ValueError(f"generation_config must be an XDLMGenerationConfig, not {type(given).__name__}.")
    stored, _ = flatten(model.generation_config.given())
    stored = {name: value for name, value in stored.items() if task in TABLE[name].stored_for}
    values, labels, by = merged(call, {} if given is None else given.given(), stored)
    check_values(values, labels)
    on = {name: value for name, value in values.items() if not TABLE[name].is_off(value)}
    chosen = {name for name in on if by[name] < 2}
    defaults = {name: row.value for name, row in TABLE.items()}
    defaults |= {name: getattr(model.config, name, None) for name in _FROM_MODEL_CONFIG}
    defaults["mixing_ratio"] = default_mixing_ratio(model.config)
    rows = Rows(**defaults | on, labels={name: labels[name] for name in chosen})
    _refuse_unfit(rows, chosen, task)
    if rows.temperature is None:
        rows.temperature = 1.0 if rows.sampler == "ancestral" else 0.0
    if generator is not None and "seed" not in chosen:
        rows.seed = None
    settle(rows, chosen)
    # What the rules switched off has its default again.
    final = {name: defaults[name] if getattr(rows, name) is None else getattr(rows, name) for name in TABLE}
    if final["temperature"] is None:
        final["temperature"] = 1.0 if final["sampler"] == "ancestral" else 0.0
    options = Options(**{name: copy.copy(value) for name, value in final.items()})
    if options.pad_token_id is None:
        options = replace(options, pad_token_id=next(iter(options.end_of_text), None))
    _check_against_model(model, options)
    # The released samplers do not pad what follows end-of-text.
    return replace(options, eos_token_id=[]) if options.reference_compat else options


def _refuse_unfit(rows: Rows, chosen: Collection[str], task: str) -> None:
    """Options about an answer or about filling, where there is none."""
    for name in TABLE:
        if name not in chosen or task in TABLE[name].given_for:
            continue
        if name == "max_new_tokens":
            reason = f"{_WHAT[task]} about the text given, nothing is added; leave it out"
        elif name == "reference_compat":
            reason = f"the released sampler knows only answers, and {_WHAT[task]} about a text; leave it out"
        else:
            raise ValueError(f"{rows.say(name)} is about filling holes, and a revision fills none; leave it out.")
        raise ValueError(f"{rows.say(name)}: {reason}.")


def _check_against_model(model: Any, options: Options) -> None:
    """Raise ValueError for options that this model cannot do."""
    if options.sampler == "confidence" and options.mask_token_id is None:
        raise ValueError(
            "sampler='confidence' needs a mask token, and neither the model config nor the call gives "
            "mask_token_id; for a uniform-noise model (k = 1) use sampler='ancestral'."
        )
    if options.cfg_scale and options.mask_token_id is None:
        raise ValueError(f"cfg_scale={options.cfg_scale} masks the prompt and needs a mask_token_id.")
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
    if options.sampler == "ancestral" and options.mixing_ratio:
        process = model.noise_process()
        if not isinstance(process, StationaryProcess):
            raise ValueError(
                f"mixing_ratio={options.mixing_ratio}: the noise of {process!r} changes with time and has no k; leave "
                "it out."
            )
    if options.use_cache:
        check_cache(model, options.use_cache)
        check_cache_attention(model.config._attn_implementation)
        if model.training and model.is_gradient_checkpointing:
            raise ValueError(
                f"use_cache={options.use_cache!r}: gradient checkpointing keeps no cache in training mode; call "
                "model.eval() first."
            )
    rows = output_rows(model.config)
    for name in ("mask_token_id", "pad_token_id"):
        if getattr(options, name) is not None:
            validate_ids(name, torch.tensor([getattr(options, name)]), rows)
    if options.pad_token_id is not None and options.pad_token_id == options.mask_token_id:
        raise ValueError(f"pad_token_id={options.pad_token_id} is the mask token, which no answer may hold.")
    if options.suppress_tokens:
        validate_ids("suppress_tokens", torch.tensor(options.suppress_tokens), rows)
        if len({options.mask_token_id, *options.suppress_tokens} - {None}) == rows:
            raise ValueError(f"suppress_tokens leaves none of the {rows} tokens to predict; suppress fewer.")
