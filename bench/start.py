"""Where the time of a start goes: `--help`, and each part of a pocket run until its first step has its log line.

    python -m bench.start                    # 3 rounds, one thread, after one that warms the file cache
    python -m bench.start --rounds 1 --arm cone

Each round is a process of its own that runs grpo.py's parts and times them from inside; "python itself" is from the command to
the first line of Python, "the rest" what no part holds. The first step of a run loads and allocates: later ones are shorter.
"""

from __future__ import annotations

import time

BEGIN = time.time()  # before anything else is loaded

import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections import defaultdict  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

from faults.errors import UserError, command  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


class Parts:
    """Seconds by part; a part inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]  # of what is open, innermost last: the seconds of parts inside it

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its own seconds counted for that part."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self.inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[part] += took - self.inner.pop()
                self.inner[-1] += took

        return inside

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Times the function `name` of a module or class where its callers look for it."""
        setattr(owner, name, self.timed(part, getattr(owner, name)))


class Logged(Exception):
    """The first step has its line."""


def imported(*names: str) -> None:
    """Loads these modules."""
    for name in names:
        __import__(name)


def child(path: Path, options: list[str], started: float) -> None:
    """A run until its first log line; its parts go to `path`, as JSON. started: when its command was given, in Unix time."""
    parts = Parts()
    parts.seconds["python itself"] = BEGIN - started
    parts.timed("the command line", lambda: imported("tyro", "harness.config"))()
    from harness.config import parse

    cfg = parts.timed("the command line", parse)(options)
    gc.disable()  # as grpo.py does
    parts.timed("import torch", lambda: imported("torch"))()
    parts.timed("import transformers, scipy", lambda: imported("transformers", "scipy.optimize"))()
    parts.timed("import the project", lambda: imported("grpo"))()
    import grpo
    import vhack
    from harness import setup, training
    from harness.scale import filled

    for owner, name, part in (
        (setup, "load_tokenizer", "tokenizer"),
        (setup, "load_problems", "problems"),
        (setup, "fitting", "problems"),
        (setup, "load_model", "model"),
        (setup, "make_sampler", "sampler and adapter"),
        (setup, "inject", "sampler and adapter"),
        (training, "Grader", "sandbox"),
        (training.Grader, "ready", "sandbox"),
        (training.Grader, "check_setups", "sandbox"),
        (vhack, "make_pairs", "pairs"),
        (vhack, "extract", "extraction"),
        (vhack, "check_steering", "steering"),
        (vhack.Directions, "lifted", "lift"),
        (training.Training, "save", "first checkpoint"),
    ):
        parts.watch(owner, name, part)

    steps = training.Training.steps

    class Started(training.Training):
        """A run that ends with its first line."""

        def steps(self) -> Any:
            """As its base."""
            self.since = time.perf_counter()
            yield from steps(self)

        def log(self, *args: Any) -> None:
            """As its base, and then the end."""
            super().log(*args)
            parts.seconds["first step"] = time.perf_counter() - self.since
            raise Logged

    grpo.Training = Started  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        cfg.out = Path(folder) / "run"
        try:
            grpo.train(filled(cfg, "pocket"))
        except Logged:
            total = time.time() - started
    path.write_text(json.dumps(parts.seconds | {"the rest": total - sum(parts.seconds.values()), "together": total}))


def round_of(options: list[str], threads: int) -> dict[str, float]:
    """The parts of one start, seconds each. Raises UserError, in one line, where the run failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parts.json"
        words = [sys.executable, "-m", "bench.start", "--child", str(path), str(time.time()), *options]
        done = subprocess.run(words, cwd=ROOT, env=environment(threads), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the run ended with code {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing'])[-1]}")
        return json.loads(path.read_text())


def help_seconds(threads: int) -> float:
    """Seconds of `python grpo.py --help`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "grpo.py", "--help"], cwd=ROOT, env=environment(threads), capture_output=True, check=True)
    return time.perf_counter() - start


def environment(threads: int) -> dict[str, str]:
    """The environment of the processes that are timed."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class Options(NamedTuple):  # no dataclass: loading dataclasses is a part of a run's command line, which the child times
    """What is started, and how often."""

    threads: int = 1  # of torch
    rounds: int = 3  # beside the one that warms the file cache
    arm: str = "projected"  # one of grpo.py's


@command
def main(argv: list[str] | None = None) -> None:
    """The command line; returns the exit code (`faults.errors.command`)."""
    import tyro  # here: the child times how long it takes to load

    from bench.reports import FIRST_SEED, spread, table
    from harness.config import parse

    options = tyro.cli(Options, prog="python -m bench.start", description=__doc__, args=argv)
    words = ["--scale", "pocket", "--arm", options.arm, "--seed", str(FIRST_SEED), "--threads", str(options.threads)]
    parse(words)  # a mistake is said here: of a child's words only the last line is seen
    round_of(words, options.threads)
    rounds = [round_of(words, options.threads) | {"--help": help_seconds(options.threads)} for _ in range(options.rounds)]
    whole = median(r["together"] for r in rounds)
    rows = [("a start, arm " + options.arm, "seconds", "of all")]
    for name in rounds[0]:
        if name != "--help":
            values = [r[name] for r in rounds]
            rows.append((name, spread(values), f"{median(values) / whole:.0%}"))
    print(f"{options.threads} threads, median (lowest-highest) of {options.rounds} rounds\n{table(rows)}\n")
    print(f"python grpo.py --help: {spread(r['--help'] for r in rounds)} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:  # not in `main`: its decorator loads tyro, which the child times
        child(Path(sys.argv[2]), sys.argv[4:], float(sys.argv[3]))
    else:
        sys.exit(main())
