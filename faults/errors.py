"""How a run ends before its end. The text of each says what was wrong and what to do; a command line prints it as one line."""


class UserError(Exception):
    """A mistake in the settings, the data or the machine. Exit code 2."""


class Stopped(Exception):
    """The run cannot go on, and the reason is no mistake in the settings; its last checkpoint is readable. Exit code 1."""


class PartDied(Stopped):
    """A process or engine that the run needs died, and so did the one that was started in its place."""


def one_line(error: BaseException) -> str:
    """The innermost cause's own words, on one line of at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
