"""Kills one pocket run with -9 at random moments, resumes it each time, and compares the end with an undisturbed run.

    python -m bench.kill                 # 25 kills; prints a line each, and whether the files are equal byte for byte
    python -m bench.kill --kills 3 --steps 12    # a quick look

Exit code: 0, 1 where they differ or where a run failed.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import tyro

from faults.errors import Stopped, command

ROOT = Path(__file__).resolve().parent.parent

COMMAND = [
    "--scale",
    "pocket",
    "--arm",
    "cone",
    "--save-every",
    "2",
    "--batch",
    "32",
    "--pairs",
    "30",
    "--pairs-heldout",
    "10",
    "--eval-samples",
    "1",
    "--steer-prompts",
    "4",
    "--workers",
    "1",
]
COMPARED = ("metrics.jsonl", "samples.jsonl", "eval.json", "adapter/adapter_model.safetensors")


def start(log: IO[str], *args: str | Path) -> subprocess.Popen[bytes]:
    """grpo.py with these arguments, on one thread; what it says goes to `log`."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "grpo.py"), *map(str, args)],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[bytes], log: IO[str]) -> None:
    """Waits until it ends. Raises Stopped where it failed, once all that `log` holds is on stderr."""
    if process.wait():
        log.seek(0)
        print(log.read(), file=sys.stderr)
        raise Stopped(f"a run ended with exit code {process.returncode}; above is what the runs said")


def steps_done(folder: Path) -> int:
    """Lines of the run's metrics.jsonl, whole ones alone; 0 where there is none yet."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_a_moment(process: subprocess.Popen[bytes], folder: Path, rng: random.Random) -> bool:
    """Waits until a random moment, and returns False when the run ended first.

    One time in five it lies in the start of the program, else up to four steps and a part on."""
    if not (folder / "config.json").exists():
        goal, rest = 0, 0.0  # before there is a run to resume, a kill would only make the bench start over
    elif rng.random() < 0.2:
        goal, rest = 0, rng.uniform(0, 6)
    else:
        goal, rest = steps_done(folder) + rng.randint(0, 4), rng.uniform(0, 0.5)
    while process.poll() is None and (steps_done(folder) < goal or not (folder / "config.json").exists()):
        time.sleep(0.005)
    try:
        process.wait(rest)
    except subprocess.TimeoutExpired:
        return True
    return False


def kill_and_resume(folder: Path, log: IO[str], arguments: list[str], kills: int, seed: int) -> int:
    """Runs to the end through `kills` kills; returns how many took place before the run was done."""
    rng = random.Random(seed)
    process = start(log, *arguments, "--out", folder)
    for done in range(kills):
        if not wait_for_a_moment(process, folder, rng):
            finish(process, log)
            return done
        process.kill()
        process.wait()
        print(f"kill {done + 1} after {steps_done(folder)} steps", flush=True)
        process = start(log, "--resume", folder)
    finish(process, log)
    return kills


@dataclass
class Options:
    """Of which run, and how often."""

    kills: int = 25  # at most; a run that is done before takes fewer
    steps: int = 60  # of the run; 25 kills take some 45
    seed: int = 0  # of the moments


@command
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (`faults.errors.command`)."""
    options = tyro.cli(Options, prog="python -m bench.kill", description=__doc__, args=argv)
    arguments = [*COMMAND, "--steps", str(options.steps)]
    with tempfile.TemporaryDirectory() as tmp, open(Path(tmp) / "log", "w+") as log:
        whole, torn = Path(tmp) / "whole", Path(tmp) / "torn"
        finish(start(log, *arguments, "--out", whole), log)
        kills = kill_and_resume(torn, log, arguments, options.kills, options.seed)
        differ = [n for n in COMPARED if (whole / n).read_bytes() != (torn / n).read_bytes()]
        print(
            f"{kills} kills; "
            + (f"DIFFERENT: {', '.join(differ)}" if differ else "metrics, samples, evaluation and adapter are equal")
        )
        shutil.rmtree(torn)
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
