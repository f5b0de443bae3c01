"""Real tiny models of both architectures, with and without a real adapter."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from engine.lora import inject

SHAPES = {  # of a small model of each kind; the hybrid one has three linear-attention layers to one of full attention
    "qwen3": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3),
    "qwen3_5_text": dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
}


def tiny_config(kind: str, **changes):
    """The configuration of a small model of that kind, a key of SHAPES."""
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return AutoConfig.for_model(kind, **(dict(vocab_size=320) | heads | SHAPES[kind] | changes))


def tiny_model(kind: str):
    """A small model of that kind with random weights; its states differ enough to tell tokens apart."""
    torch.manual_seed(0)
    config = tiny_config(kind, tie_word_embeddings=True, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def tiny_qwen3(seed: int = 0, vocab: int = 97) -> Qwen3ForCausalLM:
    """32 wide, 3 layers; pad is eos."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=1,
    )
    return Qwen3ForCausalLM(config).eval()


def adapted_qwen3():
    """The same with an adapter that is not zero, so that every A and B has a gradient."""
    model = inject(tiny_qwen3(), r=4, alpha=8, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model
