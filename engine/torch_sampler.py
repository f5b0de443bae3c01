"""The sampler that works everywhere: batched sampling through the model's own forward, with a KV cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from engine.model import eos_ids, vocabulary
from engine.sampler import Rollout, Weights
from faults.errors import Stopped, UserError


class TorchSampler:
    """Batched sampling with a KV cache. Finished rows leave the batch, so that a long tail costs only what it is."""

    def __init__(self, model: Any, tokenizer: Any, max_rows: int = 256, copied: bool = True):
        """model: a causal LM without an adapter, which is copied; or, with copied False, any, which is sampled from as it is and
        takes no weights. max_rows: sequences at once, a bound on memory."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False) if copied else model
        self.eos = torch.tensor(sorted(eos_ids(model, tokenizer)), device=model.device)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(self.eos[0])
        self.vocab = vocabulary(model, tokenizer)
        self.max_rows = max_rows
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
        device, width = self.model.device, max(len(p) for p in prompts)
        # Left padding, so that every row's next token stands in the same column.
        ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts], device=device)  # [rows, width]
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        mask = (torch.arange(width, device=device)[None] >= width - lengths[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = [Rollout(p, [], [], False) for p in prompts]
        alive, cache = torch.arange(len(prompts), device=device), None
        for _ in range(max_new_tokens):
            result = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = result.past_key_values
            logits = result.logits[:, -1, : self.vocab].float()  # [rows, vocab]
            if not logits.isfinite().all():
                if not self.version:
                    raise UserError("the model's logits are not finite before any step: its weights are damaged")
                raise Stopped("the policy's logits are not finite: its last steps were too large; start again with a lower --lr")
            logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
            if temperature:
                token = torch.multinomial(logprobs.exp(), 1, generator=generator)  # [rows, 1]
            else:
                token = logprobs.argmax(-1, keepdim=True)
            picked, done = logprobs.gather(1, token)[:, 0], torch.isin(token[:, 0], self.eos)
            for row, t, lp, end in zip(alive.tolist(), token[:, 0].tolist(), picked.tolist(), done.tolist(), strict=True):
                out[row].completion_ids.append(t)
                out[row].logprobs.append(lp)
                out[row].finished = end
            if done.all():
                break
            ids, mask, positions = token, torch.cat([mask, torch.ones_like(mask[:, :1])], 1), positions[:, -1:] + 1
            if done.any():
                keep = (~done).nonzero()[:, 0]
                alive, ids, mask, positions = alive[keep], ids[keep], mask[keep], positions[keep]
                cache.reorder_cache(keep)  # works on attention and linear-attention caches alike
        return out

    def sleep(self) -> None:
        """Nothing to free for the training phase; vLLM's cache on a GPU is."""

    def close(self) -> None:
        """Nothing to release; engines with processes or GPU memory have something here."""
