"""EvalPlus's test: answer and canonical solution are called with the same inputs, and their outputs must agree.

It runs inside the sandbox, in the judge's process, which imports it before it restricts its access to files. The rules
of comparison, and the types of MBPP+'s inputs that JSON does not keep, are those of EvalPlus 0.3.1 (Liu et al.,
arXiv 2305.01210). Only the standard library is imported; NumPy is imported when unequal numbers are compared.
"""

import copy
import importlib
import json
import math

SAME_SET = frozenset(
    "similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum intersection_array "
    "find_dissimilar Diff".split()
)
# Functions that may return anything but None where they find something.
FOUND = frozenset("check_str text_match_three text_starta_endb".split())
FLOAT_ATOL = 1e-6  # where the expected output is made of floats and the row asks for no tolerance
RTOL = 1e-7


def check_answer(answer, row):
    """Calls `answer` with every input of a row in JSON, the base inputs first.

    Args:
        answer: The answer's function.
        row: `task_id`, `entry_point`, `program` (prompt and canonical solution), `base_input`, `plus_input`, `atol`.

    Raises:
        AssertionError: If an output is wrong, naming its input.
        RuntimeError: If the canonical solution itself fails, or an input has the wrong form.
        BaseException: Whatever the answer raises.
    """
    row = json.loads(row)
    benchmark, _, number = row["task_id"].partition("/")
    solution = {"__name__": "solution"}  # a namespace of its own: its functions must not call the answer's
    exec(compile(row["program"], "<canonical solution>", "exec"), solution)
    for part in ("base", "plus"):
        atol = row["atol"]
        for i, given in enumerate(row[f"{part}_input"]):
            try:
                arguments = typed(number, given) if benchmark == "Mbpp" else given
                expected = solution[row["entry_point"]](*copy.deepcopy(arguments))
            except Exception as error:
                raise RuntimeError(f"the canonical solution fails on {part} input {i}: {error!r}") from error
            output = answer(*copy.deepcopy(arguments))
            if atol == 0 and is_floats(expected):
                atol = FLOAT_ATOL  # as EvalPlus does, from here on
            right = accepted(benchmark, row["entry_point"], arguments, output, expected, atol)
            assert right, f"{part} input {i}"


def accepted(benchmark, function, arguments, output, expected, atol):
    """Whether an output is right: equal by `==`, within the tolerance, or by a special rule of its function."""
    if benchmark == "HumanEval" and function == "find_zero":
        return abs(sum(c * math.pow(output, i) for i, c in enumerate(arguments[0]))) <= atol
    if benchmark == "Mbpp" and function in FOUND:
        expected = expected is not None
        output = output if isinstance(output, bool) else output is not None
    if benchmark == "Mbpp" and function in SAME_SET:
        same = set(output) == set(expected)
    else:
        same = bool(output == expected)
    if benchmark == "Mbpp" and not same:
        same = other_reading(function, arguments, output, atol)
    return same or (atol != 0 and close(output, expected, atol))


def other_reading(function, arguments, output, atol):
    """Whether an output is right by a second interpretation of MBPP's text, which EvalPlus accepts."""
    if function == "are_equivalent":
        return True
    if function == "sum_div":
        return output == 0
    if function == "surface_Area":  # the height is the pyramid's, not that of its sides
        edge, height = arguments
        return abs(output - round(edge**2 + 2 * edge * math.hypot(edge / 2, height))) <= atol
    if function == "digit_distance_nums":  # digits are compared place by place
        a, b = (str(number) for number in arguments)
        width = max(len(a), len(b))
        return output == sum(abs(int(x) - int(y)) for x, y in zip(a.zfill(width), b.zfill(width), strict=True))
    return False


def close(output, expected, atol):
    """Whether two values of one type and length are equal numbers within the tolerance."""
    if type(output) is not type(expected):
        return False
    if isinstance(expected, list | tuple) and len(output) != len(expected):
        return False
    try:
        return bool(importlib.import_module("numpy").allclose(output, expected, rtol=RTOL, atol=atol))
    except (TypeError, ValueError):  # not numbers, or other shapes
        return False


def is_floats(value):
    """Whether a value is a float, or a list, tuple or array of nothing else."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float) or str(getattr(value, "dtype", "")) in ("float32", "float64")


def typed(number, given):
    """The arguments of one call of an MBPP+ task, with the types that its functions take instead of JSON's lists."""
    convert = _TYPES.get(number)
    return convert(given) if convert else given


def _tuples(value):
    """Nested tuples from nested lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


_TYPES = {
    number: convert
    for numbers, convert in (
        (
            "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809",
            lambda given: [tuple(x) for x in given],
        ),
        (
            "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780",
            lambda given: [[tuple(y) for y in x] for x in given],
        ),
        ("75 413 444 753", lambda given: [[tuple(y) for y in given[0]], *given[1:]]),
        ("106 750", lambda given: [given[0], tuple(given[1])]),
        ("115", lambda given: [[set(y) if isinstance(y, list) and y else {} for y in given[0]]]),
        ("124", lambda given: [float(given[0]), complex(given[1])]),
        ("250 307 405 446 617 720 763 808", lambda given: [tuple(given[0]), *given[1:]]),
        ("252", lambda given: [complex(given[0])]),
        ("259 401 445", lambda given: [tuple(tuple(y) for y in x) for x in given]),
        ("278", lambda given: [tuple(tuple(y) if isinstance(y, list) else y for y in given[0])]),
        ("580 615 791", _tuples),
        ("722", lambda given: [{key: tuple(x) for key, x in given[0].items()}, *given[1:]]),
    )
    for number in numbers.split()
}
