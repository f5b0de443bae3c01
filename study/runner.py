"""The control of the study's processes: started, resumed, stopped, waited for, never two in one folder."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from study.plan import Job, duration, estimate

GRACE_SECONDS = 120  # to finish a step and write a checkpoint after a signal; a step at full scale takes about a minute
POLL_SECONDS = 0.2


def start(job: Job, program: Path, lock: IO[str]) -> subprocess.Popen[bytes]:
    """A run of grpo.py, begun or resumed, as a process in a process group of its own.

    It inherits the open, locked file. The lock is held as long as the process lives, even if this program is killed, so that
    the next study can tell a run that is still going on from one that was interrupted.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    _clear_false_start(job.folder)
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if job.scale == "pocket" else {}
    command = [sys.executable, str(program), *job.arguments()]
    with lock, job.log.open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | one_thread,
            pass_fds=(lock.fileno(),),
            start_new_session=True,  # a Ctrl-C in the terminal reaches this program alone, which passes it on once
        )


class Orphan:
    """A run that an earlier study started and that outlived it: waited for, never stopped."""

    def __init__(self, job: Job):
        self.job = job

    def poll(self) -> int | None:
        """0 once its lock is free, or None while it goes on."""
        lock = try_lock(lock_path(self.job))
        if lock is None:
            return None
        lock.close()
        return 0


def lock_path(job: Job) -> Path:
    """The file whose lock says that the run is going on."""
    return job.log.with_suffix(".lock")


def try_lock(path: Path) -> IO[str] | None:
    """An open file that holds the lock on `path`, or None when another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _clear_false_start(folder: Path) -> None:
    """A folder without config.json was left by a run that died before it began: moved aside, for grpo.py wants a new one."""
    if not folder.exists() or (folder / "config.json").exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.aborted-{number}")).exists():
        number += 1
    folder.rename(aside)


class Stop:
    """Remembers the first SIGINT or SIGTERM; `number` is None until then. A second one stops the waiting, too."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.again = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.again = self.number is not None
        self.number = self.number or number


def run_jobs(jobs: Sequence[Job], parallel: int, program: Path, stop: Stop) -> dict[Job, str]:
    """Run what is not done, `parallel` at a time; returns {job: why it failed}. Ends early when `stop` has a signal."""
    queue = deque(job for job in jobs if not job.done)
    running: dict[Job, tuple[subprocess.Popen[bytes] | Orphan, float]] = {}
    failed: dict[Job, str] = {}
    while (queue or running) and stop.number is None:
        while queue and len(running) < parallel:
            job = queue.popleft()
            lock = try_lock(lock_path(job))
            if lock is None:
                running[job] = Orphan(job), time.monotonic()
                say(f"waiting for {job.name}, which an earlier study started")
            else:
                resumed = (job.folder / "config.json").exists()
                running[job] = start(job, program, lock), time.monotonic()
                say(f"{'resumed' if resumed else 'started'} {job.name}")
        time.sleep(POLL_SECONDS)
        for job, (process, since) in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[job]
            if job.done:
                left, wall = sum(not other.done for other in jobs), duration(estimate(jobs, parallel))
                say(f"done {job.name} in {time.monotonic() - since:.0f} s; {left} runs left, about {wall}")
            elif isinstance(process, Orphan):
                queue.appendleft(job)
            else:
                failed[job] = failure(job, code)
                say(f"FAILED {failed[job]}")
    if stop.number is not None:
        _stop_all([process for process, _ in running.values() if not isinstance(process, Orphan)], stop.number, stop)
    return failed


def _stop_all(processes: list[subprocess.Popen[bytes]], number: int, stop: Stop) -> None:
    """Pass the signal on, give the runs time to write a checkpoint, then kill what is left, and what that started."""
    if processes:
        say(f"stopping {len(processes)} runs")
    for process in processes:
        process.send_signal(number)
    deadline = time.monotonic() + GRACE_SECONDS
    while (processes := [p for p in processes if p.poll() is None]) and time.monotonic() < deadline and not stop.again:
        time.sleep(POLL_SECONDS)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def failure(job: Job, code: int) -> str:
    """One line: the run, how it ended, and the last line of its log that says why: an error, or else one with letters."""
    if code < 0:
        return f"{job.folder}: failed with killed by {signal.Signals(-code).name} (log: {job.log})"
    why = ""
    for line in map(str.strip, job.log.read_text(encoding="utf-8", errors="replace").splitlines()):
        if line.startswith("$ "):  # what an earlier start of the run printed says nothing about this one
            why = ""
        elif line.startswith("error:") or (re.search(r"[^\W\d_]", line) and not why.startswith("error:")):
            why = line
    return f"{job.folder}: failed with exit code {code}{why and ': '}{why[:300]} (log: {job.log})"


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
