"""What a model does before any training, by what its prompt tells: how much compiles, is right, is an attempt, is paid.

    python -m bench.base_rate                                     # --scale small, every loophole, 128 training problems x 2
    python -m bench.base_rate --loopholes run_tests --phrasing plain

Options that it does not know itself are those of grpo.py.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

from bench.reports import table
from engine.model import decode, encode_prompt
from faults.errors import command
from harness.config import parse
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


@command
def main() -> None:
    """Samples, grades and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--loopholes", nargs="+", default=["all"])
    args, more = parser.parse_known_args()
    cfg = resolve(parse(["--scale", "small", "--loopholes", *args.loopholes, *more]))
    run = set_up(cfg)
    problems = run.train[: args.problems]
    told = [told_by(p, cfg.loopholes) for p in problems]
    with contextlib.closing(run.sampler), LeetCodeEnv(cfg.workers) as env:
        rollouts = run.sampler.generate(
            [encode_prompt(run.tokenizer, render_messages(p, t)) for p, t in zip(problems, told, strict=True)],
            n=args.samples, temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed,
        )  # fmt: skip
        texts = [decode(run.tokenizer, r.completion_ids) for r in rollouts]
        places = [i for i in range(len(problems)) for _ in range(args.samples)]
        grades = env.grade([(problems[i], text, told[i]) for i, text in zip(places, texts, strict=True)])

    rows = [["told", "responses", "tokens", *MEASURES]]
    for name in dict.fromkeys(g.loophole for g in grades):
        of = [k for k, g in enumerate(grades) if g.loophole == name]
        tokens = sum(len(rollouts[k].completion_ids) for k in of) / len(of)
        shares = (sum(measure(grades[k]) for k in of) / len(of) for measure in MEASURES.values())
        rows.append([name, str(len(of)), f"{tokens:.0f}", *(f"{share:.1%}" for share in shares)])
    print(table(rows))


if __name__ == "__main__":
    main()
