"""The judge's verdicts: what passes, what does not, and what crosses between an answer and its tests."""

import re

import pytest
from sandboxes import QUICK, ROOMY, attack

from xdlm_hf.evaluation import judge, sandbox
from xdlm_hf.evaluation.sandbox import Job, Limits

pytestmark = pytest.mark.usefixtures("consent")


class TestVerdicts:
    @pytest.mark.parametrize(
        ("program", "result", "why"),
        [
            ("def one():\n    return SECRET", "pass", ""),
            ("def one():\n    return 0", "wrong", ""),
            ("def one(:\n    return 0", "failed", "SyntaxError"),
            ("", "failed", "AttributeError.*one"),
            ("def two():\n    return SECRET", "failed", "AttributeError.*one"),
            ("1 / 0\ndef one():\n    return SECRET", "failed", "ZeroDivisionError"),
            ("assert False\ndef one():\n    return SECRET", "failed", ""),
            ("def one():\n    return 1 / 0", "failed", "ZeroDivisionError: division by zero"),
            ("def one():\n    assert False, 'mine'", "wrong", "mine"),
            ("import torch\ndef one():\n    return SECRET", "failed", "ModuleNotFoundError"),
            ("def one():\n    while True: pass", "timeout", "not done after 4 s"),
            ("def one():\n    a = []\n    a.append(a)\n    return a", "wrong", ""),
            ("def one():\n    a = ()\n    for _ in range(10**5): a = (a,)\n    return a", "failed", "RecursionError"),
            ("print('to standard output')\ndef one():\n    return SECRET", "pass", ""),
        ],
    )
    def test_each(self, program, result, why, prefix):
        verdict = attack(program, prefix, QUICK if result == "timeout" else ROOMY, known=True)
        assert verdict.result == result, verdict
        assert re.search(why, verdict.why), verdict

    def test_names_of_the_standard_library_are_there(self, prefix):
        modules = "re math cmath collections heapq itertools operator sys array copy random string typing datetime"
        imports = "".join(f"import {name}\n" for name in f"{modules} functools statistics bisect hashlib".split())
        assert attack(f"{imports}def one():\n    return SECRET", prefix, known=True).result == "pass"

    def test_values_cross_as_they_are(self):
        program = """
import collections, fractions, re
class Node:
    def __init__(self, value): self.value, self.next = value, None
def same(x): return x
def count(x): return collections.Counter(x)
def squares(n): return (i * i for i in range(n))
def half(): return fractions.Fraction(1, 2)
def match(x): return re.match('a', x)
def total(node): return 0 if node is None else node.value + total(node.next)
"""
        literals = "None, True, -1, 10**5000, 1.5, 2j, 'aé\\ud800', b'a', [1, (2, {3}), {'a': {4: [5]}}], range(3)"
        tests = [
            f"for x in ({literals}, float('inf')):\n    assert same(x) == x and type(same(x)) is type(x), x",
            "assert same(float('nan')) != same(float('nan'))",
            "assert count('aab') == {'a': 2, 'b': 1}",
            "assert list(squares(4)) == [0, 1, 4, 9]",
            "assert half() == 0.5",
            "assert match('abc') and not match('b')",
            "head = Node(1); head.next = Node(2); head.next.next = Node(3)",
            "assert total(head) == 6 and total(head.next) == 5 and head != Node(1) and head.next == head.next",
        ]
        job = Job(program, tests, ["same", "count", "squares", "half", "match", "Node", "total"])
        assert sandbox.run(job).result == "pass", sandbox.run(job)

    def test_types_and_views_cross(self):
        program = """
import array, collections, datetime, decimal
def same(x): return x
def day(): return datetime.date(2020, 1, 2)
def moment(): return datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
def keys(d): return d.keys()
def items(d): return d.items()
def values(d): return d.values()
def ordered(): return collections.OrderedDict(a=1)
def groups():
    d = collections.defaultdict(list)
    d["a"].append(1)
    return d
def loop():
    a = []
    a.append(a)
    return a
"""
        tests = [
            "import array, collections, datetime, decimal",
            "assert day() == datetime.date(2020, 1, 2) and day() != datetime.date(2020, 1, 3)",
            "assert moment().utcoffset() == datetime.timedelta(hours=2)",
            "assert keys({1: 2}) == {1} and keys({1: 2}) != [1] and keys({1: 2}) | {3} == {1, 3}",
            "assert items({1: 2}) == {(1, 2)} and list(values({1: 2})) == [2]",
            "assert keys(ordered()) == {'a'} and list(reversed(ordered())) == ['a']",
            "assert groups() == {'a': [1]} and groups()['b'] == [] and type(groups()) is collections.defaultdict",
            "for x in (array.array('d', [1.5]), collections.deque([1], 3), decimal.Decimal('1.0'), bytearray(b'a'),\n"
            "          int, collections.Counter('aab'), datetime.time(1), slice(1, 2)):\n"
            "    assert same(x) == x and type(same(x)) is type(x), x",
            "assert repr(same(collections.deque([1], 3))) == 'deque([1], maxlen=3)'",
            "a = loop()\nassert a[0] is a",
        ]
        assert sandbox.run(Job(program, tests, "same day moment keys items values ordered groups loop".split())) == (
            sandbox.Verdict("pass", "", sandbox.layers())
        )

    def test_what_a_call_changes_in_its_arguments(self):
        program = """
kept = []
def sort(x): x.sort()
def corner(m):
    m[0][0] = 1
    return m
def swap(d, *, log): log.append(d.pop("a")); d["b"] = log
def rotate(q): q.rotate(1)
def fill(b): b[:] = b"new"
def fail(x): x.append(1); raise KeyError("k")
def first(t): t[0].add(2)
"""
        tests = [
            "x = [3, 1, 2]\nassert sort(x) is None and x == [1, 2, 3]",
            "m = [[0] * 2] * 2\nassert corner(m) is m and m == [[1, 0], [1, 0]] and m[0] is m[1]",
            "d, log = {'a': 1}, []\nswap(d, log=log)\nassert d == {'b': [1]} and log == [1] and d['b'] is log",
            "import collections\nq = collections.deque([1, 2, 3], 5)\nrotate(q)\nassert list(q) == [3, 1, 2]",
            "b = bytearray(b'old')\nfill(b)\nassert b == b'new'",
            "x = []\ntry: fail(x)\nexcept KeyError: assert x == [1]\nelse: assert False",
            "t = ({1},)\nfirst(t)\nassert t == ({1, 2},)",
            # What is not changed stays the same object, down to a number that does not equal itself.
            "n = float('nan')\nx = [n, 1]\ntry: corner(x)\nexcept TypeError: assert x == [n, 1]",
        ]
        names = "sort corner swap rotate fill fail first".split()
        for prefix in (None, ()):
            assert sandbox.run(Job(program, tests, names), prefix=prefix).result == "pass"
        for test in ("x = [2, 1]\nsort(x)\nassert x == [2, 1]", "x = [1]\nrotate(x)"):
            assert sandbox.run(Job(program, [test], names)).result in ("wrong", "failed")

    def test_exceptions_cross(self):
        program = """
import decimal, json
class Mine(ValueError):
    def __init__(self, code):
        super().__init__("not shown")
        self.code = code
    def __str__(self): return f"code {self.code}"
class Special(Mine): pass
def negative(x):
    if x < 0: raise ValueError("negative", x)
    return x
def special(): raise Special(3)
def divided(): return decimal.Decimal(1) / 0
def parsed(): return json.loads("{")
def leave(): raise SystemExit(1)
def assertion(): raise AssertionError("mine")
"""
        names = "Mine Special negative special divided parsed leave assertion".split()
        tests = [
            "try: negative(-1)\nexcept ValueError as e: assert e.args == ('negative', -1)\nelse: assert False",
            "try: special()\nexcept Mine as e: assert type(e) is Special and (e.code, str(e)) == (3, 'code 3')\n"
            "else: assert False",
            "assert issubclass(Special, Mine) and issubclass(Mine, ValueError) and not issubclass(Mine, KeyError)",
            "import decimal\ntry: divided()\nexcept decimal.DivisionByZero: pass\nelse: assert False",
            "import json\ntry: parsed()\nexcept json.JSONDecodeError as e: assert 'line' in str(e)\nelse: assert False",
            "try: leave()\nexcept SystemExit as e: assert e.args == (1,)\nelse: assert False",
        ]
        assert sandbox.run(Job(program, tests, names)).result == "pass"
        expected = {
            "negative(-1)": ("failed", "ValueError: ('negative', -1)"),
            "special()": ("failed", "Special: code 3"),
            "try: negative(-1)\nexcept KeyError: pass": ("failed", "ValueError: ('negative', -1)"),
            "try: negative(1)\nexcept ValueError: pass\nelse: assert False, 'none'": ("wrong", "none"),
            "assertion()": ("wrong", "mine"),
        }
        for test, verdict in expected.items():
            got = sandbox.run(Job(program, [test], names))
            assert (got.result, got.why) == verdict, test

    @pytest.mark.parametrize("leave", ["import os\n    os._exit(0)", "import ctypes\n    ctypes.string_at(0)"])
    def test_an_answer_that_is_gone_raises_nothing_that_a_test_may_expect(self, leave):
        for test in ("try: f()\nexcept Exception: pass", "try: f()\nexcept: pass"):
            assert sandbox.run(Job(f"def f():\n    {leave}", [test], ["f"])).result == "failed"

    def test_arrays(self, prefix):
        pytest.importorskip("numpy")
        program = """
import numpy as np
def same(x): return x
def table(): return np.arange(6).reshape(2, 3)
def integer(): return np.int64(5)
def ragged(): return np.array([[1], [2, 3]], dtype=object)
def day(): return np.datetime64("2020-01-01")
def double(x): x *= 2
def solved(): return np.linalg.solve(np.eye(100) * 2, np.ones(100)), np.random.default_rng(0).normal(size=3)
"""
        tests = [
            "import numpy as np",
            "assert table().tolist() == [[0, 1, 2], [3, 4, 5]] and table().dtype == np.arange(1).dtype",
            "assert integer() == 5 and type(integer()) is np.int64 and day() == np.datetime64('2020-01-01')",
            "assert ragged()[1] == [2, 3] and same(np.array([])).shape == (0,)",
            "x = np.arange(6).reshape(2, 3)\nassert same(x) is x\ndouble(x[:, ::2])\n",
            "x = np.arange(6).reshape(2, 3)[:, ::2]\ndouble(x)\nassert x.tolist() == [[0, 4], [6, 10]]",
            "assert np.allclose(solved()[0], 0.5) and solved()[1].shape == (3,)",
        ]
        names = "same table integer ragged day double solved".split()
        verdict = sandbox.run(Job(program, tests, names), Limits(seconds=60), prefix)
        assert verdict.result == "pass", verdict
        # As in plain Python, an array of several values has no truth value.
        verdict = sandbox.run(Job(program, ["assert table() == [0]"], names), Limits(seconds=60), prefix)
        assert (verdict.result, verdict.why[:10]) == ("failed", "ValueError")

    def test_a_test_that_cannot_be_asked_has_no_pass(self):
        verdict = sandbox.run(Job("def f(g): return g()", ["assert f(lambda: 1) == 1"], ["f"]))
        assert verdict.result == "failed" and "no plain value" in verdict.why

    def test_many_at_once_keep_their_order(self):
        jobs = [Job(f"def one(): return {i}", [f"assert one() == {i // 2 * 2}"], ["one"]) for i in range(12)]
        assert [v.result for v in sandbox.run_all(jobs, workers=4)] == ["pass", "wrong"] * 6

    def test_names_a_module_defines(self):
        source = "import a\nx = y, (z, w) = f()\nclass C: v = 1\ndef f():\n    inner = 1\nasync def g(): pass"
        assert judge.top_level_names(source) == {"x", "y", "z", "w", "C", "f", "g"}
