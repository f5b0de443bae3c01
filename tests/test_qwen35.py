"""Qwen3.5's two layer kinds through what this project does with them: padding, the cache, LoRA, chunked logprobs.

A layer of linear attention has a recurrent state, so a pad token that leaks into it changes everything after it, and a
row that leaves the batch must take its state along. Both are easy to get wrong and silent when wrong.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.models import tiny_config
from support.runs import grpo
from transformers import Qwen3_5ForCausalLM

import vhack
from engine import lora
from engine.logprob import token_logprobs
from engine.model import load_model, recompute_layers
from engine.sampler import Rollout
from engine.torch_sampler import TorchSampler
from faults.errors import UserError
from harness.config import POCKET
from leetcode_env import load_problems

VOCAB, EOS, PAD = 300, 1, 0
OWN = dict(tie_word_embeddings=True, eos_token_id=EOS, pad_token_id=PAD, initializer_range=0.2)
PROMPTS = [[5, 6, 7], [8] * 9 + [9], [3, 4] * 40, [11]]  # the third is longer than a chunk of 64 of the delta rule


class Tokenizer(SimpleNamespace):
    def __len__(self):
        return VOCAB


TOKENIZER = Tokenizer(eos_token_id=EOS, pad_token_id=PAD)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = Qwen3_5ForCausalLM(tiny_config("qwen3_5_text", **OWN)).eval()
    assert built.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    return built


def logprobs(model, rollout, temperature):
    """One sequence on its own, no padding and no cache: what every shortcut must agree with."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1, :VOCAB] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(rollout.prompt_ids) :, None])[:, 0]


def test_left_padding_does_not_reach_the_states(model):
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    with torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
        alone = torch.cat([model(torch.tensor([p])).logits[:, -1] for p in PROMPTS])
        unmasked = model(ids).logits[:, -1]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert (unmasked - alone).abs().max() > 0.1, "pads make no difference to this model: the test shows nothing"


def test_right_padding_changes_no_real_token_without_a_mask(model):
    """The training batches are padded on the right and carry no mask: both layer kinds are causal."""
    width = max(map(len, PROMPTS))
    with torch.no_grad():
        together = model(torch.tensor([p + [PAD] * (width - len(p)) for p in PROMPTS])).logits
        for row, p in enumerate(PROMPTS):
            torch.testing.assert_close(together[row, : len(p)], model(torch.tensor([p])).logits[0], rtol=0, atol=1e-4)


def test_rows_leave_the_cache_with_their_states(model):
    ids, keep = torch.randint(2, VOCAB, (5, 70), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1])
    more = torch.randint(2, VOCAB, (5, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.reorder_cache(keep)  # batch_select_indices is missing from layers of linear attention (transformers 5.19)
        got = [model(more[keep, t : t + 1], past_key_values=cache, use_cache=True).logits[:, -1] for t in range(6)]
        want = model(torch.cat([ids, more], 1)[keep]).logits[:, 70:]
    torch.testing.assert_close(torch.stack(got, 1), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 0])
def test_the_samplers_logprobs_are_those_of_each_sequence_alone(model, temperature):
    busy = copy.deepcopy(model)
    with torch.no_grad():
        busy.lm_head.weight[EOS] *= 2  # tied: a wider embedding makes eos likelier, so that rows leave one by one
    rollouts = TorchSampler(busy, TOKENIZER).generate(PROMPTS, n=6, temperature=temperature, max_new_tokens=40, seed=0)
    lengths = {len(r.completion_ids) for r in rollouts}
    assert temperature == 0 or (len(lengths) > 3 and any(r.finished for r in rollouts)), "no row left the batch early"
    for r in rollouts:
        assert max(r.completion_ids) < VOCAB and r.finished == (r.completion_ids[-1] == EOS)
        torch.testing.assert_close(torch.tensor(r.logprobs), logprobs(busy, r, temperature or 1), rtol=0, atol=1e-3)


def test_weights_pushed_to_the_sampler_are_the_adapters(model):
    trained = lora.inject(copy.deepcopy(model), r=4, alpha=4, seed=0)
    assert len(lora.lora_modules(trained)) == 3 * (5 + 3) + (4 + 3)
    for p in lora.lora_parameters(trained).values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    sampler = TorchSampler(model, TOKENIZER)
    sampler.load_weights(lambda: lora.merged_weights(trained))
    for r in sampler.generate(PROMPTS, n=1, temperature=0.7, max_new_tokens=8, seed=0):
        torch.testing.assert_close(torch.tensor(r.logprobs), logprobs(trained, r, 0.7), rtol=0, atol=1e-4)
        assert (torch.tensor(r.logprobs) - logprobs(model, r, 0.7)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_adapter_of_both_layer_kinds_gets_its_gradient(model, dtype):
    trained = lora.inject(copy.deepcopy(model).to(dtype), r=4, alpha=4, seed=0)
    for p in lora.lora_parameters(trained).values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    ids = torch.tensor([PROMPTS[2]])
    hidden = trained.model(ids, use_cache=False).last_hidden_state[0, :-1]
    loss = -token_logprobs(hidden, trained.lm_head.weight, ids[0, 1:], 0.7, vocab=VOCAB).mean()
    loss.backward()
    for name, p in lora.lora_parameters(trained).items():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.abs().max() > 0, name


def test_checkpointing_changes_no_gradient(model):
    grads = []
    for which in ("none", "half", "all"):
        trained = lora.inject(copy.deepcopy(model), r=4, alpha=4, seed=0)
        recompute_layers(trained, which)
        runs = [0] * len(trained.model.layers)
        for i, layer in enumerate(trained.model.layers):
            layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
        ids = torch.tensor([PROMPTS[2]])
        hidden = trained.model(ids, use_cache=False).last_hidden_state[0, :-1]
        token_logprobs(hidden, trained.lm_head.weight, ids[0, 1:], 0.7).sum().backward()
        grads.append(lora.flatten_grads(lora.lora_parameters(trained)))
        assert runs == {"none": [1, 1, 1, 1], "half": [2, 1, 2, 1], "all": [2, 2, 2, 2]}[which]
    for recomputed in grads[1:]:
        torch.testing.assert_close(recomputed, grads[0], rtol=1e-5, atol=1e-6)


def test_the_whole_loop(tmp_path, pocket_tokenizer):
    """Extraction, three steps, saving, evaluation, by the command itself. A random model's states tell a hack from honest code
    in 80 % of the pairs, which the extraction refuses; so this one is first taught the difference, in seconds."""
    folder, out = tmp_path / "model", tmp_path / "run"
    torch.manual_seed(0)
    taught = Qwen3_5ForCausalLM(
        tiny_config(
            "qwen3_5_text",
            **OWN
            | dict(
                vocab_size=len(pocket_tokenizer) + 6,
                eos_token_id=pocket_tokenizer.eos_token_id,
                pad_token_id=pocket_tokenizer.pad_token_id,
                initializer_range=0.05,
            ),
        )
    )
    attempts = SimpleNamespace(generate=lambda prompts, **_: [Rollout(p, [5], [0.0], False) for p in prompts])
    pairs = vhack.make_pairs(load_problems(POCKET / "train.jsonl"), pocket_tokenizer, attempts, 400, 7, 16)
    optimizer = torch.optim.AdamW(taught.parameters(), lr=1e-3)
    for step in range(100):
        sequences = [ids[-150:] for pair in pairs[step % 50 :: 50] for ids in vhack.encode_pair(pocket_tokenizer, pair)]
        two = vhack.last_hidden(taught, sequences)[:, -1, :2]  # [16, 2]
        loss = torch.nn.functional.cross_entropy(5 * two, torch.tensor([0, 1] * 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    taught.save_pretrained(folder)
    pocket_tokenizer.save_pretrained(folder)

    said = grpo(
        "--arm",
        "cone",
        "--cone-rows",
        "pairs",
        "--model",
        folder,
        "--steps",
        3,
        "--log-every",
        3,
        "--max-new-tokens",
        16,
        "--pairs",
        40,
        "--seed",
        2,
        "--out",
        out,
    )
    assert "held-out separation" in said and "hack rate" in said
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert [x["step"] for x in lines] == [0, 1, 2] and max(x["mismatch"]["max_abs"] for x in lines) < 1e-3
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    kinds = {name.split(".")[-3] for name in adapter}
    assert {"in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "o_proj", "down_proj"} <= kinds
    assert all((out / name).exists() for name in ("v_hack.safetensors", "eval.json", "done.json"))


def test_decay_rates_stay_float32(tmp_path):
    """A checkpoint in bf16 that stores A_log in float32, as the published ones do: it is loaded as it is."""
    model = Qwen3_5ForCausalLM(tiny_config("qwen3_5_text", **OWN)).to(torch.bfloat16)
    for layer in model.model.layers[:3]:
        layer.linear_attn.A_log.data = torch.rand(4) + 1
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    rates = [layer.linear_attn.A_log for layer in loaded.model.layers[:3]]
    assert loaded.dtype == torch.bfloat16 and {r.dtype for r in rates} == {torch.float32}
    assert all(torch.equal(r, layer.linear_attn.A_log) for r, layer in zip(rates, model.model.layers[:3], strict=True))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """Its head is declared separate and is not there: transformers would make a random one."""
    model = Qwen3_5ForCausalLM(tiny_config("qwen3_5_text", **OWN))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match="lacks 1 of its weights, lm_head.weight first"):
        load_model(str(tmp_path))
