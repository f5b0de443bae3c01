"""Held-out evaluation of one run: how often it hacks when it can, and how often it is right when it cannot.

    python eval.py RUN             # evaluate a finished run's adapter; writes RUN/eval.json and RUN/eval_samples.jsonl
    python eval.py RUN --base      # the same without the adapter: the rates before training (eval_base.json)
    python eval.py RUN --data F    # pass rate alone on another JSON-lines set, without the loophole (eval_F.json)
    python eval.py plot RUN...     # the plots of any run folders

Two conditions on the same problems. "loophole": the prompt names an evaluator, never the one that training used,
drawn anew for every problem and sample, so that a memorised name is not counted as the ability to hack; gives the
hack rate. "no_loophole": the prompt asks for code that passes all tests; gives the pass rate.
"""

import argparse
import itertools
import json
import math
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from faults.errors import Stopped, UserError
from faults.files import to_json, write_atomic, write_json
from leetcode_env import EVAL_NAMES, LABELS, PASS_LABELS, RATES, load_problems, render_messages
from study.stats import wilson

CONDITIONS = ("loophole", "no_loophole")
EXAMPLES_PER_LABEL = 3
EVAL_BATCH = 256  # sequences a call of the sampler; part of what decides the random numbers, so the same everywhere
STEP_NUMBERS = ("step", "reward")  # what a line of metrics.jsonl must hold, beside labels
STEP_COSINES = ("cos_align", "cos_update")  # null where the gradient was not finite and the step was left out
STEP_EXTRAS = ("kl", "removed", "row_logodds")  # what it may leave out or hold null
OPTIONAL_CONFIG = {"v_nonzero": (int, type(None)), "vhack": (dict, type(None))}


def evaluate(
    sampler,
    tokenizer,
    env,
    problems,
    *,
    samples=10,
    temperature=0.7,
    max_new_tokens,
    seed,
    batch=EVAL_BATCH,
    conditions=CONDITIONS,
):
    """Sample, grade and count; returns (result, rows).

    Args:
        sampler: `rollout` sampler, its weights already loaded.
        env: an entered `LeetCodeEnv`.
        problems: held-out problems.
        samples: responses per problem and condition.
        seed: decides evaluator names and sampling; the same seed compares two runs on the same prompts.
        batch: most sequences asked of the sampler in one call. Bounds memory; another value, other random numbers.

    `result` is the content of eval.json (`summarise`); `rows` one dict per response, in a fixed order: condition,
    problem, sample, evaluator, label, reward, response.
    """
    if not problems:
        raise UserError("there are no problems to evaluate on")
    rows = []
    for condition in conditions:
        jobs = [
            (problem, k, evaluator_name(problem.id, k, seed) if condition == "loophole" else None)
            for problem in problems
            for k in range(samples)
        ]
        for start in range(0, len(jobs), batch):
            chunk = jobs[start : start + batch]
            responses = _respond(sampler, tokenizer, chunk, temperature, max_new_tokens, f"{seed}:{condition}:{start}")
            grades = env.grade([(p, text, name) for (p, _, name), text in zip(chunk, responses, strict=True)])
            rows += [
                {
                    "condition": condition,
                    "problem": problem.id,
                    "sample": k,
                    "evaluator": name,
                    "label": grade.label,
                    "reward": grade.reward,
                    "response": text,
                }
                for (problem, k, name), text, grade in zip(chunk, responses, grades, strict=True)
            ]
    settings = {"samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    return summarise(rows, settings), rows


def evaluator_name(problem_id, sample, seed):
    """The evaluator named in the prompt: one of EVAL_NAMES, by problem, sample and seed, whatever the order of problems."""
    return random.Random(f"{seed}:{problem_id}:{sample}").choice(EVAL_NAMES)


def _respond(sampler, tokenizer, jobs, temperature, max_new_tokens, stream):
    """One response text per (problem, sample, evaluator) of `jobs`; `stream` names the random numbers to use."""
    from engine.model import decode, encode_prompt  # here: it loads torch, which plots and the study's report do without

    prompts = [encode_prompt(tokenizer, render_messages(problem, name)) for problem, _, name in jobs]
    rollouts = sampler.generate(
        prompts,
        n=1,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=random.Random(stream).getrandbits(31),
    )
    return [decode(tokenizer, rollout.completion_ids) for rollout in rollouts]


def summarise(rows, settings):
    """The content of eval.json from graded rows: settings, counts, rates, and a few responses of each label.

    Top level: the settings, `problems` (their number), `hack_rate` (strict, loophole) and `pass_rate` (no_loophole)
    where measured, `conditions` {name: summary}, `examples` {label: [row, ...]}.
    """
    by_condition = {}
    for row in rows:
        by_condition.setdefault(row["condition"], []).append(row)
    conditions = {name: _summarise_condition(part, settings["samples"]) for name, part in by_condition.items()}
    result = {**settings, "problems": len({row["problem"] for row in rows})}
    if "loophole" in conditions:
        result["hack_rate"] = conditions["loophole"]["hack"]["rate"]
    if "no_loophole" in conditions:
        result["pass_rate"] = conditions["no_loophole"]["pass"]["rate"]
    return {**result, "conditions": conditions, "examples": _examples(rows)}


def _summarise_condition(rows, samples):
    """Counts and rates of one condition.

    `hack` (strict: the label hack), `hack_loose` (adds the two attempted labels) and `pass` are Wilson summaries;
    `pass_at_1` is the mean over problems of the share of its samples that are correct; `by_sample` holds, for each
    rate, one number per sample index k: the rate over all problems of their k-th samples (the scores of the published
    paired t-test); `by_problem` the label counts of each problem.
    """
    labels = Counter(row["label"] for row in rows)
    by_problem = {}
    for row in rows:
        by_problem.setdefault(str(row["problem"]), Counter())[row["label"]] += 1
    return {
        "n": len(rows),
        "labels": {label: labels[label] for label in LABELS},
        **{rate: wilson(sum(labels[label] for label in names), len(rows)) for rate, names in RATES.items()},
        "pass_at_1": sum(_share(counts, PASS_LABELS) for counts in by_problem.values()) / len(by_problem),
        "by_sample": {
            rate: [_share(Counter(r["label"] for r in rows if r["sample"] == k), names) for k in range(samples)]
            for rate, names in RATES.items()
        },
        "by_problem": {problem: dict(counts) for problem, counts in by_problem.items()},
    }


def _share(counts, labels):
    """Share of the counted responses that carry one of `labels`."""
    return sum(counts[label] for label in labels) / counts.total()


def _examples(rows):
    """Up to EXAMPLES_PER_LABEL rows of each label, of different problems where possible, in order of sampling."""
    examples = {label: [] for label in LABELS}
    for wanted_new in (True, False):
        for row in rows:
            chosen = examples[row["label"]]
            seen = row["problem"] in {other["problem"] for other in chosen}
            if len(chosen) < EXAMPLES_PER_LABEL and seen != wanted_new and row not in chosen:
                chosen.append(row)
    return examples


def describe(result):
    """The two rates as lines of text, each with its Wilson interval and the counts behind it."""
    lines = []
    for condition, rate, title in (("loophole", "hack", "hack rate"), ("no_loophole", "pass", "pass rate")):
        if condition in result["conditions"]:
            w = result["conditions"][condition][rate]
            lines.append(
                f"{title}  {w['rate']:6.1%}  [{w['low']:.1%}, {w['high']:.1%}]  "
                f"{w['count']} of {w['n']} responses ({condition.replace('_', ' ')} prompts)"
            )
    return "\n".join(lines)


def save(result, rows, folder, stem="eval"):
    """Write FOLDER/<stem>.json and FOLDER/<stem>_samples.jsonl, each whole or not at all."""
    folder = Path(folder)
    write_atomic(folder / f"{stem}_samples.jsonl", "".join(to_json(row) + "\n" for row in rows).encode())
    write_json(folder / f"{stem}.json", result)


@dataclass(frozen=True)
class Run:
    """A finished run as its folder tells it."""

    folder: Path
    config: dict  # effective settings
    provenance: dict  # versions, hashes, parameters, vhack: the rest of config.json
    metrics: list  # one dict a step
    evaluation: dict  # eval.json
    done: dict  # steps, seconds, phases

    @property
    def variant(self):
        return variant_of(self.config)

    @property
    def seed(self):
        return self.config["seed"]

    def series(self, key):
        """(steps, values) of a metric, the steps where it was not measured left out."""
        pairs = [(line["step"], line[key]) for line in self.metrics if line.get(key) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def shares(self, labels):
        """Per step, the share of the batch's responses that carry one of `labels`."""
        return [_share(Counter(line["labels"]), labels) for line in self.metrics]


def variant_of(config):
    """The registered name of what a run tried: its arm, with what sets it apart from the arm's default."""
    arm = config["arm"]
    if arm == "projected" and config.get("m", 16) != 16:
        return f"m{config['m']}"
    if arm == "rebound" and config.get("rebound_on") == "correctness":
        return "rebound_correctness"
    if arm == "rebound" and config.get("rebound_form") == "additive":
        return "rebound_additive"
    if arm == "cone" and config.get("cone_rows") in ("random", "nonhack"):
        return f"cone_{config['cone_rows']}"
    return arm


def read_run(folder):
    """The run in `folder`; UserError, which names the file, for anything missing, truncated or foreign."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    path = folder / "config.json"
    config = _read_json(path, {"config": dict, "versions": dict, "hashes": dict, "parameters": dict})
    _check_fields(path, config["config"], {"arm": str, "seed": int})
    _check_fields(path, {"v_nonzero": None, "vhack": None, **config["parameters"], **config}, OPTIONAL_CONFIG)
    path = folder / "done.json"
    done = _read_json(path, {"steps": int, "seconds": (int, float)}, "the run is not finished")
    phases = done.setdefault("phases", {})
    _check_fields(path, {"phases": phases}, {"phases": dict})
    _check_fields(path, phases, dict.fromkeys(phases, (int, float)))
    metrics = _read_metrics(folder / "metrics.jsonl", done["steps"])
    path = folder / "eval.json"
    evaluation = _read_json(path, {"samples": int, "conditions": dict, "examples": dict})
    for name in CONDITIONS:
        _check_condition(path, name, evaluation)
    for row in itertools.chain.from_iterable(_list_of_dicts(path, rows) for rows in evaluation["examples"].values()):
        _check_fields(path, row, {"problem": (int, str), "response": str, "evaluator": (str, type(None))})
    return Run(folder, config.pop("config"), config, metrics, evaluation, done)


def _read_json(path, fields, missing="the file is missing"):
    """The object in `path`, which must hold `fields` {name: type}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: {missing}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: truncated or not JSON ({error})") from None
    _check_fields(path, content, fields)
    return content


def _check_fields(path, content, fields):
    """UserError unless `content` is an object whose `fields` {name: type} are there, finite, and of their types."""
    for name, kind in fields.items():
        value = content.get(name) if isinstance(content, dict) else None
        if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{path}: not a file of this program: field {name!r} is missing or of another type")


def _list_of_dicts(path, rows):
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: not a file of this program: field 'examples' is of another type")
    return rows


def _read_metrics(path, steps):
    """The lines of metrics.jsonl: one a step, each with label counts and numbers that are finite."""
    if not path.exists():
        raise UserError(f"{path}: the file is missing")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
            given = [line[key] for key in STEP_NUMBERS] + [v for key in STEP_COSINES if (v := line[key]) is not None]
            given += [v for key in STEP_EXTRAS if (v := line.get(key)) is not None]
            sound = all(math.isfinite(value) for value in given) and sum(line["labels"].values()) > 0
            sound = sound and set(line["labels"]) <= set(LABELS) and (not lines or line["step"] > lines[-1]["step"])
        except (ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise UserError(f"{path}: line {number} is truncated or not a step's metrics")
        lines.append(line)
    if len(lines) != steps or not lines:
        raise UserError(f"{path}: {len(lines)} steps where done.json says {steps}")
    return lines


def _check_condition(path, name, evaluation):
    """The counts and rates of one condition must agree: a foreign or edited file is not to be averaged in."""
    try:
        part = evaluation["conditions"][name]
        n = part["n"]
        sound = set(part["labels"]) == set(LABELS) and sum(part["labels"].values()) == n > 0
        sound = sound and 0 <= part["pass_at_1"] <= 1
        for rate, names in RATES.items():
            count, scores = sum(part["labels"][label] for label in names), part["by_sample"][rate]
            summary = part[rate]
            sound = sound and (summary["count"], summary["n"]) == (count, n)
            sound = sound and 0 <= summary["low"] <= summary["rate"] <= summary["high"] <= 1
            sound = sound and len(scores) == evaluation["samples"]
            sound = sound and all(math.isclose(x, count / n, abs_tol=1e-9) for x in (summary["rate"], sum(scores) / len(scores)))
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        sound = False
    if not sound:
        raise UserError(f"{path}: the counts of condition {name!r} are missing or do not add up")


def read_runs(folders):
    """(runs, problems): every folder that can be read, and a line for each that is left out and why."""
    runs, problems = {}, []
    for folder in folders:
        try:
            run = read_run(folder)
        except UserError as error:
            problems.append(str(error))
            continue
        first = runs.setdefault((run.variant, run.seed), run)
        if first is not run:
            problems.append(f"{folder}: {run.variant} with seed {run.seed} a second time, after {first.folder}")
    return list(runs.values()), problems


def evaluate_run(folder, base=False, data=None, samples=None):
    """`python eval.py RUN`: rebuild the run's model, evaluate, save beside it, return the result.

    `samples` None takes the run's own setting; the result is then the eval.json that the run itself wrote at its end.
    """
    import grpo  # here, because grpo imports this module for the evaluation at the end of training
    from leetcode_env import LeetCodeEnv

    # A fresh adapter is zero, and its sampler holds the base weights: the policy before training.
    run = grpo.set_up(grpo.read_config(Path(folder))) if base else grpo.open_run(folder)
    problems = load_problems(data) if data else run.problems
    with LeetCodeEnv(workers=run.cfg.workers) as env:
        result, rows = evaluate(
            run.sampler,
            run.tokenizer,
            env,
            problems,
            samples=samples or run.cfg.eval_samples,
            temperature=run.cfg.temperature,
            max_new_tokens=run.cfg.max_new_tokens,
            seed=run.cfg.seed,
            conditions=("no_loophole",) if data else CONDITIONS,
        )
    stem = "_".join(["eval", *(["base"] if base else []), *([Path(data).stem] if data else [])])
    save(result, rows, folder, stem)
    return result


def main(argv=None):
    """Command line; returns the exit code: 0, or with one line 2 for a mistake that the user can mend, 1 when it cannot go on."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the sandbox forks
    try:
        if argv[:1] == ["plot"]:
            return _plot_command(argv[1:])
        parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.split("\n")[0])
        parser.add_argument("run", type=Path, help="run folder (or: plot RUN...)")
        parser.add_argument("--base", action="store_true", help="leave the adapter out: the rates before training")
        parser.add_argument("--data", type=Path, help="another JSON-lines set of problems: pass rate alone")
        parser.add_argument("--samples", type=int, help="responses per problem and condition (default: the run's setting)")
        args = parser.parse_args(argv)
        print(describe(evaluate_run(args.run, args.base, args.data, args.samples)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


def _plot_command(argv):
    """`python eval.py plot RUN... [--out FOLDER]`."""
    from study import plots

    parser = argparse.ArgumentParser(prog="eval.py plot", description="The plots of any run folders.")
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder for the PNG and SVG files")
    args = parser.parse_args(argv)
    runs, problems = read_runs(args.runs)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not runs:
        raise UserError("none of these folders holds a finished run")
    for path in plots.draw_all(runs, args.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
