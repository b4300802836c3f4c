"""Checks of the values of options: each raises ValueError that names the option and the value."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from .json_schema import expression

_LARGEST = 2**31 - 1
Check = Callable[[str, Any], None]


def shown(value: Any) -> str:
    """A value for an error message: its repr, shortened if it is long, as that of a tokenizer or a tensor is."""
    text = repr(value)
    if len(text) <= 120 and "\n" not in text:
        return text
    return f"<{type(value).__name__} of {len(text)} characters>" if isinstance(value, str) else f"<{_kind(value)}>"


def _kind(value: Any) -> str:
    sized = isinstance(value, list | tuple | dict | set)
    return type(value).__name__ + (f" of {len(value)} elements" if sized else "")


def check_count(label: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{label}={shown(value)} must be a positive integer.")
    if value > _LARGEST:
        raise ValueError(f"{label}={value!r} must be at most {_LARGEST}.")


def check_integer(label: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{label}={shown(value)} must be an integer.")


def check_boolean(label: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{label}={shown(value)} must be True or False.")


def check_token_ids(label: str, value: Any) -> None:
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(token_id, Integral) and not isinstance(token_id, bool) for token_id in ids):
        raise ValueError(f"{label}={shown(value)} must be an integer or a list of integers.")


def check_strings(label: str, value: Any) -> None:
    strings = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"{label}={shown(value)} must be a string or a list of strings, none of them empty.")


def check_schema(label: str, value: Any) -> None:
    try:
        expression(value)
    except ValueError as error:
        raise ValueError(f"{label} {error}.") from error


def number_check(inside: Callable[[float], bool], range_: str) -> Check:
    def check(label: str, value: Any) -> None:
        if isinstance(value, bool) or not (isinstance(value, Real) and _is_finite(value)):
            raise ValueError(f"{label}={shown(value)} must be a finite number.")
        if not inside(value):
            raise ValueError(f"{label}={value} must {range_}.")

    return check


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def choice_check(*choices: Any) -> Check:
    def check(label: str, value: Any) -> None:
        if value not in choices:
            raise ValueError(f"{label}={shown(value)} is not known; choose one of {list(choices)}.")

    return check
