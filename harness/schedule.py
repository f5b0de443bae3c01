"""What a step is, as functions of seed and step alone: nothing of it is saved, and a resumed run does what it would have done."""

from __future__ import annotations

import math
import random

from harness.config import Config
from leetcode_env import Problem


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up over cfg.warmup steps, then cosine to 0 at cfg.steps. A function of the step: nothing to save."""
    done = max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup)) * 0.5 * (1 + math.cos(math.pi * done))


def batch_problems(problems: list[Problem], step: int, cfg: Config) -> list[Problem]:
    """The problems of a step: a walk through a new permutation each epoch. A function of seed and step."""
    count = cfg.batch // cfg.generations
    places = [divmod(position, len(problems)) for position in range(step * count, (step + 1) * count)]  # (epoch, index)
    orders = {epoch: _order(cfg.seed, epoch, len(problems)) for epoch, _ in places}
    return [problems[orders[epoch][index]] for epoch, index in places]


def _order(seed: int, epoch: int, count: int) -> list[int]:
    return random.Random(f"{seed}:{epoch}").sample(range(count), count)


def sampling_seed(step: int, cfg: Config, rank: int, ranks: int) -> int:
    """The seed of a step's responses; no two ranks share one."""
    return (cfg.seed * 1_000_003 + step) * ranks + rank
