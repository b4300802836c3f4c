"""The regular expressions of JSON Schema's `pattern`, as expressions of `automaton` over the JSON text of a string.

Read are literals, escapes, classes, groups, alternatives and quantifiers. What a finite automaton over the whole string
cannot state exactly (look-around, references, word borders) is refused. A pattern describes the whole string: JSON
Schema only asks that a part matches, so every string found here is valid.
"""

import re

from .automaton import Alt, Chars, Node, Repeat, Seq, literal, optional

# In JSON's short form; other control characters are not generated.
_ESCAPED = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_PLAIN = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0xA0, 0xD7FF), (0xE000, 0x10FFFF))
_LAST = 0x10FFFF
_NAMED = {"d": ((48, 57),), "w": ((48, 57), (65, 90), (95, 95), (97, 122))}
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12}
_MOST_COPIES = 4096


def json_characters(ranges: tuple[tuple[int, int], ...] = ((0, _LAST),)) -> Node:
    """One character of these ranges of code points as it stands between the quotes of a JSON string."""
    plain = [
        (max(first, a), min(last, b)) for first, last in ranges for a, b in _PLAIN if max(first, a) <= min(last, b)
    ]
    escaped = [text for c, text in _ESCAPED.items() if any(first <= ord(c) <= last for first, last in ranges)]
    parts = ([Chars(tuple(plain))] if plain else []) + [literal(text) for text in escaped]
    if not parts:
        raise ValueError("holds a class without a printable character")
    return parts[0] if len(parts) == 1 else Alt(tuple(parts))


def parsed(pattern: str) -> Node:
    """The expression of a pattern.

    Raises:
        ValueError: If the pattern cannot be read; the message is a predicate, such as "holds a back reference".
    """
    return _Reader(pattern).whole()


class _Reader:
    """Recursive descent over the text of a pattern."""

    def __init__(self, pattern: str):
        text = pattern.removeprefix("^")
        backslashes = len(text.removesuffix("$")) - len(text.removesuffix("$").rstrip("\\"))
        self.text = text[:-1] if text.endswith("$") and backslashes % 2 == 0 else text
        self.at = 0

    def whole(self) -> Node:
        node = self._alternatives()
        if self.at < len(self.text):
            raise ValueError("holds a ) without (")
        return node

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _next(self) -> str:
        if self.at >= len(self.text):
            raise ValueError("ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def _alternatives(self) -> Node:
        options = [self._sequence()]
        while self._peek() == "|":
            self.at += 1
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Alt(tuple(options))

    def _sequence(self) -> Node:
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._quantified(self._atom()))
        return Seq(tuple(parts))

    def _atom(self) -> Node:
        c = self._next()
        if c == "(":
            if self._peek() == "?":
                if self.text[self.at : self.at + 2] != "?:":
                    raise ValueError("holds a look-around, a named group or a flag")
                self.at += 2
            node = self._alternatives()
            if self._peek() != ")":
                raise ValueError("holds a ( without )")
            self.at += 1
            return node
        if c == "[":
            return json_characters(self._class())
        if c == ".":
            return json_characters(_without(((10, 10), (13, 13), (0x2028, 0x2029))))
        if c == "\\":
            return json_characters(self._escape())
        if c in "^$":
            raise ValueError(f"holds {c} inside, not at its {'start' if c == '^' else 'end'}")
        if c in "*+?{":
            raise ValueError(f"holds the quantifier {c} after nothing")
        return json_characters(((ord(c), ord(c)),))

    def _escape(self) -> tuple[tuple[int, int], ...]:
        c = self._next()
        if c in _NAMED:
            return _NAMED[c]
        if c.lower() in _NAMED:
            return _without(_NAMED[c.lower()])
        if c in _CONTROLS:
            return ((_CONTROLS[c], _CONTROLS[c]),)
        if c == "u" and (code := re.match(r"[0-9a-fA-F]{4}", self.text[self.at :])):
            self.at += 4
            return ((int(code[0], 16),) * 2,)
        if c.isalnum():
            raise ValueError(f"holds \\{c}, which is not supported")
        return ((ord(c), ord(c)),)

    def _class(self) -> tuple[tuple[int, int], ...]:
        negated = self._peek() == "^"
        self.at += negated
        ranges: list[tuple[int, int]] = []
        while (c := self._next()) != "]":
            item = self._escape() if c == "\\" else ((ord(c), ord(c)),)
            if self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                c = self._next()
                last = self._escape() if c == "\\" else ((ord(c), ord(c)),)
                if len(item) > 1 or len(last) > 1 or item[0][0] != item[0][1] or item[0][0] > last[0][0]:
                    raise ValueError("holds a class with a range that is none")
                item = ((item[0][0], last[0][1]),)
            ranges += item
        return _without(tuple(ranges)) if negated else tuple(ranges)

    def _quantified(self, node: Node) -> Node:
        counts = re.match(r"\{(\d+)(,?)(\d*)\}", self.text[self.at :])
        if self._peek() == "{" and counts is None:
            raise ValueError("holds a { that is no quantifier; write \\{")
        if counts is not None:
            self.at += len(counts[0])
            least = int(counts[1])
            most = least if not counts[2] else int(counts[3]) if counts[3] else None
            if max(least, most or 0) > _MOST_COPIES or (most is not None and most < least):
                raise ValueError(f"holds the quantifier {counts[0]}, which is too large or empty")
            node = Repeat(node, least, most)
        elif self._peek() in ("*", "+", "?") and self._peek():
            c = self._next()
            node = optional(node) if c == "?" else Repeat(node, int(c == "+"))
        else:
            return node
        if self._peek() == "?":
            self.at += 1  # lazy: the language is the same
        if self._peek() in ("*", "+", "{") and self._peek():
            raise ValueError("holds a quantifier after a quantifier")
        return node


def _without(ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The code points outside of the ranges."""
    outside, following = [], 0
    for first, last in sorted(ranges):
        if first > following:
            outside.append((following, first - 1))
        following = max(following, last + 1)
    return (*outside, (following, _LAST)) if following <= _LAST else tuple(outside)
