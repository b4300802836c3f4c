r"""OpenCompass's extraction and comparison of answers, as used for the paper's Table 16.

The source is OpenCompass 0.4.2 as vendored in the authors' repository (Apache-2.0), which differs from the released
OpenCompass: configurations `gsm8k_gen_base`, `math_gen_a58d9d` with `MATHVerifyEvaluator`, `bbh_gen_ee62e9`,
`humaneval_gen_base` and `mbpp_gen_830460`. Its rules are reproduced exactly, in this package's own code. MATH is
compared in equality.py. No function here raises, whatever the text.
"""

import re

import regex

# BIG-Bench Hard's subtasks without choices; the other 17 are multiple choice.
BBH_FREE_FORM = frozenset(
    "multistep_arithmetic_two navigate dyck_languages word_sorting sports_understanding boolean_expressions "
    "object_counting formal_fallacies causal_judgement web_of_lies".split()
)
HUMANEVAL_SECONDS = 3.0
MBPP_SECONDS = 9.0
_PATTERN_SECONDS = 10.0  # for one pattern of MBPP on one answer
_MBPP_PATTERNS = (
    r"\[BEGIN\]\s*'(.*)'\s*\[DONE\]",
    r"BEGIN\s*'(.*)'\s*\[DONE\]",
    r"\[BEGIN\]\s*'(.*)'\s*DONE",
    r"BEGIN\s*'(.*)'\s*DONE",
    r"\[BEGIN\]\s*'(.*)\s*\[DONE\]",
    r"BEGIN\s*'(.*)\s*\[DONE\]",
    r"\[BEGIN\]\s*'(.*)\s*DONE",
    r"BEGIN\s*'(.*)\s*DONE",
    r"\[BEGIN\]\s*(.*)\s*\[DONE\]",
    r"BEGIN\s*(.*)\s*\[DONE\]",
    r"\[BEGIN\]\s*(.*)\s*DONE",
    r"BEGIN\s*(.*)\s*DONE",
    r"```python\s*(.*)\s*```",
    r"```\s*(.*)\s*```",
    r"```python\s*(.*)\s*$",
    r"```\s*(.*)\s*$",
    r"(.*)\s*```.*",
    r"\[BEGIN\]\s*'(.*)",
    r"\[BEGIN\](.*)",
    r"'(.*)'\s*\[DONE\]",
)


def gsm8k_number(text: str) -> str:
    """The number of the first "The answer is" of the whole text, else the last number before "Question:", else NULL."""
    sentence = re.search(r"The Answer is[:\s]*(\-?\d+(?:\.\d+)?)", text, re.IGNORECASE)
    if sentence:
        return sentence[1]
    numbers = re.findall(r"\-?\d+\.\d+|\-?\d+", text.partition("Question:")[0])
    return numbers[-1] if numbers else "NULL"


def gsm8k_gold(answer: str) -> str:
    """The text after the first "#### " of a row's answer, without commas."""
    return answer.partition("#### ")[2].replace(",", "")


def gsm8k_equal(number: str, gold: str) -> bool:
    """Same text, or less than 1e-6 apart."""
    try:
        return number == gold or abs(float(number) - int(gold)) < 1e-6
    except (ValueError, OverflowError):  # NULL, a gold that is no integer, a number beyond float64
        return False


def _after_phrase(text: str) -> str:
    parts = text.split("answer is ")
    return parts[1].strip() if len(parts) > 1 else text


def bbh_choice(text: str) -> str:
    """Multiple choice, for answer and gold: a letter after a bracket, else any capital, else the text."""
    text = _after_phrase(text)
    letter = re.search(r"\(([A-Z])\)*", text) or re.search(r"([A-Z])", text)
    return letter[1] if letter else text


def bbh_free_form(text: str) -> str:
    """The other subtasks: the first line, without its full stop."""
    line = _after_phrase(text).partition("\n")[0].strip()
    line = line.removesuffix(".").strip()
    bold = re.search(r"\*\*(.*?)\*\*", line)
    return bold[1] if bold else line


def humaneval_body(text: str) -> str:
    """The indented lines at the start of an answer, which go on from the prompt."""
    if text.startswith("   ") and not text.startswith("    "):
        text = " " + text
    lines = text.partition("\n\n\n")[0].partition("\n```")[0].split("\n")
    end = next((n for n, line in enumerate(lines) if line and line[0] != " "), len(lines))
    return "\n".join(lines[:end])


def mbpp_program(text: str) -> str:
    """The program in an answer, by the first of twenty patterns that matches within its time."""
    for pattern in _MBPP_PATTERNS:
        try:
            found = regex.search(pattern, text, regex.DOTALL, timeout=_PATTERN_SECONDS)
        except TimeoutError:
            continue
        if found:
            text = found[1]
            break
    text = text.partition("```")[0]
    try:
        text = regex.split(r"'?\s*\[?DONE\]?", text, maxsplit=1, timeout=_PATTERN_SECONDS)[0]
    except TimeoutError:  # the text is kept whole
        pass
    text = text.replace("\\_", "_").strip()
    return text.removeprefix("'").removesuffix("'")
