"""The parts of `bench.gpu_check` that are more than a model: every arm as a process, and vLLM through what a run does with it."""

import gc
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from arms import ARMS
from bench import gpu_step
from bench.gpu_tools import TEMPERATURE, Line, Shapes, Skipped, adapted, judged, relative
from engine import lora
from engine.forward import logprobs
from engine.model import load_model
from engine.sampler import Rollout
from engine.vllm_sampler import VLLMSampler
from faults.errors import one_line
from harness import memory
from harness.checkpoint import read_checkpoint
from harness.config import POCKET, ROOT, Config
from harness.scale import filled


def arms(shapes: Shapes) -> Iterator[Line]:
    """Every arm as a user starts it, on the embedded model: two steps; then the second again, from the first's checkpoint."""
    if shapes.tiny:
        raise Skipped("full scale runs on a card alone; at pocket scale the tests run the arms")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:  # each takes seconds of CPU to start
        yield from pool.map(lambda arm: one_arm(arm, Path(folder) / arm), ARMS)


def one_arm(arm: str, folder: Path, scale: str = "full") -> Line:
    """Two steps, and the second again; error: how far the resumed step ended from the first one, as a share of that step.

    Not 0 on a card, whose sums have no fixed order: where a gradient is rounding alone, AdamW takes its sign for a whole step. A
    lost moment or direction would show as about 1."""
    options = f"""--arm {arm} --scale {scale} --model {POCKET} --data {POCKET}/train.jsonl --heldout {POCKET}/heldout.jsonl
        --rollout torch --batch 32 --generations 4 --steps 2 --lr 1e-3 --save-every 1 --log-every 1 --max-prompt 128
        --max-new-tokens 48 --pairs 30 --pairs-heldout 10 --steer-prompts 2 --eval-samples 1 --workers 1"""
    start, second = time.perf_counter(), folder / "checkpoints" / "step-000002.json"

    def run(*args: str) -> str:
        command = [sys.executable, str(ROOT / "grpo.py"), *args]
        process = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=180)
        said = process.stdout.strip().splitlines()[-1:]
        return f"exit code {process.returncode}: {said}" if process.returncode else ""

    def adapter(path: Path) -> Tensor:
        held = read_checkpoint(path)[1]
        return torch.cat([held[k].flatten() for k in sorted(held) if k.startswith("param.")])

    try:
        if failed := run(*options.split(), "--out", str(folder)):
            return Line(f"arm {arm}", "fail", note=failed)
        first, whole = adapter(folder / "checkpoints" / "step-000001.json"), adapter(second)
        for path in (folder / "done.json", second, second.with_suffix(".safetensors")):
            path.unlink()  # as if it had been killed in the second step
        if failed := run("--resume", str(folder)):
            return Line(f"arm {arm}", "fail", note=f"--resume: {failed}")
        error = relative(adapter(second) - first, whole - first)
    except Exception as problem:
        return Line(f"arm {arm}", "fail", note=one_line(problem))
    return judged(f"arm {arm}", error, 0.2, SimpleNamespace(seconds=time.perf_counter() - start, gib=None), "resumed step")


def engine(shapes: Shapes) -> Iterator[Line]:
    """vLLM at full shapes from a folder of random weights: a line per stage. What follows a stage that broke is skipped."""
    if shapes.tiny:
        raise Skipped("sleep, wake and graphs are a card's; python -m pytest -m vllm runs the engine on a CPU")
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vLLM is not installed: pip install -e '.[vllm]'")
    with tempfile.TemporaryDirectory() as folder:
        life, broken = Life(shapes, Path(folder)), ""
        for name in STAGES:
            check, begin = f"vLLM: {name}", time.perf_counter()
            if broken:
                yield Line(check, "skipped", note=f"after {broken!r} failed")
                continue
            try:
                right, gib, error, note = getattr(life, name.replace(" ", "_"))()
                yield Line(check, "pass" if right else "fail", time.perf_counter() - begin, gib, error, note=note)
            except Exception as problem:
                broken = name
                yield Line(check, "fail", time.perf_counter() - begin, note=one_line(problem))


STAGES = ("start", "push after graph capture", "sleep", "wake and generate", "push after waking", "close while asleep")
Outcome = tuple[bool, float | None, float | None, str]  # passed, GiB, |log-ratio|, note


class Life:
    """The trainer's model and its engine on one card, as `harness.setup` starts them."""

    def __init__(self, shapes: Shapes, folder: Path):
        self.folder, config = folder, gpu_step.build_config(shapes)
        torch.manual_seed(0)
        with torch.device(shapes.device):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        base.save_pretrained(folder)
        del base
        self.model = adapted(lora.inject(load_model(str(folder), shapes.device), 32, 32, seed=0))
        self.vocab, self.config = config.vocab_size, config
        generator = torch.Generator().manual_seed(3)
        shared = torch.randint(0, self.vocab, (700,), generator=generator).tolist()  # longer than a block of a hybrid's cache
        self.prompts = [[*shared, i] for i in range(8)]

    def start(self) -> Outcome:
        """gib: what it takes of the card, beside the trainer."""
        self.before, card = used(), memory.card_memory_gib()
        cfg = memory.fitted(filled(Config(), "full"))
        share = memory.vllm_share(memory.plan_for(self.config, cfg, card), card)
        self.engine: Any = VLLMSampler(
            self.folder, eos=[self.vocab - 1], vocab=self.vocab, max_model_len=3072, dtype="bfloat16", max_seqs=128,
            gpu_memory=share, log=self.folder / "vllm.log",
        )  # fmt: skip
        self.taken = used() - self.before
        return True, self.taken, None, f"share of the card {share:.2f}"

    def push_after_graph_capture(self) -> Outcome:
        """The adapter is far from zero: graphs that still read the old weights would show in the log-ratio."""
        return self.push(1)

    def push(self, version: int) -> Outcome:
        """The trainer's merged weights go to the engine as that version; then as `agreement`."""
        self.engine.load_weights(partial(lora.merged_weights, self.model), version=version)
        return self.agreement(version)

    def agreement(self, version: int) -> Outcome:
        """error: mean |log-ratio| of trainer and sampler. Bar: 0.03, bf16 over 24 layers; and a third of the base model's."""
        rollouts = self.engine.generate(
            self.prompts, n=2, temperature=TEMPERATURE, max_new_tokens=64, seed=version, version=version
        )
        with torch.no_grad():
            error = self.log_ratio(rollouts)
            with lora.adapter_off(self.model):
                stale = self.log_ratio(rollouts)
        return error <= min(0.03, stale / 3), None, error, f"mean |log-ratio|; to the base model {stale:.3g}"

    def log_ratio(self, rollouts: list[Rollout]) -> float:
        """Mean |log-ratio| a token, in nats, of the trainer's logprobs to the sampler's."""
        trained = logprobs(self.model, [r.sequence for r in rollouts], TEMPERATURE, self.vocab, 2048)  # [tokens] each
        sampled = torch.tensor([x for r in rollouts for x in r.logprobs], device=self.model.device)  # [tokens]
        return (torch.cat(trained) - sampled).abs().mean().item()

    def sleep(self) -> Outcome:
        """gib: what it still holds; the bar is a quarter of what it took: graphs and libraries stay."""
        self.engine.sleep()
        held = used() - self.before
        return held <= 0.25 * self.taken, held, None, f"of {self.taken:.1f} GiB"

    def wake_and_generate(self) -> Outcome:
        """Sampling wakes it: its weights must have come back as they were pushed."""
        return self.agreement(1)

    def push_after_waking(self) -> Outcome:
        """The step of a run: other weights, pushed into an engine that slept."""
        self.engine.sleep()
        for name, p in lora.lora_parameters(self.model).items():
            p.data.mul_(-1.5 if name.endswith(".B") else 1.0)
        return self.push(2)

    def close_while_asleep(self) -> Outcome:
        """gib: what is left of it on the card; `close` hides errors, so memory must tell."""
        self.engine.sleep()
        self.engine.close()
        left = used() - self.before
        return left <= 0.25 * self.taken, left, None, f"of {self.taken:.1f} GiB"


def used() -> float:
    """GiB in use on the card, by every process; what PyTorch holds in reserve is given back first."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / memory.GIB
