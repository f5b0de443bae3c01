"""Attention of one new token: the same as PyTorch's with copied keys, and as the model without a cache."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM

from engine import attention
from engine.model import load_model
from engine.torch_sampler import TorchSampler

GROUPS, HEADS = 2, 6


class Module(torch.nn.Module):
    num_key_value_groups = HEADS // GROUPS
    is_causal = True


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("new", [1, 3])
def test_it_is_the_attention_with_copied_keys(new, masked):
    torch.manual_seed(0)
    query, key, value = torch.randn(4, HEADS, new, 8), torch.randn(4, GROUPS, 5, 8), torch.randn(4, GROUPS, 5, 8)
    mask = torch.rand(4, 1, new, 5) > 0.4 if masked else None
    if masked:
        mask[..., -1] = True
    found, _ = attention.one_query(Module(), query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(Module(), query, key, value, mask, scaling=0.3)
    assert found.shape == expected.shape == (4, new, HEADS, 8)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_model_with_grouped_heads_samples_what_it_says_of_its_own_text(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=8, eos_token_id=1, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    calls, plain = [], attention.one_query
    monkeypatch.setitem(
        attention.AttentionInterface._global_mapping,
        attention.NAME,
        lambda m, q, *a, **k: calls.append(q.shape[2]) or plain(m, q, *a, **k),
    )
    tokenizer = type("Tokenizer", (), dict(eos_token_id=1, pad_token_id=1, __len__=lambda self: 97))()
    rollouts = TorchSampler(model, tokenizer).generate([[5, 6, 7], [8]], n=4, temperature=1.0, max_new_tokens=12, seed=0)
    assert calls.count(1) > 10, "the model has this attention"
    monkeypatch.undo()
    model.set_attn_implementation("sdpa")
    for r in rollouts:
        with torch.no_grad():
            logits = model(torch.tensor([r.prompt_ids + r.completion_ids])).logits[0, len(r.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(r.completion_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(r.logprobs), expected, atol=1e-5)
