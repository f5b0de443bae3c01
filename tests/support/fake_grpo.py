"""Stands in for grpo.py where only the control of processes is tested: a step is a line copied from a finished run.

It keeps the contract that the study relies on: --out is new, config.json comes first, --resume goes on where the files
stop, done.json comes last, SIGTERM and SIGINT end it with 143 and 130. The environment says where the finished runs are
(FAKE_TEMPLATES), how long a step takes (FAKE_STEP), which run fails (FAKE_FAIL), and a file that keeps all from ending for as
long as it is there (FAKE_HOLD).
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path


def main():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    arguments = sys.argv[1:]
    resumed = arguments[0] == "--resume"
    folder = Path(arguments[arguments.index("--resume" if resumed else "--out") + 1])
    template = Path(os.environ["FAKE_TEMPLATES"]) / folder.name
    if not resumed:
        folder.mkdir(parents=True)
        time.sleep(float(os.environ["FAKE_STEP"]))  # a kill here leaves a folder without config.json
        copy(template, folder, "config.json")
    if os.environ.get("FAKE_FAIL") == folder.name:
        raise SystemExit("error: this run was told to fail")
    metrics = folder / "metrics.jsonl"
    lines = (template / "metrics.jsonl").read_text().splitlines(keepends=True)
    written = metrics.read_text().count("\n") if metrics.exists() else 0
    with metrics.open("w") as file:
        file.writelines(lines[:written])  # drops a line that a kill cut short
        for line in lines[written:]:
            file.write(line)
            file.flush()
            time.sleep(float(os.environ["FAKE_STEP"]))
    for _ in range(6000):
        if Path(os.environ.get("FAKE_HOLD", "/none")).exists():
            time.sleep(0.01)
    copy(template, folder, "eval.json")
    copy(template, folder, "done.json")


def copy(template, folder, name):
    """Whole or not at all."""
    shutil.copy(template / name, folder / f"{name}.part")
    (folder / f"{name}.part").rename(folder / name)


if __name__ == "__main__":
    main()
