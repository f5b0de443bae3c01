"""The sandbox's worker: a lean interpreter that confines itself, then forks once for every untrusted program.

Started by `pool.py` as a program of its own, without the caller's libraries: a small process forks in half a millisecond, and
has nothing to steal. It passes each program's socket on to the fork unread, so that neither the programs nor the canonical
solutions that some runs hold are ever in the memory that later forks inherit.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress

from sandbox import confine, wire
from sandbox.run import read_job, run_program, run_unheard
from sandbox.scratch import contents, fresh_name, sweep, unnamed_file
from sandbox.wire import HEAD, encode

TYPE_CHECKING = False  # by hand, as in wire.py
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from io import FileIO
    from typing import Any, NoReturn

# What one run may use. CPU time decides, wall time is the backstop for a program that sleeps.
CPU_SECONDS = 3  # on a core of the reference speed, see `slowdown`
CPU_SLACK = 3  # times that, at most, on a slower core
WALL_SECONDS = 15.0
WALL_SLACK = 4  # times that, at most, for a program that works on a crowded core

TO_A_JOB = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what a scheduler or a terminal sends to every process at once

# ---- the worker --------------------------------------------------------------------------------------------------


def start(arguments: Sequence[str]) -> NoReturn:
    """The worker's life: confine itself, report the layers, then a fork per request until the control socket closes.

    The control socket is standard input. arguments: scratch folder, CPU seconds (whole), wall seconds, layers to leave off."""
    scratch, cpu_seconds, wall_seconds, *without = arguments
    control = socket.socket(fileno=0)
    os.umask(0o022)  # the caller's may hide the private root from the user that the worker becomes
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the caller may have blocked the signal that says that a run has ended
    for number in TO_A_JOB:  # the caller ends its step first; a run that lost its worker twice would be judged wrong
        signal.signal(number, signal.SIG_IGN)
    try:
        confine.go_first()
        layers, scratch = confine.enter(scratch, without)
        pid = os.fork()  # the child is the first process of the new process-id namespace
        if pid == 0:
            confine.die_with_parent()
            worker = _Worker(control, scratch, layers, (int(cpu_seconds), float(wall_seconds)))
            confine.wall_in(layers, scratch)
            control.sendall(encode([layers.on, layers.off]) + b"\n")
    except BaseException as error:  # standard error is closed, so the caller is told here, where only reports follow
        control.sendall(repr(error).encode())
        os._exit(1)
    if pid == 0:
        try:
            while worker.serve_one():
                pass
        finally:
            os._exit(0)
    control.sendall(b"%d\n" % pid)  # only here is its number known as the caller sees it
    control.close()
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)


def _open_listing_of_children() -> FileIO | None:
    """A handle on the kernel's list of this process's children, opened before the walls close; None where there is none."""
    try:
        return open(f"/proc/self/task/{os.getpid()}/children", "rb", buffering=0)
    except OSError:
        return None


class _Worker:
    """Serves one request at a time: a fork that runs a program, supervised to its end and swept up after.

    wake: a descriptor that is readable once a child has ended. Made before the walls close, which take away what it opens."""

    def __init__(self, control: socket.socket, scratch: str, layers: confine.Layers, limits: tuple[int, float]):
        """limits: seconds of CPU and of wall time."""
        confine.adopt_orphans()
        os.environ.clear()
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a run that imports numpy is one thread, not one a core
        sys.path[:] = [path for path in sys.path if path.startswith(tuple(confine.LIBRARIES))]
        self.control, self.scratch, self.layers = control, scratch, layers
        self.cpu_seconds, self.wall_seconds = limits
        self.children = _open_listing_of_children()
        self.wake, wake_write = os.pipe()
        for end in (self.wake, wake_write):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self.alone = "namespaces" in layers.on and os.getpid() == 1  # every other process in sight is a run's
        self.setups: dict[str, dict[str, Any] | BaseException] = {}

    def serve_one(self) -> bool:
        """Wait for a request and carry it out; False when there shall be no other: the control socket has closed, or what the
        run left in the scratch folder could not be removed, and a fresh worker serves the next one better."""
        kind, body, fds = self._receive()
        return self._run(body, fds[0]) if kind == wire.RUN else kind is not None

    def _receive(self) -> tuple[bytes | None, str, list[int]]:
        """(kind, body, descriptors) of the next request; the kind is None when the control socket has closed."""
        head, fds, _, _ = socket.recv_fds(self.control, HEAD.size, 1)
        try:
            kind, length = HEAD.unpack(head + self._exactly(HEAD.size - len(head)))
            return kind, self._exactly(length).decode("utf-8", "surrogatepass"), fds
        except EOFError:
            return None, "", fds

    def _exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            chunk = self.control.recv(length - len(data))
            if not chunk:
                raise EOFError
            data += chunk
        return data

    def _namespace(self, setup: str) -> dict[str, Any] | BaseException:
        """The setup's namespace, executed once: forks inherit it. A setup that fails, or that takes as long as a run may, is the
        error that each run reports."""
        if setup not in self.setups:
            namespace: dict[str, Any] = {}
            signal.signal(signal.SIGALRM, _too_long)
            signal.setitimer(signal.ITIMER_REAL, self.wall_seconds)
            try:
                exec(compile(setup, "setup.py", "exec", dont_inherit=True), namespace)
                self.setups[setup] = namespace
            except BaseException as error:
                self.setups[setup] = error
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
            gc.collect()
            gc.freeze()
        return self.setups[setup]

    def _run(self, body: str, fd: int) -> bool:
        """Run one program and report on its end; False when its files could not be removed."""
        look_at, _, setup = body.partition("\0")
        namespace = self._namespace(setup)
        directory = os.path.join(self.scratch, fresh_name())
        os.mkdir(directory, 0o700)
        inside = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # the run may put another in its place
        printed = unnamed_file(self.scratch) if look_at == wire.STDOUT else None
        pid = _patient_fork()
        if pid == 0:
            self._child(fd, namespace, directory, printed)
        os.close(fd)
        status, reason, usage = self._supervise(pid)
        self._kill_stragglers(pid)
        seen = b""
        if printed is not None:
            seen = os.pread(printed, wire.MAX_SEEN, 0)
            os.close(printed)
        elif look_at and look_at != wire.EXIT:
            seen = contents(look_at, inside, wire.MAX_SEEN)
        os.close(inside)
        swept = sweep(directory, self.scratch)
        self.control.sendall(wire.REPORT.pack(status, reason, usage.ru_utime + usage.ru_stime, len(seen)) + seen)
        return swept

    def _child(self, fd: int, namespace: dict[str, Any] | BaseException, directory: str, printed: int | None) -> NoReturn:
        """The fork; never returns. printed: what takes its standard output, or None."""
        code, leave = 1, os._exit  # the program may put another in its place
        try:
            confine.die_with_parent()
            signal.set_wakeup_fd(-1)
            os.setsid()
            os.chdir(directory)
            null = os.open(os.devnull, os.O_RDWR)  # this run's own: what a shared one is told, a lock say, the next could read
            for stream in (0, 1, 2):  # standard input was the control socket
                os.dup2(null, stream)
            if printed is not None:
                os.dup2(printed, 1)
            os.dup2(fd, 3)
            os.closerange(4, 1 << 16)
            if "random" in sys.modules:
                sys.modules["random"].seed(0)  # Python seeds anew after a fork; the same program shall do the same
            confine.lock(self.layers, CPU_SLACK * self.cpu_seconds)
            job = read_job(3)  # in every case: a caller whose job is not read to its end may miss what is written here
            if isinstance(namespace, BaseException):
                os.write(3, HEAD.pack(wire.ERROR, 5) + b"setup")
            elif job["look_at"]:
                os.close(3)
                code = run_unheard(job, namespace, sys.stdout.flush)
            else:
                run_program(3, job, namespace)
        finally:
            leave(code)

    def _supervise(self, pid: int) -> tuple[int, int, Any]:
        """Wait for the child's end, the end of its time, or word from the caller: (wait status, reason, rusage)."""
        reason, killed, cpu_limit = wire.ON_ITS_OWN, False, float(self.cpu_seconds)
        deadlines = self._deadlines(pid)
        deadline = next(deadlines)
        while True:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                return status, reason, usage
            if not killed:
                wall_left, cpu_left = deadline - time.monotonic(), cpu_limit - _cpu_seconds(pid)
                if cpu_left <= 0 and cpu_limit == self.cpu_seconds:  # measured now, under the load that the run had
                    cpu_limit *= min(1.001 * slowdown(), CPU_SLACK)
                    continue
                if wall_left <= 0 < cpu_left:
                    deadline = next(deadlines, deadline)
                    wall_left = deadline - time.monotonic()
                if cpu_left <= 0 or wall_left <= 0:
                    reason, killed = (wire.CPU_TIME if cpu_left <= 0 else wire.WALL_TIME), self._kill(pid)
            patience = None if killed else max(min(wall_left, cpu_left), 0.001)
            watched: list[Any] = [self.wake] if killed else [self.wake, self.control]
            ready, _, _ = select.select(watched, [], [], patience)
            if self.wake in ready:
                os.read(self.wake, 4096)
            if self.control in ready:
                killed = self._kill(pid)
                if self._receive()[0] is None:
                    self._kill_stragglers(pid)
                    os._exit(0)

    def _deadlines(self, pid: int) -> Iterator[float]:
        """The ends of the run's wall time: another period as long as the last one was spent waiting for a crowded core.

        A program that sleeps uses next to no CPU time; one that used a tenth of the period was at work."""
        for _ in range(WALL_SLACK):
            before = _cpu_seconds(pid)
            yield time.monotonic() + self.wall_seconds
            if _cpu_seconds(pid) - before < self.wall_seconds / 10:
                return

    @staticmethod
    def _kill(pid: int) -> bool:
        os.kill(pid, signal.SIGKILL)
        return True

    def _kill_stragglers(self, pid: int) -> None:
        """End every process that the run left behind: all others of the namespace, or whoever was reparented to us."""
        while True:
            if self.alone:
                _ignoring(os.kill, -1, signal.SIGKILL)
            else:
                _ignoring(os.killpg, pid, signal.SIGKILL)
                for child in self._listed_children():
                    _ignoring(os.kill, child, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return

    def _listed_children(self) -> list[int]:
        if self.children is None:
            return []
        self.children.seek(0)
        return [int(word) for word in self.children.read().split()]


def _too_long(*_: Any) -> NoReturn:
    raise TimeoutError


def _patient_fork() -> int:
    """os.fork, tried for five seconds where the user's processes are many just now: another worker's run may be a fork bomb."""
    for _ in range(500):
        try:
            return os.fork()
        except BlockingIOError:
            time.sleep(0.01)
    return os.fork()


def _ignoring(action: Callable[..., None], *args: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        action(*args)


def _cpu_seconds(pid: int) -> float:
    """CPU time of another process so far; 0 where the system can't say (the hard limit then decides)."""
    if not sys.platform.startswith("linux"):
        return 0.0
    try:
        return time.clock_gettime(~pid << 3 | 2)  # the kernel's clock id for the process-wide CPU time of `pid`
    except OSError:
        return 0.0


REFERENCE_SECONDS = 0.005  # of the loop below, on a recent server core


def slowdown() -> float:
    """How much slower than the reference this core runs Python just now, at least 1: the best of five short loops.

    Seconds of CPU time are not equal: two hardware threads that share a core count both in full. A limit in seconds of the
    reference judges a program by its work instead of by its neighbours."""
    best = min(_timed_loop() for _ in range(5))
    return max(1.0, best / REFERENCE_SECONDS)


def _timed_loop() -> float:
    start, table, total = time.process_time(), list(range(64)), 0
    for i in range(100_000):
        total = (total + table[i & 63] * i) % 1_000_007
    return time.process_time() - start
