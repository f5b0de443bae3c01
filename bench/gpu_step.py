"""The training phase of one full-scale step on one CUDA card: a random Qwen3.5-2B, 128 sequences x 1,536 tokens.

    python -m bench.gpu_step                 # prints seconds, peak memory and model-FLOP utilisation
    python -m bench.gpu_step --tiny          # the same code on a CPU with a tiny model: proves that it runs, measures nothing

It runs `grpo.backward` (reference logprobs with the adapter off, policy logprobs, backward in micro-batches) and one AdamW
step. Model FLOPs are those the mathematics needs: 2 for each matrix weight and token in the reference's forward, 2 in the
policy's, 2 in the backward (the weights are frozen: only the inputs' gradients); recomputation does not count.
"""

import argparse
import sys
import time

import torch

import grpo
from engine import lora
from engine.model import recompute_layers
from engine.sampler import Rollout
from harness import memory as plan
from harness.config import Config
from harness.scale import filled
from tests.support.models import tiny_config


def main() -> int:
    args = parse()
    if not args.tiny and not torch.cuda.is_available():
        print("bench.gpu_step needs a CUDA card: none is visible here (--tiny runs the same code on a CPU)")
        return 2
    device = "cpu" if args.tiny else "cuda"
    config = build_config(args)
    if not args.tiny:  # what a run takes on this card, where it is not given
        chosen = plan.fitted(filled(Config(model=args.model, micro_tokens=args.micro_tokens, recompute=args.recompute), "full"))
        args.micro_tokens, args.recompute = chosen.micro_tokens, chosen.recompute
    model = build_model(config, device, args.recompute)
    rollouts = make_rollouts(args, config.vocab_size)
    cfg = Config(micro_tokens=args.micro_tokens, rollout="vllm", max_new_tokens=args.tokens - args.prompt)
    optimizer = torch.optim.AdamW(lora.lora_parameters(model).values(), lr=7e-5)
    advantages = torch.randn(args.sequences, generator=torch.Generator().manual_seed(0))
    seconds = [training_phase(model, rollouts, advantages, cfg, optimizer, config.vocab_size) for _ in range(args.repeats)]
    print(report(args, config, min(seconds), device))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model on CPU: proves the code path")
    parser.add_argument("--model", default="Qwen/Qwen3.5-2B")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1536, help="of a sequence, prompt and completion")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--micro-tokens", type=int, help="default: what the memory plan chooses for this card")
    parser.add_argument("--recompute", choices=list(plan.RECOMPUTED), help="the same")
    parser.add_argument("--repeats", type=int, default=2, help="the best is reported: the first one warms up")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of the card; 989 is an H100 SXM's")
    args = parser.parse_args()
    if args.tiny:
        args.sequences, args.tokens, args.prompt, args.micro_tokens, args.recompute = 8, 48, 16, 96, "all"
    return args


def build_config(args):

    return tiny_config("qwen3_5_text", tie_word_embeddings=True) if args.tiny else plan.model_config(args.model)


def build_model(config, device: str, recompute: str = "all"):
    """Random weights at full shapes in bf16, the adapter in float32, checkpointing on."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    lora.inject(model, r=32, alpha=32, seed=0)
    recompute_layers(model, recompute)
    return model


def make_rollouts(args, vocab: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (args.sequences, args.tokens), generator=generator).tolist()
    # The sampler's logprobs only shape the importance weights: any finite numbers cost the same.
    return [Rollout(row[: args.prompt], row[args.prompt :], [-5.0] * (args.tokens - args.prompt), True) for row in ids]


def training_phase(model, rollouts, advantages, cfg, optimizer, vocab: int) -> float:
    """Seconds."""
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


def model_flops(args, config) -> float:
    """6 for each matrix weight and token, and the attention: 2 products of T/2 x head_dim a head, 3 times as above."""
    tokens, (full, _) = args.sequences * args.tokens, plan.layer_kinds(config)
    attention = full * config.num_attention_heads * config.head_dim * 2 * args.tokens  # causal: half of 4 T d
    return tokens * (6 * plan.counts(config, 32)["matmul"] + 4 * attention)


def report(args, config, seconds: float, device: str) -> str:
    tokens, flops = args.sequences * args.tokens, model_flops(args, config)
    text = (
        f"training phase, {args.sequences} sequences x {args.tokens} tokens, "
        f"{'tiny model' if args.tiny else args.model} on {device}: {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s, "
        f"{flops / 1e12:.3g} model TFLOP"
    )
    if device == "cuda":
        text += (
            f", utilisation {flops / seconds / (args.peak_tflops * 1e12):.1%} of {args.peak_tflops:.0f} TFLOP/s, "
            f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB ({torch.cuda.get_device_name()})"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
