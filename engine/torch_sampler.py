"""The sampler that works everywhere: batched sampling through the model's own forward, with a KV cache."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from engine.model import eos_ids, vocabulary
from engine.sampler import Ended, Rollout, Stop, Weights, unheard
from faults.errors import Stopped, UserError


class TorchSampler:
    """Batched sampling with a KV cache. A row is a history, of all completions that have it so far: a prompt is read once, and
    two of its completions are two rows only from where they differ. Finished ones leave: a long tail costs only what it is."""

    def __init__(self, model: Any, tokenizer: Any, max_rows: int = 256, copied: bool = True, stop: Stop | None = None):
        """model: a causal LM without an adapter, which is copied; or, with copied False, any, which is sampled from as it is and
        takes no weights. max_rows: sequences at once, a bound on memory. stop: what ends a completion beside its end token."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False) if copied else model
        self.eos = eos_ids(model, tokenizer)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.eos)
        self.vocab = vocabulary(model, tokenizer)
        self.max_rows = max_rows
        self.stop = stop
        self.weights = dict(self.model.named_parameters())
        self.version: int | None = None

    @torch.no_grad()
    def load_weights(self, weights: Callable[[], Weights], version: int | None = None) -> None:
        """Copies the (HF name, tensor) pairs that `weights()` yields into this sampler's model.

        Raises UserError on an unknown name. version: their number, which `generate` can be asked to agree with."""
        for name, tensor in weights():
            if name not in self.weights:
                raise UserError(f"the sampler's model has no weight named {name}")
            self.weights[name].copy_(tensor)
        self.version = version

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], *, n: int, temperature: float, max_new_tokens: int, seed: int,
        version: int | None = None, ended: Ended = unheard,
    ) -> list[Rollout]:  # fmt: skip
        """n completions a prompt, prompt-major. Temperature 0 is greedy (its logprobs are those at temperature 1).

        The draws depend on `seed` alone: the sampler has a generator of its own. ended: called with each as it ends. Raises
        Stopped on logits that are not finite (UserError where nothing was trained yet), and on weights that are not those of
        `version`."""
        if version is not None and version != self.version:
            raise Stopped(f"the sampler is stale: it holds weights {self.version}, the trainer is at {version}")
        generator = torch.Generator(device=self.model.device).manual_seed(seed)
        out = [Rollout(p, [], [], False) for p in prompts for _ in range(n)]
        training = self.model.training
        self.model.eval()  # a model that recomputes its layers keeps no cache in training mode
        try:
            for i in range(0, len(out), self.max_rows):
                some = out[i : i + self.max_rows]
                for place in self._complete(some, temperature, max_new_tokens, generator):
                    ended(i + place, some[place])
        finally:
            self.model.train(training)
        return out

    def _complete(self, out: list[Rollout], temperature: float, max_new_tokens: int, generator: torch.Generator) -> Iterator[int]:
        """Completes them, and yields the place of each as it ends."""
        device = self.model.device
        distinct = {p: i for i, p in enumerate(dict.fromkeys(tuple(r.prompt_ids) for r in out))}
        width = max(map(len, distinct))
        # Left padding, so that every row's next token stands in the same column.
        ids = torch.tensor([[self.pad] * (width - len(p)) + list(p) for p in distinct], device=device)  # [rows, width]
        lengths = torch.tensor([len(p) for p in distinct], device=device)
        mask = (torch.arange(width, device=device)[None] >= width - lengths[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        alive = list(range(len(out)))  # [alive] the completions that go on
        row = torch.tensor([distinct[tuple(r.prompt_ids)] for r in out], device=device)  # [alive] where their history stands

        for _ in range(max_new_tokens):
            logits = self._logits(ids, mask, positions, cache)  # [rows, vocab]
            logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
            token = drawn(logprobs, row, generator) if temperature else logprobs.argmax(-1)[row]  # [alive]
            numbers = torch.stack([logprobs[row, token], logits[row, token] - logits.logsumexp(-1)[row]]).tolist()  # [2][alive]
            goes_on = []  # [alive]
            for place, t, logprob, at_1 in zip(alive, token.tolist(), *numbers, strict=True):
                self._take(out[place], t, logprob, at_1)
                goes_on.append(not out[place].finished)
                if out[place].finished:
                    yield place
            going = torch.tensor(goes_on, device=device)
            alive, row, token = list(itertools.compress(alive, goes_on)), row[going], token[going]
            if not alive:
                return
            histories, row = (row * self.vocab + token).unique(return_inverse=True)  # the new rows
            before, ids = histories // self.vocab, (histories % self.vocab)[:, None]
            if not torch.equal(before, torch.arange(len(mask), device=device)):
                cache.reorder_cache(before)  # works on attention and linear-attention caches alike
            mask, positions = torch.cat([mask[before], torch.ones_like(ids)], 1), positions[before, -1:] + 1
        yield from alive

    def _take(self, rollout: Rollout, token: int, logprob: float, at_1: float) -> None:
        """One more token of a completion, its log-probability, and the same at temperature 1."""
        if not math.isfinite(logprob):
            if not self.version:
                raise UserError("the model's logits are not finite before any step: its weights are damaged")
            raise Stopped("the policy's logits are not finite: its last steps were too large; start again with a lower --lr")
        rollout.completion_ids.append(token)
        rollout.logprobs.append(logprob)
        rollout.logprobs_at_1.append(at_1)
        rollout.finished = token in self.eos or (self.stop is not None and self.stop.ends(rollout.completion_ids))

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [rows, vocab] of the next token after ids [rows, new], float32; the cache takes them in.

        The head is applied here, to the last states alone and as one product: of the slice that a model's own forward takes of a
        prompt's states, oneDNN makes a product a row, each with a copy of the head."""
        out = self.model.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return self.model.lm_head(out.last_hidden_state[:, -1])[:, : self.vocab].float()

    def sleep(self) -> None:
        """Nothing to free for the training phase; vLLM's cache on a GPU is."""

    def close(self) -> None:
        """Nothing to release; engines with processes or GPU memory have something here."""


def drawn(logprobs: Tensor, row: Tensor, generator: torch.Generator) -> Tensor:
    """One token for each of row [n] from that row of logprobs [rows, vocab], by inversion: [n] int64. In float64, for the tails;
    one random number a token drawn, where `multinomial` takes one for every token of the vocabulary."""
    mass = logprobs.exp().cumsum(-1, dtype=torch.float64)[row]  # [n, vocab]
    u = torch.rand(len(row), 1, dtype=torch.float64, device=mass.device, generator=generator) * mass[:, -1:]  # [n, 1]
    return torch.searchsorted(mass, u, right=True)[:, 0].clamp_(max=mass.shape[-1] - 1)


class RoomyLayer(DynamicLayer):
    """A layer's keys and values in tensors with room for what is to come: a new token is written in place, where the library's
    own layer copies everything before it, at every token."""

    ROOM = 8  # tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes in [rows, heads, new, width] of each; returns all so far."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.roomy = [key_states[:, :, :0], value_states[:, :, :0]]
        end = start + key_states.shape[2]
        for i, new in enumerate((key_states, value_states)):
            if end > self.roomy[i].shape[2]:
                larger = new.new_empty(*new.shape[:2], end + self.ROOM, new.shape[3])
                larger[:, :, :start] = self.roomy[i][:, :, :start]
                self.roomy[i] = larger
            self.roomy[i][:, :, start:end] = new
        self.keys, self.values = (t[:, :, :end] for t in self.roomy)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows beam_idx [new rows], any of them more than once."""
        length = self.get_seq_length()
        self.roomy = [t.index_select(0, beam_idx) for t in self.roomy]
        self.keys, self.values = (t[:, :, :length] for t in self.roomy)
