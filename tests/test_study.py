"""The study: its plan, its control of real processes (killed, failing, resumed), and its report on sound and broken folders."""

import contextlib
import copy
import dataclasses
import errno
import functools
import json
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.synthetic import RATES, make_run

from harness.config import Config, parse, portable
from harness.scale import filled
from loopholes import LOOPHOLES
from study import __main__ as study
from study import analysis, plan, plots, report, runner, runs, stats

HERE = Path(__file__).parent
FAKE = HERE / "support" / "fake_grpo.py"
STEP = 0.02


@pytest.fixture(autouse=True)
def _signals():
    """study.main installs signal handlers; pytest gets its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Finished runs of every arm, three seeds each, 30 steps."""
    root = tmp_path_factory.mktemp("templates")
    for variant in RATES:
        for seed in range(3):
            hack, passed = RATES[variant]
            rates = (max(0.0, hack + (0.04 * (seed - 1) if hack > 0.05 else 0)), passed + 0.01 * (seed - 1))
            make_run(root / f"{variant}-seed{seed}", variant, seed, steps=30, rates=rates)
    return root


@pytest.fixture
def quick_plots(monkeypatch):
    """Where the figures themselves are not looked at, one is enough."""
    monkeypatch.setattr(report, "draw_all", lambda runs, out: [])


@pytest.fixture
def fake(templates, monkeypatch):
    monkeypatch.setenv("FAKE_TEMPLATES", str(templates))
    monkeypatch.setenv("FAKE_STEP", "0")


def arguments(out, *more):
    return ["--plan", "one", "--out", str(out), "--program", str(FAKE), *more]


def finished_study(templates, out, variants=("vanilla", "projected"), seeds=3):
    for variant in variants:
        for seed in range(seeds):
            shutil.copytree(templates / f"{variant}-seed{seed}", out / "runs" / f"{variant}-seed{seed}")
    return out


# --- The plan --------------------------------------------------------------------------------------------------------


def test_plan_holds_the_registered_arms_at_their_seeds(tmp_path):
    jobs = plan.plan(tmp_path, "pocket", seeds=3, ablation_seeds=1)
    seeds = {variant: [job.seed for job in jobs if job.variant == variant] for variant in plan.ONE}
    compared = {"vanilla", "projected", "projected_gated", "cone", "rebound", "random", "no_loophole"}
    compared |= {"cone_random", "cone_nonhack", "cone_match_random", "cone_match_shuffled"}
    compared |= {"counterfactual", "screen_known", "recontextualised", "caft", "caft_random"}
    assert {variant for variant, s in seeds.items() if s == [0, 1, 2]} == compared
    assert {variant for variant, s in seeds.items() if s == [0]} == {
        "no_renorm", "no_svd", "m8", "m32", "rebound_additive", "rebound_correctness"
    }  # fmt: skip
    assert len(jobs) == 54


def test_more_seeds_leave_the_controls_at_three(tmp_path):
    jobs = plan.plan(tmp_path, "pocket", seeds=6, ablation_seeds=3)
    counts = {"projected_gated": 6, "cone": 6, "cone_random": 3, "cone_match_shuffled": 3, "no_svd": 3}
    assert {v: sum(job.variant == v for job in jobs) for v in counts} == counts
    assert sum(job.variant == "cone_random" for job in plan.plan(tmp_path, "pocket", seeds=2, ablation_seeds=1)) == 2


def test_every_planned_flag_is_one_that_names_its_variant():
    """What the study asks for must be read back under the same name, or its runs would be rejected as foreign."""
    for name, variants in plan.PLANS.items():
        for variant, (flags, _) in variants.items():
            for scale in ("pocket", "small", "full"):
                settings = portable(filled(parse([*flags, *plan.LOOPHOLES_OF[name]]), scale))
                named = runs.variant_of(settings, shared={"loopholes"} if name == "several" else ())
                assert named == variant.removesuffix(plan.LONG)


def test_the_registered_settings_are_the_trainer_s_defaults():
    default = json.loads(json.dumps(vars(filled(Config(), "pocket")), default=str))  # as config.json has them
    assert {field: default[field] for field in runs.SETTINGS} == {field: usual for field, (usual, _) in runs.SETTINGS.items()}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"arm": "projected", "blockwise": True}, "projected+blockwise"),
        ({"arm": "projected", "m": 8, "project_on": "update"}, "m8+project_on=update"),
        ({"arm": "random", "layer": 2, "construction": "outer"}, "random+layer=2+construction=outer"),
        ({"arm": "no_renorm", "refresh_every": 5}, "no_renorm+refresh_every=5"),
        ({"arm": "cone", "cone_n": 8}, "cone+cone_n=8"),
        ({"arm": "cone", "cone_split": True, "cone_refresh": 4}, "cone+cone_refresh=4+cone_split"),
        ({"arm": "cone", "cone_rows": "random", "cone_ridge": 0.1}, "cone_random+cone_ridge=0.1"),
        ({"arm": "cone", "cone_rows": "pairs"}, "cone+cone_rows=pairs"),
        ({"arm": "cone", "cone_places": "all"}, "cone+cone_places=all"),
        ({"arm": "cone", "cone_match": "random", "cone_n": 8}, "cone_match_random+cone_n=8"),
        ({"arm": "projected_gated", "m": 64, "contrast": "prompts", "position": "code"}, "projected_gated"),
        ({"arm": "projected_gated", "m": 16, "contrast": "prompts", "position": "code"}, "projected_gated+m=16"),
        ({"arm": "projected", "m": 64, "contrast": "prompts", "position": "code"}, "m64+contrast=prompts+position=code"),
        ({"arm": "vanilla", "contrast": "prompts"}, "vanilla+contrast=prompts"),
        ({"arm": "rebound", "rebound_on": "correctness", "rebound_form": "additive"}, "rebound_additive+rebound_on=correctness"),
        ({"arm": "cone", "loopholes": ["run_tests", "stdout"]}, "cone+loopholes=run_tests,stdout"),
        ({"arm": "vanilla", "cone_n": 8, "rebound_form": "additive", "steps": 3, "lr": 1.0, "seed": 9}, "vanilla"),
    ],
)
def test_a_setting_that_changes_the_result_is_part_of_the_name(settings, name):
    assert runs.variant_of(settings) == name


def test_a_run_with_other_settings_is_no_duplicate(templates, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(templates / "projected-seed0", other)
    content = json.loads((other / "config.json").read_text())
    content["config"]["blockwise"] = True
    (other / "config.json").write_text(json.dumps(content))
    read, problems = runs.read_runs([templates / "projected-seed0", other])
    assert [run.variant for run in read] == ["projected", "projected+blockwise"] and not problems
    assert set(analysis.analyse(read)["arms"]) == {"projected", "projected+blockwise"}


def test_loopholes_that_all_runs_have_in_play_name_none(templates, tmp_path):
    """So that `python -m study plot` knows the cones of the plan by their names, and frames what they know."""
    folders = []
    for arm, changes in (("vanilla", {}), ("cone", {"cone_known": list(plan.KNOWN_THREE)})):
        folders.append(tmp_path / arm)
        shutil.copytree(templates / f"{arm}-seed0", folders[-1])
        content = json.loads((folders[-1] / "config.json").read_text())
        content["config"] |= {"loopholes": list(LOOPHOLES)} | changes
        (folders[-1] / "config.json").write_text(json.dumps(content))
    read, _ = runs.read_runs(folders)
    assert [run.variant for run in read] == ["vanilla", "cone_three"]
    read, _ = runs.read_runs([*folders, templates / "vanilla-seed0"])
    assert [run.variant.split("=")[0] for run in read] == ["vanilla+loopholes", "cone_three+loopholes", "vanilla"]


def test_runs_of_another_model_are_not_drawn_with_the_rest(templates, quick_plots, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(templates / "vanilla-seed0", other)
    content = json.loads((other / "config.json").read_text())
    content["config"]["seed"], content["hashes"]["model"] = 9, "another"
    (other / "config.json").write_text(json.dumps(content))
    both = [str(templates / "projected-seed0"), str(templates / "vanilla-seed0"), str(other)]
    assert study.main(["plot", *both, "--out", str(tmp_path / "plots")]) == 0
    assert "left out: " in (said := capsys.readouterr().err) and "another model than the other runs" in said


def test_a_setting_that_a_whole_study_shares_names_no_run(templates, quick_plots, tmp_path):
    out = finished_study(templates, tmp_path, ("cone",), seeds=1)
    path = out / "runs" / "cone-seed0" / "config.json"
    content = json.loads(path.read_text())
    content["config"]["cone_n"] = 8
    path.write_text(json.dumps(content))
    assert study.main(arguments(out, "--only", "cone", "--seeds", "1", "--report", "--", "--cone-n", "8")) == 0
    assert list(json.loads((out / "results.json").read_text())["arms"]) == ["cone"]


def test_estimate_packs_runs_and_learns_from_finished_ones(templates, tmp_path):
    jobs = plan.plan(tmp_path, "pocket", 3, 1, only=["vanilla", "random"])
    assert plan.estimate(jobs, parallel=2) == 3 * 120
    finished_study(templates, tmp_path, ("vanilla",), seeds=1)  # 240 s by its done.json
    assert plan.estimate(jobs, parallel=2) == 3 * 240
    cone = plan.plan(tmp_path / "b", "pocket", 1, 1, only=["cone"])
    assert plan.estimate(cone, 2) == pytest.approx(120 * plan.CONE_FACTOR)


def test_dry_run_prints_plan_cost_and_commands_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "study"
    assert study.main(arguments(out, "--dry-run", "--price-per-hour", "2.5", "--", "--steps", "7")) == 0
    text = capsys.readouterr().out
    commands = [line for line in text.splitlines() if line.startswith("python ")]
    assert len(commands) == 54 and all(line.endswith("--steps 7") for line in commands)
    assert "--arm cone --cone-rows nonhack --seed 2 --scale pocket" in text
    hours = plan.estimate(plan.plan(out, "pocket", 3, 1), 2) / 3600
    assert f"about {2.5 * hours:.2f} at 2.50 an hour" in text
    assert not out.exists()


@pytest.mark.parametrize("bad", [["--only", "nonsense"], ["--seeds", "0"], ["--scale", "huge"]])
def test_bad_arguments_end_with_exit_2(bad, tmp_path, capsys):
    try:
        code = study.main(arguments(tmp_path / "s", *bad))
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and capsys.readouterr().err.strip()
    assert not (tmp_path / "s").exists()


def refused(argv, capsys, says):
    """The command ends with exit code 2 and one line that holds `says`, and leaves every file as it was."""
    before = {path: path.read_bytes() if path.is_file() else None for path in Path.cwd().rglob("*")}
    assert study.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and says in captured.err, captured.err
    assert {path: path.read_bytes() if path.is_file() else None for path in Path.cwd().rglob("*")} == before


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("more", [[], ["--report"], ["--dry-run"]], ids=["run", "report", "dry-run"])
@pytest.mark.parametrize("place", ["file", "file/below", "out/runs", "out/logs", "out/plots"])
def test_a_file_where_a_folder_is_needed_is_one_line(place, more, here, capsys):
    Path("out").mkdir()
    file = Path("file" if place.startswith("file") else place)
    file.write_text("precious")
    refused(arguments(place if place.startswith("file") else "out", *more), capsys, f"{file} is a file where a folder is needed")


def test_a_file_where_the_figures_should_go_is_one_line(templates, here, capsys):
    Path("file").write_text("precious")
    refused(["plot", str(templates / "vanilla-seed0"), "--out", "file"], capsys, "file is a file where a folder is needed")
    refused(["plot", "nothing", "--out", "file/below"], capsys, "file is a file where a folder is needed")


def test_no_folder_to_draw_is_one_line(here, capsys):
    refused(["plot"], capsys, "there is no finished run to draw")
    refused(["plot", "nothing", "nowhere"], capsys, "nothing: no such run folder; nowhere: no such run folder")


def test_a_folder_that_cannot_be_made_is_one_line(here, capsys):
    refused(arguments("/proc/none", "--report"), capsys, "/proc/none: No such file or directory; mend that")
    refused(arguments("x" * 300, "--dry-run"), capsys, "File name too long")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (["--parallel", "-1"], "--parallel must be at least 1"),
        (["--seeds", "1000000000"], "--seeds must be at least 1 and at most 1000"),
        (["--price-per-hour", "nan"], "--price-per-hour must be at least 0 and at most 1e+38, not nan"),
        (["--price-per-hour", "-1"], "--price-per-hour must be at least 0 and at most 1e+38, not -1"),
        (["--program", "nowhere.py"], "--program nowhere.py: no such file"),
        (["--program", "."], "--program .: no such file"),
        (["--only"], "--only names no arm"),
        (["--", "--steps", "0"], "--steps must be at least 1 and at most 2147483647, not 0"),
        (["--only", "cone", "--", "--blockwise"], "--blockwise has no meaning for --arm cone"),
        (["--", "--seed", "3"], "--seed cannot follow --"),
        (["--", "--out", "other"], "--out cannot follow --"),
        (["--", "--m=8"], "--m cannot follow --"),
        (["--", "--cone-rows", "pairs"], "--cone-rows cannot follow --"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_before_anything_is_written(bad, says, here, capsys):
    refused(arguments("out", *bad), capsys, says)


def test_an_unknown_option_after_the_dashes_ends_the_study_before_any_run(here, capsys):
    with contextlib.suppress(SystemExit):  # of the parser
        assert study.main(arguments("out", "--", "--stepps", "3")) == 2
    assert "stepps" in capsys.readouterr().err and not list(here.iterdir())


@pytest.mark.parametrize("kind", ["a list", "truncated", "not text", "nested", "a folder"])
def test_a_study_json_that_cannot_be_read_is_one_line(kind, here, capsys):
    path = here / "out" / "study.json"
    path.parent.mkdir()
    content = {"a list": b"[1]", "truncated": b'{"scale"', "not text": b"\xff\xfe", "nested": b"[" * 100_000}
    path.mkdir() if kind == "a folder" else path.write_bytes(content[kind])
    refused(arguments("out", "--report"), capsys, "choose another --out")


def test_a_lock_that_is_a_folder_is_one_line(here, capsys):
    (here / "out" / "study.lock").mkdir(parents=True)
    refused(arguments("out", "--report"), capsys, "study.lock: Is a directory")


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "[]", "1" + "0" * 400], ids=["nan", "inf", "list", "huge"])
def test_a_time_that_is_no_number_spoils_no_estimate(seconds, here, capsys):
    folder = here / "out" / "runs" / "vanilla-seed0"
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(f'{{"seconds": {seconds}}}')
    assert study.main(arguments("out", "--only", "vanilla", "--dry-run")) == 0
    assert "3 runs, 1 done, 2 at a time; about 2 min to go" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("error: unknown option --stepps\n╭─ help ─╮\n│ see --help │\n╰────────╯\n", "error: unknown option --stepps"),
        ("Traceback\nKeyError: 'x'\n╰────╯\n", "KeyError: 'x'"),
        ("error: of the first start\n$ python grpo.py --resume x\nstopped: no memory\n\n100 %\n", "stopped: no memory"),
        ("error: of the first start\n$ python grpo.py --resume x\n", None),
    ],
)
def test_the_reason_of_a_failed_run_is_the_line_that_says_why(log, why, tmp_path):
    job = plan.plan(tmp_path, "pocket", 1, 1, only=["vanilla"])[0]
    job.log.parent.mkdir()
    job.log.write_text("$ python grpo.py\n" + log)
    assert runner.failure(job, 1) == f"{job.folder}: failed with exit code 1{f': {why}' if why else ''} (log: {job.log})"


def test_a_folder_keeps_to_one_study(fake, quick_plots, tmp_path, capsys):
    out = tmp_path / "study"
    assert study.main(arguments(out, "--only", "vanilla", "--seeds", "1")) == 0
    assert study.main(arguments(out, "--only", "vanilla", "--seeds", "1", "--", "--steps", "3")) == 2
    assert "holds a study" in capsys.readouterr().err


# --- Processes -------------------------------------------------------------------------------------------------------


def test_runs_all_skips_done_and_passes_flags(fake, quick_plots, tmp_path, capsys):
    out = tmp_path / "study"
    command = arguments(out, "--only", "vanilla", "m8", "--seeds", "2")
    assert study.main(command) == 0
    assert sorted(p.name for p in (out / "runs").iterdir()) == ["m8-seed0", "vanilla-seed0", "vanilla-seed1"]
    assert "--arm projected --m 8 --seed 0 --scale pocket --out" in (out / "logs" / "m8-seed0.log").read_text()
    before = (out / "results.json").read_bytes()
    capsys.readouterr()
    assert study.main(command) == 0
    text = capsys.readouterr().out
    assert "started" not in text and "resumed" not in text, "a finished run must not be run again"
    assert (out / "results.json").read_bytes() == before


def test_children_get_one_thread_each(tmp_path, monkeypatch):
    program = tmp_path / "show.py"
    program.write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    job = plan.plan(tmp_path, "pocket", 1, 1, only=["vanilla"])[0]
    assert runner.start(job, program, runner.try_lock(runner.lock_path(job))).wait(20) == 0
    assert job.log.read_text().splitlines()[-1] == "1"


def test_a_failed_run_is_reported_and_stops_nothing(fake, quick_plots, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAIL", "random-seed0")
    out = tmp_path / "study"
    assert study.main(arguments(out, "--only", "random", "vanilla", "no_svd", "--seeds", "1")) == 1
    assert (out / "runs" / "vanilla-seed0" / "done.json").exists()
    assert (out / "runs" / "no_svd-seed0" / "done.json").exists()
    text = (out / "report.md").read_text()
    assert re.search(r"Left out: .*random-seed0: failed with exit code 1: error: this run was told to fail", text)
    monkeypatch.delenv("FAKE_FAIL")
    capsys.readouterr()
    assert study.main(arguments(out, "--only", "random", "vanilla", "no_svd", "--seeds", "1")) == 0
    assert "resumed random-seed0" in capsys.readouterr().out


def test_a_false_start_is_moved_aside_and_kept(fake, quick_plots, tmp_path):
    out = tmp_path / "study"
    folder = out / "runs" / "vanilla-seed0"
    folder.mkdir(parents=True)
    (folder / "something").write_text("precious")
    assert study.main(arguments(out, "--only", "vanilla", "--seeds", "1")) == 0
    assert (folder.with_name("vanilla-seed0.aborted-1") / "something").read_text() == "precious"


def start(out, step, *more, **environment):
    """A study as a process of its own, quick to draw; returns it."""
    code = (
        "import sys; from study import __main__, report; report.draw_all = lambda *_: []; sys.exit(__main__.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "FAKE_STEP": str(step), "OMP_NUM_THREADS": "1", **environment}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", code, *arguments(out, "--only", "vanilla", "projected", "--seeds", "1", *more)]
    hang_up = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup, a study then goes on
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=environment, preexec_fn=hang_up, **output)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def lines_of(out, name):
    path = out / "runs" / name / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_children_and_the_next_study_completes_with_the_same_numbers(
    number, fake, quick_plots, templates, tmp_path, capsys
):
    out = tmp_path / "study"
    process = start(out, 0.5)
    wait_for(lambda: lines_of(out, "vanilla-seed0") >= 2 and lines_of(out, "projected-seed0") >= 2)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, text
    for name in ("vanilla-seed0", "projected-seed0"):
        written = lines_of(out, name)
        assert 2 <= written < 30
        time.sleep(0.75)
        assert lines_of(out, name) == written, "the child is still at work"
    assert study.main(arguments(out, "--only", "vanilla", "projected", "--seeds", "1")) == 0
    assert "resumed vanilla-seed0" in capsys.readouterr().out
    assert_same_as_undisturbed(out, templates, tmp_path, ("vanilla", "projected"))


def test_after_kill_9_the_next_study_waits_for_the_orphans(fake, quick_plots, templates, tmp_path, capsys, monkeypatch):
    """The runs outlive their study; starting them a second time would have two processes write one folder."""
    out = tmp_path / "study"
    held, say = tmp_path / "held", runner.say
    held.touch()

    def said(text):
        say(text)
        if text.startswith("waiting for"):
            held.unlink(missing_ok=True)

    process = start(out, STEP, FAKE_HOLD=str(held))
    wait_for(lambda: lines_of(out, "vanilla-seed0") >= 1 and lines_of(out, "projected-seed0") >= 1)
    process.kill()
    process.communicate(timeout=120)
    monkeypatch.setattr(runner, "say", said)
    assert study.main(arguments(out, "--only", "vanilla", "projected", "--seeds", "1")) == 0
    text = capsys.readouterr().out
    assert "waiting for vanilla-seed0" in text and "started" not in text.replace("study started", "")
    assert_same_as_undisturbed(out, templates, tmp_path, ("vanilla", "projected"))


def test_a_second_study_in_the_same_folder_is_refused(fake, tmp_path, capsys):
    out = tmp_path / "study"
    process = start(out, 0.5)
    wait_for(lambda: lines_of(out, "vanilla-seed0") >= 1)
    try:
        assert study.main(arguments(out, "--only", "vanilla", "projected", "--seeds", "1")) == 2
        assert "another study is running" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)


def test_a_signal_during_a_report_begins_no_other_plan(fake, templates, tmp_path, capsys, monkeypatch):
    out = finished_study(templates, tmp_path / "study", seeds=1)
    monkeypatch.setattr(study, "report", lambda *_: os.kill(os.getpid(), signal.SIGTERM) is None)
    given = ["--out", str(out), "--program", str(FAKE), "--only", "vanilla", "projected", "counterfactual_long", "--seeds", "1"]
    assert study.main(given) == 128 + signal.SIGTERM
    assert "stopped" in capsys.readouterr().out and not (tmp_path / "study-several").exists()


def test_where_it_cannot_go_on_it_stops_its_runs(fake, tmp_path, monkeypatch):
    started, start_run = [], runner.start

    def start_one(*args):
        if started:
            raise OSError(errno.ENOSPC, "no space left on device", "log")
        started.append(start_run(*args))
        return started[0]

    monkeypatch.setattr(runner, "start", start_one)
    monkeypatch.setenv("FAKE_STEP", "60")
    assert study.main(arguments(tmp_path / "study", "--only", "vanilla", "projected", "--seeds", "1")) == 2
    assert started[0].poll() is not None


@pytest.mark.slow
def test_killed_at_many_moments_children_included_it_ends_with_the_same_numbers(fake, quick_plots, templates, tmp_path):
    out = tmp_path / "study"
    for k in range(8):
        process = start(out, 0.15)
        wait_for(lambda: (out / "logs").exists() and (out / "runs").exists())
        time.sleep(0.31 * k)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.kill()
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=120)
    assert study.main(arguments(out, "--only", "vanilla", "projected", "--seeds", "1")) == 0
    assert_same_as_undisturbed(out, templates, tmp_path, ("vanilla", "projected"))


@pytest.mark.slow
def test_the_real_program_killed_before_and_after_its_first_checkpoint_ends_with_the_same_numbers(tmp_path, quick_plots):
    """grpo.py itself: kill -9 at 2 logged steps (no checkpoint yet), at 5 (one at 3), then SIGTERM to the study at 7."""
    more = ["--only", "vanilla", "--seeds", "1", "--parallel", "1"]
    extra = ["--", "--steps", "9", "--eval-samples", "2", "--pairs", "24", "--pairs-heldout", "8", "--save-every", "3"]
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "study"
    assert study.main(["--out", str(undisturbed), *more, *extra]) == 0
    for lines, number in ((2, signal.SIGKILL), (5, signal.SIGKILL), (7, signal.SIGTERM)):
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        command = [sys.executable, "-m", "study", "--out", str(out), *more, *extra]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        wait_for(lambda lines=lines: lines_of(out, "vanilla-seed0") == lines, 300)
        if number == signal.SIGKILL:
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.kill()
            os.kill(int(child), signal.SIGKILL)
        else:
            process.send_signal(number)
        assert process.wait(130) in (-signal.SIGKILL, 128 + number)
    assert study.main(["--out", str(out), *more, *extra]) == 0
    for name in ("metrics.jsonl", "eval.json", "eval_samples.jsonl"):
        assert (out / "runs/vanilla-seed0" / name).read_bytes() == (undisturbed / "runs/vanilla-seed0" / name).read_bytes(), name
    assert (out / "results.json").read_bytes() == (undisturbed / "results.json").read_bytes()


def assert_same_as_undisturbed(out, templates, tmp_path, variants):
    other = finished_study(templates, tmp_path / "undisturbed", variants, seeds=1)
    assert study.main(arguments(other, "--only", *variants, "--seeds", "1", "--report")) == 0
    assert (out / "results.json").read_bytes() == (other / "results.json").read_bytes()


# --- The report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(templates, tmp_path_factory):
    """A report of a study with every arm and two seeds of the compared ones, every figure drawn."""
    out = tmp_path_factory.mktemp("whole")
    for job in plan.plan(out, "pocket", 2, 1):
        shutil.copytree(templates / job.name, job.folder)
    assert study.main(["--plan", "one", "--out", str(out), "--seeds", "2", "--report"]) == 0
    return out


ONE_LOOPHOLE = [name for name in report.FIGURES if name not in ("loopholes", "tau")]


def test_report_holds_all_parts_and_every_figure(whole):
    text = (whole / "report.md").read_text()
    for part in (
        "Verdicts",
        "Results by arm",
        "Against vanilla",
        "biting",
        "cone hold",
        "Plots",
        "Every run",
        "Sample responses",
    ):
        assert re.search(rf"^## .*{part}", text, re.MULTILINE), part
    for name in ONE_LOOPHOLE:
        assert (whole / "plots" / f"{name}.png").stat().st_size > 5000
        assert (whole / "plots" / f"{name}.svg").exists() == (f"plots/{name}.svg" in text) == (name != "labels")
        assert f"plots/{name}.png" in text
    assert "Left out" not in text and not re.search(r"\bnan\b", text)
    for label in ("correct", "correct_attempted", "hack", "attempted", "incorrect"):
        assert f"<th>{label}</th>" in text


def test_html_report_loads_nothing_from_anywhere(whole):
    page = (whole / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sum(s.startswith("data:image/png;base64,") for s in sources) == len(ONE_LOOPHOLE)
    assert not [s for s in sources if re.match(r"(https?:)?//", s)]
    assert "<script" not in page and "@import" not in page


def test_numbers_of_the_report_are_those_of_the_run_folders(whole):
    """Counted anew from the responses themselves."""
    results = json.loads((whole / "results.json").read_text())
    assert len(results["runs"]) == 38
    text = (whole / "report.md").read_text()
    for row in results["runs"]:
        lines = (whole / "runs" / row["folder"] / "eval_samples.jsonl").read_text().splitlines()
        responses = [json.loads(line) for line in lines]
        hacks = sum(r["label"] == "hack" for r in responses if r["condition"] == "loophole")
        right = sum(r["label"].startswith("correct") for r in responses if r["condition"] == "no_loophole")
        assert (row["hack"]["count"], row["pass"]["count"]) == (hacks, right)
        line = next(line for line in text.splitlines() if f"runs/{row['folder']}/eval.json" in line)
        assert f"({hacks}/400)" in line and f"({right}/400)" in line
    vanilla = [row["hack"]["rate"] for row in results["runs"] if row["variant"] == "vanilla"]
    assert results["arms"]["vanilla"]["hack"]["mean"] == pytest.approx(sum(vanilla) / 2)
    early = [
        json.loads(line)["removed"]
        for seed in range(2)
        for line in (whole / "runs" / f"cone-seed{seed}" / "metrics.jsonl").read_text().splitlines()[:10]
    ]
    assert results["arms"]["cone"]["biting"]["early_removed"] == pytest.approx(sum(early) / 20)
    paid = [arm["lambda"] for arm in results["arms"].values() if arm["lambda"]["low"] is not None]
    assert paid and all(0 <= interval["low"] <= interval["high"] <= 1 for interval in paid)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "no folder": (lambda f: shutil.rmtree(f), "no such run folder"),
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json: the file is missing"),
    "config.json truncated": (lambda f: truncate(f / "config.json"), "config.json: truncated"),
    "config.json of another program": (lambda f: (f / "config.json").write_text('{"lr": 1}'), "config.json: not a file of this"),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json: not a file of this"),
    "config.json not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json: truncated or not"),
    "settings are no object": (
        lambda f: (f / "config.json").write_text('{"config": [], "versions": {}, "hashes": {}, "parameters": {}}'),
        "config.json: not a file of this program",
    ),
    "no metrics.jsonl": (lambda f: (f / "metrics.jsonl").unlink(), "metrics.jsonl: the file is missing"),
    "metrics.jsonl truncated": (lambda f: truncate(f / "metrics.jsonl"), "metrics.jsonl: line 1[4-6] is truncated"),
    "metrics.jsonl short": (
        lambda f: (f / "metrics.jsonl").write_text("".join((f / "metrics.jsonl").open().readlines()[:9])),
        "metrics.jsonl: 9 steps where done.json says 30",
    ),
    "metrics.jsonl with NaN": (
        lambda f: (f / "metrics.jsonl").write_text(
            re.sub(r'"cos_align": [-\d.e]+', '"cos_align": NaN', (f / "metrics.jsonl").read_text(), count=1)
        ),
        "metrics.jsonl: line 1 ",
    ),
    "metrics.jsonl with odd kl": (
        lambda f: (f / "metrics.jsonl").write_text((f / "metrics.jsonl").read_text().replace('"kl": 0.0', '"kl": "0', 1)),
        "metrics.jsonl: line 1 ",
    ),
    "no eval.json": (lambda f: (f / "eval.json").unlink(), "eval.json: the file is missing"),
    "eval.json truncated": (lambda f: truncate(f / "eval.json"), "eval.json: truncated"),
    "metrics.jsonl is a folder": (
        lambda f: ((f / "metrics.jsonl").unlink(), (f / "metrics.jsonl").mkdir()),
        "metrics.jsonl: cannot be read .Is a directory",
    ),
    "config.json nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: truncated"),
    "a negative count": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"v_nonzero": 82000', '"v_nonzero": -1')
        ),
        "config.json: not a file of this program: field 'v_nonzero'",
    ),
    "eval.json edited": (
        lambda f: (f / "eval.json").write_text((f / "eval.json").read_text().replace('"hack": ', '"hack": 1', 1)),
        "eval.json: the counts of condition 'loophole'",
    ),
    "not finished": (lambda f: (f / "done.json").unlink(), "done.json: the run is not finished"),
    "done.json empty": (lambda f: (f / "done.json").write_text(""), "done.json: truncated"),
    "another arm": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"projected"', '"random"')),
        "another run's folder: arm 'random' where the plan has 'projected'",
    ),
    "a step twice": (
        lambda f: (f / "metrics.jsonl").write_text(
            "".join((lines := (f / "metrics.jsonl").open().readlines())[:29] + lines[28:29])
        ),
        "metrics.jsonl: line 30 ",
    ),
    "another scale": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('"pocket"', '"full"')),
        "another run's folder: scale 'full' where the plan has 'pocket'",
    ),
    "another model": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("m" * 12, "x" * 12)),
        "another model than the other runs",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_named_and_left_out(kind, templates, quick_plots, tmp_path, capsys):
    out = finished_study(templates, tmp_path)
    damage, message = DAMAGE[kind]
    folder = out / "runs" / "projected-seed1"
    damage(folder)
    assert study.main(arguments(out, "--only", "vanilla", "projected", "--report")) == 1
    results = json.loads((out / "results.json").read_text())
    assert len(results["left_out"]) == 1 and "projected-seed1" in results["left_out"][0]
    assert re.search(message, results["left_out"][0]), results["left_out"]
    assert results["arms"]["projected"]["seeds"] == [0, 2]
    assert results["comparisons"]["projected"]["hack"]["unpaired_seeds"] == [1]
    assert "Left out: " in (out / "report.md").read_text() and "projected-seed1" in capsys.readouterr().err


def places(content, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in children:
        yield from places(value, (*path, key))


def test_a_foreign_value_anywhere_is_named_or_harmless(templates, quick_plots, tmp_path):
    """300 values of other types at random places of a run's files: one clear line or a report, never a traceback."""
    rng = random.Random(0)
    source = templates / "vanilla-seed0"
    contents = {
        name: [json.loads(line) for line in (source / name).read_text().splitlines()] if name.endswith("l")
        else json.loads((source / name).read_text())
        for name in ("config.json", "done.json", "eval.json", "metrics.jsonl")
    }  # fmt: skip
    candidates = {
        name: [p for p in places(content) if p and "by_problem" not in p and (name != "metrics.jsonl" or p[0] < 2)]
        for name, content in contents.items()
    }
    refused = 0
    for k in range(300):
        name = rng.choice(list(contents))
        content = copy.deepcopy(contents[name])
        *path, last = rng.choice(candidates[name])
        functools.reduce(operator.getitem, path, content)[last] = rng.choice([None, "x", [], {}, -1, 1e400, True, [1], {"a": 1}])
        folder = tmp_path / "runs" / f"run{k}"
        shutil.copytree(source, folder)
        text = "\n".join(map(json.dumps, content)) if name.endswith("l") else json.dumps(content)
        (folder / name).write_text(text)
        read, problems = runs.read_runs([folder])
        refused += len(problems)
        assert len(read) + len(problems) == 1
        if read and k % 6 == 0:
            report.write_report(read, problems, tmp_path / "report", "title", "command")
        elif read:
            analysis.analyse(read, problems)
        shutil.rmtree(folder)
    assert refused > 60


def test_what_runs_printed_and_answered_is_text_in_the_report(templates, quick_plots, tmp_path):
    """Neither a line of a log nor a response can bring HTML or Markdown of its own into the page."""
    (run,), _ = runs.read_runs([templates / "vanilla-seed0"])
    run.evaluation["examples"]["hack"][0]["response"] = "a\r\r\n\n# no heading\n\n<script>alert(1)</script>"
    report.write_report([run], ["x: failed: <script>alert(2)</script>"], tmp_path, "title", "command")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "<h1>no heading" not in page
    assert page.count("&lt;script&gt;alert") == 2


def test_a_study_with_no_sound_run_still_reports(quick_plots, tmp_path):
    assert study.main(arguments(tmp_path / "none", "--report")) == 1
    text = (tmp_path / "none" / "report.md").read_text()
    assert text.count("Left out: ") == 54 and "No finished run" in text


def test_no_variance_is_said_and_nan_is_not(quick_plots, tmp_path):
    """Three seeds with the same evaluation: no t-test has a value."""
    out = tmp_path / "study"
    for variant in ("vanilla", "projected"):
        for seed in range(3):
            make_run(out / "runs" / f"{variant}-seed{seed}", variant, seed, steps=5, rates=(0.0, 0.0))
    assert study.main(arguments(out, "--only", "vanilla", "projected", "--report")) == 0
    for name in ("report.md", "report.html", "results.json"):
        text = (out / name).read_text()
        assert not re.search(r"\bnan\b|\binf\b|NaN|Infinity", text), name
    assert "no variance" in (out / "report.md").read_text()


def test_an_escaped_cone_run_is_said_plainly(templates, quick_plots, tmp_path):
    out = finished_study(templates, tmp_path, ("cone",), seeds=2)
    make_run(out / "runs" / "cone-seed2", "cone", 2, steps=60, rates=(0.5, 0.3))
    shutil.rmtree(out / "runs" / "cone-seed1")
    make_run(out / "runs" / "cone-seed1", "cone", 1, steps=60, rates=(0.01, 0.3))
    shutil.rmtree(out / "runs" / "cone-seed0")
    study.main(arguments(out, "--only", "cone", "--report"))
    rows = {r["seed"]: r["escape"] for r in json.loads((out / "results.json").read_text())["runs"]}
    assert rows[2]["escaped"] and rows[2]["signature"] and 18 <= rows[2]["step"] <= 40
    assert not rows[1]["escaped"] and rows[1]["step"] is None
    text = (out / "report.md").read_text()
    assert "cone, seed 2: **escaped by step" in text and "no row covers" in text and "cone, seed 1: held" in text


def test_what_screening_flagged_is_summed_over_a_run_s_steps(templates, quick_plots, tmp_path):
    out = finished_study(templates, tmp_path, ("vanilla", "counterfactual"), seeds=2)
    path = out / "runs" / "counterfactual-seed1" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for k, line in enumerate(lines):
        line |= {"flagged_hacks": 1, "hacks": 2, "flagged_honest": int(k == 7)}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    study.main(arguments(out, "--only", "vanilla", "counterfactual", "--report"))
    n = sum(sum(line["labels"].values()) for line in lines)
    text = (out / "report.md").read_text()
    assert f"| counterfactual, seed 1 | 30 | 60 | 1 | {n:,} |" in text and "| counterfactual, seed 0 |" not in text
    assert "screening flag" not in report_of(out, "vanilla")


def report_of(out, arm):
    study.main(arguments(out, "--only", arm, "--report"))
    return (out / "report.md").read_text()


def test_a_direction_that_does_not_steer_is_a_warning(templates, quick_plots, tmp_path):
    out = finished_study(templates, tmp_path)
    path = out / "runs" / "vanilla-seed2" / "config.json"
    path.write_text(path.read_text().replace('"steering_rises": true', '"steering_rises": false'))
    study.main(arguments(out, "--only", "vanilla", "projected", "--report"))
    assert re.search(r"\*\*Warning\*\*.*in 1 of 6 runs: vanilla-seed2", (out / "report.md").read_text())


def test_a_verdict_says_what_became_of_its_direction_s_gate(templates, quick_plots, tmp_path):
    out = finished_study(templates, tmp_path, ("vanilla", "projected", "projected_gated"))
    for seed in (0, 2):
        path = out / "runs" / f"projected-seed{seed}" / "config.json"
        path.write_text(path.read_text().replace('"steering_rises": true', '"steering_rises": false'))
    study.main(arguments(out, "--only", "vanilla", "projected", "projected_gated", "--report"))
    numbers = {v["id"]: v["numbers"] for v in json.loads((out / "results.json").read_text())["verdicts"]}
    text = (out / "report.md").read_text()
    for name in ("H1", "H2", "H3"):
        assert "projected: its steering gate failed in 2 of 3 runs" in numbers[name][-1]
        assert numbers[f"{name}g"][-1] == "projected_gated: its steering gate was passed in all 3 runs"
    assert not any("gate" in line for name in ("H4", "H5") for line in numbers[name])
    assert "its steering gate failed in 2 of 3 runs" in text and "| H1g | projected_gated cuts" in text


def test_plot_command_draws_any_folders_and_names_the_unreadable(templates, tmp_path, capsys):
    folders = [str(templates / name) for name in ("vanilla-seed0", "cone-seed0", "cone-seed1")]
    assert study.main(["plot", *folders, str(tmp_path / "nothing"), "--out", str(tmp_path / "plots")]) == 0
    captured = capsys.readouterr()
    assert "left out" in captured.err and "nothing" in captured.err
    assert {p.name for p in (tmp_path / "plots").iterdir()} >= {"pareto.png", "pareto.svg", "labels.png", "cone.svg", "kl.png"}
    assert study.main(["plot", str(tmp_path / "nothing"), "--out", str(tmp_path / "plots2")]) == 2


def test_arms_differ_in_marker_and_in_line_style_or_shade():
    """Readable in grey: no two arms of a plan share marker, and the main ones not even the line style and shade."""
    assert set(plots.STYLES) == set(plan.ONE | plan.SEVERAL)
    for variants in plan.PLANS.values():
        markers = [plots.STYLES[name][2] for name in variants]
        assert len(set(markers)) == len(markers)

    def grey(colour):
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    for variants in plan.PLANS.values():
        main = [plots.STYLES[name] for name in plots.MAIN_ARMS if name in variants]
        for i, (colour, line, _) in enumerate(main):
            for other, other_line, _ in main[:i]:
                assert line != other_line or abs(grey(colour) - grey(other)) > 0.2
    shades = [(grey(colour), hatch) for colour, hatch in plots.LABEL_STYLES.values()]
    assert all(abs(a - c) > 0.08 or b != d for i, (a, b) in enumerate(shades) for c, d in shades[:i])


# --- Several loopholes -----------------------------------------------------------------------------------------------


def several(out, rates, seeds=3):
    """Runs of the plan `several`. rates: {variant: (hack rate of each loophole by name, pass rate)}."""
    for variant, (by, passed) in rates.items():
        for seed in range(seeds):
            arm = {"cone_three": "cone", "screen_three": "screen_known"}.get(variant, variant.removesuffix("_long"))
            arm = "cone" if arm.startswith("cone") else arm
            steps = 60 if variant.endswith("_long") else 12
            folder = make_run(out / "runs" / f"{variant}-seed{seed}", arm, seed, steps=steps, rates=(0.3, passed), by=by)
            path = folder / "config.json"
            content = json.loads(path.read_text())
            if known := plan.known_to(variant):
                content["config"]["cone_known"] = list(known) if len(known) < 6 else None
            path.write_text(json.dumps(content))
    return out


def judged(out, rates, seeds=3):
    """{id: verdict} and the report of such a study."""
    several(out.with_name(f"{out.name}-several"), rates, seeds)
    given = ["--plan", "several", "--out", str(out), "--program", str(FAKE), "--only", *rates, "--report", "--", "--steps", "12"]
    assert study.main(given) == 0
    folder = out.with_name(f"{out.name}-several")
    results = json.loads((folder / "results.json").read_text())
    return {v["id"]: v["verdict"] for v in results["verdicts"]}, results, (folder / "report.md").read_text()


def flat(rate, **others):
    return dict.fromkeys(LOOPHOLES, rate) | others


def held(unknown):
    """What every hypothesis of several loopholes claims; `unknown`: the hack rate of a cone on what it has no rows for."""
    return {
        "vanilla": (flat(0.6), 0.35),
        "no_loophole": (flat(0.02), 0.36),
        "counterfactual": (flat(0.01), 0.35),
        "counterfactual_long": (flat(0.02), 0.36),
        "no_loophole_long": (flat(0.02), 0.36),
        **{f"cone_without_{name}": (flat(0.02, **{name: unknown}), 0.35) for name in LOOPHOLES},
        "cone_three": (flat(unknown) | dict.fromkeys(plan.KNOWN_THREE, 0.01), 0.35),
        "screen_three": (flat(unknown + 0.15) | dict.fromkeys(plan.KNOWN_THREE, 0.2), 0.35),
    }


def test_verdicts_on_hacks_that_nobody_listed(quick_plots, tmp_path):
    verdicts, results, text = judged(tmp_path / "s", held(0.6))
    assert verdicts == dict.fromkeys(("H6", "H7", "H8", "H9"), "supported")
    assert results["arms"]["cone_without_equality"]["by_loophole"]["equality"]["mean"] == pytest.approx(0.6, abs=0.1)
    row = next(line for line in text.splitlines() if line.startswith("| cone_three |") and "*" in line)
    assert [cell.strip().endswith("*") for cell in row.split("|")[2:8]] == [name in plan.KNOWN_THREE for name in LOOPHOLES]
    assert "counterfactual_long" not in results["comparisons"] and "counterfactual" in results["comparisons"]


@pytest.mark.parametrize(
    ("changes", "name", "verdict"),
    [
        ({"cone_without_stdout": (flat(0.02, stdout=0.1), 0.35)}, "H6", "falsified"),
        ({"cone_without_stdout": (flat(0.02, stdout=0.42), 0.35)}, "H6", "undecided"),
        ({"counterfactual": (flat(0.01, equality=0.2), 0.35)}, "H7", "falsified"),
        ({"counterfactual": (flat(0.01), 0.20)}, "H7", "falsified"),
        ({"counterfactual": (flat(0.01), 0.50)}, "H7", "undecided"),
        ({"counterfactual_long": (flat(0.01, run_tests=0.3), 0.35)}, "H8", "falsified"),
        ({"screen_three": (flat(0.6) | dict.fromkeys(plan.KNOWN_THREE, 0.01), 0.35)}, "H9", "falsified"),
    ],
)  # fmt: skip
def test_what_speaks_against_them(changes, name, verdict):
    assert verdict_of(held(0.6) | changes)[name] == verdict


def test_a_loophole_that_was_not_measured_leaves_h7_open():
    for measured in ((), ("run_tests",), tuple(LOOPHOLES)[1:]):
        few = {arm: ({name: by[name] for name in measured}, passed) for arm, (by, passed) in held(0.6).items()}
        assert verdict_of(few)["H7"] == "undecided"
    one = {arm: ({"run_tests": by["run_tests"]}, passed) for arm, (by, passed) in held(0.6).items()}
    assert verdict_of(one | {"counterfactual": ({"run_tests": 0.3}, 0.35)})["H7"] == "falsified"


def verdict_of(rates, seeds=3):
    """{id: verdict} by exact rates, a little apart by seed."""
    arms = {
        variant: {
            "hack": {seed: [sum(by.values()) / 6 + 0.001 * seed] for seed in range(seeds)},
            "pass": {seed: [passed] for seed in range(seeds)},
            **{name: {seed: [rate] for seed in range(seeds)} for name, rate in by.items()},
        }
        for variant, (by, passed) in rates.items()
    }
    return {v["id"]: v["verdict"] for v in stats.verdicts(arms, stats.NOT_LISTED)}


def thresholded(variant, tau, hack, honest):
    """A run of two steps of 50 responses, as far as the figure of the threshold reads it."""
    lines = [dict(labels=dict(hack=5, incorrect=45), flagged_hacks=5, hacks=5, flagged_honest=n) for n in (honest, 0)]
    made = SimpleNamespace(variant=variant, config=dict(counterfactual_tau=tau), metrics=lines)
    made.wilson = lambda rate: dict(rate=hack)
    made.series = lambda name: ([0, 1], [line[name] for line in lines])
    return made


def test_the_threshold_is_drawn_against_what_it_lets_through_and_what_it_flags():
    runs = [thresholded("counterfactual", 2.0, 0.01, 4), thresholded("counterfactual_tau6", 6.0, 0.4, 1)]
    runs += [thresholded("counterfactual_project", 2.0, 0.9, 0), thresholded("counterfactual_long", 2.0, 0.9, 0)]
    figure = plots.tau(runs)
    drawn = [[tuple(map(float, line.get_xydata()[0])) for line in axis.lines] for axis in figure.axes]
    assert drawn == [[(2.0, 0.01), (6.0, 0.4)], [(2.0, 0.04), (6.0, 0.01)]]
    for axis in figure.axes:
        numbers = [axis.yaxis.get_major_formatter()(y, 0) for y in axis.get_yticks()]
        assert len(set(numbers)) == len(numbers), "every line of the grid says another number"
    assert plots.tau(runs[:1]) is None, "one threshold alone is no curve"


def test_two_seeds_decide_nothing():
    assert set(verdict_of(held(0.6)).values()) == {"supported"}
    assert set(verdict_of(held(0.6), seeds=2).values()) == {"undecided"} == set(verdict_of({}).values())


def test_the_figure_of_loopholes_frames_what_an_arm_knows(tmp_path, monkeypatch):
    several(tmp_path, {name: held(0.6)[name] for name in ("vanilla", "cone_three", "cone_without_stdout")}, seeds=1)
    found = [
        dataclasses.replace(runs.read_run(f, shared={"loopholes"}), variant=f.name.partition("-")[0])
        for f in sorted((tmp_path / "runs").iterdir())
    ]
    figure = plots.loopholes(found)
    (axis,) = figure.axes
    rows = [label.get_text().split(" ")[0] for label in axis.get_yticklabels()]
    framed = {(rows[round(p.get_y() + 0.43)], list(LOOPHOLES)[round(p.get_x() + 0.46)]) for p in axis.patches}
    assert framed == {(row, name) for row in rows for name in plan.known_to(row)} and len(framed) == 3 + 5


def test_long_runs_have_five_times_the_steps_of_the_others(tmp_path):
    def steps(extra):
        jobs = plan.plan(tmp_path, "pocket", 1, 1, ("counterfactual", "counterfactual_long"), extra, "several")
        return [parse(job.arguments()).steps for job in jobs]

    assert steps(()) == [None, 300] and steps(("--steps", "7")) == [7, 35] and steps(("--steps=8", "--lr", "1")) == [8, 40]


def test_one_command_runs_both_plans_each_in_its_folder(tmp_path, capsys):
    out = tmp_path / "study"
    assert study.main(["--out", str(out), "--only", "vanilla", "screen_three", "m8", "--seeds", "1", "--dry-run"]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    assert [("--loopholes all" in c, c.split("--out ")[1]) for c in commands] == [
        (False, f"{out}/runs/vanilla-seed0"),
        (False, f"{out}/runs/m8-seed0"),
        (True, f"{out}-several/runs/vanilla-seed0"),
        (True, f"{out}-several/runs/screen_three-seed0"),
    ]
    assert study.main(["--out", str(out), "--plan", "one", "--only", "screen_three", "--dry-run"]) == 2
    assert "unknown arm 'screen_three'" in capsys.readouterr().err
    assert study.main(["--out", str(out), "--dry-run", "--", "--loopholes", "stdout"]) == 2
    assert "--loopholes cannot follow --" in capsys.readouterr().err
