"""The registered study in one command: arms x seeds, each a run of grpo.py, then one report.

    python -m study --scale pocket             # everything; may be stopped and started again at any time
    python -m study --scale pocket --dry-run   # the plan, an estimate, and the commands one a line for any queue
    python -m study --scale pocket --report    # only the report, from the runs that are there
    python -m study --only vanilla cone -- --steps 50    # some arms; what follows -- goes to every run
    python -m study plot RUN...                # the figures alone, of any run folders

A run is done when its folder holds done.json; it is then skipped. A run that was interrupted is resumed. A run that fails
is reported and does not stop the others. Everything is under the folder --out: runs/, logs/, plots/, results.json,
report.md and report.html.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from faults.errors import UserError, command
from study.plan import GRPO, PARALLEL, PLAN, Job, check_settings, describe_plan, plan
from study.runner import Stop, run_jobs, say, try_lock
from study.runs import FinishedRun, read_run, read_runs

TITLE = "Projected GRPO: the registered study"


@dataclass
class Study:
    """What to run, and where."""

    scale: Literal["pocket", "full"] = "pocket"
    seeds: int = 3  # of the arms; the cone's controls have at most 3
    ablation_seeds: int = 1  # of the ablations
    only: tuple[str, ...] = ()  # leave the other arms out
    out: Path | None = None  # folder of the study (default runs/study-SCALE)
    parallel: int | None = None  # runs at a time (default 2 at pocket scale, 1 at full)
    price_per_hour: float | None = None  # of the machine, for the estimate of cost
    dry_run: bool = False  # print the plan, the estimate and the commands, and stop
    report: bool = False  # write the report from the runs that are there, and stop
    program: Path = GRPO  # the training program


@dataclass
class Plot:
    """Draw the figures of any run folders."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("plots")  # folder of the files


def collect(jobs: Sequence[Job], failed: dict[Job, str]) -> tuple[list[FinishedRun], list[str]]:
    """(runs, a line for each planned run that is not there or not what it should be)."""
    runs, problems = [], []
    for job in jobs:
        if job in failed:
            problems.append(failed[job])
            continue
        shared = _fields(job.extra) - _fields(flag for flags, _ in PLAN.values() for flag in flags)
        try:
            run = read_run(job.folder, shared)
        except UserError as error:
            problems.append(str(error))
            continue
        found = {"arm": run.variant, "seed": run.seed, "scale": run.config.get("scale")}
        planned = {"arm": job.variant, "seed": job.seed, "scale": job.scale}
        wrong = [f"{key} {found[key]!r} where the plan has {planned[key]!r}" for key in planned if found[key] != planned[key]]
        if wrong:
            problems.append(f"{job.folder / 'config.json'}: another run's folder: {wrong[0]}")
        else:
            runs.append(run)
    return runs, problems


def _fields(options: Iterable[str]) -> set[str]:
    """The settings that options of grpo.py set: "--cone-n=8" sets cone_n."""
    return {text[2:].split("=")[0].removeprefix("no-").replace("-", "_") for text in options if text.startswith("--")}


def report(jobs: Sequence[Job], failed: dict[Job, str], out: Path, line: str) -> list[str]:
    """Write the report of a study that was started with `line`; returns the lines about what is missing from it."""
    from study import report as writer  # matplotlib takes a second to load: not for --dry-run

    runs, problems = collect(jobs, failed)
    results = writer.write_report(runs, problems, out, TITLE, line)
    for text in results["headlines"]:
        print(text)
    for verdict in results["verdicts"]:
        print(f"{verdict['id']} {verdict['verdict']}: {verdict['claim']}")
    for text in results["left_out"]:
        print(f"left out: {text}", file=sys.stderr)
    print(f"report: {out / 'report.html'}")
    return results["left_out"]


def plot(options: Plot) -> None:
    """`python -m study plot RUN...`"""
    from study.plots import draw_all

    runs, problems = read_runs(options.runs)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not runs:
        raise UserError("none of these folders holds a finished run")
    for path in draw_all(runs, options.out):
        print(path)


def run_study(options: Study, extra: list[str], line: str) -> int:
    """Run what is not done and write the report; returns the exit code."""
    for name in ("seeds", "ablation_seeds", "parallel"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    out = options.out or Path("runs") / f"study-{options.scale}"
    parallel = options.parallel or PARALLEL[options.scale]
    jobs = plan(out, options.scale, options.seeds, options.ablation_seeds, options.only, extra)
    print(describe_plan(jobs, parallel, options.price_per_hour), flush=True)
    if options.dry_run:
        print("\n".join(shlex.join(["python", options.program.name, *job.arguments()]) for job in jobs if not job.done))
        return 0
    check_settings(out, {"scale": options.scale, "extra": extra})
    lock = try_lock(out / "study.lock")
    if lock is None:
        raise UserError(f"another study is running in {out}")
    with lock:
        failed: dict[Job, str] = {}
        if not options.report:
            stop = Stop()
            failed = run_jobs(jobs, parallel, options.program, stop)
            if stop.number is not None:
                say("stopped; the same command goes on from here")
                return 128 + stop.number
        return 1 if report(jobs, failed, out, line) else 0


@command
def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 all runs are in the report, 1 some are not, 2 a mistake that the user can mend, 130/143 stopped."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["plot"]:
        plot(tyro.cli(Plot, prog="python -m study plot", description=Plot.__doc__, args=argv[1:]))
        return 0
    own, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    options = tyro.cli(Study, prog="python -m study", description=__doc__, args=own)
    return run_study(options, extra, shlex.join(["python", "-m", "study", *argv]))


if __name__ == "__main__":
    sys.exit(main())
