"""What the precision of products on a CPU costs and saves: a step's model work at each precision in turn.

    python -m bench.precision                                     # --scale small's model, 2 prompts x 8 responses
    python -m bench.precision --model pocket --prompts 4 --rounds 1

"float32" as PyTorch multiplies by default; "medium", `set_float32_matmul_precision` of that name, which on a CPU hands float32
products to oneDNN (on processors with AMX that rounds factors to bf16); "bf16", a model in bf16. Seconds are the process's own
(with one thread, those of a free core), the least over the rounds, which take turns. The difference is that of the logprobs of
the same responses to the float32 model's: the drift that a trainer in float32 would see of such a sampler.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from bench.reports import table
from engine.forward import batches, logprobs
from engine.lora import adapter_off, inject
from engine.model import encode_prompt, load_model, load_tokenizer, vocabulary
from engine.sampler import Rollout, stop_of
from engine.torch_sampler import TorchSampler
from faults.errors import command
from harness.scale import SCALES
from leetcode_env import load_problems, render_messages
from loopholes import evaluated_by
from problems.data import as_program

SMALL = SCALES["small"]
PRECISIONS = ("float32", "medium", "bf16")


@dataclass
class Work:
    """One precision's model and sampler, and the least CPU seconds of each part so far."""

    model: Any
    sampler: TorchSampler
    seconds: dict[str, float]

    def timed(self, part: str, function: Callable[[], Any]) -> Any:
        """The function's result; its seconds count for that part where they are the least."""
        start = time.process_time()
        result = function()
        self.seconds[part] = min(self.seconds.get(part, float("inf")), time.process_time() - start)
        return result


def backward(model: Any, sequences: list[tuple[list[int], int]], vocab: int) -> None:
    """Computes the gradient of the responses' summed logprobs, and drops it. vocab: how many ids can be sampled."""
    for batch in batches(model, sequences, SMALL["micro_tokens"]):
        batch.logprobs(model, 0.7, vocab).sum().backward()
    model.zero_grad()


@dataclass
class Options:
    """Of which model, on how much."""

    model: str = SMALL["model"]  # a folder
    prompts: int = 2  # 8 responses each
    rounds: int = 3  # in which the precisions take turns; the least seconds count
    threads: int = 1  # of torch


@command
def main(argv: list[str] | None = None) -> None:
    """Measures and prints one table; returns the exit code (`faults.errors.command`)."""
    options = tyro.cli(Options, prog="python -m bench.precision", description=__doc__, args=argv)
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    problems = [as_program(p) for p in load_problems(SMALL["data"])[: options.prompts]]
    prompts = [encode_prompt(tokenizer, render_messages(p, evaluated_by())) for p in problems]
    works = {}
    for name in PRECISIONS:
        base = load_model(options.model)
        base = base.bfloat16() if name == "bf16" else base
        sampler = TorchSampler(base, tokenizer, stop=stop_of("fence", tokenizer, vocabulary(base, tokenizer)))
        works[name] = Work(inject(base, 32, 32, 0), sampler, {})
    vocab = vocabulary(works["float32"].model, tokenizer)

    fixed: list[Rollout] = []
    found: dict[str, torch.Tensor] = {}
    for _ in range(options.rounds):
        for name, work in works.items():
            torch.set_float32_matmul_precision("medium" if name == "medium" else "highest")
            drawn = work.timed(
                "sampling", lambda: work.sampler.generate(prompts, n=8, temperature=0.7, max_new_tokens=96, seed=0)
            )
            tokens = sum(len(r.completion_ids) for r in drawn)
            work.seconds["sampling, ms a token"] = 1e3 * work.seconds["sampling"] / tokens
            fixed = fixed or drawn
            sequences = [r.sequence for r in fixed]
            with torch.no_grad(), adapter_off(work.model):
                of = work.timed("reference", lambda: logprobs(work.model, sequences, 0.7, vocab, SMALL["micro_tokens"]))
            found[name] = torch.cat(of)
            work.timed("backward", lambda: backward(work.model, sequences, vocab))
    rows = [["precision", "sampling, ms a token", "reference, s", "backward, s", "logprob difference: mean", "most"]]
    for name, work in works.items():
        drift = (found[name] - found["float32"]).abs()
        parts = ("sampling, ms a token", "reference", "backward")
        rows.append([name, *(f"{work.seconds[p]:.2f}" for p in parts), f"{drift.mean():.1e}", f"{drift.max():.1e}"])
    sampled = torch.tensor([x for r in fixed for x in r.logprobs])
    print(f"{len(fixed)} responses, {len(sampled)} tokens, {options.threads} threads; sampler against trainer, float32: "
          f"{(sampled - found['float32']).abs().max():.1e} at most\n")  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
