"""CAFT in RL (concept ablation fine-tuning, Casademunt et al. 2025, arXiv 2507.16795): train without the concept, use with it.

    h <- h - <h, d> d      at every position of the extraction layers, in rollouts and updates; not in the evaluation

A policy that cannot use the concept has to earn its reward without it. Its control is the same with a Gaussian d.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from arms.direction import VHack
from engine.model import edit_states
from engine.sampler import Sampler
from engine.torch_sampler import TorchSampler


def ablate(model: Any, sampler: Sampler, direction: VHack) -> list[RemovableHandle]:
    """Takes d out of the states of the direction's layers where they are read, in the trainer's model and in the sampler's, until
    the handles are removed. The sampler is a torch one: another engine's states can't be reached."""
    assert isinstance(sampler, TorchSampler)  # config.check

    def without(h: Tensor) -> Tensor:
        d = direction.d.to(h)
        return h - (h @ d)[..., None] * d

    return [handle for m in (model, sampler.model) for handle in edit_states(m, direction.layers, without)]
