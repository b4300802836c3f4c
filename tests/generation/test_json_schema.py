"""JSON Schema as an automaton over bytes: the language of each keyword, what is refused, the limits of size."""

import datetime
import json
import random
import re

import jsonschema
import pytest
import torch

from xdlm_hf import XDLMGenerationConfig
from xdlm_hf.generation.automaton import Alt, Bytes, Chars, Repeat, Seq, compiled, optional, utf8_ranges
from xdlm_hf.generation.json_schema import FREE_DEPTH, schema_automaton


def automaton(schema):
    return schema_automaton(json.dumps(schema))


def words(language, rng, number, longest=60):
    """Random texts of a language, by random moves that can still end."""
    ends = language.accepts.clone()
    while True:  # states from which the end can be reached
        reach = ends | torch.where(language.step >= 0, ends[language.step.clamp_min(0)], False).any(1)
        if reach.equal(ends):
            break
        ends = reach
    step, accepts, moves = language.step.tolist(), language.accepts.tolist(), {}
    found = []
    while len(found) < number:
        state, text = 0, b""
        while len(text) < longest and not (accepts[state] and rng.random() < 0.3):
            if state not in moves:
                moves[state] = [(byte, to) for byte, to in enumerate(step[state]) if to >= 0 and ends[to]]
            if not moves[state]:
                break
            byte, state = rng.choice(moves[state])
            text += bytes([byte])
        if accepts[state]:
            found.append(text)
    return found


SCHEMAS = [
    {"type": "string", "minLength": 1, "maxLength": 3},
    {"type": "string", "pattern": '^(a|é{2})"?\\\\$'},
    {"type": "string", "format": "uuid"},
    {"type": "integer", "minimum": -12, "exclusiveMaximum": 105},
    {"type": "number"},
    {"type": ["string", "null"], "maxLength": 2},
    {"enum": ['a"b', "é\n", 1, 1.5, None, {"x": [1, 2], "": {}}, "a.b*"]},
    {"const": {"a": [True]}, "type": "object"},
    {"anyOf": [{"type": "boolean"}, {"allOf": [{"$ref": "#/$defs/t"}]}], "$defs": {"t": {"type": "null"}}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "null"}, {"enum": [1, 2]}], "items": False},
    {"type": "object", "properties": {'k"': {"type": "null"}, "b": {"type": "boolean"}}, "required": ["b"]},
    {"type": "object", "properties": {c: {"type": "null"} for c in "abcd"}, "required": ["b", "c"]},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "object", "title": "anything", "description": "d", "default": {}, "examples": []},
    {"type": "array"},
    True,
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_every_text_of_the_language_is_valid(schema):
    language = automaton({"anyOf": [schema], "$defs": schema.get("$defs", {})} if schema is not True else {})
    found = words(language, random.Random(0), 40)
    assert len(set(found)) > 1 or found[0] in (b"{}", b'{"a": [true]}')
    for text in found:
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


VALUES = [
    ({"type": "string", "minLength": 1, "maxLength": 2}, ["é", "a😀", '"\\', "\n"], ["", "abc"]),
    ({"type": "string", "pattern": "[^a-c]x?|\\d\\.\\w"}, ["d", '"x', "1.b"], ["a", "dd", "1xb"]),
    ({"type": "integer"}, [0, -7, 10**30], ["1", 1.5]),
    ({"type": "number"}, [0.5, -1e20, 3], ["1", None]),
    ({"type": "array", "items": {"enum": [1]}, "minItems": 2}, [[1, 1], [1] * 9], [[], [1], [2, 1]]),
    ({"type": "array", "items": {"enum": [1]}, "maxItems": 0}, [[]], [[1]]),
    ({"type": "object", "properties": {"a": {}, "b": {}}}, [{}, {"a": [1]}, {"a": 1, "b": {"c": 2}}], [{"c": 1}]),
]  # fmt: skip


@pytest.mark.parametrize("schema, inside, outside", VALUES, ids=lambda value: str(value)[:40])
def test_the_language_holds_valid_values_and_no_others(schema, inside, outside):
    language = automaton(schema)
    for values, wanted in ((inside, True), (outside, False)):
        for value in values:
            for separators in ((",", ":"), (", ", ": ")):
                text = json.dumps(value, ensure_ascii=False, separators=separators)
                assert language.matches(text.encode()) == wanted, text
    assert not language.matches(b"") and not language.matches(b" {}")


def test_properties_keep_their_order_and_required_ones_are_there():
    names = "abcd"
    for required in range(16):
        needed = [name for i, name in enumerate(names) if required >> i & 1]
        language = automaton({"type": "object", "properties": {n: {"type": "null"} for n in names}, "required": needed})
        for given in range(16):
            present = [name for i, name in enumerate(names) if given >> i & 1]
            text = json.dumps(dict.fromkeys(present))
            assert language.matches(text.encode()) == (set(needed) <= set(present))
    assert not language.matches(b'{"b":null,"a":null,"c":null,"d":null}')


@pytest.mark.parametrize("seed", range(4))
def test_integers_have_exactly_their_range(seed):
    rng = random.Random(seed)
    for _ in range(6):
        ends = sorted(rng.randint(-250, 250) for _ in range(2))
        bounds = dict(rng.sample(list(zip(["minimum", "maximum"], ends, strict=True)), rng.randint(1, 2)))
        language = automaton({"type": "integer", **bounds})
        for value in range(-1200, 1200):
            wanted = bounds.get("minimum", value) <= value <= bounds.get("maximum", value)
            assert language.matches(str(value).encode()) == wanted, (bounds, value)
        assert not any(language.matches(text) for text in (b"", b"-", b"01", b"-01", b"+1", b"1.0"))


@pytest.mark.parametrize(
    "pattern",
    ["^[A-Z]{2}-\\d{1,2}$", "a|b+", '[^a-c"]x?', "(?:ab)*c", "^\\w+@\\w$", "\\u00e9.", "a\\$", "^a\\\\$", "x{2,}?y"],
)  # fmt: skip
def test_patterns_match_what_python_matches(pattern):
    language = automaton({"type": "string", "pattern": pattern})
    expression = re.compile(pattern, re.ASCII)
    rng, seen = random.Random(0), 0
    for text in [json.loads(word) for word in words(language, rng, 30)]:
        assert expression.fullmatch(text), text
    for _ in range(500):
        text = "".join(rng.choice('abcxyAZ09-@."\\é$\t') for _ in range(rng.randint(0, 5)))
        wanted = expression.fullmatch(text) is not None
        seen += wanted
        assert language.matches(json.dumps(text, ensure_ascii=False).encode()) == wanted, text


def test_dates_are_those_of_the_calendar():
    language = automaton({"type": "string", "format": "date"})
    for year in (1, 1900, 2000, 2024):
        for month in range(14):
            for day in range(33):
                try:
                    wanted = bool(datetime.date(year, month, day))
                except ValueError:
                    wanted = False
                assert language.matches(f'"{year:04}-{month:02}-{day:02}"'.encode()) == wanted


def test_free_values_nest_up_to_a_depth():
    language = automaton({"type": "object"})
    inside = "[" * FREE_DEPTH + "1" + "]" * FREE_DEPTH
    assert language.matches(f'{{"a": {inside}}}'.encode())
    assert not language.matches(f'{{"a": [{inside}]}}'.encode())


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "number", "minimum": 1}, "at #: 'minimum' is not supported for type number; leave it out"),
        ({"type": "array", "items": {"oneOf": []}}, "at #/items: 'oneOf' is not supported; leave it out"),
        ({"type": "array", "uniqueItems": True}, "at #: 'uniqueItems' is not supported for type array"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "at #/properties/a: 'not' is not supported"),
        ({"type": "object", "minProperties": 1}, "'minProperties' is not supported for type object"),
        ({"enum": [1], "minimum": 2}, "'minimum' is not supported beside 'enum'"),
        ({"enum": ["a"], "type": "integer"}, "'a' is not of type='integer'"),
        ({"allOf": [{}, {}]}, "'allOf' is supported with one schema only"),
        ({"$ref": "#"}, r"\$ref='#' is recursive, which a finite automaton cannot follow"),
        ({"$ref": "other.json"}, r"\$ref='other.json' is not found in the schema"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "'maxLength' is not supported beside 'pattern'; state it"),
        ({"type": "string", "format": "email"}, r"format='email' is not supported; known are \['date', 'uuid'\]"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength=3 is above maxLength=2"),
        ({"type": "string", "minLength": -1}, "minLength=-1 must be an integer of at least 0"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "no integer lies from 2 to 1"),
        ({"type": "integer", "minimum": 0.5}, "minimum=0.5 must be an integer"),
        ({"type": "integer", "minimum": 10**30}, "minimum has more than 18 digits"),
        ({"type": "object", "required": ["a"]}, "required='a' is not among 'properties'"),
        ({"type": "array", "prefixItems": [{}], "items": {}}, "'prefixItems' is supported with items=false"),
        ({"type": "text"}, "type='text' must be of"),
        ({"enum": [1], "type": [["x"]]}, r"type=\[\['x'\]\] must be of"),
        ({"const": 1, "type": {"a": 1}}, "type={'a': 1} must be of"),
        ({"type": "object", "properties": {"a": True}, "required": [["a"]]}, r"required=\['a'\] must be the name"),
        (
            {"type": "object", "properties": {"a": True}, "additionalProperties": 5},
            "additionalProperties=5 must be true",
        ),
        ({"type": "object", "properties": {"a": False}}, "False is no schema that a value can have"),
        ("{", "json_schema is not JSON: "),
        (3, "json_schema is int, and must be a dict or its JSON"),
        *(
            ({"type": "string", "pattern": pattern}, message)
            for pattern, message in {
                "(?=a)": "holds a look-around, a named group or a flag",
                "(a)\\1": r"holds \\1, which is not supported",
                "\\bword": r"holds \\b, which is not supported",
                "a^b": "holds . inside, not at its start",
                "(a": r"holds a \( without \)",
                "a)": r"holds a \) without \(",
                "a**": "holds a quantifier after a quantifier",
                "*a": r"holds the quantifier \* after nothing",
                "a{,2}": "holds a { that is no quantifier",
                "a{3,2}": r"holds the quantifier \{3,2\}, which is too large or empty",
                "[": "ends too early",
                "[z-a]": "holds a class with a range that is none",
                "\\u0001": "holds a class without a printable character",
            }.items()
        ),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused_by_name(schema, message):
    with pytest.raises(ValueError, match=message):
        XDLMGenerationConfig(json_schema=schema)


def doubled(levels):
    definitions = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{levels}": {"type": "null"}}}


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "string", "maxLength": 10**9}, "lower maxLength and maxItems"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 10**9}, "lower maxLength and maxItems"),
        ({"type": "string", "pattern": "(a|b)*a(a|b){30}"}, "more than 8192 states"),
        ({"type": "string", "pattern": "((((){4000}){4000}){4000}){4000}"}, "more than 8192 states"),
        ({"type": "string", "pattern": "((a?){600}b?){300}"}, "more than 8192 states"),
        (doubled(40), "has more than 4096 parts"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_schemas_that_would_explode_are_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        automaton(schema)


def test_expressions_agree_with_python_on_all_short_texts():
    rng = random.Random(0)
    letters = "ab"

    def random_node(depth):
        """An expression and its regular expression."""
        kind = rng.randrange(2 if not depth else 5)
        if kind < 2:
            letter = rng.choice(letters)
            return (Bytes(letter.encode()), letter) if kind else (Chars(((97, 98),)), "[ab]")
        parts = [random_node(depth - 1) for _ in range(2)]
        nodes, texts = tuple(node for node, _ in parts), [text for _, text in parts]
        if kind == 2:
            return Seq(nodes), "".join(texts)
        if kind == 3:
            return Alt(nodes), f"(?:{'|'.join(texts)})"
        least, most = rng.choice([(0, 1), (0, None), (1, None), (2, 3), (0, 2)])
        return Repeat(nodes[0], least, most), f"(?:{texts[0]}){{{least},{'' if most is None else most}}}"

    texts = ["".join(letters[i >> j & 1] for j in range(n)) for n in range(6) for i in range(2**n)]
    for _ in range(60):
        node, expression = random_node(3)
        language = compiled(optional(node)) if rng.random() < 0.2 else compiled(node)
        wanted = re.compile(expression)
        for text in texts[1:]:
            assert language.matches(text.encode()) == (wanted.fullmatch(text) is not None), (expression, text)


def test_ranges_of_characters_are_their_utf8():
    rng = random.Random(0)
    for _ in range(150):
        first = rng.choice([rng.randrange(0x300), rng.randrange(0x11000), rng.randrange(0x110000)])
        last = min(first + rng.choice([0, 1, 50, 3000, 70000, 0x110000]), 0x10FFFF)
        sequences = list(utf8_ranges(first, last))
        sizes = [torch.tensor([high - low + 1 for low, high in sequence]).prod() for sequence in sequences]
        surrogates = max(0, min(last, 0xDFFF) - max(first, 0xD800) + 1)
        assert sum(sizes) == last - first + 1 - surrogates  # with the next lines: each character once
        for code in {first, last, *(rng.randint(first, last) for _ in range(10))} - set(range(0xD800, 0xE000)):
            text = chr(code).encode()
            fits = [
                len(s) == len(text) and all(a <= b <= z for b, (a, z) in zip(text, s, strict=True)) for s in sequences
            ]
            assert sum(fits) == 1
