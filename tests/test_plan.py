"""The memory plan against real models of small size, and what it says when a card is too small."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.models import SHAPES, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from arms.cone import FORMS, MOST_TOKENS
from engine import lora
from faults.errors import UserError
from harness import arithmetic
from harness import memory as plan
from harness.config import POCKET, Config
from harness.scale import filled, resolve

CFG = SimpleNamespace(
    batch=128,
    generations=8,
    max_prompt=1536,
    max_new_tokens=1536,
    micro_tokens=8192,
    recompute="all",
    card=96.0,
    lora_r=32,
    loopholes=("run_tests",),
    cone_known=None,
    arm="projected",
    cone_n=24,
    cone_rows="batch",
    counterfactual_use="screen",
    construction="jacobian",
    refresh_every=0,
    pairs=80,
    pairs_heldout=20,
    cone_split=False,
    cone_places="known",
    cone_match="none",
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
    (line,) = plan.advice(items, 40.0)
    assert line.startswith("rollout needs 74.0 GiB of a card of 40: a smaller --batch or --max-new-tokens")
    items = plan.memory_plan(plan.model_config("Qwen/Qwen3.5-2B"), cfg(arm="cone", micro_tokens=100_000))
    assert any("--micro-tokens" in line for line in plan.advice(items, 30.0))


def test_checkpointing_and_the_sampler_change_the_plan():
    config = plan.model_config("Qwen/Qwen3.5-2B")
    training = {r: plan.peak(plan.memory_plan(config, cfg(recompute=r)), "training") for r in plan.RECOMPUTED}
    assert training["none"] > 5 * training["all"] and training["half"] == pytest.approx((training["none"] + training["all"]) / 2)
    torch_items = plan.memory_plan(config, cfg(rollout="torch"))
    assert plan.peak(torch_items, "training") > training["all"] + 3  # its copy of the weights stays on the card


def test_the_report_names_counts_tokens_and_items():
    text = plan.report("Qwen/Qwen3.5-2B", CFG)
    assert "published shapes" in text and "6 layers of full attention, 18 of linear attention" in text
    assert "flat vector has 33,638,400 entries" in text
    assert "16 prompts x 8 = 128 sequences, at most 196,608 completion tokens" in text
    for item in ("trainer: base weights", "vLLM: base weights", "keys and values", "activations", "logits", "AdamW"):
        assert item in text
    assert "it fits" in text and "it fits" not in plan.report("Qwen/Qwen3.5-2B", cfg(card=8.0))


def test_a_config_on_disk_goes_first(tmp_path):
    tiny_config("qwen3").save_pretrained(tmp_path)
    assert plan.model_config(str(tmp_path)).hidden_size == 64
    assert "published" not in plan.report(str(tmp_path), CFG)


def test_an_unknown_model_is_named():
    with pytest.raises(UserError, match="no config of someone/else on disk.*Qwen3.5-2B"):
        plan.report("someone/else", CFG)


def test_the_plan_counts_every_row_of_a_split_cone_and_the_start():
    config = plan.model_config("Qwen/Qwen3.5-2B")
    whole, split = (plan.memory_plan(config, cfg(arm="cone", cone_split=s)) for s in (False, True))
    rows = [next(i.gib for i in items if i.name.startswith("cone")) for items in (whole, split)]
    flat = plan.counts(config, 32)["lora"] * 4 / plan.GIB
    assert rows == [pytest.approx(n * flat) for n in (24, 24 * len(FORMS))]
    several = cfg(arm="cone", loopholes=("run_tests", "exit_code", "result_file"), cone_known=("exit_code", "result_file"))
    assert plan.cone_rows(several, split=False) == 24 * 2.5 and plan.cone_rows(several) == 24 * (8 + 6) / 2
    assert plan.cone_rows(cfg(arm="counterfactual")) == 0
    assert plan.cone_rows(cfg(arm="counterfactual", counterfactual_use="project")) == 24
    assert plan.cone_rows(cfg(arm="cone", cone_rows="both"), split=False) == 48
    assert plan.cone_rows(cfg(arm="cone", cone_rows="random", cone_places="all")) == 24
    contrast = [i for i in plan.memory_plan(config, cfg(construction="contrast", refresh_every=5)) if i.name.endswith("contrast")]
    assert [(i.gib, i.phases) for i in contrast] == [(pytest.approx(60 * flat), "start"), (pytest.approx(60 * flat), "training")]
    assert plan.cone_rows(cfg(arm="cone", cone_places="all"), split=False) == 24 * 2
    matched = [
        i.gib for i in plan.memory_plan(config, cfg(arm="cone", cone_match="random")) if i.name.endswith("--cone-match random")
    ]
    assert matched == [pytest.approx(24 * flat)]
    start = {i.name.split(":")[0] for i in plan.present(split, "start")}
    assert {"extraction", "steering check"} <= start and "vLLM" not in start  # asleep


FULL = filled(Config(), "full")


@pytest.mark.parametrize("card, model, chosen", [
    (96, "qwen3.5-2b", (16_384, "half")), (24, "qwen3.5-2b", (16_384, "all")), (12, "qwen3-0.6b", (16_384, "all")),
    (500, "qwen3.5-2b", (16_384, "none")),
])  # fmt: skip
@pytest.mark.parametrize("arm", ["projected", "cone"])
def test_memory_settings_are_those_that_the_card_holds(card, model, chosen, arm):
    """The target cards: the method's own 96 GB, 24 GB, and 12 GB for the smallest model."""
    fits = plan.fitted(filled(Config(arm=arm, card=card, preset=model), "full"))
    assert (fits.micro_tokens, fits.recompute) == chosen
    assert {k for k, v in vars(fits).items() if v != vars(filled(Config(arm=arm, card=card, preset=model), "full"))[k]} == {
        "micro_tokens", "recompute",
    }  # fmt: skip


def test_memory_settings_that_were_given_stand():
    assert plan.fitted(replace(FULL, card=96.0, micro_tokens=4096)).micro_tokens == 4096
    assert plan.fitted(replace(FULL, card=96.0, recompute="all")).recompute == "all"


def test_a_card_too_small_is_told_what_fits_and_fit_takes_it(capsys):
    """Nothing that changes what is learned is taken unasked."""
    small = replace(FULL, arm="cone", card=12.0)
    with pytest.raises(UserError, match="needs .* it would fit with --max-new-tokens .* give them, or --fit"):
        plan.fitted(small)
    fits = plan.fitted(replace(small, fit=True))
    assert fits.max_new_tokens < 1536 and capsys.readouterr().err.startswith("--fit: --max-new-tokens")
    assert plan.advice(plan.plan_for(plan.model_config(fits.model), fits, 12.0), 12.0) == []
    with pytest.raises(UserError, match="no smaller setting makes it fit: a smaller model may, --preset qwen3-0.6b"):
        plan.fitted(replace(small, card=4.0, fit=True))
    assert plan.fitted(replace(small, dry_run=True)).max_new_tokens == 1536  # its report says what is too much
    assert capsys.readouterr().err.startswith("it would fit with --max-new-tokens")


def test_the_plan_counts_the_tokens_of_the_cones_rows():
    """On a hybrid a row's five branches are five sequences, which may be more than a micro-batch."""
    assert plan.CONE_TOKENS == MOST_TOKENS
    hybrid, dense = (plan.model_config(f"Qwen/{name}") for name in ("Qwen3.5-2B", "Qwen3-1.7B"))
    small = cfg(arm="cone", micro_tokens=4096)
    longest = small.max_prompt + small.max_new_tokens
    assert plan.cone_tokens(hybrid, small) == 5 * longest and plan.cone_tokens(dense, small) == 8192
    assert plan.cone_tokens(dense, cfg(arm="cone", micro_tokens=1024)) == 4096
    assert plan.cone_tokens(hybrid, cfg(arm="cone", micro_tokens=1024, cone_split=True)) == 2 * longest
    assert plan.cone_tokens(hybrid, cfg(micro_tokens=4096)) == 0
    screen = cfg(arm="counterfactual", counterfactual_use="project", micro_tokens=4096)
    assert plan.cone_tokens(hybrid, screen) == 8192
    kept = [
        next(i.gib for i in plan.memory_plan(hybrid, some) if i.name.startswith("activations of the layer"))
        for some in (small, cfg(micro_tokens=5 * longest))
    ]
    assert kept[0] == kept[1]


def test_vllm_gets_three_tenths_where_the_trainer_leaves_them():
    config = plan.model_config("Qwen/Qwen3.5-2B")
    assert plan.vllm_share(plan.memory_plan(config, CFG), 96.0) == 0.3
    items = plan.plan_for(config, CFG, 24.0)
    need = sum(i.gib for i in items if i.phases == "rollout")
    assert plan.vllm_share(items, 24.0) == pytest.approx(need / 24)


def test_a_step_by_arithmetic_is_within_the_targets():
    """Of the full scale on its card: 20 s, and 28 s for the cone; and each part moves the way it must."""
    config = plan.model_config("Qwen/Qwen3.5-2B")
    projected, cone = (
        arithmetic.step_seconds(config, plan.fitted(replace(FULL, arm=arm, card=80.0))) for arm in ("projected", "cone")
    )
    assert sum(projected.values()) <= 20 and sum(cone.values()) <= 28
    own = plan.fitted(replace(FULL, arm="cone", card=96.0))  # the method's own: an RTX 6000 of 96 GB, 200 steps within 3 h
    assert FULL.steps * sum(arithmetic.step_seconds(config, own, arithmetic.CARDS[1]).values()) <= 3 * 3600
    assert "cone" not in projected and {k: v for k, v in cone.items() if k != "cone"} == projected
    passes = [arithmetic.step_seconds(config, cfg(recompute=r))["backward"] for r in ("none", "half", "all")]
    assert passes == pytest.approx([passes[0] * k / 3 for k in (3, 3.5, 4)])
    # 128 x 1,100 tokens, two operations a weight, three passes, at .35 of 989 TFLOP/s; attention adds a little
    weights = plan.counts(config, 32)["matmul"]
    assert passes[0] == pytest.approx(128 * 1100 * 2 * weights * 3 / (0.35 * 989e12), rel=0.03)


def test_a_run_of_a_real_model_is_refused_where_the_machine_has_not_the_memory(monkeypatch):
    """It would be killed, hours later, with no line at all."""
    shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    config = LlamaConfig(**shape, head_dim=64, vocab_size=49_152, tie_word_embeddings=True)
    vanilla, cone = (filled(Config(arm=arm), "small") for arm in ("vanilla", "cone"))
    assert 5e9 < plan.bytes_on_cpu(config, vanilla) < 7e9, "6 GB, as measured"
    assert 8.5e9 < plan.bytes_on_cpu(config, cone) < 10.5e9, "9.5 GB, as measured with half as many rows again"
    monkeypatch.setattr(plan, "model_config", lambda model: config)
    monkeypatch.setattr(plan, "available_memory", lambda: 4e9)
    with pytest.raises(UserError, match=r"--scale small takes about \d.\d GB of memory here, and 4.0 GB are free"):
        resolve(replace(Config(), scale="small", model=str(POCKET)))
    monkeypatch.setattr(plan, "available_memory", lambda: 9e9)
    assert resolve(replace(Config(), scale="small", model=str(POCKET))).scale == "small"
    with pytest.raises(UserError, match="and 9.0 GB are free"):
        resolve(replace(Config(), scale="small", model=str(POCKET), arm="cone"))
    monkeypatch.setattr(plan, "available_memory", lambda: 4e9)
    assert resolve(replace(Config(), scale="pocket")).scale == "pocket"


def test_the_graph_of_the_lift_fits_beside_another_run():
    """A model of 135 M parameters kept 12 GB for it, and two runs beside each other were killed."""
    shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    small, pocket = LlamaConfig(**shape), AutoConfig.from_pretrained(POCKET)
    floats = plan.lift_tokens(small, "cpu") * 30 * plan.activation_bytes_per_token(small)[1] // 2
    assert 0.9 * plan.LIFT_BYTES_CPU < 4 * floats <= plan.LIFT_BYTES_CPU
    assert plan.lift_tokens(pocket, "cpu") == plan.lift_tokens(small, "cuda") == plan.LIFT_TOKENS, "the pocket keeps its bits"
