"""How a run ends before its end. The text of each error says what was wrong and what to do; a command prints it as one line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """A mistake in the settings, the data or the machine. Exit code 2."""


class Stopped(Exception):
    """The run cannot go on, and the reason is no mistake in the settings; its last checkpoint is readable. Exit code 1."""

    code = 1


class Signalled(Stopped):
    """A signal asked the run to stop, and it did, after a whole step. Exit code 128 + the signal's number, as a shell has it."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.code = 128 + number


class PartDied(Stopped):
    """A process or engine that the run needs died, and so did the one that was started in its place."""


def one_line(error: BaseException) -> str:
    """The innermost cause's own words, on one line of at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def command(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorates the `main` of a command line, so that every command ends in the same way: it returns the exit code.

    0, or what `main` returns; 2 with the line "error: ..." for a UserError, a Stopped's own code with "stopped: ...", 130 with
    "interrupted" for Ctrl-C. Anything else is a defect and keeps its traceback."""

    @functools.wraps(main)
    def ended(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Stopped as error:
            print(f"stopped: {error}", file=sys.stderr)
            return error.code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return ended
