"""Shared code of the tasks that run programs: extraction from fences, execution, verdicts, and pass@k."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from xdlm_hf.evaluation.sandbox import VERDICTS, Job, Limits, Verdict, run_all

FENCE = re.compile(r"```[\w+-]*\n(.*?)(?:```|$)", re.DOTALL)
PASS_AT = (1, 5, 10, 20, 50, 100)  # those up to the number of samples are reported


def unfenced(text: str) -> str:
    """The first fenced block, if there is one; else the text up to a stray fence."""
    block = FENCE.search(text)
    return block[1] if block else text.split("```")[0]


def execute(
    resps: Sequence[Sequence[str]],
    docs: Sequence[dict],
    job_of: Callable[[dict, str], Job],
    opencompass_seconds: float,
) -> list[list[str]]:
    """Filter for lm-eval: the verdict of every answer of every row, such as "wrong" or "failed: NameError".

    The time limit is the `seconds` of the row; without them, `opencompass_seconds` under `opencompass`, else the
    sandbox's own.
    """
    if not docs:
        return []
    jobs = [job_of(doc, answer) for doc, answers in zip(docs, resps, strict=True) for answer in answers]
    compat = docs[0]["protocol"] == "opencompass"
    seconds = docs[0].get("seconds") or (opencompass_seconds if compat else Limits.seconds)
    verdicts = run_all(jobs, Limits(seconds=seconds))
    if compat:
        verdicts = [own_assertion_is_wrong(verdict) for verdict in verdicts]
    texts = iter([": ".join(filter(None, (verdict.result, verdict.why))) for verdict in verdicts])
    return [[next(texts) for _ in answers] for answers in resps]


def own_assertion_is_wrong(verdict: Verdict) -> Verdict:
    """OpenCompass's rule: every AssertionError is Wrong, also that of the program itself before the tests."""
    own = verdict.result == "failed" and verdict.why.startswith("AssertionError")
    return dataclasses.replace(verdict, result="wrong") if own else verdict


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k samples drawn from n passes when c of the n do: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of pass@k. Source: Chen et al., arXiv 2107.03374, Eq. 1.

    Raises:
        ValueError: Unless 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got k={k} with {c} of n={n} samples right")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def process_results(doc: dict, results: list[list[str]]) -> dict[str, float]:
    """pass@k for the k of `PASS_AT` up to the number of samples, and the other verdicts as shares of the samples.

    `pass_at_1` and the three others sum to 1.
    """
    verdicts = [text.partition(":")[0] for text in results[0]]
    n = len(verdicts)
    shares = {name: verdicts.count(name) / n for name in VERDICTS if name != "pass"}
    return {f"pass_at_{k}": pass_at_k(n, verdicts.count("pass"), k) for k in PASS_AT if k <= n} | shares
