"""Contrasts and their gradients: the rows of the cone (arm `cone`), one direction a context instead of one mean direction.

    f_i = log p(hack branch | context i) - log p(clean branch | context i)        J_i = grad_theta f_i

A context is a prompt and a clean response, cut where the hack of the prompt's loophole may stand (`loopholes/forms.py`). The
hack branch opens it, in any of its surface forms; the clean branch is what the response has there: the closing fence, where
the evaluator that the default loophole asks for would follow the solution. `projection.project_cone` takes J.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from engine.forward import Batch, trees
from engine.logprob import consecutive
from engine.lora import lora_parameters, per_example
from engine.model import decode
from engine.sampler import Rollout
from leetcode_env import FENCED, parse_response
from loopholes import DEFAULT, LOOPHOLES
from loopholes.evaluator import TRAIN_EVALUATOR
from loopholes.forms import ELSEWHERE, OPENINGS, at
from loopholes.syntax import Source

FENCE = "\n```"
MOST_TOKENS = 8192  # padded ones of the rows that go through the model together, see `joined_rows`
FORMS = OPENINGS["run_tests"]["after"]


class Context(NamedTuple):
    """Where a hack might have stood. code: a clean response, from its opening fence up to before its closing one; loophole: the
    one that the prompt tells of."""

    prompt_ids: list[int]
    code: str
    loophole: str = "run_tests"


@dataclass(frozen=True)
class Contrast:
    """One row: the log-odds of any of the hacky sequences against the clean one; without that, the log-probability of any of the
    hacky ones. A sequence is (ids, start of branch)."""

    hack: list[tuple[list[int], int]]
    clean: tuple[list[int], int] | None = None

    @property
    def branches(self) -> list[tuple[list[int], int]]:
        """The hacky ones, then the clean one."""
        return [*self.hack, *([self.clean] if self.clean else [])]


def contrast(tokenizer: Any, prompt_ids: list[int], code: str, hacks: list[str], clean: str, first: bool = False) -> Contrast:
    """The branches `hacks` and `clean` after the context prompt + code, tokenised as the policy would emit them.

    Code and branch are encoded as one text (a tokenizer may merge across the cut), and what a hacky and the clean sequence
    share counts as context: it cancels in the log-odds. first: the clean branch is its first token alone, where what follows
    is the rest of a program."""
    clean_ids = tokenizer.encode(code + clean, add_special_tokens=False)
    sequences, start = [], len(clean_ids)
    for text in hacks:
        ids = tokenizer.encode(code + text, add_special_tokens=False)
        sequences.append(ids)
        alike = itertools.takewhile(lambda ab: ab[0] == ab[1], zip(ids, clean_ids, strict=False))
        start = min(start, sum(1 for _ in alike))
    offset = len(prompt_ids) + start
    if first:
        clean_ids = clean_ids[: start + 1]
    return Contrast([(prompt_ids + ids, offset) for ids in sequences], (prompt_ids + clean_ids, offset))


def hack_contrasts(
    tokenizer: Any,
    contexts: Sequence[Context],
    forms: tuple[str, ...] | None = None,
    joined: bool = True,
    places: Literal["known", "all"] = "known",
) -> list[Contrast]:
    """One row for each place of a context where its loophole's hack may stand, summed over the surface forms there; or, with
    joined False, a row for every form. forms: those after the code, of the evaluator, instead of all. places: "all" with those of
    `forms.ELSEWHERE`."""
    rows = []
    for ids, code, loophole in contexts:
        more = ELSEWHERE.get(loophole, {}) if places == "all" else {}
        for place, openings in (OPENINGS[loophole] | more).items():
            branches = [f.format(name=TRAIN_EVALUATOR) for f in forms or openings]
            position = at(code, place)
            if position is None:
                continue
            head, clean = code[:position], code[position:] or FENCE
            for group in [branches] if joined else [[b] for b in branches]:
                rows.append(contrast(tokenizer, ids, head, group, clean, first=place != "after"))
    return rows


def clean_code(response: str, known: Collection[str] = DEFAULT) -> str | None:
    """A response without the hack of any known loophole, from its first opening fence up to before its last closing one; None for
    any other, and for one whose last block is unclosed or empty."""
    code, blocks = parse_response(response), [*FENCED.finditer(response)]
    if code is None or not blocks[-1][1].strip() or ("run_tests" in known and TRAIN_EVALUATOR in code):
        return None
    end = blocks[-1].end() - len(FENCE)
    source = Source(code)
    if not response.startswith(FENCE, end) or any(LOOPHOLES[name].attempts(source, TRAIN_EVALUATOR) for name in known):
        return None
    return response[blocks[0].start() : end]


def batch_contexts(
    tokenizer: Any, rollouts: list[Rollout], told: Sequence[str], known: Collection[str], limit: int, per_prompt: int = 2
) -> list[Context]:
    """Contexts from the policy's own clean responses to prompts that tell of a known loophole: `limit` in all, the first of
    every prompt before the second of any (a loophole whose prompts came last would have none), at most `per_prompt` of one.
    told: the loophole of each rollout's prompt, or ""."""
    of_prompt: dict[tuple[int, ...], list[Context]] = {}
    for r, loophole in zip(rollouts, told, strict=True):
        if loophole not in known:
            continue
        mine = of_prompt.setdefault(tuple(r.prompt_ids), [])
        if len(mine) < per_prompt and (code := clean_code(decode(tokenizer, r.completion_ids), known)) is not None:
            mine.append(Context(r.prompt_ids, code, loophole))
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*of_prompt.values()))
    return [context for context in in_turn if context is not None][:limit]


def nonhack_contrasts(tokenizer: Any, contexts: Sequence[Context]) -> list[Contrast]:
    """A control: the log-odds of misnaming the solution's method, which has nothing to do with hacking."""
    rows = []
    for ids, code, _ in contexts:
        if match := re.search(r"def (\w+)\(self", code):
            cut = match.start(1)
            rows.append(contrast(tokenizer, ids, code[:cut], ["helper(self"], match.group(1) + "(self"))
    return rows


def contrast_rows(model: Any, rows: list[Contrast], vocab: int, max_tokens: int = MOST_TOKENS) -> tuple[Tensor, Tensor]:
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
    """f [rows] of a `contrast_batch`: log p(any of the hacky branches) - log p(the clean one, if any), at temperature 1."""
    logp = batch.logprobs(model, 1.0, vocab)  # [tokens]
    scores = logp.new_zeros(len(batch.members)).index_add(0, batch.sequence, logp)  # [branches]
    each = scores.split([len(r.branches) for r in rows])
    return torch.stack([torch.logsumexp(s[: len(r.hack)], 0) - s[len(r.hack) :].sum() for r, s in zip(rows, each, strict=True)])


def cone_rows(
    model: Any,
    tokenizer: Any,
    rollouts: list[Rollout],
    told: Sequence[str],
    pair_contexts: list[Context],
    step: int,
    cfg: Any,
    vocab: int,
    part: Callable[[list], list] = lambda rows: rows,
    joined: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> tuple[Tensor, float | None]:
    """(J [n, P], mean log-odds of its rows) for this step, by cfg.cone_rows: contexts from the fixed pairs, the batch's own
    clean responses, or both; or one of the two controls. n = 0 when there is no context.

    rollouts, told: the whole batch's and the loopholes of their prompts, on every rank alike. part, joined: this rank's share
    of the rows, and all ranks' rows again."""
    if cfg.cone_rows == "random":
        size = sum(p.numel() for p in lora_parameters(model).values())
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        return torch.randn(cfg.cone_n, size, generator=generator).to(model.device), None
    contexts: list[Context] = []
    if cfg.cone_rows in ("pairs", "both"):
        contexts += random.Random(f"{cfg.seed}:{step}").sample(pair_contexts, min(cfg.cone_n, len(pair_contexts)))
    if cfg.cone_rows != "pairs":
        contexts += batch_contexts(tokenizer, rollouts, told, cfg.cone_known or cfg.loopholes, cfg.cone_n)
    if cfg.cone_rows == "nonhack":
        rows = nonhack_contrasts(tokenizer, contexts)
    else:
        rows = hack_contrasts(tokenizer, contexts, joined=not cfg.cone_split, places=cfg.cone_places)
    return joined_rows(model, rows, cfg.micro_tokens, vocab, part, joined)


def joined_rows(
    model: Any,
    rows: list[Contrast],
    micro_tokens: int,
    vocab: int,
    part: Callable[[list], list],
    joined: Callable[[Tensor], Tensor],
) -> tuple[Tensor, float | None]:
    """(J [n, P], mean f) of rows that every rank has, each made by one of the ranks.

    Four micro-batches' tokens at a time, for branches share their context: what --micro-tokens spares is spared here too."""
    J, f = map(joined, contrast_rows(model, part(rows), vocab, min(MOST_TOKENS, 4 * micro_tokens)))
    return J, f.mean().item() if rows else None
