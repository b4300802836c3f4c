"""The sandbox against code that means harm: every attack is contained, and none of them passes.

Each attack's function returns the expected value only if the attack worked, or after it did its harm; so `pass` means
that it got through. Every attack runs with namespaces and, as on a machine without them, with the other layers alone.
"""

import importlib.util
import json
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import system_calls

from xdlm_hf.evaluation import judge, sandbox
from xdlm_hf.evaluation.sandbox import Job, Limits

SECRET = secrets.randbelow(10**12)  # the value tests expect; nobody guesses it
QUICK = Limits(seconds=4.0, memory=2**28)  # for what does not end by itself
ROOMY = Limits(seconds=60.0, memory=2**28)  # for what ends, on the busiest machine
needs_namespaces = pytest.mark.skipif(not sandbox.namespace_prefix(), reason="unshare does not work on this machine")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run as another user")
needs_filter = pytest.mark.skipif(not sandbox.system_call_filter(), reason="needs pyseccomp and libseccomp2")


@pytest.fixture(autouse=True)
def consent(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")


@pytest.fixture(params=[pytest.param(None, id="namespaces", marks=needs_namespaces), pytest.param((), id="none")])
def prefix(request):
    return request.param


def attack(program, prefix=None, limits=ROOMY, known=False):
    """Verdict on a program whose `one()` should be SECRET; `known`: the program may use that value."""
    program = program.replace("SECRET", str(SECRET)) if known else program
    assert known or str(SECRET) not in program
    return sandbox.run(Job(program, [f"assert one() == {SECRET}"], ["one"]), limits, prefix)


def processes(base=None, name=""):
    """Processes of the sandbox that go on, those that call themselves `name`; what was killed does not count."""
    listing = subprocess.run(["ps", "-wweo", "pid,comm,args"], capture_output=True, text=True, check=True).stdout
    lines = [line.strip() for line in listing.splitlines() if str(base or sandbox._base()) in line]
    return [line for line in lines if line.split()[1].startswith(name) and not ending(line.split()[0])]


def ending(pid):
    """Whether a process has been killed, or is gone: SIGKILL waits for it, or it is on its way out."""
    try:
        flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = [int(mask, 16) for mask in re.findall(r"^S(?:ig|hd)Pnd:\s*(\w+)", status, re.MULTILINE)]
    return bool(flags & 4) or any(mask >> (signal.SIGKILL - 1) & 1 for mask in pending)  # 4: PF_EXITING


def within_patience(function):
    """What `function` returns; a test fails whose function does not return within this time, as long as it may be."""
    results = queue.Queue()
    threading.Thread(target=lambda: results.put(function()), daemon=True).start()
    return results.get(timeout=120)


def wait_until(holds):
    """Waits as long as the slowest machine may need; a test that fails says so after this time."""
    deadline = time.monotonic() + 300
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert holds()


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


class TestResources:
    @pytest.mark.parametrize(
        "harm",
        [
            "os.fork()",
            "[os.fork() for _ in range(20)]",
            "subprocess.Popen([sys.executable, '-c', ''])",
            "os.execv('/bin/true', ['true'])",
            "multiprocessing.Process(target=print).start()",
            "os.posix_spawn('/bin/true', ['true'], {})",
            "os.system('true') == 0 or 1 / 0",
        ],
    )
    def test_fork_bomb(self, harm, prefix):
        program = f"import os, subprocess, sys, multiprocessing\n{harm}\ndef one():\n    return SECRET"
        assert attack(program, prefix, known=True).result == "failed"
        assert not processes()

    @pytest.mark.parametrize("harm", ["bytearray(8 << 30)", "x = [0]\nwhile True: x += x", "'a' * 10**11"])
    def test_memory_bomb(self, harm, prefix):
        verdict = attack(f"{harm}\ndef one():\n    return SECRET", prefix, known=True)
        assert verdict.result == "failed" and "MemoryError" in verdict.why

    @pytest.mark.parametrize(
        ("harm", "results"),
        [
            ("while True: pass", {"timeout", "failed"}),
            ("import time\nwhile True: time.sleep(1000)", {"timeout"}),  # which no other limit ends
            ("9 ** 9 ** 9", {"timeout", "failed"}),
            ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", {"timeout", "failed"}),
        ],
    )
    def test_infinite_loop(self, harm, results, prefix):
        program = f"{harm}\ndef one():\n    return SECRET"
        verdict = within_patience(lambda: attack(program, prefix, Limits(seconds=1.5), known=True))
        assert verdict.result in results
        assert not processes()

    def test_signals_that_end_a_loop_can_be_ignored_but_not_the_end(self, prefix):
        program = "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        program += "    except Exception: pass\nwhile True: pass"
        assert attack(program, prefix, Limits(seconds=1.5)).result == "timeout"
        assert not processes()

    @pytest.mark.parametrize(
        "harm",
        [
            "while True: print('x' * 10**6, flush=True)",
            "def put(fd):\n    try: os.write(fd, b'x' * 4096)\n    except OSError: pass\n"
            "while True: [put(fd) for fd in range(64)]",
            "def one():\n    return 'x' * 10**8",
        ],
    )
    def test_endless_output(self, harm, prefix, capfd):
        assert attack(f"import os\n{harm}", prefix, QUICK).result in ("timeout", "failed")
        assert capfd.readouterr() == ("", "")

    def test_endless_iterator_is_cut(self, prefix):
        program = "import itertools\ndef one():\n    return itertools.count()"
        assert attack(program, prefix, Limits(seconds=20)).result in ("wrong", "failed")

    def test_file_size(self, prefix):
        program = "with open('big', 'wb') as f:\n    for _ in range(64): f.write(bytes(2**20))\n"
        assert attack(program + "def one():\n    return SECRET", prefix, known=True).result == "failed"

    def test_open_files(self, prefix):
        program = "files = [open(f'f{i}', 'w') for i in range(500)]\ndef one():\n    return SECRET"
        verdict = attack(program, prefix, known=True)
        assert verdict.result == "failed" and "OSError" in verdict.why

    @needs_namespaces
    def test_many_files_do_not_fill_the_disk(self):
        program = "for i in range(60):\n    with open(f'f{i}', 'wb') as f: f.write(bytes(2**20 - 1))\n"
        verdict = attack(program + "def one():\n    return SECRET", known=True)
        assert verdict.result == "failed" and "No space left" in verdict.why

    def test_folders_in_folders_are_removed(self, prefix):
        # Deeper than shutil.rmtree gets: it recurses, and the harness with it.
        program = "import os\nfor _ in range(1200):\n    os.mkdir('d')\n    os.chdir('d')\ndef one(): return 0"
        assert attack(program, prefix, Limits(seconds=60)).result in ("wrong", "failed")
        assert not sandboxes()

    @pytest.mark.parametrize("user", [None, pytest.param(64_000, marks=needs_root)])
    def test_locked_folders_are_removed(self, user):
        # As an answer can leave them that has the harness's own user and no filter of system calls. Root, who gets
        # through any lock, removes them as another user.
        with tempfile.TemporaryDirectory() as parent:
            left = Path(parent) / "xdlm-sandbox-left"
            (left / "a" / "b").mkdir(parents=True)
            (left / "a" / "b" / "file").touch()
            if user:
                for path in (parent, left, left / "a", left / "a" / "b"):
                    os.chown(path, user, user)
            for path in (left / "a" / "b" / "file", left / "a" / "b", left / "a", left):
                path.chmod(0)
            subprocess.run([*sandbox._REMOVE, left], user=user, cwd="/", check=True, capture_output=True)
            assert not left.exists()

    def test_removing_what_an_answer_left_counts_as_its_time(self, monkeypatch, tmp_path):
        go_on = tmp_path / "go on"
        wait = 'until [ -e "$0" ]; do sleep 0.05; done; rm -rf -- "$1"'
        monkeypatch.setattr(sandbox, "_REMOVE", ("sh", "-c", wait, str(go_on)))
        verdict = attack("open('left', 'w')\ndef one(): return SECRET", (), Limits(seconds=8), known=True)
        assert verdict.result == "timeout" and verdict.why == "its files were not removed within 8 s"
        assert sandboxes()
        go_on.touch()  # it goes on in the background
        assert sandbox._removals[-1].wait(60) == 0 and not sandboxes()

    @pytest.mark.parametrize(
        "harm",
        [
            "def one(): raise ValueError('\\ud800\\x1b[2J\\n' + 'x' * 10**6)",
            "class M(type): __name__ = property(lambda cls: '\\ud800' + 'x' * 10**6)\n"
            "class E(Exception, metaclass=M): pass\ndef one(): raise E",
            "def one(): assert False, '\\ud800' * 10**6",
        ],
    )
    def test_error_texts_fit_into_a_report(self, harm, prefix):
        verdict = attack(harm, prefix)
        assert verdict.result in ("wrong", "failed") and "\\ud800" in verdict.why
        assert verdict.why.isprintable() and len(verdict.why.encode()) < 2000


def sandboxes():
    """Working folders of answers that are still there."""
    return [path.name for path in sandbox._base().glob("xdlm-sandbox-*")]


def folders():
    """Folders of harnesses that are still there."""
    return set(Path(tempfile.gettempdir()).glob(f"{sandbox._FOLDER}*"))


class TestOutside:
    def test_own_folder_can_be_written_and_is_gone_afterwards(self, prefix):
        program = "import os\nopen('a', 'w').write('b')\ndef one():\n    return open('a').read() + os.getcwd()"
        job = Job(program, ["x = one()\nassert x[:1] == 'b' and 'xdlm-sandbox-' in x, x"], ["one"])
        assert sandbox.run(job, ROOMY, prefix).result == "pass"
        assert not sandboxes()

    def test_writing(self, prefix, tmp_path):
        (tmp_path / "mine").write_text("mine")
        for path in (tmp_path, tmp_path.parent, tmp_path / "mine"):
            path.chmod(0o777)
        program = f"""
import os, shutil
def tried(action, *args):
    try: action(*args)
    except OSError: return False
    return True
def one():
    worked = [tried(open, {str(tmp_path / "new")!r}, "w"), tried(open, {str(tmp_path / "mine")!r}, "a"),
              tried(os.remove, {str(tmp_path / "mine")!r}), tried(os.mkdir, {str(tmp_path / "folder")!r}),
              tried(open, "/tmp/xdlm-escaped", "w"), tried(os.symlink, "/tmp", {str(tmp_path / "link")!r}),
              tried(os.rename, {str(tmp_path / "mine")!r}, "stolen"), tried(shutil.rmtree, {str(tmp_path)!r})]
    return SECRET if any(worked) else worked
"""
        assert attack(program, prefix, known=True).result == "wrong"
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]
        assert (tmp_path / "mine").read_text() == "mine" and not os.path.exists("/tmp/xdlm-escaped")

    def test_reading_files_and_environment(self, prefix, tmp_path, monkeypatch):
        monkeypatch.setenv("XDLM_CANARY", str(SECRET))
        (tmp_path / "secret").write_text(str(SECRET))
        for path in (tmp_path, tmp_path.parent, tmp_path / "secret"):
            path.chmod(0o777)
        program = f"""
import os, glob, re
def one():
    found = repr(dict(os.environ))
    paths = [{str(tmp_path / "secret")!r}, "/etc/passwd", "/etc/shadow", *glob.glob("/proc/[0-9]*/environ")]
    paths += ["/proc/self/environ", "/proc/%d/environ" % os.getppid(), "/proc/{os.getpid()}/environ"]
    for path in paths:
        try: found += open(path, "rb").read().decode(errors="replace") + "READ"
        except OSError: pass
    found += repr(os.listdir("."))
    try: found += repr(os.listdir({str(tmp_path)!r})) + "READ"
    except OSError: pass
    number = re.search(r"XDLM_CANARY=(\\d+)", found)
    return int(number[1]) if number else found.count("READ")
"""
        assert attack(program, prefix).result == "wrong"
        # Not one of the files could be opened.
        assert sandbox.run(Job(program, ["assert one() == 0, one()"], ["one"]), ROOMY, prefix).result == "pass"

    @needs_filter
    def test_attributes_of_files(self, prefix, tmp_path):
        # Landlock guards content alone: the owner of a file, which the answer may be, could still change these.
        mine = tmp_path / "mine"
        mine.write_text("mine")
        for path, mode in ((tmp_path.parent, 0o777), (tmp_path, 0o777), (mine, 0o666)):
            path.chmod(mode)
        before = mine.stat()
        program = f"""
import os
def one():
    worked = []
    for path in ({str(mine)!r}, {str(tmp_path)!r}):
        for name, *arguments in (("chmod", 0), ("utime", (1, 1)), ("chown", 1, 1), ("setxattr", "user.a", b"1"),
                                 ("truncate", 0)):
            try: getattr(os, name)(path, *arguments)
            except OSError: continue
            worked.append(name)
    return SECRET if worked else 0
"""
        assert attack(program, prefix, known=True).result == "wrong"
        after = mine.stat()
        assert (after.st_mode, after.st_mtime, after.st_uid) == (before.st_mode, before.st_mtime, before.st_uid)
        assert not os.listxattr(mine)

    @needs_filter
    def test_attributes_and_targets_of_links_cannot_be_read(self, prefix, tmp_path):
        (tmp_path / "link").symlink_to("/target")
        os.setxattr(tmp_path, "user.a", b"1")
        for path in (tmp_path, tmp_path.parent):
            path.chmod(0o777)
        program = f"""
import os
def one():
    for action, *arguments in ((os.readlink, {str(tmp_path / "link")!r}), (os.listxattr, {str(tmp_path)!r}),
                               (os.getxattr, {str(tmp_path)!r}, "user.a")):
        try: return action(*arguments)
        except PermissionError: pass
    return SECRET
"""
        assert attack(program, prefix, known=True).result == "pass"

    @needs_namespaces
    def test_nothing_else_exists(self, tmp_path):
        program = f"""
import os
def one():
    paths = [{str(tmp_path)!r}, "/proc", "/sys", "/home", "/root/.bashrc", "/etc/passwd", "/usr/bin"]
    return [path for path in paths if os.path.lexists(path)], os.access("/usr/lib", os.W_OK)
"""
        if "root" not in sandbox.layers():
            pytest.skip("mounts are refused on this machine")
        job = Job(program, ["import json\nx = one()\nassert False, json.dumps(x)"], ["one"])
        assert sandbox.run(job).why == "[[], false]"

    @needs_filter
    def test_watching_the_files_of_others(self, prefix, tmp_path):
        program = f"""
import ctypes
def one():
    libc = ctypes.CDLL(None)
    return SECRET if libc.inotify_add_watch(libc.inotify_init(), {os.fsencode(tmp_path)!r}, 0x100) >= 0 else 0
"""
        assert attack(program, prefix, known=True).result == "wrong"

    @needs_filter
    def test_shared_memory_and_message_queues(self, prefix):
        program = """
import ctypes
def one():
    libc = ctypes.CDLL(None)
    made = [libc.shmget(1, 4096, 0o1666), libc.msgget(1, 0o1666), libc.semget(1, 1, 0o1666),
            libc.memfd_create(b"x", 0)]
    try: made.append(open("/dev/shm/x", "w").fileno())
    except OSError: pass
    return SECRET if max(made) >= 0 else 0
"""
        assert attack(program, prefix, known=True).result == "wrong"

    @needs_filter
    @pytest.mark.parametrize(
        "harm",
        [
            # The kernel sends the signal of a pipe that has something to read, to whoever is named its owner.
            "fcntl.fcntl(pipe, {command}, {pid})\nfcntl.fcntl(pipe, 10, 9)\nasync_on()",
            "call({fcntl}, pipe, {command} + 2**32, {pid})\ncall({fcntl}, pipe, 10 + 2**32, 9)\nasync_on()",
            "call({ioctl}, pipe, 0x8901, struct.pack('i', {pid}))\nasync_on()",
            "call({ioctl}, pipe, 0x5452, struct.pack('i', 1))",
            "resource.prlimit({pid}, resource.RLIMIT_CPU, (0, 0))",
            "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
            "os.setpriority(os.PRIO_PROCESS, 0, 19)",
            "os.sched_setaffinity({pid}, [0])",
        ],
    )
    def test_signals_and_limits_by_other_doors(self, harm, prefix):
        bystander = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        program = """
import ctypes, fcntl, os, resource, struct
pipe, end = os.pipe()
def call(*arguments):
    arguments = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    if ctypes.CDLL(None, use_errno=True).syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
def async_on():
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | 0o20000)  # O_ASYNC
    os.write(end, b"x")
"""
        fcntl, ioctl = (72, 16) if os.uname().machine == "x86_64" else (25, 29)
        program += harm.format(pid=bystander.pid, command=8, fcntl=fcntl, ioctl=ioctl)
        program += "\ndef one():\n    return SECRET"
        try:
            verdict = attack(program, prefix, known=True)
            assert verdict.result == "failed" and "PermissionError" in verdict.why
            time.sleep(0.05)
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()

    @needs_filter
    def test_opening_a_socket(self, prefix):
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.1)
            program = f"""
import socket, ctypes
def one():
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
            try: socket.socket(family, kind); return SECRET
            except OSError: pass
            if ctypes.CDLL(None).socket(int(family), int(kind), 0) >= 0: return SECRET
    try: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1); return SECRET
    except OSError: return 0
"""
            assert attack(program, prefix, known=True).result == "wrong"
            with pytest.raises(TimeoutError):
                server.accept()

    @needs_namespaces
    def test_no_network_without_the_filter_either(self, monkeypatch):
        monkeypatch.setattr(sandbox, "system_call_filter", lambda: "")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\ndef one(): return SECRET"
            assert attack(program, known=True).result == "failed"

    @pytest.mark.parametrize(
        "harm",
        [
            "os.kill(os.getppid(), 9)",
            "os.killpg(0, 9)",
            "os.kill(-1, 9)",
            "os.kill(1, 9)",
            "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
            "os.setsid()",
            "[os.kill(pid, 9) for pid in range(2, 5000) if pid != os.getpid()]",
            pytest.param(f"os.kill({os.getpid()}, 9)", id="the harness"),
        ],
    )
    def test_killing_the_parent(self, harm, prefix):
        program = f"import os, signal\n{harm}\ndef one():\n    return SECRET"
        bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            assert attack(program, prefix, known=True).result == "failed"
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()
        assert not processes()


@needs_filter
class TestSystemCalls:
    """Each number tried: from within, where the filter answers with an error number that no kernel knows."""

    def check(self, result):
        assert "system calls" in result["layers"]
        assert result["verdict"][0] == "wrong" and result["unchanged"]
        let_through, worked = json.loads(result["verdict"][1])
        assert not let_through
        assert set(worked) <= set(result["allowed"]) and worked  # the calls were made
        assert result["tried"] == result["refused"] + len(result["allowed"]) and result["refused"] > 1900
        # The 32-bit entry, where the kernel has it: not a process id.
        assert result["32-bit entry"] in (
            ["wrong", str(-system_calls.REFUSAL)],
            ["failed", "the answer's process broke off"],
        )

    def test_every_number(self, prefix, monkeypatch):
        monkeypatch.setattr(sandbox, "_REFUSAL", sandbox._REFUSAL)  # which the sweep changes
        try:
            self.check(system_calls.sweep(prefix))
        finally:
            sandbox.system_call_filter.cache_clear()

    @needs_root
    @needs_namespaces
    def test_every_number_as_an_ordinary_user(self):
        result = as_ordinary_user("system_calls.py")
        assert result["user"] == ORDINARY_USER
        self.check(result)

    def test_the_filter_by_number(self):
        program = bytes.fromhex(sandbox.system_call_filter())
        refused = 0x50000 | sandbox._REFUSAL
        here = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[os.uname().machine]
        plain = system_calls.numbers(sandbox._ALLOWED)
        for number in (*range(4096), *range(system_calls.X32, system_calls.X32 + 4096), 2**31 - 1, -1):
            wanted = 0x7FFF0000 if number in plain else refused
            if number not in system_calls.allowed():
                assert system_calls.decide(program, here, number) == refused
            elif number in plain:
                assert system_calls.decide(program, here, number) == wanted
            for other in (0x40000003, 0xC000003E ^ 0x80000000, 0x40000028, 0xC00000F3):  # i386, x32, arm, riscv64
                assert system_calls.decide(program, other, number) == refused
        for (name, position), values in sandbox._ALLOWED_VALUES.items():
            for value in (*range(2048), *values, 0x8901, 0x8902, 0x5452, 0x40086602, 2**32 - 1):
                for high in (0, 2**32):  # the kernel reads the low half
                    arguments = [0] * 6
                    arguments[position] = value | high
                    decision = system_calls.decide(program, here, sandbox._number(name), arguments)
                    assert (decision == 0x7FFF0000) == (value in values), (name, value)

    def test_an_incomplete_filter_is_not_announced(self, monkeypatch, caplog):
        sandbox.system_call_filter.cache_clear()
        monkeypatch.setattr(sandbox, "_ALLOWED", [*sandbox._ALLOWED, "no_such_call"])
        assert sandbox.system_call_filter() == ""
        assert "libseccomp does not know the system call 'no_such_call'" in caplog.text
        monkeypatch.setitem(sys.modules, "pyseccomp", None)
        sandbox.system_call_filter.cache_clear()
        try:
            assert (
                sandbox.system_call_filter() == "" and "no filter of system calls: import of pyseccomp" in caplog.text
            )
            for prefix in (None, ()):
                verdict = attack("def one(): return SECRET", prefix, known=True)
                assert verdict.result == "pass" and "system calls" not in verdict.layers
        finally:
            sandbox.system_call_filter.cache_clear()


ORDINARY_USER = 64_000


def as_ordinary_user(script):
    """What a script of this folder prints as JSON, run by a user who has no rights and an account nowhere.

    In a mount namespace, where Python, which may be under /root, lies where that user can read it; with a package that
    holds the evaluation alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        package = folder / "xdlm_hf" / "evaluation"
        shutil.copytree(Path(sandbox.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        (package.parent / "__init__.py").touch()
        shutil.copy(importlib.util.find_spec("pyseccomp").origin, folder)
        shutil.copy(Path(__file__).with_name(script), folder)
        (folder / "python").mkdir()
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        python = f"{folder}/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        user = f"setpriv --reuid {ORDINARY_USER} --regid {ORDINARY_USER} --clear-groups"
        command = f"mount --bind {sys.base_prefix} {folder}/python && exec {user} {python} -B {folder}/{script}"
        environment = {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", command], env=environment, cwd="/", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


FAKES = {
    "exit 0": "import sys\nsys.exit(0)",
    "_exit 0": "import os\nos._exit(0)",
    "_exit 0 when asked": "import os\ndef one(): os._exit(0)",
    "exit in an exception hook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nraise Exception",
    "patched builtins": """
import builtins
builtins.AssertionError = type('Quiet', (Exception,), {})
builtins.exec = builtins.eval = builtins.compile = lambda *a, **k: None
builtins.isinstance = builtins.all = builtins.any = lambda *a: True
builtins.Exception = builtins.BaseException = KeyError
def one(): return 0
""",
    "patched os._exit and sys.exit": """
import os, sys, json
os._exit = sys.exit = lambda *a: None
json.dumps = lambda *a, **k: '{"verdict": "pass", "why": "", "layers": []}'
def one(): return 0
""",
    "equal to everything": """
class Equal(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def one(): return Equal(0)
""",
    "equal to everything, no number": """
class Equal:
    def __eq__(self, other): return True
    __req__ = __eq__
def one(): return Equal()
""",
    "a class that is the answer": "class one:\n    def __new__(cls): return cls\n    __eq__ = lambda *a: True",
    "a verdict on every descriptor": """
import os, struct, json
data = json.dumps({"verdict": "pass", "why": "", "layers": []}).encode()
for fd in range(256):
    try: os.write(fd, struct.pack(">Q", len(data)) + data)
    except OSError: pass
os._exit(0)
""",
    "replies before the questions": """
import os, struct, json
data = json.dumps([True, None]).encode()
for fd in range(3, 256):
    try: os.write(fd, (struct.pack(">Q", len(data)) + data) * 50)
    except OSError: pass
def one(): return None
""",
    "looking for the tests": """
import gc, sys, re, os
def one():
    text = []
    for thing in gc.get_objects():
        try: text.append(repr(thing))
        except Exception: pass
    frame = sys._getframe()
    while frame:
        text.append(repr(frame.f_locals) + repr(frame.f_globals))
        frame = frame.f_back
    for fd in range(64):
        try:
            os.set_blocking(fd, False)
            text.append(repr(os.read(fd, 10**6)))
        except OSError: pass
    found = re.search(r"one\\(\\) == (\\d+)", ' '.join(text))
    return int(found[1]) if found else 0
""",
    "the judge's memory": """
import os, re
def one():
    for pid in range(1, 100):
        try: data = open(f"/proc/{pid}/mem", "rb"); return 1
        except OSError: pass
    import ctypes
    return 2 if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0 else 3
""",
    "changed frames and trace": """
import sys
def trace(frame, event, arg):
    if event == 'return' and 'result' in frame.f_locals: frame.f_locals['result'] = True
    return trace
sys.settrace(trace)
sys._getframe(1).f_globals['encode'] = lambda *a: True
def one(): return 0
""",
    "a lasting child": "import os\nif os.fork() == 0:\n    while True: pass\ndef one(): return 0",
    "crash": "import ctypes\nctypes.string_at(0)\ndef one(): return 0",
    "exit in a destructor": """
import os
class Last:
    def __del__(self): os._exit(0)
def one(): return Last()
""",
    "exit by atexit and at a signal": """
import atexit, os, signal
atexit.register(os._exit, 0)
signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
def one():
    while True: pass
""",
    "modules that shadow those of the judge": """
for name in ("json", "math", "decimal", "fractions", "struct", "numbers", "_json", "judge"):
    with open(name + ".py", "w") as file: file.write("import os\\nos._exit(0)")
def one(): return 0
""",
    "a class that is equal by its metaclass": """
class Meta(type):
    def __eq__(cls, other): return True
    def __instancecheck__(cls, other): return True
    __hash__ = type.__hash__
class Any(metaclass=Meta): pass
def one(): return Any
""",
    "a text that is equal to everything": """
class Text(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def one(): return Text("x")
""",
    "a name that looks alike": "def \u043ene(): return 0",
    "brackets without end": """
import os, struct
data = b"[" * 10**6
for fd in range(3, 64):
    try: os.write(fd, struct.pack(">Q", len(data)) + data)
    except OSError: pass
def one(): return 0
""",
    "a message that is longer than it says": """
import os, struct
for fd in range(3, 64):
    try: os.write(fd, struct.pack(">Q", 2**60) + b"[true, 0]")
    except OSError: pass
def one(): return 0
""",
    "a thread that goes on": """
import threading, os
def late():
    while True: pass
threading.Thread(target=late, daemon=True).start()
def one(): return 0
""",
    "a session of its own": "import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\ndef one(): return 0",
    "tracing the judge": """
import ctypes, os
def one():
    libc = ctypes.CDLL(None)
    buffer = ctypes.create_string_buffer(4096)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 4096)
    libc.ptrace(16, os.getppid(), 0, 0)
    libc.process_vm_readv(os.getppid(), vector, 1, vector, 1, 0)
    return int.from_bytes(buffer.raw[:8], "little")
""",
    "closed descriptors": "import os\nos.closerange(0, 256)\ndef one(): return 0",
}


class TestFakedPass:
    @pytest.mark.parametrize("program", FAKES.values(), ids=FAKES)
    def test_none_counts(self, program, prefix):
        assert attack(program, prefix, QUICK).result in ("wrong", "failed", "timeout")
        assert not processes()

    def test_the_same_checks_see_a_real_pass(self, prefix):
        # Guards the guards: a sandbox in which nothing passes would make every test above succeed.
        assert attack("def one(): return SECRET", prefix, known=True).result == "pass"

    def test_shadowing_a_builtin_reaches_no_test(self):
        program = "def sorted(x): return [1, 2]\ndef f(x): return x"
        assert sandbox.run(Job(program, ["assert sorted(f([3, 1])) == [1, 2]"], ["f"])).result == "wrong"


class TestConsentAndReport:
    def test_refused_without_consent(self, monkeypatch):
        monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
        job = Job("", [], [])
        for action in (lambda: sandbox.run(job), lambda: sandbox.run_all([job])):
            with pytest.raises(ValueError, match="set HF_ALLOW_CODE_EVAL=1 .*--confirm_run_unsafe_code"):
                action()

    def test_layers_are_named_and_missing_ones_warned_of(self, monkeypatch, caplog):
        held = sandbox.layers()
        assert {"limits", "dies with its parent"} <= set(held) <= set(sandbox.LAYERS)
        sandbox.announce.cache_clear()
        monkeypatch.setattr(sandbox, "layers", lambda: ("limits", "files", "unprivileged"))
        sandbox.announce()
        warnings = [record.message for record in caplog.records]
        assert any("no network or process namespace" in text for text in warnings)
        assert any("no seccomp: install pyseccomp" in text for text in warnings)
        assert not any("Landlock" in text for text in warnings)
        sandbox.announce.cache_clear()

    @pytest.mark.parametrize(
        ("program", "namespaces"),
        [
            ("while True: pass", True),
            # Without the parent's death signal it would live on, asleep.
            ("import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nwhile True: time.sleep(100)", False),
        ],
        ids=["spinning", "sleeping"],
    )
    def test_ended_harness_ends_the_answer(self, tmp_path, program, namespaces):
        # The caller is killed, not asked: nothing of the sandbox may outlive it.
        script = tmp_path / "caller.py"
        # The answer's process names itself, to show that it has begun.
        named = "import ctypes\nctypes.CDLL(None).prctl(15, b'answer', 0, 0, 0)\n"
        script.write_text(
            "from xdlm_hf.evaluation import sandbox\n"
            "print(sandbox._base(), flush=True)\n"
            f"prefix = {None if namespaces else ()!r}\n"
            f"sandbox.run(sandbox.Job({named + program!r}, [], []), sandbox.Limits(seconds=600), prefix)\n"
        )
        with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as caller:
            base = caller.stdout.readline().decode().strip()
            try:
                wait_until(lambda: processes(base, "answer"))
            finally:
                caller.kill()
        wait_until(lambda: not processes(base))

    def test_folders_of_killed_harnesses_are_removed(self, tmp_path):
        script = "from xdlm_hf.evaluation import sandbox\nprint(sandbox._base(), flush=True)\ninput()"
        start = [sys.executable, "-c", script]
        with subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
            with subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killed:
                paths = [Path(process.stdout.readline().strip()) for process in (living, killed)]
                assert set(paths) <= folders()
                killed.kill()
            (paths[1] / "xdlm-sandbox-left" / "folder").mkdir(parents=True)
            assert paths[1] in folders()
            ended = subprocess.run(start, input="\n", capture_output=True, text=True, check=True)
            assert paths[0] in folders() and paths[1] not in folders()
            living.communicate("\n")
        # Those that ended by themselves have removed their own.
        assert not {paths[0], Path(ended.stdout.strip())} & folders()
