"""The scores of the paper's Table 16, and a Markdown table of measured scores beside them."""

from collections.abc import Sequence
from typing import Any

BENCHMARKS = ("bbh", "gsm8k", "math", "humaneval", "mbpp")
MBPP_COUNTS = ("failed", "wrong", "pass")
_COLUMNS = (*BENCHMARKS, *(f"mbpp {name}" for name in MBPP_COUNTS))

# (row, steps): percent of BBH, GSM8K, MATH, HumanEval, MBPP; then MBPP's 500 problems as Failed, Wrong, Pass. These
# three do not always sum to 500: the evaluation behind them counts time-outs apart, and the paper leaves them out.
_TABLE = """
llada             32  42.68 24.49  4.80  5.49  6.80 429  37  34
llada-xdlm-infer  32  41.74 24.26  4.86  1.22  5.40 438  35  27
llada-mdlm        32  43.21 24.41  2.70  6.71  4.40 447  31  22
llada-xdlm        32  42.76 29.26  4.72 10.98 15.00 304 121  75
llada             64  47.16 57.16 16.10 12.80 17.80 328  83  89
llada-xdlm-infer  64  46.76 53.75 16.12  4.88 17.60 328  84  88
llada-mdlm        64  48.32 54.97 13.42 14.63 13.40 348  84  67
llada-xdlm        64  45.61 57.85 16.48 15.85 23.60 197 182 118
llada            128  47.49 67.93 26.12 24.39 27.60 161 199 138
llada-xdlm-infer 128  47.89 66.41 26.70  8.54 27.40 187 174 137
llada-mdlm       128  48.95 68.61 24.34 25.00 30.00 169 178 150
llada-xdlm       128  46.41 68.01 25.06 25.00 30.80 130 215 154
llada            256  47.77 72.25 29.98 33.54 40.40  48 248 202
llada-xdlm-infer 256  47.93 71.34 29.34  6.71 37.00  74 238 185
llada-mdlm       256  49.84 72.93 29.70 32.32 37.60  51 260 188
llada-xdlm       256  46.07 73.16 29.22 31.71 34.60  90 236 173
"""


def _parse(line: str) -> tuple[tuple[str, int], dict[str, float]]:
    row, steps, *values = line.split()
    return (row, int(steps)), dict(zip(_COLUMNS, map(float, values), strict=True))


PUBLISHED: dict[tuple[str, int], dict[str, float]] = dict(map(_parse, _TABLE.strip().splitlines()))


def scores_of(manifest: dict[str, Any]) -> dict[str, float]:
    """A manifest's scores under the names of the table, in percent; MBPP's counts as numbers of problems."""
    results = {**manifest["scores"], **manifest["groups"]}
    scores = {}
    for name in ("bbh", "gsm8k", "math"):
        if f"xdlm_{name}" in results:
            scores[name] = 100 * results[f"xdlm_{name}"]["exact_match,none"]
    for name in ("humaneval", "mbpp"):
        if f"xdlm_{name}" in results:
            scores[name] = 100 * results[f"xdlm_{name}"]["pass_at_1,executed"]
    items = manifest["items"].get("xdlm_mbpp", [])
    if items:
        counts = {name: sum(item["pass_at_1" if name == "pass" else name] for item in items) for name in MBPP_COUNTS}
        scores |= {f"mbpp {name}": count for name, count in counts.items()}
    return scores


def markdown_table(manifests: Sequence[dict[str, Any]]) -> str:
    """One line for every run, each score as "ours / published"."""
    heads = ("steps", "row", "items", *(f"{name} {'count' if ' ' in name else '%'}" for name in _COLUMNS))
    lines = ["Ours / published (Table 16 of arXiv 2602.01362).", "", _line(heads), _line(["---:"] * len(heads))]
    for manifest in sorted(manifests, key=lambda m: (m["steps"], m["row"], m["reference_compat"])):
        ours = scores_of(manifest)
        published = PUBLISHED.get((manifest["row"], manifest["steps"]), {})
        # A manifest without a protocol was written by a version that had only one.
        protocol = manifest.get("protocol", "no protocol named")
        notes = [protocol] * (protocol != "opencompass") + ["reference_compat"] * manifest["reference_compat"]
        row = manifest["row"] + (f" ({', '.join(notes)})" if notes else "")
        limited = any(run["limit"] is not None for run in manifest["runs"].values())
        count = str(sum(map(len, manifest["items"].values()))) + (" (limited)" if limited else "")
        cells = [f"{_show(ours.get(name), name)} / {_show(published.get(name), name)}" for name in _COLUMNS]
        lines.append(_line([str(manifest["steps"]), row, count, *cells]))
    return "\n".join(lines) + "\n"


def _show(value: float | None, name: str) -> str:
    return "-" if value is None else f"{value:.0f}" if " " in name else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
