"""Peak memory and time of `logprob.token_logprobs` at the full scale's shapes, on CPU or CUDA.

    python -m bench.logprob                  # vocabulary 248k, 4 x 3,072 tokens, hidden 2,048; the bar is 1.5 GB
    python -m bench.logprob --tokens 256 --plain        # the plain computation beside it

The measurement runs in a process of its own, so that the peak resident set is that of this computation alone.
It exits with 1 when the peak above the inputs exceeds --bar-gb.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from engine.logprob import token_logprobs
from faults.errors import command


@dataclass
class Options:
    """Of which shapes, and where."""

    tokens: int = 4 * 3072  # whose logprobs are asked for
    vocab: int = 248_320  # rows of the head
    hidden: int = 2048  # width of a state
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of states and head
    device: Literal["cpu", "cuda"] = "cpu"  # where it runs
    bar_gb: float = 1.5  # most memory above the inputs
    plain: bool = False  # measure the plain computation instead
    child: bool = False  # measure in this process, as the one that is started for it does


@command
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (`faults.errors.command`): 1 where the peak is above the bar."""
    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, prog="python -m bench.logprob", description=__doc__, args=argv)
    if not options.child:
        return subprocess.run([sys.executable, "-m", "bench.logprob", "--child", *argv], env=steady_memory()).returncode
    inputs = make_inputs(options.tokens, options.vocab, options.hidden, getattr(torch, options.dtype), options.device)
    before = peak_bytes(options.device, reset=True)
    start = time.perf_counter()
    logp = (plain if options.plain else token_logprobs)(*inputs, 0.7)
    forward = time.perf_counter() - start
    logp.sum().backward()
    if options.device == "cuda":
        torch.cuda.synchronize()
    backward = time.perf_counter() - start - forward
    above = (peak_bytes(options.device) - before) / 1e9
    print(
        f"{'plain' if options.plain else 'chunked'}, {options.device}, {options.dtype}: {options.tokens} tokens, vocabulary "
        f"{options.vocab}, hidden {options.hidden}: {above:.2f} GB above the inputs ({before / 1e9:.2f} GB), "
        f"forward {forward:.1f} s, backward {backward:.1f} s, {torch.get_num_threads()} threads"
    )
    return int(above > options.bar_gb)


def make_inputs(tokens: int, vocab: int, hidden: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states [tokens, hidden], weight of the head [vocab, hidden], targets [tokens]), drawn from one seed.

    The hidden states alone want a gradient, as in training."""
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(vocab, hidden, dtype=dtype, device=device)
    return states, weight, torch.randint(0, vocab, (tokens,), device=device)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """What `token_logprobs` computes, [tokens], by way of all the logits at once."""
    logits = (hidden @ weight.T).float() / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def peak_bytes(device: str, reset: bool = False) -> int:
    """Peak resident set of this process (Linux), or peak memory allocated on the card, since the last reset."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def steady_memory() -> dict[str, str]:
    """Fixed malloc threshold: freed blocks go back at once, so that the peak shows live memory, not the allocator's habits."""
    return os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}


if __name__ == "__main__":
    sys.exit(main())
