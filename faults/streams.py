"""The standard streams of a command: some may be closed from the start, and a reader may go away in the middle of a run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO, Any


class Lasting:
    """A text stream that goes on into nothing when what it writes to is gone: a closed pipe or terminal, a full disk."""

    def __init__(self, stream: IO[str]):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a response may hold what the terminal's encoding does not

    def write(self, text: str) -> int:
        """Writes, or writes nothing; the number of characters either way."""
        try:
            self.stream.write(text)
        except OSError:
            self._let_go()
        return len(text)

    def flush(self) -> None:
        """Flushes what can still be written."""
        try:
            self.stream.flush()
        except OSError:
            self._let_go()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _let_go(self) -> None:
        """Below the stream, so that what it still holds has a place to go when the interpreter ends."""
        with contextlib.suppress(OSError), open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), self.stream.fileno())


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Inside, print always works. Descriptors 0 to 2 are filled first: no file or socket of the run must become one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Lasting(s or os.fdopen(n, "w", closefd=False)) for n, s in enumerate(before, 1))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
