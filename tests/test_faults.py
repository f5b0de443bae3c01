"""Faults of the machine, in real runs: each ends with one line and a checkpoint from which the same run goes on."""

import io
import json
import os
import resource
import shutil
import signal
import sys

import pytest
from support.processes import kill_workers_of, wait_for, workers_of
from support.runs import UNDISTURBED, ends, ends_with_one_line, grpo, launch, start

from faults.errors import UserError, command
from faults.streams import Lasting

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")


def steps_done(folder):
    return (folder / "metrics.jsonl").read_text().count("\n") if (folder / "metrics.jsonl").exists() else 0


@pytest.mark.slow
@LINUX
def test_dead_workers_and_a_full_disk_cost_no_step(undisturbed, heldout, tmp_path):
    whole, folder = undisturbed[0], tmp_path / "run"
    process = start(*UNDISTURBED, "--heldout", heldout, "--out", folder)
    for steps in (1, 2):  # a worker in each costs nothing
        wait_for(lambda: steps_done(folder) >= steps, process)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    wait_for(lambda: steps_done(folder) >= 3, process)
    kill_workers_of(process)
    out = ends_with_one_line(process, 1, "worker did not start", "saved after", f"--resume {folder}")
    assert "ended and is replaced; 1 so far" in out and "2 so far" in out and not (folder / "done.json").exists()

    process = launch("--resume", folder)
    wait_for(lambda: workers_of(process.pid), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))  # no larger file from now on
    ends_with_one_line(process, 1, "cannot write to the run folder", f"--resume {folder}")

    ends(launch("--resume", folder))
    for name in ("metrics.jsonl", "samples.jsonl", "eval.json", "adapter/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_a_removed_run_folder_ends_the_run_with_one_line(heldout, tmp_path):
    folder = tmp_path / "run"
    process = start("--arm", "vanilla", "--steps", 50, "--heldout", heldout, "--out", folder)
    wait_for(lambda: steps_done(folder), process)
    shutil.rmtree(folder)
    ends_with_one_line(process, 1, "cannot write to the run folder")


def test_steps_that_are_not_finite_are_left_out_then_stop_the_run(heldout, tmp_path):
    """An adapter scaled by 1e36 changes nothing while B is 0, but its gradient overflows."""
    folder = tmp_path / "run"
    out = grpo(
        "--arm",
        "vanilla",
        "--steps",
        4,
        "--seed",
        3,  # every of whose first steps has a group that is not all alike
        "--lora-alpha",
        "1e38",
        "--skip-nonfinite",
        2,
        "--heldout",
        heldout,
        "--out",
        folder,
        code=1,
    )
    (line,) = [x for x in out.splitlines() if x.startswith("stopped: ")]
    assert "step 2 is not finite" in line and "nonfinite-step-000002.json" in line and "Traceback" not in out

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(x, parse_constant=refuse) for x in open(folder / "metrics.jsonl")]
    assert [x["step"] for x in lines] == [0, 1] and all(x["cos_update"] == 0 and x["grad_norm"] is None for x in lines)
    for step in range(3):
        batch = json.loads((folder / f"nonfinite-step-{step:06d}.json").read_text(), parse_constant=refuse)
        assert len(batch["responses"]) == len(batch["rollouts"]) == 16 and batch["grad_norm"] is None
    assert "adapter" not in {p.name for p in folder.iterdir()} and not (folder / "done.json").exists()


@pytest.mark.slow
def test_a_policy_that_blew_up_stops_at_the_sampler(heldout, tmp_path):
    out = grpo("--arm", "vanilla", "--steps", 4, "--lr", "1e30", "--heldout", heldout, "--out", tmp_path / "run", code=1)
    (line,) = [x for x in out.splitlines() if x.startswith("stopped: ")]
    assert "not finite" in line and "Traceback" not in out


@pytest.mark.slow
def test_a_place_that_cannot_be_written_is_one_line(heldout):
    out = grpo("--arm", "vanilla", "--steps", 2, "--heldout", heldout, "--out", "/proc/nowhere", code=2)
    assert next(x for x in out.splitlines() if x.startswith("error: ")).startswith("error: cannot write the run folder")


# --- the standard streams ------------------------------------------------------------------------------------------------------


def test_a_stream_that_is_gone_takes_what_comes(tmp_path):
    for gone in ("pipe", "full"):
        if gone == "pipe":
            reader, writer = os.pipe()
            os.close(reader)
            stream = os.fdopen(writer, "w")
        else:
            stream = open("/dev/full", "w")
        lasting = Lasting(stream)
        for _ in range(3):
            assert lasting.write("x" * 10_000) == 10_000
            lasting.flush()
        stream.close()  # what is still held has a place to go


def test_text_that_the_encoding_does_not_have_is_written_all_the_same():
    kept = io.BytesIO()
    lasting = Lasting(io.TextIOWrapper(kept, encoding="ascii"))
    lasting.write("na\u00efve")
    lasting.flush()
    assert kept.getvalue() == b"na\\xefve"


def test_a_command_leaves_the_streams_as_they_were(capsys):
    before = sys.stdout, sys.stderr

    @command
    def main(fails):
        print("said")
        if fails:
            raise UserError("no")

    assert main(False) == 0 and main(True) == 2 and (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("said\nsaid\n", "error: no\n")
