"""Runs untrusted Python, and hands back plain values: never a verdict, which is the caller's.

    with Sandbox() as sandbox:
        outcomes = sandbox.run([Program(source="def f(x): return x", calls=["f(1)"], accept=lambda i, value: value == 1)])

A worker (`worker.py`) is a lean interpreter, confined by `confine.py`, that forks for every program; here a thread waits for
each worker. The fork reads the program and the calls from a socket of its own, and writes back each call's value in a bounded
encoding of plain data. What the caller expects is in neither process: a program that forges messages can forge values alone.

No program stops a run. One whose worker ends is tried once more on a fresh worker, and is judged wrong if that ends too;
workers are replaced as often as it takes, for as long as a new one runs an honest program.
"""

from __future__ import annotations

import fcntl
import logging
import marshal
import os
import queue
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

from faults.errors import PartDied, UserError
from sandbox import confine, wire
from sandbox.program import Outcome, Program, Verdict
from sandbox.scratch import remove
from sandbox.worker import CPU_SECONDS, WALL_SECONDS, WALL_SLACK

log = logging.getLogger(__name__)


def show_log() -> None:
    """The sandbox's log on standard error: its layers, on or off, in one line, and what went wrong."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sandbox").setLevel(logging.INFO)


Result = TypeVar("Result")

# The worker's whole command: the project's folder is on its path while it imports its own modules, and no longer.
_WORKER = "import sys; sys.path.insert(0, sys.argv.pop(1)); from sandbox import worker; worker.start(sys.argv[1:])"
_ROOT = str(Path(__file__).resolve().parent.parent)
_HONEST = Program("def f(): return 1", ["f()"], lambda i, value: value == 1)
_START_SECONDS = 30.0  # of trying before the machine, and not a program, is taken to be at fault
_END_SECONDS = 3.0  # for workers that are told to end; less than the trainer gives its grader
_PREFIX = "sandbox-"
ENDED_ITS_WORKER = "ended its worker twice"  # the note of a program that did
_SHORT = 1000  # characters of a call that is kept as code
_SMALL, _SMALL_AT_ONCE = 4096, 64  # bytes of a small piece from a run; how many are read as they come


class SandboxDied(PartDied):
    """No worker can be started that runs an honest program: the machine is out of memory, processes or disk."""


class SandboxIncomplete(UserError):
    """`strict` was asked for and a layer of containment is missing here; the text names it."""


class Sandbox:
    """A pool of workers, one per core by default, and of as many threads. restarts: workers replaced so far."""

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
        self.restarts = 0
        self._limits = cpu_seconds, wall_seconds
        self._options = [str(cpu_seconds), str(wall_seconds), *without]
        self._closed = False
        fill_standard_streams()
        count = workers or _usable_cores()
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(count, "sandbox")
        self._base, self._lock = _own_folder()
        try:
            for _ in range(count):
                self._workers.append(_Worker(self._base, self._options))
            self.layers, *_ = [worker.ready() for worker in self._workers]
            self._report(strict)
        except OSError as error:
            self.close()
            raise SandboxDied(f"a sandbox worker did not start: {error}") from None
        except BaseException:
            self.close()
            raise
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(count):
            self._idle.put(number)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers (the interpreters that fork the runs); not of one that is just starting."""
        return [worker.pid for worker in self._workers if worker.pid]

    def close(self) -> None:
        """End the workers and remove their directory."""
        self._closed = True
        for worker in self._workers:
            worker.hang_up()
        until = time.monotonic() + _END_SECONDS
        for worker in self._workers:
            worker.end(until)  # one that executes a setup hears nothing, and the thread that waits for it would go on waiting
        self._threads.shutdown()  # what is queued fails at once
        for worker in self._workers:
            worker.close()
        self._workers = []
        remove(self._base)
        lock, self._lock = self._lock, -1  # once: a second call must not close what has that number by then
        if lock >= 0:
            os.close(lock)

    def run(self, programs: Iterable[Program]) -> list[Outcome]:
        """The outcomes, in the order of `programs`. Raises SandboxDied when no worker can be started that runs an honest
        program, and RuntimeError once the sandbox is closed, which an exception in here does too."""
        return self.results([self.submit(self.outcome, program) for program in programs])

    def submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """The call, made in one of the sandbox's threads: as there are no more of them than workers, `outcome` finds one idle.
        Raises RuntimeError once the sandbox is closed, SandboxDied where the system gives no thread."""
        self._raise_if_closed()
        try:
            return self._threads.submit(function, *args)
        except RuntimeError as error:
            self._raise_if_closed()
            raise SandboxDied(f"the sandbox gets no thread: {error}") from None

    def results(self, calls: Iterable[Future[Result]]) -> list[Result]:
        """What the calls returned, when all have; at the first exception, of whichever, the sandbox is closed."""
        calls = list(calls)
        try:
            for call in as_completed(calls):
                call.result()
            return [call.result() for call in calls]
        except BaseException:
            self.close()
            raise

    def outcome(self, program: Program) -> Outcome:
        """The outcome of one, of the first worker that lives to tell it; two chances. Any thread may ask while the sandbox is
        open, and waits for a worker that is idle. Raises as `run` does."""
        number = self._idle.get()
        try:
            self._raise_if_closed()
            for _ in range(2):
                worker = self._workers[number]
                verdict = worker.judge(program, self._limits)
                if not worker.alive:
                    self._replace(number)
                if verdict.decided:
                    return verdict.outcome
            verdict.decide(False, ENDED_ITS_WORKER)
            return verdict.outcome
        finally:
            self._idle.put(number)

    def _replace(self, number: int) -> None:
        """Put a worker that runs an honest program in the place of one that ended."""
        self._workers[number].close()
        self.restarts += 1
        if self.restarts & (self.restarts - 1) == 0:  # an attack can make many: the 1st, 2nd, 4th, 8th are told
            log.warning("sandbox: worker %d ended and is replaced; %d so far", self._workers[number].pid, self.restarts)
        trying_until = time.monotonic() + _START_SECONDS
        while True:
            self._raise_if_closed()
            try:
                self._workers[number] = _Worker(self._base, self._options)
                if not self._closed:  # else `close` may have missed this one
                    self._workers[number].ready()
                    return
            except (SandboxDied, OSError) as error:
                self._workers[number].close()
                if time.monotonic() > trying_until:
                    raise SandboxDied(str(error)) from None
                time.sleep(0.5)

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("the sandbox is closed")

    def _report(self, strict: bool) -> None:
        missing = {name: self.layers["off"].get(name, "not here") for name in confine.LAYERS if name not in self.layers["on"]}
        text = ", ".join(f"{name} {'(' + d + ')' if d else ''}".strip() for name, d in self.layers["on"].items())
        log.info("sandbox: on: %s; off: %s", text, ", ".join(missing) or "none")
        if missing:
            lacking = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            if strict:
                raise SandboxIncomplete(f"the sandbox is incomplete here and strict was asked for: {lacking}")
            log.warning("SANDBOX INCOMPLETE, untrusted code runs with fewer walls: %s", lacking)


class _Worker:
    """The caller's view of one worker process. pid: 0 until it is ready. alive: False once it ended or fell silent.

    Its control socket carries requests there and reports back, each with the kernel's word on who sent it (Linux): a program
    that got hold of the other end could not speak for its worker."""

    def __init__(self, base: str, options: Sequence[str]):
        self._scratch = tempfile.mkdtemp(dir=base)
        self._control, theirs = socket.socketpair()
        if _CREDENTIALS:
            self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.pid, self.alive = 0, True
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-B", "-c", _WORKER, _ROOT, self._scratch, *options],
                stdin=theirs.fileno(),  # a fixed number, whatever the caller has open; nothing above standard error is inherited
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0"},  # the order of a set is the same in every worker
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the trainer, which ends its batch first
            )

    def ready(self) -> dict[str, dict[str, str]]:
        """Wait for two lines, in either order, the worker's process id and its layers, and for an honest program's outcome.
        Returns the layers, "on" and "off". Raises SandboxDied when the worker ends first or cannot run that program."""
        self._control.settimeout(_START_SECONDS)
        text = b""
        try:
            while text.count(b"\n") < 2:
                chunk = self._control.recv(1 << 16)
                if not chunk:
                    raise SandboxDied(f"a sandbox worker did not start: {text.decode() or 'it ended without a word'}")
                text += chunk
        except OSError as error:
            raise SandboxDied(f"a sandbox worker did not start: {error}") from None
        self.pid, layers = sorted(map(wire.decode, text.splitlines()), key=lambda line: isinstance(line, list))
        verdict = self.judge(_HONEST, (CPU_SECONDS, WALL_SECONDS))
        if not verdict.outcome.passed:
            raise SandboxDied(f"an honest program fails in the sandbox here: {verdict.outcome.note or 'its worker ended'}")
        return dict(zip(("on", "off"), layers, strict=True))

    def judge(self, program: Program, limits: tuple[int, float]) -> Verdict:
        """Run the program and draw the verdict; it stays undecided when the worker ended or fell silent before.

        limits: seconds of CPU and of wall time, the worker's to enforce; silence far beyond them means that it cannot."""
        verdict = Verdict(program)
        until = time.monotonic() + limits[1] * WALL_SLACK + 30.0
        try:
            with self._request(program) as stream:
                stream.settimeout(until - time.monotonic())
                with suppress(ConnectionError):  # a program may end, or close its socket, before all is read
                    stream.sendall(_job(program))
                    stream.shutdown(socket.SHUT_WR)
                    small = 0
                    while not verdict.decided and time.monotonic() < until and (chunk := stream.recv(1 << 18)):
                        verdict.take(chunk)
                        small += len(chunk) < _SMALL
                        if small > _SMALL_AT_ONCE and not verdict.decided:
                            time.sleep(min(small / 5000, 0.1))  # honest runs write every 20 ms; bytes one by one cost seconds
            if verdict.decided:
                self._control.sendall(wire.HEAD.pack(wire.KILL, 0))  # let the worker end the run now
            self._control.settimeout(max(until - time.monotonic(), 1.0))
            verdict.end(self._report(), limits)
        except OSError:
            self.alive = False
        except BaseException:
            self.hang_up()  # what it says next would be taken for another run's
            raise
        return verdict

    def _request(self, program: Program) -> socket.socket:
        """Our end of a new run's own socket; the worker has the other, and the program's setup. Raises OSError."""
        ours, theirs = socket.socketpair()
        body = f"{program.look_at}\0{program.setup}".encode("utf-8", "surrogatepass")
        try:
            with theirs:
                socket.send_fds(self._control, [wire.HEAD.pack(wire.RUN, len(body))], [theirs.fileno()])
                self._control.sendall(body)
        except OSError:
            ours.close()
            raise
        return ours

    def _report(self) -> tuple[int, int, float, bytes]:
        """The worker's report on the run's end, and the bytes that it saw. Raises OSError when the worker is gone."""
        status, reason, cpu_seconds, length = wire.REPORT.unpack(self._from_worker(wire.REPORT.size))
        return status, reason, cpu_seconds, self._from_worker(length)

    def _from_worker(self, length: int) -> bytes:
        """So many bytes of the worker's own, dropping what anybody else wrote there."""
        data = b""
        while len(data) < length:
            chunk, ancillary, _, _ = self._control.recvmsg(length - len(data), _CREDENTIALS)
            if not chunk:
                raise ConnectionResetError
            senders = [struct.unpack("3i", sent)[0] for _, kind, sent in ancillary if kind == _SCM_CREDENTIALS]
            if senders == [self.pid] or not _CREDENTIALS:
                data += chunk
        return data

    def hang_up(self) -> None:
        """Let the worker end itself, and a thread that waits for it wake up."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the worker and everything under it."""
        self.hang_up()
        self._control.close()
        self.end(time.monotonic() + _END_SECONDS)
        remove(self._scratch)

    def end(self, until: float) -> None:
        """Wait for the worker's end until then, on the monotonic clock, and kill it where it has not come."""
        try:
            self._process.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_CREDENTIALS = socket.CMSG_SPACE(12) if sys.platform.startswith("linux") else 0
_SCM_CREDENTIALS = 2  # of <sys/socket.h>, which the socket module does not name


def _job(program: Program) -> bytes:
    return marshal.dumps(
        {
            "source": program.source,
            "calls": [_compiled(call) for call in program.calls],
            "shape": list(program.shapes or ["value"] * len(program.calls)),
            "returns": program.returns,
            "probe": program.probe,
            "decoys": list(program.decoys),
            "claim": program.claim,
            "look_at": program.look_at,
            "has_setup": bool(program.setup.strip()),
        }
    )


@lru_cache(maxsize=1 << 14)
def _compiled(call: str) -> CodeType | str:
    """The call as code, which a run need not compile: a problem's are asked once a response, eight of them take it .1 ms.

    As it is where it is too long to keep, or cannot be compiled, which the run is to say."""
    try:
        return compile(call, "<string>", "eval", dont_inherit=True) if len(call) <= _SHORT else call
    except Exception:
        return call


def _own_folder() -> tuple[str, int]:
    """(a new temporary directory, the lock whose holder lives), after removing those of owners that were killed.

    Raises UserError when there is no temporary directory to write to."""
    try:
        parent = Path(tempfile.gettempdir())
        for left in parent.glob(f"{_PREFIX}*/lock"):
            with suppress(OSError), open(left) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(left.parent)
        base = tempfile.mkdtemp(prefix=_PREFIX)
        os.chmod(base, 0o711)  # a worker that drops root's rights passes through to its own directory
        lock = os.open(os.path.join(base, "unlocked"), os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(os.path.join(base, "unlocked"), os.path.join(base, "lock"))  # locked before anybody looks for that name
        return base, lock
    except OSError as error:
        raise UserError(f"the sandbox needs a temporary directory to write to: {error.strerror or error}; set TMPDIR") from None


def fill_standard_streams() -> None:
    """Open those of the three descriptors that are closed: a socket to a worker, with that number, would get what any library
    writes to standard error."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
