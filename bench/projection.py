"""`projection.project` against the least that memory allows: reading g and v once and writing g' once.

    python -m bench.projection                   # 1e5 to 1e8 elements, and cones of 24 rows as memory holds them; one thread
    python -m bench.projection --largest 7       # a quick look

The bound is one kernel of the same traffic, out = g - c v, into new memory, as `project` returns its result, and into memory that
is there already; both are measured in turns with `project`, in this process. A cone is measured against one walk over its rows
and g, the product J g. "held" is the peak of memory beside the inputs, in vectors of length P; the result itself is one of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

from bench.logprob import peak_bytes
from bench.reports import ratio, spread, table
from engine.fetch_model import available_memory
from faults.errors import command
from projection import project

ROWS = 24  # of a cone, as in the arm
BAR = 2.0  # times the bound at the largest P


def clocked(action: Callable[[], Any], least: float = 0.05) -> float:
    """Seconds of one call: the mean of as many as fill `least` seconds."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < least:
        action()
        calls += 1
    return (time.perf_counter() - start) / calls


def held(action: Callable[[], Any], length: int) -> float:
    """Peak memory of a call beside what there was, in float32 vectors of that length."""
    before = peak_bytes("cpu", reset=True)
    action()
    return (peak_bytes("cpu") - before) / (4 * length)


def drawn(length: int) -> tuple[Tensor, Tensor]:
    """(g, v), both [length]: g leans hack-ward, so that something is removed."""
    generator = torch.Generator().manual_seed(0)
    g, v = torch.randn(length, generator=generator), torch.randn(length, generator=generator)
    return g.add_(v, alpha=0.1), v


def one_direction(length: int, rounds: int) -> tuple[list[str], float]:
    """The row of a length, and project's median seconds over the bound's."""
    g, v = drawn(length)
    out = torch.empty_like(g)
    calls: list[Callable[[], Any]] = [
        lambda: project(g, v),
        lambda: torch.add(g, v, alpha=-0.1),
        lambda: torch.add(g, v, alpha=-0.1, out=out),
    ]
    [call() for call in calls]
    times = [[clocked(call) for call in calls] for _ in range(rounds)]
    ours, new, there = map(list, zip(*times, strict=True))
    extra = held(calls[0], length)
    cells = [f"{length:.0e}", spread((t * 1e3 for t in ours), ".3f"), f"{min(ours) / length * 1e9:.2f}"]
    cells += [spread((t * 1e3 for t in new), ".3f"), ratio(ours, new), ratio(ours, there), f"{extra:.2f}"]
    return cells, sorted(a / b for a, b in zip(ours, new, strict=True))[rounds // 2]


def cone(length: int, rounds: int) -> list[str]:
    """The row of a cone of ROWS random rows, half of which g leans to."""
    g, _ = drawn(length)
    J = torch.randn(ROWS, length, generator=torch.Generator().manual_seed(1))  # [ROWS, length]
    J[::2].add_(g, alpha=0.1)
    calls: list[Callable[[], Any]] = [lambda: project(g, J), lambda: J @ g]
    [call() for call in calls]
    ours, walk = map(list, zip(*([clocked(call) for call in calls] for _ in range(rounds)), strict=True))
    cells = [f"{length:.0e}", spread((t * 1e3 for t in ours), ".1f"), f"{min(ours) / length / ROWS * 1e9:.2f}"]
    return [*cells, spread((t * 1e3 for t in walk), ".1f"), ratio(ours, walk, ".1f"), f"{held(calls[0], length):.2f}"]


@dataclass
class Options:
    """How far, and how often."""

    threads: int = 1  # of torch
    rounds: int = 5  # of a length, in which project and its bound take turns
    largest: int = 8  # power of ten of the longest vector


@command
def main(argv: list[str] | None = None) -> None:
    """The command line; returns the exit code (`faults.errors.command`)."""
    options = tyro.cli(Options, prog="python -m bench.projection", description=__doc__, args=argv)
    torch.set_num_threads(options.threads)
    rows = [["P", "project, ms", "ns an element", "bound, ms", "/ bound", "/ bound without new memory", "held, vectors of P"]]
    for power in range(5, options.largest + 1):
        cells, of_bound = one_direction(10**power, options.rounds)
        rows.append(cells)
    print(f"one direction, {options.threads} threads, median (lowest-highest) of {options.rounds} rounds\n{table(rows)}")
    print(f"at 1e{options.largest}: {of_bound:.2f} times the bound; the bar is {BAR:g}\n")
    rows = [["P", "project, ms", "ns an element of J", "one walk, ms", "/ one walk", "held, vectors of P"]]
    for power in range(6, options.largest + 1):
        if 4 * (ROWS + 4) * 10**power > available_memory() / 2:
            print(f"a cone at 1e{power} would take more than half of the memory that is free: left out")
            break
        rows.append(cone(10**power, options.rounds))
    print(f"a cone of {ROWS} rows\n{table(rows)}")


if __name__ == "__main__":
    sys.exit(main())
