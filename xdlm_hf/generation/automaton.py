"""Deterministic automata over bytes, from a small algebra of regular expressions.

An expression is built of `Bytes`, `Chars`, `Seq`, `Alt` and `Repeat`; `compiled` makes a deterministic automaton of it.
Characters become their UTF-8 bytes, so tokens that hold a part of a character are no special case.

No library did this. outlines-core 0.2.14 determinizes an expression together with its search at every offset, so that
the states of a bounded string seem to double with each character (a JSON string of at most 20 took over 8 s), and its
reading of schemas ignores some keywords. llguidance's Python interface gives no table of transitions.

Shapes: S states of the automaton, K classes of bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STATES = 8192
_MAX_POSITIONS = 2**16  # states before determinization
_MAX_WORK = 2**24  # moves followed by determinization: some seconds
_SURROGATES, _LAST = (0xD800, 0xDFFF), 0x10FFFF
_TOO_LARGE = (
    f"the automaton of json_schema is too large (more than {MAX_STATES} states, or {_MAX_POSITIONS} before they are "
    "merged); lower maxLength and maxItems, or leave them out: max_new_tokens bounds the answer anyway. Simpler "
    "patterns, typed values and fewer optional properties help too."
)


@dataclass(frozen=True)
class Bytes:
    """A literal."""

    value: bytes


@dataclass(frozen=True)
class Chars:
    """One character of some ranges of code points (first, last), which may overlap."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Seq:
    """One part after the other."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Alt:
    """One of the parts."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Repeat:
    """`least` to `most` copies, without an upper bound if `most` is None."""

    part: "Node"
    least: int = 0
    most: int | None = None


Node = Bytes | Chars | Seq | Alt | Repeat


@dataclass(frozen=True)
class ByteAutomaton:
    """A deterministic automaton whose start is state 0.

    Args:
        step: (S, 256) int64, the next state, or -1.
        accepts: (S,) bool.
    """

    step: Tensor
    accepts: Tensor

    def matches(self, text: bytes) -> bool:
        """Whether the language holds the text."""
        state = 0
        for byte in text:
            state = int(self.step[state, byte])
            if state < 0:
                return False
        return bool(self.accepts[state])


def literal(text: str) -> Bytes:
    return Bytes(text.encode())


def optional(node: Node) -> Repeat:
    return Repeat(node, 0, 1)


def compiled(node: Node) -> ByteAutomaton:
    """The automaton of an expression.

    Raises:
        ValueError: If it has more than `MAX_STATES` states.
    """
    graph = _Graph()
    end = graph.state()
    start = graph.add(node, end)
    return _merged(*_deterministic(graph, start, end))


class _Graph:
    """Nondeterministic automaton: `edges` (first byte, last byte, target) and `free` moves of each state."""

    def __init__(self) -> None:
        self.edges: list[list[tuple[int, int, int]]] = []
        self.free: list[list[int]] = []
        self.parts = 0

    def state(self, *free: int) -> int:
        if len(self.edges) >= _MAX_POSITIONS:
            raise ValueError(_TOO_LARGE)
        self.edges.append([])
        self.free.append(list(free))
        return len(self.edges) - 1

    def byte(self, first: int, last: int, target: int) -> int:
        state = self.state()
        self.edges[state].append((first, last, target))
        return state

    def add(self, node: Node, end: int) -> int:
        """The start of a part that leads to the state `end`."""
        self.parts += 1  # copies of an empty part add no state
        if self.parts > _MAX_POSITIONS:
            raise ValueError(_TOO_LARGE)
        match node:
            case Bytes(value):
                for byte in reversed(value):
                    end = self.byte(byte, byte, end)
                return end
            case Chars(ranges):
                return self._chars(ranges, end)
            case Seq(parts):
                for part in reversed(parts):
                    end = self.add(part, end)
                return end
            case Alt(parts):
                return self.state(*[self.add(part, end) for part in parts])
            case Repeat(part, least, most):
                return self._repeat(part, least, most, end)
        raise TypeError(f"{node!r} is no expression.")

    def _repeat(self, part: Node, least: int, most: int | None, end: int) -> int:
        if most is None:
            end = self.state(end)  # the loop
            self.free[end].append(self.add(part, end))
        else:
            stop = end
            for _ in range(most - least):  # nested, so that the copies are told apart: (x(x(x)?)?)?
                end = self.state(self.add(part, end), stop)
        for _ in range(least):
            end = self.add(part, end)
        return end

    def _chars(self, ranges: Sequence[tuple[int, int]], end: int) -> int:
        start = self.state()
        tails: dict[tuple[tuple[int, int], ...], int] = {(): end}  # states shared by sequences of equal end
        for sequence in (s for first, last in ranges for s in utf8_ranges(first, last)):
            for i in range(len(sequence) - 1, 0, -1):
                if sequence[i:] not in tails:
                    tails[sequence[i:]] = self.byte(*sequence[i], tails[sequence[i + 1 :]])
            self.edges[start].append((*sequence[0], tails[sequence[1:]]))
        return start


def utf8_ranges(first: int, last: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Sequences of byte ranges that together are the UTF-8 of the code points first to last, without surrogates."""
    if first > last:
        return
    for below in (*_SURROGATES, 0x7F, 0x7FF, 0xFFFF):
        above = below if below == _SURROGATES[0] else below + 1  # a range never crosses one of these borders
        if first < above <= last:
            yield from utf8_ranges(first, above - 1)
            yield from utf8_ranges(above, last)
            return
    if _SURROGATES[0] <= first <= _SURROGATES[1]:
        return
    # Where the continuation bytes run through their whole range, one sequence covers all; else split there.
    for bits in (6, 12, 18):
        mask = (1 << bits) - 1
        if first & ~mask == last & ~mask or first <= 0x7F:
            continue
        if first & mask:
            yield from utf8_ranges(first, first | mask)
            yield from utf8_ranges((first | mask) + 1, last)
            return
        if last & mask != mask:
            yield from utf8_ranges(first, (last & ~mask) - 1)
            yield from utf8_ranges(last & ~mask, last)
            return
    yield tuple(zip(chr(first).encode(), chr(last).encode(), strict=True))


def _deterministic(graph: _Graph, start: int, end: int) -> tuple[list[list[int]], list[bool], list[int]]:
    """Subset construction: next states by byte class, accepting states, and the class of each byte."""
    borders = sorted({0, 256} | {b for edges in graph.edges for first, last, _ in edges for b in (first, last + 1)})
    class_of = [i for i, (a, b) in enumerate(zip(borders, borders[1:], strict=False)) for _ in range(a, b)]
    closures: dict[int, frozenset[int]] = {}

    def closure(state: int) -> frozenset[int]:
        if state not in closures:
            seen, remaining = {state}, [state]
            while remaining:
                for target in graph.free[remaining.pop()]:
                    if target not in seen:
                        seen.add(target)
                        remaining.append(target)
            closures[state] = frozenset(s for s in seen if graph.edges[s] or s == end)
        return closures[state]

    sets = [closure(start)]
    index = {sets[0]: 0}
    step: list[list[int]] = []
    work = 0
    while len(step) < len(sets):
        targets: list[set[int]] = [set() for _ in borders[1:]]
        for state in sets[len(step)]:
            for first, last, target in graph.edges[state]:
                reached = closure(target)
                work += (class_of[last] - class_of[first] + 1) * len(reached)
                for k in range(class_of[first], class_of[last] + 1):
                    targets[k] |= reached
        row = []
        for target in map(frozenset, targets):
            if target and target not in index:
                if len(sets) >= MAX_STATES or work > _MAX_WORK:
                    raise ValueError(_TOO_LARGE)
                index[target] = len(sets)
                sets.append(target)
            row.append(index[target] if target else -1)
        step.append(row)
    return step, [end in states for states in sets], class_of


def _merged(step: list[list[int]], accepts: list[bool], class_of: list[int]) -> ByteAutomaton:
    """States of equal rows are one, repeated from the end of the language to its start. Minimal without loops.

    Moore's algorithm, which is minimal in all cases, takes a round for each character of a bounded string.
    """
    table = torch.cat([torch.tensor(accepts)[:, None].long(), torch.tensor(step)], 1)  # (S, 1 + K)
    start = 0
    while True:
        rows, group = table.unique(dim=0, return_inverse=True)
        if len(rows) == len(table):
            break
        following = rows[:, 1:]
        rows[:, 1:] = torch.where(following >= 0, group[following.clamp_min(0)], -1)
        table, start = rows, int(group[start])
    swap = torch.arange(len(table))
    swap[0], swap[start] = start, 0
    table = table[swap]
    following = torch.where(table[:, 1:] >= 0, swap[table[:, 1:].clamp_min(0)], -1)
    return ByteAutomaton(following[:, torch.tensor(class_of)], table[:, 0].bool())
