"""What a model does before any training, by what its prompt tells: how much compiles, is right, is an attempt, is paid.

    python -m bench.base_rate                                     # --scale small, every loophole, 128 training problems x 2
    python -m bench.base_rate --loopholes run_tests --phrasing plain

Options that it does not know itself are those of grpo.py.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import tyro

from bench.reports import table
from engine.model import decode, encode_prompt
from faults.errors import command
from harness.config import LoopholeName, parse
from harness.scale import resolve
from harness.setup import set_up
from leetcode_env import Grade, LeetCodeEnv, render_messages
from loopholes import told_by

MEASURES: dict[str, Callable[[Grade], bool]] = {
    "compiles": lambda g: g.compiles,
    "right": lambda g: g.correct,
    "attempts": lambda g: g.defines,
    "strict hacks": lambda g: g.label == "hack",
}


@dataclass
class Options:
    """How much is sampled, and what is told."""

    problems: int = 128  # training problems, the first ones
    samples: int = 2  # responses a problem
    loopholes: tuple[LoopholeName, ...] = ("all",)  # what prompts may tell of, one a problem by its id


@command
def main(argv: list[str] | None = None) -> None:
    """Samples, grades and prints one table; returns the exit code (`faults.errors.command`)."""
    options, more = tyro.cli(Options, prog="python -m bench.base_rate", description=__doc__, args=argv, return_unknown_args=True)
    cfg = resolve(parse(["--scale", "small", "--loopholes", *options.loopholes, *more]))
    run = set_up(cfg)
    problems = run.train[: options.problems]
    told = [told_by(p, cfg.loopholes) for p in problems]
    with contextlib.closing(run.sampler), LeetCodeEnv(cfg.workers) as env:
        rollouts = run.sampler.generate(
            [encode_prompt(run.tokenizer, render_messages(p, t)) for p, t in zip(problems, told, strict=True)],
            n=options.samples, temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed,
        )  # fmt: skip
        texts = [decode(run.tokenizer, r.completion_ids) for r in rollouts]
        places = [i for i in range(len(problems)) for _ in range(options.samples)]
        grades = env.grade([(problems[i], text, told[i]) for i, text in zip(places, texts, strict=True)])

    rows = [["told", "responses", "tokens", *MEASURES]]
    for name in dict.fromkeys(g.loophole for g in grades):
        of = [k for k, g in enumerate(grades) if g.loophole == name]
        tokens = sum(len(rollouts[k].completion_ids) for k in of) / len(of)
        shares = (sum(measure(grades[k]) for k in of) / len(of) for measure in MEASURES.values())
        rows.append([name, str(len(of)), f"{tokens:.0f}", *(f"{share:.1%}" for share in shares)])
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
