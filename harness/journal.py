"""What a run writes down of each step: the line of metrics.jsonl, the seconds by phase, the table of the detailed log."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from engine.sampler import Rollout
from harness.config import Config
from leetcode_env import LABELS, Grade, Problem
from loopholes import LOOPHOLES
from projection import Projected


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Inside, the time counts for that phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


def metrics(
    step: int,
    cfg: Config,
    rewards: Tensor,
    advantages: Tensor,
    grades: list[Grade],
    rollouts: list[Rollout],
    sums: dict[str, float],
) -> dict[str, Any]:
    """What a line of metrics.jsonl says of a batch; `sums` are `grpo.backward`'s, over tokens.

    entropy: -mean log p of the sampled tokens, an estimate of the policy's entropy in nats a token. cut: the share of responses
    that max_new_tokens ended. zero_groups: groups whose rewards are all equal, so that they give no policy gradient. lambda: the
    share of the wrong responses that the loophole paid, None without any. by_loophole: `by_loophole` below, where several are in
    play."""
    n, tokens, labels = len(grades), sums["tokens"], Counter(g.label for g in grades)
    wrong = sum(not g.correct for g in grades)
    zero_groups = int((advantages.view(-1, cfg.generations) == 0).all(1).sum())
    return dict(
        step=step,
        reward=rewards.mean().item(),
        reward_std=rewards.std().item(),
        n=n,
        labels={k: labels[k] for k in LABELS},
        hack=labels["hack"] / n,
        **{"pass": sum(g.correct for g in grades) / n},
        kl=sums["kl"] / tokens,
        entropy=sums["entropy"] / tokens,
        length=tokens / n,
        cut=sum(not r.finished for r in rollouts) / n,
        zero_groups=zero_groups,
        zero_group_share=zero_groups * cfg.generations / n,
        mismatch=dict(
            mean_abs=sums["abs_log_ratio"] / tokens, max_abs=sums["max_abs"],
            kl=sums["mismatch_kl"] / tokens, truncated=sums["truncated"] / tokens,
        ),
        **{"lambda": labels["hack"] / wrong if wrong else None},
        **({"by_loophole": by_loophole(grades)} if len(cfg.loopholes) > 1 else {}),
    )  # fmt: skip


def removal(found: Projected | None) -> dict[str, float]:
    """What a projection took away, for the same line; zeros where nothing was projected."""
    return dict(
        removed=found.removed if found else 0.0,
        active_rows=found.active if found else 0,
        vanished=found.vanished if found else 0,
        zero_blocks=found.zero_blocks if found else 0,
    )


def by_loophole(grades: list[Grade]) -> dict[str, dict[str, float]]:
    """{name: {n, hack}}: how many responses had a prompt that told of each loophole, and the share of them that hack."""
    parts: dict[str, list[str]] = {name: [] for name in LOOPHOLES}
    for grade in grades:
        if grade.loophole:
            parts[grade.loophole].append(grade.label)
    return {name: dict(n=len(part), hack=part.count("hack") / len(part)) for name, part in parts.items() if part}


def merge(parts: list[dict[str, float]]) -> dict[str, float]:
    """The ranks' sums over tokens as one: added up, and the largest of what is a maximum."""
    return {k: (max if k == "max_abs" else sum)(p[k] for p in parts) for k in parts[0]}


def table(line: dict[str, Any], problems: list[Problem], texts: list[str], grades: list[Grade]) -> str:
    """The detailed log: numbers, and a hacking and another response where there are both."""
    order = sorted(range(len(texts)), key=lambda i: grades[i].label != "hack")
    head = (
        f"step {line['step'] + 1}: reward {line['reward']:.3f}  pass {line['pass']:.1%}  kl {line['kl']:.4f}  "
        f"cos_align {line['cos_align']:+.4f}  cos_update {line['cos_update']:+.4f}  removed {line['removed']:.3f}  "
        f"cos(d_0, d_t) {line['cos_d0']:.3f}"
    )
    counts = ["  ".join(f"{k} {v}" for k, v in line["labels"].items())]
    if several := line.get("by_loophole"):
        counts.append("hack by loophole: " + "  ".join(f"{name} {part['hack']:.1%}" for name, part in several.items()))
    shown = [f"[{problems[i].id}, {grades[i].label}, reward {grades[i].reward}]\n{texts[i]}" for i in (order[0], order[-1])]
    return "\n".join(["", head, *counts, *shown])
