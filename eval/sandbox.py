"""Sandbox: runs programs that a model wrote, isolated from the machine, and tests them.

Isolation has several layers, as far as the system allows them (`layers()` names those that hold here):

- `unshare` (util-linux): namespaces for network, processes, mounts and IPC, with a root folder that holds only what
  Python needs; without root, inside a user namespace.
- Landlock: only the files of Python and NumPy can be read, only the private folder written.
- seccomp (pyseccomp, libseccomp): only the system calls that a single-threaded program needs.
- resource limits: processor time, memory, file size, processes, open files; a wall-clock limit for the whole group.
- an unprivileged user where the caller is root; an empty environment; a private folder of limited size.

A program cannot forge its verdict: see judge.py.
"""

import atexit
import errno
import fcntl
import functools
import importlib.resources
import importlib.util
import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from xdlm_hf.evaluation.values import printable

logger = logging.getLogger(__name__)
_removals: list[subprocess.Popen] = []  # unfinished removals of folders, kept so that Python can reap them

VERDICTS = ("pass", "wrong", "failed", "timeout")
LAYERS = ("limits", "dies with its parent", "files", "unprivileged", "system calls", "namespaces", "disk", "root")
# Warnings about missing layers.
_OPEN_WITHOUT = {
    "files": "code can read files that the user can read (no Landlock)",
    "unprivileged": "code runs as this user, with its privileges",
    "system calls": "code can call any system call (no seccomp: install pyseccomp and libseccomp2)",
    "namespaces": "no network or process namespace (unshare does not work here)",
    "disk": "code can fill the disk of the temporary folder within its time",
    "root": "names, sizes and times of files elsewhere can be read, but not their content",
}
# All other system calls are refused, also those of later kernels. Every supported libseccomp knows these names.
# Landlock restricts those that open, create, rename and delete files.
_ALLOWED = """
read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek close close_range
open openat stat lstat fstat newfstatat statx access faccessat faccessat2 getdents getdents64 getcwd chdir fchdir
mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 ftruncate fsync fdatasync umask
dup dup2 dup3 pipe pipe2 select pselect6 poll ppoll
mmap mprotect munmap mremap madvise brk
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause restart_syscall
alarm setitimer getitimer
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage
futex set_robust_list set_tid_address rseq arch_prctl sched_yield sched_getaffinity getcpu
getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid
getrlimit uname sysinfo getrandom exit exit_group
""".split()
# System calls that are allowed only with these values of one argument, compared as 32 bits.
_ALLOWED_VALUES = {
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ: no owners, signals, locks or leases.
    ("fcntl", 1): (0, 1, 2, 3, 4, 1030, 1032),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: no flags of files, no owners.
    ("ioctl", 1): (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
    ("prctl", 0): (15, 16),  # PR_SET_NAME, PR_GET_NAME: not PR_SET_PDEATHSIG, by which the answer ends with its judge
    ("prlimit64", 0): (0,),  # limits of the caller, of no other process
}
_REFUSAL = errno.EPERM  # instead of a kill, because libraries such as NumPy try calls and do without them
_UNPRIVILEGED_USER = 64_900  # of the judge; the answer has the next id; no account has either
_FOLDER = "xdlm-sandboxes-"  # prefix of the folder that each evaluating process has
_MODULES = ("confinement", "evalplus", "judge", "values")  # of this package, which the sandboxed processes import
_START = "import sys; sys.path.insert(0, {!r}); from xdlm_hf.evaluation.judge import main; main()"
# The second attempt is for folders from which an answer removed its own permissions.
_REMOVE = ("sh", "-c", 'rm -rf -- "$1" || { chmod -R u+rwx -- "$1"; rm -rf -- "$1"; }', "sh")


@dataclass(frozen=True)
class Limits:
    """What one answer may use; `seconds` is wall-clock time, the rest bytes or counts."""

    seconds: float = 10.0
    memory: int = 2**30
    file_size: int = 2**20
    disk: int = 16 * 2**20
    open_files: int = 64

    def as_rlimits(self) -> dict[str, int]:
        return {
            "RLIMIT_CPU": int(self.seconds) + 1,
            "RLIMIT_AS": self.memory,
            "RLIMIT_FSIZE": self.file_size,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": 0,
            "RLIMIT_CORE": 0,
            "RLIMIT_STACK": 8 * 2**20,
        }


@dataclass(frozen=True)
class Job:
    """An answer with its tests.

    Args:
        program: The answer.
        tests: Statements of the benchmark, run one by one in another process than the program.
        names: Names defined by the program that the tests use.
        preamble: Code of the benchmark, run before the tests.
    """

    program: str
    tests: Sequence[str]
    names: Sequence[str]
    preamble: str = ""


@dataclass(frozen=True)
class Verdict:
    """`result` is one of VERDICTS; `why` explains it; `layers` held for both the judge and the answer."""

    result: str
    why: str = ""
    layers: tuple[str, ...] = ()


def require_consent() -> None:
    """Raises ValueError unless HF_ALLOW_CODE_EVAL=1 says that code written by a model may run."""
    if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise ValueError(
            "this task runs code written by a model: set HF_ALLOW_CODE_EVAL=1 (and pass --confirm_run_unsafe_code) "
            "once you have read docs/evaluation.md on what confines it"
        )


def run_all(jobs: Sequence[Job], limits: Limits | None = None, workers: int | None = None) -> list[Verdict]:
    """Verdicts in the order of `jobs`, `workers` of them (default: one per processor) at a time."""
    require_consent()
    announce()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: run(job, limits), jobs))


def run(job: Job, limits: Limits | None = None, prefix: Sequence[str] | None = None) -> Verdict:
    """The verdict on one job.

    Args:
        job: Program and tests.
        limits: What it may use.
        prefix: Command that creates the namespaces, () for none; by default that of `namespace_prefix`.

    Raises:
        ValueError: Without the consent of `require_consent`.
    """
    require_consent()
    return _run(job, limits or Limits(), namespace_prefix() if prefix is None else tuple(prefix))


def _run(job: Job, limits: Limits, prefix: tuple[str, ...]) -> Verdict:
    deadline = time.monotonic() + limits.seconds
    base, packages = _base(), _packages()
    folder = tempfile.mkdtemp(prefix="xdlm-sandbox-", dir=base)
    verdict = None
    try:
        config = {
            "program": job.program,
            "rlimits": limits.as_rlimits(),
            "folder": folder,
            "disk": limits.disk,
            "readable": _readable(),
            "packages": str(base / "packages"),
            "uid": _UNPRIVILEGED_USER if os.geteuid() == 0 else 0,
            "hidden": not all(map(_reachable, [sysconfig.get_path("stdlib"), *packages])),
            "namespaces": bool(prefix),
            "filter": system_call_filter(),
        }
        os.chmod(folder, 0o1777)
        tests = {"preamble": job.preamble, "names": list(job.names), "tests": list(job.tests)}
        command = [*prefix, sys.executable, "-I", "-S", "-c", _START.format(str(base / "code"))]
        verdict = _supervise(command, folder, [config, tests], limits.seconds)
    finally:
        removed = _remove(folder, deadline - time.monotonic())
    if verdict.result != "timeout" and not removed:
        return Verdict("timeout", f"its files were not removed within {limits.seconds:g} s", verdict.layers)
    return verdict


def _remove(folder: str, seconds: float) -> bool:
    """Deletes a folder with its content; False if that takes longer than `seconds` and goes on in the background."""
    try:
        os.rmdir(folder)
        return True
    except OSError:
        removal = subprocess.Popen([*_REMOVE, folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        removal.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        _removals.append(removal)
        return False
    if os.path.exists(folder):
        logger.warning("sandbox: the folder %s could not be removed", folder)
    return True


def _supervise(command: list[str], folder: str, messages: list[dict], seconds: float) -> Verdict:
    """Starts the judge, sends it the messages, waits for its verdict, and kills the whole process group."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd=folder,
        start_new_session=True,
    )
    frames = [struct.pack(">Q", len(data)) + data for data in (json.dumps(m).encode() for m in messages)]
    try:
        output, _ = process.communicate(b"".join(frames), timeout=seconds)
    except subprocess.TimeoutExpired:
        output = None
    finally:
        _end_group(process)
    if output is None:
        return Verdict("timeout", f"not done after {seconds:g} s")
    try:
        answer = json.loads(output[8:])
        return Verdict(answer["verdict"], printable(answer["why"]), tuple(answer["layers"]))
    except (ValueError, KeyError, TypeError):
        return Verdict("failed", "the sandbox ended without a verdict")


def _end_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        stream.close()


def _reachable(path: str) -> bool:
    """Whether every user may enter `path` and the folders above it."""
    return all(folder.stat().st_mode & 0o001 for folder in (Path(path), *Path(path).parents))


@functools.cache
def _base() -> Path:
    """The folder of this process, with the folders of its answers and copies of the modules that the sandbox imports.

    The copies are readable for the unprivileged user, unlike a checkout below /root. The folder is locked as long as
    this process lives.
    """
    _remove_left()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # another process may have removed it before it was locked
            break
        os.close(lock)
    atexit.register(_remove_own, folder, os.getpid())
    package = folder / "code" / "xdlm_hf" / "evaluation"
    package.mkdir(parents=True)
    for name in _MODULES:
        source = importlib.resources.files("xdlm_hf.evaluation").joinpath(f"{name}.py").read_text(encoding="utf-8")
        (package / f"{name}.py").write_text(source, encoding="utf-8")
    (folder / "packages").mkdir()
    for path in _packages():
        (folder / "packages" / Path(path).name).symlink_to(path)
    subprocess.run(["chmod", "-R", "a+rX,go-w", folder], check=True)
    return folder


def _remove_own(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a forked child
        subprocess.run([*_REMOVE, folder], capture_output=True, check=False)


def _remove_left() -> None:
    """Deletes folders without a lock, whose processes of this user were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                subprocess.run([*_REMOVE, path], capture_output=True, check=False)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


@functools.cache
def _packages() -> list[str]:
    """Folders of NumPy, the only installed package that answers can import, and of its libraries."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).resolve().parent
    return [str(path) for path in (folder, folder.with_name("numpy.libs")) if path.is_dir()]


@functools.cache
def _readable() -> list[str]:
    """Paths that the sandboxed processes can read: Python's library, shared libraries, time zones, NumPy."""
    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sysconfig.get_config_var("LIBDIR")}
    paths = {str(path) for path in paths if path} | {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"}
    paths |= {"/usr/share/zoneinfo", str(_base() / "packages"), *_packages()}
    return sorted(path for path in paths if not any(str(parent) in paths for parent in Path(path).parents))


@functools.cache
def system_call_filter() -> str:
    """The seccomp program in hex, or "" with a warning if it cannot be compiled.

    It allows calls by number and checks the architecture first, so that x32 and 32-bit calls are refused.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:  # the latter: no libseccomp
        logger.warning("sandbox: no filter of system calls: %s", error)
        return ""
    refuse = pyseccomp.ERRNO(_REFUSAL)
    try:
        rules = pyseccomp.SyscallFilter(defaction=refuse)
        rules.set_attr(pyseccomp.Attr.ACT_BADARCH, refuse)
        for name in _ALLOWED:
            if (number := _number(name)) is not None:
                rules.add_rule_exactly(pyseccomp.ALLOW, number)
        for (name, position), values in _ALLOWED_VALUES.items():
            for value in values:
                argument = pyseccomp.Arg(position, pyseccomp.MASKED_EQ, 2**32 - 1, value)
                rules.add_rule_exactly(pyseccomp.ALLOW, _number(name), argument)
        with tempfile.TemporaryFile() as file:
            rules.export_bpf(file)
            file.seek(0)
            return file.read().hex()
    except (OSError, ValueError) as error:
        logger.warning("sandbox: no filter of system calls: %s", error)
        return ""


def _number(name: str) -> int | None:
    """The number of a system call on this processor; None if it has no such call.

    Raises:
        ValueError: If libseccomp does not know the name at all.
    """
    import pyseccomp

    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    if number == -1:
        raise ValueError(f"libseccomp does not know the system call {name!r}")
    return number if number >= 0 else None  # negative: a call of another processor


@functools.cache
def namespace_prefix() -> tuple[str, ...]:
    """The `unshare` command that works here, or () for none; without root, one in a user namespace."""
    unshare, setpriv = shutil.which("unshare"), shutil.which("setpriv")
    if unshare is None or setpriv is None:
        return ()
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    # setpriv ends unshare, and with it the namespaces, when this process is killed.
    command = (setpriv, "--pdeathsig", "KILL", unshare, *user, "--net", "--ipc", "--pid", "--fork")
    command += ("--kill-child", "--mount")
    works = subprocess.run([*command, sys.executable, "-I", "-S", "-c", ""], capture_output=True, check=False)
    return command if works.returncode == 0 else ()


@functools.cache
def layers() -> tuple[str, ...]:
    """The layers that hold on this machine, found by running a harmless job.

    Raises:
        ValueError: If that job does not pass, which means that the sandbox does not work here.
    """
    verdict = _run(Job("def one():\n    return 1\n", ["assert one() == 1"], ["one"]), Limits(), namespace_prefix())
    if verdict.result != "pass":
        raise ValueError(f"the sandbox does not work on this machine: a harmless program gave {verdict}")
    return verdict.layers


@functools.cache
def announce() -> None:
    """Logs once which layers hold, and warns of each that is missing."""
    held = layers()
    logger.info("code written by the model is confined by: %s", ", ".join(held))
    for layer in LAYERS:
        if layer not in held:
            logger.warning("sandbox: %s", _OPEN_WITHOUT.get(layer, f"missing: {layer}"))
