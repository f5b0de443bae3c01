"""How long a step takes by arithmetic, phase by phase, from shapes and a card's data sheet: a target, not a measurement."""

from __future__ import annotations

from typing import Any, NamedTuple

from harness.config import Config
from harness.memory import BF16, RECOMPUTED, cone_rows, counts, kv_bytes_per_token, layer_kinds


class Card(NamedTuple):
    """What a data sheet says."""

    name: str
    peak: float  # dense bf16 FLOP/s
    bandwidth: float  # bytes a second


H100 = Card("H100 SXM", 989e12, 3.35e12)
CARDS = (H100, Card("RTX PRO 6000 (Blackwell)", 500e12, 1.79e12))
REACHED, READ = 0.35, 0.6  # shares of the two that are assumed to be reached
PROMPT, COMPLETION = 300, 800  # tokens of a LeetCode sequence, on average
LAUNCH = 3e-3  # seconds of a decoding step beside its reads: sampling, scheduling
# Seconds: the sandbox on the machine's cores, as if it rested while others are sampled; merging and pushing the weights.
GRADING, PUSHING = 4.0, 1.0


def lengths(cfg: Config) -> tuple[int, int]:
    """Tokens of a prompt and of a completion: those averages, as far as the settings allow them."""
    return min(PROMPT, cfg.max_prompt), min(COMPLETION, cfg.max_new_tokens)


def step_seconds(config: Any, cfg: Config, card: Card = H100) -> dict[str, float]:
    """Seconds of one step of `cfg` on a card, by phase.

    A token costs two operations a matrix weight in a forward pass, and its attention; the backward once more, because the base's
    weights are frozen, and once more for the layers that are recomputed. Decoding reads every weight, and the keys and values
    so far, once a step; it ends with the longest completion."""
    full, _ = layer_kinds(config)
    prompt, completion = lengths(cfg)
    length, weights = prompt + completion, counts(config, cfg.lora_r)
    forward = 2 * weights["matmul"] + 2 * full * config.num_attention_heads * config.head_dim * length  # a token; causal
    passes = 2 + RECOMPUTED[cfg.recompute]  # forward, backward, and again
    rows = cone_rows(cfg) + cone_rows(cfg, split=False)  # sequences: the forms, and what is clean
    rate, fetched = REACHED * card.peak, READ * card.bandwidth
    read = weights["base"] * BF16 + cfg.batch * (prompt + completion / 2) * kv_bytes_per_token(config)
    seconds = dict(
        push=PUSHING,
        rollout=cfg.max_new_tokens * (read / fetched + LAUNCH) + cfg.batch * prompt * forward / rate,
        grade=GRADING,
        backward=cfg.batch * length * forward * (1 + passes) / rate,  # the reference model's pass too
        cone=rows * length * forward * passes / rate,
    )
    return {phase: value for phase, value in seconds.items() if value}


def report(config: Any, cfg: Config) -> str:
    """The lines of `--dry-run` on time, one a card."""
    batch = f"{cfg.batch} sequences of {sum(lengths(cfg)):,} tokens"
    lines = [f"a step by arithmetic, not measured; {batch}, --recompute {cfg.recompute}:"]
    for card in CARDS:
        seconds = step_seconds(config, cfg, card)
        total = sum(seconds.values())
        lines.append(
            f"{card.name} ({REACHED:.0%} of {card.peak / 1e12:.0f} TFLOP/s, {READ:.0%} of {card.bandwidth / 1e12:.2f} TB/s): "
            + ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
            + f", together {total:.1f} s; {cfg.steps} steps {total * cfg.steps / 3600:.1f} h"
        )
    return "\n".join(lines)
