"""One untrusted program as its caller sees it: what is asked, what came back, and the verdict drawn from the frames."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox import wire
from sandbox.worker import CPU_SLACK

_MAX_WORD = 4096  # bytes of a frame that holds no answer


@dataclass(frozen=True)
class Program:
    """What to run and how to judge its values.

    setup: trusted source that comes first, executed once in the worker.
    calls: expressions evaluated in order in the program's namespace; `accept(index, value)` judges each plain value, in
        this process, and a False ends the run. With `returns` the one call need only return, and its value is ignored.
    shapes: how each value is made plain, "value", "linked" (a linked list) or "tree"; all "value" when left out.
    probe: a name; the outcome says whether the program bound it.
    limits: the most bytes of each answer, as `wire.longest` has them; wire.MAX_FRAME when left out. What an answer costs this
        process is bounded by them.
    decoys: with `returns`, plain values that each call's answer, whatever it is, must equal by its own `==`.
    claim: with `returns`, an expression that must be True after the calls, which then need not even return.
    look_at: instead of answers, what is seen of the run from outside once it has ended: `wire.EXIT`, its exit code;
        `wire.STDOUT`, the first bytes that it printed; or those of a file of that name in its folder. `accept(0, seen)`
        judges it. The calls are made and may do anything, and the program holds no channel to forge a message on.
    """

    source: str
    calls: Sequence[str]
    accept: Callable[[int, Any], bool] | None = None
    setup: str = ""
    returns: bool = False
    shapes: Sequence[str] | None = None
    probe: str | None = None
    limits: Sequence[int] | None = None
    decoys: Sequence[Any] = ()
    claim: str | None = None
    look_at: str = ""

    def limit(self, index: int) -> int:
        """The most bytes of the answer to one call."""
        return wire.MAX_FRAME if self.limits is None else min(self.limits[index], wire.MAX_FRAME)


@dataclass
class Outcome:
    """compiled: no syntax error. bound: the probed name exists (the program's claim). passed: every value accepted, or the
    call returned. note: "" when passed, else a few words that say why not."""

    compiled: bool = False
    bound: bool = False
    passed: bool = False
    note: str = ""


class Verdict:
    """What the frames of one run have shown so far: `outcome`, final once `decided`."""

    def __init__(self, program: Program):
        self.program, self.outcome, self.decided = program, Outcome(), False
        self._inbox = bytearray()
        self._answered = self._frames = 0

    def decide(self, passed: bool, note: str = "") -> None:
        """Settle the verdict."""
        self.decided, self.outcome.passed, self.outcome.note = True, passed, note

    def end(self, report: tuple[int, int, float, bytes], limits: tuple[int, float]) -> None:
        """The run has ended: settle what is not yet. report: the worker's (wait status, reason, CPU seconds, bytes seen)."""
        status, reason, cpu_seconds, seen = report
        by_itself = reason == wire.ON_ITS_OWN and os.WIFEXITED(status)
        if self.decided:
            return
        if not self.program.look_at or not by_itself:
            return self.decide(False, why(status, reason, cpu_seconds, limits))
        assert self.program.accept is not None
        passed = self.program.accept(0, os.WEXITSTATUS(status) if self.program.look_at == wire.EXIT else seen)
        self.decide(passed, "" if passed else "nothing was seen of it")

    def take(self, chunk: bytes) -> None:
        """Draw what the whole frames among the bytes so far say, up to the verdict."""
        inbox = self._inbox
        inbox += chunk
        while not self.decided and len(inbox) >= wire.HEAD.size:
            kind, length = wire.HEAD.unpack_from(inbox)
            if length > (self.program.limit(self._answered) if kind == wire.ANSWER else _MAX_WORD):
                return self.decide(False, "a longer answer than any right one")
            if len(inbox) < wire.HEAD.size + length:
                return
            body = bytes(inbox[wire.HEAD.size : wire.HEAD.size + length])
            del inbox[: wire.HEAD.size + length]
            self._frame(kind, body)
            self._frames += 1

    def _frame(self, kind: bytes, body: bytes) -> None:
        """One frame. A program may forge any but the first, which precedes it."""
        program, outcome = self.program, self.outcome
        if kind == wire.ERROR:
            self.decide(False, "error: " + re.sub(r"[^!-~]", "?", body[:100].decode("ascii", "replace")))
            outcome.compiled &= body not in (b"SyntaxError", b"IndentationError") or self._frames > 1
        elif kind == wire.COMPILED and self._frames == 0:
            outcome.compiled = True
        elif kind == wire.LOADED and self._frames == 1:
            outcome.bound = body == b"1"
        elif kind == wire.RETURNED and program.returns and self._frames == 2:
            self.decide(True)
        elif kind == wire.ANSWER and not (program.returns or program.look_at) and self._frames >= 2:
            self._answer(body)
        else:
            self.decide(False, "protocol violated")

    def _answer(self, body: bytes) -> None:
        program = self.program
        assert program.accept is not None
        try:
            value = wire.decode(body)
        except wire.NotPlain as error:
            return self.decide(False, str(error))
        if not program.accept(self._answered, value):
            return self.decide(False, f"wrong answer to call {self._answered}")
        self._answered += 1
        if self._answered == len(program.calls):
            self.decide(True)


def why(status: int, reason: int, cpu_seconds: float, limits: tuple[int, float]) -> str:
    """A few words on a run that ended without a verdict. status: of `os.wait`; limits: seconds of CPU and of wall time."""
    if reason == wire.WALL_TIME:
        return f"timeout: {limits[1]:g} s of wall time"
    if reason == wire.CPU_TIME or cpu_seconds >= limits[0] * CPU_SLACK - 0.2:
        return f"timeout: {limits[0]} s of CPU time"
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return "exited before it answered"
