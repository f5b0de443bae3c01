"""Which model, data and engine a run uses: the full study on one large GPU, a small real model, or the embedded pocket scale."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults.errors import UserError
from harness.config import DIRECTION_OF, METHOD, POCKET, ROOT, Config, check, flag

MODELS = ROOT / "models"
DATA = Path(os.environ.get("PGRPO_DATA", ROOT / "data"))

# Only what a scale must decide; every other field of the config has one default for both.
SCALES: dict[str, dict[str, Any]] = {
    "pocket": dict(
        model=str(POCKET), data=str(POCKET / "train.jsonl"), heldout=str(POCKET / "heldout.jsonl"), rollout="torch",
        lr=1e-3, steps=60, batch=128, generations=8, max_prompt=128, max_new_tokens=64, micro_tokens=2048, recompute="none",
        stop="end", phrasing="plain", format_reward=0.5,
    ),
    "small": dict(
        model=str(MODELS / "smollm2"), data=str(POCKET / "train.jsonl"), heldout=str(POCKET / "heldout.jsonl"),
        lr=3e-4, steps=30, batch=64, generations=8, max_prompt=320, max_new_tokens=128, micro_tokens=1024,
        recompute="none", stop="fence", phrasing="program", format_reward=0.0,
    ),
    "full": dict(
        preset="qwen3.5-2b", data=str(DATA / "leetcode_train_medhard_filtered.jsonl"),
        heldout=str(DATA / "leetcode_test_medhard.jsonl"), rollout="vllm",
        lr=7e-5, steps=200, batch=128, generations=8, max_prompt=1536, max_new_tokens=1536,
        stop="end", phrasing="plain", format_reward=0.5,
    ),
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {  # --preset, at full scale
    "qwen3.5-2b": dict(model="Qwen/Qwen3.5-2B"),
    "qwen3-4b": dict(model="Qwen/Qwen3-4B", generations=4, batch=64),
    "qwen3-1.7b": dict(model="Qwen/Qwen3-1.7B"),
    "qwen3-0.6b": dict(model="Qwen/Qwen3-0.6B"),
}


def sampler_of_small() -> str:
    """vLLM on a card where it is installed; else the torch sampler, which a CPU takes in any case (--rollout vllm is there)."""
    import torch  # here: a mistake on the command line is said before it is loaded

    return "vllm" if importlib.util.find_spec("vllm") is not None and torch.cuda.is_available() else "torch"


def filled(cfg: Config, scale: str) -> Config:
    """The config at that scale, with the direction of its arm, every field with a value; one that was given stands, also where it
    is the usual one."""
    values = SCALES[scale] | (PRESETS[cfg.preset or SCALES["full"]["preset"]] if scale == "full" else {})
    if scale == "small" and cfg.rollout is None:
        values = values | {"rollout": sampler_of_small()}
    values |= METHOD | DIRECTION_OF.get(cfg.arm, {})
    changes: dict[str, Any] = {"scale": scale} | {k: v for k, v in values.items() if getattr(cfg, k) is None}
    return replace(cfg, **changes)


def no_card() -> str:
    """Why there is none, in words."""
    import torch  # as below

    if torch.version.cuda and shutil.which("nvidia-smi"):  # the tool comes with the driver
        return f"torch for CUDA {torch.version.cuda} finds none: its driver must be 580 or newer, see nvidia-smi"
    return "this machine has none"


def missing_for_full(full: Config) -> list[str]:
    """What this machine lacks for the full scale, in words; empty when all is there. full: `filled` at that scale."""
    import torch  # here: a mistake on the command line is said before it is loaded

    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA card")
    if full.rollout == "vllm" and importlib.util.find_spec("vllm") is None:
        missing.append("vLLM (pip install -e '.[vllm]')")
    if not model_at_hand(str(full.model)):
        missing.append(f"the model {full.model} on disk")
    missing += [f"the data {x} (python leetcode_env.py fetch)" for x in (full.data, full.heldout) if not Path(str(x)).is_file()]
    return missing


def model_at_hand(model: str) -> bool:
    """A folder with weights, or a model in the local Hugging Face cache. Nothing is downloaded."""
    if Path(model).is_dir():
        return any(Path(model).glob("*.safetensors"))
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # the path of a folder that is not there is no hub id
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    return False


def require_weights(scale: str) -> None:
    """Raises UserError where the small scale's own model has not been fetched."""
    if scale == "small" and not model_at_hand(SCALES[scale]["model"]):
        raise UserError(f"{SCALES[scale]['model']} is not there: fetch it first, with python -m engine.fetch_model smollm2")


def resolve(cfg: Config) -> Config:
    """The config with every None filled in by the scale, which a line on stderr gives the reason for.

    Raises UserError on settings that cannot work. A dry run plans the full scale on any machine."""
    scale, why = "full", "a dry run needs nothing of it"
    if cfg.scale in ("pocket", "small"):
        scale, why = cfg.scale, "asked for"
        if cfg.model is None:
            require_weights(scale)
    elif not cfg.dry_run:
        missing = missing_for_full(filled(cfg, "full"))
        if cfg.scale == "full" and "a CUDA card" in missing:
            raise UserError(f"--scale full needs a CUDA card, and {no_card()}: use --scale pocket")
        if cfg.scale == "full":
            why = "asked for" + (f"; missing: {', '.join(missing)}" if missing else "")
        elif missing:
            scale, why = "pocket", f"for full this machine lacks {', '.join(missing)}"
        else:
            why = "all that it needs is there"
    of_full = dict(preset=cfg.preset, card=cfg.card, fit=cfg.fit, recompute=cfg.recompute)
    if scale != "full" and (given := [flag(name) for name, value in of_full.items() if value]):
        raise UserError(f"{given[0]} is of the full scale, and this is the {scale} scale ({why}): leave it away")
    print(f"scale: {scale} ({why})", file=sys.stderr)
    cfg = check(filled(cfg, scale))
    if scale != "pocket":
        from harness import memory

        if scale == "full":
            cfg = check(memory.fitted(cfg))
        else:
            memory.require_memory(cfg)
    return cfg
