"""Where the time of a pocket step goes, by phase, for three arms side by side; and how much of the machine's products it uses.

    python -m bench.phases                                   # 3 rounds of 25 steps of vanilla, projected and cone; one thread
    python -m bench.phases --plot docs/plots/phases
    python -m bench.phases --steps 6 --rounds 1 --arms vanilla    # a quick look

Phases are those of the run's timings.jsonl; optimizer, log and save are timed from outside, and "projection" is a part of
"project" (for the arm cone what else is in "project" is its rows). The sandbox grades beside sampling and reference: "grade" is
what they do not hide. A save is counted as one in 25 steps.

The share of the machine is the floating-point operations that the mathematics needs (`work`), over the seconds of the phase, over
the rate of a float32 product of 1024 x 1024 matrices on as many threads, measured between the runs. A prompt is needed once for
its group, in the rollout and in the backward: what is computed more often counts as time, not as work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
import tyro

from bench.reports import FIRST_SEED, Report, ratio, run, spread, table
from faults.errors import UserError, command
from harness import memory
from harness.config import POCKET, Arm, Config

INSIDE = {"projection": "project"}  # parts, and the phases that they are in
ORDER = (  # of the table
    "sync", "rollout", "reference", "grade", "discount", "backward", "project", "projection", "optimizer", "log", "save", "else",
)  # fmt: skip
SAVE_EVERY = Config().save_every


class Work(NamedTuple):
    """Floating-point operations of a step's products, a multiplication and an addition each counted."""

    rollout: float
    reference: float
    backward: float  # of the policy, its forward included


def work(config: Any, rank: int, prompts: Sequence[int], length: float, generations: int) -> Work:
    """What a step needs. prompts: tokens of each; length: mean tokens of a completion, `generations` of them a prompt.

    A position through the layers: 2 for each weight, and 4 a head and dimension for every position that it attends to. The last
    token of a completion is never read; every token of one is predicted. In the backward the frozen weights cost 2 (gradients of
    inputs alone), the adapter 4, attention twice its forward. The sampler's weights are merged."""
    counts, heads = memory.counts(config, rank), config.num_attention_heads * config.head_dim * memory.layer_kinds(config)[0]
    head = config.vocab_size * config.hidden_size
    layers, adapter, read = counts["matmul"] - head, counts["lora"], length - 1
    positions = sum(prompts) + len(prompts) * generations * read
    pairs = sum(p * (p + 1) / 2 + generations * (read * p + read * (read + 1) / 2) for p in prompts)
    predicted = len(prompts) * generations * length
    forward = 2 * layers * positions + 4 * heads * pairs + 2 * head * predicted
    policy = forward + 2 * adapter * positions
    back = 2 * layers * positions + 8 * heads * pairs + 2 * head * predicted + 4 * adapter * positions
    return Work(rollout=forward, reference=forward, backward=policy + back)


def product_rate(threads: int, size: int = 1024, repeats: int = 10) -> float:
    """Floating-point operations a second of a float32 product of square matrices; the best of `repeats`."""
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def outside(phases: dict[str, float]) -> float:
    """The sum of the phases of a step, without what is inside another."""
    return sum(v for k, v in phases.items() if k not in INSIDE)


def by_phase(report: Report, warmup: int) -> dict[str, float]:
    """Median seconds of a step by phase, in the order of the step, with "else" for what no phase holds."""
    steps = [p | {"else": wall.seconds - outside(p)} for p, wall in zip(report.phases, report.steps, strict=True)]
    steps = steps[min(warmup, len(steps) - 1) :]
    found = {name: median(p[name] for p in steps if name in p) for name in dict.fromkeys(n for p in steps for n in p)}
    if "save" in found:
        found["save"] /= SAVE_EVERY
    return {k: found[k] for k in sorted(found, key=lambda k: ORDER.index(k) if k in ORDER else len(ORDER))}


def shares(report: Report, warmup: int, rate: float, config: Any, cfg: Config) -> dict[str, float]:
    """Of the machine's rate, by phase: rollout, reference and backward."""
    seconds, steps = by_phase(report, warmup), report.after(warmup)
    prompts, tokens = report.prompts[-len(steps) :], [s.tokens / s.sequences for s in steps]
    needed = [work(config, cfg.lora_r, p, t, cfg.generations or 8) for p, t in zip(prompts, tokens, strict=True)]
    names = [name for name in Work._fields if seconds.get(name)]
    return {name: mean(getattr(w, name) for w in needed) / seconds[name] / rate for name in names}


def arm_table(arm: str, reports: Sequence[Report], used: Sequence[dict[str, float]], warmup: int) -> str:
    """Seconds, share of the step and share of the machine of each phase of an arm."""
    found = [by_phase(r, warmup) for r in reports]
    rows = [(arm, "seconds", "of the step", "of the machine's products")]
    for name in dict.fromkeys(n for f in found for n in f):
        values = [f.get(name, 0.0) for f in found]
        part = spread((v / r.seconds(warmup) for v, r in zip(values, reports, strict=True)), ".1%")
        machine = spread((u[name] for u in used), ".1%") if all(name in u for u in used) else ""
        shown = f"  of which {name}" if name in INSIDE else name
        rows.append((shown, spread(values, ".3f"), part, machine))
    return table([*rows, ("the step", spread((r.seconds(warmup) for r in reports), ".3f"), "", "")])


@dataclass
class Options:
    """Which runs are timed."""

    threads: int = 1  # of torch
    rounds: int = 3  # runs of each arm, in turns
    steps: int = 25  # of a run
    warmup: int = 3  # first steps that are not counted
    arms: tuple[Arm, ...] = ("vanilla", "projected", "cone")  # the others are compared with the first
    plot: Path | None = None  # draw PATH.png and PATH.svg


@command
def main(argv: list[str] | None = None) -> None:
    """The command line; returns the exit code (`faults.errors.command`)."""
    options = tyro.cli(Options, prog="python -m bench.phases", description=__doc__, args=argv)
    if not options.arms:
        raise UserError("--arms names no arm")
    config, cfg = memory.model_config(str(POCKET)), Config()
    reports: dict[str, list[Report]] = {arm: [] for arm in options.arms}
    used: dict[str, list[dict[str, float]]] = {arm: [] for arm in options.arms}
    rates = []
    for k in range(options.rounds):
        for arm in options.arms:
            before = product_rate(options.threads)
            words = ["--arm", arm, "--steps", str(options.steps), "--seed", str(FIRST_SEED + k)]
            reports[arm].append(run(words, options.threads))
            rates.append(max(before, product_rate(options.threads)))
            used[arm].append(shares(reports[arm][-1], options.warmup, rates[-1], config, cfg))
        took = ", ".join(f"{arm} {found[-1].seconds(options.warmup):.2f} s" for arm, found in reports.items())
        print(f"round {k + 1}, seed {FIRST_SEED + k}: {took} a step", flush=True)
    for arm in options.arms:
        print(f"\n{arm_table(arm, reports[arm], used[arm], options.warmup)}")
    print(f"\nfloat32 products of 1024 x 1024, {options.threads} threads: {spread((r / 1e9 for r in rates), '.0f')} GFLOP/s")
    seconds = {arm: [r.seconds(options.warmup) for r in found] for arm, found in reports.items()}
    for arm in options.arms[1:]:
        print(f"{arm} / {options.arms[0]}: {ratio(seconds[arm], seconds[options.arms[0]])}")
    if options.plot:
        from bench import charts

        each = {arm: [by_phase(r, options.warmup) for r in found] for arm, found in reports.items()}
        bars = {
            arm: {k: median(f.get(k, 0.0) for f in found) for k in found[0] if k not in INSIDE} for arm, found in each.items()
        }
        charts.stacked(bars, options.plot)


if __name__ == "__main__":
    sys.exit(main())
