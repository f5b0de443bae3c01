"""Two real processes with gloo: their gradient and their cone's rows are those of one, and a death on one ends both."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.processes import kill_workers_of, wait_for
from support.runs import SMALL

from faults.errors import PartDied, UserError
from harness import training
from harness.config import POCKET, ROOT, Config
from harness.ranks import Ranks
from harness.scale import filled


def test_a_batch_that_ranks_cannot_share_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    alone = Ranks()
    alone.size, alone.close = 3, lambda: None
    monkeypatch.setattr(training, "Ranks", lambda: alone)
    cfg = filled(Config(batch=16, generations=4, out=tmp_path / "run"), "pocket")
    with pytest.raises(UserError, match="4 prompts a step cannot be shared by 3 ranks: change --batch"), training.Training(cfg):
        pass
    assert not (tmp_path / "run").exists()


HEAD = """
import os, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from support.models import tiny_qwen3, adapted_qwen3
from harness.config import Config
from harness.ranks import Ranks
from engine.sampler import Rollout
torch.set_num_threads(1)
ranks = Ranks()
"""
GRADIENT = (
    HEAD
    + """
from grpo import backward, reference
from engine.lora import flatten_grads, lora_parameters
from harness.journal import merge

model = adapted_qwen3()
batch = [Rollout([3, 4, i], [5 + i] * (2 + 3 * i), [-1.0] * (2 + 3 * i), True) for i in range(4)]
part = ranks.share(list(range(4)))
cfg = Config(rollout="torch", micro_tokens=2048)
reference(model, batch, cfg, 97)
sums = backward(model, [batch[i] for i in part], torch.tensor([1.0, -1.0, 0.5, 2.0])[part], cfg, 97)
sums = merge(ranks.gather([sums]))
g = ranks.total(flatten_grads(lora_parameters(model))) / sums["tokens"]
rows = ranks.from_rank(torch.ones(2 + ranks.rank, 3) * (1 + ranks.rank))
names = ranks.gather([f"rank {{ranks.rank}}"])
if ranks.first:
    torch.save(dict(g=g, tokens=sums["tokens"], rows=rows, names=names), sys.argv[1])
ranks.close()
"""
)
CONE = (
    HEAD
    + """
from arms.cone import cone_rows
from engine.lora import inject
from engine.model import load_model, load_tokenizer

tokenizer, model = load_tokenizer({pocket!r}), inject(load_model({pocket!r}), 4, 4, 0)
for name, p in model.named_parameters():
    if name.endswith(".B"):
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1
code = "```python\\nclass Solution:\\n    def f(self, xs):\\n        return sum(x + {{}} for x in xs)\\n```"
batch = [Rollout([9, 8, i // 2], tokenizer.encode(code.format(i % 9), add_special_tokens=False), [], True) for i in range(16)]
mine = ranks.share(batch)
told = ["run_tests"] * 16
cfg = Config(cone_n=13, micro_tokens=2048)
J, odds = cone_rows(model, tokenizer, ranks.gather(mine), told, [], 0, cfg, len(tokenizer), ranks.part, ranks.rows)
if ranks.first:
    torch.save(dict(J=J, odds=odds), sys.argv[1])
ranks.close()
"""
)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def begin(n, *command):
    """n ranks of a command, as torchrun starts them."""
    env = os.environ | {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1",
                        "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], text=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(n)
    ]  # fmt: skip


def outputs(processes, codes=(0,)):
    outs = [p.communicate(timeout=280)[0] for p in processes]
    assert all(p.returncode in codes for p in processes), "\n".join(outs)
    return outs


def results(script, tmp_path):
    """What one rank and two ranks of a script saved."""
    path = tmp_path / "rank.py"
    path.write_text(script.format(root=str(ROOT), tests=str(ROOT / "tests"), pocket=str(POCKET)))
    for n in (1, 2):
        outputs(begin(n, path, tmp_path / f"{n}.pt"))
    return [torch.load(tmp_path / f"{n}.pt") for n in (1, 2)]


@pytest.mark.invariant
def test_two_ranks_have_the_gradient_of_one(tmp_path):
    one, two = results(GRADIENT, tmp_path)
    assert one["tokens"] == two["tokens"] == 2 + 5 + 8 + 11
    torch.testing.assert_close(two["g"], one["g"], rtol=1e-4, atol=1e-6 * one["g"].abs().max().item())  # another order of sums
    assert torch.equal(two["rows"], torch.ones(2, 3)) and two["names"] == ["rank 0", "rank 1"]


@pytest.mark.invariant
@pytest.mark.slow
def test_two_ranks_have_the_cone_of_one(tmp_path):
    """13 contexts from the whole batch, not from the first rank's half of it, which has 8."""
    one, two = results(CONE, tmp_path)
    assert one["J"].shape == two["J"].shape and len(one["J"]) == 13
    torch.testing.assert_close(two["J"], one["J"], rtol=1e-4, atol=1e-5 * one["J"].abs().max().item())
    assert two["odds"] == pytest.approx(one["odds"], rel=1e-5)


def small_run(tmp_path, *more):
    for name, count in (("heldout", 8), ("train", 40)):
        lines = (POCKET / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = ["--data", tmp_path / "train.jsonl", "--heldout", tmp_path / "heldout.jsonl", "--out", tmp_path / "run"]
    return [ROOT / "grpo.py", *SMALL, *data, *more]


@pytest.mark.slow
def test_a_run_of_two_ranks(tmp_path):
    outs = outputs(begin(2, *small_run(tmp_path, "--arm", "cone", "--steps", "2")))
    lines = [json.loads(x) for x in open(tmp_path / "run" / "metrics.jsonl")]
    assert [x["n"] for x in lines] == [16, 16] and sum(lines[0]["labels"].values()) == 16
    assert (tmp_path / "run" / "done.json").exists() and "hack rate" in outs[0] and "hack rate" not in outs[1]
    for words in ("held-out separation", "steering, share", "prompts are over", "seconds by phase"):
        assert words not in outs[1]
    assert torch.isfinite(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").popitem()[1]).all()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")
def test_a_death_on_the_second_rank_ends_both_with_the_firsts_checkpoint(tmp_path):
    processes = begin(2, *small_run(tmp_path, "--arm", "vanilla", "--steps", "40", "--save-every", "1000"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, processes[0])
    kill_workers_of(processes[1])
    outs = outputs(processes, codes=(1,))
    said = [x for x in outs[0].splitlines() if x.startswith("stopped: ")]
    assert len(said) == 1 and "(rank 1)" in said[0] and "--resume" in said[0]
    steps = metrics.read_text().count("\n")
    assert f"saved after {steps} steps" in said[0]
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_with_one_line(killed, tmp_path):
    """Within the bound of `outputs`: the other does not wait for what never comes."""
    processes = begin(2, *small_run(tmp_path, "--arm", "vanilla", "--steps", "40", "--save-every", "1000"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, processes[0])
    processes[killed].kill()
    out = outputs(processes, codes=(1, -9))[1 - killed]
    assert processes[1 - killed].returncode == 1 and "Traceback" not in out, out
    (line,) = [x for x in out.splitlines() if x.startswith(("stopped: ", "error: "))]
    assert "another rank of this run has ended" in line and f"--resume {tmp_path / 'run'}" in line


@pytest.mark.parametrize(
    "env, words",
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2"),
        ({"RANK": "one"}, "RANK=one"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "."}, "LOCAL_RANK=."),
        ({"WORLD_SIZE": "2"}, "RANK expected"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "do not come together"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_one_line(env, words, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as error:
        Ranks()
    assert "\n" not in str(error.value) and "torchrun" in str(error.value)


def test_prompts_that_the_ranks_do_not_divide_are_refused():
    ranks = Ranks()
    ranks.size = 2
    with pytest.raises(UserError, match="--batch"):
        ranks.share([1, 2, 3])
    parts = []
    for ranks.rank in range(2):
        parts += ranks.part([1, 2, 3])
    assert parts == [1, 2, 3]


def test_one_rank_raises_its_own_death():
    with pytest.raises(PartDied, match="gone"), Ranks().agreed():
        raise PartDied("gone")
