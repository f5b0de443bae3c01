"""Contrasts and their gradients: the rows of the cone (arm `cone`), one direction a context instead of one mean direction.

    f_i = log p(hack branch | context i) - log p(clean branch | context i)        J_i = grad_theta f_i

A context is a prompt and a response cut before its closing fence. The clean branch is the fence; the hack branch opens a
definition of the evaluator, in any of its surface forms. `projection.project_cone` takes J.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.forward import Batch, trees
from engine.logprob import consecutive
from engine.lora import lora_parameters, per_example
from engine.model import decode
from engine.sampler import Rollout
from leetcode_env import parse_response
from loopholes.evaluator import TRAIN_EVALUATOR, defines_evaluator

FENCE = "\n```"

# How a definition of the evaluator may open, right after the solution's code. The cone closes only the forms that it
# is given: a policy that was shown the first one alone learned to write the second. A form ends with the name: what
# follows it, "(" or "():", is one token or another, and a branch that ends in the token that the policy does not use says
# nothing about the policy (seen: log-odds down to -17 while two responses in three hacked).
FORMS = ("\n\ndef {}", "\ndef {}", "\n\n    def {}", "\n    def {}")


@dataclass(frozen=True)
class Contrast:
    """One row: the log-odds of any of the hacky sequences against the clean one. A sequence is (ids, start of branch)."""

    hack: list[tuple[list[int], int]]
    clean: tuple[list[int], int]

    @property
    def branches(self) -> list[tuple[list[int], int]]:
        """The hacky ones, then the clean one."""
        return [*self.hack, self.clean]


def contrast(tokenizer: Any, prompt_ids: list[int], code: str, hacks: list[str], clean: str) -> Contrast:
    """The branches `hacks` and `clean` after the context prompt + code, tokenised as the policy would emit them.

    Code and branch are encoded as one text (a tokenizer may merge across the cut), and what a hacky and the clean sequence
    share counts as context: it cancels in the log-odds."""
    clean_ids = tokenizer.encode(code + clean, add_special_tokens=False)
    sequences, start = [], len(clean_ids)
    for text in hacks:
        ids = tokenizer.encode(code + text, add_special_tokens=False)
        sequences.append(ids)
        alike = itertools.takewhile(lambda ab: ab[0] == ab[1], zip(ids, clean_ids, strict=False))
        start = min(start, sum(1 for _ in alike))
    offset = len(prompt_ids) + start
    return Contrast([(prompt_ids + ids, offset) for ids in sequences], (prompt_ids + clean_ids, offset))


def hack_contrasts(
    tokenizer: Any, contexts: list[tuple[list[int], str]], forms: tuple[str, ...] = FORMS, joined: bool = True
) -> list[Contrast]:
    """Contexts (prompt ids, code before the closing fence) -> one row each, summed over the surface forms; or, with
    joined False, a row for every context and form."""
    branches = [f.format(TRAIN_EVALUATOR) for f in forms]
    groups = [branches] if joined else [[b] for b in branches]
    return [contrast(tokenizer, ids, code, group, FENCE) for ids, code in contexts for group in groups]


def clean_code(response: str, evaluator: str) -> str | None:
    """A response that does not define the evaluator, cut before its last closing fence; None for any other."""
    code = parse_response(response)
    start, end = response.find("```"), response.rfind(FENCE)
    if code is None or start < 0 or end <= start or defines_evaluator(code, evaluator) or f"{evaluator}" in code:
        return None
    return response[start:end]


def batch_contexts(tokenizer: Any, rollouts: list[Rollout], limit: int, per_prompt: int = 2) -> list[tuple[list[int], str]]:
    """Contexts from the policy's own responses that do not define the evaluator: `per_prompt` a prompt, `limit` in all."""
    taken: dict[tuple, int] = {}
    contexts: list[tuple[list[int], str]] = []
    for r in rollouts:
        key = tuple(r.prompt_ids)
        if len(contexts) == limit:
            break
        if taken.get(key, 0) == per_prompt:
            continue
        code = clean_code(decode(tokenizer, r.completion_ids), TRAIN_EVALUATOR)
        if code is not None:
            taken[key] = taken.get(key, 0) + 1
            contexts.append((r.prompt_ids, code))
    return contexts


def nonhack_contrasts(tokenizer: Any, contexts: list[tuple[list[int], str]]) -> list[Contrast]:
    """A control: the log-odds of misnaming the solution's method, which has nothing to do with hacking."""
    rows = []
    for ids, code in contexts:
        if match := re.search(r"def (\w+)\(self", code):
            cut = match.start(1)
            rows.append(contrast(tokenizer, ids, code[:cut], ["helper(self"], match.group(1) + "(self"))
    return rows


def contrast_rows(model: Any, rows: list[Contrast], vocab: int, max_tokens: int = 8192) -> tuple[Tensor, Tensor]:
    """(J [n, P], f [n]): gradients at the current parameters, not normalised, and the log-odds themselves.

    Many rows in one backward pass, of at most max_tokens padded tokens: `lora.per_example` keeps them apart."""
    size = sum(p.numel() for p in lora_parameters(model).values())
    J, f = torch.zeros(len(rows), size, device=model.device), torch.zeros(len(rows), device=model.device)
    lengths = [max(len(s) for s, _ in r.branches) * len(r.branches) for r in rows]
    for group in consecutive(lengths, max_tokens):
        some = [rows[i] for i in group]
        batch = contrast_batch(model, some)
        with per_example(model, batch.owner, J[group[0] : group[-1] + 1]):
            odds = log_odds(model, batch, some, vocab)  # [group]
            odds.sum().backward()
        f[group] = odds.detach()
    return J, f


def contrast_batch(model: Any, rows: list[Contrast]) -> Batch:
    """The branches of all rows, those of one row in a group, which shares its context."""
    sequences = [s for r in rows for s in r.branches]
    numbers = iter(range(len(sequences)))
    return Batch(sequences, trees(model, sequences, [[next(numbers) for _ in r.branches] for r in rows]), model.device)


def log_odds(model: Any, batch: Batch, rows: list[Contrast], vocab: int) -> Tensor:
    """f [rows] of a `contrast_batch`: log p(any of the hacky branches) - log p(the clean one), at temperature 1."""
    logp = batch.logprobs(model, 1.0, vocab)  # [tokens]
    scores = logp.new_zeros(len(batch.members)).index_add(0, batch.sequence, logp)  # [branches]
    each = scores.split([len(r.branches) for r in rows])
    return torch.stack([torch.logsumexp(s[:-1], 0) - s[-1] for s in each])


def cone_rows(
    model: Any,
    tokenizer: Any,
    rollouts: list[Rollout],
    pair_contexts: list[tuple[list[int], str]],
    step: int,
    cfg: Any,
    vocab: int,
    part: Callable[[list], list] = lambda rows: rows,
    joined: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> tuple[Tensor, float | None]:
    """(J [n, P], mean log-odds of its rows) for this step, by cfg.cone_rows: contexts from the fixed pairs, the batch's own
    clean responses, or both; or one of the two controls. n = 0 when there is no context.

    rollouts: the whole batch's, on every rank alike. part, joined: this rank's share of the rows, and all ranks' rows again."""
    if cfg.cone_rows == "random":
        size = sum(p.numel() for p in lora_parameters(model).values())
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        return torch.randn(cfg.cone_n, size, generator=generator).to(model.device), None
    contexts = []
    if cfg.cone_rows in ("pairs", "both"):
        contexts += random.Random(f"{cfg.seed}:{step}").sample(pair_contexts, min(cfg.cone_n, len(pair_contexts)))
    if cfg.cone_rows != "pairs":
        contexts += batch_contexts(tokenizer, rollouts, cfg.cone_n)
    if cfg.cone_rows == "nonhack":
        rows = nonhack_contrasts(tokenizer, contexts)
    else:
        rows = hack_contrasts(tokenizer, contexts, joined=not cfg.cone_split)
    J, odds = map(joined, contrast_rows(model, part(rows), vocab))
    return J, odds.mean().item() if rows else None
