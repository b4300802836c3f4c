"""Protocols: how a benchmark asks, where an answer ends, what is taken of it, and what counts as equal.

`opencompass` is how the scores of the paper's Table 16 were made (OpenCompass 0.4.2 as vendored by the authors; the
rules are in opencompass.py). `lenient` is this package's own: it accepts every form in which an answer states its
result, so a score depends less on the answer's style. A run chooses with `--metadata protocol=NAME`; the tasks'
default is the first.

Answers reach a protocol raw: the whole generation, nothing cut, every end-of-text token written as `END_OF_TEXT`.
"""

from collections.abc import Mapping, Sequence

PROTOCOLS = ("opencompass", "lenient")
END_OF_TEXT = "<|endoftext|>"
"""How an end-of-text token stands in a raw answer, whatever the tokenizer calls it."""


def check_protocol(name: str) -> str:
    """`name`, if it is a protocol.

    Raises:
        ValueError: If it is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol={name!r} is not known: choose one of {', '.join(PROTOCOLS)}")
    return name


def visible_text(raw: str, protocol: str, stops: Mapping[str, Sequence[str]]) -> str:
    """What a protocol sees of a raw answer: `stops` gives its stop words, at the first of which the answer ends.

    `lenient` ends an answer at its end-of-text token. `opencompass` drops these tokens and joins what stands around
    them, as decoding with `skip_special_tokens=True` does.
    """
    text = raw.replace(END_OF_TEXT, "") if protocol == "opencompass" else raw.partition(END_OF_TEXT)[0]
    for stop in stops[protocol]:
        text = text.partition(stop)[0]
    return text
