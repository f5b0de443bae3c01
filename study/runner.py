"""The control of the study's processes: started, resumed, stopped, waited for, never two in one folder."""

from __future__ import annotations

import fcntl
import itertools
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
from typing import IO

from faults.errors import ending_signals
from study.plan import Job, duration, estimate

GRACE_SECONDS = 120  # to finish a step and write a checkpoint after a signal; a step at full scale takes about a minute
POLL_SECONDS = 0.2


def start(job: Job, program: Path, lock: IO[str]) -> subprocess.Popen[bytes]:
    """A run of grpo.py, begun or resumed, as a process in a process group of its own.

    It inherits the open, locked file. The lock is held as long as the process lives, even if this program is killed, so that
    the next study can tell a run that is still going on from one that was interrupted.
    """
    if job.folder.exists() and not job.begun:  # left by a run that died before it began: grpo.py wants a new folder
        asides = (job.folder.with_name(f"{job.name}.aborted-{number}") for number in itertools.count(1))
        job.folder.rename(next(aside for aside in asides if not aside.exists()))
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if job.scale != "full" else {}
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


def catch_signals() -> list[int]:
    """Every signal to end that comes from now on, in a list that grows."""
    received: list[int] = []
    for number in ending_signals():
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def run_jobs(jobs: Sequence[Job], parallel: int, program: Path, signals: list[int]) -> dict[Job, str]:
    """Run what is not done, `parallel` at a time; returns {job: why it failed}. At the first of `signals` it stops its runs.

    A run that an earlier study started, and that outlived it, has no process here: it is waited for, never stopped."""
    queue = deque(job for job in jobs if not job.done)
    running: dict[Job, tuple[subprocess.Popen[bytes] | None, float]] = {}
    failed: dict[Job, str] = {}
    try:
        while (queue or running) and not signals:
            while queue and len(running) < parallel:
                job, begin = queue.popleft(), time.monotonic()
                if lock := try_lock(lock_path(job)):
                    say(f"{'resumed' if job.begun else 'started'} {job.name}")
                    running[job] = start(job, program, lock), begin
                else:
                    say(f"waiting for {job.name}, which an earlier study started")
                    running[job] = None, begin
            time.sleep(POLL_SECONDS)
            for job, (process, begin) in list(running.items()):
                if process is None and (lock := try_lock(lock_path(job))):
                    lock.close()
                elif process is None or process.poll() is None:
                    continue
                del running[job]
                if job.done:
                    left, wall = sum(not other.done for other in jobs), duration(estimate(jobs, parallel))
                    say(f"done {job.name} in {time.monotonic() - begin:.0f} s; {left} runs left, about {wall}")
                elif process is None:
                    queue.appendleft(job)
                else:
                    failed[job] = failure(job, process.returncode)
                    say(f"FAILED {failed[job]}")
    finally:  # also where this program cannot go on, with its disk full say
        _stop_all([process for process, _ in running.values() if process], signals or [signal.SIGTERM])
    return failed


def _stop_all(processes: list[subprocess.Popen[bytes]], signals: list[int]) -> None:
    """Pass the first of `signals` on, give the runs time to write a checkpoint, then kill what is left, and what that started.

    A second signal ends the waiting."""
    if processes:
        say(f"stopping {len(processes)} runs")
    for process in processes:
        process.send_signal(signals[0])
    deadline = time.monotonic() + GRACE_SECONDS
    while (processes := [p for p in processes if p.poll() is None]) and time.monotonic() < deadline and len(signals) < 2:
        time.sleep(POLL_SECONDS)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def failure(job: Job, code: int) -> str:
    """One line: the run, how it ended, and the last line of its log that says why: an error, or else one with letters."""
    how, why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}", ""
    for line in map(str.strip, job.log.read_text(encoding="utf-8", errors="replace").splitlines() if code >= 0 else ()):
        if line.startswith("$ "):  # what an earlier start of the run printed says nothing about this one
            why = ""
        elif line.startswith("error:") or (re.search(r"[^\W\d_]", line) and not why.startswith("error:")):
            why = line
    return f"{job.folder}: failed with {how}{why and ': '}{why[:300]} (log: {job.log})"


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
