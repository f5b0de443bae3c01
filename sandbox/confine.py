"""Layers of containment for a process that will fork untrusted code; Linux first, resource limits alone elsewhere.

`enter` runs once in a worker, before it forks anything: namespaces, a private root that holds nothing but the interpreter's
libraries, the unprivileged user. `wall_in` follows in the worker's own process: resource limits, Landlock, the
system-call filter. `lock` runs in every fork, right before the untrusted code, and takes away what only the worker needs.
Each layer is independent of the others: where a kernel or a container refuses one the rest still stand, and `Layers` says which
are on. None can be undone by the process itself. No imports beyond the few that keep forks cheap.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
import sys
import sysconfig
from contextlib import suppress

from sandbox.seccomp import (
    COLUMN,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    Filter,
    address,
    check,
    install_worker_filter,
    libc,
    need_linux,
    prctl,
    run_filter,
    syscall,
)  # fmt: skip

LAYERS = ("rlimits", "no_new_privs", "landlock", "seccomp", "namespaces", "private_root", "unprivileged")
NOBODY = 65534
MIB = 1 << 20
MEMORY_BYTES = 1024 * MIB
THREADS = 256  # of a run's user, over all that it runs

TYPE_CHECKING = False  # by hand, as in wire.py
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on both machines
_PIVOT_ROOT = (155, 41)


class Layers:
    """on: name -> detail of the layers that hold; off: name -> why it does not; run_filter: what every fork installs."""

    def __init__(self, without: Iterable[str] = ()):
        self.on: dict[str, str] = {}
        self.off = {name: "left out on request" for name in without}
        self.run_filter: Filter | None = None

    def attempt(self, name: str, action: Callable[..., str | None], *args: str | int) -> None:
        """Run `action`, unless the layer was left out; it is on, with what that returned as detail, unless it raised OSError."""
        if name in self.off:
            return
        try:
            self.on[name] = action(*args) or ""
        except (OSError, ValueError) as error:
            self.off[name] = str(error)


# ---- what a run may read ------------------------------------------------------------------------------------------


def library_paths() -> list[str]:
    """Directories of the interpreter, its packages and the system's shared libraries: all that a run may read."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [sysconfig.get_config_var("LIBDIR") or "", "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    paths += ["/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"]
    found: list[str] = []
    for path in dict.fromkeys(p for p in paths if p and os.path.exists(p)):
        if not any(path.startswith(outer + "/") for outer in found):
            found.append(path)
    return found


LIBRARIES = library_paths()  # found now, while everything can still be read
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# ---- once, in the worker ------------------------------------------------------------------------------------------

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_ISOLATE = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2


def enter(scratch: str, without: Sequence[str] = ()) -> tuple[Layers, str]:
    """Turn on the layers that begin with the worker's first fork: the caller forks once and goes on in the child.

    scratch: an empty directory of this worker alone, where runs may write unless the private root holds another.
    without: names of layers to leave off, for tests of the others.
    Returns (Layers, the directory in which runs may write)."""
    layers = Layers(without)
    layers.attempt("namespaces", _unshare)
    uid = os.getuid() or ("unprivileged" not in layers.off and _own_user(scratch)) or 0
    if "namespaces" in layers.on:
        layers.attempt("private_root", _private_root, scratch, uid)
    else:
        layers.off.setdefault("private_root", "needs namespaces")
    if "private_root" in layers.on:
        scratch = "/run"
    layers.attempt("unprivileged", _drop_user, uid, scratch)
    return layers, scratch


def _own_user(scratch: str) -> int:
    """For root: a user id of this worker's own, which it may become and now owns the folder; 0 where there is none.

    A user of its own, because limits on processes and the right to send signals go by the user: not even those of another
    worker, or of another run on this machine, are in reach. The ids are beyond those that systems give out; in a container
    with 65,536 ids, those that systemd calls dynamic; and nobody."""
    number = int.from_bytes(os.urandom(3), "big")
    for uid in (0x70000000 + number, 61184 + number % 4336, NOBODY):
        try:
            os.seteuid(uid)  # no fork to try it in: the next child is the first of the namespace, which ends with it
            os.seteuid(0)
            os.chown(scratch, uid, uid)
            return uid
        except OSError:
            continue
    return 0


def _unshare() -> str:
    """New mount, process-id, network, IPC and host-name namespaces, inside a new user namespace unless root needs none."""
    need_linux()
    flags, kinds = _ISOLATE, "mount, pid, net, ipc, uts"
    if os.getuid() == 0 and libc.unshare(flags) == 0:
        return kinds
    uid, gid = os.getuid(), os.getgid()
    check(libc.unshare(flags | _NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)
    return "user, " + kinds


def _mount(source: str | None, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def _private_root(base: str, uid: int) -> str:
    """Change to a root that holds the libraries, read-only, three devices and a small memory disk at /run, the user's, and
    nothing else."""
    _mount(None, "/", flags=_MS_REC | _MS_PRIVATE)
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in [*LIBRARIES, *DEVICES]:
        target = base + path
        if os.path.isdir(path):
            os.makedirs(target, mode=0o755, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
            os.close(os.open(target, os.O_CREAT, 0o644))
        _mount(path, target, flags=_MS_BIND | _MS_REC)
        # Devices too: they are written to all the same, and keep their times. A user namespace may not clear flags that the
        # original mount carries, so they are said again.
        kept = os.statvfs(path).f_flag & ~_MS_RDONLY & 0x1C0F
        _mount(None, target, flags=_MS_BIND | _MS_REMOUNT | _MS_RDONLY | kept)
    os.mkdir(base + "/run")
    _mount("tmpfs", base + "/run", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=64m,nr_inodes=8192,mode=700")
    if os.getuid() == 0:
        os.chown(base + "/run", uid, uid)
    os.chdir(base)
    here = b"."
    syscall(_PIVOT_ROOT[COLUMN], address(here), address(here), what="pivot_root")
    check(libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")
    _mount(None, "/", flags=_MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    return "libraries only"


def _drop_user(uid: int, scratch: str) -> str:
    """Become that user when root; drop every capability either way."""
    detail = f"already uid {os.getuid()}"
    if os.getuid() == 0 != uid:
        os.seteuid(uid)
        can_import = os.access(os.path.dirname(os.__file__), os.R_OK, effective_ids=True)  # not where it lives in root's home
        os.seteuid(0)
        if can_import:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            detail = f"root became uid {uid}"
        else:
            os.chown(scratch, 0, 0)
    if sys.platform.startswith("linux"):
        check(libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)), "capset")
        prctl(PR_SET_DUMPABLE, 0)
    if os.getuid() == 0:
        raise OSError(errno.EPERM, "root may not become another user here, or another could not read the interpreter's library")
    return detail


def _no_new_privs() -> None:
    need_linux()
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux; elsewhere the closed control socket does it)."""
    if sys.platform.startswith("linux"):
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Make this process the parent of whatever its children leave behind, so that nothing escapes it (Linux)."""
    if sys.platform.startswith("linux"):
        prctl(PR_SET_CHILD_SUBREAPER, 1)


def go_first() -> None:
    """Where memory runs out the kernel shall end a run, and not the trainer, which is larger (Linux)."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as handle:
        handle.write("1000")


# ---- in the worker's own process, and in every fork ------------------------------------------------------------------


def wall_in(layers: Layers, scratch: str) -> None:
    """Confine this process, which may go on to fork, for good: it reads the libraries and writes below `scratch`."""
    layers.attempt("rlimits", _set_rlimits)
    layers.attempt("no_new_privs", _no_new_privs)
    layers.attempt("landlock", _restrict_files, scratch)
    layers.attempt("seccomp", install_worker_filter)
    if "seccomp" in layers.on:
        layers.run_filter = Filter(run_filter())


def lock(layers: Layers, cpu_seconds: int) -> None:
    """In a fork of the worker: give up what only the worker needs. Untrusted code comes next.

    cpu_seconds: a hard limit; soft and hard being equal, the kernel kills with no handler to run first."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    if "rlimits" in layers.on:
        _set_limit("NPROC", THREADS)  # here and not in the worker, which can then fork whatever runs of its user do
    if layers.run_filter is not None:
        layers.run_filter.install()


_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_SPECIAL_FILES = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # making character devices, sockets, fifos, block devices
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE  # the rights that a rule on a single file may name


def _restrict_files(scratch: str) -> str:
    """Landlock: read the libraries, read and write three devices, everything below `scratch`; no TCP, no signals outside."""
    need_linux()
    abi = syscall(_LANDLOCK_CREATE, 0, 0, 1, what="landlock")
    handled = (1 << 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)) - 1
    attr = struct.pack("=QQQ", handled, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = syscall(_LANDLOCK_CREATE, address(attr), len(attr), 0, what="landlock")
    rules = [(path, _READ_FILE | _READ_DIR) for path in LIBRARIES]
    rules += [(path, _READ_FILE | _WRITE_FILE) for path in DEVICES]
    for path, access in [*rules, (scratch, handled & ~_SPECIAL_FILES & ~_EXECUTE)]:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access & handled & (~0 if os.path.isdir(path) else _ON_FILES), handle)
        syscall(_LANDLOCK_ADD, ruleset, 1, address(rule), 0, what="landlock rule")
        os.close(handle)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    syscall(_LANDLOCK_RESTRICT, ruleset, 0, what="landlock")
    os.close(ruleset)
    return f"ABI {abi}" + ("" if abi >= 4 else ", no TCP rules")


def _set_rlimits() -> str:
    """Hard limits, inherited by every run. The CPU limit is each run's own: see `lock`."""
    wanted = {"AS": MEMORY_BYTES, "FSIZE": 8 * MIB, "NOFILE": 64, "STACK": 8 * MIB, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
    for name, value in wanted.items():
        _set_limit(name, value)
    return f"{MEMORY_BYTES // MIB} MiB"


def _set_limit(name: str, value: int) -> None:
    which = getattr(resource, f"RLIMIT_{name}", None)
    if which is None:
        return
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(which, (value, value))
    except (ValueError, OSError):
        if sys.platform.startswith("linux"):
            raise
