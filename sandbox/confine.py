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
import platform
import resource
import signal
import struct
import sys
import sysconfig

LAYERS = ("rlimits", "no_new_privs", "landlock", "seccomp", "namespaces", "private_root", "unprivileged")
NOBODY = 65534
MIB = 1 << 20
MEMORY_BYTES = 1024 * MIB

TYPE_CHECKING = False  # by hand, as in wire.py
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_machine = platform.machine()
_Instruction = tuple[int, int, int, int]  # of the filter: code, jumps when true and when false, operand


class Layers:
    """on: name -> detail of the layers that hold; off: name -> why it does not; run_filter: what every fork installs."""

    def __init__(self, without: Iterable[str] = ()):
        self.on: dict[str, str] = {}
        self.off = {name: "left out on request" for name in without}
        self.run_filter: _Filter | None = None

    def attempt(self, name: str, action: Callable[..., str | None], *args: str | bool) -> None:
        """Run `action`, unless the layer was left out; it is on, with what that returned as detail, unless it raised OSError."""
        if name in self.off:
            return
        try:
            self.on[name] = action(*args) or ""
        except (OSError, ValueError) as error:
            self.off[name] = str(error)


# ---- system calls -------------------------------------------------------------------------------------------------

# Numbers of every call that a run may make: {name: (x86-64, arm64)}, None where the machine has no such call. All other
# calls answer "not implemented", as on a kernel that lacks them: no sockets, no exec, no fork, no signals to others.
_ALLOWED = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172), "sendfile": (40, 71),
    "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25), "fsync": (74, 82), "fdatasync": (75, 83),
    "truncate": (76, 45), "ftruncate": (77, 46), "getdents": (78, None), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None), "creat": (85, None),
    "unlink": (87, None), "symlink": (88, None), "readlink": (89, None), "umask": (95, 166),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "getpgrp": (111, None), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44),
    "arch_prctl": (158, None), "setrlimit": (160, 164), "gettid": (186, 178), "time": (201, None),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "restart_syscall": (219, 128), "fadvise64": (221, 223), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, None), "epoll_ctl": (233, 21),
    "openat": (257, 56), "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35),
    "renameat": (264, 38), "symlinkat": (266, 36), "readlinkat": (267, 78), "faccessat": (269, 48),
    "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99), "utimensat": (280, 88),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24),
    "pipe2": (293, 59), "getcpu": (309, 168), "renameat2": (316, 276), "getrandom": (318, 278),
    "membarrier": (324, 283), "copy_file_range": (326, 285), "statx": (332, 291), "rseq": (334, 293),
    "close_range": (436, 436), "faccessat2": (439, 439),
}  # fmt: skip
# What the worker needs beside those, and `lock` takes away.
_WORKER_ONLY = {
    "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211), "recvmsg": (47, 212), "wait4": (61, 260),
    "kill": (62, 129), "chmod": (90, None), "fchmodat": (268, 53), "setsid": (112, 157), "prctl": (157, 167),
}  # fmt: skip
_CLONE = (56, 220)  # for the worker: no new namespaces; for a run: threads alone
_IOCTL = (16, 29)  # allowed for what isatty() and close-on-exec ask
_PRLIMIT = (302, 261)  # allowed on the caller itself
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on both machines
_PIVOT_ROOT = (155, 41)
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(_machine, -1)

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
_SECCOMP_MODE_FILTER = 2


def _check(result: int, what: str) -> int:
    """Raise the OSError of the last C call when it failed; `what` names the call."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _syscall(number: int, *args: int | None, what: str) -> int:
    return _check(_libc.syscall(ctypes.c_long(number), *(ctypes.c_void_p(a) for a in args)), what)


def _prctl(option: int, value: int = 0, pointer: bytes | None = None) -> int:
    return _check(_libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0), f"prctl {option}")


def _need_linux() -> None:
    if not sys.platform.startswith("linux") or _COLUMN < 0:
        raise OSError(errno.ENOSYS, f"needs Linux on x86-64 or arm64, this is {sys.platform} on {_machine}")


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
    root = os.getuid() == 0
    if root:
        os.chown(scratch, NOBODY, NOBODY)
    layers.attempt("namespaces", _unshare)
    if "namespaces" in layers.on:
        layers.attempt("private_root", _private_root, scratch)
    else:
        layers.off.setdefault("private_root", "needs namespaces")
    if "private_root" in layers.on:
        scratch = "/run"
    layers.attempt("unprivileged", _drop_user, root)
    return layers, scratch


def _unshare() -> str:
    """New mount, process-id, network, IPC and host-name namespaces, inside a new user namespace unless root needs none."""
    _need_linux()
    flags, kinds = _ISOLATE, "mount, pid, net, ipc, uts"
    if os.getuid() == 0 and _libc.unshare(flags) == 0:
        return kinds
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(flags | _NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)
    return "user, " + kinds


def _mount(source: str | None, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _check(_libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def _private_root(base: str) -> str:
    """Change to a root that holds the libraries, read-only, three devices and a small memory disk at /run, and nothing else."""
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
        if path not in DEVICES:
            # A user namespace may not clear flags that the original mount carries, so they are said again.
            kept = os.statvfs(path).f_flag & ~_MS_RDONLY & 0x1C0F
            _mount(None, target, flags=_MS_BIND | _MS_REMOUNT | _MS_RDONLY | kept)
    os.mkdir(base + "/run")
    _mount("tmpfs", base + "/run", "tmpfs", _MS_NOSUID | _MS_NODEV, "size=64m,nr_inodes=8192,mode=700")
    if os.getuid() == 0:
        os.chown(base + "/run", NOBODY, NOBODY)
    os.chdir(base)
    here = b"."
    _syscall(_PIVOT_ROOT[_COLUMN], _address(here), _address(here), what="pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")
    _mount(None, "/", flags=_MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    return "libraries only"


def _drop_user(root: bool) -> str:
    """Become nobody when root; drop every capability either way."""
    detail = f"already uid {os.getuid()}"
    if root and os.getuid() == 0:
        if not _nobody_can_import():
            raise OSError(errno.EACCES, "the interpreter's library is not readable by the user nobody")
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        detail = "root became nobody"
    if sys.platform.startswith("linux"):
        _check(_libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)), "capset")
        _prctl(_PR_SET_DUMPABLE, 0)
    return detail


def _nobody_can_import() -> bool:
    """Whether the user nobody can read the standard library: it can't when Python lives in root's home. No fork here: the
    next child is the first of the process-id namespace, which ends with it."""
    os.seteuid(NOBODY)
    try:
        os.listdir(os.path.dirname(os.__file__))
        return True
    except OSError:
        return False
    finally:
        os.seteuid(0)


def _no_new_privs() -> None:
    _need_linux()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux; elsewhere the closed control socket does it)."""
    if sys.platform.startswith("linux"):
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Make this process the parent of whatever its children leave behind, so that nothing escapes it (Linux)."""
    if sys.platform.startswith("linux"):
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


# ---- in the worker's own process, and in every fork ------------------------------------------------------------------


def wall_in(layers: Layers, scratch: str) -> None:
    """Confine this process, which may go on to fork, for good: it reads the libraries and writes below `scratch`."""
    layers.attempt("rlimits", _set_rlimits)
    layers.attempt("no_new_privs", _no_new_privs)
    layers.attempt("landlock", _restrict_files, scratch)
    layers.attempt("seccomp", _install_worker_filter)
    if "seccomp" in layers.on:
        layers.run_filter = _Filter(_run_filter())


def lock(layers: Layers, cpu_seconds: int) -> None:
    """In a fork of the worker: give up what only the worker needs. Untrusted code comes next.

    cpu_seconds: a hard limit; soft and hard being equal, the kernel kills with no handler to run first."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    if layers.run_filter is not None:
        layers.run_filter.install()


_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_SPECIAL_FILES = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # making character devices, sockets, fifos, block devices
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE  # the rights that a rule on a single file may name


def _restrict_files(scratch: str) -> str:
    """Landlock: read the libraries, read and write three devices, everything below `scratch`; no TCP, no signals outside."""
    _need_linux()
    abi = _syscall(_LANDLOCK_CREATE, 0, 0, 1, what="landlock")
    handled = (1 << 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)) - 1
    attr = struct.pack("=QQQ", handled, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _syscall(_LANDLOCK_CREATE, _address(attr), len(attr), 0, what="landlock")
    rules = [(path, _READ_FILE | _READ_DIR) for path in LIBRARIES]
    rules += [(path, _READ_FILE | _WRITE_FILE) for path in DEVICES]
    for path, access in [*rules, (scratch, handled & ~_SPECIAL_FILES & ~_EXECUTE)]:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access & handled & (~0 if os.path.isdir(path) else _ON_FILES), handle)
        _syscall(_LANDLOCK_ADD, ruleset, 1, _address(rule), 0, what="landlock rule")
        os.close(handle)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _syscall(_LANDLOCK_RESTRICT, ruleset, 0, what="landlock")
    os.close(ruleset)
    return f"ABI {abi}" + ("" if abi >= 4 else ", no TCP rules")


def _address(data: bytes) -> int | None:
    """Where the bytes are; the caller keeps them alive over the call."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value


def _set_rlimits() -> str:
    """Hard limits, inherited by every run. The CPU limit is each run's own: see `lock`."""
    wanted = {"AS": MEMORY_BYTES, "FSIZE": 8 * MIB, "NOFILE": 64, "STACK": 8 * MIB, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
    wanted["NPROC"] = 512  # of the user, over all workers; the filter leaves a run threads alone
    for name, value in wanted.items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is None:
            continue
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(which, (value, value))
        except (ValueError, OSError):
            if sys.platform.startswith("linux"):
                raise
    return f"{MEMORY_BYTES // MIB} MiB"


# ---- the system-call filter ---------------------------------------------------------------------------------------

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24  # offsets in struct seccomp_data, low words of the arguments
_CLONE_THREAD, _X32_BIT, _NEW_NAMESPACES = 0x10000, 0x40000000, 0x7E020080
_TTY_QUESTIONS = (0x5401, 0x5413, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX


def _worker_filter() -> list[_Instruction]:
    """Kill a foreign architecture, allow both lists, allow three calls by argument; all else does not exist."""
    numbers = _numbers(_ALLOWED) + _numbers(_WORKER_ONLY)
    head = [(_LOAD, 0, 0, _ARCH), (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[_machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    if _machine == "x86_64":
        head += [(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), _REFUSE]  # the x32 numbers name the same calls again
    by_argument = [
        *_when(_CLONE, (_LOAD, 0, 0, _ARG0), (_JUMP_SET, 0, 1, _NEW_NAMESPACES), _REFUSE, _PERMIT),
        *_when(_PRLIMIT, (_LOAD, 0, 0, _ARG0), (_JUMP_EQUAL, 0, 1, 0), _PERMIT, _REFUSE),
        *_when(_IOCTL, (_LOAD, 0, 0, _ARG1), *_any_of(_TTY_QUESTIONS)),
    ]
    return [*head, *by_argument, *_any_of(numbers)]


def _run_filter() -> list[_Instruction]:
    """On top of the worker's: refuse the worker's own calls, and processes other than threads."""
    numbers = _numbers(_WORKER_ONLY)
    refused = [(_JUMP_EQUAL, len(numbers) - i, 0, n) for i, n in enumerate(numbers)]
    threads = _when(_CLONE, (_LOAD, 0, 0, _ARG0), (_JUMP_SET, 0, 1, _CLONE_THREAD), _PERMIT, _REFUSE)
    return [(_LOAD, 0, 0, _NR), *threads, *refused, _PERMIT, _REFUSE]


def _numbers(calls: dict[str, tuple[int, int | None]]) -> list[int]:
    """The calls' numbers on this machine."""
    return [number for pair in calls.values() if (number := pair[_COLUMN]) is not None]


_PERMIT, _REFUSE = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)


def _when(call: tuple[int, int], *checks: _Instruction) -> list[_Instruction]:
    """Instructions taken for one call, skipped for any other (its number is in the accumulator before and after)."""
    return [(_JUMP_EQUAL, 0, len(checks), call[_COLUMN]), *checks]


def _any_of(values: Sequence[int]) -> list[_Instruction]:
    """Permit when the accumulator holds one of the values, refuse otherwise."""
    return [*((_JUMP_EQUAL, len(values) - i, 0, v) for i, v in enumerate(values)), _REFUSE, _PERMIT]


class _Filter:
    """An assembled filter, kept in memory so that installing it is one system call."""

    def __init__(self, instructions: Sequence[_Instruction]):
        self.program = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
        self.header = struct.pack("@HP", len(instructions), _address(self.program))

    def install(self) -> None:
        """Put the filter in force for this process and its children."""
        _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self.header)


def _install_worker_filter() -> str:
    _need_linux()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _Filter(_worker_filter()).install()
    return _machine
