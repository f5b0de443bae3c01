"""Kills one pocket run with -9 at random moments, resumes it each time, and compares the end with an undisturbed run.

python -m bench.kill                 # 25 kills; prints a line each, and whether the files are equal byte for byte
python -m bench.kill --kills 3 --steps 12    # a quick look
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def start(log, *args):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "grpo.py"), *map(str, args)],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process, log):
    if process.wait():
        log.seek(0)
        sys.exit(f"exit code {process.returncode}\n{log.read()}")


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_a_moment(process, folder: Path, rng: random.Random) -> bool:
    """Until a random moment: one time in five in the start of the program, else up to four steps and a part on. False when
    the run ended first."""
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


def kill_and_resume(folder: Path, log, command: list[str], kills: int, seed: int) -> int:
    """Runs to the end through `kills` kills; returns how many took place before the run was done."""
    rng = random.Random(seed)
    process = start(log, *command, "--out", folder)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=60, help="of the run; 25 kills take some 45")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command = [*COMMAND, "--steps", str(args.steps)]
    with tempfile.TemporaryDirectory() as tmp, open(Path(tmp) / "log", "w+") as log:
        whole, torn = Path(tmp) / "whole", Path(tmp) / "torn"
        finish(start(log, *command, "--out", whole), log)
        kills = kill_and_resume(torn, log, command, args.kills, args.seed)
        differ = [n for n in COMPARED if (whole / n).read_bytes() != (torn / n).read_bytes()]
        print(
            f"{kills} kills; "
            + (f"DIFFERENT: {', '.join(differ)}" if differ else "metrics, samples, evaluation and adapter are equal")
        )
        shutil.rmtree(torn)
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
