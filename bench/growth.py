"""How a step's time and memory grow with the batch, the length of completions and the rank, each in a process of its own.

    python -m bench.growth                                         # batch 32..512 x length 64..512 at rank 32; ranks 8..64
    python -m bench.growth --batches 32 64 --lengths 64 --ranks 32 --repeats 1       # a quick look

The model is the embedded one, but for an end-of-text token that it cannot sample: every completion has the full length. A line is
a run of two steps, of which the second is timed. Memory is the peak of the resident memory of the trainer's process, in the
rollout (weights, caches of at most 256 sequences at once) and in what comes after it (reference, backward, optimizer). The second
is what must not depend on the batch: `--micro-tokens` is the same in all of them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import tyro

from bench.reports import FIRST_SEED, Report, run, spread, table
from faults.errors import UserError, command
from harness.config import POCKET, flag

NEVER = "<|never|>"  # the new end of text: the tokenizer puts it behind the model's vocabulary, so that it is never sampled


class Cell(NamedTuple):
    """One line."""

    batch: int
    length: int
    rank: int


def endless(folder: Path) -> Path:
    """The embedded model with an end of text that it cannot sample, in that folder."""
    model = Path(shutil.copytree(POCKET, folder / "model", ignore=shutil.ignore_patterns("*.jsonl*", "*.py", "__pycache__")))
    beyond = json.loads((model / "config.json").read_text())["vocab_size"]
    for name, change in (
        ("tokenizer_config.json", {"eos_token": NEVER}),
        ("config.json", {"eos_token_id": beyond}),
        ("generation_config.json", {"eos_token_id": beyond}),
    ):
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return model


def cells(batches: Sequence[int], lengths: Sequence[int], ranks: Sequence[int]) -> list[Cell]:
    """Every batch with every length at the middle rank; then every other rank at the middle of both."""
    batch, length, rank = (sorted(x)[len(x) // 2] for x in (batches, lengths, ranks))
    grid = [Cell(b, t, rank) for t in lengths for b in batches]
    return grid + [Cell(batch, length, r) for r in ranks if r != rank]


def measured(cell: Cell, model: Path, micro_tokens: int, threads: int, seed: int) -> Report:
    """The run of a line, with the peak of memory in its rollout and after it. model: a folder."""
    options = dict(
        arm="vanilla", model=model, steps=2, batch=cell.batch, max_new_tokens=cell.length, lora_r=cell.rank, lora_alpha=cell.rank,
        micro_tokens=micro_tokens, seed=seed, pairs=24, pairs_heldout=8,
    )  # fmt: skip
    words = [str(w) for name, value in options.items() for w in (flag(name), value)]
    return run([*words, "--steer-prompts", "1"], threads, peaks=True)


@dataclass
class Options:
    """What grows, and what does not."""

    threads: int = 1  # of torch
    batches: tuple[int, ...] = (32, 64, 128, 256, 512)  # sequences a step
    lengths: tuple[int, ...] = (64, 128, 256, 512)  # tokens of every completion
    ranks: tuple[int, ...] = (8, 16, 32, 64)  # of the adapter
    micro_tokens: int = 2048  # the same in all
    repeats: int = 1  # runs a line, each with a seed of its own


@command
def main(argv: list[str] | None = None) -> None:
    """The command line; returns the exit code (`faults.errors.command`)."""
    options = tyro.cli(Options, prog="python -m bench.growth", description=__doc__, args=argv)
    if empty := [name for name in ("batches", "lengths", "ranks") if not getattr(options, name)]:
        raise UserError(f"{flag(empty[0])} names nothing")
    peaks: dict[Cell, float] = {}
    head = ("batch", "length", "rank", "seconds", "completion tokens/s", "peak in the rollout, MB", "peak after it, MB")
    rows: list[Sequence[str]] = [head]
    with tempfile.TemporaryDirectory() as folder:
        model = endless(Path(folder))
        for cell in cells(options.batches, options.lengths, options.ranks):
            how = (model, options.micro_tokens, options.threads)
            found = [measured(cell, *how, FIRST_SEED + k) for k in range(options.repeats)]
            seconds = [r.steps[-1].seconds for r in found]
            tokens, rollout = found[0].steps[-1].tokens, median(r.phases[-1]["rollout peak"] for r in found)
            peaks[cell] = median(r.peak["steps"] for r in found)
            numbers = (spread(seconds), f"{tokens / median(seconds):.0f}", f"{rollout / 1e6:.0f}", f"{peaks[cell] / 1e6:.0f}")
            rows.append((*map(str, cell), *numbers))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print(f"{options.micro_tokens} tokens a micro-batch, {options.threads} threads\n{table(rows)}\n")
    rank = sorted(options.ranks)[len(options.ranks) // 2]
    for length in options.lengths:
        small, large = (peaks[Cell(b, length, rank)] for b in (min(options.batches), max(options.batches)))
        print(
            f"length {length}: the peak after the rollout at batch {max(options.batches)} is {large / small:.2f} times that at "
            f"{min(options.batches)}"
        )


if __name__ == "__main__":
    sys.exit(main())
