"""Rebound (Wu & Tang 2026, arXiv 2604.01476), "Advantage Modification": the advantage-level baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.forward import last_hidden
from engine.sampler import Rollout
from leetcode_env import Grade


@torch.no_grad()
def concept_scores(model: Any, sequences: list[list[int]], layers: list[int], d: Tensor) -> Tensor:
    """s = <h, d> at the last token of each sequence, h averaged over the layers: [n]. d: [hidden], unit length."""
    return last_hidden(model, sequences)[:, layers].mean(1) @ d.to(model.device)


def discounted(
    rewards: Tensor, grades: list[Grade], rollouts: list[Rollout], model: Any, layers: list[int], d: Tensor, cfg: Any
) -> Tensor:
    """The rewards [batch] of the arm `rebound`, scored at the completions' last tokens."""
    scores = concept_scores(model, [r.prompt_ids + r.completion_ids for r in rollouts], layers, d).cpu()  # [batch]
    return rebound_rewards(rewards, torch.tensor([g.correctness_reward for g in grades]), scores, cfg)


def rebound_rewards(rewards: Tensor, correctness: Tensor, scores: Tensor, cfg: Any) -> Tensor:
    """Rebound's advantage modification: rewards [n] discounted by how hacky the response looks within its group.

    scores [n]: <h, d> at the completion's last token (the paper's place, the prompt's last token, is the same for a whole
    group). z = (s - mean) / max(std, 0.1); r (1 - alpha sigmoid(z) [z > 0]), or r - alpha max(z, 0)."""
    groups = scores.view(-1, cfg.generations)
    z = ((groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True).clamp(min=0.1)).flatten()
    whole = cfg.rebound_on == "reward"
    if cfg.rebound_form == "additive":
        discount = cfg.rebound_alpha * z.clamp(min=0) * (1.0 if whole else (correctness > 0))
    else:
        discount = (rewards if whole else correctness) * cfg.rebound_alpha * torch.sigmoid(z) * (z > 0)
    return rewards - discount
