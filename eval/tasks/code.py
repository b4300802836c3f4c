"""What the tasks that run programs share: fences, running, and the four counts."""

import re
from collections.abc import Callable, Sequence

from xdlm_hf.evaluation.sandbox import VERDICTS, Job, run_all

FENCE = re.compile(r"```[\w+-]*\n(.*?)(?:```|$)", re.DOTALL)


def unfenced(text: str) -> str:
    """The first fenced block, if there is one; else the text up to a stray fence."""
    block = FENCE.search(text)
    return block[1] if block else text.split("```")[0]


def execute(
    resps: Sequence[Sequence[str]], docs: Sequence[dict], job_of: Callable[[dict, str], Job]
) -> list[list[str]]:
    """lm-eval's filter: for every answer of every row, its verdict and why, such as "wrong" or "failed: NameError"."""
    jobs = [job_of(doc, answer) for doc, answers in zip(docs, resps, strict=True) for answer in answers]
    texts = iter([": ".join(filter(None, (verdict.result, verdict.why))) for verdict in run_all(jobs)])
    return [[next(texts) for _ in answers] for answers in resps]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Which of the four it was, 1.0 or 0.0 each; they sum to 1."""
    verdict = results[0].partition(":")[0]
    counts = {name: float(verdict == name) for name in VERDICTS}
    return {"pass_at_1": counts.pop("pass"), **counts}
