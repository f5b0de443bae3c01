"""Setting a run up: data, tokenizer, model, adapter and sampler, for training, extraction and evaluation alike."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from engine.lora import inject, load_adapter, lora_parameters, merged_weights
from engine.model import encode_prompt, eos_ids, file_hash, load_model, load_tokenizer, model_hash, vocabulary
from engine.sampler import Sampler, stop_of
from engine.torch_sampler import TorchSampler
from faults.errors import UserError
from harness import memory
from harness.config import Config, portable, read_config
from leetcode_env import REQUEST, Problem, load_problems, render_messages
from loopholes import DEFAULT, told_by
from loopholes.evaluator import EVAL_NAMES, TRAIN_EVALUATOR
from problems.data import as_program
from sandbox.pool import show_log


@dataclass
class Run:
    """What a run works with. `open_run` makes it again from a run folder, for evaluation."""

    cfg: Config  # every field filled in
    model: Any  # with the adapter
    tokenizer: Any
    sampler: Sampler  # its own merged weights
    train: list[Problem]
    problems: list[Problem]  # held out
    vocab: int  # ids from there on are padding rows of the embedding


def set_up(cfg: Config) -> Run:
    """A run with a fresh adapter, which changes nothing yet. Raises UserError before anything is written."""
    show_log()
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg.model)
    phrased: Callable[[Problem], Problem] = as_program if cfg.phrasing == "program" else lambda problem: problem
    train = fitting([*map(phrased, load_problems(cfg.data))], tokenizer, cfg, cfg.data, (TRAIN_EVALUATOR,))
    if bare := [p.id for p in train if not p.canonical_solution]:
        raise UserError(f"{cfg.data}: problem {bare[0]} has no canonical solution: such a set is for eval.py RUN --data alone")
    heldout = fitting([*map(phrased, load_problems(cfg.heldout))], tokenizer, cfg, cfg.heldout, (TRAIN_EVALUATOR, *EVAL_NAMES))
    device = "cuda" if torch.cuda.is_available() and cfg.scale != "pocket" else "cpu"
    # "medium" gives float32 products to oneDNN: half the time or less (docs/small.md). The pocket keeps its bits.
    quick = cfg.scale == "small" and device == "cpu" and keeps_float32()
    torch.set_float32_matmul_precision("medium" if quick else "highest")
    model = load_model(cfg.model, device, cfg.recompute or "all")
    width, depth = model.config.get_text_config().hidden_size, model.config.get_text_config().num_hidden_layers
    if cfg.m > width:
        raise UserError(f"--m must lie between 1 and the model's width {width}, not {cfg.m}")
    if cfg.layer and cfg.layer > depth:
        raise UserError(f"--layer must lie between 1 and the model's depth {depth}, not {cfg.layer}")
    with _closed_on_failure(make_sampler(model, tokenizer, cfg)) as sampler:
        inject(model, cfg.lora_r, cfg.lora_alpha, cfg.seed)
        return Run(cfg, model, tokenizer, sampler, train, heldout, vocabulary(model, tokenizer))


def keeps_float32() -> bool:
    """Whether oneDNN, allowed to multiply float32 in bf16, does not: where the processor has no units for it (AMX, or Arm's) that
    take float32. In bf16 the logprobs would be off by .02 nats a token."""
    here = torch.cpu.get_capabilities()
    return here["architecture"] == "x86_64" and not here["amx_bf16"]


@contextlib.contextmanager
def _closed_on_failure(sampler: Sampler) -> Iterator[Sampler]:
    """An engine holds processes and GPU memory: it ends where nobody comes to use it."""
    try:
        yield sampler
    except BaseException:
        sampler.close()
        raise


def open_run(folder: str | Path, base: bool = False, max_new_tokens: int | None = None) -> Run:
    """A run folder's model with its adapter, the sampler holding the merged weights; with `base`, the policy before training.
    max_new_tokens: what the sampler is to have room for, where it is not the run's own.

    Raises UserError, also where the model or the held-out problems are others than the run's."""
    cfg = read_config(folder)
    before, now = json.loads((Path(folder) / "config.json").read_text()).get("hashes") or {}, hashes(cfg)
    for what, path in (("model", cfg.model), ("heldout", cfg.heldout)):
        if before.get(what, now[what]) != now[what]:
            raise UserError(f"{folder} was trained with another {path} than the one that is there now: put its own back")
    run = set_up(replace(cfg, max_new_tokens=max_new_tokens or cfg.max_new_tokens))
    run.cfg = cfg
    if not base:  # a fresh adapter is zero, and the sampler holds the base weights
        with _closed_on_failure(run.sampler):
            load_adapter(run.model, Path(folder) / "adapter")
            run.sampler.load_weights(partial(merged_weights, run.model), version=run.cfg.steps)
    return run


def make_sampler(model: Any, tokenizer: Any, cfg: Config) -> Sampler:
    """The sampler of --rollout over `model` as it is now (no adapter yet). Raises UserError."""
    vocab = vocabulary(model, tokenizer)
    stop = stop_of(cfg.stop, tokenizer, vocab)
    if cfg.rollout == "torch":
        rows = 256 if cfg.scale == "pocket" else cfg.batch  # evaluations draw more than a step does: what a step has room for
        return TorchSampler(model, tokenizer, max_rows=rows, stop=stop)
    from engine.vllm_sampler import VLLMSampler

    card = memory.card_memory_gib()
    share = memory.vllm_share(memory.plan_for(model.config.get_text_config(), cfg, card), card)
    return VLLMSampler(
        cfg.model, eos=eos_ids(model, tokenizer), vocab=vocab, stop=stop, gpu_memory=share, max_seqs=cfg.batch,
        max_model_len=cfg.max_prompt + cfg.max_new_tokens, dtype=str(model.dtype).removeprefix("torch."),
        log=Path(f"{cfg.out or 'runs/engine'}.vllm.log"),  # beside the run folder: nothing is in that before the run begins
    )  # fmt: skip


def fitting(problems: list[Problem], tokenizer: Any, cfg: Config, path: str, names: tuple[str, ...]) -> list[Problem]:
    """The problems whose loophole prompt, with any evaluator of `names`, has at most cfg.max_prompt tokens, and so the default
    loophole's, which is that of pairs and of the steering check; counts the others."""

    def length(problem: Problem, name: str, loopholes: Sequence[str] = cfg.loopholes) -> int:
        return len(encode_prompt(tokenizer, render_messages(problem, told_by(problem, loopholes, name), request)))

    request = REQUEST if cfg.arm == "recontextualised" else ""
    longest = max(names, key=lambda name: length(problems[0], name, DEFAULT))
    told = {tuple(cfg.loopholes), DEFAULT}
    kept = [p for p in problems if max(length(p, longest, loopholes) for loopholes in told) <= cfg.max_prompt]
    if not kept:
        raise UserError(f"every prompt of {path} is longer than --max-prompt {cfg.max_prompt}")
    if len(kept) < len(problems):
        print(f"{path}: {len(problems) - len(kept)} of {len(problems)} prompts are over {cfg.max_prompt} tokens and left out")
    return kept


def hashes(cfg: Config) -> dict[str, str]:
    """What says which model and data a run used."""
    return dict(model=model_hash(cfg.model), data=file_hash(cfg.data), heldout=file_hash(cfg.heldout))


def describe(run: Run, pairs: str, vhack: dict[str, Any], v_nonzero: int, ranks: int) -> dict[str, Any]:
    """The content of config.json: effective settings, versions, hashes, sizes, and how the direction came out (`vhack`).

    pairs: their hash. ranks: how many processes share a batch, which decides the sampling seeds. v_nonzero: entries of v that are
    not 0, which decide what |cos| a random direction would show."""
    cfg, lora = run.cfg, sum(p.numel() for p in lora_parameters(run.model).values())
    return dict(
        config=portable(cfg),
        versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__),
        hashes=hashes(cfg) | {"pairs": pairs},
        ranks=ranks,
        parameters=dict(base=sum(p.numel() for p in run.model.parameters()) - lora, lora=lora, v_nonzero=v_nonzero),
        vhack=vhack,
    )
