"""Runs untrusted Python, and hands back plain values: never a verdict, which is the caller's.

    with Sandbox() as sandbox:
        outcomes = sandbox.run([Program(source="def f(x): return x", calls=["f(1)"], accept=lambda i, value: value == 1)])

A worker (`sandbox_worker.py`) is a lean interpreter, confined by `confine.py`, that forks for every program. The fork reads the
program and the calls from a socket of its own, and writes back each call's value in a bounded encoding of plain data. What
the caller expects is in neither process: a program that forges messages can forge values alone.
"""

import logging
import marshal
import os
import re
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults.errors import PartDied, UserError
from sandbox import confine, wire
from sandbox.wire import NotPlain, decode
from sandbox.worker import CPU_SECONDS, CPU_SLACK, WALL_SECONDS, WALL_SLACK

log = logging.getLogger(__name__)

# The worker's whole command: the project's folder is on its path while it imports its own two modules, and no longer.
_WORKER = "import sys; sys.path.insert(0, sys.argv.pop(1)); from sandbox import worker; worker.start(sys.argv[1:])"
_ROOT = str(Path(__file__).resolve().parent.parent)


class SandboxDied(PartDied):
    """A worker died twice: the machine is out of memory, or something kills the project's processes."""


class SandboxIncomplete(UserError):
    """`strict` was asked for and a layer of containment is missing here; the text names it."""


# ---- the caller's side --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """What to run and how to judge its values.

    setup: trusted source that comes first, executed once in the worker.
    calls: expressions evaluated in order in the program's namespace; `accept(index, value)` judges each plain value, in
        this process, and a False ends the run. With `returns` the one call need only return, and its value is ignored.
    shapes: how each value is made plain, "value", "linked" (a linked list) or "tree"; all "value" when left out.
    probe: a name; the outcome says whether the program bound it.
    hashed_limit: see `decode`.
    """

    source: str
    calls: Sequence[str]
    accept: Callable | None = None
    setup: str = ""
    returns: bool = False
    shapes: Sequence[str] | None = None
    probe: str | None = None
    hashed_limit: int = 1000


@dataclass
class Outcome:
    """compiled: no syntax error. bound: the probed name exists (the program's claim). passed: every value accepted, or the
    call returned. note: "" when passed, else a few words that say why not. cpu_seconds: user and system time."""

    compiled: bool = False
    bound: bool = False
    passed: bool = False
    note: str = ""
    cpu_seconds: float = 0.0


@dataclass(eq=False)
class _Run:
    """One program in flight."""

    index: int
    program: Program
    stream: socket.socket
    outbox: memoryview
    started: float
    outcome: Outcome = field(default_factory=Outcome)
    inbox: bytearray = field(default_factory=bytearray)
    answered: int = 0
    frames: int = 0
    decided: bool = False
    ended: bool = False

    def decide(self, passed, note=""):
        self.decided, self.outcome.passed, self.outcome.note = True, passed, note


class Sandbox:
    """A pool of workers, one per core by default. Not thread-safe: one caller at a time."""

    def __init__(self, workers=None, strict=False, without=(), cpu_seconds=CPU_SECONDS, wall_seconds=WALL_SECONDS):
        """strict: raise SandboxIncomplete when a layer of containment is missing, instead of one loud line in the log.
        without: layers to leave off, for tests of the others.
        cpu_seconds (whole), wall_seconds: what one program may use; CPU seconds are those of a fast core, slower ones get more.
        """
        self._count = workers or len(_usable_cores())
        self._limits = cpu_seconds, wall_seconds
        self._options = [str(cpu_seconds), str(wall_seconds), *without]
        self._restarts_left = 1
        self._base = tempfile.mkdtemp(prefix="sandbox-")
        os.chmod(self._base, 0o711)  # a worker that drops root's rights passes through to its own directory
        self._workers = []
        try:
            self._workers = [_Handle(self._base, self._options) for _ in range(self._count)]
            self.layers = self._workers[0].ready()
            for worker in self._workers[1:]:
                worker.ready()
            self._report(strict)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def pids(self):
        """Process ids of the workers (the interpreters that fork the runs)."""
        return [worker.pid for worker in self._workers]

    def close(self):
        """End the workers and remove their directory."""
        for worker in self._workers:
            worker.close()
        self._workers = []
        shutil.rmtree(self._base, ignore_errors=True)

    def run(self, programs):
        """[Outcome], in the order of `programs`. Raises SandboxDied when a worker dies for the second time, and RuntimeError
        once the sandbox is closed, which an exception in here does too: answers in flight must not meet the next batch."""
        if not self._workers:
            raise RuntimeError("the sandbox is closed")
        programs = list(programs)
        outcomes = [None] * len(programs)
        waiting = deque(enumerate(programs))
        with selectors.DefaultSelector() as selector:
            for number, worker in enumerate(self._workers):
                selector.register(worker.control, selectors.EVENT_READ, number)
            try:
                while waiting or any(worker.run for worker in self._workers):
                    self._start(waiting, selector)
                    for key, _ in selector.select(timeout=5.0):
                        self._handle(key, selector, waiting, outcomes)
                    self._check_deadlines(selector, waiting)
            except BaseException:
                self.close()
                raise
        return outcomes

    def _start(self, waiting, selector):
        for worker in self._workers:
            while waiting and worker.run is None:
                index, program = waiting.popleft()
                try:
                    worker.start(index, program)
                except OSError:
                    self._replace(worker, selector, waiting)
                    waiting.appendleft((index, program))
                    break
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.run.outbox else 0)
                selector.register(worker.run.stream, events, worker)

    def _handle(self, key, selector, waiting, outcomes):
        if isinstance(key.data, _Handle):
            self._serve_stream(key.data, selector)
            return
        worker = self._workers[key.data]
        if key.fileobj is not worker.control:
            return  # of a worker that was replaced in this round
        report = worker.read_report()
        if report is None:
            self._replace(worker, selector, waiting)
        elif report:
            run = worker.run
            if not run.ended:
                selector.unregister(run.stream)
            outcomes[run.index] = worker.finish(report, self._limits)

    def _serve_stream(self, worker, selector):
        run = worker.run
        if run is None or run.ended:
            return
        worker.push()
        if worker.pull():
            run.ended = True
            selector.unregister(run.stream)
        elif not run.outbox:
            selector.modify(run.stream, selectors.EVENT_READ, worker)

    def _check_deadlines(self, selector, waiting):
        for worker in list(self._workers):
            if worker.run and time.monotonic() - worker.run.started > self._limits[1] * WALL_SLACK + 30.0:
                self._replace(worker, selector, waiting)

    def _replace(self, worker, selector, waiting):
        """Start a new worker in place of a dead one, once; its program runs again from the start."""
        number = self._workers.index(worker)
        selector.unregister(worker.control)
        if worker.run:
            if not worker.run.ended:
                selector.unregister(worker.run.stream)
            waiting.appendleft((worker.run.index, worker.run.program))
        worker.close()
        if not self._restarts_left:
            raise SandboxDied("a sandbox worker died for the second time; see the log for the first")
        self._restarts_left -= 1
        log.warning("sandbox: worker %d died and was restarted; a second death stops the run", worker.pid)
        self._workers[number] = _Handle(self._base, self._options)
        self._workers[number].ready()
        selector.register(self._workers[number].control, selectors.EVENT_READ, number)

    def _report(self, strict):
        missing = {name: self.layers["off"].get(name, "not here") for name in confine.LAYERS if name not in self.layers["on"]}
        text = ", ".join(f"{name} {'(' + d + ')' if d else ''}".strip() for name, d in self.layers["on"].items())
        log.info("sandbox: on: %s; off: %s", text, ", ".join(missing) or "none")
        if missing:
            lacking = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            if strict:
                raise SandboxIncomplete(f"the sandbox is incomplete here and strict was asked for: {lacking}")
            log.warning("SANDBOX INCOMPLETE, untrusted code runs with fewer walls: %s", lacking)


class _Handle:
    """The caller's view of one worker process."""

    def __init__(self, base, options):
        scratch = tempfile.mkdtemp(dir=base)
        self.control, theirs = socket.socketpair()
        self.run = None
        self._report = b""
        command = [sys.executable, "-s", "-B", "-c", _WORKER, _ROOT, str(theirs.fileno()), scratch, *options]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PYTHONHASHSEED": "0"},  # the order of a set is the same in every worker
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the trainer, which ends its batch first
        )
        theirs.close()
        self.pid = None

    def ready(self):
        """Wait for two lines, in either order: the worker's process id, and its layers, which are returned: [on, off]."""
        text = b""
        while text.count(b"\n") < 2:
            chunk = self.control.recv(1 << 16)
            if not chunk:
                raise SandboxDied(f"a sandbox worker did not start (exit code {self._process.wait()}): {text.decode()}")
            text += chunk
        self.pid, layers = sorted(map(decode, text.splitlines()), key=lambda line: isinstance(line, list))
        return dict(zip(("on", "off"), layers))

    def start(self, index, program):
        """Send the program. Raises OSError when the worker is gone."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        job = {
            "source": program.source,
            "calls": list(program.calls),
            "shape": list(program.shapes or ["value"] * len(program.calls)),
            "returns": program.returns,
            "probe": program.probe,
            "has_setup": bool(program.setup.strip()),
        }
        setup = program.setup.encode("utf-8", "surrogatepass")
        with theirs:
            try:
                socket.send_fds(self.control, [wire.HEAD.pack(wire.RUN, len(setup))], [theirs.fileno()])
                self.control.sendall(setup)
            except OSError:
                ours.close()
                raise
        self.run = _Run(index, program, ours, memoryview(marshal.dumps(job)), time.monotonic())
        self.push()

    def push(self):
        """Write what is left of the job, then say that it is all."""
        run = self.run
        if not run.outbox:
            return
        try:
            while run.outbox:
                run.outbox = run.outbox[run.stream.send(run.outbox) :]
            run.stream.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            run.outbox = memoryview(b"")

    def pull(self):
        """Read and judge frames; True at the end of the stream."""
        run = self.run
        try:
            chunk = run.stream.recv(1 << 18)
        except BlockingIOError:
            return False
        except OSError:
            return True
        if not run.decided:
            run.inbox += chunk
            self._judge(run)
            if run.decided:
                run.inbox.clear()
                self._stop()
        return not chunk

    def _judge(self, run):
        while not run.decided and len(run.inbox) >= wire.HEAD.size:
            kind, length = wire.HEAD.unpack_from(run.inbox)
            if length > wire.MAX_FRAME:
                return run.decide(False, "protocol violated")
            if len(run.inbox) < wire.HEAD.size + length:
                return
            body = bytes(run.inbox[wire.HEAD.size : wire.HEAD.size + length])
            del run.inbox[: wire.HEAD.size + length]
            _judge_frame(run, kind, body)
            run.frames += 1

    def _stop(self):
        """The verdict is known: let the worker end the run now. A worker that is gone is noticed by its silence."""
        try:
            self.control.sendall(wire.HEAD.pack(wire.KILL, 0))
        except OSError:
            pass

    def read_report(self):
        """The worker's report on the run's end: None when the worker is gone, () when it is not all there yet."""
        try:
            chunk = self.control.recv(wire.REPORT.size - len(self._report))
        except OSError:
            return None
        if not chunk:
            return None
        self._report += chunk
        if len(self._report) < wire.REPORT.size:
            return ()
        report, self._report = wire.REPORT.unpack(self._report), b""
        return report

    def finish(self, report, limits):
        """The outcome of the run that has ended, after whatever it still had in its socket."""
        status, reason, cpu_seconds = report
        run = self.run
        while not run.ended and not run.decided:
            before = len(run.inbox), run.frames
            run.ended = self.pull() or (len(run.inbox), run.frames) == before
        run.outcome.cpu_seconds = cpu_seconds
        if not run.decided:
            run.decide(False, _why(status, reason, cpu_seconds, limits))
        run.stream.close()
        self.run = None
        return run.outcome

    def close(self):
        """End the worker and everything under it."""
        if self.run:
            self.run.stream.close()
        self.control.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _judge_frame(run, kind, body):
    """Take one frame into the outcome. A program may forge any frame but the first, which precedes it."""
    program, outcome = run.program, run.outcome
    if kind == wire.ERROR:
        run.decide(False, "error: " + re.sub(r"[^!-~]", "?", body[:100].decode("ascii", "replace")))
        outcome.compiled &= body not in (b"SyntaxError", b"IndentationError") or run.frames > 1
    elif kind == wire.COMPILED and run.frames == 0:
        outcome.compiled = True
    elif kind == wire.LOADED and run.frames == 1:
        outcome.bound = body == b"1"
    elif kind == wire.RETURNED and program.returns and run.frames == 2:
        run.decide(True)
    elif kind == wire.ANSWER and not program.returns and run.frames >= 2:
        _judge_answer(run, body)
    else:
        run.decide(False, "protocol violated")


def _judge_answer(run, body):
    program = run.program
    try:
        value = decode(body, program.hashed_limit)
    except NotPlain as error:
        return run.decide(False, str(error))
    if not program.accept(run.answered, value):
        return run.decide(False, f"wrong answer to call {run.answered}")
    run.answered += 1
    if run.answered == len(program.calls):
        run.decide(True)


def _why(status, reason, cpu_seconds, limits):
    """A few words on a run that ended without a verdict."""
    if reason == wire.WALL_TIME:
        return f"timeout: {limits[1]:g} s of wall time"
    if reason == wire.CPU_TIME or cpu_seconds >= limits[0] * CPU_SLACK - 0.2:
        return f"timeout: {limits[0]} s of CPU time"
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return "exited before it answered"


def _usable_cores():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
