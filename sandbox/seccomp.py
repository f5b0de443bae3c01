"""System calls by number: how the sandbox makes them, and the filter that says which of them untrusted code may make."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

TYPE_CHECKING = False  # by hand, as in wire.py
if TYPE_CHECKING:
    from collections.abc import Sequence

libc = ctypes.CDLL(None, use_errno=True)
_machine = platform.machine()
COLUMN = {"x86_64": 0, "aarch64": 1}.get(_machine, -1)  # of a pair of numbers, this machine's
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# ---- calls --------------------------------------------------------------------------------------------------------

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
_SECCOMP_MODE_FILTER = 2


def check(result: int, what: str) -> int:
    """Raise the OSError of the last C call when it failed; `what` names the call."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def syscall(number: int, *args: int | None, what: str) -> int:
    """A system call by its number; `what` names it in the OSError of one that failed."""
    return check(libc.syscall(ctypes.c_long(number), *(ctypes.c_void_p(a) for a in args)), what)


def prctl(option: int, value: int = 0, pointer: bytes | None = None) -> int:
    """prctl(2). Raises OSError."""
    return check(libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0), f"prctl {option}")


def need_linux() -> None:
    """Raise OSError where the numbers in this module mean nothing."""
    if not sys.platform.startswith("linux") or COLUMN < 0:
        raise OSError(errno.ENOSYS, f"needs Linux on x86-64 or arm64, this is {sys.platform} on {_machine}")


def address(data: bytes) -> int | None:
    """Where the bytes are; the caller keeps them alive over the call."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value


_Instruction = tuple[int, int, int, int]  # of the filter: code, jumps when true and when false, operand

# ---- what may be called ------------------------------------------------------------------------------------------------

# Numbers of every call that a run may make: {name: (x86-64, arm64)}, None where the machine has no such call. All other
# calls answer "not implemented", as on a kernel that lacks them: no sockets, no exec, no fork, no signals to others; nothing
# that changes a file by its name and that no Landlock, or no old one, looks at: its length, mode, owner, times.
_ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172), "sendfile": (40, 71),
    "exit": (60, 93), "uname": (63, 160), "fsync": (74, 82), "fdatasync": (75, 83),
    "ftruncate": (77, 46), "getdents": (78, None), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None), "creat": (85, None),
    "unlink": (87, None), "symlink": (88, None), "readlink": (89, None), "umask": (95, 166),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "getpgrp": (111, None), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44),
    "arch_prctl": (158, None), "setrlimit": (160, 164), "gettid": (186, 178), "time": (201, None),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, None), "epoll_ctl": (233, 21),
    "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35),
    "renameat": (264, 38), "symlinkat": (266, 36), "readlinkat": (267, 78), "faccessat": (269, 48),
    "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24),
    "pipe2": (293, 59), "getcpu": (309, 168), "renameat2": (316, 276), "getrandom": (318, 278),
    "copy_file_range": (326, 285), "statx": (332, 291), "rseq": (334, 293),
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
_FCNTL = (72, 25)  # allowed for what stays with the caller: a descriptor's owner gets signals, a lock is seen by all
_OPEN, _OPENAT = (2, None), (257, 56)  # allowed, but for emptying a file without opening it for writing

# ---- the system-call filter ---------------------------------------------------------------------------------------

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _ARG0, _ARG1, _ARG2 = 0, 4, 16, 24, 32  # offsets in struct seccomp_data, low words of the arguments
_CLONE_THREAD, _X32_BIT, _NEW_NAMESPACES = 0x10000, 0x40000000, 0x7E020080
_F_SETFL, _O_ASYNC, _O_TRUNC = 4, 0x2000, 0x200
_FILE_ORDERS = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
_TTY_QUESTIONS = (0x5401, 0x5413, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX


def _worker_filter() -> list[_Instruction]:
    """Kill a foreign architecture, allow both lists, allow three calls by argument; all else does not exist."""
    numbers = _numbers(_ALLOWED) + _numbers(_WORKER_ONLY)
    head = [(_LOAD, 0, 0, _ARCH), (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[_machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    if _machine == "x86_64":
        head += [(_JUMP_GREATER_EQUAL, 0, 1, _X32_BIT), _REFUSE]  # the x32 numbers name the same calls again
    set_flags = [(_LOAD, 0, 0, _ARG2), (_JUMP_SET, 0, 1, _O_ASYNC), _REFUSE, _PERMIT]
    not_writing = [(_AND, 0, 0, 3), (_JUMP_EQUAL, 2, 0, os.O_WRONLY), (_JUMP_EQUAL, 1, 0, os.O_RDWR), _REFUSE, _PERMIT]
    by_argument = [
        *_when(_CLONE, (_LOAD, 0, 0, _ARG0), (_JUMP_SET, 0, 1, _NEW_NAMESPACES), _REFUSE, _PERMIT),
        *_when(_PRLIMIT, (_LOAD, 0, 0, _ARG0), (_JUMP_EQUAL, 0, 1, 0), _PERMIT, _REFUSE),
        *_when(_IOCTL, (_LOAD, 0, 0, _ARG1), *_any_of(_TTY_QUESTIONS)),
        *_when(_FCNTL, (_LOAD, 0, 0, _ARG1), (_JUMP_EQUAL, 0, 4, _F_SETFL), *set_flags, *_any_of(_FILE_ORDERS)),
        *_when(_OPENAT, (_LOAD, 0, 0, _ARG2), (_JUMP_SET, 0, 4, _O_TRUNC), *not_writing),
    ]
    if _machine == "x86_64":  # the other has no such call
        by_argument += _when(_OPEN, (_LOAD, 0, 0, _ARG1), (_JUMP_SET, 0, 4, _O_TRUNC), *not_writing)
    return [*head, *by_argument, *_any_of(numbers)]


def run_filter() -> list[_Instruction]:
    """On top of the worker's: refuse the worker's own calls, and processes other than threads."""
    numbers = _numbers(_WORKER_ONLY)
    refused = [(_JUMP_EQUAL, len(numbers) - i, 0, n) for i, n in enumerate(numbers)]
    threads = _when(_CLONE, (_LOAD, 0, 0, _ARG0), (_JUMP_SET, 0, 1, _CLONE_THREAD), _PERMIT, _REFUSE)
    return [(_LOAD, 0, 0, _NR), *threads, *refused, _PERMIT, _REFUSE]


def _numbers(calls: dict[str, tuple[int, int | None]]) -> list[int]:
    """The calls' numbers on this machine."""
    return [number for pair in calls.values() if (number := pair[COLUMN]) is not None]


_PERMIT, _REFUSE = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)


def _when(call: tuple[int | None, int | None], *checks: _Instruction) -> list[_Instruction]:
    """Instructions taken for one call, skipped for any other (its number is in the accumulator before and after)."""
    number = call[COLUMN]
    assert number is not None
    return [(_JUMP_EQUAL, 0, len(checks), number), *checks]


def _any_of(values: Sequence[int]) -> list[_Instruction]:
    """Permit when the accumulator holds one of the values, refuse otherwise."""
    return [*((_JUMP_EQUAL, len(values) - i, 0, v) for i, v in enumerate(values)), _REFUSE, _PERMIT]


class Filter:
    """An assembled filter, kept in memory so that installing it is one system call."""

    def __init__(self, instructions: Sequence[_Instruction]):
        self.program = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
        self.header = struct.pack("@HP", len(instructions), address(self.program))

    def install(self) -> None:
        """Put the filter in force for this process and its children."""
        prctl(PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self.header)


def install_worker_filter() -> str:
    """Confine this process, and all that it forks, to what a worker may call; returns the machine's name."""
    need_linux()
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    Filter(_worker_filter()).install()
    return _machine
