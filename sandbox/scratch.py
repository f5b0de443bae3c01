"""The folder in which runs may write: names that no run foresees, and removing whatever a hostile one left."""

from __future__ import annotations

import os
from itertools import islice


def fresh_name() -> str:
    """A name that no program can have foreseen, and so not taken."""
    return os.urandom(12).hex()


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
    """Empty a directory that a hostile program has filled, however deep, without following links. Raises OSError."""
    while True:
        os.chmod(directory, 0o700)
        with os.scandir(directory) as listing:
            entries = list(islice(listing, 256))  # by the handful: the worker must not grow with what it removes
        if not entries:
            return
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            # A level of depth a pass, by moving the inner directories up: no path grows long, and nothing recurses.
            with os.scandir(entry.path) as listing:
                inside = list(islice(listing, 256))
            for inner in inside:
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)
                    os.rename(inner.path, os.path.join(directory, fresh_name()))
                else:
                    os.unlink(inner.path)
            if len(inside) < 256:
                os.rmdir(entry.path)
