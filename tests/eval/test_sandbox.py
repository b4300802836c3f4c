"""The sandbox against code that means harm: every attack is contained, and none of them passes.

Each attack's function returns the expected value only if the attack worked, or after it did its harm; so `pass` means
that it got through. Every attack runs with namespaces and, as on a machine without them, with the other layers alone.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from sandboxes import (
    QUICK,
    ROOMY,
    SECRET,
    attack,
    folders,
    needs_filter,
    needs_namespaces,
    needs_root,
    processes,
    sandboxes,
    wait_until,
    within_patience,
)

from xdlm_hf.evaluation import sandbox
from xdlm_hf.evaluation.sandbox import Job, Limits

pytestmark = pytest.mark.usefixtures("consent")


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
        begun = time.monotonic()
        verdict = within_patience(lambda: attack(program, prefix, Limits(seconds=1.5), known=True))
        assert verdict.result in results
        if verdict.result == "timeout":  # this limit, not another, and not before it
            assert verdict.why == "not done after 1.5 s" and time.monotonic() - begun >= 1.5
        assert not processes() and not sandboxes()

    def test_a_loop_ends_by_its_processor_time_too(self, prefix, monkeypatch):
        # Long before the harness, which may be gone, would end it.
        rlimits = Limits.as_rlimits
        monkeypatch.setattr(Limits, "as_rlimits", lambda limits: rlimits(limits) | {"RLIMIT_CPU": 1})
        verdict = within_patience(lambda: attack("while True: pass", prefix, Limits(seconds=600)))
        assert verdict.result == "failed" and not processes()

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
