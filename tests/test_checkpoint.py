"""A checkpoint is whole or it is not used: every truncation and every flipped byte is seen."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import tiny_qwen3

from engine.lora import flatten_params, inject, lora_parameters
from faults import files
from faults.errors import Signalled, Stopped, UserError
from faults.files import LOCK, locked, write_atomic
from harness import checkpoint
from harness.checkpoint import RunState
from harness.config import ROOT


@pytest.fixture
def saved(tmp_path):
    """A run folder with checkpoints after steps 1 and 2, and the parameters of each."""
    model = inject(tiny_qwen3(), 2, 2, seed=0)
    params = lora_parameters(model)
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2)
    state = RunState(tmp_path / "run", params, optimizer)
    state.create({"config": {}})
    thetas = {}
    for step in (1, 2):
        optimizer.zero_grad()
        model(input_ids=torch.tensor([[step, 5, 6]])).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        state.log({"step": step - 1}, {"rollout": 0.1}, [])
        state.save(step, {"v": torch.ones(3) * step})
        thetas[step] = flatten_params(params)
    return tmp_path / "run", thetas


def fresh(folder):
    params = lora_parameters(inject(tiny_qwen3(), 2, 2, seed=5))
    return RunState(folder, params, torch.optim.AdamW(params.values(), lr=1e-2))


def resumed(folder):
    state = fresh(folder)
    step, extra = state.resume()
    return step, flatten_params(state.params), extra


def test_a_snapshot_is_what_was_there_then(saved):
    """Taken at the start of a step, written when an engine has died in it: the bytes of a checkpoint taken at once."""
    state = fresh(saved[0])
    state.resume()
    before, (old,) = state.snapshot({"v": torch.ones(3)}), sorted((saved[0] / "checkpoints").glob("step-000002.safetensors"))
    state.save(2, {"v": torch.ones(3)})
    at_once = old.read_bytes()
    for p in state.params.values():
        p.data += 1
        state.optimizer.state[p]["exp_avg"] += 1
    state.write(2, before)
    assert old.read_bytes() == at_once
    state.save(2, {"v": torch.ones(3)})
    assert old.read_bytes() != at_once


def test_resume_restores_parameters_moments_extras_and_logs(saved):
    folder, thetas = saved
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 2}\n{"ste')  # written after the checkpoint, the last line torn
    state = fresh(folder)
    step, extra = state.resume()
    assert step == 2 and torch.equal(extra["v"], torch.full((3,), 2.0))
    assert torch.equal(flatten_params(state.params), thetas[2])
    assert all(len(state.optimizer.state[p]) == 3 for p in state.params.values())
    assert (folder / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


@pytest.mark.parametrize("cases", [40, pytest.param(200, marks=pytest.mark.slow)])  # of each kind
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_damage_is_never_resumed_from(saved, suffix, cases, tmp_path, capsys):
    folder, thetas = saved
    rng = random.Random(0)
    whole = (folder / "checkpoints" / f"step-000002{suffix}").read_bytes()
    for case in range(2 * cases):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        damaged = bytearray(whole)
        if case % 2:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(damaged)) :]
        (copy / "checkpoints" / f"step-000002{suffix}").write_bytes(damaged)
        step, theta, _ = resumed(copy)
        assert torch.equal(theta, thetas[step]), f"case {case}"
        if step == 1:
            assert "torn or foreign" in capsys.readouterr().out
        else:  # a flip that JSON does not see, such as white space, may leave the checkpoint whole
            assert suffix == ".json" and step == 2
        shutil.rmtree(copy)


def logs(folder):
    return {name: (folder / name).read_bytes() for name in checkpoint.LOGS}


def test_a_checkpoint_of_another_model_is_not_used(saved):
    folder, _ = saved
    params = lora_parameters(inject(tiny_qwen3(), 3, 2, seed=5))
    state = RunState(folder, params, torch.optim.AdamW(params.values()))
    before = flatten_params(params), logs(folder)
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        state.resume()
    assert torch.equal(flatten_params(params), before[0]) and logs(folder) == before[1]


@pytest.mark.parametrize("loss", ["removed", "torn", "torn, and metrics.jsonl emptied"])
def test_steps_without_a_checkpoint_are_refused_and_nothing_is_cut(saved, loss):
    folder, _ = saved
    if loss == "removed":
        shutil.rmtree(folder / "checkpoints")
    for path in (folder / "checkpoints").glob("*.json"):
        path.write_bytes(path.read_bytes()[:-20])
    if "emptied" in loss:
        (folder / "metrics.jsonl").write_text("")
    before = logs(folder)
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        fresh(folder).resume()
    assert logs(folder) == before


def test_a_torn_checkpoint_of_a_later_step_is_none_of_the_two_that_are_kept(saved):
    folder, _ = saved
    newest = folder / "checkpoints" / "step-000002.json"
    newest.write_bytes(newest.read_bytes()[:-20])
    state = fresh(folder)
    assert state.resume()[0] == 1
    later = folder / "checkpoints" / "step-000009.json"
    newest.rename(later)
    newest.with_suffix(".safetensors").rename(later.with_suffix(".safetensors"))
    for step in (2, 3):
        state.log({"step": step - 1}, {}, [])
        state.save(step, {})
    assert sorted(p.name for p in later.parent.iterdir()) == [
        f"step-00000{k}.{kind}" for k in (2, 3) for kind in ("json", "safetensors")
    ]


def test_a_run_without_steps_starts_from_the_first(tmp_path, capsys):
    state = fresh(tmp_path / "run")
    state.create({"config": {}})
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert state.resume() == (0, {}) and "starting from the first step" in capsys.readouterr().out
    state.save(0, {})  # the folder is made again
    assert fresh(tmp_path / "run").resume()[0] == 0


def test_the_logs_are_on_the_disk_before_a_checkpoint_says_how_long_they_are(saved, monkeypatch):
    folder, _ = saved
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name) or fsync(fd))
    state = fresh(folder)
    state.resume()
    state.save(3, {})
    assert synced.index(".step-000003.json.tmp") > max(synced.index(name) for name in checkpoint.LOGS)


def test_a_checkpoint_of_another_run_is_not_used(saved, tmp_path, capsys):
    folder, thetas = saved
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "config.json").write_text('{"config": {"seed": 1}}')
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        fresh(other).resume()
    assert "another config.json" in capsys.readouterr().out


def test_steps_that_the_logs_have_lost_are_done_again(saved, capsys):
    """Where metrics.jsonl was cut, the checkpoint before the loss is used: no step is missing from the continued log."""
    folder, thetas = saved
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    step, theta, _ = resumed(folder)
    assert step == 1 and torch.equal(theta, thetas[1])
    assert "metrics.jsonl is shorter" in capsys.readouterr().out


def test_a_torn_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_atomic(path, b"old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        files.write_atomic(path, b"new, and longer")
    assert path.read_bytes() == b"old"


def test_a_full_disk_stops_with_one_line_and_a_readable_checkpoint(saved, monkeypatch):
    folder, thetas = saved
    state = fresh(folder)
    state.resume()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(Stopped, match="No space left.*--resume"):
            state.save(3, {})
    step, theta, _ = resumed(folder)
    assert step == 2 and torch.equal(theta, thetas[2])


def test_a_removed_run_folder_stops_with_one_line(saved):
    folder, _ = saved
    state = fresh(folder)
    state.resume()
    shutil.rmtree(folder)
    with pytest.raises(Stopped, match="cannot write to the run folder"):
        state.log({"step": 2}, {}, [])
    with pytest.raises(Stopped, match="cannot write to the run folder"):
        state.save(3, {})


def test_an_unwritable_place_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder"):
        fresh(tmp_path / "file" / "run").create({})


def test_refuse_existing(tmp_path):
    checkpoint.refuse_existing(tmp_path / "new", resuming=False)
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="already exists"):
        checkpoint.refuse_existing(tmp_path, resuming=False)
    checkpoint.refuse_existing(tmp_path, resuming=True)


def test_a_checkpoint_before_the_first_step_is_whole(tmp_path, capsys):
    """AdamW has no moments yet; such a checkpoint is written where a part dies in the first step."""
    state = fresh(tmp_path / "run")
    state.create({"config": {}})
    state.save(0, {"v": torch.ones(3)})
    before = flatten_params(state.params)
    step, theta, extra = resumed(tmp_path / "run")
    assert step == 0 and torch.equal(theta, before) and torch.equal(extra["v"], torch.ones(3))
    assert "torn" not in capsys.readouterr().out


def test_settings_that_change_no_result_leave_checkpoints_valid(tmp_path):
    state = fresh(tmp_path / "run")
    state.create({"config": {"lr": 1.0, "save_every": 5}})
    state.save(0, {})
    (tmp_path / "run" / "config.json").write_text('{"config": {"lr": 1.0, "save_every": 7}}')
    assert "torn" not in str(resumed(tmp_path / "run"))
    (tmp_path / "run" / "config.json").write_text('{"config": {"lr": 2.0, "save_every": 7}}')
    assert resumed(tmp_path / "run")[2] == {}


def test_signals_wait_for_the_step_and_for_nothing_else():
    """As under nohup, an ignored SIGHUP stays so. They are raised here: one that is sent may reach another thread, and late."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with checkpoint.Signals(lambda: "go on like this") as signals:
        signals.patient = True
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        assert signals.seen == signal.SIGHUP
        with pytest.raises(Signalled, match="like this") as again:
            signal.raise_signal(signal.SIGINT)
        assert again.value.code == 130
        signals.patient = False
        with pytest.raises(Signalled) as ended:
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 143
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with checkpoint.Signals(str) as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.seen
    finally:
        signal.signal(signal.SIGHUP, inherited)


# --- one process a folder ----------------------------------------------------------------------------------------------------


def test_a_folder_is_one_process_s_at_a_time(tmp_path):
    folder = tmp_path / "runs" / "a"
    with locked(folder):
        with pytest.raises(UserError, match="another process is at work"), locked(folder):
            pass
        checkpoint.refuse_existing(folder, resuming=False)  # the lock alone is no run
        assert (folder / LOCK).exists()
    assert not (tmp_path / "runs").exists(), "what nothing came into is gone again"
    with locked(folder):
        (folder / "config.json").write_text("{}")
    assert (folder / "config.json").exists()
    with locked(folder):
        pass
    assert (folder / "config.json").exists()


def test_a_lock_whose_file_was_just_removed_is_not_held(tmp_path, monkeypatch):
    """Between opening it and locking it, its last owner has tidied up: whoever comes next would lock another file."""
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: (tmp_path / "a" / LOCK).unlink())
    with pytest.raises(UserError, match="another process is at work"), locked(tmp_path / "a"):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    folder = str(tmp_path / "a")
    code = f"import time; from faults.files import locked\nwith locked({folder!r}): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is at work"), locked(tmp_path / "a"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path / "a"):
        pass


@pytest.mark.parametrize("place", ["/proc/nowhere/run", "a" * 300, "file/run"])
def test_a_place_that_cannot_be_had_leaves_nothing(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder"), locked(Path("new") / place if place[0] == "a" else place):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    if place[0] == "a":
        with pytest.raises(UserError, match="cannot write the run folder"):
            checkpoint.refuse_existing(Path(place), resuming=False)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """On a full disk half a checkpoint would only fill it more; and what was there stays as it was."""
    path = tmp_path / "file"
    write_atomic(path, b"before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomic(path, b"after")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"before"
