"""Everything of this project that only a CUDA card can show, in one command: a table with a line per check.

    python -m bench.gpu_check                   # for an H100-class card: meant to end within 8 minutes; needs no network
    python -m bench.gpu_check --only cone lift  # some parts
    python -m bench.gpu_check --tiny            # tiny shapes on a CPU: proves that the code runs, measures nothing

Weights are random, at the shapes of Qwen3.5-2B; texts are the embedded problems. What cannot run where this is started is a
line too, "skipped" with the reason. Exit code: 0, 1 where a check failed, 2 without a card (unless --tiny).
"""

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import tyro
from transformers.utils.import_utils import is_flash_linear_attention_available

import vhack
from arms.cone import Contrast, contrast_rows
from arms.pairs import make_pairs
from bench import gpu_step
from bench.gpu_runs import arms, engine
from bench.gpu_tools import (
    TEMPERATURE,
    TINY,
    Line,
    Shapes,
    Skipped,
    built,
    judged,
    measured,
    reference_kernels,
    relative,
    single_row,
)
from bench.logprob import make_inputs
from engine import lora
from engine.logprob import token_logprobs
from engine.model import band, load_tokenizer
from engine.sampler import Rollout
from faults.errors import UserError, command, one_line
from harness import memory
from harness.config import POCKET, ROOT, Config
from harness.scale import filled
from leetcode_env import Problem, load_problems

# Dense bf16 peaks with float32 sums as published, TFLOP/s (RTX PRO 6000: an eighth of its sparse FP4). The first name that the
# driver's name of the card holds counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 6000 Ada": 364,
               "RTX PRO 6000": 500, "RTX 4090": 165, "RTX 3090": 71}  # fmt: skip


# --- parts: each yields its lines ----------------------------------------------------------------------------------------------


def training(shapes: Shapes) -> Iterator[Line]:
    """The training phase of `bench.gpu_step`, by the size of a micro-batch, with and without flash-linear-attention."""
    config, model = built(shapes)
    optimizer = torch.optim.AdamW(lora.lora_parameters(model).values(), lr=7e-5)
    fast = not shapes.tiny and is_flash_linear_attention_available()
    for kernels, kernel, count in (("fla", contextlib.nullcontext, shapes.sequences),
                                   ("no fla", reference_kernels, shapes.slow_sequences)):  # fmt: skip
        for micro in shapes.micro_tokens:
            check = f"training, {micro:,} tokens, {kernels}"
            if kernels == "fla" and not fast:
                why = "its kernels need a card" if shapes.tiny else "flash-linear-attention is not installed"
                yield Line(check, "skipped", note=why)
                continue
            try:
                with kernel():
                    yield trained(check, replace(shapes, sequences=count), config, model, optimizer, micro)
            except Exception as problem:  # one size too large says nothing about the others
                yield Line(check, "fail", note=one_line(problem))
            optimizer.zero_grad()
            gc.collect()


def trained(check: str, shapes: Shapes, config: Any, model: Any, optimizer: Any, micro: int) -> Line:
    """One timed training phase, after one micro-batch that compiles and tunes the kernels."""
    cfg = Config(micro_tokens=micro, rollout="vllm", max_new_tokens=shapes.tokens - shapes.prompt)
    rollouts = gpu_step.make_rollouts(shapes, config.vocab_size)
    advantages = torch.randn(shapes.sequences, generator=torch.Generator().manual_seed(0))
    phase = partial(gpu_step.training_phase, model, advantages=advantages, cfg=cfg, optimizer=optimizer, vocab=config.vocab_size)
    phase(rollouts[: max(1, micro // shapes.tokens)])
    with measured(shapes.device) as took:
        phase(rollouts)
    name = torch.cuda.get_device_name() if shapes.device == "cuda" else ""
    peak = next((peak for card, peak in PEAK_TFLOPS.items() if card in name), None)
    share = gpu_step.model_flops(shapes, config) / took.seconds / (peak * 1e12) if peak else None
    finite = lora.flatten_grads(lora.lora_parameters(model)).isfinite().all()
    note = f"{shapes.sequences * shapes.tokens / took.seconds:,.0f} tokens/s" + ("" if finite else "; gradient not finite")
    return Line(check, "pass" if finite else "fail", took.seconds, took.gib, share=share, note=note)


def cone(shapes: Shapes) -> Iterator[Line]:
    """Rows of the cone in groups, with a copy of the adapter each, against one gradient after the other: the worst row's error.

    The bar is for bf16, which rounds products of other shapes in another way; a row of the wrong context would be above 1."""
    config, model = built(shapes)
    generator = torch.Generator().manual_seed(0)
    low, high = shapes.contexts

    def ids(n: int) -> list[int]:
        return torch.randint(0, config.vocab_size, (n,), generator=generator).tolist()

    rows = []
    for i in range(shapes.rows):
        context = ids(low + (high - low) * (7 * i % shapes.rows) // shapes.rows)  # mixed: groups hold several lengths
        rows.append(Contrast([(context + ids(k), len(context)) for k in (2, 3, 4, 5)], (context + ids(2), len(context))))
    contrast_rows(model, rows[:1], config.vocab_size)  # compiles and tunes the kernels
    with measured(shapes.device) as together:
        J, _ = contrast_rows(model, rows, config.vocab_size)  # [rows, P]
    with measured(shapes.device) as alone:
        errors = [relative(found, single_row(model, row, config.vocab_size)[0]) for row, found in zip(rows, J, strict=True)]
    worst = max(errors) if all(e == e for e in errors) else float("nan")
    yield judged(f"{shapes.rows} cone rows, the worst", worst, 0.2, together, f"one at a time {alone.seconds:.2f} s")


def logprobs(shapes: Shapes) -> Iterator[Line]:
    """`token_logprobs` against float64 on the CPU. The gradient comes in bf16, so its bar is the rounding of that."""
    hidden, weight, targets = make_inputs(shapes.asked, shapes.vocab, shapes.hidden, torch.bfloat16, shapes.device)
    weight.mul_(0.05)  # logits of a few units; those of raw Gaussians would leave nothing but the largest
    token_logprobs(hidden[:8], weight, targets[:8])  # loads the kernels
    upstream = torch.randn(shapes.asked, device=shapes.device)
    with measured(shapes.device) as took:
        found = token_logprobs(hidden, weight, targets, TEMPERATURE)
        found.backward(upstream)
    some = torch.arange(0, shapes.asked, shapes.asked // shapes.compared, device=shapes.device)
    h = hidden.detach()[some].cpu().double().requires_grad_()
    exact = torch.log_softmax(h @ weight.cpu().double().T / TEMPERATURE, -1).gather(1, targets[some].cpu()[:, None])[:, 0]
    exact.backward(upstream[some].cpu().double())
    assert hidden.grad is not None and h.grad is not None
    note = f"{shapes.asked:,} tokens, {len(some)} compared"
    yield judged(f"logprobs, vocabulary {shapes.vocab:,}", relative(found[some], exact), 1e-4, took, note)
    yield judged("their gradients", relative(hidden.grad[some], h.grad), 1e-2, SimpleNamespace(seconds=None, gib=None))


def lift(shapes: Shapes) -> Iterator[Line]:
    """The Jacobian lift with gradient checkpointing against without: the same numbers, up to the order of sums on a card."""
    config, model = built(shapes)
    tokenizer, count = load_tokenizer(str(POCKET)), shapes.lifted[0]
    silent: Any = SimpleNamespace(generate=lambda prompts, **_: [Rollout(p, [], [], True) for p in prompts])
    pairs = make_pairs(long_problems(*shapes.lifted), tokenizer, silent, count, seed=0, max_new_tokens=1)  # canonical solutions
    lifted = partial(vhack.lift, model, tokenizer, pairs, direction(config), config.vocab_size)
    lifted()  # compiles and tunes the kernels
    with measured(shapes.device) as checkpointed:
        v = lifted()  # [P]
    model.gradient_checkpointing_disable()
    with measured(shapes.device) as plain:
        exact = lifted()
    more = f", {plain.gib:.1f} GiB" if plain.gib else ""
    note = f"without checkpointing {plain.seconds:.2f} s{more}"
    yield judged(f"lift of {count} pairs, checkpointing", relative(v, exact), 1e-2, checkpointed, note)


def steering(shapes: Shapes) -> Iterator[Line]:
    """One chunk of the steering check at one strength: a run repeats it, to the same peak. The bar is the memory plan's."""
    config, model = built(shapes)
    prompts, tokens, new = shapes.steered
    with measured(shapes.device) as took:
        cfg = Config(temperature=TEMPERATURE, max_new_tokens=new)
        problems = long_problems(prompts, tokens)
        vhack.steer(model, load_tokenizer(str(POCKET)), direction(config), problems, cfg, memory.STEER_TOKENS, (1.0,))
    items = memory.memory_plan(config, memory.fitted(filled(Config(card=96.0), "full")))
    planned = sum(item.gib for item in items if item.phases == "all" or item.name.startswith("steering"))
    fits = took.gib is None or took.gib <= planned
    note = f"one of 6 strengths, {4 * prompts} of 128 responses" + ("" if shapes.tiny else f"; planned {planned:.1f} GiB")
    yield Line("steering, one chunk", "pass" if fits else "fail", took.seconds, took.gib, note=note)


def long_problems(count: int, tokens: int) -> list[Problem]:
    """Embedded problems whose prompts are drawn out to about so many tokens."""
    problems = []
    for p in load_problems(POCKET / "train.jsonl", count):
        *before, last = p.messages
        drawn_out = " ".join(["Given xs, return x."] * (tokens // 8)) + "\n" + last["content"]
        problems.append(replace(p, messages=[*before, {**last, "content": drawn_out}]))
    return problems


def direction(config: Any) -> vhack.VHack:
    """A random unit vector at the layers of a run."""
    d = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(2))
    layers = band(config.num_hidden_layers)
    return vhack.VHack(d / d.norm(), 1.0, layers, layers[0], 16, 1.0, 1.0, [], "")


# --- the table -----------------------------------------------------------------------------------------------------------------

Part = Literal["arms", "training", "cone", "logprobs", "lift", "steering", "engine"]
PARTS: dict[Part, Callable[[Shapes], Iterator[Line]]] = {
    "arms": arms, "training": training, "cone": cone, "logprobs": logprobs, "lift": lift, "steering": steering, "engine": engine,
}  # fmt: skip


def lines_of(part: Part, shapes: Shapes) -> Iterator[Line]:
    """The lines of a part; an exception is its last one."""
    try:
        yield from PARTS[part](shapes)
    except Skipped as why:
        yield Line(part, "skipped", note=str(why))
    except Exception as problem:
        yield Line(part, "fail", note=one_line(problem))


def in_a_process(part: Part, seconds: float) -> Iterator[Line]:
    """The lines of a part that runs in a process of its own: one that hangs or aborts must not take the table with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines"
        path.touch()
        command = [sys.executable, "-m", "bench.gpu_check", "--only", part, "--lines", str(path)]
        try:
            process = subprocess.run(
                command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, cwd=ROOT
            )
            ended = "" if process.returncode in (0, 1) else f"it ended with code {process.returncode}: {process.stdout[-200:]!r}"
        except subprocess.TimeoutExpired:
            ended = f"no end after {seconds:.0f} s"
        yield from (Line(*json.loads(line)) for line in path.read_text().splitlines())
        if ended:
            yield Line(part, "fail", note=ended)


def table(lines: list[Line]) -> str:
    """The lines under their heads, "-" for what has no number."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [("check", "verdict", "seconds", "GiB", "error", "of peak", "note")]
    rows += [
        (x.check, x.verdict, cell(x.seconds, ".2f"), cell(x.gib, ".1f"), cell(x.error, ".1e"), cell(x.share, ".1%"), x.note)
        for x in lines
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows)


@dataclass
class Options:
    """What is checked, and where its lines go."""

    tiny: bool = False  # tiny shapes on a CPU: proves the code path
    only: tuple[Part, ...] = tuple(PARTS)  # parts
    minutes: float = 8.0  # parts that would begin later are skipped
    lines: Path | None = None  # a file for the lines as JSON, which a part in a process of its own leaves there


@command
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (`faults.errors.command`): 1 where a check failed, 2 without a card."""
    options = tyro.cli(Options, prog="python -m bench.gpu_check", description=__doc__, args=argv)
    if not options.only:
        raise UserError("--only names no part")
    if not options.tiny and not torch.cuda.is_available():
        raise UserError("bench.gpu_check needs a CUDA card: none is visible here (--tiny runs the same code on a CPU)")
    if options.tiny:
        torch.set_num_threads(1)  # many threads on a tensor this small, on cores that others use, take ten times as long
    shapes, end, lines = TINY if options.tiny else Shapes(), time.monotonic() + 60 * options.minutes, list[Line]()
    with reference_kernels() if options.tiny else contextlib.nullcontext():
        for part in options.only:
            left = end - time.monotonic()
            if left <= 0:
                found = iter([Line(part, "skipped", note=f"the {options.minutes:g} minutes were over")])
            elif part == "engine" and not options.tiny and not options.lines:
                found = in_a_process(part, left)
            else:
                found = lines_of(part, shapes)
            for line in found:
                lines.append(line)
                if options.lines:
                    with options.lines.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                else:
                    print(f"{line.check}: {line.verdict}", file=sys.stderr, flush=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if not options.tiny else "CPU, tiny shapes: nothing is measured"
    print(f"{name}\n{table(lines)}")
    return int(any(line.verdict == "fail" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
