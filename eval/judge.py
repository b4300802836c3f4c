"""The two processes inside the sandbox, started by sandbox.py: one runs an answer, the other evaluates its tests.

The judge sends calls of the answer's functions over a pipe. It evaluates the benchmark's assertions on the values that
come back, rebuilt from plain data (values.py), and never runs a line of the answer: nothing the answer does to its own
interpreter (builtins, `os._exit`, `__eq__`, frames, descriptors) changes the comparison. The answer's process is forked
before the judge reads the assertions, and its copy of the verdict's descriptor is closed.

Only the standard library is used, so that the interpreter starts in milliseconds (`-I -S`).
"""

import ast
import io
import json
import os
import struct
import sys
import types

from xdlm_hf.evaluation import evalplus  # noqa: F401 (tests import it when no more files can be read)
from xdlm_hf.evaluation.confinement import confine, enter_root
from xdlm_hf.evaluation.values import Decoder, Encoder, Remote, exception_class, snapshots

MAX_FRAME = 16 * 2**20  # bytes of one message between answer and judge; a longer one is a failure


class Closed(Exception):
    """The other end of a pipe is closed, or announced a message that is too long."""


def send(fd, message):
    data = json.dumps(message).encode()
    data = struct.pack(">Q", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd, most=MAX_FRAME):
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
    if size > most:
        raise Closed
    return json.loads(exactly(size))


# --------------------------------------------------------------------------------------------------------------------
# The answer's process


class Server:
    """Runs the answer's program, then the calls that the judge sends, until it closes the pipe."""

    def __init__(self, fd_in, fd_out):
        self.fd_in, self.fd_out = fd_in, fd_out
        self.module = types.ModuleType("answer")
        sys.modules["answer"] = self.module
        self.objects, self._refs = [self.module], {}

    def keep(self, value):
        """The number by which the judge refers to an object."""
        if id(value) not in self._refs:
            self.objects.append(value)  # which also keeps the id from being used again
            self._refs[id(value)] = len(self.objects) - 1
        return self._refs[id(value)]

    def run(self, program):
        try:
            exec(compile(program, "<answer>", "exec"), self.module.__dict__)
        except BaseException as error:  # also SystemExit: the answer has failed
            self._reply(False, error)
            return
        self._reply(True, None)
        while True:
            self._answer(*receive(self.fd_in))

    def _answer(self, action, ref, args, kwargs):
        decoder = Decoder(self.objects.__getitem__)
        try:
            target, args, kwargs = self.objects[ref], decoder(args), decoder(kwargs)
            shared = [decoder.containers[i] for i in range(len(decoder.containers))]
            before = snapshots(shared, self.keep)
        except Exception as error:
            self._reply(False, error)
            return
        try:
            if action == "call":
                result = True, target(*args, **kwargs)
            else:
                result = True, getattr(target, *args) if action == "get" else setattr(target, *args)
        except BaseException as error:
            result = False, error
        self._reply(*result, shared, before)

    def _reply(self, ok, value, shared=(), before=()):
        """Sends a value or an exception, and the new content of the containers that the call changed."""
        try:
            encoder = Encoder(self.keep, shared)
            content = encoder(value)
            now = snapshots(shared, self.keep)
            changed = [[i, *encoder.contents(shared[i])] for i in range(len(shared)) if now[i] != before[i]]
        except BaseException as error:  # raised by a method of the value, or by infinite recursion
            plain = type(error) if type(error).__module__ == "builtins" else Exception
            ok, content, changed = False, Encoder(self.keep)(plain(str(error)[:1000])), []
        send(self.fd_out, [ok, content, changed])


# --------------------------------------------------------------------------------------------------------------------
# The judge


class Failure(BaseException):
    """The answer's process ended or cannot be called. A BaseException, so that tests do not catch it by accident."""


class Link:
    """The judge's end of the pipes."""

    def __init__(self, fd_in, fd_out):
        self.fd_in, self.fd_out = fd_in, fd_out
        self.failure = None
        self._classes = {}

    def fail(self, why):
        self.failure = self.failure or Failure(why)
        raise self.failure

    def reply(self, shared=()):
        """The next value from the answer's process.

        Raises:
            Failure: If there is no such value.
            BaseException: The exception that the answer raised instead.
        """
        try:
            ok, content, changed = receive(self.fd_in)
            decoder = Decoder(lambda ref: Remote(self, ref), self._exception, shared)
            value = decoder(content)
            for state in changed:
                decoder.refill(*state)
        except Exception:  # the answer may have written anything into the pipe
            self.fail("the answer's process broke off")
        if ok is True:
            return value
        if not isinstance(value, BaseException) or isinstance(value, Failure):
            self.fail("the answer's process broke off")
        raise value

    def _exception(self, ref, *description):
        if ref not in self._classes:
            self._classes[ref] = exception_class(ref, *description)
        return self._classes[ref]

    def ask(self, action, ref, *args, **kwargs):
        def refuse(value):
            self.fail(f"a test passes a {type(value).__name__}, which is no plain value")

        if self.failure:
            raise self.failure
        encoder = Encoder(refuse)
        message = [action, ref, encoder(args), encoder(kwargs)]
        try:
            send(self.fd_out, message)
        except OSError:
            self.fail("the answer's process is gone")
        return self.reply(encoder.containers)


def judge(job, link):
    """("failed" | "wrong" | "pass", why) of one job: its trusted preamble, then its tests one by one."""
    try:
        link.reply()  # the program has run to its end
    except BaseException as error:
        return "failed", describe(error)
    namespace = {"__name__": "tests"}
    try:
        exec(compile(job["preamble"], "<preamble>", "exec"), namespace)
        namespace |= {name: link.ask("get", 0, name) for name in job["names"]}
        for test in job["tests"]:
            exec(compile(test, "<test>", "exec"), namespace)
    except AssertionError as error:
        result = "wrong", str(error)
    except BaseException as error:  # from the answer, or from an operation on its value, such as None > 0
        result = "failed", describe(error)
    else:
        result = "pass", ""
    # A test that catches every exception must not hide that the answer's process failed.
    return ("failed", str(link.failure)) if link.failure else result


def describe(error):
    name = "" if isinstance(error, Failure) else type(error).__name__
    return ": ".join(filter(None, (name, str(error))))


# --------------------------------------------------------------------------------------------------------------------
# Both


def become_answer(config, layers, fds, verdict_fd):
    """In the forked child: closes all descriptors but its two pipe ends, then restricts the process."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    ours = [os.dup2(fd, 3 + 7 * i + 20) for i, fd in enumerate(fds)]
    os.closerange(3, min(ours))
    os.closerange(min(ours) + 1, max(ours))
    os.closerange(max(ours) + 1, max(max(ours) + 1, verdict_fd) + 64)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), open(1, "w", closefd=False), open(2, "w", closefd=False)
    confine(config, layers, extra_uid=1)
    return ours


def main():
    sys.path.pop(0)  # the folder of this module
    sys.set_int_max_str_digits(0)
    config, layers = receive(0, sys.maxsize), []
    enter_root(config, layers)
    sys.path.append(config["packages"])
    (answer_in, judge_out), (judge_in, answer_out) = os.pipe(), os.pipe()
    verdict = os.dup(1)
    os.dup2(2, 1)  # output of tests and canonical solutions is discarded
    parent = os.getpid()
    if os.fork() == 0:
        try:
            ours = become_answer(config, layers, (answer_in, answer_out), verdict)
            if os.getppid() != parent:  # the judge ended before the parent-death signal was set
                os._exit(0)
            send(ours[1], layers)
            Server(*ours).run(config.pop("program"))
        finally:
            os._exit(0)
    os.close(answer_in)
    os.close(answer_out)
    confine(config, layers)
    held = receive(judge_in)  # layers of the answer's process, sent before it runs any line of the program
    job = receive(0, sys.maxsize)  # after the fork, so that the answer's process does not have the tests
    result, why = judge(job, Link(judge_in, judge_out))
    send(verdict, {"verdict": result, "why": why[:300], "layers": [layer for layer in layers if layer in held]})
    # Where no namespace ends the answer's process with this one, its parent-death signal does.
    os._exit(0)


def top_level_names(source):
    """Names that a module defines at its top level."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names
