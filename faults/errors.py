"""How a run ends before its end. The text of each error says what was wrong and what to do; a command prints it as one line."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

from faults.streams import lasting

P = ParamSpec("P")


class UserError(Exception):
    """A mistake in the settings, the data or the machine. Exit code 2."""


class Stopped(Exception):
    """The run cannot go on, and the reason is no mistake in the settings; its last checkpoint is readable. Exit code 1."""

    code = 1


class Signalled(KeyboardInterrupt):
    """A signal asked the run to stop, and it did. Exit code 128 + the signal's number, as a shell has it.

    Like Ctrl-C it may be raised anywhere, in a library's code too, and passes through every `except Exception` on its way."""

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


def ending_signals() -> list[signal.Signals]:
    """The signals that ask a command to end: Ctrl-C, SIGTERM, and a hang-up but where it is ignored, as under nohup."""
    hang_up = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hang_up]


def interruptible() -> None:
    """From here until a command is at work, Ctrl-C ends the process with one line: among imports nothing can catch it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: Any) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


@contextlib.contextmanager
def malformed_options() -> Iterator[None]:
    """Inside, what tyro says of a malformed command line, in a box of many lines, is a UserError in one."""
    from tyro._errors import on_parse_error  # called before the box is printed; pyproject.toml bounds the release for it

    box, width = io.StringIO(), os.environ.get("COLUMNS", "")
    with contextlib.ExitStack() as stack:

        def hold(_: Any) -> None:
            stack.enter_context(contextlib.redirect_stderr(box))
            os.environ["COLUMNS"] = "100000"  # no word is cut in two
            stack.callback(os.environ.update, COLUMNS=width)

        try:
            with on_parse_error(hold):
                yield
        except SystemExit:
            if not (lines := [line.strip("│| ") for line in box.getvalue().splitlines()[1:]]):
                raise
            said = " ".join(line for line in lines if line.strip("─-╰╯+"))
            text = re.split("Got errors:|Argument helptext:|For full helptext", said)[0]
            raise UserError(" ".join(text.split())[:300].rstrip(".") + "; --help shows every option") from None


def command(main: Callable[P, int | None]) -> Callable[P, int]:
    """Decorates the `main` of a command line, so that every command ends in the same way: it returns the exit code.

    0, or what `main` returns; 2 with the line "error: ..." for a UserError and malformed options, a Stopped's own code with
    "stopped: ...", 130 with "interrupted" for Ctrl-C. Anything else is a defect and keeps its traceback. Standard streams that
    are closed, or close on the way, stop nothing (`faults.streams`)."""

    @functools.wraps(main)
    def ended(*args: P.args, **kwargs: P.kwargs) -> int:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with lasting():
            try:
                if sys.flags.optimize > 1:
                    raise UserError("python -OO leaves out the docstrings that transformers is made with: run it without")
                with malformed_options():
                    return main(*args, **kwargs) or 0
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except (Stopped, Signalled) as error:
                print(f"stopped: {error}", file=sys.stderr)
                return error.code
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                return 130

    return ended
