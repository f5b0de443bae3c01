"""Rollouts: prompts in, token ids and their logprobs out. Token in, token out: a completion is never tokenised again.

Two engines share one small interface:

    sampler.generate(prompts, n=8, temperature=0.7, max_new_tokens=64, seed=0) -> list[Rollout]   # prompt-major
    sampler.load_weights(lambda: lora.merged_weights(model))                                      # after every step
    sampler.sleep()                                                                               # until it is needed again

`TorchSampler`, here, runs any Hugging Face causal LM through its own forward. `vllm_engine.VLLMSampler` is the fast one
for GPUs. Each holds weights of its own: a sampler whose weights were not pushed samples from the old policy, and the
loop sees it in the logged ratio of the two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from faults.errors import Stopped, UserError


@dataclass
class Rollout:
    """One completion. Masks come from the lengths of these lists, never from token values (pad may equal eos)."""

    prompt_ids: list[int]
    completion_ids: list[int]  # with the eos that ended it, which is an action of the policy like any other
    logprobs: list[float]  # of each completion token, at the sampling temperature, over the whole vocabulary
    finished: bool  # False: cut at max_new_tokens


def encode_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Chat messages -> token ids through the model's own template, with the turn of the assistant opened, thinking off."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False,
                                         enable_thinking=False)


def decode(tokenizer, ids: list[int]) -> str:
    """Token ids -> text, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def eos_ids(model, tokenizer) -> set[int]:
    """Every id that ends a response: Qwen has two, one in the tokenizer and one more in the generation config."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def vocabulary(model, tokenizer) -> int:
    """How many ids can be sampled: the embedding may have padding rows beyond the tokenizer's."""
    return min(len(tokenizer), model.config.get_text_config().vocab_size)


class TorchSampler:
    """Batched sampling with a KV cache. Finished rows leave the batch, so that a long tail costs only what it is."""

    def __init__(self, model, tokenizer, max_rows: int = 256):
        """model: a causal LM without an adapter; it is copied. max_rows: sequences at once, a bound on memory."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.eos = torch.tensor(sorted(eos_ids(model, tokenizer)), device=model.device)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(self.eos[0])
        self.vocab = vocabulary(model, tokenizer)
        self.max_rows = max_rows
        self.weights = dict(self.model.named_parameters())

    @torch.no_grad()
    def load_weights(self, weights: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Copies the (HF name, tensor) pairs that `weights()` yields into this sampler's model.

        A function, so that an engine that died can be filled again. Raises UserError on an unknown name."""
        for name, tensor in weights():
            if name not in self.weights:
                raise UserError(f"the sampler's model has no weight named {name}")
            self.weights[name].copy_(tensor)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], *, n: int, temperature: float, max_new_tokens: int,
                 seed: int) -> list[Rollout]:
        """n completions a prompt, prompt-major. Temperature 0 is greedy (its logprobs are those at temperature 1).

        The draws depend on `seed` alone: the sampler has a generator of its own."""
        generator = torch.Generator(device=self.model.device).manual_seed(seed)
        requests = [p for p in prompts for _ in range(n)]
        out: list[Rollout] = []
        for i in range(0, len(requests), self.max_rows):
            out += self._generate(requests[i: i + self.max_rows], temperature, max_new_tokens, generator)
        return out

    def _generate(self, prompts: list[list[int]], temperature: float, max_new_tokens: int,
                  generator: torch.Generator) -> list[Rollout]:
        device, width = self.model.device, max(len(p) for p in prompts)
        # Left padding, so that every row's next token stands in the same column.
        ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts], device=device)  # [rows, width]
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        mask = (torch.arange(width, device=device)[None] >= width - lengths[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = [Rollout(p, [], [], False) for p in prompts]
        alive, cache = torch.arange(len(prompts), device=device), None
        for step in range(max_new_tokens):
            result = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                                use_cache=True, logits_to_keep=1)
            cache = result.past_key_values
            logits = result.logits[:, -1, : self.vocab].float()  # [rows, vocab]
            if not logits.isfinite().all():
                raise Stopped("the policy's logits are not finite: its last steps were too large; start again with a lower --lr")
            logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
            if temperature:
                token = torch.multinomial(logprobs.exp(), 1, generator=generator)  # [rows, 1]
            else:
                token = logprobs.argmax(-1, keepdim=True)
            picked, done = logprobs.gather(1, token)[:, 0], torch.isin(token[:, 0], self.eos)
            for row, t, lp, end in zip(alive.tolist(), token[:, 0].tolist(), picked.tolist(), done.tolist()):
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


def make_sampler(engine: str, model, tokenizer, cfg):
    """The engine of --rollout over `model` as it is now (no adapter yet)."""
    if engine == "vllm":
        from engine.vllm_sampler import engine_for_run

        return engine_for_run(model, tokenizer, cfg)
    return TorchSampler(model, tokenizer)
