"""Attention of one new token to those before it: what a sampler does at every token but the first.

Where heads share their keys and values (grouped queries: Ainslie et al. 2023, arXiv 2305.13245), transformers copies these for
every head before it calls PyTorch's attention with a mask: a copy of the whole cache, as many times as a group has heads, at each
layer and token. On a CPU that was most of sampling from SmolLM2. Here a group's heads are the rows of one product instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "one_query"  # what a model's config calls it


def one_query(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """(attention's output [rows, new, heads, width], None).

    query [rows, heads, new, width]; key, value [rows, groups, columns, width]; attention_mask [rows, 1, new, columns], True where
    a token is seen. More than one new token, and heads with keys of their own, go to PyTorch's attention as they would."""
    rows, heads, new, width = query.shape
    groups = key.shape[1]
    if new > 1 or groups == heads:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    q = query.view(rows, groups, heads // groups, width)
    scores = (q @ key.mT) * scaling  # [rows, groups, heads a group, columns]
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    return (scores.softmax(-1) @ value).view(rows, 1, heads, width), None


AttentionInterface.register(NAME, one_query)
AttentionMaskInterface.register(NAME, sdpa_mask)
