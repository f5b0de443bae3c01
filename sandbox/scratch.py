"""The folder in which runs may write: names that no run foresees, and removing whatever a hostile one left."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from itertools import islice


def fresh_name() -> str:
    """A name that no program can have foreseen, and so not taken."""
    return os.urandom(12).hex()


def unnamed_file(folder: str) -> int:
    """A descriptor of a new file in the folder that nobody can open again. It takes what a run prints: unlike a pipe it needs
    nobody to read along, and the limit on files bounds it."""
    path = os.path.join(folder, fresh_name())
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    return fd


def contents(name: str, inside: int, most: int) -> bytes:
    """The first bytes of a regular file in the folder that the descriptor holds; b"" where there is none. A link is not followed,
    and a pipe, which could block for ever, not read."""
    with suppress(OSError):
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=inside)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return os.pread(fd, most, 0)
        finally:
            os.close(fd)
    return b""


def sweep(directory: str, scratch: str) -> bool:
    """Remove everything in the directory of one run, and whatever it put beside it. False when something stays."""
    try:
        try:
            os.rmdir(directory)
            with os.scandir(scratch) as listing:
                if next(listing, None) is None:
                    return True
        except OSError:
            pass
        empty(scratch)
        return True
    except OSError:
        return False


def empty(directory: str) -> None:
    """Empty a directory that a hostile program has filled, however deep, without following links. Raises OSError.

    What lies deep is moved up, so that no path grows long and nothing recurses. Where it may not move, because Landlock forbids
    that on kernels before 5.19, it is walked to by descriptors: slower, since Landlock looks at every folder above."""
    here, depth = _open_directory(directory, None), 0
    try:
        while True:
            inner = _remove(here, _LEVELS)
            if inner is None and depth == 0:
                return
            if inner:
                with suppress(OSError):
                    os.rename(inner, fresh_name(), src_dir_fd=here, dst_dir_fd=here)
                    continue
            following = _open_directory(inner or "..", here)
            depth += inner.count("/") + 1 if inner else -1
            os.close(here)
            here = following
    finally:
        os.close(here)


def remove(folder: str | os.PathLike[str]) -> None:
    """Remove a folder with all that is in it, as far as that is possible; a recursive removal would end at a deep tree."""
    with suppress(OSError):
        empty(os.fspath(folder))
        os.rmdir(folder)


_LEVELS = 8  # directories that lie no deeper go in one pass


def _open_directory(name: str, inside: int | None) -> int:
    os.chmod(name, 0o700, dir_fd=inside)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)


def _remove(here: int, levels: int) -> str | None:
    """Remove what lies at most so many levels below; the path from here to a directory that lies deeper, None if all went."""
    while True:
        with os.scandir(here) as listing:
            entries = list(islice(listing, 256))  # by the handful: the worker must not grow with what it removes
        if not entries:
            return None
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=here)
                continue
            with suppress(OSError):
                os.rmdir(entry.name, dir_fd=here)
                continue
            if not levels:
                return entry.name
            inner = _open_directory(entry.name, here)
            try:
                deeper = _remove(inner, levels - 1)
            finally:
                os.close(inner)
            if deeper is not None:
                return f"{entry.name}/{deeper}"
            os.rmdir(entry.name, dir_fd=here)
