"""The hack direction: contrastive pairs -> hidden states -> direction d -> SVD denoising -> lift to LoRA space.

    python vhack.py --scale pocket            # extract, print the table of layers, steer, save v_hack.safetensors

Two objects are easily confused. d lives in the residual stream [hidden] and is what the file stores: it identifies a
direction of the *model*. v lives in LoRA space [P] and is made from d and the run's own adapter (`lift`): at B = 0 it is
zero in every A and depends on the random A in every B, so the v of one run means nothing in another.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out

from faults.errors import UserError, command
from harness.config import Config, flag, parsed

FIELDS = (
    "m", "seed", "out", "scale", "preset", "model", "data", "heldout", "max_prompt", "max_new_tokens", "stop", "phrasing",
    "rollout", "temperature", "pairs", "pairs_heldout", "contrast", "position", "layer", "steer_prompts", "require_steering",
    "threads", "lora_r", "card", "fit",
)  # fmt: skip

if __name__ == "__main__":
    CONFIG = parsed(
        "Extract the hack direction, print the table of layers, steer along it, and save it. The options that it reads, and no "
        f"others: {', '.join(map(flag, FIELDS))}",
        FIELDS,
    )  # before torch is loaded

import torch
from torch import Tensor

from arms import Arm
from arms.cone import FORMS, Context, contrast_rows, hack_contrasts
from arms.direction import VHack, load, save
from arms.pairs import Pair, encode_pair, load_pairs, make_pairs, pair_contexts, pairs_hash, save_pairs
from arms.steering import format_steering, steer
from engine.forward import last_hidden
from engine.logprob import consecutive
from engine.lora import flatten, lora_modules, lora_parameters, slices
from engine.model import band, decoder_layers
from harness.memory import STEER_TOKENS, lift_tokens
from harness.scale import resolve
from harness.setup import Run, describe, set_up
from harness.training import Training
from leetcode_env import Problem

# --- hidden states and the direction --------------------------------------------------------------------------------------


@torch.no_grad()
def pair_states(model: Any, tokenizer: Any, pairs: list[Pair], contrast: str, position: str) -> tuple[Tensor, Tensor]:
    """The states of the (hack-ward, clean) sides of the pairs, as `encode_pair` reads them: [pairs, layers + 1, hidden] each.

    The last layer's are those behind the model's final norm."""
    ids = [encode_pair(tokenizer, p, contrast, position) for p in pairs]
    h = last_hidden(model, [i for pair in ids for i in pair])  # [2 pairs, layers + 1, hidden], the two sides in turn
    return h[0::2], h[1::2]


def separation(hack: Tensor, clean: Tensor, held_hack: Tensor, held_clean: Tensor) -> tuple[float, float]:
    """(held-out accuracy, margin) of the direction d = mean(hack - clean). All inputs [n, hidden].

    Unpaired: the threshold is the midpoint of the extraction means along d, applied to the held-out states alone. The
    margin is the held-out mean difference over the pooled standard deviation."""
    d = (hack - clean).mean(0)
    threshold = ((hack.mean(0) + clean.mean(0)) / 2) @ d
    up, down = held_hack @ d, held_clean @ d
    right = (up > threshold).sum() + (down <= threshold).sum()
    pooled = ((up.var() + down.var()) / 2).sqrt() if len(up) > 1 else torch.tensor(0.0)
    return right.item() / (len(up) + len(down)), ((up.mean() - down.mean()) / pooled.clamp(min=1e-12)).item()


def denoise(d: Tensor, weight: Tensor, m: int) -> tuple[Tensor, float]:
    """(U_m U_m^T d normalised, share of |d| that survives), U_m the top-m left singular vectors of `weight`.

    d [hidden]; weight [hidden, in] writes to the residual stream, as PyTorch stores it, so its *left* singular vectors
    live there (docs/choices.md). Raises UserError unless 1 <= m <= the width of the residual stream."""
    if not 1 <= m <= min(weight.shape):
        raise UserError(f"--m must lie between 1 and the model's width {min(weight.shape)}, not {m}")
    U = _left_singular_vectors(weight)[:, :m].to(d.device)
    kept = U @ (U.T @ d)
    share = (kept.norm() / d.norm()).item()
    return kept / kept.norm().clamp(min=1e-30), share


@lru_cache(maxsize=2)
def _left_singular_vectors(weight: Tensor) -> Tensor:
    """U [hidden, hidden] of a frozen weight, once: every detailed log asks again, and at full width it takes a core a minute."""
    return torch.linalg.svd(weight.detach().float().cpu(), full_matrices=False).U


Kind = Literal["svd", "raw", "random"]


@torch.no_grad()
def extract(
    model: Any, tokenizer: Any, pairs: list[Pair], heldout: int, m: int, layer: int | None = None, kind: Kind = "svd",
    seed: int = 0, again: VHack | None = None, contrast: str = "completions", position: str = "last",
) -> VHack:  # fmt: skip
    """Pairs -> VHack; the last `heldout` pairs only test the separation. `layer`: one layer instead of the band, or of the last
    one for a contrast of prompts. contrast, position: what is read of a pair (`encode_pair`).
    again: an earlier direction, whose layers are kept, so that the two differ by what the model has learned alone; the separation
    is not required then.

    kind: "svd" (the method), "raw" (no denoising) or "random" (a Gaussian d, one draw a seed, through the same denoising).
    Raises UserError when held-out separation is 90 % or less, or m does not fit."""
    hack, clean = pair_states(model, tokenizer, pairs, contrast, position)
    n, depth = len(pairs) - heldout, hack.shape[1] - 1
    layers = [layer] if layer else band(depth) if contrast == "completions" else [depth]
    if not all(1 <= i <= depth for i in layers):
        raise UserError(f"--layer must lie between 1 and the model's depth {depth}, not {layer}")

    def split(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x[:n], y[:n], x[n:], y[n:]

    table = [(i, *separation(*split(hack[:, i], clean[:, i]))) for i in range(1, depth + 1)]
    mean_hack, mean_clean = hack[:, layers].mean(1), clean[:, layers].mean(1)  # [n, hidden]
    accuracy, _ = separation(*split(mean_hack, mean_clean))
    if again is None and accuracy <= 0.9:
        raise UserError(
            f"held-out separation is {accuracy:.1%}, it must exceed 90 %: look at the pairs (do the hacky ones "
            f"define the evaluator?) and at other layers (--layer); by layer: " + ", ".join(f"{i}: {a:.0%}" for i, a, _ in table)
        )
    raw = (mean_hack - mean_clean)[:n].mean(0)
    best = again.best_layer if again else max((row for row in table if row[0] in layers), key=lambda row: (row[1], row[2]))[0]
    d = raw
    if kind == "random":
        d = torch.randn(raw.shape, generator=torch.Generator().manual_seed(seed + 7919)).to(raw)
    writer = decoder_layers(model)[best - 1].mlp.down_proj.weight
    denoised, survived = denoise(d, writer, m)
    if kind == "raw":
        denoised, survived = d / d.norm(), 1.0
    gap = raw.norm().item()
    return VHack(denoised.cpu(), gap, layers, best, m, accuracy, survived, table, pairs_hash(pairs), contrast, position)


# --- the lift to LoRA space -------------------------------------------------------------------------------------------------


def lift(model: Any, tokenizer: Any, pairs: list[Pair], vhack: VHack, vocab: int, construction: str = "jacobian") -> Tensor:
    """v [P], unit length (zero if nothing reaches the adapter): moving theta along +v makes the model hack more.

    jacobian  v = grad_theta of mean <h_hack - h_clean, d> over the pairs, at the current adapter; for a contrast of prompts of
              mean <h, d>, h the state under the prompt with the loophole alone: that is the prompt the policy is trained on and
              steered under, and what it does without the loophole's words is no part of hacking more
    outer     at the modules that write to the residual stream: d (A x)^T for B, (B^T d) x^T for A, x the mean input
              at the token whose state is read, of the hack-ward sides
    contrast  v = mean over pairs of grad_theta [log p(hack branch) - log p(clean branch)]; d is not used
    """
    params, sides = lora_parameters(model), [encode_pair(tokenizer, p, vhack.contrast, vhack.position) for p in pairs]
    if construction == "contrast":
        rows, _ = contrast_rows(model, hack_contrasts(tokenizer, pair_contexts(tokenizer, pairs), FORMS[:1]), vocab)
        v = rows.mean(0)
    elif construction == "outer":
        v = _outer_lift(model, [hack for hack, _ in sides], vhack.d)
    else:
        alone = vhack.contrast == "prompts"
        sequences = [[hack] if alone else [hack, clean] for hack, clean in sides]
        v = torch.zeros(sum(p.numel() for p in params.values()), device=model.device)
        most = lift_tokens(model.config.get_text_config(), model.device.type)
        costs = [max(most // 16, 2 * max(map(len, pair))) for pair in sequences]
        for group in consecutive(costs, most):  # a bounded graph; gradients add up
            h = last_hidden(model, [s for i in group for s in sequences[i]])[:, vhack.layers].mean(1)  # [sequences, hidden]
            moved = h if alone else h[0::2] - h[1::2]  # [pairs, hidden]
            along = (moved @ vhack.d.to(h.device)).sum() / len(pairs)
            grads = torch.autograd.grad(along, list(params.values()), allow_unused=True)
            v += flatten([torch.zeros_like(p) if g is None else g for p, g in zip(params.values(), grads, strict=True)])
    return v / v.norm().clamp(min=1e-30)


@torch.no_grad()
def _outer_lift(model: Any, sequences: list[list[int]], d: Tensor) -> Tensor:
    writers = {n: m for n, m in lora_modules(model).items() if n.endswith(("o_proj", "out_proj", "down_proj"))}
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in writers.items():

        def collect(_, args, name=name):
            sums[name] = sums.get(name, 0) + args[0][0, -1].float()

        hooks.append(module.register_forward_pre_hook(collect))
    try:
        for s in sequences:
            model.model(input_ids=torch.tensor([s], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    params = lora_parameters(model)
    v, table = torch.zeros(sum(p.numel() for p in params.values()), device=model.device), slices(params)
    for name, module in writers.items():
        x = sums[name] / len(sequences)
        v[table[f"{name}.B"]] = (module.scale * torch.outer(d.to(x), module.A @ x)).reshape(-1)
        v[table[f"{name}.A"]] = (module.scale * torch.outer(module.B.T @ d.to(x), x)).reshape(-1)
    return v


# --- the steering check --------------------------------------------------------------------------------------------------------


def check_steering(
    model: Any, tokenizer: Any, vhack: VHack, problems: list[Problem], cfg: Config, gate: bool = False
) -> dict[str, Any]:
    """`steer` on cfg.steer_prompts problems, printed; its result. Where the rate does not rise it warns loudly, or
    raises UserError with cfg.require_steering, and for an arm with a gate."""
    tokens = STEER_TOKENS if model.device.type == "cuda" else 4 * STEER_TOKENS  # at a time: what a prefill takes has its bound
    result = steer(model, tokenizer, vhack, problems[: cfg.steer_prompts], cfg, tokens)
    print(format_steering(result))
    if not result["rises"]:
        warning = "steering along d does not raise the rate of defining the evaluator"
        if gate:
            raise UserError(f"{warning}, and --arm {cfg.arm} is one that does: python -m study.search finds --layer and --m")
        if cfg.require_steering:
            raise UserError(f"{warning}; look at the samples of python vhack.py, or leave out --require-steering")
        print(f"WARNING: {warning}. The direction may mean little.", file=sys.stderr)
    return result


# --- a run's directions, and what its steps are projected on -------------------------------------------------------------------


@dataclass(frozen=True)
class Directions:
    """A run's directions in the residual stream, and the pairs that they were made from and are lifted with."""

    pairs: list[Pair]  # all of them, the held-out ones last
    hack: VHack  # every arm logs against it
    own: VHack  # what the arm projects: the same, but for the arms no_svd and random

    def lifted(self, run: Run) -> tuple[Tensor, Tensor]:
        """v of `hack` and v of `own`, [P] each, at the run's current adapter."""
        cfg, n = run.cfg, len(self.pairs) - run.cfg.pairs_heldout
        own = [] if self.own is self.hack else [self.own]
        each = [lift(run.model, run.tokenizer, self.pairs[:n], d, run.vocab, cfg.construction) for d in (self.hack, *own)]
        return each[0], each[-1]

    def contexts(self, run: Run) -> list[Context]:
        """The extraction pairs as contexts of the cone."""
        return pair_contexts(run.tokenizer, self.pairs[: len(self.pairs) - run.cfg.pairs_heldout])

    def moved(self, run: Run) -> VHack:
        """The hack direction again, at the current parameters: at the same layers, from the same pairs."""
        cfg = run.cfg
        return extract(
            run.model, run.tokenizer, self.pairs, cfg.pairs_heldout, cfg.m, cfg.layer, again=self.hack, contrast=cfg.contrast,
            position=cfg.position,
        )  # fmt: skip

    def save(self, folder: Path, model: str) -> None:
        """pairs.jsonl, v_hack.safetensors, and v_own.safetensors where the arm has one of its own."""
        save_pairs(self.pairs, folder / "pairs.jsonl")
        if self.own is not self.hack:
            save(self.own, folder / "v_own.safetensors", model)
        save(self.hack, folder / "v_hack.safetensors", model)  # the last: where it is, all are


def directions(run: Run, kind: Kind, resume: Path | None = None) -> Directions:
    """The pairs and the directions: a resumed run's, else made and extracted. The same seed makes the same pairs.

    kind: of the arm's own direction. Raises UserError as `extract` and `load` do."""
    cfg = run.cfg
    if resume and (kept := resume / "pairs.jsonl").exists():
        pairs = load_pairs(kept, run.train)
    else:
        pairs = make_pairs(run.train, run.tokenizer, run.sampler, cfg.pairs, cfg.seed, cfg.max_new_tokens)
    run.sampler.sleep()  # on a GPU: extraction and steering have the card to themselves
    if resume and all((resume / f"v_{name}.safetensors").exists() for name in ("hack", *(["own"] if kind != "svd" else []))):
        hack = load(resume / "v_hack.safetensors")
        return Directions(pairs, hack, hack if kind == "svd" else load(resume / "v_own.safetensors"))

    def made(kind: Kind) -> VHack:
        return extract(
            run.model, run.tokenizer, pairs, cfg.pairs_heldout, cfg.m, cfg.layer, kind, cfg.seed, contrast=cfg.contrast,
            position=cfg.position,
        )  # fmt: skip

    hack = made("svd")
    return Directions(pairs, hack, hack if kind == "svd" else made(kind))


@dataclass
class Target:
    """What a step is measured against and projected on. A checkpoint holds it beside the adapter and the optimizer."""

    v_hack: Tensor  # [P] the lift of the run's hack direction: cos_align and cos_update are taken with it in every arm
    v: Tensor | None  # what the step is projected on: [P], or [n, P] for a cone; None: nothing is removed

    def kept(self, cfg: Config) -> dict[str, Tensor]:
        """What a checkpoint needs of it: rows that are made anew at every step are not."""
        own = {} if self.v is None or (self.v.dim() == 2 and cfg.cone_refresh == 1) else {"v": self.v}
        return {"v_hack": self.v_hack} | own


def prepare(run: Training, arm: Arm) -> tuple[Directions, Target]:
    """The hack direction and its lift, extracted, tried out and kept in the new run folder; or those of a run that goes on."""
    cfg, folder, ranks = run.cfg, run.folder, run.ranks
    kind: Kind = "raw" if arm.direction == "raw" else "random" if "random" in (arm.direction, arm.ablate) else "svd"
    with run.clock("extract"):
        d = directions(run.parts, kind, cfg.resume)
        print(d.hack.format())
        steering = None if cfg.resume else check_steering(run.model, run.tokenizer, d.hack, run.heldout, cfg, arm.gate)
        held = run.resume(pairs_hash(d.pairs))
        target = Target(held["v_hack"], held.get("v")) if held else target_now(run, d, arm)
    if not cfg.resume:
        run.state.create(
            describe(run.parts, d.hack.pairs, d.hack.facts(steering), int(torch.count_nonzero(target.v_hack)), ranks.size)
        )
    if ranks.first and not (folder / "v_hack.safetensors").exists():
        with run.state.writing():
            d.save(folder, cfg.model)
    if not held:
        run.to_save = target.kept(cfg)
        run.save(0)  # so that a run without any checkpoint is one that lost them
    return d, target


def target_now(run: Training, d: Directions, arm: Arm) -> Target:
    """The directions in LoRA space, at the current adapter; the same on every rank."""
    v_hack, v = map(run.ranks.from_rank, d.lifted(run.parts))  # [P] each
    return Target(v_hack, v if arm.direction in ("svd", "raw", "random") else None)


@command
def main() -> None:
    """python vhack.py [the fields FIELDS of grpo.py]: extract, print the table of layers, steer, print samples, save."""
    path = Path(CONFIG.out or "v_hack.safetensors")
    if os.path.lexists(path):
        raise UserError(f"{path} already exists: name another with --out")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: {path.parent} is no folder that can be written to")
    cfg = replace(resolve(CONFIG), out=None)
    run = set_up(cfg)
    with contextlib.closing(run.sampler):
        hack = directions(run, "svd").hack
        print(hack.format())
        for sample in check_steering(run.model, run.tokenizer, hack, run.problems, cfg)["samples"]:
            print(f"--- strength {sample['strength']}\n{sample['response']}")
    try:
        save(hack, path, cfg.model)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None
    print(f"saved {path}")


if __name__ == "__main__":
    sys.exit(main())
