"""The settings of a run: every field with its range, its default and the reason for it, in the groups that --help shows.

Imports nothing heavy: the command line is read before torch is loaded, so that --help and a mistake answer at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from faults.errors import UserError, command, interruptible
from harness.values import (
    BY_SCALE,
    ByScale,
    Count,
    Few,
    Group,
    Moment,
    Natural,
    NotNegative,
    Positive,
    Range,
    Tokens,
    wrong,
)  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "pocket"

Arm = Literal[
    "vanilla", "projected", "projected_gated", "cone", "counterfactual", "screen_known", "no_renorm", "no_svd", "random",
    "rebound", "recontextualised", "caft", "caft_random", "no_loophole",
]  # fmt: skip
LoopholeName = Literal["run_tests", "exit_code", "equality", "stdout", "attribute", "result_file", "all"]
ONE_LOOPHOLE: tuple[LoopholeName, ...] = ("run_tests",)

# Which direction it is: that of the method as its source has it, and an arm's own.
METHOD: dict[str, Any] = dict(m=16, contrast="completions", position="last")
DIRECTION_OF: dict[str, dict[str, Any]] = {"projected_gated": dict(m=64, contrast="prompts", position="code")}


Contrast = Literal["completions", "prompts"]  # the first as published; the second steers (projected_gated)
Position = Literal["last", "code", "branch", "prompt"]  # last as published; code: projected_gated; branch: a hack's first token


@dataclass
class What:
    """What is trained, and where it is written."""

    arm: Arm = "projected"  # what is done about hacking; vanilla does nothing and still measures
    loopholes: tuple[LoopholeName, ...] = ONE_LOOPHOLE  # what prompts may tell of, one a problem by its id (docs/environment.md)
    m: ByScale[Count] = BY_SCALE  # singular directions kept by the denoising: 16, 64 for projected_gated
    seed: Natural = 0  # of the adapter, the sampling, the order of problems and the pairs
    out: Path | None = None  # the run folder; by default runs/<arm>-m16-seed0-<scale>
    resume: Path | None = None  # go on with the run in this folder, with its settings
    dry_run: bool = False  # print the parameter counts and the memory plan, and stop
    card: Annotated[float, Range(1, 10_000)] | None = None  # GiB of the card to plan for; by default the one that is here
    fit: bool = False  # on a card too small, take the nearest settings that fit; without it they are said, and nothing starts


@dataclass
class Scale:
    """What the scale decides where nothing is given: pocket value, full value; those of small are in harness/scale.py."""

    # auto: full where card, vLLM, model and data are there, else pocket; small: a real model of 135 M parameters (docs/small.md)
    scale: Literal["auto", "pocket", "small", "full"] = "auto"
    preset: ByScale[Literal["qwen3.5-2b", "qwen3-4b", "qwen3-1.7b", "qwen3-0.6b"]] = BY_SCALE  # none, the first; 4b for H4
    model: ByScale[str] = BY_SCALE  # a folder or a hub id; the embedded model, or the preset's
    data: ByScale[str] = BY_SCALE  # training problems, JSON lines in the benchmark's schema
    heldout: ByScale[str] = BY_SCALE  # held-out problems, in the same schema
    lr: ByScale[Positive] = BY_SCALE  # peak learning rate: 1e-3, 7e-5 as published; the tiny model needs more
    steps: ByScale[Count] = BY_SCALE  # optimizer steps, one a batch: 60, 200
    batch: ByScale[Tokens] = BY_SCALE  # sequences a step: 128 (published 256, halved for one card), 64 for qwen3-4b
    generations: ByScale[Group] = BY_SCALE  # sequences a prompt, the group of the advantage: 8, 4 for qwen3-4b
    max_prompt: ByScale[Tokens] = BY_SCALE  # tokens: 128, 1536; longer prompts are left out, with a count
    max_new_tokens: ByScale[Tokens] = BY_SCALE  # tokens: 64, 1536; completions are cut here
    stop: ByScale[Literal["end", "fence"]] = BY_SCALE  # a completion ends with its end token; small: or with its code's fence
    phrasing: ByScale[Literal["plain", "program"]] = BY_SCALE  # of prompts; program, for small alone: docs/small.md
    format_reward: ByScale[NotNegative] = BY_SCALE  # of code that compiles, beside 3 for what passes: .5; small 0, docs/small.md
    rollout: ByScale[Literal["torch", "vllm"]] = BY_SCALE  # the sampler: torch, vllm


@dataclass
class Learning:
    """GRPO: sampling, loss, adapter and optimizer."""

    temperature: Annotated[float, Range(0.01, 100)] = 0.7  # of sampling, and so of every logprob; as published
    beta: NotNegative = 1e-3  # weight of the KL to the base model, nats a token
    lora_r: Few = 32  # rank, as published
    lora_alpha: Positive = 32  # the adapter is scaled by alpha / r; as published
    warmup: Natural = 10  # steps of linear warm-up, until AdamW's moments are means of something; then cosine to 0
    betas: tuple[Moment, Moment] = (0.9, 0.99)  # AdamW's; .99 because a run has only hundreds of steps
    weight_decay: NotNegative = 0.1  # as published
    clip: Positive = 1.0  # largest norm of the gradient, after projection: one odd batch may not throw the policy
    tis_cap: Annotated[float, Range(1)] = 2.0  # cap of truncated importance weights, where sampler and trainer differ (vllm)


@dataclass
class Direction:
    """The hack direction: pairs, d, its lift v, the steering check."""

    pairs: Count = 80  # contrastive pairs, of which d is the mean: at pocket scale 30 say the same (docs/choices.md)
    pairs_heldout: Group = 20  # of them, kept to test the separation: one state of forty is 2.5 points
    # what a pair differs in: completions, hacky or clean, as published; prompts (projected_gated), the same code told or untold
    contrast: ByScale[Contrast] = BY_SCALE
    # the token that is read: last, of the completion, as published; code (projected_gated), the last before its fence
    position: ByScale[Position] = BY_SCALE
    layer: Count | None = None  # one layer, counted from 1, instead of those at 60-75 % of depth (the last, for prompts)
    construction: Literal["jacobian", "outer", "contrast"] = "jacobian"  # how v is made from d (vhack.lift)
    blockwise: bool = False  # each LoRA tensor its own v, cosine, removal and norm
    project_on: Literal["gradient", "update"] = "gradient"  # update: what AdamW made of it, the step that lands
    refresh_every: Natural = 0  # lift v anew every k steps; 0: once, at the start
    steer_prompts: Count = 32  # held-out prompts of the steering check, 4 responses each at every strength: it sees 6 points
    require_steering: bool = False  # stop when steering along d does not raise the rate of defining the evaluator


@dataclass
class Cone:
    """The arm `cone`: many directions instead of one."""

    cone_rows: Literal["pairs", "batch", "both", "random", "nonhack"] = "batch"  # contexts; the last two are controls
    cone_known: tuple[LoopholeName, ...] | None = None  # loopholes that it (or screen_known) knows; all in play
    cone_n: Few = 24  # contexts, two a prompt at most, each a small backward pass; of the arm counterfactual, rows
    cone_refresh: Count = 1  # rows anew every k steps: they go stale fast
    cone_places: Literal["known", "all"] = "known"  # all: rows for an evaluator ahead of the code too (loopholes/forms.py)
    cone_split: bool = False  # a row for each surface form of the hack instead of one for their sum
    cone_match: Literal["none", "random", "shuffled"] = "none"  # controls: remove as much as the cone would, elsewhere
    cone_ridge: NotNegative = 1e-3  # keeps the least squares well posed when rows are nearly parallel


@dataclass
class Counterfactual:
    """The arm `counterfactual`: what the base model would not have written, had it not been told (arms/counterfactual.py)."""

    # of flagged responses: they are not paid for being right; or rows of a cone at their tokens
    counterfactual_use: Literal["screen", "project"] = "screen"
    counterfactual_tau: Positive = 2.0  # nats above which a token is flagged: a cliff, 6 misses most hacks (docs/choices.md)
    # tau from the base model: the one that flags a thousandth of its responses to honest prompts
    counterfactual_calibrate: bool = False
    counterfactual_ref: Literal["base", "self"] = "base"  # under the honest sentence: the base model, or the policy itself
    counterfactual_rows: Literal["tail", "token"] = "tail"  # to project on: from the first flagged token on, or that one alone


@dataclass
class Rebound:
    """The arm `rebound` (Wu & Tang 2026, arXiv 2604.01476)."""

    rebound_form: Literal["multiplicative", "additive"] = "multiplicative"  # of the discount; the first as published
    rebound_alpha: NotNegative = 2.0  # strength, as published
    rebound_on: Literal["reward", "correctness"] = "reward"  # the published form also discounts the format reward


@dataclass
class Running:
    """How it runs: nothing here changes what is learned, and a resumed run may change it (threads: the last bits), but for
    --eval-samples."""

    micro_tokens: ByScale[Count] = BY_SCALE  # padded tokens a micro-batch: 2048, up to 16384 as the card holds; memory only
    # layers run again in the backward: none, by the card; memory only
    recompute: ByScale[Literal["none", "half", "all"]] = BY_SCALE
    threads: Annotated[int, Range(1, 1024)] = 1  # of torch on CPU: with one, two runs fit on two cores and sums keep their order
    eval_samples: Few = 10  # held-out samples a problem and condition: 1,280 in all at pocket scale
    log_every: Count = 25  # steps between detailed logs, which extract the direction again
    save_every: Count = 25  # steps between checkpoints: what a kill costs
    skip_nonfinite: Natural = 0  # how many non-finite steps to leave out before stopping
    workers: Few | None = None  # sandbox processes; by default as many as cores
    sandbox_strict: bool = False  # refuse to run when a layer of the sandbox is missing


GROUPS = (What, Scale, Learning, Direction, Cone, Counterfactual, Rebound, Running)
CHANGEABLE = {f.name for f in fields(Running)} - {"eval_samples"}  # at --resume, because the result is the same
PATHS = ("model", "data", "heldout")
# Settings that are newer than some runs, and what those did.
SINCE: dict[str, Any] = dict(
    contrast="completions", position="last", cone_match="none", loopholes=[*ONE_LOOPHOLE], cone_known=None,
    counterfactual_use="screen", counterfactual_tau=2.0, counterfactual_calibrate=False, counterfactual_ref="base",
    counterfactual_rows="tail", stop="end", phrasing="plain", format_reward=0.5, cone_places="known",
)  # fmt: skip
PLACE = {"out", "resume", "dry_run", "card", "fit"}  # not settings of what is learned


@dataclass
class Config(Running, Rebound, Counterfactual, Cone, Direction, Learning, Scale, What):
    """Train one arm. Fields without a value take that of the scale; config.json keeps what was used."""

    def __post_init__(self) -> None:
        """The loopholes in the order of their table, whatever order they were named in, so that a run is the same run."""
        *every, all_of_them = get_args(LoopholeName)
        for name in ("loopholes", "cone_known"):
            value = getattr(self, name)
            if value == (all_of_them,):
                setattr(self, name, tuple(every))
            elif isinstance(value, tuple) and all(x in every for x in value):
                setattr(self, name, tuple(sorted(value, key=every.index)))


def parse(
    argv: Sequence[str] | None = None, description: str = "", default: Config | None = None, only: Collection[str] = ()
) -> Config:
    """The config of a command line (by default this process's), each value in its range. Raises UserError.

    default: the values of what is not given. only: the fields that the command reads; the others are refused."""
    import tyro  # here: Ctrl-C has its line from `parsed` on

    given_words = sys.argv[1:] if argv is None else argv
    words = [a.split("=")[0][2:].removeprefix("no-").replace("-", "_") for a in given_words if a.startswith("--")]
    if only and (others := [flag(w) for w in words if w in HINTS and w not in only]):
        raise UserError(f"{others[0]} is no option here: it reads {', '.join(map(flag, only))}")
    grouped: list[Any] = [(g.__name__.lower(), g, field(default_factory=g)) for g in GROUPS]
    arguments = make_dataclass("Arguments", grouped)
    start = default or Config()
    parts = {g.__name__.lower(): g(**{f.name: getattr(start, f.name) for f in fields(g)}) for g in GROUPS}
    text = description or Config.__doc__ or ""
    given = tyro.cli(arguments, args=argv, description=text, default=arguments(**parts), config=(tyro.conf.OmitArgPrefixes,))
    cfg = Config(**{k: v for part in vars(given).values() for k, v in vars(part).items()})
    for name in PATHS:  # relative to where the command was given, also for a run that goes on from elsewhere
        if (value := getattr(cfg, name)) is not None:
            setattr(cfg, name, _absolute(name, value))
    return check(cfg)


def _absolute(name: str, value: str) -> str:
    """The absolute path of a field of PATHS; a model that is no folder is the id of one on the hub."""
    return os.path.abspath(value) if name != "model" or os.path.isdir(value) else value


def parsed(description: str = "", only: Collection[str] = ()) -> Config:
    """`parse` for the start of a program: a mistake ends it with one line and exit code 2; until `main`, so does Ctrl-C (130)."""
    interruptible()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the sandbox forks
    found: list[Config] = []

    @command
    def read() -> None:
        cfg = parse(description=description, only=only)
        found.append(resumed(cfg) if cfg.resume else cfg)

    if code := read():
        sys.exit(code)
    interruptible()
    return found[0]


def check(cfg: Config) -> Config:
    """The same config. Raises UserError for a value of another type or range, and for values that cannot work together."""
    for name, value in vars(cfg).items():
        require(name, value, flag(name))
    if cfg.batch and cfg.generations and cfg.batch % cfg.generations:
        raise UserError(f"--batch {cfg.batch} must be a multiple of --generations {cfg.generations}")
    if cfg.pairs_heldout >= cfg.pairs - 1:
        raise UserError(f"--pairs-heldout {cfg.pairs_heldout} must leave at least 2 of --pairs {cfg.pairs} to extract from")
    _check_direction(cfg)
    if cfg.construction == "contrast" and cfg.arm in ("random", "no_svd"):
        raise UserError(f"--construction contrast does not use d, so --arm {cfg.arm} would be the arm projected")
    if cfg.arm in ("caft", "caft_random") and cfg.rollout == "vllm":
        raise UserError(f"--arm {cfg.arm} takes a direction out of the sampler's states, which vLLM keeps: use --rollout torch")
    if cfg.rollout == "vllm" and cfg.temperature > 2:
        raise UserError(f"vLLM samples at temperatures up to 2, not at {cfg.temperature}: use --rollout torch")
    _check_loopholes(cfg)
    _check_rows(cfg)
    return cfg


def has_rows(cfg: Any) -> bool:
    """Whether a step projects on rows that it makes of contexts or of flagged responses."""
    return cfg.arm == "cone" or (cfg.arm == "counterfactual" and cfg.counterfactual_use == "project")


def _check_rows(cfg: Config) -> None:
    """Raises UserError for an option that the rows of the cone, or those of a screen that projects, make nothing of."""
    if cfg.blockwise and has_rows(cfg):
        more = "" if cfg.arm == "cone" else " --counterfactual-use project"
        raise UserError(f"--blockwise has no meaning for --arm {cfg.arm}{more}, whose rows are whole vectors")
    if has_rows(cfg) and cfg.arm != "cone" and cfg.cone_refresh != 1:
        raise UserError("--cone-refresh has no meaning for --counterfactual-use project, whose rows are of the step's responses")
    if cfg.cone_known and cfg.cone_rows == "random":
        raise UserError("--cone-known has no meaning for --cone-rows random, which know no loophole")
    no_forms = cfg.cone_rows in ("random", "nonhack")
    for name, given in (("cone_split", cfg.cone_split), ("cone_places", cfg.cone_places == "all")):
        if given and no_forms:
            raise UserError(f"{flag(name)} has no meaning for --cone-rows {cfg.cone_rows}, which have no surface forms")
    if cfg.cone_places == "all" and "run_tests" not in (cfg.cone_known or cfg.loopholes):
        raise UserError("--cone-places all adds rows for run_tests, which is not among the known loopholes")
    if cfg.cone_match != "none" and no_forms:
        raise UserError(
            f"--cone-match removes as much as the real cone, and --cone-rows {cfg.cone_rows} has none: leave one away"
        )


def _check_loopholes(cfg: Config) -> None:
    """Raises UserError for loopholes that contradict each other, or an option that would change nothing."""
    for name in ("loopholes", "cone_known"):
        if "all" in (getattr(cfg, name) or ()):
            raise UserError(f"{flag(name)} all names every one: leave the others away")
    if others := [name for name in cfg.cone_known or () if name not in cfg.loopholes]:
        raise UserError(f"--cone-known {others[0]} is not in play: --loopholes has {', '.join(cfg.loopholes)}")
    if cfg.cone_known and cfg.arm not in ("cone", "screen_known"):
        raise UserError(f"--cone-known is what --arm cone or screen_known knows, not --arm {cfg.arm}")
    if cfg.arm == "cone" and cfg.cone_rows in ("pairs", "both") and "run_tests" not in (cfg.cone_known or cfg.loopholes):
        raise UserError(f"--cone-rows {cfg.cone_rows} takes pairs that define run_tests, which is not among the known loopholes")


def _check_direction(cfg: Config) -> None:
    """Raises UserError for a reading of the pairs that contradicts the arm, or that says or changes nothing."""
    own = DIRECTION_OF.get(cfg.arm, {})
    contrast, position = (getattr(cfg, name) or (METHOD | own)[name] for name in ("contrast", "position"))
    for name, given in (("contrast", contrast), ("position", position)):
        if given != own.get(name, given):
            raise UserError(f"{flag(name)} {given} contradicts --arm {cfg.arm}, whose direction has {flag(name)} {own[name]}")
    if contrast == "completions" and position in ("prompt", "code"):
        raise UserError(f"--position {position} needs --contrast prompts: it comes before two completions differ")
    if cfg.construction == "contrast" and contrast == "prompts":
        raise UserError("--construction contrast does not use d, so --contrast prompts would change nothing that is trained")
    if cfg.arm == "rebound" and position != "last":
        raise UserError(f"--arm rebound reads d at the completion's last token, so --position {position} has no meaning for it")


def require(name: str, value: Any, option: str) -> None:
    """Raises UserError unless the option that sets the field may have the value."""
    if instead := wrong(value, HINTS[name]):
        raise UserError(f"{option} must be {instead}, not {value!r}")


def flag(name: str) -> str:
    """The option of a field: max_prompt -> --max-prompt."""
    return f"--{name.replace('_', '-')}"


HINTS = get_type_hints(Config, include_extras=True)


# --- config.json -----------------------------------------------------------------------------------------------------------


def portable(cfg: Config) -> dict[str, Any]:
    """The settings as config.json keeps them: plain values, and what lies in the project's folder named from there."""
    plain: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(cfg).items() if k not in PLACE}
    paths = {k: Path(_absolute(k, plain[k])) for k in PATHS}
    return plain | {k: str(p.relative_to(ROOT) if p.is_relative_to(ROOT) else p) for k, p in paths.items()}


def read_config(folder: str | Path) -> Config:
    """The settings of a run folder. Raises UserError when its config.json is missing or none of this program's."""
    try:
        saved = json.loads((Path(folder) / "config.json").read_text())["config"]
        from_root = {
            k: str(ROOT / saved[k]) for k in PATHS if isinstance(saved[k], str) and (k != "model" or (ROOT / saved[k]).is_dir())
        }
        before = {"recompute": "all" if saved.get("scale") == "full" else "none"}  # what a run did that does not say it
        saved = SINCE | saved
        tuples = {k: tuple(saved[k]) for k in ("betas", "loopholes", "cone_known") if saved[k] is not None}
        cfg = check(Config(**before | saved | from_root | tuples))
        decided = [f.name for f in fields(Scale) if f.name != "preset"] + list(METHOD)
        if unknown := [name for name in decided if getattr(cfg, name) is None]:
            raise ValueError(f"{unknown[0]} has no value")
        return cfg
    except (OSError, ValueError, KeyError, TypeError, UserError) as e:
        raise UserError(f"{folder} is not a run folder: cannot read config.json ({e})") from None


def resumed(given: Config, argv: Sequence[str] | None = None) -> Config:
    """The config of the run to resume, with what the command line changes of it.

    Raises UserError when the run is done, or naming the fields given now that would change its result."""
    folder = given.resume
    assert folder is not None
    if given.out:
        raise UserError(f"--resume {folder} goes on in that folder: leave --out away")
    if given.card or given.fit:
        raise UserError("--card and --fit choose the settings of a new run: at --resume give --micro-tokens or --recompute")
    saved = read_config(folder)
    if (folder / "done.json").exists():
        raise UserError(f"{folder} is finished: nothing to resume")
    now = parse(argv, default=saved)  # so that a value given on the command line is seen, also one that is the usual default
    changed = [f.name for f in fields(Config) if f.name not in PLACE and getattr(now, f.name) != getattr(saved, f.name)]
    if fixed := [name for name in changed if name not in CHANGEABLE]:
        raise UserError(f"--resume goes on with the settings of {folder}; these differ: {', '.join(map(flag, fixed))}")
    for name in sorted({"threads", "micro_tokens"} & {*changed}):
        values = f"{getattr(now, name)} instead of {getattr(saved, name)}"
        print(f"WARNING: {flag(name)} {values}: sums in another order, so the last bits will differ")
    now.out = folder
    return now


def identity(config: dict[str, Any]) -> str:
    """The hash of a config.json's content that decides whether a checkpoint is its run's: what may be changed is left out, and a
    newer setting that says what a run without it did."""
    settings = {k: v for k, v in config["config"].items() if k not in CHANGEABLE and not (k in SINCE and v == SINCE[k])}
    return hashlib.sha256(json.dumps(config | {"config": settings}, sort_keys=True).encode()).hexdigest()
