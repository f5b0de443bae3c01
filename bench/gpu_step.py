"""The training phase of one full-scale step on one CUDA card: a random Qwen3.5-2B, 128 sequences x 1,536 tokens.

    python -m bench.gpu_step                 # prints seconds, peak memory and model-FLOP utilisation
    python -m bench.gpu_step --tiny          # the same code on a CPU with a tiny model: proves that it runs, measures nothing

It runs `grpo.backward` (reference logprobs with the adapter off, policy logprobs, backward in micro-batches) and one AdamW
step. Model FLOPs are those the mathematics needs: 2 for each matrix weight and token in the reference's forward, 2 in the
policy's, 2 in the backward (the weights are frozen: only the inputs' gradients); recomputation does not count.
"""

import sys
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import grpo
from engine import lora
from engine.model import recompute_layers
from engine.sampler import Rollout
from faults.errors import UserError, command
from harness import memory as plan
from harness.config import Config
from harness.scale import filled
from tests.support.models import tiny_config


@dataclass(frozen=True)
class Sizes:
    """What the training phase is measured on; `bench.gpu_check` adds what its other parts need."""

    tiny: bool = False  # a tiny model on CPU: proves the code path
    model: str = "Qwen/Qwen3.5-2B"  # a folder or a hub id, of which the shapes alone are read
    sequences: int = 128  # of a step
    tokens: int = 1536  # of a sequence, prompt and completion
    prompt: int = 512  # of them, the prompt's


@dataclass(frozen=True)
class Options(Sizes):
    """How it is measured."""

    micro_tokens: int | None = None  # default: what the memory plan chooses for this card
    recompute: Literal["none", "half", "all"] | None = None  # the same
    repeats: int = 2  # the best is reported: the first one warms up
    peak_tflops: float = 989.0  # dense bf16 peak of the card; 989 is an H100 SXM's


@command
def main(argv: list[str] | None = None) -> None:
    """The command line; returns the exit code (`faults.errors.command`), 2 without a card unless --tiny."""
    options = tyro.cli(Options, prog="python -m bench.gpu_step", description=__doc__, args=argv)
    if options.tiny:
        options = replace(options, sequences=8, tokens=48, prompt=16)
        chosen = Config(micro_tokens=96, recompute="all")
    elif not torch.cuda.is_available():
        raise UserError("bench.gpu_step needs a CUDA card: none is visible here (--tiny runs the same code on a CPU)")
    else:  # what a run takes on this card, where it is not given
        given: dict[str, Any] = dict(model=options.model, micro_tokens=options.micro_tokens, recompute=options.recompute)
        chosen = plan.fitted(filled(Config(**given), "full"))
    device, config = "cpu" if options.tiny else "cuda", build_config(options)
    model = build_model(config, device, chosen.recompute)
    rollouts = make_rollouts(options, config.vocab_size)
    cfg = Config(micro_tokens=chosen.micro_tokens, rollout="vllm", max_new_tokens=options.tokens - options.prompt)
    optimizer = torch.optim.AdamW(lora.lora_parameters(model).values(), lr=7e-5)
    advantages = torch.randn(options.sequences, generator=torch.Generator().manual_seed(0))  # [sequences]
    seconds = [training_phase(model, rollouts, advantages, cfg, optimizer, config.vocab_size) for _ in range(options.repeats)]
    print(report(options, config, min(seconds), device))


def build_config(sizes: Sizes) -> Any:
    """The configuration of the model, as transformers has it; a tiny one of the same kind where `sizes` is tiny."""
    return tiny_config("qwen3_5_text", tie_word_embeddings=True) if sizes.tiny else plan.model_config(sizes.model)


def build_model(config: Any, device: str, recompute: str = "all") -> Any:
    """Random weights at full shapes in bf16, the adapter in float32, checkpointing on.

    recompute: which layers run again in the backward, as --recompute of grpo.py."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    lora.inject(model, r=32, alpha=32, seed=0)
    recompute_layers(model, recompute)
    return model


def make_rollouts(sizes: Sizes, vocab: int) -> list[Rollout]:
    """Completions of random token ids below `vocab`, all of the full length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (sizes.sequences, sizes.tokens), generator=generator).tolist()
    # The sampler's logprobs only shape the importance weights: any finite numbers cost the same.
    return [Rollout(row[: sizes.prompt], row[sizes.prompt :], [-5.0] * (sizes.tokens - sizes.prompt), True) for row in ids]


def training_phase(
    model: Any, rollouts: list[Rollout], advantages: Tensor, cfg: Config, optimizer: torch.optim.Optimizer, vocab: int
) -> float:
    """Seconds of one step of training: reference, policy and backward, AdamW. advantages: one a rollout.

    The card's peak of memory is counted from its start on. Writes the reference's logprobs into the rollouts."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    optimizer.zero_grad()
    grpo.reference(model, rollouts, cfg, vocab)
    grpo.backward(model, rollouts, advantages, cfg, vocab)
    optimizer.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def model_flops(sizes: Sizes, config: Any) -> float:
    """6 for each matrix weight and token, and the attention: 2 products of T/2 x head_dim a head, 3 times as above."""
    tokens, (full, _) = sizes.sequences * sizes.tokens, plan.layer_kinds(config)
    attention = full * config.num_attention_heads * config.head_dim * 2 * sizes.tokens  # causal: half of 4 T d
    return tokens * (6 * plan.counts(config, 32)["matmul"] + 4 * attention)


def report(options: Options, config: Any, seconds: float, device: str) -> str:
    """The line of the result; on a card with its utilisation, and the peak of memory since the last phase began."""
    tokens, flops = options.sequences * options.tokens, model_flops(options, config)
    text = (
        f"training phase, {options.sequences} sequences x {options.tokens} tokens, "
        f"{'tiny model' if options.tiny else options.model} on {device}: {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s, "
        f"{flops / 1e12:.3g} model TFLOP"
    )
    if device == "cuda":
        text += (
            f", utilisation {flops / seconds / (options.peak_tflops * 1e12):.1%} of {options.peak_tflops:.0f} TFLOP/s, "
            f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB ({torch.cuda.get_device_name()})"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
