"""The registered study in one command: arms x seeds, each a run of grpo.py, then one report.

    python -m study --scale pocket             # everything; may be stopped and started again at any time
    python -m study --scale pocket --dry-run   # the plan, an estimate, and the commands one a line for any queue
    python -m study --scale pocket --report    # only the report, from the runs that are there
    python -m study --only vanilla cone -- --steps 50    # some arms; what follows -- goes to every run

A run is done when its folder holds done.json; it is then skipped. A run that was interrupted is resumed. A run that fails
is reported and does not stop the others. Everything is under the folder --out: runs/, logs/, plots/, results.json,
report.md and report.html.
"""

import argparse
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from eval import read_run
from faults.errors import UserError
from faults.files import write_json

ALL_SEEDS, CONTROL_SEEDS, ABLATION_SEEDS = "seeds", "control_seeds", "ablation_seeds"
PLAN = {  # variant: (flags of grpo.py, which number of seeds it has)
    "vanilla": (("--arm", "vanilla"), ALL_SEEDS),
    "projected": (("--arm", "projected", "--m", "16"), ALL_SEEDS),
    "cone": (("--arm", "cone"), ALL_SEEDS),
    "rebound": (("--arm", "rebound"), ALL_SEEDS),
    "random": (("--arm", "random"), ALL_SEEDS),
    "no_loophole": (("--arm", "no_loophole"), ALL_SEEDS),
    "cone_random": (("--arm", "cone", "--cone-rows", "random"), CONTROL_SEEDS),
    "cone_nonhack": (("--arm", "cone", "--cone-rows", "nonhack"), CONTROL_SEEDS),
    "no_renorm": (("--arm", "no_renorm"), ABLATION_SEEDS),
    "no_svd": (("--arm", "no_svd"), ABLATION_SEEDS),
    "m8": (("--arm", "projected", "--m", "8"), ABLATION_SEEDS),
    "m32": (("--arm", "projected", "--m", "32"), ABLATION_SEEDS),
    "rebound_additive": (("--arm", "rebound", "--rebound-form", "additive"), ABLATION_SEEDS),
    "rebound_correctness": (("--arm", "rebound", "--rebound-on", "correctness"), ABLATION_SEEDS),
}
PARALLEL = {"pocket": 2, "full": 1}  # two single-thread runs fit on two cores; one run fills one GPU
TYPICAL_SECONDS = {"pocket": 270, "full": 5400}  # a run, until runs of this study have been measured
MOST_CONTROL_SEEDS = 3  # of the cone's two controls, however many seeds the arms have: their question takes no more
CONE_FACTOR = 1.4  # the cone's rows cost a small backward pass each
GRACE_SECONDS = 120  # to finish a step and write a checkpoint after a signal; a step at full scale takes about a minute
POLL_SECONDS = 0.2
GRPO = Path(__file__).resolve().parent.parent / "grpo.py"


@dataclass(frozen=True)
class Job:
    """One run of the plan."""

    variant: str
    seed: int
    folder: Path
    scale: str
    extra: tuple = ()

    @property
    def name(self):
        return f"{self.variant}-seed{self.seed}"

    def arguments(self):
        """Arguments of grpo.py that start the run, or that resume it when its folder holds a config.json."""
        if (self.folder / "config.json").exists():
            return ["--resume", str(self.folder)]
        flags = [*PLAN[self.variant][0], "--seed", str(self.seed), "--scale", self.scale]
        return [*flags, "--out", str(self.folder), *self.extra]

    @property
    def log(self):
        return self.folder.parent.parent / "logs" / f"{self.name}.log"

    @property
    def done(self):
        return (self.folder / "done.json").exists()


def plan(out, scale, seeds, ablation_seeds, only=(), extra=()):
    """The jobs of the study, seed by seed, so that a study that is stopped early holds whole comparisons."""
    unknown = [name for name in only if name not in PLAN]
    if unknown:
        raise UserError(f"unknown arm {unknown[0]!r}; the plan has {', '.join(PLAN)}")
    count = {ALL_SEEDS: seeds, CONTROL_SEEDS: min(seeds, MOST_CONTROL_SEEDS), ABLATION_SEEDS: ablation_seeds}
    return [
        Job(variant, seed, Path(out) / "runs" / f"{variant}-seed{seed}", scale, tuple(extra))
        for seed in range(max(count.values()))
        for variant, (_, kind) in PLAN.items()
        if seed < count[kind] and (not only or variant in only)
    ]


def expected_seconds(job, measured):
    """Seconds of a run: the mean of finished ones of the same variant, else of any, else what is typical of the scale.

    measured: {variant: [seconds, ...]}
    """
    if job.variant in measured:
        return sum(measured[job.variant]) / len(measured[job.variant])
    factors = [(CONE_FACTOR if variant.startswith("cone") else 1.0, s) for variant, values in measured.items() for s in values]
    base = sum(s / f for f, s in factors) / len(factors) if factors else TYPICAL_SECONDS[job.scale]
    return base * (CONE_FACTOR if job.variant.startswith("cone") else 1.0)


def estimate(jobs, parallel):
    """(wall seconds, summed seconds) that the jobs not yet done will take, `parallel` at a time, in order."""
    measured = {}
    for job in jobs:
        if job.done:
            try:
                seconds = json.loads((job.folder / "done.json").read_text(encoding="utf-8"))["seconds"]
                measured.setdefault(job.variant, []).append(float(seconds))
            except (ValueError, KeyError, TypeError, OSError):
                continue  # a damaged file is the report's to name; it only has no time to tell
    slots = [0.0] * parallel
    for job in jobs:
        if not job.done:
            slots[slots.index(min(slots))] += expected_seconds(job, measured)
    return max(slots), sum(slots)


def describe_plan(jobs, parallel, price):
    """What will run and what it will take, as text."""
    wall, _ = estimate(jobs, parallel)
    by_variant = {}
    for job in jobs:
        by_variant.setdefault(job.variant, []).append(f"{job.seed}{' (done)' if job.done else ''}")
    lines = [f"{'arm':<21} {'seeds':<28} flags"]
    lines += [f"{name:<21} {', '.join(seeds):<28} {shlex.join(PLAN[name][0])}" for name, seeds in by_variant.items()]
    done = sum(job.done for job in jobs)
    lines.append(f"{len(jobs)} runs, {done} done, {parallel} at a time; about {duration(wall)} to go")
    if price is not None:
        lines.append(f"about {wall / 3600 * price:.2f} at {price:.2f} an hour")
    return "\n".join(lines)


def duration(seconds):
    """4000 -> "1 h 07 min"."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


# --- Running the jobs ------------------------------------------------------------------------------------------------


class Child:
    """A run of grpo.py as a process of its own, in a process group of its own.

    The child inherits an open, locked file. The lock is held as long as the child lives, even if this program is killed, so
    that the next study can tell a run that is still going on from one that was interrupted.
    """

    def __init__(self, job, program, lock):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        _clear_false_start(job.folder)
        environment = dict(os.environ)
        if job.scale == "pocket":
            environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, str(program), *job.arguments()]
        with job.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # a Ctrl-C in the terminal reaches this program alone, which passes it on once
            )
        lock.close()

    def poll(self):
        return self.process.poll()

    def stop(self, number):
        self.process.send_signal(number)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Orphan:
    """A run that an earlier study started and that outlived it: waited for, not touched."""

    def __init__(self, job):
        self.job = job

    def poll(self):
        lock = try_lock(lock_path(self.job))
        if lock is None:
            return None
        lock.close()
        return 0

    def stop(self, number):
        """It is not ours to stop; the next study will find it done or interrupted."""

    kill = stop


def lock_path(job):
    return job.log.with_suffix(".lock")


def try_lock(path):
    """An open file that holds the lock on `path`, or None when another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _clear_false_start(folder):
    """A folder without config.json was left by a run that died before it began: moved aside, for grpo.py wants a new one."""
    if not folder.exists() or (folder / "config.json").exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.aborted-{number}")).exists():
        number += 1
    folder.rename(aside)


class Stop:
    """Remembers the first SIGINT or SIGTERM; `number` is None until then. A second one stops the waiting, too."""

    def __init__(self):
        self.number, self.again = None, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.again = self.number is not None
        self.number = self.number or number


def run_jobs(jobs, parallel, program, stop):
    """Run what is not done, `parallel` at a time; returns {job: why it failed}. Ends early when `stop` has a signal."""
    queue, running, failed = deque(job for job in jobs if not job.done), {}, {}
    while (queue or running) and stop.number is None:
        while queue and len(running) < parallel:
            job = queue.popleft()
            lock = try_lock(lock_path(job))
            if lock is None:
                running[job] = Orphan(job), time.monotonic()
                say(f"waiting for {job.name}, which an earlier study started")
            else:
                resumed = (job.folder / "config.json").exists()
                running[job] = Child(job, program, lock), time.monotonic()
                say(f"{'resumed' if resumed else 'started'} {job.name}")
        time.sleep(POLL_SECONDS)
        for job, (process, since) in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[job]
            if job.done:
                wall, _ = estimate(jobs, parallel)
                left = sum(not other.done for other in jobs)
                say(f"done {job.name} in {time.monotonic() - since:.0f} s; {left} runs left, about {duration(wall)}")
            elif isinstance(process, Orphan):
                queue.appendleft(job)
            else:
                failed[job] = failure(job, code)
                say(f"FAILED {failed[job]}")
    stop_children([process for process, _ in running.values()], stop)
    return failed


def stop_children(processes, stop):
    """Pass the signal on, give the runs time to write a checkpoint, then kill what is left."""
    if not processes:
        return
    say(f"stopping {len(processes)} runs")
    for process in processes:
        process.stop(stop.number)
    deadline = time.monotonic() + GRACE_SECONDS
    waiting = [process for process in processes if isinstance(process, Child)]
    while waiting and time.monotonic() < deadline and not stop.again:
        time.sleep(POLL_SECONDS)
        waiting = [process for process in waiting if process.poll() is None]
    for process in waiting:
        process.kill()


def failure(job, code):
    """One line: the run, how it ended, and the last line of its log."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = [line.strip() for line in job.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = f": {lines[-1][:300]}" if code >= 0 and len(lines) > 1 else ""
    return f"{job.folder}: failed with {how}{last} (log: {job.log})"


def say(text):
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


# --- The report ------------------------------------------------------------------------------------------------------


def collect(jobs, failed):
    """(runs, a line for each planned run that is not there or not what it should be)."""
    runs, problems = [], []
    for job in jobs:
        if job in failed:
            problems.append(failed[job])
            continue
        try:
            run = read_run(job.folder)
        except UserError as error:
            problems.append(str(error))
            continue
        wrong = [
            f"{what} {found!r} where the plan has {planned!r}"
            for what, found, planned in (
                ("arm", run.variant, job.variant),
                ("seed", run.seed, job.seed),
                ("scale", run.config.get("scale"), job.scale),
            )
            if found != planned
        ]
        if wrong:
            problems.append(f"{job.folder / 'config.json'}: another run's folder: {wrong[0]}")
        else:
            runs.append(run)
    return runs, problems


def report(jobs, failed, out, command):
    """Write the report; returns the lines about what is missing from it."""
    from study import report as writer  # matplotlib takes a second to load: not for --dry-run

    runs, problems = collect(jobs, failed)
    results = writer.write_report(runs, problems, out, "Projected GRPO: the registered study", command)
    for text in results["headlines"]:
        print(text)
    for verdict in results["verdicts"]:
        print(f"{verdict['id']} {verdict['verdict']}: {verdict['claim']}")
    for line in results["left_out"]:
        print(f"left out: {line}", file=sys.stderr)
    print(f"report: {Path(out) / 'report.html'}")
    return results["left_out"]


# --- Command line ----------------------------------------------------------------------------------------------------


def parse(argv):
    def positive(text):
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
        return int(text)

    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(PARALLEL), default="pocket")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds of the arms (default 3); the cone's controls have at most 3")
    parser.add_argument("--ablation-seeds", type=positive, default=1, help="seeds of the ablations (default 1)")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="leave the other arms out")
    parser.add_argument("--out", type=Path, help="folder of the study (default runs/study-SCALE)")
    parser.add_argument("--parallel", type=positive, help="runs at a time (default 2 at pocket scale, 1 at full)")
    parser.add_argument("--price-per-hour", type=float, help="of the machine, for the estimate of cost")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, the estimate and the commands, and stop")
    parser.add_argument("--report", action="store_true", help="write the report from the runs that are there, and stop")
    parser.add_argument("--program", type=Path, default=GRPO, help="the training program (default grpo.py)")
    parser.add_argument("extra", nargs="*", help="after --: arguments for every run")
    return parser.parse_args(argv)


def check_settings(out, settings):
    """A study folder holds one study: its scale and extra arguments are written at first and compared ever after."""
    path = out / "study.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    except ValueError:
        raise UserError(f"{path}: not JSON; move the folder away or choose another --out") from None
    if before != settings:
        raise UserError(f"{out} holds a study with {before}, not {settings}; choose another --out")


def main(argv=None):
    """Exit code: 0 all runs are in the report, 1 some are not, 2 a mistake that the user can mend, 130/143 stopped."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    out = args.out or Path("runs") / f"study-{args.scale}"
    parallel = args.parallel or PARALLEL[args.scale]
    try:
        jobs = plan(out, args.scale, args.seeds, args.ablation_seeds, args.only, args.extra)
        print(describe_plan(jobs, parallel, args.price_per_hour), flush=True)
        if args.dry_run:
            print("\n".join(shlex.join(["python", args.program.name, *job.arguments()]) for job in jobs if not job.done))
            return 0
        check_settings(out, {"scale": args.scale, "extra": args.extra})
        lock = try_lock(out / "study.lock")
        if lock is None:
            raise UserError(f"another study is running in {out}")
        with lock:
            failed = {}
            if not args.report:
                stop = Stop()
                failed = run_jobs(jobs, parallel, args.program, stop)
                if stop.number is not None:
                    say("stopped; the same command goes on from here")
                    return 128 + stop.number
            return 1 if report(jobs, failed, out, shlex.join(["python", "-m", "study", *argv])) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

