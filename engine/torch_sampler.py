"""The sampler that works everywhere: batched sampling through the model's own forward, with a KV cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from engine.model import eos_ids, vocabulary
from engine.sampler import Rollout, Stop, Weights
from faults.errors import Stopped, UserError


class TorchSampler:
    """Batched sampling with a KV cache. A row is a history, of all completions that have it so far: a prompt is read once, and
    two of its completions are two rows only from where they differ. Finished ones leave: a long tail costs only what it is."""

    def __init__(self, model: Any, tokenizer: Any, max_rows: int = 256, copied: bool = True, stop: Stop | None = None):
        """model: a causal LM without an adapter, which is copied; or, with copied False, any, which is sampled from as it is and
        takes no weights. max_rows: sequences at once, a bound on memory. stop: what ends a completion beside its end token."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False) if copied else model
        self.eos = torch.tensor(sorted(eos_ids(model, tokenizer)), device=model.device)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(self.eos[0])
        self.vocab = vocabulary(model, tokenizer)
        self.max_rows = max_rows
        self.stop = stop
        last = sorted(stop.last) if stop else []
        self.last_of_stop = torch.tensor(last, dtype=torch.int64, device=model.device)  # ids that a stop may end with
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
        self, prompts: list[list[int]], *, n: int, temperature: float, max_new_tokens: int, seed: int, version: int | None = None
    ) -> list[Rollout]:
        """n completions a prompt, prompt-major. Temperature 0 is greedy (its logprobs are those at temperature 1).

        The draws depend on `seed` alone: the sampler has a generator of its own. Raises Stopped on logits that are not finite
        (UserError where nothing was trained yet), and on weights that are not those of `version`."""
        if version is not None and version != self.version:
            raise Stopped(f"the sampler is stale: it holds weights {self.version}, the trainer is at {version}")
        generator = torch.Generator(device=self.model.device).manual_seed(seed)
        requests = [p for p in prompts for _ in range(n)]
        out: list[Rollout] = []
        training = self.model.training
        self.model.eval()  # a model that recomputes its layers keeps no cache in training mode
        try:
            for i in range(0, len(requests), self.max_rows):
                out += self._generate(requests[i : i + self.max_rows], temperature, max_new_tokens, generator)
        finally:
            self.model.train(training)
        return out

    def _generate(
        self, prompts: list[list[int]], temperature: float, max_new_tokens: int, generator: torch.Generator
    ) -> list[Rollout]:
        device = self.model.device
        distinct = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
        width = max(map(len, distinct))
        # Left padding, so that every row's next token stands in the same column.
        ids = torch.tensor([[self.pad] * (width - len(p)) + list(p) for p in distinct], device=device)  # [rows, width]
        lengths = torch.tensor([len(p) for p in distinct], device=device)
        mask = (torch.arange(width, device=device)[None] >= width - lengths[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        alive = torch.arange(len(prompts), device=device)  # [alive] completions that go on
        row = torch.tensor([distinct[tuple(p)] for p in prompts], device=device)  # [alive] where their history stands

        steps: list[tuple[Tensor, ...]] = []  # (completion, token, logprob, the same at temperature 1), [alive] each
        for _ in range(max_new_tokens):
            logits = self._logits(ids, mask, positions, cache)  # [rows, vocab]
            logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
            token = drawn(logprobs, row, generator) if temperature else logprobs.argmax(-1)[row]  # [alive]
            steps.append((alive, token, logprobs[row, token], logits[row, token] - logits.logsumexp(-1)[row]))
            goes_on = torch.isin(token, self.eos, invert=True)
            if self.stop:
                goes_on &= ~self._stopped(steps, self.stop)
            alive, row, token = alive[goes_on], row[goes_on], token[goes_on]
            if not len(alive):
                break
            histories, row = (row * self.vocab + token).unique(return_inverse=True)  # the new rows
            before, ids = histories // self.vocab, (histories % self.vocab)[:, None]
            if not torch.equal(before, torch.arange(len(mask), device=device)):
                cache.reorder_cache(before)  # works on attention and linear-attention caches alike
            mask, positions = torch.cat([mask[before], torch.ones_like(ids)], 1), positions[before, -1:] + 1
        return self._rollouts(prompts, steps)

    def _stopped(self, steps: list[tuple[Tensor, ...]], stop: Stop) -> Tensor:
        """Whether the stop stands in each completion of the last step [alive], whose tokens so far are in `steps`."""
        alive, token = steps[-1][:2]
        found = torch.isin(token, self.last_of_stop)  # [alive] what may have completed it
        for place in found.nonzero()[:, 0].tolist():
            tail = [int(t[a == alive[place]]) for a, t, *_ in steps[-stop.TAIL :]]  # a completion that goes on was in every step
            found[place] = stop.ends(tail)
        return found

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [rows, vocab] of the next token after ids [rows, new], float32; the cache takes them in.

        The head is applied here, to the last states alone and as one product: of the slice that a model's own forward takes of a
        prompt's states, oneDNN makes a product a row, each with a copy of the head."""
        out = self.model.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return self.model.lm_head(out.last_hidden_state[:, -1])[:, : self.vocab].float()

    def _rollouts(self, prompts: list[list[int]], steps: list[tuple[Tensor, ...]]) -> list[Rollout]:
        """What was drawn, read back from the device once, row by row."""
        row, token, logprob, at_1 = (torch.cat(column) for column in zip(*steps, strict=True))  # [tokens] each
        if not logprob.isfinite().all():
            if not self.version:
                raise UserError("the model's logits are not finite before any step: its weights are damaged")
            raise Stopped("the policy's logits are not finite: its last steps were too large; start again with a lower --lr")
        out, ends = [Rollout(p, [], [], False) for p in prompts], set(self.eos.tolist())
        for r, t, lp, lp_1 in zip(*(column.tolist() for column in (row, token, logprob, at_1)), strict=True):
            out[r].completion_ids.append(t)
            out[r].logprobs.append(lp)
            out[r].logprobs_at_1.append(lp_1)
            out[r].finished = t in ends
        if self.stop:
            for rollout in out:
                rollout.finished |= self.stop.ends(rollout.completion_ids)
        return out

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
