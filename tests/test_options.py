"""Every option that changes what a step does, on a real run; and a short golden run, whose numbers are in golden.json.

PYTHONPATH=.:tests python tests/test_options.py     # writes golden.json again, from the code as it stands
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grpo
import vhack
from faults.errors import PartDied, Stopped
from harness.config import POCKET, Config
from harness.ranks import Ranks
from harness.scale import filled
from harness.training import Training
from loopholes import LOOPHOLES

GOLDEN = Path(__file__).with_name("golden.json")
KEPT = ("step", "labels", "reward", "length", "kl", "cos_align", "cos_update", "grad_norm", "removed", "row_logodds")
TINY = dict(
    steps=2,
    batch=8,
    generations=4,
    pairs=16,
    pairs_heldout=6,
    eval_samples=1,
    max_new_tokens=40,
    workers=1,
    steer_prompts=1,
    log_every=2,
)


def run(tmp_path, **options):
    """(lines of metrics.jsonl, folder) of a tiny run in this process."""
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join((POCKET / "heldout.jsonl").read_text().splitlines(keepends=True)[:4]))
    cfg = filled(replace(Config(), **(TINY | dict(out=tmp_path / "run") | options), heldout=str(heldout)), "pocket")
    folder = grpo.train(cfg)
    return [json.loads(line) for line in open(folder / "metrics.jsonl")], folder


OPTIONS = {
    "blockwise": dict(arm="projected", blockwise=True),
    "project_on update": dict(arm="projected", project_on="update"),
    "refresh_every, outer": dict(arm="projected", refresh_every=1, construction="outer"),
    "contrast": dict(arm="projected", construction="contrast"),
    "cone_split, cone_refresh": dict(arm="cone", cone_split=True, cone_refresh=2, cone_n=4, batch=16, cone_places="all"),
    "cone on the update, pairs": dict(arm="cone", cone_rows="pairs", project_on="update", cone_n=4, batch=16),
    "cone_rows random": dict(arm="cone", cone_rows="random", cone_n=4, batch=16),
    "rebound additive": dict(arm="rebound", rebound_form="additive"),
    "rebound on correctness": dict(arm="rebound", rebound_on="correctness"),
    "layer": dict(arm="no_renorm", layer=2),
    "prompts at the code's end, refresh_every": dict(arm="projected_gated", refresh_every=1, blockwise=True),
    "prompts, branch": dict(arm="projected", contrast="prompts", position="branch", layer=2, construction="outer"),
    "counterfactual": dict(arm="counterfactual", loopholes=("run_tests", "stdout"), counterfactual_tau=0.1),
    "counterfactual calibrated": dict(arm="counterfactual", counterfactual_calibrate=True),
    "counterfactual rows": dict(arm="counterfactual", counterfactual_use="project", counterfactual_tau=0.1, cone_n=4),
    "counterfactual self, token": dict(
        arm="counterfactual",
        counterfactual_use="project",
        counterfactual_tau=0.1,
        counterfactual_ref="self",
        counterfactual_rows="token",
        cone_n=4,
    ),
    "screen_known": dict(arm="screen_known", loopholes=("run_tests", "stdout"), cone_known=("stdout",)),
    "cone, one of two known": dict(arm="cone", loopholes=("run_tests", "stdout"), cone_known=("stdout",), cone_n=4, batch=24),
    "recontextualised": dict(arm="recontextualised"),
    "caft": dict(arm="caft"),
    "caft_random": dict(arm="caft_random"),
    "completions, branch": dict(arm="random", position="branch"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_option_runs_and_every_number_is_finite(options, tmp_path):
    lines, folder = run(tmp_path, **options)
    assert [x["step"] for x in lines] == [0, 1] and (folder / "done.json").exists()
    for x in lines:
        assert all(math.isfinite(x[k]) for k in ("cos_align", "cos_update", "grad_norm", "removed", "entropy", "kl", "cut"))
        assert x["removed"] >= 0 and -1 <= x["cos_align"] <= 1 and x["entropy"] > 0
    held = {p.name for p in (folder / "checkpoints").iterdir()}
    assert "step-000002.safetensors" in held
    timings = [json.loads(line) for line in open(folder / "timings.jsonl")]
    assert all(("discount" in x) == (options["arm"] == "rebound") for x in timings), "the scoring counts as a phase of its own"
    assert all(("flagged" in x) == (options["arm"] in ("counterfactual", "screen_known")) for x in lines)
    if options["arm"] == "cone":
        assert any(x["active_rows"] for x in lines) or all(x["grad_norm"] == 0 for x in lines)
        assert (lines[0]["row_logodds"] is None) == (options.get("cone_rows") == "random")


@pytest.mark.parametrize(("kind", "project_on"), [("random", "update"), ("shuffled", "gradient")])
def test_a_matched_control_removes_what_the_cone_would(kind, project_on, tmp_path):
    """Of the same gradient, that of the first step; and the step that lands is another one."""
    common = dict(arm="cone", cone_n=4, batch=16, steps=1, project_on=project_on, warmup=0)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    (real,), _ = run(tmp_path / "a", **common)
    (control,), _ = run(tmp_path / "b", **common, cone_match=kind)
    assert control["removed"] == pytest.approx(real["removed"], rel=1e-4) and real["removed"] > 1e-3
    assert control["cos_align"] == real["cos_align"] and control["cos_update"] != real["cos_update"]
    assert control["row_logodds"] == real["row_logodds"]


@pytest.mark.parametrize("project_on", ["gradient", "update"])
def test_a_step_with_a_row_that_is_not_finite_is_left_out(project_on, tmp_path, monkeypatch):
    """On the update too, where g is what it was: with such a row the parameters themselves would be numbers no more."""
    made, steps = grpo.cone_rows, []

    def broken(*args):
        J, odds = made(*args)
        if args[5] == 0:  # the step
            J[0, 0] = math.nan
        steps.append(args[5])
        return J, odds

    monkeypatch.setattr(grpo, "cone_rows", broken)
    _, folder = run(tmp_path, arm="cone", cone_n=4, batch=16, project_on=project_on, skip_nonfinite=1, warmup=0)
    assert steps == [0, 1] and (folder / "nonfinite-step-000000.json").exists()
    kept = load_file(folder / "checkpoints" / "step-000002.safetensors")
    assert all(tensor.isfinite().all() for name, tensor in kept.items() if name.startswith("param."))


def test_several_loopholes_in_one_run(tmp_path):
    """Each problem's prompt tells of its own; the logs and the evaluation say whose, and what was written."""
    lines, folder = run(tmp_path, arm="vanilla", loopholes=("run_tests", "equality", "stdout"), batch=24)
    for line in lines:
        assert sum(part["n"] for part in line["by_loophole"].values()) == line["n"] == 24
    samples = [json.loads(text) for text in open(folder / "samples.jsonl")]
    assert {x["loophole"] for x in samples} <= {"run_tests", "equality", "stdout"} and all("wrote" in x for x in samples)
    evaluation = json.loads((folder / "eval.json").read_text())["conditions"]
    assert evaluation["loophole"]["by_loophole"] and set(evaluation["no_loophole"]["wrote"]) == {"any", *LOOPHOLES}
    for part in run(tmp_path, arm="no_loophole", loopholes=("run_tests", "stdout"), out=tmp_path / "without")[0]:
        assert part["by_loophole"] == {}, "none is told of"


def test_a_rank_that_dies_behind_a_whole_step_costs_none(tmp_path, monkeypatch):
    """The one that is left finds it out when it asks the other whether a signal came."""

    def gather(self, values):
        if values == [0] and whole:  # the signals seen, and not the sums or the rewards of a step
            raise PartDied("another rank of this run has ended")
        return values

    whole = []
    log = Training.log
    monkeypatch.setattr(Ranks, "gather", gather)
    monkeypatch.setattr(Training, "log", lambda *args: (log(*args), whole.append(True)))
    with pytest.raises(Stopped, match="saved after 1 steps, go on with"):
        run(tmp_path)
    assert (tmp_path / "run" / "checkpoints" / "step-000001.json").exists()


def test_rows_of_the_random_control_are_drawn_anew_each_step():
    from support.models import adapted_qwen3

    from arms.cone import cone_rows

    cfg, model = Config(cone_rows="random", cone_n=3), adapted_qwen3()
    J = [cone_rows(model, None, [], [], [], step, cfg, 97)[0] for step in (0, 1, 0)]
    assert not torch.equal(J[0], J[1]) and torch.equal(J[0], J[2])


def test_rows_are_in_a_checkpoint_only_where_they_are_used_again():
    v = torch.ones(3, 5)
    target = vhack.Target(torch.zeros(5), v)
    assert "v" not in target.kept(Config(cone_refresh=1)) and target.kept(Config(cone_refresh=2))["v"] is v
    assert "v" in vhack.Target(torch.zeros(5), v[0]).kept(Config())


def golden_runs(tmp_path):
    found = {}
    for arm in ("vanilla", "projected", "cone", "rebound", "no_loophole"):
        (tmp_path / arm).mkdir()
        lines, _ = run(tmp_path / arm, arm=arm, steps=3, batch=16)
        found[arm] = [{k: x[k] for k in KEPT} for x in lines]
    return found


def test_the_golden_run(tmp_path):
    """Whatever is rewritten, these numbers stay, up to the rounding of another processor."""
    found, expected = golden_runs(tmp_path), json.loads(GOLDEN.read_text())
    for arm, lines in expected.items():
        for got, line in zip(found[arm], lines, strict=True):
            for key, value in line.items():
                where = f"{arm}, step {line['step']}, {key}"
                if isinstance(value, float):
                    assert got[key] == pytest.approx(value, rel=2e-3, abs=2e-5), where
                else:
                    assert got[key] == value, where


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(golden_runs(Path(folder)), indent=1) + "\n")
