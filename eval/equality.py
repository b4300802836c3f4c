"""Whether two LaTeX answers are equal, by sympy, in a process that can be stopped.

lm-eval's own comparison is not used, for two reasons. It lets sympy read as much of an answer as it understands, so
that "0,5" is read as 0 and equals "0,1"; here every part of a list is compared, and all of it must be understood. And
it limits the time with an alarm, which cannot interrupt one long operation on integers (`9^{9^{9}}`), and the memory
not at all; here a process of its own is started when first needed, and replaced when it does not answer.
"""

import atexit
import ctypes
import json
import resource
import selectors
import signal
import subprocess
import sys
from pathlib import Path

SECONDS = 5.0  # for one comparison, as lm-eval allows
_START_SECONDS = 120.0
_MEMORY = 2 * 2**30
_worker: subprocess.Popen | None = None


def equivalent(answer: str, gold: str, seconds: float = SECONDS) -> bool:
    """Whether two normalised answers are the same text or, within the time, symbolically equal."""
    global _worker
    if answer == gold:
        return True
    if _worker is None or _worker.poll() is not None:
        _worker = _start()
    try:
        _worker.stdin.write(json.dumps([answer, gold]) + "\n")
        _worker.stdin.flush()
        reply = _read_line(_worker, seconds)
    except BrokenPipeError:
        reply = None
    if reply is None:
        stop()
    return reply == "true"


def stop() -> None:
    """Ends the process, if there is one."""
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.wait()
        _worker.stdin.close()
        _worker.stdout.close()
        _worker = None


def _start() -> subprocess.Popen:
    # By path and not as a module: xdlm_hf itself would import torch.
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if _read_line(worker, _START_SECONDS) != "ready":
        worker.kill()
        raise RuntimeError("the process that compares answers does not start: is the extra `eval` installed?")
    return worker


def _read_line(worker: subprocess.Popen, seconds: float) -> str | None:
    """One line of the worker's, or None when none comes in time."""
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
    """Whether every part is the same text or has a difference that sympy simplifies to 0."""
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
    from sympy.parsing.latex.errors import LaTeXParsingError

    try:
        difference = parse_latex(answer, strict=True) - parse_latex(gold, strict=True)
        return bool(sympy.simplify(difference) == 0)
    # What sympy raises on text that is no formula, and on formulas it cannot subtract or simplify.
    except (LaTeXParsingError, sympy.SympifyError, ArithmeticError, AttributeError, LookupError, MemoryError,
            NotImplementedError, RecursionError, TypeError, ValueError):  # fmt: skip
        return False


def main() -> None:
    """The worker: a JSON pair on each line in, true or false on each line out."""
    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL, 0, 0, 0
    )  # PR_SET_PDEATHSIG: a killed harness leaves no comparison behind

    import sympy.parsing.latex  # noqa: F401  before the memory is limited

    symbolically_equal("1+1", "2")  # loads the parser
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(symbolically_equal(*json.loads(line))), flush=True)


atexit.register(stop)

if __name__ == "__main__":
    main()
