"""Conversion between the user's options, with groups and former names, and rows of the table."""

from collections.abc import Mapping
from typing import Any

from .option_checks import shown
from .options import ACCEPTED, GROUPS, MAIN_KEYS, OPTIONS, TABLE
from .refinement import REMASK_SCHEDULES

# Former names of ReMDM's policies, which are still read.
_OLD_POLICIES = {f"remask_{schedule}": f"remdm_{schedule}" for schedule in REMASK_SCHEDULES}


def canonical(name: str) -> str:
    """Name of a row as an option: `refinement['threshold']` for edit_threshold."""
    of = TABLE[name].of
    if of is None or MAIN_KEYS.get(of[0]) == of[1]:
        return name if of is None else of[0]
    return f"{of[0]}[{of[1]!r}]"


def flatten(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Options as rows of the table, and the name that the user gave to each row.

    A dict sets all rows of its group, to None for missing keys; a plain name sets one row; None sets all to None.

    Raises:
        ValueError: For an unknown option, or a setting that is given twice.
    """
    unknown = {name: value for name, value in given.items() if name not in ACCEPTED}
    if unknown:
        raise ValueError(unknown_options(unknown))
    rows = {name: value for name, value in given.items() if name in TABLE and name not in GROUPS}
    labels = {name: name for name in rows}
    for group, keys in GROUPS.items():
        if group not in given:
            continue
        values = _group_values(group, given[group])
        is_dict = isinstance(given[group], Mapping)
        twice = [row for key, row in keys.items() if row in rows and (is_dict or values.get(key) is not None)]
        if twice:
            raise ValueError(
                f"{twice[0]}={rows[twice[0]]!r} is a setting of {group}={given[group]!r}, which is also given; "
                f"leave out {twice[0]}."
            )
        for key, value in values.items():
            rows.setdefault(keys[key], value)
            labels.setdefault(keys[key], canonical(keys[key]))
    if "refinement" in rows and isinstance(rows["refinement"], str):
        rows["refinement"] = _OLD_POLICIES.get(rows["refinement"], rows["refinement"])
    return rows, labels


def _group_values(group: str, value: Any) -> dict[str, Any]:
    """Values of the keys of a group that is given as a dict, a plain name or None."""
    keys = GROUPS[group]
    if value is None:
        return dict.fromkeys(keys)
    if isinstance(value, Mapping):
        unknown = sorted(str(key) for key in value if key not in keys)
        if unknown:
            raise ValueError(f"{group}={dict(value)!r} has no setting {unknown[0]!r}; settings: {', '.join(keys)}.")
        return {key: value.get(key) for key in keys}
    if group in MAIN_KEYS:
        return {MAIN_KEYS[group]: value}
    raise ValueError(f"{group}={shown(value)} must be a dict with one of {', '.join(map(repr, keys))}.")


def compose(rows: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`: rows as options, a group as a dict, or as a plain name if only its main key is set."""
    options = {name: rows.get(name) for name in OPTIONS if name not in GROUPS}
    for group, keys in GROUPS.items():
        values = {key: rows[row] for key, row in keys.items() if rows.get(row) is not None}
        plain = values[MAIN_KEYS[group]] if group in MAIN_KEYS and list(values) == [MAIN_KEYS[group]] else values
        options[group] = plain if values else None
    return {name: options[name] for name in OPTIONS}


def check_values(rows: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> None:
    """Raise ValueError for a value outside its option's range."""
    for name, value in rows.items():
        if not TABLE[name].is_off(value):
            TABLE[name].check((labels or {}).get(name, canonical(name)), value)


def unknown_options(unknown: Mapping[str, Any]) -> str:
    """The message for options that do not exist, with a remedy if one is known."""
    hints = {
        "gen_length": "use max_new_tokens",
        "inputs": "use input_ids",
        "k1": "use mixing_ratio",
        "num_inference_steps": "use steps",
        "compile_config": "compile='graphs' captures the passes; torch.compile(model.forward) goes with it or without",
        "disable_compile": "nothing is compiled without compile='graphs'",
        "token_type_ids": "call the tokenizer with return_token_type_ids=False",
    }
    named = ", ".join(
        f"{name}={shown(value)}" + (f" ({hints[name]})" if name in hints else "") for name, value in unknown.items()
    )
    return f"generate() has no option {named}. Options: {', '.join(OPTIONS)}."
