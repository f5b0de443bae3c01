"""The command itself, as a user runs it: real processes, the embedded model, small batches."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from pytest import MonkeyPatch
from support.runs import UNDISTURBED, ends, grpo, launch, refused, start

import vhack
from harness.checkpoint import read_checkpoint
from harness.config import ROOT, read_config


def test_a_run_folder_holds_everything(undisturbed):
    folder, out = undisturbed
    for name in (
        "config.json",
        "metrics.jsonl",
        "timings.jsonl",
        "samples.jsonl",
        "v_hack.safetensors",
        "eval.json",
        "done.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ):
        assert (folder / name).stat().st_size > 0, name
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    assert [x["step"] for x in lines] == list(range(5))
    for x in lines:
        assert sum(x["labels"].values()) == x["n"] == 16 and -1 <= x["cos_align"] <= 1 and -1 <= x["cos_update"] <= 1
        assert x["mismatch"]["max_abs"] < 1e-3 and x["active_rows"] <= 24
    assert sum("cos_d0" in x for x in lines) == 2
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["arm"] == "cone" and config["parameters"]["v_nonzero"] < config["parameters"]["lora"]
    assert "held-out separation" in out and "steering" in out and "seconds by phase" in out and "hack rate" in out


@pytest.mark.slow  # the test below, with kill -9 in between, shows the same and more
def test_the_same_command_gives_the_same_bits(undisturbed, heldout, tmp_path):
    grpo(*UNDISTURBED, "--heldout", heldout, "--out", tmp_path / "again")
    for name in ("metrics.jsonl", "samples.jsonl", "eval.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (undisturbed[0] / name).read_bytes(), name


@pytest.mark.parametrize(
    "number, code",
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (signal.SIGKILL, -9),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(undisturbed, heldout, tmp_path, number, code):
    folder = tmp_path / "run"
    process = start(*UNDISTURBED, "--heldout", heldout, "--out", folder)
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    out = ends(process, code)
    assert not (folder / "done.json").exists()
    assert all(json.loads(line) for line in open(metrics))
    if number != signal.SIGKILL:
        assert f"python grpo.py --resume {folder}" in out
    # What does not change the result may be changed on the way, and the checkpoints still count.
    out = ends(launch("--resume", folder, "--save-every", 3, "--skip-nonfinite", 1))
    assert "another config.json" not in out and json.loads((folder / "config.json").read_text())["config"]["skip_nonfinite"] == 1
    assert "steering, share" not in out, "a resumed run reads its direction"
    for name in ("metrics.jsonl", "samples.jsonl", "eval.json", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (undisturbed[0] / name).read_bytes(), name


def test_checkpoints_keep_two_and_each_fits_its_hash(undisturbed):
    files = sorted((undisturbed[0] / "checkpoints").glob("step-*.json"))
    assert [f.stem for f in files] == ["step-000004", "step-000005"]
    for f in files:
        meta, tensors = read_checkpoint(f)
        assert meta["step"] == int(f.stem[5:]) and torch.isfinite(tensors["extra.v_hack"]).all()


def test_resume_refuses_other_settings_and_finished_runs(undisturbed, tmp_path):
    folder = undisturbed[0]
    assert "finished" in refused("--resume", folder)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_bytes((folder / "config.json").read_bytes())
    said = refused("--resume", torn, "--lr", "0.5", "--m", "8")
    assert "--lr" in said and "--m" in said


def test_a_resumed_run_reads_its_direction(undisturbed, pocket_tokenizer):
    """d comes from v_hack.safetensors, not from another extraction."""
    run = SimpleNamespace(cfg=read_config(undisturbed[0]), tokenizer=pocket_tokenizer, sampler=None, train=[], model=None)
    with MonkeyPatch.context() as patch:
        patch.setattr(vhack, "make_pairs", lambda *_: [])
        found = vhack.directions(run, "svd", undisturbed[0])
    saved = vhack.load(undisturbed[0] / "v_hack.safetensors")
    assert torch.equal(found.hack.d, saved.d) and found.own is found.hack and found.hack.layers == saved.layers


def test_strict_is_refused_before_anything_is_written(tmp_path):
    """A layer of containment that no machine has, so that one is missing here."""
    code = (
        "import sys, sandbox.confine as c; c.LAYERS = (*c.LAYERS, 'a wall that is nowhere');"
        "sys.argv = ['grpo.py', *sys.argv[1:]];"
        "import runpy; runpy.run_path('grpo.py', run_name='__main__')"
    )
    args = ["--scale", "pocket", "--sandbox-strict", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "a wall that is nowhere" in done.stderr and not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_never_overwritten(undisturbed):
    before = (undisturbed[0] / "metrics.jsonl").read_bytes()
    assert "already exists" in refused("--out", undisturbed[0])
    assert (undisturbed[0] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "args, words",
    [
        (["--m", "4000"], "model's width 128"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "tests"], "holds no weights"),
    ],
)
def test_bad_settings_are_one_clear_line(args, words, tmp_path):
    assert words in refused("--out", tmp_path / "out", *args)
    assert not (tmp_path / "out").exists()


def test_an_unknown_arm_lists_the_arms():
    process = subprocess.run([sys.executable, str(ROOT / "grpo.py"), "--arm", "magic"], cwd=ROOT, text=True, capture_output=True)
    assert process.returncode == 2 and "no_loophole" in process.stdout + process.stderr


@pytest.mark.parametrize("content, words", [("", "holds no problems"), ('{"id": 1}\n', "line 1")])
def test_bad_data_names_the_file_and_the_line(content, words, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(content)
    said = refused("--data", path, "--out", tmp_path / "out")
    assert words in said and "train.jsonl" in said


def test_auto_says_what_was_missing():
    process = start("--scale", "auto", "--data", "nowhere.jsonl")
    out, _ = process.communicate(timeout=120)
    if not torch.cuda.is_available():
        assert "scale: pocket" in out and "a CUDA card" in out


def test_a_model_that_is_nowhere_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = refused("--model", "no/such", "--out", tmp_path / "out")
    assert "no/such" in said and "--model" in said and not (tmp_path / "out").exists()


def test_a_run_begun_with_other_data_is_not_gone_on_with(undisturbed, heldout, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = json.loads((undisturbed[0] / "config.json").read_text())
    config["hashes"]["heldout"] = "0" * 16
    (folder / "config.json").write_text(json.dumps(config))
    assert "another heldout" in refused("--resume", folder)
