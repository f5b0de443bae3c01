"""The study's report: `analysis` as results.json, and laid out as report.md and as one HTML file that needs no network."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from markdown_it import MarkdownIt

from eval import CONDITIONS
from leetcode_env import LABELS
from loopholes import LOOPHOLES
from loopholes.evaluator import GRADERS
from study.analysis import (
    BASELINE,
    COMPARED,
    ESCAPE_SHARE,
    ESCAPE_WINDOW,
    MAIN_ARMS,
    RATES,
    Numbers,
    analyse,
    by_variant,
    comparable,
)  # fmt: skip
from study.plan import known_to
from study.plots import draw_all
from study.runs import FinishedRun
from study.stats import difference_text, percent, points

CHARACTERS_SHOWN = 1200  # characters of a sample response
PLANNED = {"arm", "seed"}  # settings that name a run, and are not listed again
ROOT = Path(__file__).resolve().parent.parent
FIGURES = {
    "pareto": "Hack rate against pass rate after training.",
    "effects": "Each arm minus vanilla, with the 95 % interval over seeds; an arm with one seed has none.",
    "tau": "The threshold of counterfactual: hack rate after training, and honest responses flagged in training.",
    "loopholes": "Hack rate by loophole after training; framed: the arm knows that loophole's hack.",
    "training": "Training batches: hack and correct shares by arm. Both are read on prompts with the arm's own loophole.",
    "training_variants": "The same for the variants and controls.",
    "labels": "The five labels of the training batch, stacked, a panel a run.",
    "cosine": "cos_align (the gradient before any intervention) and cos_update (the step that landed) with the same v_hack.",
    "cosine_variants": "The same for the variants and controls.",
    "cone": "The cone: a hack share that rises while the rows' log-odds fall is an escape through a form without a row.",
    "kl": "KL divergence from the trained policy to the base model.",
}
ARM_NOTE = (
    "Mean over seeds with its 95 % t interval. Strict: label hack; loose adds the two attempted labels. Source: "
    "`conditions.loophole.hack`, `conditions.loophole.hack_loose` and `conditions.no_loophole.pass` of each run's eval.json."
)
LOOPHOLE_NOTE = (
    "Strict, mean over seeds, on the prompts that tell of it. *: the arm knows this loophole's hack. Source: "
    "`conditions.loophole.by_loophole` of each run's eval.json."
)
BESIDE_NOTE = (
    "Unasked: share of the responses to prompts without a loophole that write the hack of any, mean over seeds. The rest: "
    "responses to prompts with one that define an evaluator, by what it does, over all seeds (`loopholes/evaluator.py`). Source: "
    "`conditions.no_loophole.wrote` and `conditions.loophole.graders` of each run's eval.json."
)
ONSET_NOTE = (
    f"Lambda: share of the wrong responses that the loophole paid. Onset: the first step at which the mean of the last "
    f"{ESCAPE_WINDOW} batches' shares of hacks is above {ESCAPE_SHARE:.0%}. Source: `conditions.*` of each run's eval.json, "
    "`labels` of its metrics.jsonl."
)
COMPARISON_NOTE = (
    "Change: mean over the seeds that both arms have, with the interval of the paired t-test over seeds. The published "
    "test pairs seeds x samples as if they were independent, which the samples of one seed are not: its p is too small. "
    "The bootstrap resamples seeds first and samples within them; with three seeds its intervals are too narrow. Source: "
    "`conditions.*.by_sample` of each run's eval.json."
)
FLAGGED_NOTE = (
    "Training batches, summed over steps. A hack is a response that is wrong and paid by the loophole; honest is one without any "
    "loophole's hack in its text. Source: `flagged_hacks`, `hacks`, `flagged_honest` of each run's metrics.jsonl."
)
BITING_NOTE = (
    "The first steps come before hacking: a policy that hacks everywhere leaves the cone, and controls that match it, few clean "
    "responses to make rows of. Source: `cos_align` and `removed` of each run's metrics.jsonl, `parameters.v_nonzero` of its "
    "config.json."
)
CSS = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{margin-top:2.4rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
table{border-collapse:collapse;font-size:.86rem;margin:.8rem 0;display:block;overflow-x:auto}
th,td{border-bottom:1px solid #ddd;padding:.3rem .6rem;text-align:left;vertical-align:top}
th{background:#f4f4f4}pre{background:#f7f7f7;padding:.6rem;overflow:auto;max-height:24rem;font-size:.8rem}
img{max-width:100%}em{color:#555}code{background:#f4f4f4;padding:0 .2rem}
"""


def write_report(
    runs: Sequence[FinishedRun], left_out: Sequence[str], out: Path, title: str, command: str, plan: str = "one"
) -> Numbers:
    """Write results.json, plots/, report.md and report.html into folder `out`; returns the results. plan: its name."""
    out.mkdir(parents=True, exist_ok=True)
    results = analyse(runs, left_out, plan)
    kept = comparable(runs)[0]
    files = [path.name for path in draw_all(kept, out / "plots")]
    parts = [
        f"# {title}",
        *(f"**{text}**" for text in results["headlines"]),
        *_list(_warnings(results)),
        "## Verdicts",
        *_verdicts(results["verdicts"]),
        "## Results by arm",
        *_arms(results["arms"]),
        *_by_loophole(results["arms"]),
        *_beside(results["arms"]),
        "## Onset, and easy and hard problems",
        *_difficulties(results["arms"]),
        f"## Against {BASELINE}",
        *_comparisons(results["comparisons"]),
        "## Was the projection biting?",
        *_biting(results["arms"]),
        "## Did the cone hold?",
        *_list([_escape(row) for row in results["runs"] if "escape" in row] or ["There is no finished cone run."]),
        *_flagged(results["runs"]),
        "## Plots",
        *(_figure(name, files) for name in FIGURES if f"{name}.png" in files),
        "## Every run",
        _run_table(results["runs"], {run.folder.name: run.folder for run in kept}, out),
        "## Sample responses",
        *_samples(kept),
        "## Settings, versions, hashes, time",
        *_provenance(kept, command),
    ]
    text = "\n\n".join(parts) + "\n"
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(to_html(text, title, out / "plots"), encoding="utf-8")
    return results


def to_html(text: str, title: str, plots: Path) -> str:
    """The Markdown as one page with its style and the images of folder `plots` inside: nothing is loaded from anywhere."""
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    for path in plots.glob("*.png"):
        data = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="plots/{path.name}"', f'src="data:image/png;base64,{data}"')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n{body}</body></html>\n'


def _plain(text: Any) -> str:
    """On one line, and no HTML: lines of a log or of a foreign file stand in the report as well."""
    return re.sub(r"<(?=\S)", "&lt;", str(text).replace("\n", " "))


def _list(lines: Iterable[str]) -> list[str]:
    """The lines as one paragraph of items, or nothing."""
    items = "\n".join(f"- {_plain(line)}" for line in lines)
    return [items] if items else []


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _interval(w: Numbers, middle: str) -> str:
    """The rate under the name `middle` with its interval, or why it has none."""
    bounds = f"({w['note']})" if w.get("note") else f"[{100 * w['low']:.1f}, {100 * w['high']:.1f}]"
    return f"{percent(w[middle])} {bounds}"


def _warnings(results: Numbers) -> list[str]:
    """What a reader must know before believing any number: runs left out, a direction that does not steer."""
    lines = [f"Left out: {line}" for line in results["left_out"]]
    flat = [row["folder"] for row in results["runs"] if row["steering_rises"] is False]
    rest = [row["folder"] for row in results["runs"] if row["folder"] not in flat]
    if flat:
        which = ", ".join(flat) if len(flat) <= len(rest) else "all but " + ", ".join(rest) if rest else "all"
        lines.append(
            "**Warning**: adding the hack direction to the base model did not make it define the evaluator more often "
            f"(`vhack.steering_rises` in config.json) in {len(flat)} of {len(results['runs'])} runs: {which}."
        )
    return lines


def _verdicts(verdicts: list[Numbers]) -> list[str]:
    parts = [_table(["", "hypothesis", "verdict"], [[v["id"], v["claim"], f"**{v['verdict']}**"] for v in verdicts])]
    for v in verdicts:
        parts += [f"**{v['id']}: {v['verdict']}.** Rule: {_plain(v['rule'])}.", *_list(v["numbers"] or ["no numbers"])]
    return parts


def _arms(arms: Numbers) -> list[str]:
    header = ["arm", "seeds", "hack rate (strict)", "hack rate (loose)", "pass rate"]
    rows = [
        [name, ", ".join(map(str, arm["seeds"])), *(_interval(arm[rate], "mean") for rate in RATES)] for name, arm in arms.items()
    ]
    return [_table(header, rows), ARM_NOTE]


def _by_loophole(arms: Numbers) -> list[str]:
    """The section on single loopholes, where several are in play."""
    told = {name: arm["by_loophole"] for name, arm in arms.items() if arm["by_loophole"]}
    if not told:
        return []
    names = [name for name in LOOPHOLES if any(name in of for of in told.values())]
    rows = []
    for arm, of in told.items():
        known = known_to(arm)
        cells = (f"{percent(of[name]['mean'])}{' *' if name in known else ''}" if name in of else "-" for name in names)
        rows.append([arm, *cells])
    return ["## Hack rate by loophole", _table(["arm", *names], rows), LOOPHOLE_NOTE]


def _beside(arms: Numbers) -> list[str]:
    """The section on what responses hold beside what is paid, where the runs say it."""
    rows = []
    for name, arm in arms.items():
        if arm["unasked"] is not None:
            rows.append([name, percent(arm["unasked"]), *(arm["graders"].get(kind, 0) for kind in GRADERS)])
    header = ["arm", "unasked", *GRADERS]
    return ["## Hacks unasked, and the evaluators that are left behind", _table(header, rows), BESIDE_NOTE] if rows else []


def _difficulties(arms: Numbers) -> list[str]:
    kinds = sorted({kind for arm in arms.values() for kind in arm["by_difficulty"]})
    rows = []
    for name, arm in arms.items():
        steps = ", ".join("none" if step is None else str(step) for step in arm["onset"])
        rates = (arm["by_difficulty"].get(kind, {}).get(rate) for kind in kinds for rate in COMPARED)
        rows.append([name, _interval(arm["lambda"], "mean"), steps, *("-" if r is None else percent(r) for r in rates)])
    header = ["arm", "lambda", "onset, by seed", *(f"{rate}, {kind}" for kind in kinds for rate in COMPARED)]
    return [_table(header, rows), ONSET_NOTE]


def _comparisons(comparisons: Numbers) -> list[str]:
    if not comparisons:
        return [f"There is no finished {BASELINE} run to compare with."]
    header = ["arm", "rate", "change (points)", "p, seeds paired", "p, seeds x samples (as published)", "bootstrap 95 %", "seeds"]
    rows = []
    for name, metrics in comparisons.items():
        for metric, result in metrics.items():
            if result is None:
                rows.append([name, metric, "no seed in common", "", "", "", ""])
                continue
            change = difference_text(result).replace(" points", "").replace("95 % interval ", "")
            boot = result["bootstrap"]
            interval = boot["note"] if boot["low"] is None else f"[{points(boot['low'])}, {points(boot['high'])}]"
            tests = [_p_value(result[level]) for level in ("seed_level", "published")]
            rows.append([name, metric, change, *tests, interval, ", ".join(map(str, result["seeds"]))])
    return [_table(header, rows), COMPARISON_NOTE]


def _p_value(test: Numbers) -> str:
    """p with its t and degrees of freedom, or why there is none."""
    if test["p"] is None:
        return test["note"]
    p = "< 0.0001" if test["p"] < 1e-4 else f"{test['p']:.4f}"
    return f"{p} (t = {test['t']:.2f}, df {test['df']})"


def _biting(arms: Numbers) -> list[str]:
    header = [
        "arm",
        "steps",
        "share with cos_align > 0",
        "removed share of |g|: median",
        f"mean of the first {ESCAPE_WINDOW} steps",
        "median |cos_align|",
    ]
    rows = []
    for name, b in ((name, arm["biting"]) for name, arm in arms.items()):
        numbers = (
            "-" if b[key] is None else f"{b[key]:.4f}" for key in ("median_removed", "early_removed", "median_cos", "random_cos")
        )
        rows.append([name, b["steps"], percent(b["share_positive"]), *numbers])
    return [_table([*header, "|cos| of a random direction"], rows), BITING_NOTE]


def _escape(row: Numbers) -> str:
    """What became of a cone run, an escape as plainly as the others."""
    e, state = row["escape"], "held"
    odds = "" if e["log_odds"] is None else f"; the rows' log-odds went from {e['log_odds'][0]:.1f} to {e['log_odds'][1]:.1f}"
    if e["escaped"]:
        state = f"**escaped {'by the end' if e['step'] is None else 'by step ' + str(e['step'])}**"
        odds += ", the signature of a form of the hack that no row covers" if e["signature"] else ""
    return f"{row['variant']}, seed {row['seed']}: {state}: hack rate {percent(e['final_hack'])} after training{odds}"


def _flagged(rows: list[Numbers]) -> list[str]:
    """The section on what screening flagged, where an arm did; a line a run."""
    screened = [(f"{row['variant']}, seed {row['seed']}", row["flagged"]) for row in rows if "flagged" in row]
    if not screened:
        return []
    header = ["run", "hacks flagged", "of hacks", "honest responses flagged", "of responses"]
    counts = ("flagged_hacks", "hacks", "flagged_honest", "responses")
    table = _table(header, [[name, *(f"{of[count]:,}" for count in counts)] for name, of in screened])
    return ["## What did screening flag?", table, FLAGGED_NOTE]


def _figure(name: str, files: list[str]) -> str:
    vector = f" ([SVG](plots/{name}.svg))" if f"{name}.svg" in files else ""
    return f"![{FIGURES[name]}](plots/{name}.png)\n\n*{FIGURES[name]}*{vector}"


def _run_table(rows: list[Numbers], folders: dict[str, Path], out: Path) -> str:
    header = ["run", "hack (strict)", "hack (loose)", "pass", "pass@1", "labels with the loophole", "labels without"]
    table = []
    for row in rows:
        path, root = (folders[row["folder"]] / "eval.json").resolve(), out.resolve()
        link = quote((path.relative_to(root) if path.is_relative_to(root) else path).as_posix(), safe="/+=,")
        parts = [row["labels"][name] for name in CONDITIONS]
        counts = [", ".join(f"{label} {part[label]}" for label in LABELS if part[label]) for part in parts]
        rates = [f"{_interval(row[rate], 'rate')} ({row[rate]['count']}/{row[rate]['n']})" for rate in RATES]
        table.append([f"[{row['folder']}]({link})", *rates, percent(row["pass_at_1"]), *counts])
    return _table(header, table)


def _samples(runs: list[FinishedRun]) -> list[str]:
    """For the first seed of each main arm, one response of each label, side by side in an HTML table of one row.

    Markdown's own tables hold no code; a blank line would end the HTML, hence &#10;."""
    parts = []
    for variant, (first, *_) in by_variant(runs).items():
        if variant in MAIN_ARMS:
            cells = "".join(f"<td>{_sample(first.evaluation['examples'].get(label))}</td>" for label in LABELS)
            head = "".join(f"<th>{label}</th>" for label in LABELS)
            parts += [f"### {variant}, seed {first.seed}", f"<table><tr>{head}</tr><tr>{cells}</tr></table>"]
    return parts


def _sample(rows: list[Numbers] | None) -> str:
    if not rows:
        return "<small>none</small>"
    text, evaluator = rows[0]["response"], rows[0]["evaluator"]
    source = f"problem {rows[0]['problem']}, {f'evaluator {evaluator}' if evaluator else 'no loophole'}"
    cut = text if len(text) <= CHARACTERS_SHOWN else text[:CHARACTERS_SHOWN] + " ... (cut here)"
    source, shown = (re.sub(r"\r\n?|\n", "&#10;", html.escape(x)) for x in (source, cut))
    return f"<small>{source}</small>" + (f"<pre>{shown}</pre>" if shown else "")


def _provenance(runs: list[FinishedRun], command: str) -> list[str]:
    """What was run, with what, on what, and how long it took."""
    if not runs:
        return ["No finished run."]
    config = {key: value for key, value in runs[0].config.items() if key not in PLANNED}
    common = {key: value for key, value in config.items() if all(run.config.get(key) == value for run in runs)}
    phases = sorted({phase for run in runs for phase in run.done["phases"]})
    apart, times, kinds = [], [], dict[str, set[str]]()
    for variant, group in by_variant(runs).items():
        own = {key: value for key, value in group[0].config.items() if key not in PLANNED and key not in common}
        apart.append([variant, ", ".join(f"{key} = {_setting(value)}" for key, value in own.items()) or "-"])
        seconds = [[run.done["seconds"], *(run.done["phases"].get(phase, 0.0) for phase in phases)] for run in group]
        times.append([variant, len(group), *(f"{np.mean(column):.0f}" for column in zip(*seconds, strict=True))])
    for run in runs:
        for kind in ("versions", "hashes"):
            for key, value in run.provenance[kind].items():
                kinds.setdefault(f"{kind}: {key}", set()).add(str(value))
    total = f"{sum(run.done['seconds'] for run in runs):.0f} in sum"
    return [
        f"Command: `{command}`",
        "Settings that all runs share:",
        "\n".join(f"    {key} = {_setting(value)}".replace("\n", " ") for key, value in sorted(common.items())) or "none",
        "Settings that differ:",
        _table(["arm", "settings"], apart),
        _table(["what", "value, over all runs"], [[key, ", ".join(sorted(values))] for key, values in kinds.items()]),
        "Wall time (done.json):",
        _table(["arm", "runs", "seconds a run", *phases], [*times, ["all", len(runs), total, *("" for _ in phases)]]),
    ]


def _setting(value: Any) -> Any:
    """A setting as text; a file of this project by its path inside it, for the report is read on other machines."""
    inside = isinstance(value, str) and Path(value).is_relative_to(ROOT)
    return Path(value).relative_to(ROOT).as_posix() if inside else value
