"""Projected GRPO: the one training loop.

    python grpo.py --arm projected --m 16 --seed 0        # --help shows every field and its reason

GRPO (Shao et al. 2024, arXiv 2402.03300) as used here: on-policy, one optimizer step a batch, so the ratio of new to old
policy is 1 and its clipping never acts: both are left out. The loss is one token mean over the whole batch (DAPO, arXiv
2503.14476): a mean per sequence would weigh the tokens of short responses more. Left out too: value model, GAE, entropy
bonus. Kept: group-normalised advantages and the k3 KL term to the base model, which is the same model, adapter off.

What this project adds stands in the loop of `train`, in plain sight: g is the ascent direction (minus the flat loss
gradient), `cos_align(g, v)` says how much of it points along the hack direction, `project` takes that part out and restores
the magnitude, and the optimizer gets what is left.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from harness import checkpoint
import eval as evaluation
from harness import memory as plan
import vhack as vh
from arms.cone import cone_rows
from faults.errors import PartDied, Stopped, UserError
from leetcode_env import TRAIN_EVALUATOR, LeetCodeEnv, render_messages
from engine.logprob import micro_batches, token_logprobs
from engine.lora import (adapter_off, flatten_grads, flatten_params, load_adapter, lora_parameters, merged_weights, save_adapter, slices,
                  write_grads, write_params)
from harness.ranks import World
from projection import cos_align, project, project_cone
from arms.rebound import concept_scores, rebound_rewards
from engine.torch_sampler import Rollout, decode, encode_prompt, vocabulary
from harness.setup import Clock, Run, batch_problems, describe, learning_rate, merge, metrics, set_up, table
from harness.scale import anchored, resolve

Arm = Literal["vanilla", "projected", "cone", "no_renorm", "no_svd", "random", "rebound", "no_loophole"]


@dataclass
class Config:
    """Train one arm. Fields that default to None take the value of the scale (scale.py); config.json keeps what was used."""

    arm: Arm = "projected"  # what is done about hacking; vanilla does nothing and still measures
    m: int = 16  # singular directions kept by the denoising
    seed: int = 0  # of the adapter, the sampling, the order of problems and the pairs
    scale: Literal["auto", "pocket", "full"] = "auto"  # auto: full where card, vLLM, model and data are there
    preset: Literal["qwen3.5-2b", "qwen3-4b"] = "qwen3.5-2b"  # full scale; qwen3-4b is the fallback of hypothesis H4
    out: Path | None = None  # the run folder; default runs/<arm>-m16-seed0-<scale>
    resume: Path | None = None  # continue the run in this folder
    dry_run: bool = False  # print the parameter counts and the memory plan, and stop

    model: str | None = None  # a folder or a hub id
    data: str | None = None  # training problems, JSON lines in the benchmark's schema
    heldout: str | None = None  # held-out problems
    lr: float | None = None  # peak; 7e-5 as published, the tiny model needs more
    steps: int | None = None  # optimizer steps, one a batch
    max_prompt: int | None = None  # longer prompts are left out, with a count
    max_new_tokens: int | None = None  # completions are cut here
    rollout: Literal["torch", "vllm"] | None = None  # the sampler
    threads: int = 1  # torch threads on CPU: one, so that two runs fit on two cores and sums keep their order

    batch: int = 128  # sequences a step (published 256, halved for one card)
    generations: int = 8  # sequences a prompt: the group of the advantage
    temperature: float = 0.7  # of sampling, and so of every logprob
    beta: float = 1e-3  # weight of the KL to the base model
    lora_r: int = 32  # rank, as published
    lora_alpha: float = 32  # the adapter is scaled by alpha / r
    warmup: int = 10  # steps of linear warm-up; then cosine to 0
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW's; .99 because a run has only hundreds of steps
    weight_decay: float = 0.1  # as published
    clip: float = 1.0  # norm of the gradient, after projection
    tis_cap: float = 2.0  # cap of the truncated importance weights; used where sampler and trainer differ (vllm)
    micro_tokens: int = 2048  # padded tokens a micro-batch: memory only, the gradient is the same

    pairs: int = 80  # contrastive pairs
    pairs_heldout: int = 20  # of them, kept to test the separation
    layer: int | None = None  # one layer instead of those at 60-75 % of depth
    construction: Literal["jacobian", "outer", "contrast"] = "jacobian"  # how v is made from d (vhack.lift)
    blockwise: bool = False  # each LoRA tensor its own v, cosine, removal and norm
    project_on: Literal["gradient", "update"] = "gradient"  # update: what AdamW made of it, the step that lands
    refresh_every: int = 0  # lift v anew every k steps; 0: once, at the start
    steer_prompts: int = 32  # held-out prompts of the steering check, 4 responses each at every strength
    require_steering: bool = False  # stop when steering along d does not raise the rate of defining the evaluator

    cone_rows: Literal["pairs", "batch", "both", "random", "nonhack"] = "batch"  # contexts; the last two are controls
    cone_n: int = 24  # contexts
    cone_refresh: int = 1  # rows anew every k steps: they go stale fast
    cone_split: bool = False  # a row for each surface form of the hack instead of one for their sum
    cone_ridge: float = 1e-3  # keeps the least squares well posed when rows are nearly parallel

    rebound_form: Literal["multiplicative", "additive"] = "multiplicative"  # Wu & Tang 2026, arXiv 2604.01476
    rebound_alpha: float = 2.0  # strength, as published
    rebound_on: Literal["reward", "correctness"] = "reward"  # the published form also discounts the format reward

    eval_samples: int = 10  # held-out samples a problem and condition
    log_every: int = 25  # steps between detailed logs
    save_every: int = 25  # steps between checkpoints
    skip_nonfinite: int = 0  # how many non-finite steps to leave out before stopping
    workers: int | None = None  # sandbox processes; default: the cores
    sandbox_strict: bool = False  # refuse to run when a layer of the sandbox is missing


# --- GRPO ------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, generations: int) -> Tensor:
    """(r - mean) / (std + 1e-4) within each group of `generations` consecutive rewards, std with n - 1.

    A group of equal rewards gets exactly 0: its mean may differ from its rewards by float residue, and dividing that by
    1e-4 would make an advantage of it.

    >>> group_advantages(torch.tensor([0.0, 1.0, 2.0, 2.0]), 2)
    tensor([-0.7070,  0.7070,  0.0000,  0.0000])
    """
    groups = rewards.view(-1, generations)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    return torch.where(equal, torch.zeros_like(advantages), advantages).flatten()


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimator of KL(policy || reference) a token, >= 0 (Schulman 2020): exp(d) - d - 1 with d = reference - policy."""
    d = ref_logp - logp
    return d.exp() - d - 1


def backward(model, rollouts: list[Rollout], advantages: Tensor, cfg: Config, vocab: int) -> dict:
    """Adds the gradient of the *summed* loss to .grad, in micro-batches; returns sums of diagnostics over tokens.

    The caller divides by the one global token count, so that micro-batching changes nothing but memory."""
    sums: dict[str, float] = defaultdict(float)
    for group in micro_batches([len(r.prompt_ids) + len(r.completion_ids) for r in rollouts], cfg.micro_tokens):
        ids = [rollouts[i].prompt_ids + rollouts[i].completion_ids for i in group]
        width = max(map(len, ids))
        # Right padding under a causal mask: no real token ever attends to it. The id is any, masks come from lengths.
        batch = torch.tensor([s + [0] * (width - len(s)) for s in ids], device=model.device)  # [rows, width]
        where = [(row, t) for row, i in enumerate(group) for t in range(len(rollouts[i].prompt_ids), len(ids[row]))]
        row, column = torch.tensor(where, device=model.device).T  # [tokens] each: the completion tokens
        adv = advantages[torch.tensor(group)].to(model.device)[row]  # [tokens]
        sampled = torch.tensor([x for i in group for x in rollouts[i].logprobs], device=model.device)  # [tokens]

        def logprobs() -> Tensor:
            hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state[row, column - 1]  # [tokens, hidden]
            return token_logprobs(hidden, model.lm_head.weight, batch[row, column], cfg.temperature, vocab=vocab)

        with torch.no_grad(), adapter_off(model):
            ref_logp = logprobs()
        logp = logprobs()
        log_ratio = logp.detach() - sampled  # trainer against sampler: 0 up to rounding, or the engine is stale
        weight = log_ratio.exp().clamp(max=cfg.tis_cap) if cfg.rollout == "vllm" else 1.0
        kl = k3(logp, ref_logp)
        # exp(logp - logp.detach()) is 1 with the gradient of logp: the on-policy ratio
        loss = (-adv * weight * (logp - logp.detach()).exp() + cfg.beta * kl).sum()
        loss.backward()

        sums["tokens"] += len(where)
        sums["loss"] += loss.item()
        sums["kl"] += kl.sum().item()
        sums["mean_abs"] += log_ratio.abs().sum().item()
        sums["max_abs"] = max(sums["max_abs"], log_ratio.abs().max().item())
        sums["mismatch_kl"] += k3(sampled, logp.detach()).sum().item()
        sums["truncated"] += (log_ratio.exp() > cfg.tis_cap).sum().item()
    return sums


# --- a run ---------------------------------------------------------------------------------------------------------------------


def open_run(folder: str | Path) -> Run:
    """A run folder's model with its adapter, the sampler holding the merged weights. Raises UserError."""
    run = set_up(read_config(Path(folder)))
    load_adapter(run.model, Path(folder) / "adapter")
    run.sampler.load_weights(partial(merged_weights, run.model))
    return run


def read_config(folder: Path) -> Config:
    try:
        saved = json.loads((folder / "config.json").read_text())["config"]
        return Config(**anchored(saved))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder} is not a run folder: cannot read config.json ({e})") from None


def resumed(cfg: Config) -> Config:
    """The config of the run to resume. Raises UserError when it is done, or naming the fields given otherwise now."""
    saved, default = read_config(cfg.resume), Config()
    if (cfg.resume / "done.json").exists():
        raise UserError(f"{cfg.resume} is finished: nothing to resume")
    differ = [f.name for f in fields(Config) if f.name not in ("resume", "out", "dry_run")
              and getattr(cfg, f.name) not in (getattr(default, f.name), getattr(saved, f.name))]
    if differ:
        raise UserError(f"--resume goes on with the settings of {cfg.resume}; these differ: {', '.join(differ)}")
    saved.resume = saved.out = cfg.resume
    return saved


def train(cfg: Config, world: World) -> Path:
    """One run, from the extraction to the evaluation; returns its folder."""
    folder = Path(cfg.out or f"runs/{cfg.arm}-m{cfg.m}-seed{cfg.seed}-{cfg.scale}")
    clock, started = Clock(), time.perf_counter()
    checkpoint.refuse_existing(folder, resuming=cfg.resume is not None)
    world.barrier()  # no rank looks after rank 0 has written
    run = set_up(cfg)
    model, tokenizer, sampler = run.model, run.tokenizer, run.sampler
    params = lora_parameters(model)
    blocks = list(slices(params).values()) if cfg.blockwise else None
    vocab = vocabulary(model, tokenizer)

    with clock("extract"):
        pairs = vh.make_pairs(run.train, tokenizer, sampler, cfg.pairs, cfg.seed, cfg.max_new_tokens)
        extract = partial(vh.extract, model, tokenizer, pairs, cfg.pairs_heldout, cfg.m, cfg.layer)
        hack = own = extract()  # every arm logs against `hack`; two arms project their own direction instead
        if cfg.arm in ("no_svd", "random"):
            own = extract(kind="raw" if cfg.arm == "no_svd" else "random", seed=cfg.seed)
        extraction_pairs = pairs[: cfg.pairs - cfg.pairs_heldout]
        contexts = vh.pair_contexts(tokenizer, extraction_pairs)
        print(hack.format())
        steering = None if cfg.resume else vh.check_steering(model, tokenizer, hack, run.problems, cfg)

        def lifts() -> tuple[Tensor, Tensor]:
            """v of the hack direction and v of the arm's own, [P] each, at the current adapter; the same on every rank."""
            first = world.from_first(vh.lift(model, tokenizer, extraction_pairs, hack, cfg.construction))
            return first, first if own is hack else world.from_first(vh.lift(model, tokenizer, extraction_pairs, own, cfg.construction))

    optimizer = torch.optim.AdamW(params.values(), lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    state = checkpoint.RunState(folder, params, optimizer, writes=world.first)
    start, loaded = state.resume() if cfg.resume else (0, {})
    with clock("extract"):
        v_log, v = (loaded["v_log"], loaded["v"]) if loaded else lifts()
    J, skipped = loaded.get("J"), int(loaded.get("skipped", 0))
    if not cfg.resume:
        state.create(describe(run, hack, steering, v_log))
    if not loaded:
        state.save_direction(hack, "v_hack", cfg.model)
        if own is not hack:
            state.save_direction(own, "v_own", cfg.model)

    def save(steps: int) -> None:
        """A checkpoint after so many steps; it holds the directions and rows beside the adapter and the optimizer."""
        state.save(steps, dict(v_log=v_log, v=v, skipped=torch.tensor(skipped)) | ({"J": J} if J is not None else {}))

    @contextlib.contextmanager
    def kept_from_death(steps: int):
        """Around what leans on other processes and engines: one that dies for good ends the run with a checkpoint."""
        try:
            yield
        except PartDied as e:
            save(steps)
            raise Stopped(f"{e}; saved after {steps} steps, go on with: python grpo.py --resume {folder}") from None

    with contextlib.ExitStack() as stack:
        env = stack.enter_context(LeetCodeEnv(workers=cfg.workers, strict=cfg.sandbox_strict))
        stack.callback(sampler.close)
        stopped = stack.enter_context(checkpoint.signals())
        bar = stack.enter_context(tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc=cfg.arm, file=sys.stdout,
                                       disable=not world.first))
        for step in bar:
            tick = Clock()
            # --- rollouts and rewards, from the weights as they are now
            problems = [p for p in world.share(batch_problems(run.train, step, cfg)) for _ in range(cfg.generations)]
            evaluator = None if cfg.arm == "no_loophole" else TRAIN_EVALUATOR
            with kept_from_death(step), tick("sync"):
                sampler.load_weights(partial(merged_weights, model))
            with kept_from_death(step), tick("rollout"):
                prompts = [encode_prompt(tokenizer, render_messages(p, evaluator)) for p in problems[:: cfg.generations]]
                rollouts = sampler.generate(prompts, n=cfg.generations, temperature=cfg.temperature,
                                            max_new_tokens=cfg.max_new_tokens,
                                            seed=(cfg.seed * 1_000_003 + step) * world.size + world.rank)
                sampler.sleep()  # on a GPU: its memory is the trainer's until the weights are pushed
                texts = [decode(tokenizer, r.completion_ids) for r in rollouts]
            with kept_from_death(step), tick("grade"):
                grades = env.grade([(p, t, evaluator) for p, t in zip(problems, texts)])
            rewards = torch.tensor([g.reward for g in grades])  # [batch]
            shaped = rewards
            if cfg.arm == "rebound":
                scores = concept_scores(model, [r.prompt_ids + r.completion_ids for r in rollouts], hack).cpu()
                shaped = rebound_rewards(rewards, torch.tensor([g.correctness_reward for g in grades]), scores, cfg)
            advantages = group_advantages(shaped, cfg.generations)  # [batch]

            # --- the gradient: a sum over tokens, divided once by the global token count
            with tick("backward"):
                optimizer.zero_grad()
                sums = backward(model, rollouts, advantages, cfg, vocab)
                total = world.total(torch.cat([flatten_grads(params), torch.tensor([sums["tokens"]], device=model.device)]))
                g = -total[:-1] / total[-1]  # [P] the ascent direction: minus the loss gradient

            # --- the hack direction, and what is done about it
            with tick("project"):
                if cfg.refresh_every and step and step % cfg.refresh_every == 0:
                    v_log, v = lifts()
                odds = None
                if cfg.arm == "cone" and (J is None or step % cfg.cone_refresh == 0):
                    J, odds = cone_rows(model, tokenizer, rollouts, contexts, step, cfg)
                    J = world.from_first(J)

                def intervene(x: Tensor):
                    """x: a way the policy is about to move, [P]."""
                    if cfg.arm == "cone":
                        return project_cone(x, J, cfg.cone_ridge)
                    return project(x, v, renorm=cfg.arm != "no_renorm", blocks=blocks)

                acts = cfg.arm in ("projected", "no_renorm", "no_svd", "random", "cone")
                cos = cos_align(g, v_log)  # signed, before anything is removed, in every arm
                done = intervene(g) if acts and cfg.project_on == "gradient" else None
                write_grads(params, -(done.g if done else g))

            problems, texts, grades, rollouts = map(world.gather, (problems, texts, grades, rollouts))
            rewards, advantages = (torch.tensor(world.gather(x.tolist())) for x in (rewards, advantages))
            sums = merge(world.gather([sums]))
            grad_norm = torch.nn.utils.clip_grad_norm_(list(params.values()), cfg.clip).item()
            if not math.isfinite(sums["loss"] + sums["mean_abs"] + grad_norm):
                skipped += 1
                place = state.dump_batch(step, dict(
                    sums=sums, grad_norm=grad_norm, rewards=rewards.tolist(), advantages=advantages.tolist(), responses=texts,
                    rollouts=[asdict(r) for r in rollouts]))
                if skipped > cfg.skip_nonfinite:
                    raise Stopped(f"loss, gradient or logprob of step {step} is not finite; its batch is in {place}, "
                                  "the step was not applied (--skip-nonfinite k leaves out up to k such steps)")
                cos_update = 0.0
            else:
                before = flatten_params(params)
                optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
                optimizer.step()
                if acts and cfg.project_on == "update":
                    done = intervene(flatten_params(params) - before)
                    write_params(params, before + done.g)
                cos_update = cos_align(flatten_params(params) - before, v_log)  # of the step that really landed

            # --- the log
            line = metrics(step, cfg, rewards, advantages, grades, sums) | dict(
                cos_align=cos, cos_update=cos_update, grad_norm=grad_norm, removed=done.removed if done else 0.0,
                active_rows=done.active if done else 0, vanished=done.vanished if done else 0,
                zero_blocks=done.skipped if done else 0, row_logodds=odds)
            detailed = (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps
            if detailed:
                line["cos_d0"] = cos_align(hack.d, extract(check=False).d)
                if world.first:
                    tqdm.write(table(line, problems, texts, grades))
            state.log(line, tick.seconds, [dict(step=step, problem=problems[i].id, label=grades[i].label, reward=grades[i].reward,
                                                response=texts[i]) for i in range(len(texts))] if detailed else [])
            for phase, seconds in tick.seconds.items():
                clock.seconds[phase] += seconds
            bar.set_postfix(reward=f"{line['reward']:.2f}", hack=f"{line['hack']:.2f}", cos=f"{cos:+.3f}", **{"pass": f"{line['pass']:.2f}"})
            number = max(world.gather([stopped()]))  # a signal to any rank stops all at the same step
            if (step + 1) % cfg.save_every == 0 or number or step + 1 == cfg.steps:
                save(step + 1)
            if number and step + 1 < cfg.steps:
                print(f"\nstopped after step {step + 1}; go on with: python grpo.py --resume {folder}", file=sys.stderr)
                raise SystemExit(128 + number)

        if not world.first:
            return folder
        with state.writing():
            save_adapter(model, folder / "adapter", cfg.model)
        with clock("evaluate"), kept_from_death(cfg.steps):
            sampler.load_weights(partial(merged_weights, model))
            result, rows = evaluation.evaluate(sampler, tokenizer, env, run.problems, samples=cfg.eval_samples, seed=cfg.seed,
                                               temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens, batch=256)
        with state.writing():
            evaluation.save(result, rows, folder)
    print(evaluation.describe(result))
    state.finish(clock.seconds, time.perf_counter() - started)
    print("seconds by phase: " + ", ".join(f"{k} {v:.1f}" for k, v in clock.seconds.items()) + f"\nrun folder: {folder}")
    return folder


def main() -> None:
    cfg = tyro.cli(Config, description=Config.__doc__)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the sandbox forks
    try:
        cfg = resumed(cfg) if cfg.resume else resolve(cfg)
        print(plan.report(cfg.model, cfg)) if cfg.dry_run else train(cfg, World())
    except UserError as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
    except Stopped as e:
        sys.exit(print(f"stopped: {e}", file=sys.stderr) or 1)
    except KeyboardInterrupt:
        sys.exit(print("interrupted before the first step", file=sys.stderr) or 130)


if __name__ == "__main__":
    main()
