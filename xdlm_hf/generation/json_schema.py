"""JSON Schema as an expression of `automaton`: the JSON texts that an answer may be.

Every text is valid by the schema, but not every valid text is in the language: properties come in the order of the
schema, none is added to them, and there is at most one space, after a colon or comma. Keywords outside of the table
below are refused by name, never ignored.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from .automaton import Alt, ByteAutomaton, Bytes, Chars, Node, Repeat, Seq, compiled, literal, optional
from .pattern import json_characters, parsed

_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_ANYWHERE = _ANNOTATIONS | {"$comment", "$schema", "$id", "$defs", "definitions"}
_KEYWORDS: dict[str, set[str]] = {
    "null": set(),
    "boolean": set(),
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": set(),
    "string": {"minLength", "maxLength", "pattern", "format"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
_DAYS = "(0[13578]|1[02])-(0[1-9]|[12]\\d|3[01])|(0[469]|11)-(0[1-9]|[12]\\d|30)|02-(0[1-9]|1\\d|2[0-8])"
_LEAP = "(\\d\\d(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29"
_YEAR = "(\\d\\d\\d[1-9]|\\d\\d[1-9]0|\\d[1-9]00|[1-9]000)"  # not 0000, which Python's dates do not have
_FORMATS = {
    "date": f"{_YEAR}-({_DAYS})|{_LEAP}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}
_MOST_PARTS, _MOST_DIGITS = 4096, 18
FREE_DEPTH = 2  # arrays and objects inside of each other where the schema allows anything
_DIGIT, _DIGIT_1 = Chars(((48, 57),)), Chars(((49, 57),))
_CARDINAL = Alt((literal("0"), Seq((_DIGIT_1, Repeat(_DIGIT)))))
_INTEGER = Seq((optional(literal("-")), _CARDINAL))
_EXPONENT = Seq((Chars(((69, 69), (101, 101))), optional(Chars(((43, 43), (45, 45)))), Repeat(_DIGIT, 1, 2)))
_NUMBER = Seq((_INTEGER, optional(Seq((literal("."), Repeat(_DIGIT, 1)))), optional(_EXPONENT)))
_COMMA, _COLON = Seq((literal(","), optional(literal(" ")))), Seq((literal(":"), optional(literal(" "))))


def parse_schema(schema: Mapping[str, Any] | str) -> dict[str, Any]:
    """The schema as a dict, from a dict or JSON.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise ValueError(f"is {type(schema).__name__}, and must be a dict or its JSON")
    return dict(schema)


def expression(schema: Mapping[str, Any] | str) -> Node:
    """The expression of a schema.

    Raises:
        ValueError: For what is not supported or cannot be satisfied; the message names the place and the keyword.
    """
    schema = parse_schema(schema)
    try:
        return _Builder(schema).value(schema, "#", ())
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


@functools.lru_cache(maxsize=64)
def schema_automaton(schema: str) -> ByteAutomaton:
    """The automaton of a schema in JSON.

    Raises:
        ValueError: As `expression` does, or if the automaton is too large.
    """
    return compiled(expression(schema))


class _Builder:
    """Expressions of the parts of a schema, whose `root` references are resolved in."""

    def __init__(self, root: dict[str, Any]):
        self.root, self.parts = root, 0

    def value(self, schema: Any, place: str, refs: tuple[str, ...]) -> Node:
        self.parts += 1  # references may double it again and again
        if self.parts > _MOST_PARTS:
            raise ValueError(f"has more than {_MOST_PARTS} parts, references resolved")
        if schema is True:
            return _anything(FREE_DEPTH)
        if not isinstance(schema, Mapping):
            raise ValueError(f"at {place}: {schema!r} is no schema that a value can have")
        types = _types(schema, place)
        keywords = {name for name in schema if name not in _ANYWHERE}
        for name, build in (("$ref", self._ref), ("allOf", self._all), ("anyOf", self._any), ("enum", _enum)):
            if name in schema:
                _only(keywords, {name, "type"} if name == "enum" else {name}, place, f" beside {name!r}")
                return build(schema, place, refs)
        if "const" in schema:
            _only(keywords, {"const", "type"}, place, " beside 'const'")
            return _enum({**schema, "enum": [schema["const"]]}, place, refs)
        if not types:
            _only(keywords, set(), place, "")
            return _anything(FREE_DEPTH)
        _only(keywords, {"type"}.union(*(_KEYWORDS[name] for name in types)), place, f" for type {' or '.join(types)}")
        build_type = {"string": _string, "integer": _integer, "array": self._array, "object": self._object}
        simple = {"null": literal("null"), "boolean": Alt((literal("true"), literal("false"))), "number": _NUMBER}
        nodes = [simple[t] if t in simple else build_type[t](schema, place, refs) for t in dict.fromkeys(types)]
        return nodes[0] if len(nodes) == 1 else Alt(tuple(nodes))

    def _ref(self, schema: Mapping[str, Any], place: str, refs: tuple[str, ...]) -> Node:
        ref = schema["$ref"]
        if ref in refs:
            raise ValueError(f"at {place}: $ref={ref!r} is recursive, which a finite automaton cannot follow")
        target: Any = self.root
        parts = ref[1:].split("/")[1:] if isinstance(ref, str) and (ref == "#" or ref.startswith("#/")) else [None]
        for part in parts:
            key = None if part is None else unquote(part).replace("~1", "/").replace("~0", "~")
            if not isinstance(target, Mapping) or key not in target:
                raise ValueError(f"at {place}: $ref={ref!r} is not found in the schema")
            target = target[key]
        return self.value(target, place, (*refs, ref))

    def _all(self, schema: Mapping[str, Any], place: str, refs: tuple[str, ...]) -> Node:
        if not isinstance(schema["allOf"], list) or len(schema["allOf"]) != 1:
            raise ValueError(f"at {place}: 'allOf' is supported with one schema only")
        return self.value(schema["allOf"][0], f"{place}/allOf/0", refs)

    def _any(self, schema: Mapping[str, Any], place: str, refs: tuple[str, ...]) -> Node:
        if not isinstance(schema["anyOf"], list) or not schema["anyOf"]:
            raise ValueError(f"at {place}: 'anyOf' must be a list of at least one schema")
        return Alt(tuple(self.value(part, f"{place}/anyOf/{i}", refs) for i, part in enumerate(schema["anyOf"])))

    def _array(self, schema: Mapping[str, Any], place: str, refs: tuple[str, ...]) -> Node:
        least, most = _bounds(schema, "minItems", "maxItems", place)
        if "prefixItems" in schema:
            if {"minItems", "maxItems"} & set(schema) or schema.get("items", False) is not False:
                raise ValueError(f"at {place}: 'prefixItems' is supported with items=false and without bounds only")
            given = schema["prefixItems"] if isinstance(schema["prefixItems"], list) else []
            members = [self.value(part, f"{place}/prefixItems/{i}", refs) for i, part in enumerate(given)]
            if not members:
                raise ValueError(f"at {place}: 'prefixItems' must be a list of at least one schema")
            return Seq((literal("["), _joined(members), literal("]")))
        return _listed("[", self.value(schema.get("items", True), f"{place}/items", refs), "]", least, most)

    def _object(self, schema: Mapping[str, Any], place: str, refs: tuple[str, ...]) -> Node:
        given, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(given, Mapping) or not isinstance(required, list):
            raise ValueError(f"at {place}: 'properties' must be an object and 'required' a list")
        odd = [name for name in required if not isinstance(name, str)]
        if odd:
            raise ValueError(f"at {place}: required={odd[0]!r} must be the name of a property")
        missing = [name for name in required if name not in given]
        if missing:
            raise ValueError(f"at {place}: required={missing[0]!r} is not among 'properties'")
        extra = schema.get("additionalProperties", not given)
        if not isinstance(extra, bool | Mapping):
            raise ValueError(f"at {place}: additionalProperties={extra!r} must be true, false or a schema")
        if not given and extra is not False:
            member = Seq((_STRING, _COLON, self.value(extra, f"{place}/additionalProperties", refs)))
            return _listed("{", member, "}", 0, None)
        members = [
            (Seq((_json(name, place), _COLON, self.value(part, f"{place}/properties/{name}", refs))), name in required)
            for name, part in given.items()
        ]
        return Seq((literal("{"), _properties(members), literal("}")))


def _types(schema: Mapping[str, Any], place: str) -> list[str]:
    """The names in `type`, none if it is not given."""
    if "type" not in schema:
        return []
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not types or not all(isinstance(name, str) and name in _KEYWORDS for name in types):
        raise ValueError(f"at {place}: type={schema['type']!r} must be of {sorted(_KEYWORDS)}")
    return types


def _only(given: set[str], supported: set[str], place: str, context: str) -> None:
    """Raise ValueError if a keyword is not supported."""
    others = sorted(given - supported)
    if others:
        raise ValueError(f"at {place}: {others[0]!r} is not supported{context}; leave it out")


def _bounds(schema: Mapping[str, Any], low: str, high: str, place: str) -> tuple[int, int | None]:
    least, most = schema.get(low, 0), schema.get(high)
    for name, value in ((low, least), (high, most)):
        if value is not None and (not _TYPES["integer"](value) or value < 0):
            raise ValueError(f"at {place}: {name}={value!r} must be an integer of at least 0")
    if most is not None and least > most:
        raise ValueError(f"at {place}: {low}={least} is above {high}={most}")
    return least, most


def _json(value: Any, place: str) -> Bytes:
    try:
        return literal(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (ValueError, TypeError) as error:
        raise ValueError(f"at {place}: {value!r} is no JSON: {error}") from error


def _enum(schema: Mapping[str, Any], place: str, refs: tuple[str, ...]) -> Node:
    values, types = schema["enum"], _types(schema, place)
    if not isinstance(values, list) or not values:
        raise ValueError(f"at {place}: 'enum' must be a list of at least one value")
    wrong = [value for value in values if types and not any(_TYPES[name](value) for name in types)]
    if wrong:
        raise ValueError(f"at {place}: {wrong[0]!r} is not of type={schema['type']!r}")
    return Alt(tuple(_json(value, place) for value in values))


def _string(schema: Mapping[str, Any], place: str, refs: tuple[str, ...]) -> Node:
    least, most = _bounds(schema, "minLength", "maxLength", place)
    given = [name for name in ("pattern", "format") if name in schema]
    if not given:
        return Seq((literal('"'), Repeat(json_characters(), least, most), literal('"')))
    bounded = [name for name in ("minLength", "maxLength", "format") if name in schema and name != given[0]]
    if bounded:
        raise ValueError(f"at {place}: {bounded[0]!r} is not supported beside {given[0]!r}; state it in the pattern")
    name, value = given[0], schema[given[0]]
    if name == "format" and (not isinstance(value, str) or value not in _FORMATS):
        raise ValueError(f"at {place}: format={value!r} is not supported; known are {sorted(_FORMATS)}")
    if not isinstance(value, str):
        raise ValueError(f"at {place}: pattern={value!r} must be a string")
    try:
        return Seq((literal('"'), parsed(_FORMATS[value] if name == "format" else value), literal('"')))
    except ValueError as error:
        raise ValueError(f"at {place}: pattern={value!r} {error}") from error


_STRING = Seq((literal('"'), Repeat(json_characters()), literal('"')))


def _integer(schema: Mapping[str, Any], place: str, refs: tuple[str, ...]) -> Node:
    bounds: dict[str, list[int]] = {"min": [], "max": []}
    for name, side, shift in (
        ("minimum", "min", 0),
        ("maximum", "max", 0),
        ("exclusiveMinimum", "min", 1),
        ("exclusiveMaximum", "max", -1),
    ):
        if name in schema:
            value = schema[name]
            if isinstance(value, float) and value.is_integer():
                value = int(value)  # 1.0 is an integer in JSON Schema
            if not _TYPES["integer"](value):
                raise ValueError(f"at {place}: {name}={value!r} must be an integer")
            if abs(value) >= 10**_MOST_DIGITS:
                raise ValueError(f"at {place}: {name} has more than {_MOST_DIGITS} digits")
            bounds[side].append(value + shift)
    least, most = max(bounds["min"], default=None), min(bounds["max"], default=None)
    if least is not None and most is not None and least > most:
        raise ValueError(f"at {place}: no integer lies from {least} to {most}")
    parts = []
    if most is None or most >= 0:
        parts += _cardinals(max(least or 0, 0), most)
    if least is None or least < 0:
        negative = _cardinals(max(1 if most is None else -most, 1), None if least is None else -least)
        parts += [Seq((literal("-"), part)) for part in negative]
    return Alt(tuple(parts))


def _cardinals(first: int, last: int | None) -> list[Node]:
    """Numbers from `first` >= 0 to `last`, without leading zeros, by their number of digits."""
    low = str(first)
    if last is None:
        longer = Seq((_DIGIT_1, Repeat(_DIGIT, len(low))))
        return [*_same_length(low, "9" * len(low)), longer]
    high = str(last)
    lengths = range(len(low), len(high) + 1)
    lows = [low if n == len(low) else "1" + "0" * (n - 1) for n in lengths]
    highs = [high if n == len(high) else "9" * n for n in lengths]
    return [part for a, b in zip(lows, highs, strict=True) for part in _same_length(a, b)]


def _same_length(low: str, high: str) -> list[Node]:
    """Digit strings from `low` to `high`, of one length."""
    if not low:
        return [Seq(())]
    rest = len(low) - 1
    if low == "0" * len(low) and high == "9" * len(low):
        return [Repeat(_DIGIT, len(low), len(low))]
    if low[0] == high[0]:
        return [Seq((literal(low[0]), part)) for part in _same_length(low[1:], high[1:])]
    inner = (ord(low[0]) + 1, ord(high[0]) - 1)
    middle = [Seq((Chars((inner,)), Repeat(_DIGIT, rest, rest)))] if inner[0] <= inner[1] else []
    return [
        *(Seq((literal(low[0]), part)) for part in _same_length(low[1:], "9" * rest)),
        *middle,
        *(Seq((literal(high[0]), part)) for part in _same_length("0" * rest, high[1:])),
    ]


def _joined(members: list[Node]) -> Node:
    return Seq(tuple(part for i, member in enumerate(members) for part in ((_COMMA, member) if i else (member,))))


def _listed(opening: str, member: Node, closing: str, least: int, most: int | None) -> Node:
    """`least` to `most` members in brackets, with commas between them."""
    if most == 0:
        return literal(opening + closing)
    rest = Repeat(Seq((_COMMA, member)), max(least - 1, 0), None if most is None else most - 1)
    filled = Seq((member, rest))
    return Seq((literal(opening), filled if least else optional(filled), literal(closing)))


def _properties(members: list[tuple[Node, bool]]) -> Node:
    """Members in their order, those that are not required left out or not, with commas between those that are there."""
    after: Node = Seq(())  # what may follow a member
    first: Node = Seq(())  # the whole, if no member stands before
    for member, required in reversed(members):
        with_comma, alone = Seq((_COMMA, member)), Seq((member, after))
        first = alone if required else Alt((alone, first))
        after = Seq((with_comma if required else optional(with_comma), after))
    return first


def _anything(depth: int) -> Node:
    """Any value, with arrays and objects nested up to `depth`."""
    simple = (_STRING, _NUMBER, literal("true"), literal("false"), literal("null"))
    if not depth:
        return Alt(simple)
    inner = _anything(depth - 1)
    return Alt((*simple, _listed("[", inner, "]", 0, None), _listed("{", Seq((_STRING, _COLON, inner)), "}", 0, None)))
