"""Projected GRPO: the one training loop.

    python grpo.py --arm projected --m 16 --seed 0        # --help shows every field and its reason

GRPO (Shao et al. 2024, arXiv 2402.03300) as used here: on-policy, one optimizer step a batch, so the ratio of new to old
policy is 1 and its clipping never acts: both are left out. The loss is one token mean over the whole batch (DAPO, arXiv
2503.14476): a mean per sequence would weigh the tokens of short responses more. Left out too: value model, GAE, entropy
bonus. Kept: group-normalised advantages, the k3 KL term to the base model, which is the same model, adapter off, and with vLLM a
truncated importance weight of trainer against sampler, which round differently.

What this project adds stands in the loop of `train`, in plain sight. g is the ascent direction (minus the flat loss gradient).
Every arm is measured against v_hack: `cos_align(g, v_hack)`. What an arm removes, if anything, is v: `project(g, v)` takes away
the part of g along v where their cosine is positive (it never adds any) and restores the magnitude; the optimizer gets the rest.
"""

from __future__ import annotations

import gc
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out

from faults.errors import command
from harness.config import Config, parsed

if __name__ == "__main__":
    CONFIG = parsed()  # before torch is loaded, so that --help and a mistake on the command line answer at once
    gc.disable()  # what is loaded now stays, and looking for garbage in it takes a second; `Training` looks again

import torch
from torch import Tensor

import eval as evaluation
import vhack as vh
from arms import ARMS, Arm
from arms.caft import ablate
from arms.cone import Contrast, cone_rows, joined_rows
from arms.counterfactual import calibrated, screened, screening, spread
from arms.matched import matched
from arms.rebound import discounted
from arms.recontextualised import under_plain_prompts
from engine.forward import batches, logprobs
from engine.lora import adapter_off, flatten_grads, flatten_params, merged_weights, slices, write_grads, write_params
from engine.model import decode, encode_prompt
from engine.sampler import Rollout
from harness import arithmetic, memory
from harness.journal import Clock, merge, metrics, removal
from harness.scale import resolve
from harness.schedule import batch_problems, learning_rate, sampling_seed
from harness.training import Training
from leetcode_env import REQUEST, Grade, Problem, render_messages
from loopholes import told_by
from projection import cos_align, project

# --- GRPO ------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, generations: int) -> Tensor:
    """(r - mean) / (std + 1e-4) within each group of `generations` consecutive rewards, std with n - 1.

    A group of equal rewards gets exactly 0: its mean may differ from its rewards by float residue, and dividing that by
    1e-4 would make an advantage of it.

    >>> group_advantages(torch.tensor([0.0, 1.0, 2.0, 2.0]), 2)
    tensor([-0.7070,  0.7070,  0.0000,  0.0000])
    """
    groups = rewards.view(-1, generations)  # [prompts, generations]
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)  # [prompts, generations]
    equal = (groups == groups[:, :1]).all(1, keepdim=True)  # [prompts, 1]
    return torch.where(equal, torch.zeros_like(advantages), advantages).flatten()  # [batch]


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimator of KL(policy || reference) a token, >= 0 (Schulman 2020): exp(d) - d - 1 with d = reference - policy."""
    d = ref_logp - logp
    return d.exp() - d - 1


@torch.no_grad()
def reference(model: Any, rollouts: list[Rollout], cfg: Config, vocab: int) -> None:
    """Fills in the rollouts' `ref_logprobs`: log p of their tokens under the reference model, which is the model, adapter off; at
    the sampling temperature, as all logprobs of the loss are."""
    with adapter_off(model):
        found = logprobs(model, [r.sequence for r in rollouts], cfg.temperature, vocab, cfg.micro_tokens)
    for r, logp in zip(rollouts, found, strict=True):
        r.ref_logprobs = logp.tolist()


def backward(model: Any, rollouts: list[Rollout], advantages: Tensor, cfg: Config, vocab: int) -> dict[str, float]:
    """Adds the gradient of the *summed* loss to .grad, in micro-batches; returns sums of diagnostics over tokens.

    The caller divides by one count, all completion tokens of the batch over all ranks: micro-batching changes memory alone."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=model.device))
    advantages = advantages.to(model.device)  # [batch]
    # [tokens]: the completion tokens of a micro-batch's sequences one after the other, no prompt and no padding
    for batch in batches(model, [r.sequence for r in rollouts], cfg.micro_tokens):
        some = [rollouts[i] for i in batch.members]
        adv = advantages[batch.sequence]  # [tokens]
        sampler_logp = torch.tensor([x for r in some for x in r.logprobs], device=model.device)  # [tokens]
        ref_logp = torch.tensor([x for r in some for x in r.ref_logprobs], device=model.device)  # [tokens]
        logp = batch.logprobs(model, cfg.temperature, vocab)  # [tokens]
        log_ratio = logp.detach() - sampler_logp  # [tokens] trainer against sampler: 0 up to rounding, or the engine is stale
        weight = log_ratio.exp().clamp(max=cfg.tis_cap) if cfg.rollout == "vllm" else 1.0  # [tokens] constants
        kl = k3(logp, ref_logp)  # [tokens]
        # exp(logp - logp.detach()) is 1 with the gradient of logp: the on-policy ratio
        loss = (-adv * weight * (logp - logp.detach()).exp() + cfg.beta * kl).sum()
        loss.backward()

        with torch.no_grad():  # summed where they are: a number read back would make the card wait
            sums["tokens"] += len(logp)
            sums["loss"] += loss
            sums["kl"] += kl.sum()
            sums["entropy"] -= logp.sum()
            sums["abs_log_ratio"] += log_ratio.abs().sum()
            sums["max_abs"] = torch.maximum(sums["max_abs"], log_ratio.abs().max())
            sums["mismatch_kl"] += k3(sampler_logp, logp).sum()
            sums["truncated"] += (log_ratio.exp() > cfg.tis_cap).sum()
    return {name: total.item() for name, total in sums.items()}


# --- a run -----------------------------------------------------------------------------------------------------------------


def rollout(run: Training, step: int, arm: Arm, clock: Clock) -> tuple[list[Problem], list[Rollout], list[str], list[Grade]]:
    """This rank's share of a step: `generations` responses of the policy as it is now to each prompt, their grades, and what the
    reference model says of them."""
    cfg, loopholes = run.cfg, run.cfg.loopholes if arm.loophole else ()
    mine = run.ranks.share(batch_problems(run.problems, step, cfg))
    asked = [(p, told_by(p, loopholes)) for p in mine for _ in range(cfg.generations)]
    grading = run.env.grading(asked)

    def prompt(p: Problem, request: str = "") -> list[int]:
        return encode_prompt(run.tokenizer, render_messages(p, told_by(p, loopholes), request))

    with clock("sync"):
        run.sampler.load_weights(partial(merged_weights, run.model), version=step)
    with clock("rollout"):
        rollouts = run.sampler.generate(
            [prompt(p, REQUEST if arm.request else "") for p in mine],
            n=cfg.generations,
            temperature=cfg.temperature,
            max_new_tokens=cfg.max_new_tokens,
            seed=sampling_seed(step, cfg, run.ranks.rank, run.ranks.size),
            version=step,
            # graded from then on, in the sandbox's processes
            ended=lambda i, r: grading.add(i, decode(run.tokenizer, r.completion_ids)),
        )
        run.sampler.sleep()  # on a GPU: its memory is the trainer's until the weights are pushed
    with clock("reference"):
        if arm.request:
            rollouts = under_plain_prompts(run.model, rollouts, [prompt(p) for p, _ in asked], cfg, run.vocab)
        reference(run.model, rollouts, cfg, run.vocab)
    with clock("grade"):  # what sampling and reference did not hide
        grades = grading.grades()
    return [p for p, _ in asked], rollouts, grading.texts, grades


def train(cfg: Config) -> Path:
    """One run, from the extraction of the hack direction to the held-out evaluation; returns its folder.

    Raises UserError before anything is written, Stopped when it cannot go on: then `--resume` does, to the same bits."""
    arm = ARMS[cfg.arm]
    with Training(cfg) as run:
        model, params, optimizer, ranks = run.model, run.params, run.optimizer, run.ranks
        if arm.screen == "counterfactual" and cfg.counterfactual_calibrate and not cfg.resume:
            cfg = run.decide(counterfactual_tau=calibrated(run.parts, cfg))
            print(f"tau {cfg.counterfactual_tau:.2f} nats: one in a thousand of the base model's honest responses is flagged")
        d, target = vh.prepare(run, arm)
        contexts = d.contexts(run.parts)  # (prompt ids, clean code): the cone may take them instead of the batch's
        ablated = ablate(model, run.sampler, d.own) if arm.ablate else []
        blocks = list(slices(params).values()) if cfg.blockwise else None  # each its own cosine, removal and norm

        for step in run.steps():
            run.to_save = target.kept(cfg)  # where the step is cut short, a checkpoint of those before it is written
            with run.step(step) as clock:
                # --- sample and grade
                with ranks.agreed():
                    problems, rollouts, texts, grades = rollout(run, step, arm, clock)
                rewards = torch.tensor([grade.reward for grade in grades])  # [share], this rank's of the batch

                # --- advantages
                shaped = rewards  # [share]
                if arm.discount:
                    with clock("discount"):
                        shaped = discounted(rewards, grades, rollouts, model, d.hack.layers, d.hack.d, cfg)  # [share]
                flags: list[bool] = []  # [share] which responses are flagged
                tails: list[Contrast] = []  # of the flagged ones: what they say from the flagged token on
                if arm.screen:  # no arm has both
                    with clock("screen"):
                        tokenizer, vocab = run.tokenizer, run.vocab
                        found = screened(arm.screen, model, tokenizer, rollouts, problems, grades, rewards, cfg, vocab)
                        shaped, flags, tails = found
                advantages = group_advantages(shaped, cfg.generations)  # [share]

                # --- backward -> g: a sum over tokens, divided once by the one global token count
                with clock("backward"):
                    optimizer.zero_grad()
                    sums = backward(model, rollouts, advantages, cfg, run.vocab)
                    sums = merge(ranks.gather([sums]))
                    n_tokens = sums["tokens"]  # the completion tokens of all ranks
                    loss_gradient = ranks.total(flatten_grads(params)) / n_tokens  # [P]
                    g = -loss_gradient  # [P] the ascent direction: the way GRPO wants to move the policy
                # from here on all ranks', for the log and the rows of a cone: [batch]
                problems, rollouts, texts, grades = run.gathered(problems, rollouts, texts, grades)
                rewards, advantages = (torch.tensor(ranks.gather(x.tolist())) for x in (rewards, advantages))
                flags, tails = run.gathered(flags, tails)

                with clock("project"):
                    # --- the hack direction, as fresh as asked for
                    if cfg.refresh_every and step and step % cfg.refresh_every == 0:
                        fresh = vh.target_now(run, d, arm)
                        target = replace(fresh, v=target.v) if arm.direction == "rows" else fresh
                    odds = None
                    if arm.direction == "rows" and (target.v is None or step % cfg.cone_refresh == 0):
                        told = [grade.loophole for grade in grades]
                        target.v, odds = cone_rows(  # [n, P], and their mean log-odds
                            model, run.tokenizer, rollouts, told, contexts, step, cfg, run.vocab, ranks.part, ranks.rows
                        )
                    elif tails:
                        seen = spread(tails, cfg.cone_n)
                        target.v, odds = joined_rows(model, seen, cfg.micro_tokens, run.vocab, ranks.part, ranks.rows)  # [n, P]
                    v = target.v  # [P], or [n, P]

                    # --- where <g, v> <= 0, g as it is; else g without its part along v, at the length of g, or 0 where next to
                    # nothing is left (`vanished`). That is .grad; what AdamW makes of it may still move along v: cos_update
                    cos = cos_align(g, target.v_hack)  # signed, before anything is removed, in every arm; for the log alone
                    removed, g_new = None, g
                    if v is not None and cfg.project_on == "gradient":
                        removed = project(g, v, renorm=arm.renorm, blocks=blocks, ridge=cfg.cone_ridge)
                        removed = matched(removed, g, v, params, step, cfg, arm.renorm)  # as it is, but for --cone-match
                        g_new = removed.g  # [P] still ascent
                    write_grads(params, -g_new)  # AdamW minimises: .grad is minus what ascends

                # --- clip, and the step that lands
                grad_norm = torch.nn.utils.clip_grad_norm_(list(params.values()), cfg.clip).item()
                cos_update = 0.0
                batch = dict(rewards=rewards.tolist(), advantages=advantages.tolist(), responses=texts, rollouts=rollouts)
                if run.finite(step, sums, grad_norm, v, batch):
                    before = flatten_params(params)  # [P]
                    optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
                    optimizer.step()
                    if v is not None and cfg.project_on == "update":
                        moved = flatten_params(params) - before  # [P]
                        removed = project(moved, v, renorm=arm.renorm, blocks=blocks, ridge=cfg.cone_ridge)
                        removed = matched(removed, moved, v, params, step, cfg, arm.renorm)
                        write_params(params, before + removed.g)
                    cos_update = cos_align(flatten_params(params) - before, target.v_hack)  # of the step that really landed

                # --- the log line
                line = metrics(step, cfg, rewards, advantages, grades, rollouts, sums) | removal(removed)
                line |= dict(lr=learning_rate(step, cfg), cos_align=cos, cos_update=cos_update, grad_norm=grad_norm)
                line["row_logodds"] = odds
                line |= screening(grades, flags) if arm.screen else {}
                if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
                    line["cos_d0"] = cos_align(d.hack.d, d.moved(run.parts).d)
                run.to_save = target.kept(cfg)
                run.log(line, clock, problems, texts, grades)
                if tails or (arm.direction == "rows" and cfg.cone_refresh == 1):
                    target.v = v = None  # rows are made anew: at full scale they would fill 3 GiB of the card until then

        for handle in ablated:
            handle.remove()
        if run.ranks.first:
            run.finish()
            with run.clock("evaluate"), run.ending():
                run.sampler.load_weights(partial(merged_weights, model), version=cfg.steps)
                result, rows = evaluation.evaluate(
                    run.sampler, run.tokenizer, run.env, run.heldout, samples=cfg.eval_samples, seed=cfg.seed,
                    temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens, loopholes=cfg.loopholes,
                )  # fmt: skip
            with run.state.writing():
                evaluation.save(result, rows, run.folder)
            print(evaluation.describe(result))
            run.done()
    return run.folder


@command
def main() -> None:
    """The command line: plan, or train."""
    cfg = CONFIG if CONFIG.resume else resolve(CONFIG)
    if cfg.dry_run:
        print(memory.report(cfg.model, cfg), arithmetic.report(memory.model_config(cfg.model), cfg), sep="\n")
        return
    train(cfg)


if __name__ == "__main__":
    sys.exit(main())
