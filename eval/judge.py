"""The two processes inside the sandbox: one runs an answer, the other judges it. Started by sandbox.py, by path.

The answer's process is asked over a pipe: call this function, with these values. The judge evaluates the benchmark's
assertions on the values that come back, rebuilt from plain data, and never runs a line of the answer: nothing the
answer does to its own interpreter (builtins, `os._exit`, `__eq__`, frames, descriptors) reaches the comparison. The
answer is forked off before the judge reads the assertions, and the descriptor of the verdict is closed in it.

Only the standard library is used: the interpreter starts with `-I -S`, and in a few milliseconds.
"""

import ast
import builtins
import collections
import ctypes
import decimal
import fractions
import io
import itertools
import json
import os
import resource
import signal
import struct
import sys
import types

MAX_FRAME = 16 * 2**20  # bytes of one message; an answer that says more than that has failed
MAX_ITEMS = 10**6  # items taken from an iterator that an answer returns
_LIBC = ctypes.CDLL(None, use_errno=True)


# --------------------------------------------------------------------------------------------------------------------
# Values as plain data


class Remote:
    """An object that lives in the answer's process and is no plain value: a tree node, say.

    Comparing it is never left to the answer: two of them are equal when they are the same object there.
    """

    def __init__(self, link, ref):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_ref", ref)

    def __call__(self, *args, **kwargs):
        return self._link.ask("call", self._ref, *args, **kwargs)

    def __getattr__(self, name):
        return self._link.ask("get", self._ref, name)

    def __setattr__(self, name, value):
        self._link.ask("set", self._ref, name, value)

    def __eq__(self, other):
        return isinstance(other, Remote) and other._ref == self._ref

    def __hash__(self):
        return hash(self._ref)


def encode(value, keep):
    """`value` in JSON: scalars as they are, all else as [tag, content]; `keep(object)` stores what is not plain."""

    def each(items):
        return [encode(item, keep) for item in items]

    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, bytes(value).hex()]
    if isinstance(value, Remote):
        return ["remote", value._ref]
    if isinstance(value, dict):
        return ["dict", [each(pair) for pair in dict.items(value)]]
    for kind in (list, tuple, set, frozenset, collections.deque):
        if isinstance(value, kind):
            return [kind.__name__, each(value)]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, fractions.Fraction | decimal.Decimal):
        return [type(value).__name__, str(value)]
    views = (type({}.keys()), type({}.values()), type({}.items()))
    if isinstance(value, views) or (hasattr(value, "__next__") and hasattr(value, "__iter__")):
        return ["iterator", each(itertools.islice(value, MAX_ITEMS))]
    return ["remote", keep(value)]


def decode(data, find):
    """The value `encode` wrote; `find(ref)` gives what a remote reference stands for."""
    if not isinstance(data, list):
        return data
    tag, content = data
    if tag == "complex":
        return complex(*content)
    if tag in ("bytes", "bytearray"):
        return getattr(builtins, tag).fromhex(content)
    if tag == "dict":
        return {decode(key, find): decode(value, find) for key, value in content}
    if tag == "range":
        return range(*content)
    if tag == "remote":
        return find(content)
    if tag in ("Fraction", "Decimal"):
        return {"Fraction": fractions.Fraction, "Decimal": decimal.Decimal}[tag](content)
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
    return (kinds | {"iterator": iter})[tag]([decode(item, find) for item in content])


class Closed(Exception):
    """The other end of a pipe is gone, or speaks nonsense."""


def send(fd, message):
    data = json.dumps(message).encode()
    data = struct.pack(">Q", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd):
    def exactly(n):
        parts = []
        while n:
            part = os.read(fd, min(n, 2**16))
            if not part:
                raise Closed
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    (size,) = struct.unpack(">Q", exactly(8))
    if size > MAX_FRAME:
        raise Closed
    return json.loads(exactly(size))


# --------------------------------------------------------------------------------------------------------------------
# The answer's process


def serve(program, fd_in, fd_out):
    """Runs the answer's program, then calls its functions as asked, until the judge hangs up."""
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    objects, known = [module], {}

    def keep(value):
        if id(value) not in known:
            objects.append(value)  # which also keeps the id from being used again
            known[id(value)] = len(objects) - 1
        return known[id(value)]

    try:
        exec(compile(program, "<answer>", "exec"), module.__dict__)
        send(fd_out, [True, None])
    except BaseException as error:  # whatever an answer raises, SystemExit included, is its failure
        send(fd_out, [False, describe(error)])
        return
    while True:
        action, ref, args, kwargs = decode(receive(fd_in), objects.__getitem__)
        try:
            target = objects[ref]
            if action == "call":
                result = target(*args, **kwargs)
            else:
                result = getattr(target, *args) if action == "get" else setattr(target, *args)
            reply = [True, encode(result, keep)]
        except BaseException as error:
            reply = [False, describe(error)]
        send(fd_out, reply)


def describe(error):
    return [str(type(error).__name__)[:80], str(error)[:200]]


def joined(name, text):
    return ": ".join(filter(None, (name, text)))


# --------------------------------------------------------------------------------------------------------------------
# The judge


class Failure(Exception):
    """The answer broke off before an assertion had a truth value."""


class Link:
    """The judge's end of the pipes."""

    def __init__(self, fd_in, fd_out):
        self.fd_in, self.fd_out = fd_in, fd_out

    def reply(self):
        try:
            ok, content = receive(self.fd_in)
            if ok is True:
                return decode(content, lambda ref: Remote(self, ref))
            name, text = (str(part) for part in content)
        except (Closed, OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise Failure("the answer's process broke off") from error
        if name == "AssertionError":
            raise AssertionError(text)  # its own assertion, while a test ran: Wrong, as in OpenCompass
        raise Failure(joined(name, text))

    def ask(self, action, ref, *args, **kwargs):
        def refuse(value):
            raise Failure(f"a test passes a {type(value).__name__}, which is no plain value")

        try:
            send(self.fd_out, encode((action, ref, args, kwargs), refuse))
        except OSError as error:
            raise Failure("the answer's process is gone") from error
        return self.reply()


def judge(job, link):
    """("failed" | "wrong" | "pass", why) of one job: its trusted preamble, then its tests one by one."""
    try:
        link.reply()  # the program has run to its end
    except AssertionError as error:  # the program's own, before any test
        return "failed", joined("AssertionError", str(error))
    except Failure as error:
        return "failed", str(error)
    namespace = {"__name__": "tests"}
    try:
        exec(compile(job["preamble"], "<preamble>", "exec"), namespace)
        namespace |= {name: link.ask("get", 0, name) for name in job["names"]}
        for test in job["tests"]:
            exec(compile(test, "<test>", "exec"), namespace)
    except AssertionError as error:
        return "wrong", str(error)[:200]
    except Failure as error:
        return "failed", str(error)
    except Exception as error:  # an operation on a value of the wrong type, such as None > 0
        return "failed", joined(*describe(error))
    return "pass", ""


# --------------------------------------------------------------------------------------------------------------------
# Confinement


def confine(config, layers, extra_uid=0):
    """Gives up, for good, everything this process needs no more; notes in `layers` what worked."""
    for name, value in config["rlimits"].items():
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    layers.append("limits")
    os.umask(0o077)
    if _LIBC.prctl(1, signal.SIGKILL, 0, 0, 0) == 0:  # PR_SET_PDEATHSIG
        layers.append("dies with its parent")
    no_new_privileges = _LIBC.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    if no_new_privileges and restrict_files(config):
        layers.append("files")
    if drop_privileges(config, extra_uid):
        layers.append("unprivileged")
    _LIBC.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody of this user may read or trace this process
    # The user changed, which clears the parent-death signal.
    _LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)
    if no_new_privileges and config["filter"] and install_filter(bytes.fromhex(config["filter"])):
        layers.append("system calls")


def drop_privileges(config, extra_uid):
    """To an unprivileged user where the caller is root; else all capabilities (of a user namespace) are given up."""
    if config["uid"]:
        try:
            os.setgroups([])
            os.setresgid(*[config["uid"] + extra_uid] * 3)
            os.setresuid(*[config["uid"] + extra_uid] * 3)
        except OSError:
            return False
        return os.getuid() != 0
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    return _LIBC.syscall(126 if os.uname().machine == "x86_64" else 91, header, struct.pack("<6I", *[0] * 6)) == 0


def restrict_files(config):
    """Landlock: read below `readable`, everything inside the working folder, nothing else."""
    create, add, enforce = 444, 445, 446
    version = _LIBC.syscall(create, None, 0, 1)
    if version < 1:
        return False
    read = 0b1101  # execute, read a file, read a folder
    handled = (1 << (13 + (version >= 2) + (version >= 3))) - 1
    network = 0b11 if version >= 4 else 0  # bind and connect TCP
    attributes = struct.pack("<QQ", handled, network)[: 16 if version >= 4 else 8]
    ruleset = _LIBC.syscall(create, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    rules = [(path, read) for path in config["readable"]] + [(config["folder"], handled)]
    rules += [("/dev/null", 0b110), ("/dev/urandom", 0b100)]
    for path, access in rules:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            access &= 0b111  # the rights that a file has
        rule = struct.pack("<Qi", access, fd)
        if _LIBC.syscall(add, ruleset, 1, rule, 0) != 0:
            return False
        os.close(fd)
    done = _LIBC.syscall(enforce, ruleset, 0) == 0
    os.close(ruleset)
    return done


def install_filter(program):
    """The seccomp filter that sandbox.py compiled."""
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    filter_ = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    return _LIBC.prctl(22, 2, ctypes.byref(filter_), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def prepare_folder(config, layers):
    """A small file system of its own over the working folder, so that many files cannot fill the disk."""
    if config["namespaces"]:
        layers.append("namespaces")
        options = f"size={config['disk']},mode=0777,nr_inodes=256".encode()
        if _LIBC.mount(b"tmpfs", config["folder"].encode(), b"tmpfs", 0b110, options) == 0:  # no devices, no set-uid
            layers.append("disk")
        if config["library"]:
            show_library(*config["library"])
    os.chdir(config["folder"])


def show_library(source, target):
    """The standard library under a second, read-only name, for a user who cannot reach it where it is."""
    flags = 4096  # MS_BIND
    for step in (flags, flags | 33):  # then MS_REMOUNT | MS_RDONLY
        if _LIBC.mount(source.encode(), target.encode(), None, step, None) != 0:
            return
    for paths in (sys.path, *(m.__path__ for m in list(sys.modules.values()) if hasattr(m, "__path__"))):
        paths[:] = [target + path[len(source) :] if path.startswith(source) else path for path in paths]


def become_answer(config, fds, verdict_fd):
    """In the forked child: only the two pipe ends stay, then the limits."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    ours = [os.dup2(fd, 3 + 7 * i + 20) for i, fd in enumerate(fds)]
    os.closerange(3, min(ours))
    os.closerange(min(ours) + 1, max(ours))
    os.closerange(max(ours) + 1, max(max(ours) + 1, verdict_fd) + 64)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.clear()
    confine(config, [], extra_uid=1)
    return ours


def main():
    sys.set_int_max_str_digits(0)
    config, layers = receive(0), []
    prepare_folder(config, layers)
    (answer_in, judge_out), (judge_in, answer_out) = os.pipe(), os.pipe()
    verdict = os.dup(1)
    child = os.fork()
    if child == 0:
        try:
            serve(config.pop("program"), *become_answer(config, (answer_in, answer_out), verdict))
        finally:
            os._exit(0)
    os.close(answer_in)
    os.close(answer_out)
    confine(config, layers)
    job = receive(0)  # only now: the answer's process must not have seen it
    result, why = judge(job, Link(judge_in, judge_out))
    send(verdict, {"verdict": result, "why": why[:300], "layers": layers})
    # The answer must not outlive this process where no namespace ends it; seccomp forbids `kill`, its parent's death
    # signal does it.
    os._exit(0)


def top_level_names(source):
    """Names that a module defines; used by tasks to know what a test may call."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


if __name__ == "__main__":
    main()
