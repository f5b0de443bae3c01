"""The plots of the study, from run folders that `eval.read_runs` has read: PNG to look at, SVG to zoom into.

Every arm has a shade, a line style and a marker of its own, so that a figure printed in grey still tells them apart.
A figure with nothing to show is not drawn.
"""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from leetcode_env import HACK_LABELS, PASS_LABELS
from study.stats import compare, pareto_front, random_cosine

matplotlib.use("Agg")  # no display is needed, and none may be there

WINDOW = 5  # steps of the trailing mean: a batch of 128 responses is a noisy sample of the policy
COSINE_WINDOW = 15  # cosines of single gradients are noisier still
MAIN_ARMS = ("vanilla", "projected", "cone", "rebound", "random", "no_loophole")
REFERENCE_ARM = "no_loophole"  # trained where there is nothing to hack: a ceiling, not a competitor

# Variant: (colour, line style, marker). Colours after Okabe & Ito, told apart by the colour-blind too.
STYLES = {
    "vanilla": ("#000000", "-", "o"),
    "projected": ("#0072B2", (0, (6, 2)), "s"),
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


def draw_all(runs, out):
    """Draw every figure that `runs` have data for into folder `out`; returns the paths written (two a figure)."""
    out.mkdir(parents=True, exist_ok=True)
    main = [run for run in runs if run.variant in MAIN_ARMS]
    rest = [run for run in runs if run.variant not in MAIN_ARMS]
    figures = {
        "pareto": lambda: pareto(runs),
        "effects": lambda: effects(runs),
        "training": lambda: training(main),
        "training_variants": lambda: training(rest),
        "labels": lambda: labels(runs),
        "cosine": lambda: cosine(main),
        "cosine_variants": lambda: cosine(rest),
        "cone": lambda: cone(runs),
        "kl": lambda: kl(runs),
    }
    paths = []
    with plt.rc_context(RC):
        for name, draw in figures.items():
            figure = draw()
            if figure is None:
                continue
            for suffix, options in ((".png", {"dpi": 160}), (".svg", {"metadata": {"Date": None}})):
                path = out / f"{name}{suffix}"
                figure.savefig(path, bbox_inches="tight", **options)
                paths.append(path)
            plt.close(figure)
    return paths


def style(variant):
    return STYLES.get(variant, UNKNOWN_STYLE)


def by_variant(runs):
    """{variant: runs}, in the order of STYLES, unknown ones last."""
    order = list(STYLES)
    names = sorted({run.variant for run in runs}, key=lambda v: (order.index(v) if v in order else len(order), v))
    return {name: sorted((r for r in runs if r.variant == name), key=lambda r: r.seed) for name in names}


def smooth(values, window=WINDOW):
    """Trailing mean over at most `window` values; same length."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def pareto(runs):
    """Hack rate against pass rate: a small point a run with its Wilson intervals, a large one an arm's mean."""
    if not runs:
        return None
    figure, axis = plt.subplots(figsize=(7.6, 5.2))
    means = {}
    for variant, group in by_variant(runs).items():
        colour, _, marker = style(variant)
        conditions = [run.evaluation["conditions"] for run in group]
        rates = [(c["loophole"]["hack"], c["no_loophole"]["pass"]) for c in conditions]
        for hack, passed in rates:
            axis.errorbar(
                hack["rate"],
                passed["rate"],
                xerr=_arms_of(hack),
                yerr=_arms_of(passed),
                fmt=marker,
                ms=4.5,
                color=colour,
                alpha=0.55,
                elinewidth=0.8,
            )
        means[variant] = tuple(float(np.mean([w["rate"] for w in side])) for side in zip(*rates, strict=True))
        axis.plot(*means[variant], marker, ms=10, color=colour, mec="white", mew=0.9, zorder=5)
    _draw_front(axis, means)
    if "rebound" in means:
        axis.annotate(
            "Rebound",
            means["rebound"],
            xytext=(34, 26),
            textcoords="offset points",
            fontweight="bold",
            arrowprops={"arrowstyle": "->", "color": "#333333", "shrinkB": 6},
        )
    axis.set(xlabel="hack rate, unseen evaluator names (strict)", ylabel="pass rate, no loophole", xlim=(-0.03, 1.0))
    axis.set_ylim(-0.02, max(0.1, 1.15 * axis.get_ylim()[1]))
    axis.set_title("Better is up and to the left")
    _percent(axis.xaxis, axis.yaxis)
    handles = [Line2D([], [], color=style(v)[0], marker=style(v)[2], ls="", ms=8, label=_with_seeds(v, runs)) for v in means]
    handles.append(Line2D([], [], color="#444444", lw=1, label="Pareto front of the means\n(no_loophole left out)"))
    title = "arm (seeds)\nlarge: mean of the seeds\nsmall: a run, 95 % intervals"
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), title=title, alignment="left")
    return figure


def _arms_of(w):
    """Error bar of a Wilson summary: [[below], [above]]."""
    return [[w["rate"] - w["low"]], [w["high"] - w["rate"]]]


def _draw_front(axis, means):
    """Pareto front as a staircase, from the least hack rate to the right edge."""
    front = pareto_front([point for variant, point in means.items() if variant != REFERENCE_ARM])
    if front:
        x, y = zip(*front, strict=True)
        axis.step([x[0], *x, 1.0], [0.0, *y, y[-1]], where="post", color="#444444", lw=1, zorder=1)


def _with_seeds(variant, runs):
    count = sum(run.variant == variant for run in runs)
    return f"{variant} ({count})"


def effects(runs, baseline="vanilla"):
    """Each arm minus vanilla, in points, with the seed-level 95 % interval (none for a single seed)."""
    groups = by_variant(runs)
    names = [v for v in groups if v != baseline]
    if baseline not in groups or not names:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 0.9 + 0.3 * len(names)), sharey=True)
    titles = ("hack rate: change from vanilla (points)", "pass rate: change from vanilla (points)")
    for axis, (condition, rate), title in zip(axes, (("loophole", "hack"), ("no_loophole", "pass")), titles, strict=True):
        for row, variant in enumerate(names):
            result = compare(scores(groups[variant], condition, rate), scores(groups[baseline], condition, rate))
            if result is None:
                continue
            level = result["seed_level"]
            colour, _, marker = style(variant)
            if level["low"] is not None:
                axis.plot([100 * level["low"], 100 * level["high"]], [row, row], color=colour, lw=2, alpha=0.6)
            axis.plot(100 * level["mean"], row, marker, color=colour, ms=7.5, mec="white", mew=0.4)
        axis.axvline(0, color="#333333", lw=1)
        axis.set_title(title)
    axes[0].set_yticks(range(len(names)), [_with_seeds(v, runs) for v in names])
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


def scores(runs, condition, rate):
    """{seed: rate of the k-th samples, k = 0..} of runs of one variant."""
    return {run.seed: run.evaluation["conditions"][condition]["by_sample"][rate] for run in runs}


def training(runs):
    """Hack and correct share of the training batch over steps: mean over seeds, band from the lowest to the highest."""
    if not runs:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10.2, 3.9))
    for axis, names, title in ((axes[0], HACK_LABELS, "hack (strict)"), (axes[1], PASS_LABELS, "correct")):
        for variant, group in by_variant(runs).items():
            _band(axis, variant, [([line["step"] for line in r.metrics], smooth(r.shares(names))) for r in group])
        axis.set(title=f"{title}, share of the batch", xlabel="step")
        axis.set_ylim(0, None)
        _percent(axis.yaxis)
    _legend_right(axes[1], runs)
    figure.tight_layout()
    return figure


def _band(axis, variant, curves):
    """Mean of the seeds' curves with the band between the lowest and the highest, over the steps that all have."""
    common = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    if not common:
        return
    rows = np.array([[dict(zip(steps, values, strict=True))[s] for s in common] for steps, values in curves])
    colour, line, marker = style(variant)
    axis.plot(common, rows.mean(0), color=colour, ls=line, marker=marker, ms=5, markevery=max(1, len(common) // 8))
    if len(rows) > 1:
        axis.fill_between(common, rows.min(0), rows.max(0), color=colour, alpha=0.11, lw=0)


def _legend_right(axis, runs, window=WINDOW):
    handles = [
        Line2D([], [], color=style(v)[0], ls=style(v)[1], marker=style(v)[2], ms=5, label=_with_seeds(v, runs))
        for v in by_variant(runs)
    ]
    title = f"arm (seeds)\nband: lowest to highest seed\nmean of {window} steps"
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), title=title, alignment="left", handlelength=3.2)


def labels(runs):
    """The five labels stacked over steps, a panel a run."""
    if not runs:
        return None
    ordered = [run for group in by_variant(runs).values() for run in group]
    columns = min(6, len(ordered))
    rows = -(-len(ordered) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(0.6 + 2.0 * columns, 0.7 + 1.55 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis, run in zip(axes.flat, ordered, strict=False):
        stack = [smooth(run.shares((label,))) for label in LABEL_STYLES]
        areas = axis.stackplot(
            [line["step"] for line in run.metrics], stack, colors=[colour for colour, _ in LABEL_STYLES.values()]
        )
        for area, (_, hatch) in zip(areas, LABEL_STYLES.values(), strict=True):
            area.set(hatch=hatch, edgecolor="#555555", linewidth=0.3)
        axis.set_title(f"{run.variant}, seed {run.seed}", fontsize=8)
        axis.set_ylim(0, 1)
        axis.margins(x=0)
        _percent(axis.yaxis)
    for axis in axes.flat[len(ordered) :]:
        axis.set_visible(False)
    for column in range(columns):  # the lowest visible panel of a column carries the step axis
        visible = [row for row in range(rows) if axes[row, column].get_visible()]
        axes[visible[-1], column].set_xlabel("step")
        axes[visible[-1], column].tick_params(labelbottom=True)
    figure.tight_layout()
    figure.legend(areas, list(LABEL_STYLES), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, handlelength=1.6)
    return figure


def cosine(runs):
    """cos_align (the gradient before projection) and cos_update (the step that landed) over steps; the grey band is what
    a random direction would show."""
    if not runs:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10.2, 3.9), sharey=True)
    nonzero = [run.provenance["parameters"].get("v_nonzero") for run in runs]
    nonzero = [n for n in nonzero if n]
    titles = {"cos_align": "cos_align: gradient and v_hack", "cos_update": "cos_update: landed step and v_hack"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        if nonzero:
            size = random_cosine(int(np.median(nonzero)))
            axis.axhspan(-size, size, color="#BBBBBB", alpha=0.45, lw=0, zorder=0)
        axis.axhline(0, color="#333333", lw=0.8)
        for variant, group in by_variant(runs).items():
            curves = [run.series(key) for run in group]
            _band(axis, variant, [(steps, smooth(values, COSINE_WINDOW)) for steps, values in curves])
        axis.set(title=title, xlabel="step")
    if nonzero:
        note = f"grey: ± E|cos| of a random direction, {size:.4f}"
        axes[0].text(0.02, 0.02, note, transform=axes[0].transAxes, fontsize=8.5, color="#444444")
    _legend_right(axes[1], runs, COSINE_WINDOW)
    figure.tight_layout()
    return figure


def cone(runs):
    """How a cone run escapes: its rows' log-odds keep falling while the hack share rises. A line a seed."""
    chosen = [run for run in runs if run.variant == "cone" and run.series("row_logodds")[0]]  # the controls' rows are no hacks
    if not chosen:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10.2, 3.6))
    marks = ("o", "s", "^", "D", "v", "P", "X", "*")
    for run in chosen:
        colour, line, _ = style(run.variant)
        look = {"color": colour, "ls": line, "marker": marks[run.seed % len(marks)], "ms": 5, "lw": 1.3}
        look["markevery"] = max(1, len(run.metrics) // 8)
        axes[0].plot([m["step"] for m in run.metrics], smooth(run.shares(HACK_LABELS)), **look)
        steps, odds = run.series("row_logodds")
        axes[1].plot(steps, smooth(odds), label=f"{run.variant}, seed {run.seed}", **look)
    axes[0].set(title="hack (strict), share of the batch", xlabel="step")
    axes[0].set_ylim(0, None)
    _percent(axes[0].yaxis)
    axes[1].set(title="mean log-odds of hacking over the cone's rows", xlabel="step")
    axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=3.2)
    figure.tight_layout()
    return figure


def kl(runs):
    """KL divergence to the base model over steps (nats per token), main arms and variants side by side."""
    runs = [run for run in runs if run.series("kl")[0]]
    if not runs:
        return None
    panels = {
        "arms": [run for run in runs if run.variant in MAIN_ARMS],
        "variants and controls": [run for run in runs if run.variant not in MAIN_ARMS],
    }
    panels = {name: panel for name, panel in panels.items() if panel}
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 3.9), sharey=True, squeeze=False)
    for axis, (name, panel) in zip(axes[0], panels.items(), strict=True):
        for variant, group in by_variant(panel).items():
            _band(axis, variant, [(steps, smooth(values)) for steps, values in (r.series("kl") for r in group)])
        axis.set(title=f"KL to the base model: {name}", xlabel="step", ylabel="nats per token")
        axis.set_ylim(0, None)
        handles = [
            Line2D([], [], color=style(v)[0], ls=style(v)[1], marker=style(v)[2], ms=5, label=v) for v in by_variant(panel)
        ]
        axis.legend(handles=handles, loc="upper left", handlelength=3.2, fontsize=8.5)
    figure.tight_layout()
    return figure


def _percent(*axes):
    for axis in axes:
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
