"""Files that are whole or not there at all, and JSON that every reader accepts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from faults.errors import UserError

LOCK = ".lock"


def write_atomic(path: str | Path, data: bytes) -> None:
    """All of `data` under `path`, or nothing of it: temporary name, fsync, rename, fsync of the folder. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Inside, the folder is this process's alone; it is made where there is none, and gone again if nothing came into it.

    The system lets go of the lock when the process ends, however it ends. Raises UserError when another process has the folder,
    or it cannot be written."""
    folder = Path(folder)
    made = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / LOCK, "a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (folder / LOCK).exists() or not os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK)):
                raise BlockingIOError  # another has just tidied up, see below, and a third may have come in
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder}: wait until it has ended") from None
        except OSError as e:
            _leave_nothing(folder, made)
            raise UserError(f"cannot write the run folder {folder}: {e.strerror}") from None
        stack.callback(_leave_nothing, folder, made)  # before the lock is let go of
        yield


def _leave_nothing(folder: Path, made: list[Path]) -> None:
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [LOCK]:
            os.unlink(folder / LOCK)
    for path in made:
        with contextlib.suppress(OSError):  # something is in it
            path.rmdir()


def write_json(path: str | Path, value: Any) -> None:
    """`value` as JSON, through `write_atomic`."""
    write_atomic(path, (to_json(value, indent=1) + "\n").encode())


def to_lines(rows: Iterable[Any]) -> str:
    """Each row as a line of JSON."""
    return "".join(to_json(row) + "\n" for row in rows)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: a number that is not finite, which JSON does not know, becomes null; an unknown type its text.

    >>> to_json({"loss": float("nan"), "step": 3})
    '{"loss": null, "step": 3}'
    """
    try:
        return json.dumps(value, indent=indent, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
