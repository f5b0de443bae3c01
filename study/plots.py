"""The plots of the study, from finished runs: PNG to look at, SVG to zoom into.

Every arm has a shade, a line style and a marker of its own, so that a figure printed in grey still tells them apart.
A figure with nothing to show is not drawn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from leetcode_env import HACK_LABELS, PASS_LABELS
from loopholes import LOOPHOLES
from study.analysis import BASELINE, COMPARED, MAIN_ARMS, by_variant, flagged, scores, scores_by_loophole
from study.plan import known_to
from study.runs import FinishedRun
from study.stats import compare, pareto_front, random_cosine

matplotlib.use("Agg")  # no display is needed, and none may be there

WINDOW = 5  # steps of the trailing mean: a batch of 128 responses is a noisy sample of the policy
COSINE_WINDOW = 15  # cosines of single gradients are noisier still
REFERENCE_ARM = "no_loophole"  # trained where there is nothing to hack: a ceiling, not a competitor
BAND = "band: lowest to highest seed\nmean of {} steps"  # in a legend
PNG_ALONE = {"labels"}  # its hatched areas take megabytes as SVG
ALL, MAIN, OTHERS = (True, False), (True,), (False,)  # runs, by whether their arm is one of MAIN_ARMS

LINES = ("-", (0, (6, 2)), (0, (3, 1)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1)))
# Variant: (colour, line style, marker). Colours after Okabe & Ito, told apart by the colour-blind too.
STYLES: dict[str, tuple[str, Any, Any]] = {
    "vanilla": ("#000000", "-", "o"),
    "projected": ("#0072B2", (0, (6, 2)), "s"),
    "projected_gated": ("#882255", (0, (4, 1, 1, 1, 1, 1)), "H"),
    "cone": ("#D55E00", "-", "^"),
    "rebound": ("#009E73", (0, (6, 2, 1, 2)), "D"),
    "random": ("#8C8C8C", (0, (1, 1.5)), "X"),
    "no_loophole": ("#56B4E9", (0, (3, 1)), "P"),
    "no_renorm": ("#0072B2", "-", "v"),
    "no_svd": ("#332288", (0, (6, 2)), "<"),
    "m8": ("#88CCEE", (0, (1, 1.5)), ">"),
    "m32": ("#004488", (0, (3, 1, 1, 1)), "h"),
    "rebound_additive": ("#009E73", "-", "d"),
    "rebound_correctness": ("#117733", (0, (1, 1.5)), "p"),
    "cone_random": ("#CC79A7", (0, (6, 2)), "*"),
    "cone_nonhack": ("#E69F00", (0, (3, 1, 1, 1)), "8"),
    "cone_match_random": ("#999933", (0, (6, 2)), (4, 1, 0)),  # stars of four and of three points
    "cone_match_shuffled": ("#AA4499", (0, (1, 1.5)), (3, 1, 0)),
    "counterfactual": ("#332288", (0, (5, 1.5, 1, 1.5)), (5, 0, 0)),
    "cone_three": ("#E69F00", (0, (6, 2)), "v"),
    "screen_three": ("#AA4499", (0, (1, 1.5)), "s"),
    "screen_known": ("#882255", (0, (3, 1)), (8, 1, 0)),
    **{
        f"cone_without_{name}": ("#E69F00", line, f"${i}$")
        for i, (name, line) in enumerate(zip(LOOPHOLES, LINES, strict=True), 1)
    },
    "counterfactual_long": ("#117733", (0, (6, 2)), "d"),
    "no_loophole_long": ("#332288", (0, (6, 2, 1, 2)), "h"),
    "counterfactual_self": ("#44AA99", "-", ">"),
    "counterfactual_tau4": ("#44AA99", (0, (3, 1)), "<"),
    "counterfactual_tau6": ("#44AA99", (0, (1, 1.5)), "X"),
    "counterfactual_project": ("#999933", "-", "8"),
    "recontextualised": ("#CC79A7", (0, (3, 1, 1, 1)), (5, 1, 20)),
    "caft": ("#661100", "-", "$c$"),
    "caft_random": ("#661100", (0, (1, 1.5)), "$r$"),
}
UNKNOWN_STYLE = ("#555555", (0, (2, 2)), ".")

# Label: (shade, hatch), from the bottom of the stack up; the hack is the darkest and stands on the axis.
LABEL_STYLES = {
    "hack": ("#A5151F", ""),
    "attempted": ("#EF8A62", "...."),
    "correct_attempted": ("#FDDBC7", "////"),
    "correct": ("#7FB8DA", ""),
    "incorrect": ("#F2F2F2", ""),
}

RC = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "projected-grpo",  # with no date, equal runs give equal files
}

Runs = Sequence[FinishedRun]


def style(variant: str) -> tuple[str, Any, str]:
    """(colour, line style, marker) of a variant."""
    return STYLES.get(variant, UNKNOWN_STYLE)


def smooth(curve: tuple[list[int], list[float]], window: int = WINDOW) -> tuple[list[int], np.ndarray]:
    """(steps, values) with each value replaced by the trailing mean over at most `window` of them."""
    steps, values = curve
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return steps, (sums[ends] - sums[starts]) / (ends - starts)


def pareto(runs: Runs) -> Figure:
    """Hack rate against pass rate: a small point a run with its Wilson intervals, a large one an arm's mean."""
    figure, axis = plt.subplots(figsize=(7.6, 5.2))
    means: dict[str, tuple[float, float]] = {}
    for variant, group in by_variant(runs).items():
        colour, _, marker = style(variant)
        (x, x_low, x_high), (y, y_low, y_high) = (
            np.array([[run.wilson(rate)[key] for run in group] for key in ("rate", "low", "high")]) for rate in COMPARED
        )
        look = {"fmt": "", "ls": "", "marker": marker, "ms": 4.5, "color": colour, "alpha": 0.55, "elinewidth": 0.8}
        axis.errorbar(x, y, xerr=[x - x_low, x_high - x], yerr=[y - y_low, y_high - y], **look)
        means[variant] = float(x.mean()), float(y.mean())
        axis.plot(*means[variant], marker=marker, ls="", ms=10, color=colour, mec="white", mew=0.9, zorder=5)
    front = pareto_front(point for variant, point in means.items() if variant != REFERENCE_ARM)
    if front:  # a staircase, from the least hack rate to the right edge
        x, y = zip(*front, strict=True)
        axis.step([x[0], *x, 1.0], [0.0, *y, y[-1]], where="post", color="#444444", lw=1, zorder=1)
    if "rebound" in means:
        look = {"xytext": (34, 26), "textcoords": "offset points", "fontweight": "bold"}
        axis.annotate("Rebound", means["rebound"], arrowprops={"arrowstyle": "->", "color": "#333333", "shrinkB": 6}, **look)
    axis.set(xlabel="hack rate, unseen evaluator names (strict)", ylabel="pass rate, no loophole", xlim=(-0.03, 1.0))
    axis.set_ylim(-0.02, max(0.1, 1.15 * axis.get_ylim()[1]))
    axis.set_title("Better is up and to the left")
    _percent(axis.xaxis, axis.yaxis)
    line = Line2D([], [], color="#444444", lw=1, label="Pareto front of the means\n(no_loophole left out)")
    _legend(axis, runs, "large: mean of the seeds\nsmall: a run, 95 % intervals", line, ls="", ms=8)
    return figure


def effects(runs: Runs) -> Figure | None:
    """Each arm minus vanilla, in points, with the seed-level 95 % interval (none for a single seed)."""
    groups = by_variant(runs)
    base = groups.pop(BASELINE, None)
    if base is None or not groups:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 0.9 + 0.3 * len(groups)), sharey=True)
    for axis, rate in zip(axes, COMPARED, strict=True):
        for row, (variant, group) in enumerate(groups.items()):
            if result := compare(scores(group, rate), scores(base, rate)):
                level, (colour, _, marker) = result["seed_level"], style(variant)
                if level["low"] is not None:
                    axis.plot([100 * level["low"], 100 * level["high"]], [row, row], color=colour, lw=2, alpha=0.6)
                axis.plot(100 * level["mean"], row, marker=marker, ls="", color=colour, ms=7.5, mec="white", mew=0.4)
        axis.axvline(0, color="#333333", lw=1)
        axis.set_title(f"{rate} rate: change from {BASELINE} (points)")
    axes[0].set_yticks(range(len(groups)), [f"{variant} ({len(group)})" for variant, group in groups.items()])
    axes[0].invert_yaxis()
    return figure


def loopholes(runs: Runs) -> Figure | None:
    """Hack rate by arm and loophole, mean over seeds, as a table in shades; what an arm knows is framed."""
    groups = {variant: scores_by_loophole(group) for variant, group in by_variant(runs).items()}
    groups = {variant: of for variant, of in groups.items() if of}
    names = [name for name in LOOPHOLES if any(name in of for of in groups.values())]
    if not names:
        return None
    rates = np.array([[np.mean([*of.get(name, {}).values()] or np.nan) for name in names] for of in groups.values()])
    figure, axis = plt.subplots(figsize=(2.6 + 1.05 * len(names), 0.9 + 0.34 * len(groups)))
    axis.imshow(rates, cmap="OrRd", vmin=0, vmax=1, aspect="auto")
    for row, variant in enumerate(groups):
        for column, name in enumerate(names):
            rate = rates[row, column]
            axis.text(column, row, f"{100 * rate:.0f}", ha="center", va="center", color="white" if rate > 0.6 else "black")
            if name in known_to(variant):
                axis.add_patch(Rectangle((column - 0.46, row - 0.43), 0.92, 0.86, fill=False, ec="#004488", lw=1.8))
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(groups)), [f"{variant} ({len(next(iter(of.values())))})" for variant, of in groups.items()])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_title("hack rate (strict, %) by loophole; framed: known to the arm", pad=24)
    return figure


def tau(runs: Runs) -> Figure | None:
    """The threshold of counterfactual against what it lets through, a point a run: the hack rate after training, and the share of
    all training responses that were flagged and hold no hack. Only runs that differ from the arm by the threshold alone."""
    chosen = [run for run in runs if re.fullmatch(r"counterfactual(_tau\d+)?", run.variant)]
    if len({run.variant for run in chosen}) < 2:
        return None
    titles = ["hack rate after training (strict)", "honest responses flagged in training"]
    figure, axes = _panels(titles, height=3.4)
    for run in chosen:
        counts = flagged(run)
        colour, _, marker = style(run.variant)
        for axis, y in zip(axes, (run.wilson("hack")["rate"], counts["flagged_honest"] / counts["responses"]), strict=True):
            axis.plot(run.config["counterfactual_tau"], y, ls="", marker=marker, ms=6, color=colour, mec="white", mew=0.5)
    for axis in axes:
        axis.set(xlabel="tau, nats", ylim=(0, None), xticks=sorted({run.config["counterfactual_tau"] for run in chosen}))
        _percent(axis.yaxis)
    return figure


def training(runs: Runs) -> Figure:
    """Hack and correct share of the training batch over steps: mean over seeds, band from the lowest to the highest."""
    figure, axes = _panels(["hack (strict), share of the batch", "correct, share of the batch"])
    for axis, names in zip(axes, (HACK_LABELS, PASS_LABELS), strict=True):
        _bands(axis, runs, names)
        axis.set_ylim(0, None)
        _percent(axis.yaxis)
    _legend(axes[1], runs, BAND.format(WINDOW))
    return figure


def labels(runs: Runs) -> Figure:
    """The five labels stacked over steps, a panel a run."""
    ordered = [run for group in by_variant(runs).values() for run in group]
    columns = min(6, len(ordered))
    rows = -(-len(ordered) // columns)
    size = (0.6 + 2.0 * columns, 0.7 + 1.55 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, run in zip(axes.flat, ordered, strict=False):
        stack = [smooth(run.series((label,)))[1] for label in LABEL_STYLES]
        colours = [colour for colour, _ in LABEL_STYLES.values()]
        areas = axis.stackplot([line["step"] for line in run.metrics], stack, colors=colours)
        for area, (_, hatch) in zip(areas, LABEL_STYLES.values(), strict=True):
            area.set(hatch=hatch, edgecolor="#555555", linewidth=0.3)
        axis.set_title(f"{run.variant}, seed {run.seed}", fontsize=8)
        axis.set_ylim(0, 1)
        axis.margins(x=0)
        _percent(axis.yaxis)
    for axis in axes.flat[len(ordered) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(ordered) - columns) : len(ordered)]:  # the lowest visible panel of each column
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    figure.legend(areas, list(LABEL_STYLES), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, handlelength=1.6)
    return figure


def cosine(runs: Runs) -> Figure:
    """cos_align (the gradient before projection) and cos_update (the step that landed) over steps; the grey band is what
    a random direction would show."""
    figure, axes = _panels(["cos_align: gradient and v_hack", "cos_update: landed step and v_hack"], sharey=True)
    nonzero = [run.nonzero for run in runs if run.nonzero]
    size = random_cosine(int(np.median(nonzero))) if nonzero else 0.0
    for axis, key in zip(axes, ("cos_align", "cos_update"), strict=True):
        if nonzero:
            axis.axhspan(-size, size, color="#BBBBBB", alpha=0.45, lw=0, zorder=0)
        axis.axhline(0, color="#333333", lw=0.8)
        _bands(axis, runs, key, COSINE_WINDOW)
    if nonzero:
        note = f"grey: ± E|cos| of a random direction, {size:.4f}"
        axes[0].text(0.02, 0.02, note, transform=axes[0].transAxes, fontsize=8.5, color="#444444")
    _legend(axes[1], runs, BAND.format(COSINE_WINDOW))
    return figure


def cone(runs: Runs) -> Figure | None:
    """How a cone run escapes: its rows' log-odds keep falling while the hack share rises. A line a seed."""
    chosen = [run for run in runs if run.variant == "cone" and run.series("row_logodds")[0]]  # the controls' rows are no hacks
    if not chosen:
        return None
    titles = ["hack (strict), share of the batch", "mean log-odds of hacking over the cone's rows"]
    figure, axes = _panels(titles, height=3.6)
    for run in chosen:
        colour, line, _ = style(run.variant)
        look = {"color": colour, "ls": line, "marker": "os^DvPX*"[run.seed % 8], "ms": 5, "lw": 1.3}
        look["markevery"] = max(1, len(run.metrics) // 8)
        axes[0].plot(*smooth(run.series(HACK_LABELS)), **look)
        axes[1].plot(*smooth(run.series("row_logodds")), label=f"{run.variant}, seed {run.seed}", **look)
    axes[0].set_ylim(0, None)
    _percent(axes[0].yaxis)
    axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=3.2)
    return figure


def kl(runs: Runs) -> Figure | None:
    """KL divergence to the base model over steps (nats per token), main arms and variants side by side."""
    runs = [run for run in runs if run.series("kl")[0]]
    panels = {"arms": _some(runs, MAIN), "variants and controls": _some(runs, OTHERS)}
    panels = {name: panel for name, panel in panels.items() if panel}
    if not panels:
        return None
    figure, axes = _panels([f"KL to the base model: {name}" for name in panels], sharey=True)
    for axis, panel in zip(axes, panels.values(), strict=True):
        _bands(axis, panel, "kl")
        axis.set(ylabel="nats per token", ylim=(0, None))
        axis.legend(handles=_handles(panel), loc="upper left", handlelength=3.2, fontsize=8.5)
    return figure


FIGURES: dict[str, tuple[Callable[[Runs], Figure | None], tuple[bool, ...]]] = {  # name: (how it is drawn, of which runs)
    "pareto": (pareto, ALL),
    "effects": (effects, ALL),
    "tau": (tau, ALL),
    "loopholes": (loopholes, ALL),
    "training": (training, MAIN),
    "training_variants": (training, OTHERS),
    "labels": (labels, ALL),
    "cosine": (cosine, MAIN),
    "cosine_variants": (cosine, OTHERS),
    "cone": (cone, ALL),
    "kl": (kl, ALL),
}


def draw_all(runs: Runs, out: Path) -> list[Path]:
    """Draw every figure that `runs` have data for into folder `out`; returns the paths written."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with plt.rc_context(RC):
        for name, (draw, which) in FIGURES.items():
            chosen = _some(runs, which)
            figure = draw(chosen) if chosen else None
            if figure is None:
                continue
            if name != "pareto":  # its legend stands outside, and needs no room inside
                figure.tight_layout()
            paths.append(out / f"{name}.png")
            figure.savefig(paths[-1], bbox_inches="tight", dpi=160)
            if name not in PNG_ALONE:
                paths.append(out / f"{name}.svg")
                figure.savefig(paths[-1], bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
    return paths


def _some(runs: Runs, which: tuple[bool, ...]) -> list[FinishedRun]:
    return [run for run in runs if (run.variant in MAIN_ARMS) in which]


def _panels(titles: list[str], height: float = 3.9, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    """A figure with a panel over steps for each title."""
    figure, axes = plt.subplots(1, len(titles), figsize=(5.1 * len(titles), height), squeeze=False, **options)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set(title=title, xlabel="step")
    return figure, axes[0]


def _bands(axis: Axes, runs: Runs, what: str | Sequence[str], window: int = WINDOW) -> None:
    """Per variant the mean of its seeds' smoothed series of `what`, with the band from the lowest to the highest, over the steps
    that all have."""
    for variant, group in by_variant(runs).items():
        seeds = [dict(zip(*smooth(run.series(what), window), strict=True)) for run in group]
        common = sorted(set.intersection(*map(set, seeds)))
        if not common:
            continue
        rows = np.array([[values[step] for step in common] for values in seeds])
        colour, line, marker = style(variant)
        axis.plot(common, rows.mean(0), color=colour, ls=line, marker=marker, ms=5, markevery=max(1, len(common) // 8))
        if len(rows) > 1:
            axis.fill_between(common, rows.min(0), rows.max(0), color=colour, alpha=0.11, lw=0)


def _handles(runs: Runs, **look: Any) -> list[Line2D]:
    """An entry of the legend for each variant, with its number of seeds."""
    handles = []
    for variant, group in by_variant(runs).items():
        colour, line, marker = style(variant)
        options = {"ls": line, "ms": 5, **look}
        handles.append(Line2D([], [], color=colour, marker=marker, label=f"{variant} ({len(group)})", **options))
    return handles


def _legend(axis: Axes, runs: Runs, explains: str, *more: Line2D, **look: Any) -> None:
    """The legend of arms, to the right of a figure; `explains` says what a point or line is."""
    options = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "alignment": "left", "handlelength": 3.2}
    axis.legend(handles=[*_handles(runs, **look), *more], title=f"arm (seeds)\n{explains}", **options)


def _percent(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
