"""Peak memory and time of `logprob.token_logprobs` at the full scale's shapes, on CPU or CUDA.

    python -m bench.logprob                  # vocabulary 248k, 4 x 3,072 tokens, hidden 2,048; the bar is 1.5 GB
    python -m bench.logprob --tokens 256 --plain        # the plain computation beside it

The measurement runs in a process of its own, so that the peak resident set is that of this computation alone.
It exits with 1 when the peak above the inputs exceeds --bar-gb.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from engine.logprob import token_logprobs


def main() -> int:
    args = parse()
    if not args.child:
        return subprocess.run([sys.executable, "-m", "bench.logprob", "--child", *sys.argv[1:]], env=steady_memory()).returncode
    inputs = make_inputs(args)
    before = peak_bytes(args.device, reset=True)
    start = time.perf_counter()
    logp = (plain if args.plain else token_logprobs)(*inputs, 0.7)
    forward = time.perf_counter() - start
    logp.sum().backward()
    if args.device == "cuda":
        torch.cuda.synchronize()
    backward = time.perf_counter() - start - forward
    above = (peak_bytes(args.device) - before) / 1e9
    print(
        f"{'plain' if args.plain else 'chunked'}, {args.device}, {args.dtype}: {args.tokens} tokens, vocabulary "
        f"{args.vocab}, hidden {args.hidden}: {above:.2f} GB above the inputs ({before / 1e9:.2f} GB), "
        f"forward {forward:.1f} s, backward {backward:.1f} s, {torch.get_num_threads()} threads"
    )
    return int(above > args.bar_gb)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4 * 3072)
    parser.add_argument("--vocab", type=int, default=248_320)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bar-gb", type=float, default=1.5)
    parser.add_argument("--plain", action="store_true", help="measure the plain computation instead")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_inputs(args):
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.hidden, dtype=dtype, device=args.device, requires_grad=True)
    weight = torch.randn(args.vocab, args.hidden, dtype=dtype, device=args.device)
    return hidden, weight, torch.randint(0, args.vocab, (args.tokens,), device=args.device)


def plain(hidden, weight, targets, temperature):
    logits = (hidden @ weight.T).float() / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def peak_bytes(device: str, reset: bool = False) -> int:
    """Peak resident set of this process, or peak memory allocated on the card, since the last reset."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the high-water mark back to what is resident now
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def steady_memory() -> dict[str, str]:
    """Fixed malloc threshold: freed blocks go back at once, so that the peak shows live memory, not the allocator's habits."""
    return os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}


if __name__ == "__main__":
    sys.exit(main())
