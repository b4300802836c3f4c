"""Equality of two LaTeX answers by one of two rules, computed in a process with limits of time and memory.

- `equivalent`: the same text or, by sympy, symbolically equal. lm-eval's own comparison is not used, for two reasons.
  It lets sympy parse a prefix of the answer, so that "0,5" is read as 0 and equals "0,1"; here every part of a list is
  compared and must be parsed whole. And it limits the time with an alarm, which cannot interrupt one long operation on
  integers (`9^{9^{9}}`), and does not limit the memory.
- `verified`: math-verify's extraction and comparison with the settings of OpenCompass's `MATHVerifyEvaluator`.

Each rule has a worker process, started when first needed and replaced when it does not reply. No answer raises: one
that cannot be parsed, or exceeds the limits, is not equal.
"""

import atexit
import contextlib
import ctypes
import json
import logging
import resource
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

SECONDS = 5.0  # for one comparison, as lm-eval allows
VERIFY_SECONDS = 20.0  # math-verify itself allows 5 s each to read the gold, to read the answer and to compare them
_START_SECONDS = 120.0
_MEMORY = 2 * 2**30
_workers: dict[str, subprocess.Popen] = {}


def equivalent(answer: str, gold: str, seconds: float = SECONDS) -> bool:
    """Whether two normalised answers are the same text or found symbolically equal within the time."""
    return answer == gold or _ask("symbolic", answer, gold, seconds) is True


def verified(text: str, gold: str, seconds: float = VERIFY_SECONDS) -> bool:
    """Whether math-verify finds the gold answer (LaTeX without dollar signs) in an answer's text within the time."""
    return _ask("verify", text, gold, seconds) is True


def _ask(rule: str, answer: str, gold: str, seconds: float) -> bool | None:
    """Reply of the rule's worker, or None if there is none within the time."""
    worker = _workers.get(rule)
    if worker is None or worker.poll() is not None:
        stop(rule)
        worker = _workers[rule] = _start(rule)
    try:
        worker.stdin.write(json.dumps([answer, gold]) + "\n")
        worker.stdin.flush()
        reply = _read_line(worker, seconds)
    except BrokenPipeError:
        reply = None
    if reply is None:
        stop(rule)
        logger.info("comparing with %.80r gave no result within %g s: not equal", gold, seconds)
    return None if reply is None else json.loads(reply)


def stop(*rules: str) -> None:
    """Ends the workers of these rules, by default all."""
    for rule in rules or tuple(_workers):
        worker = _workers.pop(rule, None)
        if worker is not None:
            worker.kill()
            worker.wait()
            with contextlib.suppress(BrokenPipeError):  # closing writes what is still in the buffer
                worker.stdin.close()
            worker.stdout.close()


def _start(rule: str) -> subprocess.Popen:
    # Started by path, because importing the package would load torch.
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), rule],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if _read_line(worker, _START_SECONDS) != "ready":
        worker.kill()
        raise RuntimeError("The process that compares LaTeX answers did not start: is the extra `eval` installed?")
    return worker


def _read_line(worker: subprocess.Popen, seconds: float) -> str | None:
    """One line from the worker, or None if none arrives in time."""
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    return worker.stdout.readline().strip() or None


OPEN, CLOSE = "([{", ")]}"


def split_list(text: str) -> list[str]:
    """The parts between the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in OPEN) - (character in CLOSE)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def symbolically_equal(answer: str, gold: str) -> bool:
    """Whether every part is the same text, or sympy simplifies the difference to 0."""
    if answer == gold:
        return True
    ours, theirs = split_list(answer), split_list(gold)
    if len(ours) != len(theirs):
        return False
    if len(ours) > 1:
        return all(map(symbolically_equal, ours, theirs))
    if answer[:1] + answer[-1:] == gold[:1] + gold[-1:] in ("()", "[]", "(]", "[)") and "," in answer:
        return symbolically_equal(answer[1:-1], gold[1:-1])
    return _difference_is_zero(answer, gold)


def _difference_is_zero(answer: str, gold: str) -> bool:
    import sympy
    from sympy.parsing.latex import parse_latex

    difference = parse_latex(answer, strict=True) - parse_latex(gold, strict=True)
    return bool(sympy.simplify(difference) == 0)


def math_verify_equal(text: str, gold: str) -> bool:
    """Comparison of OpenCompass's `MATHVerifyEvaluator`, which passes the prediction to `verify` first."""
    from math_verify import verify

    return verify(*extract(text, gold))


def extract(text: str, gold: str) -> tuple[list, list]:
    """math-verify's extraction from an answer and from the gold: value and text of each, or an empty list.

    Source: opencompass/evaluator/math_evaluator.py of the authors' repository. Its option `equations=True` is left out,
    because it is the default since math-verify 0.9, which warns of it.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    normalization = NormalizationConfig(
        nits=False, malformed_operators=False, basic_latex=True, boxed="all", units=True
    )
    latex = LatexExtractionConfig(
        boxed_match_priority=0, try_extract_without_anchor=False, normalization_config=normalization
    )
    of_gold = [LatexExtractionConfig(), ExprExtractionConfig()]
    return (
        parse(text, extraction_mode="first_match", extraction_config=[latex]),
        parse(f"${gold}$", extraction_mode="first_match", extraction_config=of_gold),
    )


RULES: dict[str, tuple[Callable[[str, str], bool], tuple[str, str]]] = {
    "symbolic": (symbolically_equal, ("1+1", "2")),
    "verify": (math_verify_equal, ("The final answer is $2$. I hope it is correct.", "2")),
}


def main(rule: str) -> None:
    """The worker: reads a JSON pair from each line, writes true or false."""
    # PR_SET_PDEATHSIG: the worker ends with the harness, also when that is killed.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    equal, example = RULES[rule]
    if not equal(*example):  # this also loads the parser before the memory is limited
        raise SystemExit(f"the rule {rule!r} does not work: {example} must be equal")
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            result = bool(equal(*json.loads(line)))
        except Exception:  # sympy raises errors of many kinds on text that is no formula: not equal
            result = False
        print(json.dumps(result), flush=True)


atexit.register(stop)

if __name__ == "__main__":
    main(sys.argv[1])
