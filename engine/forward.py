"""One way through the model: sequences of any lengths in, hidden states or log-probabilities at chosen tokens out.

Padding is on the right, under a causal mask: no real token ever attends to it, so no attention mask is needed, and the padding
id is any. What is a completion comes from lengths, never from token values (pad may equal eos).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.logprob import micro_batches, token_logprobs


class Batch:
    """Sequences of token ids, padded, with the tokens from `starts[i]` on marked as those that are asked about."""

    def __init__(self, sequences: Sequence[list[int]], starts: Sequence[int], device: torch.device | str):
        width = max(map(len, sequences))
        self.ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)  # [rows, width]
        where = [(row, t) for row, (s, start) in enumerate(zip(sequences, starts, strict=True)) for t in range(start, len(s))]
        self.row, self.column = torch.tensor(where, device=device).T  # [tokens] each: where the asked tokens stand

    def hidden(self, model: Any) -> Tensor:
        """The last hidden states that predict the asked tokens, those one place before them: [tokens, hidden]."""
        return model.model(input_ids=self.ids, use_cache=False).last_hidden_state[self.row, self.column - 1]

    def logprobs(self, model: Any, temperature: float, vocab: int) -> Tensor:
        """log p of the asked tokens, [tokens], float32, over the first `vocab` ids: padding rows of the embedding get no mass."""
        targets = self.ids[self.row, self.column]  # [tokens]
        return token_logprobs(self.hidden(model), model.lm_head.weight, targets, temperature, vocab=vocab)


def last_hidden(model: Any, sequences: list[list[int]], max_tokens: int = 8192) -> Tensor:
    """Hidden states at each sequence's last token: [n, layers + 1, hidden], float32, differentiable if grad is on."""
    out: list[Tensor] = [torch.empty(0)] * len(sequences)
    for group in micro_batches([len(s) for s in sequences], max_tokens):
        batch = Batch([sequences[i] for i in group], [len(sequences[i]) - 1 for i in group], model.device)
        states = model.model(input_ids=batch.ids, output_hidden_states=True, use_cache=False).hidden_states
        for i, row, column in zip(group, batch.row.tolist(), batch.column.tolist(), strict=True):
            out[i] = torch.stack([h[row, column] for h in states]).float()
    return torch.stack(out)
