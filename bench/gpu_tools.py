"""What the parts of `bench.gpu_check` share: a line of its table, the shapes, the clock, a model of random weights."""

import contextlib
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from arms.cone import Contrast, contrast_batch, log_odds
from bench import gpu_step
from engine import lora
from harness import memory

TEMPERATURE = 0.7


class Line(NamedTuple):
    """One line of the table; None where a number makes no sense or could not be had."""

    check: str
    verdict: str  # "pass", "fail" or "skipped"
    seconds: float | None = None
    gib: float | None = None  # peak memory on the card
    error: float | None = None  # relative, |a - b| / |b|
    share: float | None = None  # of the card's peak FLOP/s, by the FLOPs that the mathematics needs
    note: str = ""


class Skipped(Exception):
    """A part cannot run here; the text says why."""


@dataclass(frozen=True)
class Shapes(gpu_step.Sizes):
    """How large the parts are."""

    device: str = "cuda"
    sequences: int = 48  # of the training phase: fills whole micro-batches at 16k and 24k
    slow_sequences: int = 16  # of it without the fast kernels, which would take minutes for all
    micro_tokens: tuple[int, ...] = (2048, 16_384, 24_576)
    rows: int = 24  # of the cone
    contexts: tuple[int, int] = (200, 1100)  # tokens of the shortest and longest context of the cone's rows
    vocab: int = 248_320
    hidden: int = 2048
    asked: int = 12_288  # log-probabilities at once
    compared: int = 128  # of them, in float64 on the CPU
    lifted: tuple[int, int] = (4, 500)  # pairs and about their tokens: what fits an 80 GB card without checkpointing
    steered: tuple[int, int, int] = (10, 1000, 512)  # prompts, about their tokens, new tokens: one chunk of 65,536 tokens


TINY = Shapes(
    tiny=True, device="cpu", sequences=6, slow_sequences=4, tokens=48, prompt=16, micro_tokens=(96, 192), rows=6,
    contexts=(4, 20), vocab=40_000, hidden=32, asked=64, compared=16, lifted=(2, 24), steered=(2, 24, 4),
)  # fmt: skip


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, summed in float64; nan where either is not finite or b is zero."""
    b = b.detach().double()
    return ((a.detach().to(b.device).double() - b).norm() / b.norm()).item()


def judged(check: str, error: float, bar: float, took: Any, note: str = "") -> Line:
    """A line that passes at an error of at most `bar`; nan fails."""
    verdict, note = "pass" if error <= bar else "fail", f"bar {bar:g}; {note}".rstrip("; ")
    return Line(check, verdict, took.seconds, took.gib, error, note=note)


@contextlib.contextmanager
def measured(device: str) -> Iterator[Any]:
    """Yields an object that holds `seconds` and `gib` afterwards; None for the memory of a CPU, where nothing is measured."""
    took, card = SimpleNamespace(seconds=0.0, gib=None), device == "cuda"
    if card:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield took
    if card:
        torch.cuda.synchronize()
        took.gib = torch.cuda.max_memory_allocated() / memory.GIB
    took.seconds = time.perf_counter() - start


@contextlib.contextmanager
def reference_kernels() -> Iterator[None]:
    """Inside, Qwen3.5's linear layers run the code that transformers holds itself, whatever is installed.

    transformers chooses when it is imported, by what is installed and not by the device: on a machine with
    flash-linear-attention a model on the CPU, too, would call a kernel of the card."""
    names = [f"torch_{kind}_gated_delta_rule" for kind in ("chunk", "recurrent")] + ["causal_conv1d_fn", "causal_conv1d_update"]
    bound = {name: getattr(modeling_qwen3_5, name) for name in names}
    try:
        for name, function in bound.items():
            setattr(modeling_qwen3_5, name, inspect.unwrap(function))
        yield
    finally:
        for name, function in bound.items():
            setattr(modeling_qwen3_5, name, function)


def adapted(model: Any) -> Any:
    """The model with a B that is not zero, so that every A has a gradient and the adapter changes the policy."""
    generator = torch.Generator().manual_seed(1)
    for name, p in lora.lora_parameters(model).items():
        if name.endswith(".B"):
            p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def built(shapes: Shapes) -> tuple[Any, Any]:
    """(config, model with its adapter): random weights in bf16 with checkpointing."""
    config = gpu_step.build_config(shapes)
    if shapes.tiny:
        config.vocab_size = 704  # the embedded tokenizer's ids must fit
    return config, adapted(gpu_step.build_model(config, shapes.device))


def single_row(model: Any, row: Contrast, vocab: int) -> tuple[Tensor, Tensor]:
    """(gradient [P], log-odds []) of one row of the cone, by the adapter itself instead of a copy."""
    (odds,) = log_odds(model, contrast_batch(model, [row]), [row], vocab)
    return lora.flatten(list(torch.autograd.grad(odds, list(lora.lora_parameters(model).values())))), odds.detach()
