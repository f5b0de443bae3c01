"""Runs untrusted Python, and hands back plain values: never a verdict, which is the caller's.

    with Sandbox() as sandbox:
        outcomes = sandbox.run([Program(source="def f(x): return x", calls=["f(1)"], accept=lambda i, value: value == 1)])

A worker (`worker.py`) is a lean interpreter, confined by `confine.py`, that forks for every program. The fork reads the
program and the calls from a socket of its own, and writes back each call's value in a bounded encoding of plain data. What
the caller expects is in neither process: a program that forges messages can forge values alone.
"""

from __future__ import annotations

import contextlib
import logging
import marshal
import os
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from faults.errors import PartDied, UserError
from sandbox import confine, wire
from sandbox.program import Outcome, Program, Run, why
from sandbox.worker import CPU_SECONDS, WALL_SECONDS, WALL_SLACK

log = logging.getLogger(__name__)

# The worker's whole command: the project's folder is on its path while it imports its own modules, and no longer.
_WORKER = "import sys; sys.path.insert(0, sys.argv.pop(1)); from sandbox import worker; worker.start(sys.argv[1:])"
_ROOT = str(Path(__file__).resolve().parent.parent)


class SandboxDied(PartDied):
    """A worker died twice: the machine is out of memory, or something kills the project's processes."""


class SandboxIncomplete(UserError):
    """`strict` was asked for and a layer of containment is missing here; the text names it."""


_Waiting = deque[tuple[int, Program]]


class Sandbox:
    """A pool of workers, one per core by default. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        workers: int | None = None,
        strict: bool = False,
        without: Sequence[str] = (),
        cpu_seconds: int = CPU_SECONDS,
        wall_seconds: float = WALL_SECONDS,
    ):
        """strict: raise SandboxIncomplete when a layer of containment is missing, instead of one loud line in the log.
        without: layers to leave off, for tests of the others.
        cpu_seconds, wall_seconds: what one program may use; CPU seconds are those of a fast core, slower ones get more."""
        self._count = workers or _usable_cores()
        self._limits = cpu_seconds, wall_seconds
        self._options = [str(cpu_seconds), str(wall_seconds), *without]
        self._restarts_left = 1
        self._base = tempfile.mkdtemp(prefix="sandbox-")
        os.chmod(self._base, 0o711)  # a worker that drops root's rights passes through to its own directory
        self._workers: list[_Handle] = []
        try:
            self._workers = [_Handle(self._base, self._options) for _ in range(self._count)]
            self.layers = self._workers[0].ready()
            for worker in self._workers[1:]:
                worker.ready()
            self._report(strict)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers (the interpreters that fork the runs)."""
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        """End the workers and remove their directory."""
        for worker in self._workers:
            worker.close()
        self._workers = []
        shutil.rmtree(self._base, ignore_errors=True)

    def run(self, programs: Iterable[Program]) -> list[Outcome]:
        """The outcomes, in the order of `programs`. Raises SandboxDied when a worker dies for the second time, and RuntimeError
        once the sandbox is closed, which an exception in here does too: answers in flight must not meet the next batch."""
        if not self._workers:
            raise RuntimeError("the sandbox is closed")
        outcomes: dict[int, Outcome] = {}
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
        return [outcomes[index] for index in sorted(outcomes)]

    def _start(self, waiting: _Waiting, selector: selectors.BaseSelector) -> None:
        for worker in self._workers:
            while waiting and worker.run is None:
                index, program = waiting.popleft()
                try:
                    run = worker.start(index, program)
                except OSError:
                    self._replace(worker, selector, waiting)
                    waiting.appendleft((index, program))
                    break
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if run.outbox else 0)
                selector.register(run.stream, events, worker)

    def _handle(
        self, key: selectors.SelectorKey, selector: selectors.BaseSelector, waiting: _Waiting, outcomes: dict[int, Outcome]
    ) -> None:
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
            assert run is not None
            if not run.ended:
                selector.unregister(run.stream)
            outcomes[run.index] = worker.finish(run, report, self._limits)

    def _serve_stream(self, worker: _Handle, selector: selectors.BaseSelector) -> None:
        run = worker.run
        if run is None or run.ended:
            return
        _push(run)
        if worker.pull(run):
            run.ended = True
            selector.unregister(run.stream)
        elif not run.outbox:
            selector.modify(run.stream, selectors.EVENT_READ, worker)

    def _check_deadlines(self, selector: selectors.BaseSelector, waiting: _Waiting) -> None:
        for worker in list(self._workers):
            if worker.run and time.monotonic() - worker.run.started > self._limits[1] * WALL_SLACK + 30.0:
                self._replace(worker, selector, waiting)

    def _replace(self, worker: _Handle, selector: selectors.BaseSelector, waiting: _Waiting) -> None:
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

    def _report(self, strict: bool) -> None:
        missing = {name: self.layers["off"].get(name, "not here") for name in confine.LAYERS if name not in self.layers["on"]}
        text = ", ".join(f"{name} {'(' + d + ')' if d else ''}".strip() for name, d in self.layers["on"].items())
        log.info("sandbox: on: %s; off: %s", text, ", ".join(missing) or "none")
        if missing:
            lacking = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            if strict:
                raise SandboxIncomplete(f"the sandbox is incomplete here and strict was asked for: {lacking}")
            log.warning("SANDBOX INCOMPLETE, untrusted code runs with fewer walls: %s", lacking)


class _Handle:
    """The caller's view of one worker process. control: the worker's own socket; run: what it is at; pid: 0 until it is ready."""

    def __init__(self, base: str, options: Sequence[str]):
        scratch = tempfile.mkdtemp(dir=base)
        self.control, theirs = socket.socketpair()
        self.run: Run | None = None
        self.pid = 0
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

    def ready(self) -> dict[str, dict[str, str]]:
        """Wait for two lines, in either order: the worker's process id, and its layers, which are returned as "on" and "off".

        Raises SandboxDied when the worker ends first."""
        text = b""
        while text.count(b"\n") < 2:
            chunk = self.control.recv(1 << 16)
            if not chunk:
                raise SandboxDied(f"a sandbox worker did not start (exit code {self._process.wait()}): {text.decode()}")
            text += chunk
        self.pid, layers = sorted(map(wire.decode, text.splitlines()), key=lambda line: isinstance(line, list))
        return dict(zip(("on", "off"), layers, strict=True))

    def start(self, index: int, program: Program) -> Run:
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
        self.run = Run(index, program, ours, memoryview(marshal.dumps(job)), time.monotonic())
        _push(self.run)
        return self.run

    def pull(self, run: Run) -> bool:
        """Read and judge frames; True at the end of the stream."""
        try:
            chunk = run.stream.recv(1 << 18)
        except BlockingIOError:
            return False
        except OSError:
            return True
        if not run.decided:
            run.inbox += chunk
            run.judge()
            if run.decided:
                run.inbox.clear()
                # Let the worker end the run now. One that is gone is noticed by its silence.
                with contextlib.suppress(OSError):
                    self.control.sendall(wire.HEAD.pack(wire.KILL, 0))
        return not chunk

    def read_report(self) -> tuple[int, int, float] | tuple[()] | None:
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
        (status, reason, cpu_seconds), self._report = wire.REPORT.unpack(self._report), b""
        return status, reason, cpu_seconds

    def finish(self, run: Run, report: tuple[int, int, float], limits: tuple[int, float]) -> Outcome:
        """The outcome of the run that has ended, after whatever it still had in its socket."""
        while not run.ended and not run.decided:
            before = len(run.inbox), run.frames
            run.ended = self.pull(run) or (len(run.inbox), run.frames) == before
        if not run.decided:
            run.decide(False, why(*report, limits))
        run.stream.close()
        self.run = None
        return run.outcome

    def close(self) -> None:
        """End the worker and everything under it."""
        if self.run:
            self.run.stream.close()
        self.control.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _push(run: Run) -> None:
    """Write what is left of the job, then say that it is all."""
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


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
