"""Two real processes with gloo: their gradient is the one-process gradient, and they end with the same parameters."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from faults.errors import UserError
from harness.ranks import Ranks
from harness.config import POCKET, ROOT

RANK = """
import os, sys, json, torch
sys.path[:0] = [{root!r}, {tests!r}]
from support.models import tiny_qwen3
from dataclasses import replace
from grpo import Config, backward
from engine.lora import flatten_grads, inject, lora_parameters
from harness.ranks import Ranks
from engine.sampler import Rollout

torch.set_num_threads(1)
world = Ranks()
model = inject(tiny_qwen3(), 4, 8, seed=0)
for name, p in model.named_parameters():
    if name.endswith(".B"):
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1
batch = [Rollout([3, 4, i], [5 + i] * (2 + 3 * i), [-1.0] * (2 + 3 * i), True) for i in range(4)]
part = world.share(list(range(4)))
sums = backward(model, [batch[i] for i in part], torch.tensor([1.0, -1.0, 0.5, 2.0])[part], Config(rollout="torch"), 97)
flat = world.total(torch.cat([flatten_grads(lora_parameters(model)), torch.tensor([sums["tokens"]])]))
rows = world.from_rank(torch.ones(2 + world.rank, 3) * (1 + world.rank))
names = world.gather([f"rank {{world.rank}}"])
if world.first:
    torch.save(dict(g=flat[:-1] / flat[-1], tokens=flat[-1], rows=rows, names=names), sys.argv[1])
world.close()
"""


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def ranks(n, *command):
    """n ranks of a command, as torchrun starts them; their output."""
    env = os.environ | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1",
                        "CUDA_VISIBLE_DEVICES": ""}
    running = [subprocess.Popen([sys.executable, *command], text=True, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for r in range(n)]
    outs = [p.communicate(timeout=280)[0] for p in running]
    assert all(p.returncode == 0 for p in running), "\n".join(outs)
    return outs


def test_two_ranks_have_the_gradient_of_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(root=str(ROOT), tests=str(Path(__file__).parent)))
    results = []
    for n in (1, 2):
        ranks(n, str(script), str(tmp_path / f"{n}.pt"))
        results.append(torch.load(tmp_path / f"{n}.pt"))
    one, two = results
    assert one["tokens"] == two["tokens"] == 2 + 5 + 8 + 11
    torch.testing.assert_close(two["g"], one["g"], rtol=1e-4, atol=1e-6 * one["g"].abs().max().item())  # rounding: another order of sums
    assert torch.equal(two["rows"], torch.ones(2, 3)) and two["names"] == ["rank 0", "rank 1"]


@pytest.mark.slow
def test_a_run_of_two_ranks(tmp_path):
    held = tmp_path / "heldout.jsonl"
    held.write_text("".join((POCKET / "heldout.jsonl").read_text().splitlines(keepends=True)[:8]))
    data = tmp_path / "train.jsonl"
    data.write_text("".join((POCKET / "train.jsonl").read_text().splitlines(keepends=True)[:40]))
    outs = ranks(2, str(ROOT / "grpo.py"), "--scale", "pocket", "--arm", "cone", "--steps", "2", "--batch", "16", "--generations", "4",
                 "--pairs", "24", "--pairs-heldout", "8", "--eval-samples", "1", "--workers", "1", "--steer-prompts", "2", "--data", str(data),
                 "--heldout", str(held), "--out", str(tmp_path / "run"))
    lines = [json.loads(x) for x in open(tmp_path / "run" / "metrics.jsonl")]
    assert [x["n"] for x in lines] == [16, 16] and sum(lines[0]["labels"].values()) == 16
    assert (tmp_path / "run" / "done.json").exists() and "hack rate" in outs[0] and "hack rate" not in outs[1]
    assert torch.isfinite(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").popitem()[1]).all()


def test_prompts_that_the_ranks_do_not_divide_are_refused():
    world = Ranks()
    world.size = 2
    with pytest.raises(UserError, match="--batch"):
        world.share([1, 2, 3])
