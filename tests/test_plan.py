"""The memory plan against real models of small size, and what it says when a card is too small."""

from types import SimpleNamespace

import pytest
import torch
from support.models import SHAPES, tiny_config
from transformers import AutoModelForCausalLM

from arms.cone import FORMS
from engine import lora
from faults.errors import UserError
from harness import memory as plan

CFG = SimpleNamespace(
    batch=128,
    generations=8,
    max_prompt=1536,
    max_new_tokens=1536,
    micro_tokens=8192,
    lora_r=32,
    arm="projected",
    cone_n=24,
    cone_split=False,
    rollout="vllm",
    steer_prompts=32,
)


def cfg(**changes):
    return SimpleNamespace(**(vars(CFG) | changes))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_counts_are_those_of_the_real_model(kind, tied):
    config = tiny_config(kind, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    base = sum(p.numel() for p in model.parameters())
    lora.inject(model, r=4, alpha=4, seed=0)
    found = plan.counts(config, lora_r=4)
    assert found["base"] == base
    assert found["lora"] == sum(p.numel() for p in lora.lora_parameters(model).values())


def test_cache_sizes_are_those_of_the_real_cache():
    config = tiny_config("qwen3_5_text")
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    with torch.no_grad():
        cache = model(torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
    keys = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if getattr(layer, "keys", None) is not None)
    assert plan.kv_bytes_per_token(config) * 10 == keys
    assert plan.layer_kinds(config) == (1, 3)
    assert plan.state_bytes_per_sequence(config) == 3 * (4 * 16 * 16 * 4 + (32 + 32 + 64) * 4 * 2)


@pytest.mark.parametrize(("model", "billions"), [("Qwen/Qwen3-4B", 4.02), ("Qwen/Qwen3.5-2B", 1.88)])
def test_the_published_shapes_give_the_published_sizes(model, billions):
    assert plan.counts(plan.model_config(model), 32)["base"] / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("model", plan.SHAPES)
def test_both_presets_fit_the_card_of_the_full_scale(model):
    preset = cfg(batch=64, generations=4) if model == "Qwen/Qwen3-4B" else cfg(arm="cone", cone_split=True)
    items = plan.memory_plan(plan.model_config(model), preset)
    assert plan.advice(items, 96.0) == []
    assert plan.peak(items, "training") < 60
    assert 0.1 < plan.vllm_share(items, 96.0) < 0.6


def test_a_card_too_small_is_told_what_to_change():
    items = plan.memory_plan(plan.model_config("Qwen/Qwen3-4B"), cfg())
    start, line = plan.advice(items, 40.0)
    assert start.startswith("start needs") and line.startswith(
        "rollout needs 74.0 GiB of a card of 40: a smaller --batch or --max-new-tokens"
    )
    items = plan.memory_plan(plan.model_config("Qwen/Qwen3.5-2B"), cfg(arm="cone", micro_tokens=100_000))
    assert any("--micro-tokens" in line for line in plan.advice(items, 30.0))


def test_checkpointing_and_the_sampler_change_the_plan():
    config = plan.model_config("Qwen/Qwen3.5-2B")
    training = {c: plan.peak(plan.memory_plan(config, CFG, checkpointing=c), "training") for c in (True, False)}
    assert training[False] > 5 * training[True]
    torch_items = plan.memory_plan(config, cfg(rollout="torch"))
    assert plan.peak(torch_items, "training") > training[True] + 3  # its copy of the weights stays on the card


def test_the_report_names_counts_tokens_and_items():
    text = plan.report("Qwen/Qwen3.5-2B", CFG, 96.0)
    assert "published shapes" in text and "6 layers of full attention, 18 of linear attention" in text
    assert "flat vector has 33,638,400 entries" in text
    assert "16 prompts x 8 = 128 sequences, at most 196,608 completion tokens" in text
    for item in ("trainer: base weights", "vLLM: base weights", "keys and values", "activations", "logits", "AdamW"):
        assert item in text
    assert "it fits" in text and "it fits" not in plan.report("Qwen/Qwen3.5-2B", CFG, 8.0)


def test_a_config_on_disk_goes_first(tmp_path):
    tiny_config("qwen3").save_pretrained(tmp_path)
    assert plan.model_config(str(tmp_path)).hidden_size == 64
    assert "published" not in plan.report(str(tmp_path), CFG, 96.0)


def test_an_unknown_model_is_named():
    with pytest.raises(UserError, match="no config of someone/else on disk.*Qwen3.5-2B"):
        plan.report("someone/else", CFG, 96.0)


def test_the_plan_counts_every_row_of_a_split_cone_and_the_start():
    config = plan.model_config("Qwen/Qwen3.5-2B")
    assert len(FORMS) == plan.SURFACE_FORMS
    whole, split = (plan.memory_plan(config, cfg(arm="cone", cone_split=s)) for s in (False, True))
    rows = [next(i.gib for i in items if i.name.startswith("cone")) for items in (whole, split)]
    assert rows[1] == pytest.approx(len(FORMS) * rows[0])
    start = plan.present(split, "start")
    assert {i.name.split(":")[0] for i in start} >= {"extraction", "steering check", "vLLM"}
    assert plan.peak(split, "start") > plan.peak(split, "rollout")
