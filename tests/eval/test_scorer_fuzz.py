"""No answer ends a run: every scorer under both protocols on mangled answers, 10,000 each in the tests marked slow."""

import functools
import json
import random
from pathlib import Path

import pytest

from xdlm_hf.evaluation import equality
from xdlm_hf.evaluation.protocols import END_OF_TEXT, PROTOCOLS
from xdlm_hf.evaluation.sandbox import Verdict
from xdlm_hf.evaluation.tasks import bbh, code, competition_math, gsm8k, humaneval, mbpp

EXAMPLES = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "opencompass" / "worked_examples.json").read_text("utf-8")
)
ANSWERS = [example["output"] for group in EXAMPLES.values() if isinstance(group, list) for example in group]
ANSWERS += [r"\fbox{5}", r"$\boxed\frac{1}{2}$", r"\boxed\{1,2\}", r"\boxed5 and {x}", "#### 1/2", "", " \n"]
# What is put into answers: the marks that scorers look for, LaTeX, and characters that text tools stumble over.
PIECES = (
    r"\boxed \boxed{ \fbox{ \frac{1}{ \frac12 \sqrt \{ \} \left( $ $$ { } }} ( ) [ ] (A (B) & \\ \ _ ^ -".split()
    + r"\begin{pmatrix} \end{pmatrix} \mathrm{ \infty \int_0^1x #### /0 1/3 , . 1,200 .5 nan inf None".split()
    + "1e999 -1e-999 %s%d{0} [BEGIN] [DONE] DONE BEGIN ' \" ``` ```python\n \\_ **".split(" ")
    + "\x00 \x1b[2J \x7f \ud800 \udfff \ufeff \u202e \U0001f600".split(" ")
    + ["\u0663", "\u096b", "\u00b2", "\u2167", "\uff15", "9" * 5000, "0." + "0" * 400 + "1", "e\u0301" * 9, END_OF_TEXT]
    + [
        "\\boxed ",
        "\\ ",
        "\n\n\n",
        "    ",
        "\t",
        "\r\n",
        "\u2028",
        "\n" * 50,
        " " * 5000,
        "def f(",
        "import os",
        "lambda",
    ]
    + ["#### ", "The answer is ", "final answer is $", "$. I hope it is correct.", "Question:", "Problem:", "\nQ:"]
)
TIME_BOMBS = [
    "$9^{9^{9^{9}}}$",
    r"\boxed{9^{9^{9}}}",
    r"\boxed{100000!!!}",
    "$\\boxed{" + "(1+" * 300 + "x" + ")" * 300 + "}$",
]
DOCS = {
    "gsm8k": {"answer": "So it is 18. #### 18"},
    "math": {"answer": r"\frac{1}{2}"},
    "bbh choice": {"target": "(C)", "subtask": "snarks"},
    "bbh free": {"target": "] } ]", "subtask": "dyck_languages"},
    "humaneval": {"prompt": "def f(x):\n", "test": "def check(c):\n    assert c(1)\n", "entry_point": "f"},
    "mbpp": {"tests": ["", "assert f(1)"], "names": ["f"]},
}
RIGHT = {
    "gsm8k": "The answer is 18",
    "math": "The final answer is $0.5$. I hope it is correct.",
    "bbh choice": "So the answer is (C).",
    "bbh free": "So the answer is ] } ].",
}


def mangled(number, bombs=0.002):
    """The answer of this number: a real one after a few random changes."""
    rng = random.Random(number)
    text = rng.choice(ANSWERS)
    for _ in range(rng.randint(1, 6)):
        place = rng.randint(0, len(text))
        change = rng.randrange(8)
        if change == 0:
            text = text[:place]
        elif change == 1:
            text = text[:place] + rng.choice(PIECES) + text[place:]
        elif change == 2:
            text = text[:place] + text[place + rng.randint(1, 4) :]
        elif change == 3:
            text = text.replace(rng.choice("{}()$\\'\n 0123456789"), rng.choice(PIECES), rng.randint(1, 3))
        elif change == 4:
            text = f"\\boxed{{{text}}}" * rng.randint(1, 3)
        elif change == 5:
            text = "".join(chr((ord(c) ^ rng.randint(1, 127)) if rng.random() < 0.05 else ord(c)) for c in text)
        elif change == 6:
            text = text[place:] + rng.choice(PIECES) + text[:place]
        elif rng.random() < 0.03:
            text = text * (1 + 20_000 // (len(text) + 1))
    return text + rng.choice(TIME_BOMBS) if rng.random() < bombs else text


def check_scorer(monkeypatch, name, protocol, numbers):
    """Scores the answers; every score must be 0 or 1, and a right answer afterwards 1."""
    monkeypatch.setattr(competition_math, "equivalent", functools.partial(equality.equivalent, seconds=2.0))
    monkeypatch.setattr(competition_math, "verified", functools.partial(equality.verified, seconds=2.0))
    # Programs are extracted, but do not run.
    monkeypatch.setattr(code, "run_all", lambda jobs, *_: [Verdict("wrong", repr(job.program)[:9]) for job in jobs])
    doc = {**DOCS[name], "protocol": protocol}
    task = {"gsm8k": gsm8k, "math": competition_math, "humaneval": humaneval, "mbpp": mbpp}.get(name, bbh)

    def score(answer):
        result = task.execute([[answer]], [doc])[0] if task in (humaneval, mbpp) else answer
        return task.process_results(doc, [result])

    for number in numbers:
        answer = mangled(number)
        try:
            scores = score(answer)
        except BaseException as error:
            pytest.fail(f"{name}, {protocol}, answer {number} ({answer[:200]!r}): {type(error).__name__}: {error}")
        assert scores and set(scores.values()) <= {0.0, 1.0}, number
    if name in RIGHT:
        assert score(RIGHT[name]) == {"exact_match": 1.0}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", DOCS)
def test_mangled_answers(monkeypatch, name, protocol):
    check_scorer(monkeypatch, name, protocol, range(60 if name == "math" else 400))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", DOCS)
def test_ten_thousand_mangled_answers(monkeypatch, name, protocol):
    check_scorer(monkeypatch, name, protocol, range(10_000))


def test_mangled_latex():
    for number in range(60):
        assert equality.equivalent(mangled(number, bombs=0), mangled(number + 1, bombs=0), seconds=2.0) in (True, False)


@pytest.mark.slow
def test_ten_thousand_mangled_pairs_of_latex():
    for number in range(10_000):
        assert equality.equivalent(mangled(number), mangled(number + 1), seconds=2.0) in (True, False)


def test_the_answers_differ():
    assert len({mangled(number) for number in range(400)}) > 380
