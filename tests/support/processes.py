"""Looking at other processes, and waiting for them."""

import contextlib
import os
import signal
import time
from pathlib import Path


def descendants_named(pid, words):
    """Process ids of the children of `pid` whose command line holds `words` (bytes), through /proc."""
    found = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):  # any thread may have started some
        with contextlib.suppress(OSError):  # it has ended
            for child in listing.read_text().split():
                with contextlib.suppress(OSError):
                    if words in Path(f"/proc/{child}/cmdline").read_bytes():
                        found.append(int(child))
    return found


def workers_of(pid):
    """Process ids of the sandbox workers of the run `pid`, or of those of its grader."""
    return [found for parent in (pid, *descendants_named(pid, b"import grader")) for found in descendants_named(parent, WORKER)]


WORKER = b"sandbox import worker"


def kill_workers_of(process, seconds=120):
    """Kill every sandbox worker that the run starts, as soon as it is there, until the run has ended."""
    deadline = time.monotonic() + seconds
    (grader,) = descendants_named(process.pid, b"import grader")
    while process.poll() is None:
        assert time.monotonic() < deadline, "it goes on without a worker"
        for pid in descendants_named(grader, WORKER):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)  # a worker that answers before it is seen would count as sound


def wait_for(condition, process, seconds=120):
    """The first true value of `condition()`, while the process lives."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return value
