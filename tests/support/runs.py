"""The command itself, as a user runs it: real processes, the embedded model, small batches."""

import os
import subprocess
import sys

from harness.config import ROOT

SMALL = [
    "--scale",
    "pocket",
    "--batch",
    "16",
    "--generations",
    "4",
    "--pairs",
    "30",
    "--pairs-heldout",
    "10",
    "--eval-samples",
    "1",
    "--max-new-tokens",
    "48",
    "--workers",
    "1",
    "--steer-prompts",
    "2",
]
UNDISTURBED = ["--arm", "cone", "--steps", 5, "--save-every", 2, "--log-every", 3]  # options of the fixture of that name


def launch(*args, cwd=ROOT):
    """The process of `python grpo.py ARGS`."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "grpo.py"), *map(str, args)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def start(*args, cwd=ROOT):
    """The same for a small run."""
    return launch(*SMALL, *args, cwd=cwd)


def ends(process, code=0):
    """What the process printed, once it has ended with that exit code."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def grpo(*args, code=0, cwd=ROOT):
    """What a small run printed."""
    return ends(start(*args, cwd=cwd), code)


def refused(*args):
    """The one line of a refused command."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "grpo.py"), "--scale", "pocket", *map(str, args)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert process.returncode == 2, process.stdout + process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in process.stderr
    return errors[0]
