"""The hack direction: contrastive pairs -> hidden states -> direction d -> SVD denoising -> lift to LoRA space.

    python vhack.py --scale pocket            # extract, print the table of layers, steer, save v_hack.safetensors

Two objects are easily confused. d lives in the residual stream [hidden] and is what the file stores: it identifies a
direction of the *model*. v lives in LoRA space [P] and is made from d and the run's own adapter (`lift`): at B = 0 it is
zero in every A and depends on the random A in every B, so the v of one run means nothing in another.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out

from faults.errors import UserError, command
from harness.config import Config, flag, parsed

FIELDS = (
    "m", "seed", "out", "scale", "preset", "model", "data", "heldout", "max_prompt", "max_new_tokens", "rollout", "temperature",
    "pairs", "pairs_heldout", "layer", "steer_prompts", "require_steering", "threads", "lora_r", "card", "fit",
)  # fmt: skip

if __name__ == "__main__":
    CONFIG = parsed(
        "Extract the hack direction, print the table of layers, steer along it, and save it. The options that it reads, and no "
        f"others: {', '.join(map(flag, FIELDS))}",
        FIELDS,
    )  # before torch is loaded

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from arms.cone import FORMS, contrast_rows, hack_contrasts
from arms.pairs import Pair, make_pairs, pair_contexts, pairs_hash
from engine.forward import last_hidden
from engine.logprob import consecutive
from engine.lora import adapter_off, flatten, lora_modules, lora_parameters, slices
from engine.model import band, decode, decoder_layers, encode_prompt
from engine.torch_sampler import TorchSampler
from faults.files import write_atomic
from harness.memory import LIFT_TOKENS, STEER_TOKENS
from harness.scale import resolve
from harness.setup import Run, set_up
from leetcode_env import Problem, parse_response, render_messages
from loopholes import evaluated_by
from loopholes.evaluator import TRAIN_EVALUATOR, defines_evaluator

# --- hidden states and the direction --------------------------------------------------------------------------------------


def encode_pair(tokenizer: Any, pair: Pair) -> tuple[list[int], list[int]]:
    """(hacky, clean) token ids, each with the prompt before it."""
    prompt = encode_prompt(tokenizer, render_messages(pair.problem, evaluated_by()))
    hack, clean = (prompt + tokenizer.encode(text, add_special_tokens=False) for text in (pair.hack, pair.clean))
    return hack, clean


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


@dataclass(frozen=True)
class VHack:
    """The direction in the residual stream, and what identifies it."""

    d: Tensor  # [hidden], unit length, denoised (or raw: arm no_svd; or Gaussian: arm random)
    gap: float  # |mean(h_hack - h_clean)|: the natural unit of steering strength
    layers: list[int]  # averaged over, counted from 1
    best_layer: int  # whose down_proj denoises
    m: int
    accuracy: float  # held-out separation of the averaged states
    survived: float  # share of |d| that the denoising keeps
    table: list[tuple[int, float, float]]  # (layer, held-out accuracy, margin) for every layer
    pairs: str  # hash

    def format(self) -> str:
        """The table of layers, as printed."""
        lines = ["layer  held-out separation  margin/sd"]
        lines += [
            f"{layer:5d}  {acc:19.1%}  {margin:9.2f}{'   *' if layer in self.layers else ''}" for layer, acc, margin in self.table
        ]
        kept = f"down_proj of layer {self.best_layer}, m = {self.m}: {self.survived:.1%} of |d| survives"
        return "\n".join([*lines, f"mean of *: {self.accuracy:.1%} held-out; {kept}"])

    def facts(self, steering: dict[str, Any] | None) -> dict[str, Any]:
        """How it came out, for config.json. steering: the result of `steer`."""
        found = dict(
            layers=self.layers, best_layer=self.best_layer, accuracy=self.accuracy, survived=self.survived, table=self.table
        )
        return found | (dict(steering=steering, steering_rises=steering["rises"]) if steering else {})


@torch.no_grad()
def extract(
    model: Any, tokenizer: Any, pairs: list[Pair], heldout: int, m: int, layer: int | None = None, kind: Kind = "svd",
    seed: int = 0, again: VHack | None = None,
) -> VHack:  # fmt: skip
    """Pairs -> VHack; the last `heldout` pairs only test the separation. `layer`: one layer instead of the band.
    again: an earlier direction, whose layers are kept, so that the two differ by what the model has learned alone; the separation
    is not required then.

    kind: "svd" (the method), "raw" (no denoising) or "random" (a Gaussian d, one draw a seed, through the same denoising).
    Raises UserError when held-out separation is 90 % or less, or m does not fit."""
    ids = [encode_pair(tokenizer, p) for p in pairs]
    h = last_hidden(model, [i for pair in ids for i in pair])  # [2 n, layers + 1, hidden], hacky and clean in turn
    hack, clean, n = h[0::2], h[1::2], len(pairs) - heldout
    depth = h.shape[1] - 1
    layers = [layer] if layer else band(depth)
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
    return VHack(denoised.cpu(), raw.norm().item(), layers, best, m, accuracy, survived, table, pairs_hash(pairs))


def save(vhack: VHack, path: str | Path, model_name: str) -> None:
    """d as safetensors, with the metadata that identify it."""
    facts = {f.name: getattr(vhack, f.name) for f in fields(VHack) if f.name != "d"}
    meta = {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    write_atomic(path, save_tensors({"d": vhack.d.cpu().contiguous()}, metadata={"model": model_name, **meta}))


def load(path: str | Path) -> VHack:
    """Reads what `save` wrote. Raises UserError when the file is missing, torn or of another kind."""
    try:
        with safe_open(path, "pt") as f:
            meta, d = f.metadata(), f.get_tensor("d")
        facts = {f.name: meta[f.name] if f.type == "str" else json.loads(meta[f.name]) for f in fields(VHack) if f.name != "d"}
        return VHack(d, **facts | {"table": [tuple(row) for row in facts["table"]]})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"cannot read the hack direction {path}: {e}") from None


# --- the lift to LoRA space -------------------------------------------------------------------------------------------------


def lift(model: Any, tokenizer: Any, pairs: list[Pair], vhack: VHack, vocab: int, construction: str = "jacobian") -> Tensor:
    """v [P], unit length (zero if nothing reaches the adapter): moving theta along +v makes the model hack more.

    jacobian  v = grad_theta of mean <h_hack - h_clean, d> over the pairs, at the current adapter
    outer     at the modules that write to the residual stream: d (A x)^T for B, (B^T d) x^T for A, x the mean input
              at the last token of the hacky completions
    contrast  v = mean over pairs of grad_theta [log p(hack branch) - log p(clean branch)]; d is not used
    """
    params = lora_parameters(model)
    if construction == "contrast":
        rows, _ = contrast_rows(model, hack_contrasts(tokenizer, pair_contexts(tokenizer, pairs), FORMS[:1]), vocab)
        v = rows.mean(0)
    elif construction == "outer":
        v = _outer_lift(model, [encode_pair(tokenizer, p)[0] for p in pairs], vhack.d)
    else:
        sequences = [encode_pair(tokenizer, p) for p in pairs]
        v = torch.zeros(sum(p.numel() for p in params.values()), device=model.device)
        costs = [max(LIFT_TOKENS // 16, 2 * max(map(len, pair))) for pair in sequences]
        for group in consecutive(costs, LIFT_TOKENS):  # a bounded graph; gradients add up
            h = last_hidden(model, [s for i in group for s in sequences[i]])[:, vhack.layers].mean(1)  # [2 pairs, hidden]
            along = ((h[0::2] - h[1::2]) @ vhack.d.to(h.device)).sum() / len(pairs)
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


STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)


@torch.no_grad()
def steer(
    model: Any, tokenizer: Any, vhack: VHack, problems: list[Problem], cfg: Config, strengths: Sequence[float] = STRENGTHS
) -> dict[str, Any]:
    """CAA-style check (Rimsky et al. 2023, arXiv 2312.06681): add s |gap| d at the extraction layers, at every position,
    and count how often 4 responses a prompt define the evaluator. {"rates": {strength: rate}, "rises": bool, "samples": [...]}"""
    samples, max_new_tokens = 4, min(cfg.max_new_tokens, 512)
    prompts = [encode_prompt(tokenizer, render_messages(p, evaluated_by())) for p in problems]
    tokens = STEER_TOKENS if model.device.type == "cuda" else 4 * STEER_TOKENS  # at a time: what a prefill takes has its bound
    rows = max(1, tokens // (max(map(len, prompts)) + max_new_tokens))
    sampler = TorchSampler(model, tokenizer, max_rows=rows, copied=False)
    layers = decoder_layers(model)
    result: dict = dict(rates={}, rises=False, samples=[])
    for s in strengths:
        push = s * vhack.gap * vhack.d / len(vhack.layers)

        def hook(_, __, out, push=push):
            h = out[0] if isinstance(out, tuple) else out
            h = h + push.to(h)
            return (h, *out[1:]) if isinstance(out, tuple) else h

        hooks = [layers[i - 1].register_forward_hook(hook) for i in vhack.layers]
        try:
            with adapter_off(model):
                out = sampler.generate(
                    prompts, n=samples, temperature=cfg.temperature, max_new_tokens=max_new_tokens, seed=cfg.seed
                )
        finally:
            for handle in hooks:
                handle.remove()
        texts = [decode(tokenizer, r.completion_ids) for r in out]
        codes = [parse_response(t) or "" for t in texts]
        defining = [t for t, c in zip(texts, codes, strict=True) if defines_evaluator(c, TRAIN_EVALUATOR)]
        result["rates"][str(s)] = len(defining) / len(texts)
        result["samples"].append(dict(strength=s, response=(defining or texts)[0]))
    base = result["rates"][str(strengths[0])]
    result["rises"] = max(result["rates"].values()) > base + 2 * math.sqrt(max(base * (1 - base), 0.01) / len(prompts) / samples)
    return result


def format_steering(result: dict[str, Any]) -> str:
    """The rates by strength, in one line."""
    rates = ", ".join(f"{s}: {r:.1%}" for s, r in result["rates"].items())
    return f"steering, share that defines the evaluator by strength: {rates} -> {'rises' if result['rises'] else 'NO RISE'}"


def check_steering(model: Any, tokenizer: Any, vhack: VHack, problems: list[Problem], cfg: Config) -> dict[str, Any]:
    """`steer` on cfg.steer_prompts problems, printed; its result. Where the rate does not rise it warns loudly, or
    raises UserError with cfg.require_steering."""
    result = steer(model, tokenizer, vhack, problems[: cfg.steer_prompts], cfg)
    print(format_steering(result))
    if not result["rises"]:
        warning = "steering along d does not raise the rate of defining the evaluator"
        if cfg.require_steering:
            raise UserError(f"{warning}; look at the samples of python vhack.py, or leave out --require-steering")
        print(f"WARNING: {warning}. The direction may mean little.", file=sys.stderr)
    return result


# --- a run's directions --------------------------------------------------------------------------------------------------------


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

    def contexts(self, run: Run) -> list[tuple[list[int], str]]:
        """The extraction pairs as contexts of the cone."""
        return pair_contexts(run.tokenizer, self.pairs[: len(self.pairs) - run.cfg.pairs_heldout])

    def moved(self, run: Run) -> VHack:
        """The hack direction again, at the current parameters: at the same layers, from the same pairs."""
        cfg = run.cfg
        return extract(run.model, run.tokenizer, self.pairs, cfg.pairs_heldout, cfg.m, cfg.layer, again=self.hack)

    def save(self, folder: Path, model: str) -> None:
        """v_hack.safetensors, and v_own.safetensors where the arm has one of its own."""
        if self.own is not self.hack:
            save(self.own, folder / "v_own.safetensors", model)
        save(self.hack, folder / "v_hack.safetensors", model)  # the last: where it is, both are


def directions(run: Run, kind: Kind, resume: Path | None = None) -> Directions:
    """The pairs, made anew (they are the same for the same seed), and the directions: a resumed run's, else extracted.

    kind: of the arm's own direction. Raises UserError as `extract` and `load` do."""
    cfg = run.cfg
    pairs = make_pairs(run.train, run.tokenizer, run.sampler, cfg.pairs, cfg.seed, cfg.max_new_tokens)
    run.sampler.sleep()  # on a GPU: extraction and steering have the card to themselves
    if resume and all((resume / f"v_{name}.safetensors").exists() for name in ("hack", *(["own"] if kind != "svd" else []))):
        hack = load(resume / "v_hack.safetensors")
        return Directions(pairs, hack, hack if kind == "svd" else load(resume / "v_own.safetensors"))

    def made(kind: Kind) -> VHack:
        return extract(run.model, run.tokenizer, pairs, cfg.pairs_heldout, cfg.m, cfg.layer, kind, cfg.seed)

    hack = made("svd")
    return Directions(pairs, hack, hack if kind == "svd" else made(kind))


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
