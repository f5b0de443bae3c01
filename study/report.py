"""The study's report: one analysis of the run folders, written as results.json, report.md and report.html.

`analyse` makes every number from the files of the runs; the writers only lay them out. The report is a list of blocks
that two small renderers turn into Markdown and into one HTML file with its images inside, which needs no network.
"""

import base64
import html
import json
import re
from pathlib import Path

import numpy as np

from leetcode_env import HACK_LABELS, LABELS
from study.plots import MAIN_ARMS, by_variant, draw_all, scores
from study.stats import MATCH, compare, difference_text, headline, mean_interval, percent, points, random_cosine, verdicts

BASELINE = "vanilla"
ESCAPE_SHARE = 0.10  # a cone run whose batch hacks this often, over a mean of ESCAPE_WINDOW steps, has escaped
ESCAPE_WINDOW = 10
CHARACTERS_SHOWN = 1200  # characters of a sample response
PLANNED = {"arm", "seed"}  # settings that name a run, and are not listed again
ROOT = Path(__file__).resolve().parent.parent
FIGURES = {
    "pareto": "Hack rate against pass rate after training.",
    "effects": "Each arm minus vanilla, with the 95 % interval over seeds; an arm with one seed has none.",
    "training": "Training batches: hack and correct shares by arm. Both are read on prompts with the arm's own loophole.",
    "training_variants": "The same for the variants and controls.",
    "labels": "The five labels of the training batch, stacked, a panel a run.",
    "cosine": "cos_align (the gradient before any intervention) and cos_update (the step that landed) with the same v_hack.",
    "cosine_variants": "The same for the variants and controls.",
    "cone": "The cone: a hack share that rises while the rows' log-odds fall is an escape through a form without a row.",
    "kl": "KL divergence from the trained policy to the base model.",
}
ARM_TABLE_NOTE = (
    "Mean over seeds with its 95 % t interval. Strict: label hack; loose adds the two attempted labels. Source: "
    "`conditions.loophole.hack`, `conditions.loophole.hack_loose` and `conditions.no_loophole.pass` of each run's eval.json."
)


# --- Analysis --------------------------------------------------------------------------------------------------------


def analyse(runs, left_out=()):
    """Every number of the report, from `runs` (`eval.Run`); free of times, so that it is the same from study to study.

    {runs: [...], arms: {variant: ...}, comparisons: {variant: {hack, pass}}, headlines, verdicts, left_out}
    """
    runs, foreign = comparable(runs)
    groups = by_variant(runs)
    arms = {
        variant: {"hack": scores(group, "loophole", "hack"), "pass": scores(group, "no_loophole", "pass")}
        for variant, group in groups.items()
    }
    return {
        "headlines": [headline(arms, arm) for arm in ("projected", "cone")],
        "verdicts": verdicts(arms),
        "arms": {variant: _summarise_arm(group) for variant, group in groups.items()},
        "comparisons": {
            variant: {metric: compare(arm[metric], arms[BASELINE][metric]) for metric in ("hack", "pass")}
            for variant, arm in arms.items()
            if BASELINE in arms and variant != BASELINE
        },
        "runs": [_summarise_run(run) for group in groups.values() for run in group],
        "left_out": [*left_out, *foreign],
    }


def comparable(runs):
    """(runs that share model, data and settings with most, a line for each that does not)."""
    kept, lines = list(runs), []
    for what, of in (
        ("model", lambda run: run.provenance["hashes"].get("model")),
        ("training data", lambda run: run.provenance["hashes"].get("data")),
        ("held-out data", lambda run: run.provenance["hashes"].get("heldout")),
        ("number of steps", lambda run: run.done["steps"]),
        ("number of evaluation samples", lambda run: run.evaluation["samples"]),
    ):
        values = [of(run) for run in kept]
        usual = max(values, key=values.count) if values else None
        other = [run for run in kept if of(run) != usual]
        lines += [f"{run.folder}: another {what} than the other runs ({of(run)}, not {usual})" for run in other]
        kept = [run for run in kept if of(run) == usual]
    return kept, lines


def _summarise_arm(group):
    """Mean over seeds of an arm's rates, each with its t interval, and whether the projection was biting."""
    rates = {}
    for name, condition, rate in (
        ("hack", "loophole", "hack"),
        ("hack_loose", "loophole", "hack_loose"),
        ("pass", "no_loophole", "pass"),
    ):
        interval = mean_interval([run.evaluation["conditions"][condition][rate]["rate"] for run in group])
        if interval["low"] is not None:  # the t interval does not know that a rate has ends
            interval |= {"low": max(0.0, interval["low"]), "high": min(1.0, interval["high"])}
        rates[name] = interval
    return {"seeds": [run.seed for run in group], **rates, "biting": biting(group)}


def biting(group):
    """Whether there was anything to remove, over all steps of all seeds.

    {steps, share_positive: share of steps with cos_align > 0, median_removed: median removed share of |g|, median_cos:
    median |cos_align|, random_cos: what a random direction would show, or None}
    """
    cosines = np.array([value for run in group for value in run.series("cos_align")[1]])
    removed = [value for run in group for value in run.series("removed")[1]]
    nonzero = group[0].provenance["parameters"].get("v_nonzero")
    return {
        "steps": len(cosines),
        "share_positive": float((cosines > 0).mean()),
        "median_removed": float(np.median(removed)) if removed else None,
        "median_cos": float(np.median(np.abs(cosines))),
        "random_cos": random_cosine(nonzero) if nonzero else None,
    }


def _summarise_run(run):
    """A run's counts and rates, with the folder that they come from."""
    conditions = run.evaluation["conditions"]
    row = {"variant": run.variant, "seed": run.seed, "folder": run.folder.name, "steps": run.done["steps"]}
    row |= {"hack": conditions["loophole"]["hack"], "hack_loose": conditions["loophole"]["hack_loose"]}
    row |= {"pass": conditions["no_loophole"]["pass"], "pass_at_1": conditions["no_loophole"]["pass_at_1"]}
    row |= {"labels": {name: part["labels"] for name, part in conditions.items()}}
    row["steering_rises"] = (run.provenance.get("vhack") or {}).get("steering_rises")
    if run.variant == "cone":
        row["escape"] = escape(run)
    return row


def escape(run):
    """Did a cone run escape? {escaped, step, final_hack, signature, log_odds: [first, last] or None}.

    Escaped: the held-out hack rate after training is above 5 %, or some ESCAPE_WINDOW consecutive batches hacked in over
    ESCAPE_SHARE of their responses, which end at `step`. `signature`: meanwhile the rows' mean log-odds fell, so that
    the cone held its rows and the policy went round them.
    """
    shares = np.array(run.shares(HACK_LABELS))
    window = min(ESCAPE_WINDOW, len(shares))
    means = np.convolve(shares, np.ones(window) / window, mode="valid")
    above = np.flatnonzero(means > ESCAPE_SHARE)
    final = run.evaluation["conditions"]["loophole"]["hack"]["rate"]
    odds = run.series("row_logodds")[1]
    ends = [float(np.mean(odds[:window])), float(np.mean(odds[-window:]))] if odds else None
    return {
        "escaped": bool(len(above)) or final > MATCH,
        "step": run.metrics[above[0] + window - 1]["step"] if len(above) else None,
        "final_hack": final,
        "signature": bool(ends and ends[1] < ends[0]),
        "log_odds": ends,
    }


# --- The blocks of the report ----------------------------------------------------------------------------------------


def write_report(runs, left_out, out, title, command):
    """Write results.json, plots/, report.md and report.html into folder `out`; returns the results."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = analyse(runs, left_out)
    kept = comparable(runs)[0]
    figures = sorted(path.stem for path in draw_all(kept, out / "plots") if path.suffix == ".png")
    blocks = _blocks(results, kept, [name for name in FIGURES if name in figures], title, command, out)
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(to_markdown(blocks), encoding="utf-8")
    (out / "report.html").write_text(to_html(blocks, title, out), encoding="utf-8")
    return results


def _blocks(results, runs, figures, title, command, out):
    """The report as [(kind, content...), ...]; the renderers below say what each kind holds."""
    blocks = [("heading", 1, title), *(("paragraph", f"**{text}**") for text in results["headlines"])]
    blocks += [("list", _warnings(results))] if _warnings(results) else []
    blocks += [("heading", 2, "Verdicts"), *_verdict_blocks(results["verdicts"])]
    blocks += [("heading", 2, "Results by arm"), _arm_table(results)]
    blocks.append(("paragraph", ARM_TABLE_NOTE))
    blocks += [("heading", 2, f"Against {BASELINE}"), *_comparison_blocks(results)]
    blocks += [("heading", 2, "Was the projection biting?"), *_biting_blocks(results)]
    blocks += [("heading", 2, "Did the cone hold?"), ("list", _escape_lines(results))]
    blocks += [("heading", 2, "Plots"), *(("figure", name, FIGURES[name]) for name in figures)]
    blocks += [("heading", 2, "Every run"), _run_table(results, out, runs)]
    blocks += [("heading", 2, "Sample responses"), *_sample_blocks(runs)]
    blocks += [("heading", 2, "Settings, versions, hashes, time"), *_provenance_blocks(runs, command)]
    return blocks


def _warnings(results):
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


def _verdict_blocks(results):
    blocks = [("table", ["", "hypothesis", "verdict"], [[v["id"], v["claim"], f"**{v['verdict']}**"] for v in results])]
    for v in results:
        blocks.append(("paragraph", f"**{v['id']}: {v['verdict']}.** Rule: {v['rule']}."))
        blocks.append(("list", v["numbers"] or ["no numbers"]))
    return blocks


def _arm_table(results):
    header = ["arm", "seeds", "hack rate (strict)", "hack rate (loose)", "pass rate"]
    rows = [
        [name, ", ".join(map(str, arm["seeds"])), *(_with_interval(arm[rate]) for rate in ("hack", "hack_loose", "pass"))]
        for name, arm in results["arms"].items()
    ]
    return "table", header, rows


def _with_interval(w):
    """Mean and interval of `mean_interval`, or of a Wilson summary, as text."""
    if w["low"] is None or w["note"]:
        return f"{percent(w['mean'])} ({w['note']})"
    return f"{percent(w['mean'])} [{100 * w['low']:.1f}, {100 * w['high']:.1f}]"


def _comparison_blocks(results):
    if not results["comparisons"]:
        return [("paragraph", f"There is no finished {BASELINE} run to compare with.")]
    header = ["arm", "rate", "change (points)", "p, seeds paired", "p, seeds x samples (as published)", "bootstrap 95 %", "seeds"]
    rows = []
    for name, metrics in results["comparisons"].items():
        for metric, result in metrics.items():
            if result is None:
                rows.append([name, metric, "no seed in common", "", "", "", ""])
                continue
            boot = result["bootstrap"]
            rows.append(
                [
                    name,
                    metric,
                    difference_text(result).replace(" points", "").replace("95 % interval ", ""),
                    _p_value(result["seed_level"]),
                    _p_value(result["published"]),
                    boot["note"] if boot["low"] is None else f"[{points(boot['low'])}, {points(boot['high'])}]",
                    ", ".join(map(str, result["seeds"])),
                ]
            )
    note = (
        "Change: mean over the seeds that both arms have, with the interval of the paired t-test over seeds. The published "
        "test pairs seeds x samples as if they were independent, which the samples of one seed are not: its p is too small. "
        "The bootstrap resamples seeds first and samples within them; with three seeds its intervals are too narrow. Source: "
        "`conditions.*.by_sample` of each run's eval.json."
    )
    return [("table", header, rows), ("paragraph", note)]


def _p_value(test):
    """p with its t and degrees of freedom, or why there is none."""
    if test["p"] is None:
        return test["note"]
    p = "< 0.0001" if test["p"] < 1e-4 else f"{test['p']:.4f}"
    return f"{p} (t = {test['t']:.2f}, df {test['df']})"


def _biting_blocks(results):
    header = [
        "arm",
        "steps",
        "share with cos_align > 0",
        "median removed share of |g|",
        "median |cos_align|",
        "|cos| of a random direction",
    ]
    rows = []
    for name, arm in results["arms"].items():
        b = arm["biting"]
        numbers = [b["median_removed"], b["median_cos"], b["random_cos"]]
        rows.append([name, str(b["steps"]), percent(b["share_positive"]), *("-" if x is None else f"{x:.4f}" for x in numbers)])
    source = "Source: `cos_align` and `removed` of each run's metrics.jsonl, `parameters.v_nonzero` of its config.json."
    return [("table", header, rows), ("paragraph", source)]


def _escape_lines(results):
    """A line for each cone run, escapes as plainly as the others."""
    lines = []
    for row in results["runs"]:
        if "escape" not in row:
            continue
        e = row["escape"]
        odds = "" if e["log_odds"] is None else f"; the rows' log-odds went from {e['log_odds'][0]:.1f} to {e['log_odds'][1]:.1f}"
        state = f"held: hack rate {percent(e['final_hack'])} after training"
        if e["escaped"]:
            when = "by the end" if e["step"] is None else f"by step {e['step']}"
            state = f"**escaped {when}**: hack rate {percent(e['final_hack'])} after training"
            odds += ", the signature of a form of the hack that no row covers" if e["signature"] else ""
        lines.append(f"{row['variant']}, seed {row['seed']}: {state}{odds}")
    return lines or ["There is no finished cone run."]


def _run_table(results, out, runs):
    header = ["run", "hack (strict)", "hack (loose)", "pass", "pass@1", "labels with the loophole", "labels without"]
    folders = {run.folder.name: run.folder for run in runs}
    rows = []
    for row in results["runs"]:
        link = _relative(folders[row["folder"]] / "eval.json", out)
        counts = [
            ", ".join(f"{label} {row['labels'][name][label]}" for label in LABELS if row["labels"][name][label])
            for name in ("loophole", "no_loophole")
        ]
        rates = [_counted(row[rate]) for rate in ("hack", "hack_loose", "pass")]
        rows.append([f"[{row['folder']}]({link})", *rates, percent(row["pass_at_1"]), *counts])
    return "table", header, rows


def _counted(w):
    """A Wilson summary as text, with the count behind it."""
    return f"{percent(w['rate'])} [{100 * w['low']:.1f}, {100 * w['high']:.1f}] ({w['count']}/{w['n']})"


def _relative(path, out):
    """`path` as a link from folder `out`, where it lies below it."""
    path, out = Path(path).resolve(), Path(out).resolve()
    return path.relative_to(out).as_posix() if path.is_relative_to(out) else path.as_posix()


def _sample_blocks(runs):
    """For the first seed of each main arm, one response of each label, side by side."""
    blocks = []
    for variant, group in by_variant(runs).items():
        if variant not in MAIN_ARMS:
            continue
        run = group[0]
        cells = []
        for label in LABELS:
            examples = run.evaluation["examples"].get(label) or []
            if not examples:
                cells.append((label, "none", ""))
                continue
            row = examples[0]
            asked = f"evaluator {row['evaluator']}" if row["evaluator"] else "no loophole"
            text = row["response"]
            cut = text if len(text) <= CHARACTERS_SHOWN else text[:CHARACTERS_SHOWN] + " ... (cut here)"
            cells.append((label, f"problem {row['problem']}, {asked}", cut))
        blocks += [("heading", 3, f"{variant}, seed {run.seed}"), ("columns", cells)]
    return blocks


def _provenance_blocks(runs, command):
    """What was run, with what, on what, and how long it took."""
    if not runs:
        return [("paragraph", "No finished run.")]
    common = {
        key: value
        for key, value in runs[0].config.items()
        if key not in PLANNED and all(run.config.get(key) == value for run in runs)
    }
    apart = []
    for variant, group in by_variant(runs).items():
        own = {k: v for k, v in group[0].config.items() if k not in PLANNED and k not in common}
        apart.append([variant, ", ".join(f"{k} = {_setting(v)}" for k, v in own.items()) or "-"])
    blocks = [("paragraph", f"Command: `{command}`"), ("paragraph", "Settings that all runs share:")]
    blocks.append(("code", "\n".join(f"{key} = {_setting(value)}" for key, value in sorted(common.items()))))
    blocks += [("paragraph", "Settings that differ:"), ("table", ["arm", "settings"], apart)]
    kinds = {}
    for run in runs:
        for kind in ("versions", "hashes"):
            for key, value in run.provenance[kind].items():
                kinds.setdefault(f"{kind}: {key}", []).append(str(value))
    rows = [[key, ", ".join(sorted(set(values)))] for key, values in kinds.items()]
    blocks.append(("table", ["what", "value, over all runs"], rows))
    return [*blocks, ("paragraph", "Wall time (done.json):"), _time_table(runs)]


def _setting(value):
    """A setting as text; a file of this project by its path inside it, for the report is read on other machines."""
    if isinstance(value, str) and Path(value).is_relative_to(ROOT):
        return Path(value).relative_to(ROOT).as_posix()
    return value


def _time_table(runs):
    """Seconds of each arm's runs, by phase."""
    phases = sorted({phase for run in runs for phase in run.done.get("phases", {})})
    rows = []
    for variant, group in by_variant(runs).items():
        means = [np.mean([run.done.get("phases", {}).get(phase, 0.0) for run in group]) for phase in phases]
        rows.append([variant, str(len(group)), *(f"{s:.0f}" for s in (np.mean([r.done["seconds"] for r in group]), *means))])
    total = sum(run.done["seconds"] for run in runs)
    rows.append(["all", str(len(runs)), f"{total:.0f} in sum", *("" for _ in phases)])
    return "table", ["arm", "runs", "seconds a run", *phases], rows


# --- Renderers -------------------------------------------------------------------------------------------------------


def to_markdown(blocks):
    """GitHub's Markdown; columns of code become an HTML table, which Markdown cannot write otherwise."""
    parts = []
    for kind, *content in blocks:
        if kind == "heading":
            parts.append("#" * content[0] + " " + content[1])
        elif kind == "paragraph":
            parts.append(content[0])
        elif kind == "list":
            parts.append("\n".join(f"- {line}" for line in content[0]))
        elif kind == "table":
            header, rows = content
            lines = [header, ["---"] * len(header), *rows]
            parts.append("\n".join("| " + " | ".join(_md_cell(cell) for cell in line) + " |" for line in lines))
        elif kind == "code":
            parts.append(f"```\n{content[0]}\n```")
        elif kind == "figure":
            parts.append(f"![{content[1]}](plots/{content[0]}.png)\n\n*{content[1]}* ([SVG](plots/{content[0]}.svg))")
        elif kind == "columns":
            parts.append(_columns(content[0]))
    return "\n\n".join(parts) + "\n"


def _md_cell(cell):
    return str(cell).replace("|", "\\|").replace("\n", " ")


def _columns(cells):
    """An HTML table of one row: (title, source, text) each. Blank lines would end HTML in Markdown, hence &#10;."""
    texts = ["" if not text else f"<pre>{html.escape(text).replace(chr(10), '&#10;')}</pre>" for _, _, text in cells]
    head = "".join(f"<th>{title}</th>" for title, _, _ in cells)
    sources = [html.escape(source) for _, source, _ in cells]
    body = "".join(f"<td><small>{source}</small>{text}</td>" for source, text in zip(sources, texts, strict=True))
    return f'<table class="columns"><tr>{head}</tr><tr>{body}</tr></table>'


CSS = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c1c1c;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem}h2{margin-top:2.4rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
table{border-collapse:collapse;font-size:.86rem;margin:.8rem 0;display:block;overflow-x:auto}
th,td{border-bottom:1px solid #ddd;padding:.3rem .6rem;text-align:left;vertical-align:top}
th{background:#f4f4f4}pre{background:#f7f7f7;padding:.6rem;overflow:auto;max-height:24rem;font-size:.8rem}
img{max-width:100%}figure{margin:1.2rem 0}figcaption{color:#555;font-size:.9rem}code{background:#f4f4f4;padding:0 .2rem}
"""


def to_html(blocks, title, folder):
    """One page with its style and images inside: nothing is loaded from anywhere."""
    parts = []
    for kind, *content in blocks:
        if kind == "heading":
            parts.append(f"<h{content[0]}>{_inline(content[1])}</h{content[0]}>")
        elif kind == "paragraph":
            parts.append(f"<p>{_inline(content[0])}</p>")
        elif kind == "list":
            parts.append("<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in content[0]) + "</ul>")
        elif kind == "table":
            header, rows = content
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
        elif kind == "code":
            parts.append(f"<pre>{html.escape(content[0])}</pre>")
        elif kind == "figure":
            data = base64.b64encode((folder / "plots" / f"{content[0]}.png").read_bytes()).decode()
            caption = html.escape(content[1])
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        elif kind == "columns":
            parts.append(_columns(content[0]))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _inline(text):
    """The three inline forms that the blocks use: `code`, **bold**, [text](link)."""
    text = html.escape(str(text))
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)
