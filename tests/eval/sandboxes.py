"""A sandbox under attack: the verdict on a program, and what is left of it afterwards."""

import os
import queue
import re
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from xdlm_hf.evaluation import sandbox
from xdlm_hf.evaluation.sandbox import Job, Limits

SECRET = secrets.randbelow(10**12)  # the value tests expect; nobody guesses it
QUICK = Limits(seconds=4.0, memory=2**28)  # for what does not end by itself
ROOMY = Limits(seconds=60.0, memory=2**28)  # for what ends, on the busiest machine
needs_namespaces = pytest.mark.skipif(not sandbox.namespace_prefix(), reason="unshare does not work on this machine")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run as another user")
needs_filter = pytest.mark.skipif(not sandbox.system_call_filter(), reason="needs pyseccomp and libseccomp2")


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


def sandboxes():
    """Working folders of answers that are still there."""
    return [path.name for path in sandbox._base().glob("xdlm-sandbox-*")]


def folders():
    """Folders of harnesses that are still there."""
    return set(Path(tempfile.gettempdir()).glob(f"{sandbox._FOLDER}*"))


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
