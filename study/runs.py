"""Finished run folders, read and checked: a report must not average in what is missing, truncated or foreign."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval import CONDITIONS, share, wilson
from faults.errors import UserError
from harness.config import DIRECTION_OF
from harness.scale import SCALES
from leetcode_env import LABELS, RATES, WRONG_LABELS
from study.plan import ONE, SEVERAL

Fields = dict[str, Any]

NoneType = type(None)
NUMBER = (int, float)
CONFIG = {  # what a file must hold: a name, then a type, types, or the names in it; with NoneType it may be missing
    "config": {"arm": str, "seed": int},
    "versions": dict,
    "hashes": dict,
    "parameters": {"v_nonzero": (int, NoneType)},
    "vhack": (dict, NoneType),
}
DONE = {"steps": int, "seconds": NUMBER, "phases": (dict, NoneType)}
EVALUATION = {"samples": int, "conditions": dict, "examples": dict}
EXAMPLE = {"problem": (int, str), "response": str, "evaluator": (str, NoneType)}
STEP_NUMBERS = ("step", "reward")  # what a line of metrics.jsonl must hold, beside labels
STEP_COSINES = ("cos_align", "cos_update")  # null, or 0 for the second, where the gradient was not finite and no step was made
FLAGGED = ("flagged_hacks", "hacks", "flagged_honest")  # counts that an arm which screens logs
STEP_EXTRAS = ("kl", "removed", "row_logodds", *FLAGGED)  # what it may leave out or hold null

# Field: (the registered value, but for an arm with its own; the arms whose numbers it changes; None: all, for all log their
# cosine with v_hack).
DIRECT = ("projected", "projected_gated", "no_renorm", "no_svd", "random")
SETTINGS: dict[str, tuple[Any, tuple[str, ...] | None]] = {
    "loopholes": (["run_tests"], None),
    "m": (16, None),
    "phrasing": ("plain", None),
    "format_reward": (0.5, None),
    "contrast": ("completions", None),
    "position": ("last", None),
    "layer": (None, None),
    "construction": ("jacobian", None),
    "refresh_every": (0, None),
    "blockwise": (False, DIRECT),
    "project_on": ("gradient", (*DIRECT, "cone", "counterfactual")),
    "cone_rows": ("batch", ("cone",)),
    "cone_n": (24, ("cone", "counterfactual")),
    "cone_refresh": (1, ("cone",)),
    "cone_places": ("known", ("cone",)),
    "cone_split": (False, ("cone",)),
    "cone_match": ("none", ("cone", "counterfactual")),
    "cone_ridge": (1e-3, ("cone", "counterfactual")),
    "cone_known": (None, ("cone", "screen_known")),
    "counterfactual_use": ("screen", ("counterfactual",)),
    "counterfactual_tau": (2.0, ("counterfactual",)),
    "counterfactual_calibrate": (False, ("counterfactual",)),
    "counterfactual_ref": ("base", ("counterfactual",)),
    "counterfactual_rows": ("tail", ("counterfactual",)),
    "rebound_form": ("multiplicative", ("rebound",)),
    "rebound_alpha": (2.0, ("rebound",)),
    "rebound_on": ("reward", ("rebound",)),
}
REGISTERED = {  # (arm, field, value): the name in the plans of a variant that sets one field beside its arm
    (arm, flag[2:].replace("-", "_"), ",".join(value)): variant
    for variant, ((_, arm, *more), _) in (ONE | SEVERAL).items()
    if more
    for flag, *value in (more,)
}


@dataclass(frozen=True)
class FinishedRun:
    """A finished run as its folder tells it."""

    folder: Path
    variant: str
    config: Fields  # effective settings
    provenance: Fields  # versions, hashes, parameters, vhack: the rest of config.json
    metrics: list[Fields]  # one dict a step
    evaluation: Fields  # eval.json
    done: Fields  # steps, seconds, phases

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config["seed"]

    @property
    def nonzero(self) -> int | None:
        """Number of v_hack's entries that are not 0, where it is known."""
        return self.provenance["parameters"].get("v_nonzero")

    def condition(self, rate: str) -> Fields:
        """The part of eval.json that a rate is read from: hacks where there is a loophole, passes where there is none."""
        return self.evaluation["conditions"]["no_loophole" if rate == "pass" else "loophole"]

    def wilson(self, rate: str) -> Fields:
        """A rate after training with its Wilson interval: {count, n, rate, low, high}."""
        return self.condition(rate)[rate]

    def series(self, what: str | Sequence[str]) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, without the steps where it was not measured; or of the share of the batch's responses that
        carry one of some labels."""
        if not isinstance(what, str):
            return [line["step"] for line in self.metrics], [share(Counter(line["labels"]), what) for line in self.metrics]
        lines = [line for line in self.metrics if line.get(what) is not None]
        return [line["step"] for line in lines], [line[what] for line in lines]


def variant_of(config: Fields, shared: Collection[str] = ()) -> str:
    """The name of what a run tried: its arm or registered variant, then every other of SETTINGS that changes its numbers.

    shared: fields that a whole study sets, and that tell none of its runs apart.

    >>> variant_of({"arm": "projected", "m": 8, "blockwise": True})
    'm8+blockwise'
    """
    arm = name = config["arm"]
    of_its_own = SCALES.get(str(config.get("scale")), {}) | DIRECTION_OF.get(arm, {})
    parts = []
    for field, (registered_value, arms) in SETTINGS.items():
        usual = of_its_own.get(field, registered_value)
        value = config.get(field, usual)
        if value == usual or field in shared or (arms and arm not in arms):
            continue
        shown = ",".join(map(str, value)) if isinstance(value, list) else value
        registered = f"m{value}" if (arm, field) == ("projected", "m") else REGISTERED.get((arm, field, str(shown)))
        if registered and name == arm:
            name = registered
        else:
            parts.append(field if value is True else f"{field}={shown}")
    return "+".join([name, *parts])


def read_run(folder: str | Path, shared: Collection[str] = ()) -> FinishedRun:
    """The run in `folder`; UserError, which names the file, for anything missing, truncated or foreign."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    rest = _read(folder / "config.json", CONFIG)
    if (rest["parameters"].get("v_nonzero") or 0) < 0:
        raise UserError(f"{folder / 'config.json'}: not a file of this program: field 'v_nonzero' is below 0")
    config = rest.pop("config")
    path = folder / "done.json"
    done = _read(path, DONE, "the run is not finished")
    done["phases"] = done.get("phases") or {}
    _check(path, done["phases"], dict.fromkeys(done["phases"], NUMBER))
    metrics = _read_metrics(folder / "metrics.jsonl", done["steps"])
    path = folder / "eval.json"
    evaluation = _read(path, EVALUATION)
    for name in CONDITIONS:
        if not _adds_up(name, evaluation):
            raise UserError(f"{path}: the counts of condition {name!r} are missing or do not add up")
    for label, rows in evaluation["examples"].items():
        _check(path, evaluation["examples"], {label: list})
        for row in rows:
            _check(path, row, EXAMPLE)
    return FinishedRun(folder, variant_of(config, shared), config, rest, metrics, evaluation, done)


def read_runs(folders: Iterable[str | Path]) -> tuple[list[FinishedRun], list[str]]:
    """(runs, problems): every folder that can be read, and a line for each that is left out and why. Loopholes that all have in
    play tell none apart."""
    found, problems = list[FinishedRun](), list[str]()
    for folder in folders:
        try:
            found.append(read_run(folder))
        except UserError as error:
            problems.append(str(error))
    alike = all(run.config.get("loopholes") == found[0].config.get("loopholes") for run in found)
    runs: dict[tuple[str, int], FinishedRun] = {}
    for run in found:
        named = replace(run, variant=variant_of(run.config, ("loopholes",) if alike else ()))
        first = runs.setdefault((named.variant, run.seed), named)
        if first is not named:
            problems.append(f"{run.folder}: {named.variant} with seed {run.seed} a second time, after {first.folder}")
    return list(runs.values()), problems


def _read(path: Path, fields: Fields, missing: str = "the file is missing") -> Fields:
    """The object in `path`, which must hold `fields`."""
    try:
        content = json.loads(_bytes(path, missing))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: truncated or not JSON ({error})") from None
    _check(path, content, fields)
    return content


def _bytes(path: Path, missing: str = "the file is missing") -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: {missing}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _check(path: Path, content: Any, fields: Fields) -> None:
    """UserError unless `content` is an object whose `fields` {name: type or fields} are there, of their types, and finite."""
    for name, kind in fields.items():
        value = content.get(name) if isinstance(content, dict) else None
        if isinstance(kind, dict) and isinstance(value, dict):
            _check(path, value, kind)
        elif isinstance(kind, dict) or not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{path}: not a file of this program: field {name!r} is missing or of another type")


def _read_metrics(path: Path, steps: int) -> list[Fields]:
    """The lines of metrics.jsonl: one a step, each with label counts and numbers that are finite."""
    lines: list[Fields] = []
    for number, text in enumerate(_bytes(path).splitlines(), 1):
        try:
            line = json.loads(text)
            given = [line[key] for key in STEP_NUMBERS]
            given += [x for x in [*(line[key] for key in STEP_COSINES), *map(line.get, STEP_EXTRAS)] if x is not None]
            sound = all(map(math.isfinite, given)) and sum(line["labels"].values()) > 0 and set(line["labels"]) <= set(LABELS)
            sound = sound and (not lines or line["step"] > lines[-1]["step"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise UserError(f"{path}: line {number} is truncated or not a step's metrics")
        lines.append(line)
    if len(lines) != steps or not lines:
        raise UserError(f"{path}: {len(lines)} steps where done.json says {steps}")
    return lines


def _adds_up(condition: str, evaluation: Fields) -> bool:
    """Whether the counts and rates of a condition agree: a foreign or edited file is not to be averaged in."""
    try:
        part = evaluation["conditions"][condition]
        labels, n = part["labels"], part["n"]
        sound = set(labels) == set(LABELS) and sum(labels.values()) == n > 0 and 0 <= part["pass_at_1"] <= 1
        for rate, names in RATES.items():
            scores, expected = part["by_sample"][rate], wilson(sum(labels[label] for label in names), n)
            sound = sound and all(math.isclose(part[rate][key], value, abs_tol=1e-9) for key, value in expected.items())
            sound = sound and len(scores) == evaluation["samples"]
            sound = sound and math.isclose(sum(scores) / len(scores), expected["rate"], abs_tol=1e-9)
        wrong = sum(labels[label] for label in WRONG_LABELS)
        sound = sound and part["lambda"] == wilson(labels["hack"], wrong)
        parts = [*part["by_difficulty"].values(), *part.get("by_loophole", {}).values()]
        return sound and all(0 <= of[rate]["rate"] <= 1 for of in parts for rate in RATES)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return False
