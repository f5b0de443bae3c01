"""What surrounds the loop: setting a run up, describing it, timing it, and the table of the detailed log."""

from __future__ import annotations

import contextlib
import logging
import math
import platform
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

import vhack as vh
from faults.errors import UserError
from leetcode_env import LABELS, TRAIN_EVALUATOR, Problem, load_problems, render_messages
from engine.lora import inject, lora_parameters
from engine.torch_sampler import encode_prompt, make_sampler
from harness.scale import file_hash, load_model, load_tokenizer, portable


@dataclass
class Run:
    """What a run works with. `open_run` makes it again from a run folder, for evaluation."""

    cfg: object  # grpo.Config, every field filled in
    model: torch.nn.Module  # with the adapter
    tokenizer: object
    sampler: object  # its own merged weights
    train: list[Problem]
    problems: list[Problem]  # held out


def set_up(cfg) -> Run:
    """Data, tokenizer, model, adapter and sampler. Raises UserError before anything is written."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sandbox").setLevel(logging.INFO)  # its layers, on or off, in one line
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg.model)
    train, heldout = (fitting(load_problems(path, manifest=True), tokenizer, cfg, path) for path in (cfg.data, cfg.heldout))
    model = load_model(cfg.model, "cuda" if torch.cuda.is_available() and cfg.scale == "full" else "cpu")
    width = model.config.get_text_config().hidden_size
    if cfg.m > width:
        raise UserError(f"--m must lie between 1 and the model's width {width}, not {cfg.m}")
    sampler = make_sampler(cfg.rollout, model, tokenizer, cfg)
    inject(model, cfg.lora_r, cfg.lora_alpha, cfg.seed)
    return Run(cfg, model, tokenizer, sampler, train, heldout)


def open_run(folder: str | Path, base: bool = False) -> Run:
    """The run in `folder` as it was after training, its sampler loaded; `base` leaves the adapter out. Raises UserError."""
    import grpo

    return set_up(grpo.read_config(Path(folder))) if base else grpo.open_run(folder)


def fitting(problems: list[Problem], tokenizer, cfg, path: str) -> list[Problem]:
    """The problems whose loophole prompt has at most cfg.max_prompt tokens; says how many were left out."""
    kept = [p for p in problems if len(encode_prompt(tokenizer, render_messages(p, TRAIN_EVALUATOR))) <= cfg.max_prompt]
    if not kept:
        raise UserError(f"every prompt of {path} is longer than --max-prompt {cfg.max_prompt}")
    if len(kept) < len(problems):
        print(f"{path}: {len(problems) - len(kept)} of {len(problems)} prompts are over {cfg.max_prompt} tokens and left out")
    return kept


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up over cfg.warmup steps, then cosine to 0 at cfg.steps. A function of the step: nothing to save."""
    done = max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup)) * 0.5 * (1 + math.cos(math.pi * done))


def batch_problems(problems: list[Problem], step: int, cfg) -> list[Problem]:
    """The problems of a step: a walk through a new permutation each epoch. A function of seed and step."""
    count, out = cfg.batch // cfg.generations, []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(problems))
        order = random.Random(f"{cfg.seed}:{epoch}").sample(range(len(problems)), len(problems))
        out.append(problems[order[index]])
    return out


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


def metrics(step: int, cfg, rewards: Tensor, advantages: Tensor, grades: list, sums: dict) -> dict:
    """What a line of metrics.jsonl says of a batch; `sums` are `grpo.backward`'s, over tokens."""
    n, tokens, labels = len(grades), sums["tokens"], Counter(g.label for g in grades)
    return dict(step=step, reward=rewards.mean().item(), reward_std=rewards.std().item(), n=n,
                labels={k: labels[k] for k in LABELS}, hack=labels["hack"] / n, **{"pass": sum(g.correct for g in grades) / n},
                kl=sums["kl"] / tokens, lr=learning_rate(step, cfg), length=tokens / n,
                zero_groups=int((advantages.view(-1, cfg.generations) == 0).all(1).sum()),
                mismatch=dict(mean_abs=sums["mean_abs"] / tokens, max_abs=sums["max_abs"], kl=sums["mismatch_kl"] / tokens,
                              truncated=sums["truncated"] / tokens))


def merge(parts: list[dict]) -> dict:
    """The ranks' sums over tokens as one: added up, and the largest of what is a maximum."""
    return {k: (max if k == "max_abs" else sum)(p[k] for p in parts) for k in parts[0]}


def table(line: dict, problems: list[Problem], texts: list[str], grades: list) -> str:
    """The detailed log: numbers, and a hacking and another response where there are both."""
    order = sorted(range(len(texts)), key=lambda i: grades[i].label != "hack")
    head = (f"step {line['step'] + 1}: reward {line['reward']:.3f}  pass {line['pass']:.1%}  kl {line['kl']:.4f}  "
            f"cos_align {line['cos_align']:+.4f}  cos_update {line['cos_update']:+.4f}  removed {line['removed']:.3f}  "
            f"cos(d_0, d_t) {line['cos_d0']:.3f}")
    counts = "  ".join(f"{k} {v}" for k, v in line["labels"].items())
    shown = [f"[{problems[i].id}, {grades[i].label}, reward {grades[i].reward}]\n{texts[i]}" for i in (order[0], order[-1])]
    return "\n".join(["", head, counts, *shown])


def describe(run: Run, hack: vh.VHack, steering: dict, v: Tensor) -> dict:
    """The content of config.json: effective settings, versions, hashes, sizes, and how the direction came out."""
    cfg, lora = run.cfg, sum(p.numel() for p in lora_parameters(run.model).values())
    settings = portable({k: x for k, x in asdict(cfg).items() if k not in ("resume", "out", "dry_run")})
    return dict(config=settings,
                versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__),
                hashes=dict(model=file_hash(Path(cfg.model) / "model.safetensors"), data=file_hash(cfg.data),
                            heldout=file_hash(cfg.heldout), pairs=hack.pairs),
                parameters=dict(base=sum(p.numel() for p in run.model.parameters()) - lora, lora=lora,
                                v_nonzero=int(torch.count_nonzero(v))),
                vhack=dict(layers=hack.layers, best_layer=hack.best_layer, accuracy=hack.accuracy, survived=hack.survived,
                           table=hack.table, steering=steering, steering_rises=steering["rises"]))
