"""Runs code that a model wrote, without letting it near the machine, and says whether it passes its tests.

What confines it, the strongest that the system allows (`layers()` tells which hold here):

- `unshare` (util-linux): namespaces of its own for network, processes, mounts and IPC; the process namespace dies as a
  whole. Without root, inside a user namespace.
- Landlock: only Python's own files can be read, only the private folder written.
- seccomp (pyseccomp, libseccomp): no sockets, no new processes, no signals, no tracing, no mounts, and no attributes
  (modes, owners, times) of files, which Landlock does not guard.
- resource limits: processor time, memory, file size, processes, open files; a wall-clock limit ends the whole group.
- an unprivileged user where the caller is root; an empty environment; a private folder, itself of limited size.

Verdicts cannot be forged by the code: judge.py says how.
"""

import atexit
import functools
import importlib.resources
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

VERDICTS = ("pass", "wrong", "failed", "timeout")
LAYERS = ("limits", "dies with its parent", "files", "unprivileged", "system calls", "namespaces", "disk")
# Without the first, the second does not matter: what each missing layer leaves open, for the warning at the start.
_OPEN_WITHOUT = {
    "files": "code can read files that the user can read (no Landlock)",
    "unprivileged": "code runs as this very user",
    "system calls": "code can call any system call (no seccomp: install pyseccomp and libseccomp2)",
    "namespaces": "no network or process namespace (unshare does not work here)",
    "disk": "code can fill the disk of the temporary folder within its time",
}
# Refused with EPERM. A name that libseccomp does not know on this processor is left out.
_REFUSED = """
socket socketpair connect bind listen accept accept4 sendto sendmsg sendmmsg recvfrom recvmsg
fork vfork clone clone3 execve execveat setsid setpgid
kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal pidfd_getfd
ptrace process_vm_readv process_vm_writev kcmp perf_event_open bpf userfaultfd
mount umount umount2 move_mount open_tree fsopen fsmount pivot_root chroot unshare setns
io_uring_setup io_uring_enter io_uring_register memfd_create memfd_secret
shmget shmat msgget semget mq_open keyctl add_key request_key open_by_handle_at name_to_handle_at
init_module finit_module delete_module kexec_load reboot swapon swapoff personality setuid setgid
chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat truncate utime utimes futimesat utimensat
setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat file_setattr
inotify_init inotify_init1 inotify_add_watch fanotify_init fanotify_mark
setpriority ioprio_set sched_setaffinity sched_setattr sched_setparam sched_setscheduler
process_madvise process_mrelease migrate_pages move_pages
""".split()
# Refused with this value of this argument, of which the kernel reads 32 bits: signals and limits for other processes.
_REFUSED_VALUES = [
    *(("fcntl", 1, command) for command in (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    *(("ioctl", 1, command) for command in (0x8901, 0x8902, 0x5452)),  # FIOSETOWN, SIOCSPGRP, FIOASYNC
    ("prctl", 0, 1),  # PR_SET_PDEATHSIG: the answer ends with its judge
]
_UNPRIVILEGED_USER = 64_900  # and the next one: an id that no account has


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
    """An answer and what it is tested with.

    `program` is the model's; all else must come from the benchmark and runs beside it, out of its reach: `preamble` is
    run first, then every test, with `names` standing for what the program defines.
    """

    program: str
    tests: Sequence[str]
    names: Sequence[str]
    preamble: str = ""


@dataclass(frozen=True)
class Verdict:
    """`result` is one of VERDICTS; `why` is for reading; `layers` are those that confined the judge."""

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
        prefix: Command that makes the namespaces; by default what `namespace_prefix` found, () for none.

    Raises:
        ValueError: Without the consent of `require_consent`.
    """
    require_consent()
    return _run(job, limits or Limits(), namespace_prefix() if prefix is None else tuple(prefix))


def _run(job: Job, limits: Limits, prefix: tuple[str, ...]) -> Verdict:
    folder = tempfile.mkdtemp(prefix="xdlm-sandbox-")
    try:
        library = sysconfig.get_path("stdlib")
        hidden = not _reachable(library)
        shown = str(_judge().parent / "library")
        config = {
            "program": job.program,
            "rlimits": limits.as_rlimits(),
            "folder": folder,
            "disk": limits.disk,
            "readable": [*_readable(), shown],
            # Python under /root: another user reads it through a mount, or, without mounts, must remain this one.
            "library": [library, shown] if hidden else [],
            "uid": _UNPRIVILEGED_USER if os.geteuid() == 0 and (prefix or not hidden) else 0,
            "namespaces": bool(prefix),
            "filter": system_call_filter(),
        }
        os.chmod(folder, 0o1777)
        tests = {"preamble": job.preamble, "names": list(job.names), "tests": list(job.tests)}
        return _supervise([*prefix, sys.executable, "-I", "-S", str(_judge())], folder, [config, tests], limits.seconds)
    finally:
        _remove(folder)


def _remove(folder: str) -> None:
    """Deletes the folder whatever an answer left in it, such as folders in folders, thousands deep."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        subprocess.run(["rm", "-rf", "--", folder], capture_output=True, check=False)
        if os.path.exists(folder):
            logger.warning("sandbox: the folder %s could not be removed", folder)


def _supervise(command: list[str], folder: str, messages: list[dict], seconds: float) -> Verdict:
    """Starts the judge, gives it its messages, waits, and ends the whole group whatever happened."""
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
        return Verdict(answer["verdict"], _printable(answer["why"]), tuple(answer["layers"]))
    except (ValueError, KeyError, TypeError):
        return Verdict("failed", "the sandbox ended without a verdict")


def _printable(text: str) -> str:
    """Text of an answer's error that no terminal obeys and every file takes: half surrogates and controls escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
def _judge() -> Path:
    """judge.py where the unprivileged user can read it, which a checkout under /root is not."""
    source = importlib.resources.files("xdlm_hf.evaluation").joinpath("judge.py").read_text(encoding="utf-8")
    folder = Path(tempfile.mkdtemp(prefix="xdlm-judge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.chmod(0o755)
    path = folder / "judge.py"
    path.write_text(source, encoding="utf-8")
    path.chmod(0o644)
    (folder / "library").mkdir(mode=0o755)
    return path


def _readable() -> set[str]:
    """Folders of Python's standard library and of shared libraries."""
    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sysconfig.get_config_var("LIBDIR")}
    return {str(path) for path in paths if path} | {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"}


@functools.cache
def system_call_filter() -> str:
    """The seccomp program in hex, or "" where libseccomp is not there."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError):  # the latter: no libseccomp
        return ""
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ALLOW)
    refused = [(name, ()) for name in _REFUSED]
    refused += [(n, (pyseccomp.Arg(i, pyseccomp.MASKED_EQ, 2**32 - 1, value),)) for n, i, value in _REFUSED_VALUES]
    refused += [("prlimit64", (pyseccomp.Arg(0, pyseccomp.NE, 0),))]  # of any process but the caller's own
    for name, arguments in refused:
        try:
            rules.add_rule(pyseccomp.ERRNO(1), name, *arguments)
        except (OSError, ValueError):
            logger.debug("seccomp: no system call %s on this processor", name)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read().hex()


@functools.cache
def namespace_prefix() -> tuple[str, ...]:
    """The `unshare` command that works here, or () for none; without root, one in a user namespace."""
    unshare, setpriv = shutil.which("unshare"), shutil.which("setpriv")
    if unshare is None or setpriv is None:
        return ()
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    # setpriv, so that unshare, and with it all within, dies when the harness is killed.
    command = (setpriv, "--pdeathsig", "KILL", unshare, *user, "--net", "--ipc", "--pid", "--fork")
    command += ("--kill-child", "--mount")
    works = subprocess.run([*command, sys.executable, "-I", "-S", "-c", ""], capture_output=True, check=False)
    return command if works.returncode == 0 else ()


@functools.cache
def layers() -> tuple[str, ...]:
    """The layers that hold on this machine, as a harmless job saw them.

    Raises:
        ValueError: If not even that job passes: the sandbox does not work here.
    """
    verdict = _run(Job("def one():\n    return 1\n", ["assert one() == 1"], ["one"]), Limits(), namespace_prefix())
    if verdict.result != "pass":
        raise ValueError(f"the sandbox does not work on this machine: a harmless program is {verdict}")
    return verdict.layers


@functools.cache
def announce() -> None:
    """Says once what confines the code, and warns of what is missing."""
    held = layers()
    logger.info("code written by the model is confined by: %s", ", ".join(held))
    for layer in LAYERS:
        if layer not in held:
            logger.warning("sandbox: %s", _OPEN_WITHOUT.get(layer, f"missing: {layer}"))
