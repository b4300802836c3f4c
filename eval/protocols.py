"""Evaluation protocols: prompts, stop strings, extraction of the result, and comparison with the gold answer.

`opencompass` is the protocol of the paper's Table 16 (OpenCompass 0.4.2 as vendored by the authors; its rules are in
opencompass.py). `lenient` is this package's own: it accepts more forms of a result, so that a score depends less on the
answer's style. `--metadata protocol=NAME` chooses; the tasks' default is `opencompass`.

A protocol gets raw answers: the whole generation, with `END_OF_TEXT` for every end-of-text token.
"""

from collections.abc import Mapping, Sequence

PROTOCOLS = ("opencompass", "lenient")
END_OF_TEXT = "<|endoftext|>"
"""What stands for an end-of-text token in a raw answer, whatever its name in the tokenizer."""


def check_protocol(name: str) -> str:
    """Returns `name`.

    Raises:
        ValueError: If there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol={name!r} is not known: choose one of {', '.join(PROTOCOLS)}")
    return name


def visible_text(raw: str, protocol: str, stops: Mapping[str, Sequence[str]]) -> str:
    """The part of a raw answer that is scored: up to the first of the protocol's `stops`.

    `lenient` also ends an answer at its first end-of-text token. `opencompass` removes these tokens and keeps the text
    after them, as decoding with `skip_special_tokens=True` does.
    """
    text = raw.replace(END_OF_TEXT, "") if protocol == "opencompass" else raw.partition(END_OF_TEXT)[0]
    for stop in stops[protocol]:
        text = text.partition(stop)[0]
    return text
