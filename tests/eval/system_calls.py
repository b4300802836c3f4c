"""A program that makes every system call from within the sandbox, and a model of the filter that decides on them.

Run as a script it makes the sweep and writes its result as JSON: so that another user can run it.
"""

import json
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path

from xdlm_hf.evaluation import sandbox

REFUSAL = 4000  # an error number that no kernel gives: what answers with it was refused by the filter
X32 = 0x40000000
# uretprobe and uprobe of x86-64, which Linux lets pass every filter. They do nothing for a program that has no probe:
# the kernel ends a process that calls the first by SIGILL, and answers the second with ENXIO.
TRAPS = (335, 336) if os.uname().machine == "x86_64" else ()
NUMBERS = [n for n in (*range(1024), *range(X32, X32 + 1024), 2**31 - 1, -1, -2) if n not in TRAPS]
# Calls that are allowed and end, block or unmap the calling process, or change its memory, descriptors or signals. They
# take no path, and of descriptors those of the process alone.
NOT_CALLED = """
exit exit_group rt_sigreturn restart_syscall pause rt_sigsuspend rt_sigtimedwait munmap mremap mprotect madvise brk mmap
close close_range dup dup2 dup3 rt_sigaction rt_sigprocmask sigaltstack set_robust_list set_tid_address rseq arch_prctl
futex alarm setitimer getrandom select pselect6 poll ppoll nanosleep clock_nanosleep
""".split()
SWEEP = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
PATHS = {paths!r}
ALLOWED = {allowed!r}
NUMBERS = {numbers!r}

def text(value):
    # In a buffer, as calls write where others read.
    return ctypes.create_string_buffer(value, 8192)

def call(number, *arguments):
    ctypes.set_errno(0)
    arguments = [ctypes.c_long(a) if isinstance(a, int) else text(a) for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *arguments)
    return result, ctypes.get_errno() if result == -1 else 0

def shapes():
    # The places where calls take paths and descriptors, with flags that make or change something, and an attribute.
    for path in PATHS:
        try: fd = os.open(path, os.O_PATH)
        except OSError: fd = -100
        for flags in (0, 0o102, 0o1102, 0o777, 0x1000):
            yield path, flags, flags, 0, 0, 0
            yield path, b"user.a", b"1", 1, 0, 0
            yield path, b"new", 0, 0, 0, 0
            yield path, path + b"2", flags, 0, 0, 0
            yield -100, path, flags, flags, 0, 0
            yield -100, path, -100, path + b"2", 0, 0
            yield -100, path, b"", 4095, b"", 4096
            yield fd, b"", flags, flags, flags, 0
            yield fd, b"new", flags, flags, flags, 0
            yield fd, flags, flags, 0, 0, 0
        if fd >= 0: os.close(fd)

def one():
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # interrupts calls that wait
    let_through, worked = [], []
    for number in NUMBERS:
        if number in ALLOWED:
            worked += [number for arguments in shapes() if call(number, *arguments)[0] >= 0]
        elif any(call(number, *arguments) != (-1, {refusal}) for arguments in ((0,) * 6, (-1,) * 6, next(shapes()))):
            let_through.append(number)
    return [let_through, sorted(set(worked))]
"""
# What the 32-bit entry of an x86-64 kernel answers to getpid, number 20 there: bytes of mov, int 0x80, ret.
ENTRY_32 = """
import ctypes, mmap
def one():
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("b814000000cd80c3"))
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""


def numbers(names):
    return {sandbox._number(name) for name in names} - {None}


def allowed():
    """Numbers that the filter allows, some of them with certain arguments alone."""
    return numbers([*sandbox._ALLOWED, *(name for name, _ in sandbox._ALLOWED_VALUES)])


def state(folder):
    """All that a call could change in a folder and the files in it."""
    return {
        str(path): (os.lstat(path)[:9], [(name, os.getxattr(path, name)) for name in os.listxattr(path)])
        + ((path.read_bytes(),) if path.is_file() else ())
        for path in (folder, *sorted(folder.rglob("*")))
    }


def sweep(prefix=None):
    """Makes the sweep; gives what the calls did as a dictionary."""
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    sandbox._REFUSAL = REFUSAL
    sandbox.system_call_filter.cache_clear()
    folder = Path(tempfile.mkdtemp(prefix="xdlm-outside-"))
    (folder / "folder").mkdir()
    (folder / "file").write_text("mine")
    (folder / "link").symlink_to("file")
    for path in (folder / "file", folder / "folder", folder):
        path.chmod(0o666 if path.is_file() else 0o777)
    (folder / "file").read_bytes()  # with the time of this access before the comparison
    before = state(folder)
    paths = [os.fsencode(path) for path in (folder, *folder.iterdir())]
    called = sorted(allowed() - numbers(NOT_CALLED))
    skipped = allowed() - set(called)
    program = SWEEP.format(
        paths=paths, allowed=called, numbers=[n for n in NUMBERS if n not in skipped], refusal=REFUSAL
    )
    # The judge does not compare: it shows the value as the message of an assertion.
    job = sandbox.Job(program, ["import json", "x = one()\nassert False, json.dumps(x)"], ["one"])
    verdict = sandbox.run(job, sandbox.Limits(seconds=120), prefix)
    entry = sandbox.run(sandbox.Job(ENTRY_32, ["x = one()\nassert False, x"], ["one"]), sandbox.Limits(60), prefix)
    unchanged = state(folder) == before
    shutil.rmtree(folder)
    return {
        "user": os.geteuid(),
        "layers": verdict.layers,
        "verdict": [verdict.result, verdict.why],
        "tried": len(NUMBERS),
        "refused": len(NUMBERS) - len(allowed()),
        "allowed": sorted(allowed()),
        "not called": sorted(skipped),
        "32-bit entry": [entry.result, entry.why],
        "unchanged": unchanged,
    }


def decide(program, architecture, number, arguments=(0,) * 6):
    """What a seccomp program returns for a call: the instructions of classic BPF that libseccomp uses."""
    data = struct.pack("<iIQ6Q", number, architecture, 0, *arguments)
    accumulator, at = 0, 0
    while True:
        code, on_true, on_false, k = struct.unpack_from("<HBBI", program, 8 * at)
        at += 1
        if code == 0x20:  # load the word at k
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif code == 0x54:  # and
            accumulator &= k
        elif code == 0x05:  # jump
            at += k
        elif code in (0x15, 0x25, 0x35):  # jump if equal, greater, greater or equal
            holds = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k}[code]
            at += on_true if holds else on_false
        elif code == 0x06:  # return
            return k
        else:
            raise ValueError(f"an instruction that this model lacks: {code:#x}")


if __name__ == "__main__":
    json.dump(sweep(), sys.stdout)
