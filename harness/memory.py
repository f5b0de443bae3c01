"""What a run needs before it is started: parameter counts, tokens a step, and a memory plan by item, from shapes alone.

    rollout phase:   trainer's weights + adapter and its companions + vLLM's weights + cache
    start phase:     trainer's weights + adapter and its companions + extraction and steering   (vLLM sleeps)
    training phase:  trainer's weights + adapter and its companions + activations + logits      (vLLM sleeps)

Every number is arithmetic on the config, but two allowances that say so. No weights are loaded: the model is built on
the meta device. docs/performance.md says which of these numbers were ever measured.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from engine.fetch_model import available_memory
from engine.logprob import BLOCK_ELEMENTS_CUDA
from engine.lora import TARGETS
from engine.model import mend_vllm_environment
from faults.errors import UserError, one_line
from harness.config import Config, flag, has_rows
from loopholes.forms import ELSEWHERE, OPENINGS

GIB = 2**30
LIFT_TOKENS = 16_384  # padded tokens of the pairs whose graph is held at a time, 16 pairs at most (vhack.lift)
LIFT_BYTES_CPU = 2 * GIB  # of that graph, where a run shares the machine's memory with others
STEER_TOKENS = 16_384  # tokens that the steering check samples at a time on a card, prompts included (vhack.steer)
EXTRACTION_TOKENS = 8192  # padded tokens whose states of every layer are held at a time (engine.forward.last_hidden)
CONE_TOKENS = 8192  # padded tokens of the cone's rows that go through the model together (arms.cone.joined_rows)
USABLE = 0.95  # of a card: the rest goes to the CUDA context and to fragmentation
ROOMY = (
    0.75  # of a card: what a plan without full recomputation may take, whose largest item is an estimate that no card has seen
)
BF16, F32 = 2, 4  # bytes

# The published shapes, for a machine without the models. A config on disk always goes first.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen3-0.6B": ("qwen3", dict(  # the model cards of the family, and their config.json
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    )),
    "Qwen/Qwen3-1.7B": ("qwen3", dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    )),
    "Qwen/Qwen3-4B": ("qwen3", dict(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    )),
    # Model card of Qwen/Qwen3.5-2B, from memory: width 2,048 and the vocabulary were confirmed elsewhere, and 24 layers, 8
    # and 2 heads of 256 are those of the 0.8B sibling. The feed-forward width, 6,144, is the one number to check first.
    "Qwen/Qwen3.5-2B": ("qwen3_5_text", dict(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
        head_dim=256, linear_num_key_heads=16, linear_num_value_heads=16, linear_key_head_dim=128,
        linear_value_head_dim=128, vocab_size=248320, tie_word_embeddings=True,
    )),
}  # fmt: skip

PHASES = ("start", "rollout", "training")
RECOMPUTED = {"none": 0.0, "half": 0.5, "all": 1.0}  # --recompute: the share of layers that keep one vector a token
# What --micro-tokens and --recompute are where they are not given: the first that fits. Memory only, the result is the same.
CHOICES = ((16_384, "none"), (16_384, "half"), (16_384, "all"), (8192, "all"), (4096, "all"))
# What --fit takes of them, one after the other, until the run fits. Each changes what is learned, so none is taken unasked.
SMALLER: tuple[dict[str, Any], ...] = (
    dict(max_new_tokens=1024),
    dict(cone_n=16),
    dict(max_new_tokens=768),
    dict(cone_n=8),
    dict(lora_r=16),
)


class Item(NamedTuple):
    """One line of the plan."""

    name: str
    gib: float
    phases: str  # "all", or the phase in which it is on the card


def model_config(model: str, fetch: bool = False) -> Any:
    """The text config of a model: from its folder or the local cache, else the published shapes; with `fetch`, at last from the
    hub. Raises UserError."""
    mend_vllm_environment()
    from transformers import AutoConfig

    try:
        here = os.path.isdir(model) or model in SHAPES or not fetch
        return AutoConfig.from_pretrained(model, local_files_only=here).get_text_config()
    except Exception as e:  # a damaged file is any of a dozen exceptions
        if os.path.isdir(model):
            raise UserError(f"cannot read the config of the model {model} ({one_line(e)})") from None
        if model not in SHAPES:
            raise UserError(f"no config of {model} on disk; without one the plan knows {' and '.join(SHAPES)}") from None
    kind, shapes = SHAPES[model]
    return AutoConfig.for_model(kind, **shapes)


def cone_rows(cfg: Any, split: bool = True) -> int:
    """Rows of the cone in a step: one a context and place of its loophole's hack, or one for every form of it (`split`); of a
    screen that projects, one a flagged response; 0 for the other arms. Loopholes have even shares of the contexts."""
    if not has_rows(cfg):
        return 0
    if cfg.arm == "counterfactual" or cfg.cone_rows in ("random", "nonhack"):
        return int(cfg.cone_n)
    known = cfg.cone_known or cfg.loopholes
    more = ELSEWHERE if cfg.cone_places == "all" else {}
    places = [[*OPENINGS[name].values(), *more.get(name, {}).values()] for name in known]
    each = [sum(len(forms) if split else 1 for forms in of_one) for of_one in places]
    contexts = cfg.cone_n * (2 if cfg.cone_rows == "both" else 1)
    return math.ceil(contexts * sum(each) / len(each))


def cone_tokens(config: Any, cfg: Any) -> int:
    """Padded tokens of the cone's rows that go through the model together, one row at least; 0 for the other arms. A row's
    branches share their context, but not where layers of linear attention want a sequence each."""
    if not has_rows(cfg):
        return 0
    sequences = 1
    if cfg.arm == "cone" and layer_kinds(config)[1]:
        sequences += 1 if cfg.cone_split else max(len(forms) for name in cfg.loopholes for forms in OPENINGS[name].values())
    return max(min(CONE_TOKENS, 4 * cfg.micro_tokens), sequences * (cfg.max_prompt + cfg.max_new_tokens))


def counts(config: Any, lora_r: int) -> dict[str, int]:
    """Parameters: of the base (tied weights once), of its matrices that multiply every token, of the adapter (= the
    length of the flat vector)."""
    fields = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    return _counts(config.model_type, json.dumps(fields, default=str), lora_r)


@lru_cache(maxsize=32)
def _counts(kind: str, config: str, lora_r: int) -> dict[str, int]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **json.loads(config)))
    linears = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    adapted = [w for n, w in linears.items() if re.fullmatch(TARGETS, n)]
    return dict(
        base=sum(p.numel() for p in model.parameters()),
        matmul=sum(w.numel() for w in linears.values()),
        lora=sum(lora_r * (w.shape[0] + w.shape[1]) for w in adapted),
    )


def layer_kinds(config: Any) -> tuple[int, int]:
    """(layers of full attention, layers of linear attention)"""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    linear = sum(kind == "linear_attention" for kind in kinds)
    return len(kinds) - linear, linear


def kv_bytes_per_token(config: Any) -> int:
    """Keys and values in bf16 of one token over the layers of full attention."""
    full, _ = layer_kinds(config)
    return full * 2 * config.num_key_value_heads * config.head_dim * BF16


def state_bytes_per_sequence(config: Any) -> int:
    """The recurrent states (float32) and convolution states (bf16) of the layers of linear attention."""
    _, linear = layer_kinds(config)
    if not linear:
        return 0
    keys, values = (getattr(config, f"linear_num_{k}_heads") * getattr(config, f"linear_{k}_head_dim") for k in ("key", "value"))
    return linear * (values * config.linear_key_head_dim * F32 + (2 * keys + values) * config.linear_conv_kernel_dim * BF16)


def activation_bytes_per_token(config: Any) -> tuple[int, int]:
    """(the one residual vector that checkpointing keeps a layer, everything that one layer keeps while it is recomputed).

    The second counts, in bf16: about ten residual-width tensors (norms in float32, inputs of the adapters), five of the
    feed-forward width, and four of the widths of q, k, v and the output; in a layer of linear attention those again in
    float32, which its reference implementation works in."""
    attention = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    if layer_kinds(config)[1]:
        linear = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        linear += 2 * config.linear_num_value_heads * config.linear_value_head_dim
        attention = max(attention, 3 * linear)
    return config.hidden_size * BF16, (10 * config.hidden_size + 5 * config.intermediate_size + 4 * attention) * BF16


def lift_tokens(config: Any, device: str) -> int:
    """LIFT_TOKENS, or what a CPU has room for: 135 M parameters would keep 12 GB of float32 activations otherwise."""
    layer = activation_bytes_per_token(config)[1] * F32 // BF16
    return LIFT_TOKENS if device == "cuda" else min(LIFT_TOKENS, LIFT_BYTES_CPU // (config.num_hidden_layers * layer))


def bytes_on_cpu(config: Any, cfg: Config) -> float:
    """What a run of a real model takes of a machine without a card, in float32 (estimate): weights of trainer and sampler,
    adapter and flat vectors, the cone's rows, the sampler's cache, the largest graph, and 1 GiB of Python with its libraries."""
    n, longest = counts(config, cfg.lora_r), cfg.max_prompt + cfg.max_new_tokens
    tokens = max(cfg.micro_tokens, longest, cone_tokens(config, cfg) // 2)  # a row's branches share half of them at least
    graph = tokens * config.num_hidden_layers * activation_bytes_per_token(config)[1] * F32 // BF16
    cache = cfg.batch * longest * kv_bytes_per_token(config) * F32 // BF16
    return F32 * (2 * n["base"] + (8 + cone_rows(cfg, cfg.cone_split)) * n["lora"]) + cache + max(graph, LIFT_BYTES_CPU) + GIB


def require_memory(cfg: Config) -> None:
    """Raises UserError where this machine has less memory free than a run of a real model takes without a card."""
    if torch.cuda.is_available():
        return
    needed, free = bytes_on_cpu(model_config(str(cfg.model)), cfg) / 1e9, available_memory() / 1e9
    if free < needed:
        raise UserError(
            f"--scale {cfg.scale} takes about {needed:.1f} GB of memory here, and {free:.1f} GB are free: end what else runs, or "
            "give a smaller --micro-tokens or --batch"
        )


def memory_plan(config: Any, cfg: Config, at_once: int | None = None) -> list[Item]:
    """The plan by item. The torch sampler holds its own weights all the time; vLLM's sleep but in the rollout phase.

    at_once: sequences whose keys and values the sampler holds together, the whole batch by default; vLLM lets others wait."""
    n, layers = counts(config, cfg.lora_r), config.num_hidden_layers
    flat, weights = n["lora"] * F32, n["base"] * BF16
    longest, at_once = cfg.max_prompt + cfg.max_new_tokens, at_once or cfg.batch
    micro = max(cfg.micro_tokens, longest, cone_tokens(config, cfg))  # a single long sequence is a micro-batch of its own
    kept, whole = activation_bytes_per_token(config)
    share = RECOMPUTED[cfg.recompute]
    for_backward = layers * (share * kept + (1 - share) * whole)  # bytes a token
    rows = cone_rows(cfg, split=cfg.cone_split)
    engine = "torch sampler" if cfg.rollout == "torch" else "vLLM"
    cache, blocks = longest * kv_bytes_per_token(config), 3 * BLOCK_ELEMENTS_CUDA * F32
    lifted = flat * (cfg.pairs - cfg.pairs_heldout) * (cfg.construction == "contrast")
    items = [
        ("trainer: base weights, bf16", weights, "all"),
        ("adapter, its gradient and AdamW's two moments, float32", 4 * flat, "all"),
        ("flat vectors: v, g, g' and the step", 4 * flat, "all"),
        (f"cone: {rows} rows", rows * flat, "training"),
        ("cone: rows of --cone-match random", rows * flat * (cfg.cone_match == "random"), "training"),
        (f"activations kept for the backward, {cfg.recompute} recomputed", micro * for_backward, "training"),
        ("activations of the layer at work (estimate)", micro * whole, "training"),
        ("hidden states and blocks of logits", blocks + micro * config.hidden_size * (2 * BF16 + F32), "training"),
        (f"{engine}: base weights, bf16", weights, "rollout" if engine == "vLLM" else "all"),
        (f"{engine}: keys and values of {at_once} x {longest} tokens", at_once * cache, "rollout"),
        (f"{engine}: states of linear attention", at_once * state_bytes_per_sequence(config), "rollout"),
        (f"{engine}: activations and CUDA graphs (allowance)", 3 * GIB, "rollout"),
        ("extraction: states of every layer", max(EXTRACTION_TOKENS, longest) * (layers + 1) * kept, "start"),
        ("lift: activations kept for the backward", LIFT_TOKENS * for_backward, "start"),
        ("lift: rows of --construction contrast", lifted, "start"),
        ("lift again: rows of --construction contrast", lifted * (cfg.refresh_every > 0), "training"),
        ("steering check: activations of a prefill (estimate)", STEER_TOKENS * whole, "start"),
        (f"steering check: keys and values of {STEER_TOKENS:,} tokens", STEER_TOKENS * kv_bytes_per_token(config), "start"),
    ]  # fmt: skip
    return [Item(name, size / GIB, phases) for name, size, phases in items if size]


def plan_for(config: Any, cfg: Config, card_gib: float) -> list[Item]:
    """The plan with as many sequences at once as the card holds: the batch, or a half, a quarter or an eighth of it."""
    plans = [memory_plan(config, cfg, max(1, cfg.batch // k)) for k in (1, 2, 4, 8)]
    return next((items for items in plans if peak(items, "rollout") <= USABLE * card_gib), plans[-1])


def fitted(cfg: Config) -> Config:
    """The config with --micro-tokens and --recompute chosen for the card, where they were not given; with --fit also with the
    nearest settings that fit it. Raises UserError for settings that do not fit, which says those that would; a dry run only
    plans, and says them on stderr."""
    config, card = model_config(cfg.model, fetch=not cfg.dry_run), cfg.card or card_memory_gib()

    def chosen(cfg: Config) -> tuple[Config, list[str]]:
        for micro, recompute in CHOICES:
            tried = replace(cfg, micro_tokens=cfg.micro_tokens or micro, recompute=cfg.recompute or recompute)
            items = plan_for(config, tried, card)
            said, roomy = advice(items, card), max(peak(items, p) for p in ("start", "training")) <= ROOMY * card
            if not said and (roomy or tried.recompute == "all" or cfg.recompute):
                break
        return tried, said

    best, said = chosen(cfg)
    if not said:
        return best
    smaller, taken = cfg, dict[str, Any]()
    for change in SMALLER:
        change = {k: v for k, v in change.items() if v < getattr(smaller, k) and (k != "cone_n" or has_rows(cfg))}
        smaller, taken = replace(smaller, **change), taken | change
        fits, still = chosen(smaller)
        if not still:
            options = " ".join(f"{flag(k)} {v}" for k, v in taken.items())
            if cfg.fit:
                print(f"--fit: {options}", file=sys.stderr)
                return fits
            if cfg.dry_run:
                print(f"it would fit with {options}: give them, or --fit", file=sys.stderr)
                return best
            raise UserError(f"{said[0]}; it would fit with {options}: give them, or --fit")
    if cfg.dry_run and not cfg.fit:
        return best
    hint = "" if cfg.model == "Qwen/Qwen3-0.6B" else ": a smaller model may, --preset qwen3-0.6b"
    raise UserError(f"{said[0]}; no smaller setting makes it fit{hint}")


def peak(items: list[Item], phase: str) -> float:
    """GiB on the card in "start", "rollout" or "training"."""
    return sum(item.gib for item in present(items, phase))


def present(items: list[Item], phase: str) -> list[Item]:
    """The items that are on the card in a phase."""
    return [item for item in items if item.phases in ("all", phase)]


def vllm_share(items: list[Item], card_gib: float) -> float:
    """The share of the card to give to vLLM: `VLLMSampler(gpu_memory=...)`. Its cache takes what its other items leave.

    What it needs, and .3 where the trainer leaves that much: a hybrid model's cache comes in large blocks that also hold the
    states of its linear layers, and a tight one makes sequences wait."""
    need = sum(item.gib for item in items if item.phases == "rollout")
    free = USABLE * card_gib - sum(item.gib for item in items if item.phases == "all")
    return min(0.9, max(need, min(0.3 * card_gib, free)) / card_gib)


def advice(items: list[Item], card_gib: float) -> list[str]:
    """What to change, the item that helps most first; empty when both phases fit."""
    changes = {
        "vLLM: keys": "a smaller --batch or --max-new-tokens",
        "torch sampler: keys": "a smaller --batch or --max-new-tokens",
        "cone": "a smaller --cone-n, or a smaller --lora-r",
        "lift": "a smaller --pairs, or a smaller --lora-r",
        "activations": "a smaller --micro-tokens (not below max_prompt + max_new_tokens)",
        "adapter": "a smaller --lora-r",
        "flat": "a smaller --lora-r",
        "trainer": "a smaller model",
        "steering": "a smaller model",
        "vLLM: base": "a smaller model",
        "torch sampler: base": "--rollout vllm, which sleeps during training",
    }
    said = []
    for phase in PHASES:
        if (need := peak(items, phase)) <= USABLE * card_gib:
            continue
        largest = sorted(present(items, phase), key=lambda i: -i.gib)
        hints = [hint for item in largest for start, hint in changes.items() if item.name.startswith(start)]
        said.append(f"{phase} needs {need:.1f} GiB of a card of {card_gib:.0f}: {'; '.join(dict.fromkeys(hints[:3]))}")
    return said


def card_memory_gib(default: float = 96.0) -> float:
    """Memory of the first CUDA card in GiB; without one, that of the card that the full scale is made for."""
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else default


def report(model: str, cfg: Config) -> str:
    """The text that `python grpo.py --dry-run` prints. Raises UserError when the model's shapes are not known."""
    config, card = model_config(model), cfg.card or card_memory_gib()
    n, items, longest = counts(config, cfg.lora_r), plan_for(config, cfg, card), cfg.max_prompt + cfg.max_new_tokens
    full, linear = layer_kinds(config)
    lines = [
        f"model {model}{' (published shapes: no config on disk)' if config.name_or_path == '' else ''}: "
        f"{full} layers of full attention, {linear} of linear attention",
        f"parameters: base {n['base']:,}, LoRA {n['lora']:,} at r = {cfg.lora_r}; the flat vector has {n['lora']:,} entries",
        f"a step: {cfg.batch // cfg.generations} prompts x {cfg.generations} = {cfg.batch} sequences, at most "
        f"{cfg.batch * cfg.max_new_tokens:,} completion tokens, {cfg.batch * longest:,} with prompts",
        "",
        f"{'memory plan':56} {'GiB':>7}  on the card",
    ]
    lines += [f"{item.name:56} {item.gib:7.2f}  {item.phases}" for item in items]
    lines += [f"{'peak, ' + phase:56} {peak(items, phase):7.2f}  of {card:.0f} GiB" for phase in PHASES]
    settings = f"it fits, with --micro-tokens {cfg.micro_tokens} --recompute {cfg.recompute}"
    fits = [f"{settings}; vLLM's share of the card: {vllm_share(items, card):.2f}"]
    return "\n".join([*lines, "", *(advice(items, card) or fits)])
