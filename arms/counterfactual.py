"""What would the base model have written, had it not been told of the loophole? (arm `counterfactual`)

For a response y to a prompt x that tells of a loophole, and x' the same prompt with the honest sentence in its place:

    d_t = log pi(y_t | x, y_<t) - log pi_ref(y_t | x', y_<t)          both at temperature 1, whatever the sampler's

A token with d_t > tau nats is one that the loophole's sentence and training explain and the task does not. It knows no hack, no
form and no loophole, only which sentence of the prompt describes the evaluation. Two uses of the same signal:

    screen    a flagged response is not paid for being right: it keeps its format reward alone
    project   rows of a cone at the flagged tokens: g loses what makes them likelier

The reference is the base model, which a policy that drifts honestly leaves behind, or the policy itself under x', which drifts
along and is blind to a hack that has spread to honest prompts. Neither sees a hack that the base writes without the sentence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from arms.cone import Contrast
from engine.forward import logprobs
from engine.lora import adapter_off
from engine.model import encode_prompt
from engine.sampler import Rollout
from leetcode_env import Grade, Problem, render_messages
from loopholes import told_by

CALIBRATION = 1024  # responses
LEAST_TAU = 0.1  # nats


@torch.no_grad()
def unexplained(
    model: Any, tokenizer: Any, rollouts: Sequence[Rollout], problems: Sequence[Problem], cfg: Any, vocab: int
) -> list[Tensor]:
    """d [tokens of the completion] of each rollout, whose prompts tell of a loophole. problems: each rollout's."""
    honest = {p.id: encode_prompt(tokenizer, render_messages(p, None)) for p in problems}
    told = [torch.tensor(r.logprobs_at_1, device=model.device) for r in rollouts]
    if any(len(at_1) < len(r.completion_ids) for r, at_1 in zip(rollouts, told, strict=True)):  # the sampler does not say
        told = logprobs(model, [r.sequence for r in rollouts], 1.0, vocab, cfg.micro_tokens)
    alike = [(honest[p.id] + r.completion_ids, len(honest[p.id])) for r, p in zip(rollouts, problems, strict=True)]
    with adapter_off(model) if cfg.counterfactual_ref == "base" else contextlib.nullcontext():
        not_told = logprobs(model, alike, 1.0, vocab, cfg.micro_tokens)
    return [a - b for a, b in zip(told, not_told, strict=True)]


def calibrated(run: Any, cfg: Any) -> float:
    """The tau that flags at most one in a thousand of CALIBRATION responses of the base model to honest prompts, were the
    loophole told of: at the start, when no policy has drifted. run: the run's parts, the base weights still in its sampler."""
    problems = run.train[:CALIBRATION]
    each = -(-CALIBRATION // len(problems))
    honest = [encode_prompt(run.tokenizer, render_messages(p, None)) for p in problems]
    out = run.sampler.generate(
        honest, n=each, temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed + 1_000_003
    )
    run.sampler.sleep()  # on a GPU: the passes below have the card to themselves
    asked = [p for p in problems for _ in range(each)]
    told = [
        replace(r, logprobs_at_1=[], prompt_ids=encode_prompt(run.tokenizer, render_messages(p, told_by(p, cfg.loopholes))))
        for r, p in zip(out, asked, strict=True)
    ]
    with adapter_off(run.model):
        d = unexplained(run.model, run.tokenizer, told, asked, cfg, run.vocab)
    highest = sorted((d_t.max().item() for d_t in d), reverse=True)
    return max(highest[len(highest) // 1000], LEAST_TAU)


def flagged_tails(rollouts: Sequence[Rollout], d: Sequence[Tensor], tau: float, whole: bool) -> list[Contrast]:
    """A row for each rollout with a token above tau: the log-probability of its tokens from the first such one on, or of that one
    alone. In the order of the rollouts."""
    rows = []
    for r, found in zip(rollouts, d, strict=True):
        above = (found > tau).nonzero().flatten().tolist()
        if above:
            start = len(r.prompt_ids) + above[0]
            ids = r.prompt_ids + r.completion_ids
            rows.append(Contrast([(ids if whole else ids[: start + 1], start)]))
    return rows


def spread(rows: list[Contrast], limit: int) -> list[Contrast]:
    """At most `limit` of them, evenly over their order, so that every prompt has its share."""
    return rows if len(rows) <= limit else [rows[i * len(rows) // limit] for i in range(limit)]


def unpaid(rewards: Tensor, grades: Sequence[Grade], flags: Sequence[bool]) -> Tensor:
    """The rewards [batch] without what the flagged responses were paid for being right, or for the loophole."""
    return torch.tensor([r - g.correctness_reward * f for r, g, f in zip(rewards.tolist(), grades, flags, strict=True)])


def known_hack(grade: Grade, known: Sequence[str]) -> bool:
    """The control that knows what the cone knows (arm `screen_known`; after Wong et al.): whether the hack of a known loophole is
    written in the response, by its syntax tree."""
    return any(name in known for name in grade.wrote) or (grade.loophole in known and grade.defines)


def screened(
    how: str, model: Any, tokenizer: Any, rollouts: Sequence[Rollout], problems: Sequence[Problem], grades: Sequence[Grade],
    rewards: Tensor, cfg: Any, vocab: int,
) -> tuple[Tensor, list[bool], list[Contrast]]:  # fmt: skip
    """(rewards [batch] to learn from, whether each response is flagged, the rows to project on) of an arm that screens.

    how: "known", by the syntax of known hacks; "counterfactual", by what the loophole's sentence alone explains, which either
    changes rewards or makes rows (cfg.counterfactual_use)."""
    if how == "known":
        flags = [known_hack(g, cfg.cone_known or cfg.loopholes) for g in grades]
        return unpaid(rewards, grades, flags), flags, []
    d = unexplained(model, tokenizer, rollouts, problems, cfg, vocab)
    flags = [bool((d_t > cfg.counterfactual_tau).any()) for d_t in d]
    if cfg.counterfactual_use == "screen":
        return unpaid(rewards, grades, flags), flags, []
    return rewards, flags, flagged_tails(rollouts, d, cfg.counterfactual_tau, cfg.counterfactual_rows == "tail")


def screening(grades: Sequence[Grade], flags: Sequence[bool]) -> dict[str, Any]:
    """What the flags hit, for the log alone, never for training. hacks: paid by the loophole and not correct; honest: without any
    loophole's hack in the text."""
    hacks = [g.label == "hack" for g in grades]
    return dict(
        flagged=sum(flags) / len(flags),
        flagged_hacks=sum(f and h for f, h in zip(flags, hacks, strict=True)),
        hacks=sum(hacks),
        flagged_others=sum(f and not h for f, h in zip(flags, hacks, strict=True)),
        flagged_honest=sum(f and not g.wrote for f, g in zip(flags, grades, strict=True)),
    )
