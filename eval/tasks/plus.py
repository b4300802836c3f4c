"""HumanEval+ and MBPP+ (EvalPlus): formats of their rows, and tests of rows that have only inputs.

Rows have the format of the datasets evalplus/humanevalplus and evalplus/mbppplus on the Hub, with a test program, or of
EvalPlus's own files HumanEvalPlus.jsonl and MbppPlus.jsonl, with inputs for answer and canonical solution.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

RELEASE: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution"), str),
    **dict.fromkeys(("base_input", "plus_input"), list),
    "atol": (int, float),
}
"""The fields of EvalPlus's own files."""
# For all calls of the answer and of the canonical solution together. EvalPlus limits each call to the longer of 1 s and
# four times the canonical solution's time, and all calls to 60 s.
SECONDS = 30.0


def form_of(row: dict[str, Any], forms: Mapping[str, Mapping[str, type | tuple[type, ...]]], where: str) -> str:
    """The first of `forms` (types of fields by name) that a row has.

    Raises:
        ValueError: If it has none of the forms, naming for each what the row lacks.
    """
    lacking = {
        form: [repr(name) for name, kind in fields.items() if not isinstance(row.get(name), kind)]
        for form, fields in forms.items()
    }
    for form, names in lacking.items():
        if not names:
            return form
    needs = "; ".join(f"{form}: without {', '.join(names)} of the right type" for form, names in lacking.items())
    raise ValueError(f"{where}: not a row of any known form ({needs})")


def release_test(row: dict[str, Any], benchmark: str, function: str, where: str) -> str:
    """A statement that tests the function named `function`, for a row with the fields of `RELEASE`.

    Raises:
        ValueError: If the row is not of `benchmark` (HumanEval or Mbpp), or an input is not a list.
    """
    if not re.fullmatch(rf"{benchmark}/[0-9]+", row["task_id"]):
        raise ValueError(f"{where}: 'task_id' must be {benchmark}/ and a number, got {row['task_id']!r}")
    if not all(isinstance(given, list) for name in ("base_input", "plus_input") for given in row[name]):
        raise ValueError(f"{where}: every input in 'base_input' and 'plus_input' must be a list of arguments")
    fields = {name: row[name] for name in ("task_id", "entry_point", "base_input", "plus_input", "atol")}
    fields["program"] = row["prompt"] + row["canonical_solution"]
    # As text, because `datasets` cannot store inputs of mixed types.
    module = "xdlm_hf.evaluation.evalplus"
    return f"import {module}; {module}.check_answer({function}, {json.dumps(fields)!r})"
