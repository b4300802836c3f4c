"""Restrictions that a sandboxed process puts on itself: resources, files, privileges, system calls.

judge.py imports this module before it receives any part of an answer. Only the standard library is used.
"""

import ctypes
import os
import resource
import signal
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)
DEVICES = {"/dev/null": 0b110, "/dev/urandom": 0b100}  # with their Landlock rights: read 0b100, write 0b010
# The limits allow one thread; these variables tell OpenBLAS, MKL and OpenMP, on which NumPy may be built.
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
MS_NOSUID_NODEV, MS_BIND, MS_REC, MNT_DETACH = 0b110, 4096, 16384, 2


def confine(config, layers, extra_uid=0):
    """Restricts this process irreversibly; adds the name of each layer that took effect to `layers`."""
    for name, value in config["rlimits"].items():
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    layers.append("limits")
    for name in THREADS:
        _LIBC.setenv(name.encode(), b"1", 1)  # seen by C libraries, not in `os.environ`
    os.umask(0o077)
    no_new_privileges = _LIBC.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    if no_new_privileges and restrict_files(config):
        layers.append("files")
    if drop_privileges(config, layers, extra_uid):
        layers.append("unprivileged")
    _LIBC.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody of this user may read or trace this process
    if _LIBC.prctl(1, signal.SIGKILL, 0, 0, 0) == 0:  # PR_SET_PDEATHSIG, which a change of the user clears
        layers.append("dies with its parent")
    if no_new_privileges and config["filter"] and install_filter(bytes.fromhex(config["filter"])):
        layers.append("system calls")


def drop_privileges(config, layers, extra_uid):
    """Changes to an unprivileged user if the caller is root, else drops all capabilities; True if that worked."""
    # A Python below /root is readable for another user only in a root folder of its own.
    if config["uid"] and ("root" in layers or not config["hidden"]):
        try:
            os.setgroups([])
            os.setresgid(*[config["uid"] + extra_uid] * 3)
            os.setresuid(*[config["uid"] + extra_uid] * 3)
        except OSError:
            return False
        return os.getuid() != 0
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    return _LIBC.capset(header, struct.pack("<6I", *[0] * 6)) == 0


def restrict_files(config):
    """Landlock: reading below `readable`, everything inside the working folder, nothing else; True if it holds."""
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
    rules += DEVICES.items()
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
    """Installs the seccomp filter that sandbox.py compiled; True if that worked."""
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    filter_ = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    return _LIBC.prctl(22, 2, ctypes.byref(filter_), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def enter_root(config, layers):
    """Changes to the working folder; with namespaces, inside a root folder with little else in it."""
    if config["namespaces"]:
        layers.append("namespaces")
        try:
            make_root(config["folder"], [*config["readable"], *DEVICES], config["disk"])
            layers += ["disk", "root"]
        except OSError:
            if mount("tmpfs", config["folder"], "tmpfs", MS_NOSUID_NODEV, work_options(config["disk"]), check=False):
                layers.append("disk")
    os.chdir(config["folder"])


def make_root(folder, shown, disk):
    """Enters a new root folder with the paths `shown`, read-only, and an empty `folder` of limited size.

    Paths keep their names. Other files do not exist there: not even their names, modes or owners can be read.

    Raises:
        OSError: If the kernel refuses one of the steps; mounts made before that are visible to this process only.
    """
    os.umask(0o022)
    mount("tmpfs", folder, "tmpfs", MS_NOSUID_NODEV, "size=1m,mode=0755")
    for path in filter(os.path.exists, shown):
        target = folder + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        mount(path, target, None, MS_BIND | MS_REC)
    os.makedirs(folder + folder, exist_ok=True)
    read_only = struct.pack("<4Q", 1, 0, 0, 0)  # struct mount_attr: MOUNT_ATTR_RDONLY
    check_call(_LIBC.syscall(442, -100, folder.encode(), 0x8000, read_only, len(read_only)))  # mount_setattr, recursive
    mount("tmpfs", folder + folder, "tmpfs", MS_NOSUID_NODEV, work_options(disk))
    os.chdir(folder)
    check_call(_LIBC.pivot_root(b".", b"."))
    check_call(_LIBC.umount2(b".", MNT_DETACH))  # the old root, mounted over the new one
    os.chdir("/")


def work_options(disk):
    return f"size={disk},mode=0777,nr_inodes=256"


def mount(source, target, kind, flags, options=None, check=True):
    result = _LIBC.mount(*(text and text.encode() for text in (source, target, kind)), flags, (options or "").encode())
    return check_call(result) if check else result == 0


def check_call(result):
    """Raises OSError if a call of the C library failed."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
