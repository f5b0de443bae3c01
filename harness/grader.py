"""The environment in a process of its own: what it asks the sandbox, and thinks of the answers, delays no token.

    trainer                                      grader (`leetcode_env.LeetCodeEnv`, its threads and the sandbox under it)
    what is asked: problems, loopholes     -->
    each response, as the sampler ends it  -->   judged from then on
    all grades, once they are wanted       <->

Python runs one thread of a process at a time: where the sandbox's threads were the trainer's own they took turns with the
sampling loop and with the reference pass, and grading beside them gained nothing.
"""

from __future__ import annotations

import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NoReturn, Protocol

from faults.errors import Stopped, UserError, one_line
from leetcode_env import Grade, LeetCodeEnv, Problem
from loopholes import Told
from problems.data import by_setup
from sandbox.pool import SandboxDied, fill_standard_streams, show_log
from sandbox.worker import TO_A_JOB

_ROOT = str(Path(__file__).resolve().parent.parent)
_GRADER = "import sys; sys.path.insert(0, sys.argv.pop(1)); from harness import grader; grader.serve(int(sys.argv[1]))"
_CLOSE_SECONDS = 10.0  # for the sandbox to clean up


class Batch(Protocol):
    """Responses on their way to grades: `leetcode_env.Grading`, or one elsewhere."""

    texts: list[str]

    def add(self, place: int, text: str) -> None:
        """Begins with the response at that place, and returns."""

    def grades(self) -> list[Grade]:
        """The grades of all, in order."""


class Environment(Protocol):
    """What grades: `leetcode_env.LeetCodeEnv`, or `Grader`."""

    def grading(self, asked: Sequence[tuple[Problem, Told | None]]) -> Batch:
        """A batch of responses yet to come."""


class Grader:
    """A `LeetCodeEnv` in a process of its own. It starts while its caller goes on, and `ready`, called once and first, waits for
    it. One batch at a time.

    `ready`, `check_setups` and a batch's `grades` raise what the environment raised since the last of them; every call raises
    SandboxDied where its process has ended."""

    def __init__(self, workers: int | None, strict: bool, format_reward: float):
        fill_standard_streams()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    # without the folder that the command is given in: what it holds may be named as a module of Python's
                    [sys.executable, "-I" if sys.flags.isolated else "-P", "-c", _GRADER, _ROOT, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C is for the trainer, which ends its step first
                )
        except OSError as error:
            raise SandboxDied(f"the process that grades did not start: {error}") from None
        self._channel = Connection(ours.detach())
        self.tell("LeetCodeEnv", workers, strict, format_reward)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, and the sandbox with it."""
        self._channel.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ready(self) -> None:
        """Returns once the sandbox is there. Raises what kept it from starting."""
        self.answer()

    def check_setups(self, problems: Iterable[Problem]) -> None:
        """As `LeetCodeEnv.check_setups`."""
        self.tell("check_setups", [*by_setup(problems).values()])  # of each setup one problem goes there
        self.answer()

    def grading(self, asked: Sequence[tuple[Problem, Told | None]]) -> Batch:
        """As `LeetCodeEnv.grading`."""
        return _BatchElsewhere(self, asked)

    def tell(self, *message: Any) -> None:
        """Sends the message: a name and arguments."""
        try:
            self._channel.send(message)
        except OSError:
            raise self._died() from None

    def answer(self) -> Any:
        """The answer to the last message that has one. Raises it where it is an error."""
        try:
            answer = self._channel.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _died(self) -> SandboxDied:
        return SandboxDied(f"the process that grades ended with code {self._process.wait()}")


class _BatchElsewhere:
    def __init__(self, grader: Grader, asked: Sequence[tuple[Problem, Told | None]]):
        self.texts, self._grader = [""] * len(asked), grader
        grader.tell("grading", asked)

    def add(self, place: int, text: str) -> None:
        self.texts[place] = text
        self._grader.tell("add", place, text)

    def grades(self) -> list[Grade]:
        self._grader.tell("grades")
        grades: list[Grade] = self._grader.answer()
        return grades


# ---- in the process ---------------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """The process's life: an environment that does what it is told until the channel closes, whatever it is at then.

    descriptor: of its end of the channel."""
    for number in TO_A_JOB:  # the trainer ends its step, then this process
        signal.signal(number, signal.SIG_IGN)
    show_log()
    channel = Connection(descriptor)
    with suppress(EOFError, OSError):  # the trainer has closed it, or has ended
        _, *options = channel.recv()
        try:
            env = LeetCodeEnv(*options)
        except Exception as error:
            return channel.send(sendable(error))
        with env:
            channel.send(None)
            _obey(env, channel)


def _obey(env: LeetCodeEnv, channel: Connection) -> NoReturn:
    grading = env.grading([])
    failed: list[Exception] = []  # in messages that have no answer: the next answer says so
    questions: SimpleQueue[tuple[Any, ...]] = SimpleQueue()

    def answer() -> None:  # in a thread, while this one waits for the channel's end
        while True:
            errors, action, *args = questions.get()
            result = None
            try:
                result = action(*args)
            except Exception as error:
                errors.append(error)
            with suppress(OSError):
                channel.send(sendable(errors[0]) if errors else result)

    Thread(target=answer, daemon=True).start()  # at once: where runs take every thread that the system gives, none is to be had
    while True:
        name, *args = channel.recv()
        try:
            if name == "grading":
                grading = env.grading(*args)
            elif name == "add":
                grading.add(*args)
            else:
                questions.put((failed, grading.grades if name == "grades" else env.check_setups, *args))
                failed = []  # those of the next batch: its messages come as soon as the answer is sent
        except Exception as error:
            failed.append(error)


def sendable(error: Exception) -> Exception:
    """The error, or its words where it cannot travel. One that is none of the project's own, and so a defect, is shown here
    first: the traceback does not travel."""
    if not isinstance(error, UserError | Stopped):
        with suppress(Exception):
            traceback.print_exception(error)
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(one_line(error))
