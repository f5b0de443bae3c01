"""The command itself, as a user runs it: real processes, the embedded model, small batches."""

import contextlib
import io
import os
import signal
import subprocess
import sys

import grpo as grpo_module
from faults.errors import command
from harness.config import ROOT, parse, resumed

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
    """The process of `python grpo.py ARGS`, which a hang-up ends although tests may run under nohup."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "grpo.py"), *map(str, args)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def start(*args, cwd=ROOT):
    """The same for a small run."""
    return launch(*SMALL, *args, cwd=cwd)


def ends(process, code=0):
    """What the process printed, once it has ended with that exit code."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def ends_with_one_line(process, code, *words):
    """The same, where that is a refusal or an early end: it says so in one line, which holds the words."""
    out = ends(process, code)
    assert "Traceback" not in out, out
    (line,) = [x for x in out.splitlines() if x.startswith(("stopped: ", "error: "))]
    assert all(word in line for word in words), line
    return out


def grpo(*args, code=0, cwd=ROOT):
    """What a small run printed."""
    return ends(start(*args, cwd=cwd), code)


@command
def _grpo(argv):
    cfg = parse(argv)
    grpo_module.CONFIG = resumed(cfg, argv) if cfg.resume else cfg
    return grpo_module.main()


def refused(*args):
    """The one line of a refused command; in this process, for a mistake needs no process of its own."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = _grpo(["--scale", "pocket", *map(str, args)])
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1, said.getvalue()
    return errors[0]
