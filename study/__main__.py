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

import contextlib
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from faults.errors import UserError, command, interruptible

if __name__ == "__main__":
    interruptible()

import tyro

from faults.files import write_json
from harness.config import Range, flag, parse
from study.plan import GRPO, LONG, LOOPHOLES_OF, PARALLEL, PLANS, Job, check_settings, describe_plan, plan
from study.runner import catch_signals, run_jobs, say, try_lock
from study.runs import FinishedRun, read_run, read_runs

TITLES = {"one": "Projected GRPO: the registered study", "several": "Projected GRPO: hacks that nobody listed"}
RANGES = {"seeds": Range(1, 1000), "ablation_seeds": Range(1, 1000), "parallel": Range(1, 1000), "price_per_hour": Range(0)}


@dataclass
class Study:
    """What to run, and where."""

    # the benchmark's loophole alone; all of them, one a problem; one plan after the other
    plan: Literal["one", "several", "both"] = "both"
    scale: Literal["pocket", "small", "full"] = "pocket"  # of every run (python grpo.py --help)
    seeds: int = 3  # of the arms; controls have at most 3
    ablation_seeds: int = 1  # of the ablations
    only: tuple[str, ...] | None = None  # leave the other arms out
    out: Path | None = None  # folder of the study (default runs/study-SCALE); the plan `several` has its name added to it
    parallel: int | None = None  # runs at a time (default 1 at full scale, 2 at the others)
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
        try:
            if job in failed:
                raise UserError(failed[job])
            run = read_run(job.folder, shared=_fields((*job.extra, *LOOPHOLES_OF[job.plan])))
            if run.variant + LONG == job.variant:  # that it is longer is no setting of an arm
                run = replace(run, variant=job.variant)
            found = {"arm": run.variant, "seed": run.seed, "scale": run.config.get("scale")}
            for key, planned in (("arm", job.variant), ("seed", job.seed), ("scale", job.scale)):
                if found[key] != planned:
                    wrong = f"{key} {found[key]!r} where the plan has {planned!r}"
                    raise UserError(f"{job.folder / 'config.json'}: another run's folder: {wrong}")
            runs.append(run)
        except UserError as error:
            problems.append(str(error))
    return runs, problems


def _fields(options: Iterable[str]) -> set[str]:
    """The settings that options of grpo.py set: "--cone-n=8" sets cone_n."""
    return {text[2:].split("=")[0].removeprefix("no-").replace("-", "_") for text in options if text.startswith("--")}


def report(jobs: Sequence[Job], failed: dict[Job, str], out: Path, line: str) -> bool:
    """Write the report of a study that was started with `line`; returns whether all of `jobs` are in it."""
    from study.report import write_report  # matplotlib takes a second to load: not for --dry-run

    results = write_report(*collect(jobs, failed), out, TITLES[jobs[0].plan], line, jobs[0].plan)
    for text in results["headlines"]:
        print(text)
    for verdict in results["verdicts"]:
        print(f"{verdict['id']} {verdict['verdict']}: {verdict['claim']}")
    for text in results["left_out"]:
        print(f"left out: {text}", file=sys.stderr)
    print(f"report: {out / 'report.html'}")
    return not results["left_out"]


def plot(options: Plot) -> None:
    """`python -m study plot RUN...`"""
    from study.analysis import comparable
    from study.plots import draw_all

    with writing_to(options.out):
        runs, problems = read_runs(options.runs)
        if not runs:
            raise UserError("; ".join(["there is no finished run to draw", *problems]))
        runs, foreign = comparable(runs)
        for problem in (*problems, *foreign):
            print(f"left out: {problem}", file=sys.stderr)
        for path in draw_all(runs, options.out):
            print(path)


@contextlib.contextmanager
def writing_to(*folders: Path) -> Iterator[None]:
    """UserError where `folders` cannot be folders to write to: at once where a file stands in the way, else when it shows."""
    try:
        for folder in folders:
            for place in (folder, *folder.parents):
                if place.exists() and not place.is_dir():
                    raise UserError(f"{place} is a file where a folder is needed; choose another --out")
        yield
    except OSError as error:
        if error.filename is None:  # no file's fault
            raise
        raise UserError(f"{error.filename}: {error.strerror}; mend that or choose another --out") from error


def check_options(options: Study, extra: list[str]) -> None:
    """UserError for what no run should meet: a number out of its range, a program or an option that is not there."""
    for name, allowed in RANGES.items():
        value = getattr(options, name)
        if value is not None and not allowed.holds(value):
            raise UserError(f"{flag(name)} must be {allowed}, not {value}")
    variants = {name: line for plan in chosen(options) for name, line in PLANS[plan].items()}
    if options.only == () or (unknown := [name for name in options.only or () if name not in variants]):
        what = f"unknown arm {unknown[0]!r}" if options.only else "--only names no arm"
        raise UserError(f"{what}; the plan has {', '.join(variants)}")
    if not options.program.is_file():
        raise UserError(f"--program {options.program}: no such file")
    own = {"seed", "scale", "out", "resume", "dry_run", "card", "fit"}  # --fit would take settings of their own for each arm
    planned = _fields(text for flags, _ in variants.values() for text in flags) | own
    planned |= _fields(text for plan in chosen(options) for text in LOOPHOLES_OF[plan])
    if taken := sorted(_fields(extra) & planned):
        raise UserError(
            f"{flag(taken[0])} cannot follow --: it is set for each run, or would differ; see --only, --seeds, --scale and --out"
        )
    for plan_name in chosen(options) if extra else ():
        for variant, (flags, _) in PLANS[plan_name].items():
            if variant in (options.only or variants):
                parse([*flags, *LOOPHOLES_OF[plan_name], *extra])


def chosen(options: Study) -> list[str]:
    """The plans to run, in order."""
    return list(PLANS) if options.plan == "both" else [options.plan]


def run_study(options: Study, extra: list[str], line: str) -> int:
    """Run what is not done and write the reports; returns the exit code."""
    check_options(options, extra)
    out, codes = options.out or Path("runs") / f"study-{options.scale}", [0]
    for name in chosen(options):
        folder = out if name == "one" else out.with_name(f"{out.name}-{name}")
        only = [variant for variant in options.only or () if variant in PLANS[name]]
        if only or not options.only:
            jobs = plan(folder, options.scale, options.seeds, options.ablation_seeds, only, extra, name)
            codes.append(run_plan(options, jobs, folder, extra, line))
        if codes[-1] > 1:  # stopped
            break
    return max(codes)


def run_plan(options: Study, jobs: list[Job], out: Path, extra: list[str], line: str) -> int:
    """One plan of the study, in its folder; returns the exit code."""
    parallel = options.parallel or PARALLEL[options.scale]
    with writing_to(out, *(out / name for name in ("runs", "logs", "plots"))):
        print(describe_plan(jobs, parallel, options.price_per_hour), flush=True)
        if options.dry_run:
            print("\n".join(shlex.join(["python", options.program.name, *job.arguments()]) for job in jobs if not job.done))
            return 0
        settings = {"scale": options.scale, "extra": extra}
        check_settings(out, settings)
        lock = try_lock(out / "study.lock")
        if lock is None:
            raise UserError(f"another study is running in {out}")
        with lock:
            if not (out / "study.json").exists():
                write_json(out / "study.json", settings)
            signals: list[int] = [] if options.report else catch_signals()
            failed = {} if options.report else run_jobs(jobs, parallel, options.program, signals)
            complete = not signals and report(jobs, failed, out, line)
            if signals:  # during the report too: another plan may follow
                say("stopped; the same command goes on from here")
                return 128 + signals[0]
            return 0 if complete else 1


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
