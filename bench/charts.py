"""The plots of the benches: PATH.png to look at and PATH.svg to zoom into, in the style of the study's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.reports import Report, windows
from study.plots import RC

matplotlib.use("Agg")  # no display is needed, and none may be there

OURS, OTHER = "#0072B2", "#D55E00"
SHADES = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#8C8C8C", "#332288", "#F0E442", "#000000")


def against(ours: Sequence[Report], trls: Sequence[Report], warmup: int, path: Path) -> None:
    """Ours against TRL: bars of seconds and memory, and two learning curves with the band of the seeds.

    warmup: the first steps, which seconds leave out. path: without an ending, as in `stacked`; it gets .png and .svg."""
    sides: list[tuple[str, Sequence[Report], str]] = [("ours", ours, OURS), ("TRL", trls, OTHER)]
    with plt.rc_context(RC):
        figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained", width_ratios=[1, 1, 2, 2])
        bars: list[tuple[Any, str, Callable[[Report], float]]] = [
            (axes[0], "seconds a step", lambda r: r.seconds(warmup)),
            (axes[1], "peak memory, GB", lambda r: r.peak["steps"] / 1e9),
        ]
        for axis, title, number in bars:
            for name, reports, color in sides:
                values = list(map(number, reports))
                middle = median(values)
                bar = axis.bar(
                    name, middle, color=color, width=0.6, yerr=[[middle - min(values)], [max(values) - middle]], capsize=4
                )
                axis.bar_label(bar, fmt="%.2f", padding=3)
            axis.set_title(title)
            axis.margins(y=0.15)
        for axis, field, title in ((axes[2], "hack", "hack rate of the batch"), (axes[3], "reward", "reward of the batch")):
            for name, reports, color in sides:
                parts = windows(reports, field, 5)
                x = [5 * i + 3 for i in range(len(parts))]
                axis.plot(x, [mean(v) for v in parts], color=color, label=name)
                axis.fill_between(x, [min(v) for v in parts], [max(v) for v in parts], color=color, alpha=0.15)
            axis.set_title(title)
            axis.set_xlabel("step")
        axes[3].legend(title=f"band: {len(ours)} seeds")
        _save(figure, path)


def stacked(seconds: dict[str, dict[str, float]], path: Path) -> None:
    """A bar for each arm, its phases on each other; seconds: arm -> phase -> seconds of a step."""
    phases = list(dict.fromkeys(phase for parts in seconds.values() for phase in parts))
    with plt.rc_context(RC):
        figure, axis = plt.subplots(figsize=(8, 0.7 + 0.6 * len(seconds)), layout="constrained")
        for phase, color in zip(phases, SHADES * 2, strict=False):
            widths = [parts.get(phase, 0.0) for parts in seconds.values()]
            lefts = [sum(parts.get(p, 0.0) for p in phases[: phases.index(phase)]) for parts in seconds.values()]
            axis.barh(list(seconds), widths, left=lefts, color=color, label=phase, edgecolor="white", linewidth=0.5)
        axis.invert_yaxis()
        axis.set_xlabel("seconds of a step")
        axis.legend(ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Both files; they hold no date, so that equal numbers give equal bytes."""
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(path.with_suffix(suffix), dpi=160, metadata=metadata)
    plt.close(figure)
    print(f"drawn: {path.with_suffix('.png')}, {path.with_suffix('.svg')}")
