"""The command itself, as a user runs it: real processes, the embedded model, small batches."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.processes import wait_for
from support.runs import SMALL, UNDISTURBED, ends, ends_with_one_line, grpo, launch, refused, start

import vhack
from arms.pairs import load_pairs, pairs_hash
from faults.errors import UserError
from harness import grader
from harness.checkpoint import read_checkpoint
from harness.config import POCKET, ROOT, read_config
from problems.data import load_problems


def test_a_run_folder_holds_everything(undisturbed):
    folder, out = undisturbed
    for name in (
        "config.json",
        "metrics.jsonl",
        "timings.jsonl",
        "samples.jsonl",
        "pairs.jsonl",
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


@pytest.mark.slow
def test_a_run_that_is_hung_up_then_stopped_in_its_evaluation_comes_to_the_same_bits(undisturbed, heldout, tmp_path):
    """Two commands at once share neither a new folder nor a resumed one; what goes on loses no step."""
    folder = tmp_path / "run"
    rivals = [start(*UNDISTURBED, "--save-every", 100, "--heldout", heldout, "--out", folder) for _ in range(2)]
    wait_for(lambda: any(p.poll() is not None for p in rivals), SimpleNamespace(poll=lambda: None))
    process, second = sorted(rivals, key=lambda p: p.poll() is not None)
    ends_with_one_line(second, 2, "another process is at work")
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
    process.send_signal(signal.SIGHUP)
    out = ends_with_one_line(process, 129, f"python grpo.py --resume {folder}")
    steps = metrics.read_text().count("\n")
    assert f"after step {steps}" in out and (folder / "checkpoints" / f"step-{steps:06d}.json").exists()

    process = launch("--resume", folder)
    wait_for(lambda: metrics.read_text().count("\n") > steps, process)
    assert "another process is at work" in refused("--resume", folder)
    wait_for((folder / "adapter" / "adapter_model.safetensors").exists, process)
    process.send_signal(signal.SIGTERM)
    ends_with_one_line(process, 143, "every step is done", f"python grpo.py --resume {folder}")
    assert not (folder / "done.json").exists() and not (folder / "eval.json").exists()

    ends(launch("--resume", folder))
    for name in ("metrics.jsonl", "samples.jsonl", "eval.json", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (undisturbed[0] / name).read_bytes(), name


LITTLE = ["--arm", "vanilla", "--steps", 1, "--pairs", 12, "--pairs-heldout", 4, "--steer-prompts", 1]


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_what_it_prints(heldout, tmp_path):
    """As in `python grpo.py | head -1`."""
    process = start(*LITTLE, "--heldout", heldout, "--out", tmp_path / "run")
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(300) == 0 and (tmp_path / "run" / "done.json").exists()


@pytest.mark.slow
def test_a_run_without_standard_streams(heldout, tmp_path):
    """As in `python grpo.py <&- >&- 2>&-`: nothing of the run takes their numbers, in which a child would find it."""
    command = shlex.join(map(str, [sys.executable, "grpo.py", *SMALL, *LITTLE, "--heldout", heldout, "--out", tmp_path / "run"]))
    assert subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], cwd=ROOT, timeout=300).returncode == 0
    assert (tmp_path / "run" / "done.json").exists()
    assert subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], cwd=ROOT, timeout=300).returncode == 2, "it already exists"


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the process through /proc")
@pytest.mark.parametrize("program", ["grpo.py", "vhack.py", "eval.py", "leetcode_env.py"])
def test_ctrl_c_among_the_imports_is_one_line(program, tmp_path):
    args = {"eval.py": [str(tmp_path)], "leetcode_env.py": ["check", str(POCKET / "train.jsonl")]}
    command = [sys.executable, program, *args.get(program, ["--scale", "pocket", "--out", str(tmp_path / "out")])]
    late = "_hashlib" if program == "leetcode_env.py" else "libtorch_cpu"  # a library that is loaded on the way
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: late in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    assert ends(process, 130) == "interrupted\n" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["-I", "-OO"])
@pytest.mark.parametrize("program", ["grpo.py", "vhack.py", "eval.py", "leetcode_env.py"])
def test_flags_of_the_interpreter(flags, program):
    """Isolated, a script's folder is not on the path; without docstrings transformers cannot be imported."""
    done = subprocess.run([sys.executable, flags, program, "--nonsense"], cwd=ROOT, text=True, capture_output=True)
    words = "python -OO" if flags == "-OO" else "'run'" if program == "eval.py" else "--nonsense"
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr


def test_checkpoints_keep_two_and_each_fits_its_hash(undisturbed):
    files = sorted((undisturbed[0] / "checkpoints").glob("step-*.json"))
    assert [f.stem for f in files] == ["step-000004", "step-000005"]
    for f in files:
        meta, tensors = read_checkpoint(f)
        assert meta["step"] == int(f.stem[5:]) and torch.isfinite(tensors["extra.v_hack"]).all()


def test_resume_refuses_other_settings_and_finished_runs(undisturbed, tmp_path):
    folder = undisturbed[0]
    assert "finished" in refused("--resume", folder)
    lost = tmp_path / "lost"
    shutil.copytree(folder, lost)
    shutil.rmtree(lost / "checkpoints")
    (lost / "done.json").unlink()
    before = (lost / "metrics.jsonl").read_bytes()
    assert "none of its checkpoints is whole" in refused("--resume", lost)
    assert (lost / "metrics.jsonl").read_bytes() == before
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_bytes((folder / "config.json").read_bytes())
    said = refused("--resume", torn, "--lr", "0.5", "--m", "8")
    assert "--lr" in said and "--m" in said


def test_a_resumed_run_reads_its_direction(undisturbed, pocket_tokenizer):
    """d comes from v_hack.safetensors, not from another extraction; the pairs from pairs.jsonl, not from other attempts."""
    cfg = read_config(undisturbed[0])
    run = SimpleNamespace(cfg=cfg, tokenizer=pocket_tokenizer, train=load_problems(cfg.data), model=None)
    run.sampler = SimpleNamespace(sleep=lambda: None)  # it cannot generate
    found = vhack.directions(run, "svd", undisturbed[0])
    assert pairs_hash(found.pairs) == found.hack.pairs and len(found.pairs) == cfg.pairs
    saved = vhack.load(undisturbed[0] / "v_hack.safetensors")
    assert torch.equal(found.hack.d, saved.d) and found.own is found.hack and found.hack.layers == saved.layers


def test_pairs_that_are_damaged_or_of_other_problems_are_refused(undisturbed, tmp_path):
    problems, kept = load_problems(read_config(undisturbed[0]).data), undisturbed[0] / "pairs.jsonl"
    torn = tmp_path / "pairs.jsonl"
    torn.write_bytes(kept.read_bytes()[:-20])
    for path, some in ((torn, problems), (kept, problems[:1])):
        with pytest.raises(UserError, match="does not hold pairs of this run's problems"):
            load_pairs(path, some)
    assert load_pairs(kept, problems)


def test_strict_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """A layer of containment that no machine has, so that one is missing here."""
    more = "from sandbox import confine; confine.LAYERS += ('a wall that is nowhere',); from harness import grader"
    monkeypatch.setattr(grader, "_GRADER", grader._GRADER.replace("from harness import grader", more))
    assert "a wall that is nowhere" in refused("--sandbox-strict", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused("--model", "no/such", "--out", tmp_path / "out")
    assert "no/such" in said and "--model" in said and not (tmp_path / "out").exists()


def test_a_run_begun_with_other_data_or_pairs_is_not_gone_on_with(undisturbed, heldout, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = json.loads((undisturbed[0] / "config.json").read_text())
    config["hashes"] |= {"heldout": "0" * 16, "pairs": "0" * 16}
    (folder / "config.json").write_text(json.dumps(config))
    assert "another heldout and another pairs" in refused("--resume", folder)
    del config["hashes"], config["ranks"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "another model and another data" in refused("--resume", folder)
