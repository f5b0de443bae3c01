"""Shares of counted responses, and how sure one can be of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any


def wilson(count: int, n: int, confidence: float = 0.95) -> dict[str, Any]:
    """Share with its Wilson score interval, {count, n, rate, low, high}; n = 0 gives None for the three rates.

    It treats the samples as independent, which those of one problem are not: the study's seed-level tests are to be trusted.
    """
    if not 0 <= count <= n:
        raise ValueError(f"count {count} is not between 0 and n = {n}")
    if n == 0:
        return {"count": 0, "n": 0, "rate": None, "low": None, "high": None}
    from scipy import stats  # here: it takes a second to load, and a mistake on the command line is said before

    interval = stats.binomtest(count, n).proportion_ci(confidence, method="wilson")
    return {"count": count, "n": n, "rate": count / n, "low": float(interval.low), "high": float(interval.high)}


def share(counts: Counter[str], labels: Iterable[str]) -> float:
    """Share of the counted responses that carry one of `labels`."""
    return sum(counts[label] for label in labels) / counts.total()
