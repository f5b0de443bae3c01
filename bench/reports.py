"""What the timed processes of `vs_trl`, `phases` and `growth` leave behind, how they are started, and how rounds are compared."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from faults.errors import UserError
from harness.config import ROOT

FIRST_SEED = 100  # of the benches: seeds 0-5 are reported


class Step(NamedTuple):
    """One step of a run."""

    seconds: float  # of all of it, on the wall
    cpu: float  # seconds of the trainer's process on any core
    tokens: float  # of the completions
    sequences: int
    reward: float  # a mean over the batch, as the next two
    hack: float
    correct: float


@dataclass
class Report:
    """What a timed process leaves behind."""

    steps: list[Step]
    peak: dict[str, int]  # bytes of resident memory of the trainer's process alone: "all" of its life, and "steps" alone
    phases: list[dict[str, float]] = field(default_factory=list)  # of each step: seconds by phase
    prompts: list[list[int]] = field(default_factory=list)  # of each step: the lengths of its prompts in tokens

    def after(self, warmup: int) -> list[Step]:
        """The steps that are measured: the first ones load and allocate."""
        return self.steps[min(warmup, len(self.steps) - 1) :]

    def seconds(self, warmup: int) -> float:
        """The median step's, on the wall."""
        return median(s.seconds for s in self.after(warmup))

    def write(self, path: str | Path) -> None:
        """As JSON, for `read`."""
        Path(path).write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: str | Path) -> Report:
        """The report that `write` wrote."""
        content = json.loads(Path(path).read_text())
        return Report(**content | {"steps": [Step(*s) for s in content["steps"]]})


class Watch:
    """Wall and CPU seconds of one step after the other."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, float]] = []

    def start(self) -> None:
        """Begins a step."""
        self.at = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Ends it: its seconds are the last of `taken`."""
        self.taken.append((time.perf_counter() - self.at[0], time.process_time() - self.at[1]))


class Peak:
    """The largest resident memory of this process (Linux)."""

    def __init__(self) -> None:
        self.before = 0

    def reset(self) -> None:
        """From here on a new peak is taken. What was freed goes back to the system first: it would count as in use."""
        self.before = max(self.before, self.now())
        with contextlib.suppress(OSError, AttributeError):  # another libc keeps it
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> int:
        """Bytes since the last reset."""
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    def read(self) -> dict[str, int]:
        """Bytes: {"steps": since the last reset, "all": since the process began}."""
        return dict(steps=self.now(), all=max(self.before, self.now()))


def launch(module: str, arguments: Sequence[str], threads: int, python: str = sys.executable) -> Report:
    """Runs `python -m module REPORT arguments` to its end, in the repository; its report. Raises UserError with its last line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [python, "-m", module, str(path), *arguments], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode or not path.exists():
            last = ([line for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"])[-1]
            raise UserError(f"python -m {module} ended with code {done.returncode}: {last[:300]}")
        return Report.read(path)


def run(options: Sequence[str], threads: int, peaks: bool = False) -> Report:
    """A pocket run with those options of grpo.py. peaks: see `bench.pocket_run`."""
    fixed = ["--scale", "pocket", "--threads", str(threads), "--log-every", "1000000", "--save-every", "1000000"]
    small = ["--steer-prompts", "4"]  # part of the start, which is not measured here
    return launch("bench.pocket_run", [*(["--peaks"] if peaks else []), *fixed, *small, *options], threads)


def windows(reports: Sequence[Report], field: str, width: int) -> list[list[float]]:
    """For each `width` steps in a row, the means of that field of `Step`, one a report."""
    count = min(len(r.steps) for r in reports)
    starts = range(0, count, width)
    return [[mean(getattr(s, field) for s in r.steps[i : min(i + width, count)]) for r in reports] for i in starts]


# --- numbers in words ---------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float], form: str = ".2f") -> str:
    """The median, and the lowest and highest where there are several.

    >>> spread([0.61, 0.58, 0.7])
    '0.61 (0.58-0.70)'
    """
    values = sorted(values)
    middle = format(median(values), form)
    return middle if len(values) == 1 else f"{middle} ({values[0]:{form}}-{values[-1]:{form}})"


def ratio(ours: Sequence[float], others: Sequence[float], form: str = ".2f") -> str:
    """The spread of ours / others, round by round: what slows a whole round down leaves it alone."""
    return spread((a / b for a, b in zip(ours, others, strict=True)), form)


def table(rows: Sequence[Sequence[str]]) -> str:
    """The rows, the first of them the head, in columns: the first on the left, numbers on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join([lines[0], "-" * sum([*widths, 2 * len(widths) - 2]), *lines[1:]])
