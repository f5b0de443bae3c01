"""Which direction steers? Contrasts x positions x layers x m x strengths, on seeds that are never reported; one Markdown table.

    python -m study.search                  # at pocket scale, some 12 minutes on one core
    python -m study.search --scale small --seeds 100 --positions last code --layers 20 30 --strengths 1 2 --prompts 24

Of each direction: whether it reads hacking (held-out separation), whether it writes it (the rate of defining the evaluator with
so many gaps of d added), and whether its lift has to do with what GRPO does (its cosine with the gradient of a vanilla run that
has begun to hack). Started again with the same options it goes on where it stopped. docs/choices.md has the outcome.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from faults.errors import UserError, command, interruptible

if __name__ == "__main__":
    interruptible()

import torch
import tyro
from torch import Tensor

import grpo
import vhack as vh
from arms.pairs import Pair, make_pairs, pairs_hash
from arms.steering import SAMPLES, rises, steer
from engine.lora import adapter_off, flatten_grads, load_adapter, lora_parameters, merged_weights
from engine.model import decode, decoder_layers, encode_prompt
from faults.files import locked, write_atomic, write_json
from harness.config import Config, Range, check, flag
from harness.memory import STEER_TOKENS, model_config
from harness.scale import filled, require_weights, resolve
from harness.schedule import batch_problems, sampling_seed
from harness.setup import Run, hashes, open_run
from leetcode_env import LeetCodeEnv, render_messages
from loopholes import evaluated_by
from projection import cos_align

# What comes before two completions differ says nothing about them.
READINGS = (
    ("completions", "branch"), ("completions", "last"),
    ("prompts", "prompt"), ("prompts", "code"), ("prompts", "branch"), ("prompts", "last"),
)  # fmt: skip
UNREPORTED = 100  # seeds from there on are never in the study
MOST = dict(seeds=Range(UNREPORTED, 2**31 - 1), layers=Range(1, 4096), m=Range(1, 2**20), strengths=Range(0, 1000, above=True),
            prompts=Range(1, 100_000), steps=Range(1, 100_000))  # fmt: skip
Cell = dict[str, Any]  # one direction of one seed


@dataclass
class Search:
    """What is tried."""

    scale: Literal["pocket", "small", "full"] = "pocket"
    contrasts: tuple[Literal["completions", "prompts"], ...] = ("completions", "prompts")  # what the sides of a pair differ in
    # whose state is read: that of the last token of one of these
    positions: tuple[Literal["prompt", "code", "branch", "last"], ...] = ("prompt", "code", "branch", "last")
    seeds: tuple[int, ...] = (100, 101, 102, 103)  # of pairs, adapter and sampling; from 100 on
    layers: tuple[int, ...] = ()  # counted from 1; by default the four quarters of depth
    m: tuple[int, ...] = (16, 32, 64)  # singular directions kept; the raw direction is tried beside them
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)  # times the gap
    pairs: int = Config.pairs  # with those held out; a run's number by default
    prompts: int = 48  # held-out prompts of the steering, shared out over the seeds, 4 responses each at every strength
    steps: int = 9  # of the vanilla run at whose end the lifts are compared with its gradient; it hacks in 5 to 12 % then
    out: Path | None = None  # by default runs/search-SCALE

    @property
    def readings(self) -> list[tuple[str, str]]:
        """Those of READINGS that are asked for."""
        return [(c, p) for c, p in READINGS if c in self.contrasts and p in self.positions]


def check_options(options: Search) -> None:
    """UserError for a number out of its range, for a list with nothing in it, and for what the model has not."""
    for name, allowed in MOST.items():
        values = getattr(options, name)
        values = values if isinstance(values, tuple) else (values,)
        if wrong := [x for x in values if not allowed.holds(x)]:
            raise UserError(f"{flag(name)} must be {allowed}, not {wrong[0]}")
    if empty := [name for name in (*MOST, "contrasts", "positions") if name != "layers" and getattr(options, name) == ()]:
        raise UserError(f"{flag(empty[0])} names nothing")
    if not options.readings:
        raise UserError(f"up to --positions {' '.join(options.positions)} two completions are the same: add --contrasts prompts")
    if options.prompts < len(options.seeds):
        raise UserError(f"--prompts {options.prompts} cannot be shared out over {len(options.seeds)} seeds")
    check(replace(Config(), pairs=options.pairs))
    require_weights(options.scale)
    config = model_config(str(filled(Config(), options.scale).model))
    for name, most, what in (("layers", config.num_hidden_layers, "depth"), ("m", config.hidden_size, "width")):
        if wrong := [x for x in getattr(options, name) if x > most]:
            raise UserError(f"{flag(name)} must lie between 1 and the model's {what} {most}, not {wrong[0]}")
    if config.hidden_size in options.m:
        raise UserError(f"--m {config.hidden_size} keeps the whole direction, and the raw one is tried anyway: leave it away")


def begun(seed: int, options: Search, out: Path) -> Run:
    """The run of a seed: a vanilla run, trained for some steps and kept in `out`, with its base model's sampler."""
    folder = out / f"vanilla-seed{seed}"
    usual = Config(
        arm="vanilla", seed=seed, steps=options.steps, pairs=options.pairs, eval_samples=1, steer_prompts=1, out=folder
    )
    cfg = resolve(replace(usual, scale=options.scale))
    if not (folder / "done.json").exists():
        grpo.train(replace(cfg, resume=folder) if (folder / "config.json").exists() else cfg)
    return open_run(folder, base=True)


def trained(run: Run, folder: Path) -> Tensor:
    """The adapter of `folder` in place of the fresh one, and the ascent direction g [P] of a batch sampled with it."""
    cfg, params = run.cfg, lora_parameters(run.model)
    load_adapter(run.model, folder / "adapter")
    run.sampler.load_weights(partial(merged_weights, run.model), version=cfg.steps)
    problems = batch_problems(run.train, cfg.steps, cfg)
    rollouts = run.sampler.generate(
        [encode_prompt(run.tokenizer, render_messages(p, evaluated_by())) for p in problems],
        n=cfg.generations, temperature=cfg.temperature, max_new_tokens=cfg.max_new_tokens,
        seed=sampling_seed(cfg.steps, cfg, 0, 1),
    )  # fmt: skip
    run.sampler.sleep()
    with LeetCodeEnv(cfg.workers, format_reward=cfg.format_reward) as env:
        each = [p for p in problems for _ in range(cfg.generations)]
        texts = [decode(run.tokenizer, r.completion_ids) for r in rollouts]
        grades = env.grade([(p, text, evaluated_by()) for p, text in zip(each, texts, strict=True)])
    advantages = grpo.group_advantages(torch.tensor([g.reward for g in grades]), cfg.generations)
    grpo.reference(run.model, rollouts, cfg, run.vocab)
    sums = grpo.backward(run.model, rollouts, advantages, cfg, run.vocab)
    return -flatten_grads(params) / sums["tokens"]


def directions(run: Run, pairs: list[Pair], contrast: str, position: str, options: Search) -> Iterator[vh.VHack]:
    """Every direction of one reading of the base model, as a run would extract it: by layer, then by m, with the raw one last."""
    n = len(pairs) - run.cfg.pairs_heldout
    with adapter_off(run.model):
        states = vh.pair_states(run.model, run.tokenizer, pairs, contrast, position)  # [pairs, layers + 1, hidden] each
    depth = len(decoder_layers(run.model))
    for layer in options.layers or sorted({max(1, depth * k // 4) for k in (1, 2, 3, 4)}):
        up, down = (h[:, layer] for h in states)  # [pairs, hidden] each
        accuracy, _ = vh.separation(up[:n], down[:n], up[n:], down[n:])
        raw = (up - down)[:n].mean(0)
        found = vh.VHack(
            raw.cpu() / raw.norm().cpu(), raw.norm().item(), [layer], layer, len(raw), accuracy, 1.0, [], pairs_hash(pairs),
            contrast, position,
        )  # fmt: skip
        for m in options.m:
            d, survived = vh.denoise(raw, decoder_layers(run.model)[layer - 1].mlp.down_proj.weight, m)
            yield replace(found, d=d.cpu(), m=m, survived=survived)
        yield found


def search_seed(seed: int, options: Search, out: Path) -> None:
    """A file of cells in `out` for each reading of this seed, where there is none yet."""
    left = [reading for reading in options.readings if not _file(out, seed, *reading).exists()]
    if not left:
        return
    run = begun(seed, options, out)
    with contextlib.closing(run.sampler):
        cfg, n = run.cfg, run.cfg.pairs - run.cfg.pairs_heldout
        pairs = make_pairs(run.train, run.tokenizer, run.sampler, cfg.pairs, cfg.seed, cfg.max_new_tokens)
        g = trained(run, out / f"vanilla-seed{seed}")
        problems = run.problems[: options.prompts][options.seeds.index(seed) :: len(options.seeds)]  # other ones for each seed
        steered = partial(steer, run.model, run.tokenizer, problems=problems, cfg=cfg, tokens=STEER_TOKENS)
        lifted = partial(vh.lift, run.model, run.tokenizer, pairs[:n], vocab=run.vocab)
        base: list[float] = []
        for contrast, position in left:
            found: list[Cell] = []
            noise = torch.Generator().manual_seed(seed)
            for of in directions(run, pairs, contrast, position, options):
                if not found or found[-1]["layer"] != of.layers[0]:  # once a layer
                    cos_random = cos_align(g, lifted(vhack=replace(of, d=torch.randn(of.d.shape, generator=noise))))
                base = base or [*steered(vhack=of, strengths=(0.0,))["rates"].values()]  # the same for all directions
                rates = [*base, *steered(vhack=of, strengths=options.strengths)["rates"].values()]
                found.append(dict(
                    seed=seed, contrast=contrast, position=position, layer=of.layers[0], m=of.m, separation=of.accuracy,
                    gap=of.gap, survived=of.survived, n=len(problems) * SAMPLES, rates=rates,
                    cos=cos_align(g, lifted(vhack=of)), cos_random=cos_random,
                ))  # fmt: skip
            write_json(_file(out, seed, contrast, position), found)
            print(f"seed {seed}: {contrast}, {position}: {len(found)} directions", flush=True)


def _file(out: Path, seed: int, contrast: str, position: str) -> Path:
    return out / f"seed{seed}-{contrast}-{position}.json"


# --- the table ---------------------------------------------------------------------------------------------------------------


def pooled(cells: Sequence[Cell]) -> list[Cell]:
    """A row for each direction, over the seeds: rates of all their responses, means of the rest; rises by the run's own gate."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in ("contrast", "position", "layer", "m")), []).append(cell)
    rows = []
    for (contrast, position, layer, m), group in groups.items():
        n = sum(cell["n"] for cell in group)
        rates = [sum(cell["n"] * cell["rates"][i] for cell in group) / n for i in range(len(group[0]["rates"]))]
        means = {key: fmean(cell[key] for cell in group) for key in ("separation", "gap", "survived", "cos")}
        means["cos_random"] = fmean(abs(cell["cos_random"]) for cell in group)
        rows.append(
            dict(contrast=contrast, position=position, layer=layer, m=m, **means, n=n, rates=rates, rises=rises(rates, n))
        )
    return rows


def table(rows: Sequence[Cell], strengths: Sequence[float]) -> str:
    """The rows in Markdown. A rate has its binomial standard error behind it, in points too."""
    head = ["contrast", "position", "layer", "m", "separation", "gap", "survived", *(f"{s:g}" for s in (0, *strengths)),
            "rises", "cos", "random"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        errors = (math.sqrt(r * (1 - r) / row["n"]) for r in row["rates"])
        rates = [f"{100 * r:.0f} ± {100 * e:.0f}" for r, e in zip(row["rates"], errors, strict=True)]
        m = "raw" if row["survived"] == 1.0 else row["m"]
        facts = [f"{row['separation']:.0%}", f"{row['gap']:.1f}", f"{row['survived']:.0%}"]
        cosines = [f"{row['cos']:+.3f}", f"{row['cos_random']:.3f}"]
        lines.append([row["contrast"], row["position"], row["layer"], m, *facts, *rates, "yes" if row["rises"] else "", *cosines])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def chosen(rows: Sequence[Cell]) -> str:
    """The directions that rise, in a line a reading: of each layer the largest m that does, and where the rate is highest."""
    up = [row for row in rows if row["rises"]]
    if not up:
        return "No direction rises."
    best = max(up, key=lambda row: max(row["rates"]))
    lines = []
    for place in dict.fromkeys((r["contrast"], r["position"], r["layer"]) for r in up):
        denoised = [r["m"] for r in up if (r["contrast"], r["position"], r["layer"]) == place and r["survived"] < 1]
        lines.append("{}, {}, layer {}: ".format(*place) + (f"m = {', '.join(map(str, denoised))}" if denoised else "raw alone"))
    most = f"{best['contrast']}, {best['position']}, layer {best['layer']}, {'raw' if best['survived'] == 1 else best['m']}"
    return "Rises at: " + "; ".join(lines) + f". The highest rate, {max(best['rates']):.0%}, is that of {most}."


@command
def main(argv: list[str] | None = None) -> None:
    """The command line."""
    options = tyro.cli(Search, prog="python -m study.search", description=__doc__, args=argv)
    check_options(options)
    out = options.out or Path("runs") / f"search-{options.scale}"
    with locked(out):
        about = dict(
            options={k: v for k, v in asdict(options).items() if k != "out"}, hashes=hashes(filled(Config(), options.scale))
        )
        _keep_to_one(out / "search.json", json.loads(json.dumps(about)))
        for seed in options.seeds:
            search_seed(seed, options, out)
        files = [_file(out, seed, *reading) for seed in options.seeds for reading in options.readings]
        cells = [cell for file in files for cell in json.loads(file.read_text())]
        rows = pooled(cells)
        text = f"{table(rows, options.strengths)}\n\n{chosen(rows)}\n"
        write_atomic(out / "search.md", text.encode())
    print(text)


def _keep_to_one(path: Path, about: dict[str, Any]) -> None:
    """Raises UserError where the folder holds a search with other options, or of another model or data."""
    if path.exists() and (before := json.loads(path.read_text())) != about:
        raise UserError(f"{path.parent} holds a search with {before}, not {about}; choose another --out")
    write_json(path, about)


if __name__ == "__main__":
    sys.exit(main())
