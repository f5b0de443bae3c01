"""The registered plans: arms x seeds, each a run of grpo.py, and what they will take."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from faults.errors import UserError
from harness.scale import SCALES
from loopholes import LOOPHOLES

ALL_SEEDS, CONTROL_SEEDS, ABLATION_SEEDS = "seeds", "control_seeds", "ablation_seeds"
ONE = {  # the benchmark's loophole alone; variant: (flags of grpo.py, which number of seeds it has)
    "vanilla": (("--arm", "vanilla"), ALL_SEEDS),
    "projected": (("--arm", "projected", "--m", "16"), ALL_SEEDS),
    "projected_gated": (("--arm", "projected_gated"), ALL_SEEDS),
    "cone": (("--arm", "cone"), ALL_SEEDS),
    "rebound": (("--arm", "rebound"), ALL_SEEDS),
    "random": (("--arm", "random"), ALL_SEEDS),
    "no_loophole": (("--arm", "no_loophole"), ALL_SEEDS),
    "cone_random": (("--arm", "cone", "--cone-rows", "random"), CONTROL_SEEDS),
    "cone_nonhack": (("--arm", "cone", "--cone-rows", "nonhack"), CONTROL_SEEDS),
    "cone_match_random": (("--arm", "cone", "--cone-match", "random"), CONTROL_SEEDS),
    "cone_match_shuffled": (("--arm", "cone", "--cone-match", "shuffled"), CONTROL_SEEDS),
    "counterfactual": (("--arm", "counterfactual"), CONTROL_SEEDS),
    "screen_known": (("--arm", "screen_known"), CONTROL_SEEDS),
    "recontextualised": (("--arm", "recontextualised"), CONTROL_SEEDS),
    "caft": (("--arm", "caft"), CONTROL_SEEDS),
    "caft_random": (("--arm", "caft_random"), CONTROL_SEEDS),
    "no_renorm": (("--arm", "no_renorm"), ABLATION_SEEDS),
    "no_svd": (("--arm", "no_svd"), ABLATION_SEEDS),
    "m8": (("--arm", "projected", "--m", "8"), ABLATION_SEEDS),
    "m32": (("--arm", "projected", "--m", "32"), ABLATION_SEEDS),
    "rebound_additive": (("--arm", "rebound", "--rebound-form", "additive"), ABLATION_SEEDS),
    "rebound_correctness": (("--arm", "rebound", "--rebound-on", "correctness"), ABLATION_SEEDS),
}
# Their hacks stand at different places; what is held of the others is the question.
KNOWN_THREE = ("run_tests", "equality", "stdout")
_THREE = ("--cone-known", *KNOWN_THREE)
SEVERAL = {  # every loophole, one a problem; of a variant called long, five times the steps
    "vanilla": (("--arm", "vanilla"), ALL_SEEDS),
    "no_loophole": (("--arm", "no_loophole"), ALL_SEEDS),
    "counterfactual": (("--arm", "counterfactual"), ALL_SEEDS),
    "cone": (("--arm", "cone"), ALL_SEEDS),
    "cone_three": (("--arm", "cone", *_THREE), ALL_SEEDS),
    "screen_three": (("--arm", "screen_known", *_THREE), ALL_SEEDS),
    **{
        f"cone_without_{name}": (("--arm", "cone", "--cone-known", *(x for x in LOOPHOLES if x != name)), CONTROL_SEEDS)
        for name in LOOPHOLES
    },
    "counterfactual_long": (("--arm", "counterfactual"), CONTROL_SEEDS),
    "no_loophole_long": (("--arm", "no_loophole"), CONTROL_SEEDS),
    "screen_known": (("--arm", "screen_known"), CONTROL_SEEDS),
    "counterfactual_self": (("--arm", "counterfactual", "--counterfactual-ref", "self"), CONTROL_SEEDS),
    "counterfactual_tau4": (("--arm", "counterfactual", "--counterfactual-tau", "4.0"), CONTROL_SEEDS),
    "counterfactual_tau6": (("--arm", "counterfactual", "--counterfactual-tau", "6.0"), CONTROL_SEEDS),
    "counterfactual_project": (("--arm", "counterfactual", "--counterfactual-use", "project"), CONTROL_SEEDS),
    "recontextualised": (("--arm", "recontextualised"), CONTROL_SEEDS),
}
PLANS = {"one": ONE, "several": SEVERAL}
LOOPHOLES_OF = {"one": (), "several": ("--loopholes", "all")}
LONG, LONGER = "_long", 5  # how a variant with so many times the steps is called
PARALLEL = {"pocket": 2, "small": 2, "full": 1}  # two single-thread runs fit on two cores; one run fills one GPU
TYPICAL_SECONDS = {"pocket": 120, "small": 2400, "full": 5400}  # a run, until runs of this study have been measured
MOST_CONTROL_SEEDS = 3  # of the cone's controls, however many seeds the arms have: their question takes no more
CONE_FACTOR = 1.3  # the cone's rows cost a small backward pass each
GRPO = Path(__file__).resolve().parent.parent / "grpo.py"


def known_to(variant: str) -> tuple[str, ...]:
    """The loopholes whose hack a variant of SEVERAL knows: all or some where it is a cone or screens by syntax, else none."""
    flags = SEVERAL.get(variant, ((), ""))[0]
    if not {"cone", "screen_known"} & set(flags):
        return ()
    return flags[flags.index("--cone-known") + 1 :] if "--cone-known" in flags else tuple(LOOPHOLES)


@dataclass(frozen=True)
class Job:
    """One run of the plan."""

    variant: str
    seed: int
    out: Path  # the study's folder
    scale: str
    extra: tuple[str, ...] = ()
    plan: str = "one"

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.variant}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where it writes to."""
        return self.out / "runs" / self.name

    @property
    def log(self) -> Path:
        """Where it prints to."""
        return self.out / "logs" / f"{self.name}.log"

    @property
    def begun(self) -> bool:
        """Whether it can be resumed."""
        return (self.folder / "config.json").exists()

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        return (self.folder / "done.json").exists()

    def arguments(self) -> list[str]:
        """Arguments of grpo.py that start the run or resume it."""
        if self.begun:
            return ["--resume", str(self.folder)]
        flags = [*PLANS[self.plan][self.variant][0], *LOOPHOLES_OF[self.plan], "--seed", str(self.seed), "--scale", self.scale]
        return [*flags, "--out", str(self.folder), *self.extra, *self._longer()]

    def _longer(self) -> list[str]:
        if not self.variant.endswith(LONG):
            return []
        given = [
            flag.partition("=")[2] or value for flag, value in pairwise((*self.extra, "")) if flag.split("=")[0] == "--steps"
        ]
        return ["--steps", str(LONGER * int(given[-1] if given else SCALES[self.scale]["steps"]))]


def plan(
    out: Path, scale: str, seeds: int, ablation_seeds: int, only: Sequence[str] = (), extra: Sequence[str] = (), name: str = "one"
) -> list[Job]:
    """The jobs of the study, seed by seed, so that one that is stopped early holds whole comparisons. name: which of PLANS."""
    variants = PLANS[name]
    unknown = [variant for variant in only if variant not in variants]
    if unknown:
        raise UserError(f"unknown arm {unknown[0]!r}; the plan has {', '.join(variants)}")
    count = {ALL_SEEDS: seeds, CONTROL_SEEDS: min(seeds, MOST_CONTROL_SEEDS), ABLATION_SEEDS: ablation_seeds}
    return [
        Job(variant, seed, out, scale, tuple(extra), name)
        for seed in range(max(count.values()))
        for variant, (_, kind) in variants.items()
        if seed < count[kind] and (not only or variant in only)
    ]


def estimate(jobs: Sequence[Job], parallel: int) -> float:
    """Seconds that the jobs not yet done will take, `parallel` at a time, in order.

    Of a run: the mean of the finished ones of its variant, else of all, else what is typical of the scale.
    """
    measured: dict[str, list[float]] = {}
    for job in jobs:
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError, OverflowError, RecursionError):
            seconds = float(json.loads((job.folder / "done.json").read_text(encoding="utf-8"))["seconds"])
            if math.isfinite(
                seconds
            ):  # else, as where it is not done or damaged, the file says nothing here; the report names it
                measured.setdefault(job.variant, []).append(seconds)
    factor = {v: (CONE_FACTOR if v.startswith("cone") else 1.0) * (LONGER if v.endswith(LONG) else 1) for v in ONE | SEVERAL}
    others = [seconds / factor[variant] for variant, values in measured.items() for seconds in values]
    slots = [0.0] * parallel
    for job in jobs:
        if not job.done:
            typical = fmean(others or [TYPICAL_SECONDS[job.scale]]) * factor[job.variant]
            slots[slots.index(min(slots))] += fmean(measured.get(job.variant, [typical]))
    return max(slots)


def describe_plan(jobs: Sequence[Job], parallel: int, price: float | None = None) -> str:
    """What will run and what it will take, as text."""
    wall = estimate(jobs, parallel)
    by_variant: dict[str, list[str]] = {}
    for job in jobs:
        by_variant.setdefault(job.variant, []).append(f"{job.seed}{' (done)' if job.done else ''}")
    flags = {job.variant: shlex.join(PLANS[job.plan][job.variant][0]) for job in jobs}
    lines = [f"{'arm':<24} {'seeds':<28} flags"]
    lines += [f"{name:<24} {', '.join(seeds):<28} {flags[name]}" for name, seeds in by_variant.items()]
    done = sum(job.done for job in jobs)
    lines.append(f"{len(jobs)} runs, {done} done, {parallel} at a time; about {duration(wall)} to go")
    if price is not None:
        lines.append(f"about {wall / 3600 * price:.2f} at {price:.2f} an hour")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """4000 -> "1 h 07 min"."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """A study folder holds one study. Raises UserError where its scale or extra arguments, in study.json, are others."""
    path = out / "study.json"
    try:
        before = json.loads(path.read_bytes())
    except FileNotFoundError:
        return
    except (ValueError, OSError, RecursionError):
        raise UserError(f"{path}: cannot be read as JSON; move the folder away or choose another --out") from None
    if before != settings:
        raise UserError(f"{out} holds a study with {before}, not {settings}; choose another --out")
