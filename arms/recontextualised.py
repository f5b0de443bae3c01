"""Recontextualisation (Azarbal et al. 2025, arXiv 2512.19027): sample under a request not to game the evaluation, and learn
as if it had not been made.

What the policy writes under the request is mostly honest, and that is what it learns to write without. The published rule
corrects nothing for the change of prompt: advantages weigh the log-probabilities under the plain prompt as if it had sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.forward import logprobs
from engine.sampler import Rollout


@torch.no_grad()
def under_plain_prompts(
    model: Any, rollouts: Sequence[Rollout], plain: Sequence[list[int]], cfg: Any, vocab: int
) -> list[Rollout]:
    """The rollouts as those of other prompts: their `logprobs` become the policy's under these, at the sampling temperature.

    plain: the prompt ids of each."""
    moved = [Rollout(p, r.completion_ids, [], r.finished) for r, p in zip(rollouts, plain, strict=True)]
    found = logprobs(model, [r.sequence for r in moved], cfg.temperature, vocab, cfg.micro_tokens)
    for r, logp in zip(moved, found, strict=True):
        r.logprobs = logp.tolist()
    return moved
