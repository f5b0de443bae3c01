"""Looking at other processes, and waiting for them."""

import time
from pathlib import Path


def descendants_named(pid, words):
    """Process ids of the children of `pid` whose command line holds `words` (bytes), through /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and words in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


def wait_for(condition, process, seconds=120):
    """The first true value of `condition()`, while the process lives."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return value
