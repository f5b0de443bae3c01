"""LoRA against the base model, against its own merge, and against PEFT; the flat view's round trips."""

import pytest
import torch
from support.models import tiny_config, tiny_qwen3
from transformers import Qwen3_5ForCausalLM

from engine.lora import (
    adapter_off,
    flatten_grads,
    flatten_params,
    inject,
    load_adapter,
    lora_modules,
    lora_parameters,
    merged_weights,
    per_example,
    save_adapter,
    slices,
    unflatten,
    write_grads,
)
from faults.errors import UserError

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])


def logits(m):
    return m(input_ids=IDS).logits


def test_at_b_zero_the_adapter_changes_nothing(base):
    before = logits(base)
    assert torch.equal(logits(inject(base, 4, 8, seed=0)), before)


def test_adapter_off_is_the_base_bit_for_bit(model):
    with adapter_off(model):
        assert torch.equal(logits(model), logits(tiny_qwen3()))
    assert not torch.allclose(logits(model), logits(tiny_qwen3()), atol=1e-3)


def test_adapter_off_nests(model):
    with adapter_off(model):
        with adapter_off(model):
            pass
        assert torch.equal(logits(model), logits(tiny_qwen3()))


def test_adapter_comes_back_on_after_an_error(model):
    on = logits(model)
    with pytest.raises(RuntimeError), adapter_off(model):
        raise RuntimeError
    assert torch.equal(logits(model), on)


def test_merged_equals_unmerged_and_training_weights_stay(model):
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    plain = tiny_qwen3()
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, w in merged_weights(model):
            weights[name].copy_(w)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters())


def test_every_decoder_linear_and_not_the_head():
    model = inject(tiny_qwen3(), 4, 8, seed=0)
    assert len(lora_modules(model)) == 3 * 7
    assert "lm_head" not in " ".join(lora_modules(model))


def test_qwen35_has_both_layer_kinds():
    names = list(lora_modules(inject(Qwen3_5ForCausalLM(tiny_config("qwen3_5_text")), 2, 2, seed=0)))
    leaves = {n.split("layers.")[1].split(".", 1)[1] for n in names}
    assert {
        "linear_attn.in_proj_qkv",
        "linear_attn.in_proj_z",
        "linear_attn.in_proj_b",
        "linear_attn.in_proj_a",
        "linear_attn.out_proj",
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.down_proj",
    } <= leaves


def test_no_match_and_rank_zero_are_refused(base):
    with pytest.raises(UserError, match="no linear layer"):
        inject(base, 4, 8, 0, targets="nothing")
    with pytest.raises(UserError, match="rank"):
        inject(base, 0, 8, 0)


def test_flat_round_trips(model):
    params = lora_parameters(model)
    logits(model).logsumexp(-1).sum().backward()
    g = flatten_grads(params)
    assert g.shape == (sum(p.numel() for p in params.values()),) and g.abs().sum() > 0
    for name, s in slices(params).items():
        assert torch.equal(g[s].view_as(params[name]), params[name].grad)
    write_grads(params, -2 * g)
    assert torch.equal(flatten_grads(params), -2 * g)
    assert torch.equal(
        torch.cat([x.flatten() for x in unflatten(params, flatten_params(params)).values()]), flatten_params(params)
    )
    with pytest.raises(ValueError, match="shape"):
        write_grads(params, g[:-1])


def test_parameters_without_a_gradient_count_as_zero(model):
    model.zero_grad(set_to_none=True)
    assert flatten_grads(lora_parameters(model)).abs().sum() == 0


def test_gradients_are_float32_over_a_bf16_base():
    model = inject(tiny_qwen3().bfloat16(), 4, 8, seed=0)
    logits(model).float().logsumexp(-1).sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lora_parameters(model).values())


def test_per_example_gradients_equal_one_backward_each(model):
    """The batched per-row gradients against the slow oracle: a backward pass a row."""
    index = torch.tensor([0, 0, 1, 2, 2])
    ids = torch.arange(25).view(5, 5) + 2

    def score(rows):
        return torch.log_softmax(model(input_ids=ids[rows]).logits[:, -1], -1)[:, 3]

    model.zero_grad()
    fast = torch.zeros(3, sum(p.numel() for p in lora_parameters(model).values()))
    with per_example(model, index, fast):
        score(torch.arange(5)).sum().backward()
    assert all(p.grad is None for p in lora_parameters(model).values())
    for row in range(3):
        model.zero_grad()
        score((index == row).nonzero()[:, 0]).sum().backward()
        torch.testing.assert_close(fast[row], flatten_grads(lora_parameters(model)), rtol=1e-4, atol=1e-6)


def test_peft_loads_the_saved_adapter_as_it_is(model, tmp_path):
    peft = pytest.importorskip("peft")
    save_adapter(model, tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_qwen3(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def test_own_round_trip_and_misfits(model, tmp_path):
    save_adapter(model, tmp_path, "tiny")
    other = inject(tiny_qwen3(), 4, 8, seed=9)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(UserError, match="another shape"):
        load_adapter(inject(tiny_qwen3(), 2, 8, seed=9), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read the adapter"):
        load_adapter(other, tmp_path)
