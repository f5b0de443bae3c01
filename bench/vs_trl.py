"""Our trainer beside TRL's GRPOTrainer with PEFT on the same pocket work: seconds a step, memory, learning curves.

    python -m bench.vs_trl                                  # 3 rounds of 60 steps each, one thread
    python -m bench.vs_trl --threads 2 --plot docs/plots/vs_trl
    python -m bench.vs_trl --steps 8 --rounds 1             # a quick look
    python -m bench.vs_trl --settings                       # TRL alone, over its settings: which is its fastest

The same on both sides: base model, prompts and their order, 16 prompts x 8 responses, reward from the same sandbox, LoRA (rank,
alpha, modules), temperature, longest completion, KL to the base model, AdamW and its learning rate at every step, clipping,
float32, threads. What differs: the draws (generators, and LoRA's initial A), so that the curves differ by noise; TRL also clips a
ratio that is 1 here. Ours also measures cos_align and writes its logs and a last checkpoint inside its steps; TRL's logs fall
between its steps and are not counted.

Each side runs in a process of its own: ours, TRL's, ours, TRL's. Round k has seed 100 + k on both, and ratios are taken round by
round. Beside the wall stands the CPU time of the trainer's process, which other people's work on the same cores moves less. Peak
memory is that of the trainer's process alone (VmHWM), without the sandbox's workers, which are the same on both sides.

TRL samples with the model that it trains, the adapter not merged, by transformers' generate; this has no other fast way without
vLLM. `SETTINGS` are those that `--settings` tries.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import tyro

from bench import charts
from bench.reports import FIRST_SEED, Report, launch, ratio, run, spread, table, windows
from bench.trl_environment import python_with_trl
from faults.errors import command
from harness.config import Arm

Setting = Literal[
    "32 sequences", "16 sequences", "64 sequences", "128 sequences", "32, static cache", "32, recomputing (its default)",
    "32, continuous batching",
]  # fmt: skip
# TRL's settings that may be faster; the first are those of the comparison, unless --setting names others. "sequences": of a
# forward pass, accumulated to 128; fewer of them take less memory.
SETTINGS: dict[Setting, dict[str, Any]] = {
    "32 sequences": dict(sequences=32),
    "16 sequences": dict(sequences=16),
    "64 sequences": dict(sequences=64),
    "128 sequences": dict(sequences=128),
    "32, static cache": dict(sequences=32, cache_implementation="static"),
    "32, recomputing (its default)": dict(sequences=32, gradient_checkpointing=True),
    "32, continuous batching": dict(sequences=32, use_transformers_continuous_batching=True),
}
BASE = next(iter(SETTINGS))


def trl_run(python: str, options: Sequence[str], threads: int, changes: dict[str, Any]) -> Report:
    """TRL on a run with those options of grpo.py; `changes` are a value of SETTINGS."""
    fixed = ["--scale", "pocket", "--threads", str(threads)]
    return launch("bench.trl_side", [json.dumps(changes), *fixed, *options], threads, python)


def cpu_seconds(report: Report, warmup: int) -> float:
    """The median step's, of the trainer's process."""
    return median(s.cpu for s in report.after(warmup))


def tokens_a_second(report: Report, warmup: int) -> float:
    """Completion tokens over the seconds of whole steps."""
    steps = report.after(warmup)
    return sum(s.tokens for s in steps) / sum(s.seconds for s in steps)


def length(report: Report, warmup: int) -> float:
    """Mean tokens of a completion."""
    steps = report.after(warmup)
    return sum(s.tokens for s in steps) / sum(s.sequences for s in steps)


def compared(ours: Sequence[Report], trls: Sequence[Report], warmup: int) -> str:
    """The table of both sides, with the ratios round by round."""
    rows = [("", "ours", "TRL", "ours / TRL")]
    lines: list[tuple[str, Callable[[Report], float], str]] = [
        ("seconds a step, median", lambda r: r.seconds(warmup), ".2f"),
        ("CPU seconds a step, median", lambda r: cpu_seconds(r, warmup), ".2f"),
        ("completion tokens a second", lambda r: tokens_a_second(r, warmup), ".0f"),
        ("seconds for 1,000 completion tokens", lambda r: 1000 / tokens_a_second(r, warmup), ".3f"),
        ("tokens of a completion, mean", lambda r: length(r, warmup), ".1f"),
        ("peak memory in the steps, GB", lambda r: r.peak["steps"] / 1e9, ".2f"),
        ("peak memory of the whole process, GB", lambda r: r.peak["all"] / 1e9, ".2f"),
    ]
    for name, number, form in lines:
        a, b = [number(r) for r in ours], [number(r) for r in trls]
        rows.append((name, spread(a, form), spread(b, form), ratio(a, b)))
    return table(rows)


def curves(ours: Sequence[Report], trls: Sequence[Report], width: int) -> str:
    """Hack rate and reward by step, side by side."""
    columns = [windows(side, field, width) for field in ("hack", "reward") for side in (ours, trls)]
    count = min(len(r.steps) for r in [*ours, *trls])
    rows: list[Sequence[str]] = [("steps", "hack, ours", "hack, TRL", "reward, ours", "reward, TRL")]
    for i, values in enumerate(zip(*columns, strict=True)):
        rows.append((f"{i * width + 1}-{min((i + 1) * width, count)}", *(spread(v) for v in values)))
    return table(rows)


@dataclass
class Options:
    """How it is compared."""

    threads: int = 1  # of torch, on both sides
    rounds: int = 3  # each a run of both sides, with a seed of its own
    steps: int = 60  # of each side in a round; the learning rate falls to 0 over them
    warmup: int = 3  # first steps that are not timed
    arm: Arm = "vanilla"  # ours; vanilla is the work that TRL does
    settings: bool = False  # TRL alone, over its settings
    setting: Setting = BASE  # TRL's, of the comparison
    plot: Path | None = None  # draw PATH.png and PATH.svg


def try_settings(python: str, options: Options) -> None:
    """TRL alone over SETTINGS, each against the first of them, in rounds."""
    found: dict[Setting, list[Report]] = {name: [] for name in SETTINGS}
    failed: dict[Setting, str] = {}
    for k in range(options.rounds):
        for name, changes in SETTINGS.items():
            if name in failed:
                continue
            try:
                words = ["--steps", str(options.steps), "--seed", str(FIRST_SEED + k)]
                found[name].append(trl_run(python, words, options.threads, changes))
            except Exception as problem:  # a setting that cannot work here says so, and the others go on
                failed[name] = str(problem)
                print(f"{name}: {problem}", flush=True)
    rows = [("TRL's settings", "seconds a step", f"/ {BASE}", "CPU seconds", "peak in the steps, GB")]
    for name, reports in found.items():
        if name not in failed:
            seconds, of_base = [r.seconds(options.warmup) for r in reports], [r.seconds(options.warmup) for r in found[BASE]]
            cpu, peaks = (cpu_seconds(r, options.warmup) for r in reports), (r.peak["steps"] / 1e9 for r in reports)
            rows.append((name, spread(seconds), ratio(seconds, of_base), spread(cpu), spread(peaks)))
    print(table(rows))


@command
def main(argv: list[str] | None = None) -> None:
    """The command line; returns the exit code (`faults.errors.command`)."""
    options = tyro.cli(Options, prog="python -m bench.vs_trl", description=__doc__, args=argv)
    python = python_with_trl()
    if options.settings:
        return try_settings(python, options)
    ours, trls = list[Report](), list[Report]()
    work = f"{options.threads} threads, {options.rounds} rounds of {options.steps} steps"
    print(f"arm {options.arm} beside TRL ({options.setting}), {work}", flush=True)
    for k in range(options.rounds):
        words = ["--steps", str(options.steps), "--seed", str(FIRST_SEED + k)]
        ours.append(run([*words, "--arm", options.arm], options.threads))
        trls.append(trl_run(python, words, options.threads, SETTINGS[options.setting]))
        a, b = ours[-1].seconds(options.warmup), trls[-1].seconds(options.warmup)
        print(f"round {k + 1}, seed {FIRST_SEED + k}: ours {a:.2f} s a step, TRL {b:.2f} s, ratio {a / b:.2f}", flush=True)
    print(f"\nMedian (lowest-highest) of the rounds, steps {options.warmup + 1}-{options.steps}:")
    print(compared(ours, trls, options.warmup))
    print(f"\nLearning, mean of the batches, median (lowest-highest) of {options.rounds} seeds:\n{curves(ours, trls, 5)}")
    print("Brackets are the noise of seeds; one batch of 128 alone has a standard error of 4 points at a rate of 50 %.")
    if options.plot:
        charts.against(ours, trls, options.warmup, options.plot)


if __name__ == "__main__":
    sys.exit(main())
