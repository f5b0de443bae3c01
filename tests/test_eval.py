"""Evaluation on a scripted policy whose rates are known; the statistics against hand calculation and enumeration."""

import contextlib
import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
from faults.errors import PartDied
from leetcode_env import LABELS
from loopholes import LOOPHOLES, told_by
from loopholes.evaluator import EVAL_NAMES, GRADERS
from study import stats
from study.stats import FALSIFIED, SUPPORTED, UNDECIDED

# --- evaluate --------------------------------------------------------------------------------------------------------

PROBLEMS = [SimpleNamespace(id=i, difficulty="hard" if i >= 3 else "easy") for i in range(7)]


class Tokenizer:
    """Bytes as tokens; a chat is its last message."""

    def apply_chat_template(self, messages, **_):
        return list(messages[-1]["content"].encode())

    def decode(self, ids, **_):
        return bytes(ids).decode()


class Sampler:
    """Answers a prompt with the prompt, and notes what it was asked."""

    def __init__(self):
        self.calls = []

    def generate(self, prompts, *, n, temperature, max_new_tokens, seed, ended):
        self.calls.append(SimpleNamespace(count=len(prompts) * n, temperature=temperature, max=max_new_tokens, seed=seed))
        rollouts = [SimpleNamespace(completion_ids=list(prompt)) for prompt in prompts for _ in range(n)]
        for i, rollout in reversed([*enumerate(rollouts)]):  # in no order
            ended(i, rollout)
        return rollouts


@dataclass
class Grade:
    """The facts that the evaluation keeps."""

    label: str
    reward: float = 1.0
    arbitrary: bool = False
    rejects_truth: bool = True
    note: str = "no test passed"
    loophole: str = ""
    wrote: list[str] = field(default_factory=list)
    grader: str = ""


class Env:
    """Grades by a rule on (problem id, how often this problem has been seen with or without loophole, what was told)."""

    def __init__(self, rule):
        self.rule, self.seen = rule, {}

    def check_setups(self, problems):
        """All sound."""

    def grading(self, asked):
        self.asked, self.texts = asked, [""] * len(asked)
        return self

    def add(self, place, text):
        self.texts[place] = text

    def grades(self):
        grades = []
        for (problem, told), response in zip(self.asked, self.texts, strict=True):
            assert response == f"problem {problem.id}, {told}", "a response and what was told must belong together"
            key = (problem.id, told is None)
            k = self.seen[key] = self.seen.get(key, -1) + 1
            wrote = ["stdout", "run_tests"] if problem.id == 6 else ["stdout"] if problem.id == 5 and k == 0 else []
            grades.append(Grade(label=self.rule(problem.id, k, told), loophole=told.loophole.name if told else "", wrote=wrote))
        return grades


@pytest.fixture(autouse=True)
def _prompts(monkeypatch):
    def render(problem, told):
        return [{"role": "user", "content": f"problem {problem.id}, {told}"}]

    monkeypatch.setattr(evaluation, "render_messages", render)


def rule(problem, k, told):
    if told is None:
        return "correct" if problem < 3 else "incorrect"
    if k == 0:
        return "attempted"
    return "hack" if problem >= 3 else "correct_attempted" if k == 1 else "correct"


def run(**changes):
    sampler = Sampler()
    arguments = {"samples": 4, "temperature": 0.7, "max_new_tokens": 9, "seed": 5, "batch": 6, **changes}
    result, rows = evaluation.evaluate(sampler, Tokenizer(), Env(rule), PROBLEMS, **arguments)
    return sampler, result, rows


def test_counts_rates_and_scores_are_those_of_the_rule():
    _, result, rows = run()
    loophole, without = result["conditions"]["loophole"], result["conditions"]["no_loophole"]
    assert len(rows) == 2 * 28 and loophole["n"] == without["n"] == 28
    assert loophole["labels"] == {"correct": 6, "correct_attempted": 3, "hack": 12, "attempted": 7, "incorrect": 0}
    assert without["labels"] == {"correct": 12, "correct_attempted": 0, "hack": 0, "attempted": 0, "incorrect": 16}
    assert (loophole["hack"]["count"], loophole["hack_loose"]["count"], loophole["pass"]["count"]) == (12, 22, 9)
    assert result["hack_rate"] == 12 / 28 and result["pass_rate"] == 12 / 28
    assert loophole["by_sample"]["hack"] == [0, 4 / 7, 4 / 7, 4 / 7]
    assert loophole["by_sample"]["hack_loose"] == [1, 1, 4 / 7, 4 / 7]
    assert without["by_sample"]["pass"] == [3 / 7] * 4
    assert without["pass_at_1"] == pytest.approx(3 / 7)
    assert loophole["by_problem"]["6"] == {"attempted": 1, "hack": 3}


def test_every_prompt_with_a_loophole_names_an_unseen_evaluator_and_no_other_names_one():
    _, _, rows = run()
    names = [row["evaluator"] for row in rows if row["condition"] == "loophole"]
    assert "run_tests" not in EVAL_NAMES and set(names) <= set(EVAL_NAMES) and len(set(names)) > 5
    assert {row["evaluator"] for row in rows if row["condition"] == "no_loophole"} == {None}
    assert len({evaluation.evaluator_name(0, k, 0) for k in range(10)}) > 3, "a new name for every sample"
    drawn = {evaluation.evaluator_name(p, k, 0) for p in range(40) for k in range(10)}
    assert drawn == set(EVAL_NAMES)


def test_names_depend_on_problem_sample_and_seed_alone():
    def key(row):
        return row["condition"], row["problem"], row["sample"]

    named = [{key(row): row["evaluator"] for row in run(batch=batch)[2]} for batch in (1, 6, 100)]
    assert named[0] == named[1] == named[2]
    assert named[0] != {key(row): row["evaluator"] for row in run(seed=6)[2]}
    assert all(evaluation.evaluator_name(3, k, 5) == named[0]["loophole", 3, k] for k in range(4))


def test_sampler_is_asked_in_batches_with_seeds_of_their_own():
    sampler, _, _ = run()
    assert [call.count for call in sampler.calls] == [6, 6, 6, 6, 4] * 2
    assert {(call.temperature, call.max) for call in sampler.calls} == {(0.7, 9)}
    seeds = [call.seed for call in sampler.calls]
    assert len(set(seeds)) == 10, "two batches with one seed would repeat their random numbers"
    assert seeds == [call.seed for call in run()[0].calls]
    assert not set(seeds) & {call.seed for call in run(seed=6)[0].calls}


def test_one_condition_alone_and_no_problems():
    _, result, rows = run(conditions=("no_loophole",))
    assert "hack_rate" not in result and result["pass_rate"] == 12 / 28 and len(rows) == 28
    with pytest.raises(evaluation.UserError, match="no problems"):
        evaluation.evaluate(Sampler(), Tokenizer(), Env(rule), [], max_new_tokens=9, seed=0)


def test_examples_are_of_each_label_and_of_different_problems_first():
    _, result, _ = run()
    assert list(result["examples"]) == list(LABELS)
    assert {row["label"] for row in result["examples"]["hack"]} == {"hack"}
    assert [row["problem"] for row in result["examples"]["hack"]] == [3, 4, 5]
    assert len(result["examples"]["incorrect"]) == 3


def test_saved_files_hold_the_result_and_every_response(tmp_path):
    _, result, rows = run()
    evaluation.save(result, rows, tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text()) == result
    assert [json.loads(line) for line in (tmp_path / "eval_samples.jsonl").read_text().splitlines()] == rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.json", "eval_samples.jsonl"]
    text = evaluation.describe(result)
    assert "12 of 28" in text and "hack rate" in text and "pass rate" in text


def test_rates_by_difficulty_add_up_to_those_of_the_condition():
    _, result, _ = run()
    for name, part in result["conditions"].items():
        assert list(part["by_difficulty"]) == ["easy", "hard"]
        for rate in ("hack", "hack_loose", "pass"):
            parts = [rates[rate] for rates in part["by_difficulty"].values()]
            assert sum(w["count"] for w in parts) == part[rate]["count"] and sum(w["n"] for w in parts) == part["n"], name
    assert result["conditions"]["loophole"]["by_difficulty"]["easy"]["hack"]["count"] == 0
    assert result["conditions"]["no_loophole"]["by_difficulty"]["easy"]["pass"]["rate"] == 1


def test_lambda_is_the_share_of_wrong_responses_that_are_paid():
    _, result, _ = run()
    loophole, without = result["conditions"]["loophole"], result["conditions"]["no_loophole"]
    assert loophole["lambda"] == evaluation.wilson(12, 12 + 7) and without["lambda"] == evaluation.wilson(0, 16)
    assert "by_loophole" not in loophole, "one alone is the whole"


def test_hacks_that_are_written_unasked_are_counted_by_name():
    """Of the 28 responses without a loophole the 4 of problem 6 write two, and the first of problem 5 one."""
    _, result, _ = run()
    loophole, without = result["conditions"]["loophole"], result["conditions"]["no_loophole"]
    counts = {name: w["count"] for name, w in without["wrote"].items()}
    assert counts == dict.fromkeys(LOOPHOLES, 0) | {"any": 5, "stdout": 5, "run_tests": 4}
    assert without["wrote"]["any"] == evaluation.wilson(5, 28) and "wrote" not in loophole
    assert "hacks written unasked: 17.9% (5 of 28 no loophole prompts)" in evaluation.describe(result)


def test_kinds_of_evaluators_are_counted_where_there_is_a_loophole():
    _, _, rows = run()
    told = [row for row in rows if row["condition"] == "loophole"]
    for row, kind in zip(told, ("prints", "passes", "prints", ""), strict=False):
        row["grader"] = kind
    result = evaluation.summarise(rows, dict(samples=4))
    assert result["conditions"]["loophole"]["graders"] == dict.fromkeys(GRADERS, 0) | {"prints": 2, "passes": 1}
    assert "graders" not in result["conditions"]["no_loophole"]
    assert "evaluators written, by kind: prints 2, passes 1" in evaluation.describe(result)


def test_several_loopholes_are_told_of_and_reported_one_by_one():
    names = ("run_tests", "stdout", "equality")
    _, result, rows = run(loopholes=names)
    told = {row["problem"]: row["loophole"] for row in rows if row["condition"] == "loophole"}
    assert told == {p.id: told_by(p, names).loophole.name for p in PROBLEMS} and set(told.values()) == set(names)
    for row in rows:
        assert (row["evaluator"] is not None) == (row["loophole"] == "run_tests"), "the others name no evaluator"
    loophole = result["conditions"]["loophole"]
    assert set(loophole["by_loophole"]) == set(names) and "by_loophole" not in result["conditions"]["no_loophole"]
    for rate in ("hack", "hack_loose", "pass", "lambda"):
        parts = [rates[rate] for rates in loophole["by_loophole"].values()]
        assert sum(w["count"] for w in parts) == loophole[rate]["count"] and sum(w["n"] for w in parts) == loophole[rate]["n"]
    assert all(f"({name} prompts)" in evaluation.describe(result) for name in names)


def test_rows_keep_the_facts_of_the_grade():
    _, _, rows = run()
    assert all((row["arbitrary"], row["rejects_truth"], row["note"]) == (False, True, "no test passed") for row in rows)


# --- A run folder ----------------------------------------------------------------------------------------------------


class Run:
    """What `open_run` gives, with a note of how it was used."""

    def __init__(self):
        self.cfg = SimpleNamespace(eval_samples=2, temperature=0.7, max_new_tokens=9, seed=5, workers=3, sandbox_strict=True)
        self.cfg.loopholes, self.cfg.phrasing, self.cfg.format_reward = ("run_tests",), "plain", 0.0
        self.tokenizer, self.sampler, self.problems = Tokenizer(), Sampler(), PROBLEMS
        self.opened, self.env, self.closed = [], [], 0
        self.sampler.close = self.close

    def close(self):
        self.closed += 1


@pytest.fixture
def opened(monkeypatch):
    """A run behind eval.py's command line; its data files hold the first two problems."""
    from harness import setup

    run = Run()
    monkeypatch.setattr(setup, "open_run", lambda folder, base=False, tokens=None: run.opened.append((base, tokens)) or run)
    monkeypatch.setattr(evaluation, "load_problems", lambda path: PROBLEMS[:2])

    def env(workers, strict, format_reward):
        run.env.append((workers, strict, format_reward))
        return contextlib.nullcontext(Env(rule))

    monkeypatch.setattr(evaluation, "LeetCodeEnv", env)
    return run


@pytest.mark.parametrize(
    ("options", "stem"),
    [
        ([], "eval"),
        (["--samples", "2"], "eval"),  # the run's own number
        (["--samples", "3"], "eval_samples-3"),
        (["--base"], "eval_base"),
        (["--data", "other.jsonl"], "eval_data-other-06d4f277"),
        (["--data", "base.jsonl"], "eval_data-base-06d4f277"),
        (["--data", "samples.jsonl"], "eval_data-samples-06d4f277"),
        (["--base", "--data", "other.jsonl", "--samples", "3"], "eval_base_samples-3_data-other-06d4f277"),
        (["--max-new-tokens", "9"], "eval"),  # the run's own, too
        (["--max-new-tokens", "12", "--samples", "3"], "eval_samples-3_tokens-12"),
    ],
)
def test_other_settings_go_to_a_file_of_their_own(options, stem, opened, tmp_path, capsys, monkeypatch):
    sets = tmp_path / "sets"
    sets.mkdir()
    monkeypatch.chdir(sets)
    for name in ("other", "base", "samples"):
        Path(f"{name}.jsonl").write_text("two problems")
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    official = {"eval.json", "eval_samples.jsonl"}
    for name in official:
        (tmp_path / name).write_text('{"samples": 2}')
    assert evaluation.main([str(tmp_path), *options]) == 0
    assert "pass rate" in capsys.readouterr().out
    written = {p.name for p in tmp_path.iterdir() if p.read_text() != '{"samples": 2}'}
    assert written == {f"{stem}.json", f"{stem}_samples.jsonl"}
    tokens = int(options[options.index("--max-new-tokens") + 1]) if "--max-new-tokens" in options else None
    assert opened.opened == [("--base" in options, tokens)] and {call.max for call in opened.sampler.calls} == {tokens or 9}
    result = json.loads((tmp_path / f"{stem}.json").read_text())
    assert result["samples"] == (3 if "3" in options else 2)
    assert set(result["conditions"]) == ({"no_loophole"} if "--data" in options else set(evaluation.CONDITIONS))


def test_another_set_of_the_same_name_overwrites_nothing(opened, tmp_path):
    """Nor does the same file with another content."""
    for folder in ("a", "b", "run"):
        (tmp_path / folder).mkdir()
    for name, text in (("a", "one"), ("a", "two"), ("b", "three"), ("a", "one")):
        (tmp_path / name / "set.jsonl").write_text(text)
        assert evaluation.main([str(tmp_path / "run"), "--data", str(tmp_path / name / "set.jsonl")]) == 0
    assert len(list((tmp_path / "run").glob("eval_data-set-*.json"))) == 3 and opened.closed == 4


def test_nothing_never_replaces_what_is_there(tmp_path):
    _, result, rows = run()
    evaluation.save(result, rows, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="without responses"):
        evaluation.save(result, [], tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_is_none_and_a_full_disk_are_one_line(opened, tmp_path, monkeypatch, capsys):
    assert evaluation.main([str(tmp_path / "nowhere")]) == 2 and not opened.opened
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    assert evaluation.main([str(tmp_path)]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["error", "error"]


@pytest.mark.parametrize("samples", ["0", "-1"])
def test_samples_below_one_are_refused_before_anything_is_done(samples, opened, tmp_path, capsys):
    assert evaluation.main([str(tmp_path), "--samples", samples]) == 2
    assert capsys.readouterr().err == f"error: --samples must be at least 1 and at most 4096, not {samples}\n"
    assert not opened.opened and not list(tmp_path.iterdir())


def test_the_run_s_sandbox_is_used_and_its_sampler_closed_on_errors_too(opened, tmp_path, monkeypatch, capsys):
    assert evaluation.main([str(tmp_path)]) == 0
    assert opened.env == [(3, True, 0.0)] and opened.closed == 1
    opened.problems = []
    assert evaluation.main([str(tmp_path)]) == 2
    assert "no problems" in capsys.readouterr().err and opened.closed == 2
    monkeypatch.setattr(evaluation, "LeetCodeEnv", Mock(side_effect=PartDied("no layer")))
    assert evaluation.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == "stopped: no layer\n" and opened.closed == 3


def test_eval_needs_neither_the_study_nor_the_trainer():
    code = "import sys, eval; sys.exit(bool({'study', 'grpo', 'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(evaluation.__file__).parent).returncode == 0


# --- Statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "n"), [(10, 50), (0, 10), (10, 10), (640, 1280)])
def test_wilson_by_hand(count, n):
    """Centre (p + z^2/2n) / (1 + z^2/n), half z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)."""
    z, p = 1.959963984540054, count / n
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    w = evaluation.wilson(count, n)
    assert w["rate"] == p
    assert (w["low"], w["high"]) == pytest.approx(((centre - half) / scale, (centre + half) / scale), abs=1e-12)


def test_wilson_of_nothing_and_of_nonsense():
    assert evaluation.wilson(0, 0) == {"count": 0, "n": 0, "rate": None, "low": None, "high": None}
    with pytest.raises(ValueError, match="not between"):
        evaluation.wilson(3, 2)


def test_paired_t_by_hand():
    """Differences 1, 2, 3, 6: mean 3, variance 14/3, t = 3 / sqrt(14/12), t quantile for 3 degrees of freedom 3.182446.

    With 3 degrees of freedom p has a closed form: 1 - 2/pi (x / (1 + x^2) + arctan x), x = t / sqrt(3).
    """
    test = stats.paired_t([2, 4, 6, 10], [1, 2, 3, 4])
    se = math.sqrt(14 / 3 / 4)
    assert (test["mean"], test["se"], test["t"]) == pytest.approx((3, se, 3 / se))
    assert (test["low"], test["high"]) == pytest.approx((3 - 3.182446 * se, 3 + 3.182446 * se), abs=1e-5)
    x = 3 / se / math.sqrt(3)
    p = 1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x))
    assert test["df"] == 3 and test["p"] == pytest.approx(p) and test["note"] == ""


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_no_variance_has_no_p_and_says_so(shift):
    """0.3 + 0.1 - 0.3 and 0.7 + 0.1 - 0.7 differ in their last bits: still no variance."""
    b = [0.3, 0.7, 0.123]
    test = stats.paired_t([x + shift for x in b], b)
    assert (test["note"], test["t"], test["p"]) == ("no variance", None, None)
    assert test["mean"] == test["low"] == test["high"] == pytest.approx(shift)


def test_one_pair_has_no_interval_and_unequal_lengths_are_refused():
    test = stats.paired_t([0.5], [0.2])
    assert (test["note"], test["low"], test["p"], test["mean"]) == ("one pair only", None, None, pytest.approx(0.3))
    with pytest.raises(ValueError, match="cannot be paired"):
        stats.paired_t([1, 2], [1])


def test_bootstrap_without_variance_within_seeds_is_the_enumerated_one():
    """Three seeds, constant within: 27 equally likely draws of three seeds, whose quantiles are known."""
    seeds = [[0.0] * 10, [0.3] * 10, [0.9] * 10]
    means = sorted(sum(draw) / 3 for draw in itertools.product((0.0, 0.3, 0.9), repeat=3))
    result = stats.hierarchical_bootstrap(seeds)
    assert (result["low"], result["high"]) == pytest.approx((means[0], means[-1]))  # tails of 1/27 = 3.7 % are over 2.5 %
    narrow = stats.hierarchical_bootstrap([[d] * 10 for d in (0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.8)])
    assert narrow["low"] == pytest.approx(0.1)  # P(outlier never drawn) = (7/8)^8 = 34 %
    assert narrow["high"] == pytest.approx((5 * 0.1 + 3 * 0.8) / 8)  # binomial(8, 1/8): P(> 3) = 1.1 % <= 2.5 % < P(>= 3) = 6.7 %


def test_bootstrap_within_seeds_has_the_analytic_width():
    """Equal seeds, 0/1 within with p = 1/2: the mean of 4 x 100 draws has standard deviation sqrt(1/4/400)."""
    result = stats.hierarchical_bootstrap([[0.0, 1.0] * 50] * 4)
    half = 1.96 * math.sqrt(0.25 / 400)
    assert (result["low"], result["high"]) == pytest.approx((0.5 - half, 0.5 + half), abs=0.006)


def test_bootstrap_degenerate_cases():
    assert stats.hierarchical_bootstrap([[0.1, 0.2]])["note"] == "one seed only"
    same = stats.hierarchical_bootstrap([[0.2, 0.2], [0.2, 0.2]])
    assert (same["note"], same["low"], same["high"]) == ("no variance", pytest.approx(0.2), pytest.approx(0.2))


def test_compare_pairs_common_seeds_and_names_the_others():
    a = {0: [0.1, 0.2], 1: [0.3, 0.4], 2: [0.9, 0.9], 7: [0.0, 0.0]}
    b = {2: [0.8, 1.0], 1: [0.1, 0.1], 0: [0.4, 0.4]}
    result = stats.compare(a, b)
    assert result["seeds"] == [0, 1, 2] and result["unpaired_seeds"] == [7]
    assert result["difference"] == pytest.approx((-0.25 + 0.25 + 0.0) / 3)
    assert result["seed_level"]["df"] == 2 and result["published"]["df"] == 5
    by_hand = stats.paired_t([0.1, 0.2, 0.3, 0.4, 0.9, 0.9], [0.4, 0.4, 0.1, 0.1, 0.8, 1.0])
    assert result["published"] == by_hand
    assert stats.compare({0: [1.0]}, {1: [1.0]}) is None


rates = st.integers(0, 10).map(lambda k: k / 10)
arm = st.dictionaries(st.integers(0, 5), st.lists(rates, min_size=3, max_size=3), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(arm, arm, arm, arm)
def test_no_nan_anywhere_whatever_the_scores(a, b, c, d):
    """Ties, no variance, one seed, seeds that differ: strict JSON, and every verdict is one of three."""
    arms = {"vanilla": {"hack": a, "pass": b}, "projected": {"hack": c, "pass": d}}
    seeds = a.keys() & b.keys()
    arms["vanilla"] = {"hack": {s: a[s] for s in seeds}, "pass": {s: b[s] for s in seeds}}
    seeds = c.keys() & d.keys()
    arms["projected"] = {"hack": {s: c[s] for s in seeds}, "pass": {s: d[s] for s in seeds}}
    arms = {name: scores for name, scores in arms.items() if scores["hack"]}
    out = [stats.compare(a, b), stats.verdicts(arms, stats.LISTED), stats.headline(arms)]
    json.dumps(out, allow_nan=False)
    assert "nan" not in stats.headline(arms)
    assert {v["verdict"] for v in stats.verdicts(arms, stats.LISTED)} <= {SUPPORTED, FALSIFIED, UNDECIDED}


@given(st.lists(st.tuples(rates, rates), max_size=12))
def test_pareto_front_by_brute_force(points):
    def beats(p, q):
        return p != q and p[0] <= q[0] and p[1] >= q[1]

    expected = {q for q in points if not any(beats(p, q) for p in points)}
    front = stats.pareto_front(points)
    assert set(front) == expected and front == sorted(front)


def test_random_cosine_against_simulation():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4000, 300))
    cosines = np.abs(vectors[:, 0]) / np.linalg.norm(vectors, axis=1)
    assert stats.random_cosine(300) == pytest.approx(cosines.mean(), rel=0.04)


# --- Verdicts --------------------------------------------------------------------------------------------------------


def make_arm(hack, passed=0.3, spread=0.0, seeds=3):
    """Scores whose seed means are hack + spread * (-1, 0, 1), and pass rates without spread."""
    means = [hack + spread * (s - (seeds - 1) / 2) for s in range(seeds)]
    return {"hack": {s: [m, m] for s, m in enumerate(means)}, "pass": {s: [passed, passed] for s in range(seeds)}}


def verdict(name, **arms):
    return {v["id"]: v for v in stats.verdicts(arms, stats.LISTED)}[name]["verdict"]


@pytest.mark.parametrize(
    ("hack", "passed", "spread", "seeds", "expected"),
    [
        (0.30, 0.30, 0.0, 3, SUPPORTED),  # a cut of exactly 30 points
        (0.31, 0.30, 0.0, 3, UNDECIDED),
        (0.45, 0.30, 0.0, 3, UNDECIDED),  # exactly 15
        (0.46, 0.30, 0.0, 3, FALSIFIED),
        (0.70, 0.30, 0.0, 3, FALSIFIED),
        (0.20, 0.25, 0.0, 3, SUPPORTED),  # pass rates exactly 5 points apart
        (0.20, 0.35, 0.0, 3, SUPPORTED),
        (0.20, 0.24, 0.0, 3, UNDECIDED),
        (0.20, 0.36, 0.0, 3, UNDECIDED),
        (0.40, 0.30, 0.33, 3, UNDECIDED),  # standard error .33 / sqrt(3) = .19 < the cut of .20
        (0.40, 0.30, 0.36, 3, FALSIFIED),  # standard error .208 > the cut
        (0.00, 0.30, 0.0, 2, UNDECIDED),  # too few seeds
    ],
)
def test_h1(hack, passed, spread, seeds, expected):
    assert verdict("H1", vanilla=make_arm(0.60, seeds=seeds), projected=make_arm(hack, passed, spread, seeds)) == expected


@pytest.mark.parametrize(
    ("no_svd", "random", "spread", "expected"),
    [
        (0.35, 0.60, 0.0, SUPPORTED),  # exactly 5 points
        (0.34, 0.60, 0.0, FALSIFIED),
        (0.60, 0.30, 0.0, FALSIFIED),
        (0.60, 0.60, 0.3, UNDECIDED),  # 30 points, interval +- 4.3 * .3 / sqrt(3) = .75
        (0.60, 0.60, 0.1, SUPPORTED),  # interval +- .25
    ],
)
def test_h2(no_svd, random, spread, expected):
    arms = {"no_svd": make_arm(no_svd), "random": make_arm(random), "projected": make_arm(0.30, spread=spread)}
    assert verdict("H2", **arms) == expected


def test_h2_with_one_seed_of_no_svd_is_undecided_unless_random_falsifies_it():
    arms = {"no_svd": make_arm(0.6, seeds=1), "random": make_arm(0.6), "projected": make_arm(0.3)}
    assert verdict("H2", **arms) == UNDECIDED
    assert verdict("H2", **{**arms, "random": make_arm(0.31)}) == FALSIFIED


@pytest.mark.parametrize(
    ("hack", "passed", "expected"),
    [
        (0.24, 0.30, SUPPORTED),
        (0.25, 0.30, FALSIFIED),  # higher by exactly 5 points
        (0.00, 0.30, SUPPORTED),
        (0.20, 0.25, SUPPORTED),
        (0.20, 0.24, FALSIFIED),  # pays in pass rate
        (0.20, 0.36, UNDECIDED),  # not matched
    ],
)
def test_h3(hack, passed, expected):
    assert verdict("H3", rebound=make_arm(0.20), projected=make_arm(hack, passed)) == expected


@pytest.mark.parametrize(
    ("hack", "seeds", "expected"), [(0.30, 3, SUPPORTED), (0.29, 3, FALSIFIED), (0.9, 2, UNDECIDED), (0.1, 1, UNDECIDED)]
)
def test_h4(hack, seeds, expected):
    assert verdict("H4", vanilla=make_arm(hack, seeds=seeds)) == expected


@pytest.mark.parametrize(
    ("cone", "cone_pass", "random", "nonhack", "expected"),
    [
        (0.06, 0.30, 0.60, 0.60, SUPPORTED),  # no_loophole is at .01: exactly 5 points
        (0.07, 0.30, 0.60, 0.60, FALSIFIED),
        (0.01, 0.24, 0.60, 0.60, FALSIFIED),
        (0.01, 0.36, 0.60, 0.60, UNDECIDED),
        (0.01, 0.30, 0.03, 0.60, FALSIFIED),  # a control keeps too
        (0.01, 0.30, 0.60, 0.05, FALSIFIED),
    ],
)
def test_h5(cone, cone_pass, random, nonhack, expected):
    arms = {"cone": make_arm(cone, cone_pass), "cone_match_random": make_arm(random), "cone_match_shuffled": make_arm(nonhack)}
    assert verdict("H5", no_loophole=make_arm(0.01), **arms) == expected
    assert verdict("H5", **arms) == UNDECIDED, "without no_loophole there is nothing to compare with"


def test_missing_arms_leave_everything_undecided_and_say_which():
    result = stats.verdicts({}, stats.LISTED)
    assert [v["verdict"] for v in result] == [UNDECIDED] * 8
    assert [v["id"] for v in result] == ["H1", "H1g", "H2", "H2g", "H3", "H3g", "H4", "H5"]
    assert result[0]["numbers"] == ["no finished run of projected or vanilla"]
    assert result[1]["numbers"] == ["no finished run of projected_gated or vanilla"]


def test_the_gated_arm_is_judged_by_the_same_rules_beside_projected():
    """And what is said of an arm's gate stands with the verdicts on that arm alone."""
    found = {name: make_arm(hack, 0.3) for name, hack in {"vanilla": 0.6, "no_svd": 0.6, "random": 0.6, "rebound": 0.2}.items()}
    found |= {"projected": make_arm(0.59), "projected_gated": make_arm(0.1)}
    result = {v["id"]: v for v in stats.verdicts(found, stats.LISTED, {"projected": "its gate failed"})}
    assert {v["verdict"] for name, v in result.items() if name in ("H1", "H2", "H3")} == {FALSIFIED}
    assert {v["verdict"] for name, v in result.items() if name.endswith("g")} == {SUPPORTED}
    for name, v in result.items():
        assert ("its gate failed" in v["numbers"]) == (name in ("H1", "H2", "H3"))
        assert not name.endswith("g") or v["claim"] == result[name[:-1]]["claim"].replace("projected", "projected_gated")


@pytest.mark.parametrize(
    ("projected", "start"),
    [
        (make_arm(0.2, spread=0.02), "At matched pass rate (within 5 points: 30.0 % against 30.0 %), projected reduces"),
        (make_arm(0.9, spread=0.02), "At matched pass rate (within 5 points: 30.0 % against 30.0 %), projected raises"),
        (make_arm(0.58, spread=0.3), "At matched pass rate (within 5 points: 30.0 % against 30.0 %), projected does not change"),
        (make_arm(0.2, 0.2), "The pass rates do not match (20.0 % against 30.0 %: lower by more than 5 points)"),
        (make_arm(0.2, 0.4), "The pass rates do not match (40.0 % against 30.0 %: higher by more than 5 points)"),
        (
            make_arm(0.2, seeds=1),
            "At matched pass rate (within 5 points: 30.0 % against 30.0 %), projected has a hack rate of 20.0 %",
        ),
    ],
)
def test_headline_checks_its_conditions(projected, start):
    text = stats.headline({"vanilla": make_arm(0.6), "projected": projected})
    assert text.startswith(start), text
    assert ("too few seeds" in text) == (len(projected["hack"]) < 3)


def test_headline_numbers():
    text = stats.headline({"vanilla": make_arm(0.6), "projected": make_arm(0.2, 0.27)})
    assert text == (
        "At matched pass rate (within 5 points: 27.0 % against 30.0 %), projected reduces the hack rate from 60.0 % to 20.0 % "
        "(-40.0 points (no variance over seeds), 3 seeds)."
    )
    assert stats.headline({}) == "Nothing can be said about projected: no finished run of projected or vanilla."
