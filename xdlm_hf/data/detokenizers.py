"""Detokenizers: rules that turn tokenized benchmark text back into plain text.

Some corpora are distributed with spaces around punctuation (`it 's`, `1 @,@ 500`). Published perplexities of diffusion
language models were measured after these rules. They are reproduced with their mistakes (`the players ' room` becomes
`the players'room`), because other rules would change the perplexities.

A rule is a pattern and its replacement. Rules are applied in order, each to the whole text.
"""

import re
from collections.abc import Callable, Sequence

Detokenizer = Callable[[str], str]
_Rules = Sequence[tuple[re.Pattern, str]]


def _literal(*pairs: tuple[str, str]) -> list[tuple[re.Pattern, str]]:
    """Rules that replace one string by another."""
    return [(re.compile(re.escape(old)), new.replace("\\", r"\\")) for old, new in pairs]


def _trimmed(opening: str, closing: str, space: str) -> tuple[re.Pattern, str]:
    """A rule that removes the space inside a pair of brackets or quotes.

    Args:
        opening, closing: One character each.
        space: Pattern of the space on both sides: `\\s*`, or a single blank, which is then required.
    """
    left, right = re.escape(opening), re.escape(closing)
    # Wikitext's rule takes the shortest text up to the closing character; LM1B's excludes both characters.
    inner = f"[^{right}]*?" if space == r"\s*" else f"[^{left}{right}]+"
    return re.compile(f"{left}{space}({inner}){space}{right}"), f"{opening}\\1{closing}"


_WIKITEXT: _Rules = [
    *_literal(("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *_literal(*((f" {sign} ", f"{sign} ") for sign in ":;.!?,")),
    *(_trimmed(*pair, r"\s*") for pair in ("()", "[]", "{}", '""', "''")),
    *_literal(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *_literal((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
]
_PTB: _Rules = [
    *_literal((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")),
    # Adjacent numbers share the blank between them, so ` N N ` needs two passes; longer runs are rare.
    *_literal((" N ", " 1 ")) * 10,
    *_literal(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")),
]
_LM1B: _Rules = [
    *_literal(("http : / / ", "http://"), ("https : / / ", "https://")),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    *_literal((" ? ", "? ")),
    (re.compile(r" \?$"), "?"),
    *_literal((" ! ", "! ")),
    (re.compile(r" !$"), "!"),
    *_literal((" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")),
    *(_trimmed(*pair, " ") for pair in ('""', "''", "()", "[]")),
    *_literal(("$ ", "$"), ("£ ", "£")),
]


def _apply(rules: _Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def wikitext(text: str) -> str:
    """WikiText: numbers, punctuation, brackets, headings, line ends."""
    return _apply(_WIKITEXT, text)


def ptb(text: str) -> str:
    """Penn Treebank: contractions, N for numbers, `<unk>`."""
    return _apply(_PTB, text)


def lm1b(text: str) -> str:
    """One Billion Words: contractions, punctuation, quotes, currency signs."""
    return _apply(_LM1B, text)


def lambada(text: str) -> str:
    """LAMBADA: straight double quotes, and a line end in place of the space around the text."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def scientific_papers(text: str) -> str:
    """arXiv and PubMed: WikiText's rules, then LM1B's."""
    return lm1b(wikitext(text))


DETOKENIZERS: dict[str, Detokenizer] = {
    rule.__name__: rule for rule in (wikitext, ptb, lm1b, lambada, scientific_papers)
}
