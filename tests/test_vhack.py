"""From pairs to v: styles, separation, denoising against numpy, lifts against finite differences, the cone's rows."""

import dataclasses
import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import tiny_qwen3

import grpo
import vhack as vh
from arms import pairs as pairs_of
from arms import steering
from arms.cone import (
    FENCE,
    FORMS,
    Context,
    Contrast,
    batch_contexts,
    clean_code,
    contrast,
    contrast_rows,
    hack_contrasts,
    joined_rows,
    nonhack_contrasts,
)
from engine.lora import flatten, flatten_params, inject, lora_parameters, slices, write_params
from engine.model import encode_prompt
from engine.sampler import Rollout
from engine.torch_sampler import TorchSampler
from faults.errors import UserError
from harness import setup
from harness.config import POCKET, Config, portable
from harness.scale import filled
from leetcode_env import load_problems, parse_response, render_messages
from loopholes import evaluated_by
from loopholes.evaluator import TRAIN_EVALUATOR, defines_evaluator

VOCAB = json.loads((POCKET / "config.json").read_text())["vocab_size"]  # all ids of its model
CODE = "class Solution:\n    def total(self, xs):\n        return sum(xs)"


@pytest.fixture(scope="module")
def problems():
    return load_problems(POCKET / "train.jsonl")


@pytest.fixture
def pairs(pocket, pocket_tokenizer, problems):
    return pairs_of.make_pairs(problems, pocket_tokenizer, TorchSampler(pocket, pocket_tokenizer), 30, seed=0, max_new_tokens=64)


def test_every_style_defines_the_evaluator_and_there_are_many():
    codes = {pairs_of.hacky(CODE, body, place, TRAIN_EVALUATOR) for body, place in pairs_of.STYLES}
    assert len({b for b, _ in pairs_of.STYLES}) >= 13 and len(codes) >= 26
    for code in codes:
        assert defines_evaluator(code, TRAIN_EVALUATOR), code


def test_pairs_share_the_prompt_and_differ_in_the_evaluator_alone(pairs):
    assert len({p.problem.id for p in pairs}) == 30
    for p in pairs:
        assert defines_evaluator(parse_response(p.hack), TRAIN_EVALUATOR)
        assert not defines_evaluator(parse_response(p.clean), TRAIN_EVALUATOR)
        assert p.hack.endswith(FENCE) and p.clean.endswith(FENCE)


def test_too_few_problems_is_one_clear_line(pocket, pocket_tokenizer, problems):
    with pytest.raises(UserError, match="--pairs"):
        pairs_of.make_pairs(problems[:5], pocket_tokenizer, TorchSampler(pocket, pocket_tokenizer), 30, 0, 8)


@pytest.mark.parametrize(
    "depth, expected", [(4, [3]), (24, [15, 16, 17, 18]), (36, [22, 23, 24, 25, 26, 27]), (1, [1]), (2, [1])]
)
def test_band(depth, expected):
    assert vh.band(depth) == expected


def test_separation_by_hand():
    hack, clean = torch.tensor([[2.0, 0.0], [4.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])  # d = (3, 0), threshold 4.5
    accuracy, margin = vh.separation(hack, clean, torch.tensor([[2.0, 9.0], [1.0, 9.0]]), torch.tensor([[0.0, 9.0], [1.4, 9.0]]))
    assert accuracy == 0.75  # 2 and 1 -> 6 and 3: one above; 0 and 1.4 -> both below
    assert margin == pytest.approx((4.5 - 2.1) / math.sqrt((4.5 + 8.82) / 2), rel=1e-5)


def test_last_hidden_ignores_padding(pocket):
    with torch.no_grad():
        together = vh.last_hidden(pocket, [[5, 6, 7], [8, 9, 10, 11, 12, 13]])
        alone = vh.last_hidden(pocket, [[5, 6, 7]])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_denoising_against_numpy():
    generator = torch.Generator().manual_seed(0)
    d, W = torch.randn(12, generator=generator), torch.randn(12, 30, generator=generator)
    got, share = vh.denoise(d, W, 5)
    U = np.linalg.svd(W.numpy())[0][:, :5]
    expected = U @ (U.T @ d.numpy())
    np.testing.assert_allclose(got.numpy(), expected / np.linalg.norm(expected), rtol=1e-4, atol=1e-6)
    assert share == pytest.approx(np.linalg.norm(expected) / d.norm().item(), rel=1e-4)
    full, all_of_it = vh.denoise(d, W, 12)
    assert all_of_it == pytest.approx(1, rel=1e-5) and torch.allclose(full, d / d.norm(), atol=1e-5)


@pytest.mark.parametrize("m", [0, -1, 13])
def test_m_outside_the_width_is_refused(m):
    with pytest.raises(UserError, match="between 1 and the model's width 12"):
        vh.denoise(torch.ones(12), torch.randn(12, 30), m)


def test_extraction_separates_on_the_pocket_model_and_the_arms_directions_differ(pocket, pocket_tokenizer, pairs):
    inject(pocket, 4, 4, 0)
    hack = vh.extract(pocket, pocket_tokenizer, pairs, 10, 16)
    assert hack.accuracy > 0.9 and hack.layers == [3] and hack.d.norm().item() == pytest.approx(1, rel=1e-5)
    raw = vh.extract(pocket, pocket_tokenizer, pairs, 10, 16, kind="raw")
    rand = vh.extract(pocket, pocket_tokenizer, pairs, 10, 16, kind="random", seed=1)
    assert (raw.d @ hack.d).item() == pytest.approx(hack.survived, abs=1e-4)
    assert abs((rand.d @ hack.d).item()) < 0.9 and rand.d.norm().item() == pytest.approx(1, rel=1e-5)


def test_identical_sides_do_not_separate(pocket, pocket_tokenizer, pairs):
    same = [pairs_of.Pair(p.problem, p.clean, p.clean) for p in pairs]
    with pytest.raises(UserError, match="must exceed 90 %"):
        vh.extract(pocket, pocket_tokenizer, same, 10, 16)


def test_a_direction_that_is_extracted_again_keeps_its_layers(pocket, pocket_tokenizer, pairs):
    """cos(d_0, d_t) is to fall because the concept moved, not because another layer separates better; nor need it separate."""
    first = vh.extract(pocket, pocket_tokenizer, pairs, 10, 16)
    for best in (1, 2, 3, 4):
        again = vh.extract(pocket, pocket_tokenizer, pairs, 10, 16, again=dataclasses.replace(first, best_layer=best))
        assert again.best_layer == best and again.layers == first.layers
    same = [pairs_of.Pair(p.problem, p.clean, p.clean) for p in pairs]
    assert vh.extract(pocket, pocket_tokenizer, same, 10, 16, again=first).accuracy <= 0.9


def test_saved_and_loaded_is_the_same(pocket, pocket_tokenizer, pairs, tmp_path):
    hack = vh.extract(pocket, pocket_tokenizer, pairs, 10, 16)
    vh.save(hack, tmp_path / "v.safetensors", "pocket")
    again = vh.load(tmp_path / "v.safetensors")
    assert torch.equal(again.d, hack.d) and again.table == hack.table and again.pairs == hack.pairs
    (tmp_path / "v.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(UserError, match="cannot read the hack direction"):
        vh.load(tmp_path / "v.safetensors")


# --- other readings of a pair -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["prompt", "code", "branch", "last"])
def test_two_prompts_share_everything_after_them_up_to_the_token_that_is_read(position, pairs, pocket_tokenizer):
    for pair in pairs:
        prompts = [encode_prompt(pocket_tokenizer, render_messages(pair.problem, e)) for e in (evaluated_by(), None)]
        sides = pairs_of.encode_pair(pocket_tokenizer, pair, "prompts", position)
        shown = [side[len(prompt) :] for side, prompt in zip(sides, prompts, strict=True)]
        assert all(side[: len(prompt)] == prompt for side, prompt in zip(sides, prompts)) and shown[0] == shown[1]
        code = pair.clean.removesuffix(FENCE)
        opening = pocket_tokenizer.encode(FORMS[0].format(name=TRAIN_EVALUATOR))[0]
        whole = dict(prompt=[], code=pocket_tokenizer.encode(code), last=pocket_tokenizer.encode(pair.clean))
        whole["branch"] = [*whole["code"], opening]
        assert shown[0] == whole[position]
    assert prompts[0] != prompts[1]


def test_the_branch_of_two_completions_is_the_first_token_that_differs(pairs, pocket_tokenizer):
    for pair in pairs:
        hack, clean = pairs_of.encode_pair(pocket_tokenizer, pair, position="branch")
        assert hack[:-1] == clean[:-1] and hack[-1] != clean[-1]
        whole = pairs_of.encode_pair(pocket_tokenizer, pair)
        assert all(full[: len(side)] == side for full, side in zip(whole, (hack, clean)))


@pytest.fixture
def gated(pocket, pocket_tokenizer, pairs):
    """(model with an adapter, the direction of prompts at the code's end)."""
    model = warm(inject(pocket, 4, 4, 0))
    return model, vh.extract(model, pocket_tokenizer, pairs, 10, 64, contrast="prompts", position="code")


def test_a_contrast_of_prompts_is_read_at_the_last_layer_and_the_file_says_so(gated, pocket_tokenizer, pairs, tmp_path):
    model, hack = gated
    assert hack.layers == [4] and hack.best_layer == 4 and hack.accuracy > 0.9 and "prompts, read at: code" in hack.format()
    vh.save(hack, tmp_path / "v.safetensors", "pocket")
    again = vh.load(tmp_path / "v.safetensors")
    assert (again.contrast, again.position, again.layers) == ("prompts", "code", [4]) and torch.equal(again.d, hack.d)
    two = vh.extract(model, pocket_tokenizer, pairs, 10, 64, layer=2, contrast="prompts", position="code")
    assert two.layers == [2] and abs((two.d @ hack.d).item()) < 0.9


def test_a_file_from_before_there_was_another_reading_is_of_completions_at_the_last_token(gated, tmp_path):
    model, hack = gated
    vh.save(hack, tmp_path / "v.safetensors", "pocket")
    with safe_open(tmp_path / "v.safetensors", "pt") as f:
        meta = {k: v for k, v in f.metadata().items() if k not in ("contrast", "position")}
    save_file({"d": hack.d}, tmp_path / "old.safetensors", metadata=meta)
    old = vh.load(tmp_path / "old.safetensors")
    assert (old.contrast, old.position) == ("completions", "last") and torch.equal(old.d, hack.d)


@pytest.mark.invariant
def test_the_lift_of_a_contrast_of_prompts_is_of_the_states_under_the_loophole_alone(gated, pocket_tokenizer, pairs):
    """The sign: a small step along +v moves the state before the branch, under the prompt that is trained on, along +d."""
    model, hack = gated
    v = vh.lift(model, pocket_tokenizer, pairs, hack, VOCAB)
    params, theta = lora_parameters(model), flatten_params(lora_parameters(model))
    shown = [pairs_of.encode_pair(pocket_tokenizer, p, "prompts", "code")[0] for p in pairs]

    def along():
        return (vh.last_hidden(model, shown)[:, 4] @ hack.d).mean()

    expected = flatten(list(torch.autograd.grad(along(), list(params.values()))))
    torch.testing.assert_close(v, expected / expected.norm(), rtol=1e-3, atol=1e-6)
    values = []
    for sign in (1, -1):
        write_params(params, theta + sign * 1e-2 * v)
        values.append(along().item())
    assert values[0] - values[1] == pytest.approx(2e-2 * expected.norm().item(), rel=0.1)


# --- the lifts -------------------------------------------------------------------------------------------------------------


def warm(model, size=0.02):
    generator = torch.Generator().manual_seed(1)
    for name, p in lora_parameters(model).items():
        if name.endswith(".B"):
            p.data = torch.randn(p.shape, generator=generator) * size
    return model


@pytest.mark.parametrize("most", [64, 300, 10**6])
def test_the_lift_is_the_same_however_few_pairs_are_held_at_a_time(pocket, pocket_tokenizer, pairs, monkeypatch, most):
    model = warm(inject(pocket, 4, 4, 0))
    hack = vh.extract(model, pocket_tokenizer, pairs, 10, 16)
    v = vh.lift(model, pocket_tokenizer, pairs, hack, VOCAB)
    monkeypatch.setattr(vh, "lift_tokens", lambda config, device: most)
    torch.testing.assert_close(vh.lift(model, pocket_tokenizer, pairs, hack, VOCAB), v, rtol=0, atol=1e-6)


def test_jacobian_lift_points_where_the_concept_grows(pocket, pocket_tokenizer, pairs):
    model = warm(inject(pocket, 4, 4, 0))
    hack = vh.extract(model, pocket_tokenizer, pairs, 10, 16)
    v = vh.lift(model, pocket_tokenizer, pairs, hack, VOCAB)
    assert v.norm().item() == pytest.approx(1, rel=1e-5)

    def concept():
        with torch.no_grad():
            h = vh.last_hidden(model, [s for p in pairs for s in vh.encode_pair(pocket_tokenizer, p)])[:, hack.layers].mean(1)
        return ((h[0::2] - h[1::2]) @ hack.d).mean().item()

    params, theta = lora_parameters(model), flatten_params(lora_parameters(model))
    values = []
    for sign in (1, -1):
        write_params(params, theta + sign * 1e-2 * v)
        values.append(concept())
    assert values[0] > values[1]  # the sign: along +v the model's states move hack-ward
    orthogonal = torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    orthogonal -= (orthogonal @ v) * v
    write_params(params, theta + 1e-2 * orthogonal / orthogonal.norm())
    up = concept()
    write_params(params, theta - 1e-2 * orthogonal / orthogonal.norm())
    assert abs(up - concept()) < 0.05 * (values[0] - values[1])


def test_at_b_zero_the_lift_is_zero_in_every_a(pocket, pocket_tokenizer, pairs):
    model = inject(pocket, 4, 4, 0)
    hack = vh.extract(model, pocket_tokenizer, pairs, 10, 16)
    for construction in ("jacobian", "outer", "contrast"):
        v = vh.lift(model, pocket_tokenizer, pairs[:6], hack, VOCAB, construction)
        table = slices(lora_parameters(model))
        assert all(v[s].abs().sum() == 0 for n, s in table.items() if n.endswith(".A"))
        assert v.norm().item() == pytest.approx(1, rel=1e-4)


# --- contrasts ---------------------------------------------------------------------------------------------------------------


def test_branches_are_tokenised_as_the_policy_would_emit_them(pocket_tokenizer):
    code = "```python\n" + CODE
    row = hack_contrasts(pocket_tokenizer, [Context([7, 7], code)])[0]
    assert len(row.hack) == len(FORMS)
    for (ids, start), form in zip(row.hack, FORMS):
        assert ids == [7, 7, *pocket_tokenizer.encode(code + form.format(name="run_tests"))]
        assert start == row.clean[1]
    whole = pocket_tokenizer.encode(code + FENCE)
    assert row.clean[0] == [7, 7, *whole]
    assert pocket_tokenizer.decode(whole[row.clean[1] - 2 :]) == FENCE  # nothing but the fence is scored


def test_contrast_rows_equal_one_backward_each(pocket, pocket_tokenizer):
    model = warm(inject(pocket, 4, 4, 0))
    rows = hack_contrasts(pocket_tokenizer, [Context([9, 8, 7], "```python\n" + CODE), Context([5], "```python\nx = 1\ny = 2")])
    rows += hack_contrasts(pocket_tokenizer, [Context([9, 8, 7], "```python\n" + CODE)], FORMS[:1])
    J, f = contrast_rows(model, rows, VOCAB, max_tokens=400)  # in more than one group
    params = lora_parameters(model)

    def logp(ids, start):
        full = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
        return sum(full[t - 1, ids[t]] for t in range(start, len(ids)))

    for i, row in enumerate(rows):
        value = torch.logsumexp(torch.stack([logp(*h) for h in row.hack]), 0) - logp(*row.clean)
        grads = torch.autograd.grad(value, list(params.values()))
        assert f[i].item() == pytest.approx(value.item(), abs=1e-3)
        torch.testing.assert_close(J[i], torch.cat([g.flatten() for g in grads]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("micro_tokens, most", [(1024, 4096), (2048, 8192), (16_384, 8192)])
def test_rows_hold_four_micro_batches_at_most(micro_tokens, most, monkeypatch):
    """A small --micro-tokens bounds their graph too, which otherwise is the largest thing in a run of a real model on a CPU."""
    asked = []

    def rows(model, rows, vocab, max_tokens):
        asked.append(max_tokens)
        return torch.zeros(0, 4), torch.zeros(0)

    monkeypatch.setattr("arms.cone.contrast_rows", rows)
    J, odds = joined_rows(None, [], micro_tokens, VOCAB, lambda x: x, lambda x: x)
    assert asked == [most] and J.shape == (0, 4) and odds is None


def test_contexts_come_from_clean_responses_two_a_prompt(pocket_tokenizer):
    def response(text):
        return pocket_tokenizer.encode(text)

    clean, hack = f"```python\n{CODE}\n```", f"```python\n{CODE}\n\ndef run_tests():\n    pass\n```"
    batch = [Rollout([1, 2], response(t), [], True) for t in (hack, clean, clean, clean, "no code")]
    batch += [Rollout([3], response(clean), [], True)]
    contexts = batch_contexts(pocket_tokenizer, batch, ["run_tests"] * 6, ["run_tests"], 24)
    assert [ids for ids, _, _ in contexts] == [[1, 2], [3], [1, 2]]
    assert all(code == "```python\n" + CODE for _, code, _ in contexts)
    assert len(batch_contexts(pocket_tokenizer, batch, ["run_tests"] * 6, ["run_tests"], 1)) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("", "no code", "```python\nx = 1", "```python\nrun_tests = lambda: 0\n```", "```python\ndef run_tests(): pass\n```"),
        *("```python\nx = 1```", "```python\n```", "Use ```python``` blocks.\n```python\nx = 1"),
        "```python\nx = 1\n```\nOr so:\n```python\nx = 2",  # the second block is unclosed
    ],
)
def test_what_is_no_clean_context(text):
    assert clean_code(text) is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\nx = 1\n```\nIt works.", "```python\nx = 1"),
        ("So:\n```\nx = 1\n```\nand\n```python\ny = 2\n```", "```\nx = 1\n```\nand\n```python\ny = 2"),
        ("Use ```python``` blocks.\n```python\nx = 1\n```", "```python\nx = 1"),
        ("```python\nx = 1\n```\nOr:\n```", "```python\nx = 1"),
    ],
)
def test_a_clean_context_goes_up_to_the_last_closing_fence(text, code):
    assert clean_code(text) == code


def test_nonhack_control_is_about_the_methods_name(pocket_tokenizer):
    row = nonhack_contrasts(pocket_tokenizer, [Context([4], "```python\n" + CODE)])[0]
    assert "helper" in pocket_tokenizer.decode(row.hack[0][0]) and "def run_tests" not in pocket_tokenizer.decode(row.hack[0][0])


def test_shared_tokens_count_as_context():
    class Letters:
        def encode(self, text, add_special_tokens=False):
            return [ord(c) for c in text]

    row = contrast(Letters(), [0], "ab", ["cx", "cy"], "cz")
    assert row == Contrast([([0, 97, 98, 99, 120], 4), ([0, 97, 98, 99, 121], 4)], ([0, 97, 98, 99, 122], 4))


def test_steering_reports_a_rate_for_every_strength(pocket, pocket_tokenizer, pairs, problems):
    inject(pocket, 4, 4, 0)
    hack = vh.extract(pocket, pocket_tokenizer, pairs, 10, 16)
    result = vh.steer(pocket, pocket_tokenizer, hack, problems[:2], Config(max_new_tokens=48), 4096, (0.0, 2.0))
    assert list(result["rates"]) == ["0.0", "2.0"] and all(0 <= r <= 1 for r in result["rates"].values())
    assert len(result["samples"]) == 2 and isinstance(result["rises"], bool)


def test_states_are_pushed_where_they_are_read(pocket):
    """The last layer's behind the final norm: before it the same vector would be in other units."""
    ids, push = torch.tensor([[5, 6, 7]]), torch.randn(128, generator=torch.Generator().manual_seed(0))
    third, seen = pocket.model.layers[2], []
    third.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def states():
        """Those that layer 3 gets, and those that the logits are made from."""
        with torch.no_grad():
            last = pocket.model(input_ids=ids).last_hidden_state
        return seen.pop(), last

    before = states()
    with steering.pushed(pocket, [2], push):
        after = states()
    torch.testing.assert_close(after[0] - before[0], push.expand(1, 3, -1), rtol=1e-4, atol=1e-4)
    with steering.pushed(pocket, [4], push):
        after = states()
    torch.testing.assert_close(after[1] - before[1], push.expand(1, 3, -1), rtol=1e-4, atol=1e-4)
    assert torch.equal(after[0], before[0]) and torch.equal(states()[1], before[1]), "the hooks are gone"


@pytest.mark.parametrize("rates, n, up", [([0.0, 0.0], 128, False), ([0.0, 0.017], 128, False), ([0.0, 0.018], 128, True),
                                          ([0.5, 0.58], 128, False), ([0.5, 0.3, 0.59], 128, True)])  # fmt: skip
def test_what_counts_as_a_rise(rates, n, up):
    assert steering.rises(rates, n) == up


@pytest.mark.parametrize("rises", [False, True])
def test_an_arm_with_a_gate_stops_in_one_line_where_steering_raises_nothing(rises, monkeypatch, tmp_path, capsys):
    """Before anything is written; and a direction that steers passes."""
    found = dict(rates={"0.0": 0.1, "1.0": 0.1}, rises=rises, samples=[])
    monkeypatch.setattr(vh, "steer", lambda *_: found)
    out = tmp_path / "run"
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join((POCKET / "heldout.jsonl").read_text().splitlines(keepends=True)[:2]))
    given = dict(steps=1, batch=4, generations=2, pairs=12, pairs_heldout=4, eval_samples=1, max_new_tokens=24, workers=1)
    cfg = Config(arm="projected_gated", scale="pocket", **given, heldout=str(heldout), out=out)
    monkeypatch.setattr(grpo, "CONFIG", cfg, raising=False)
    assert grpo.main() == (0 if rises else 2)
    said = capsys.readouterr().err
    assert out.exists() == rises
    assert rises or [x for x in said.splitlines() if x.startswith("error: ") and "python -m study.search" in x]
    if rises:
        kept = vh.load(out / "v_hack.safetensors")
        assert (kept.contrast, kept.position, kept.m, kept.layers) == ("prompts", "code", 64, [4])


def test_tiny_random_model_does_not_define_a_band_outside_its_depth():
    assert vh.band(len(vh.decoder_layers(tiny_qwen3()))) == [2]


# --- the command -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def extraction(tmp_path, monkeypatch):
    """A small extraction; what its samplers were closed with."""
    closed = []
    monkeypatch.setattr(TorchSampler, "close", lambda self: closed.append(self))
    options = dict(scale="pocket", pairs=12, pairs_heldout=4, steer_prompts=1, max_new_tokens=24, out=tmp_path / "v.safetensors")
    cfg = Config(**options)
    monkeypatch.setattr(vh, "CONFIG", cfg, raising=False)
    return cfg, closed


def test_the_command_closes_its_sampler_and_writes_the_whole_file(extraction, capsys):
    cfg, closed = extraction
    assert vh.main() == 0, capsys.readouterr().err
    assert len(closed) == 1 and vh.load(cfg.out).d.norm() == pytest.approx(1)
    assert [p.name for p in cfg.out.parent.iterdir()] == ["v.safetensors"]
    before = cfg.out.read_bytes()
    assert vh.main() == 2 and "already exists" in capsys.readouterr().err and cfg.out.read_bytes() == before


def test_the_command_closes_its_sampler_when_it_fails(extraction, capsys):
    cfg, closed = extraction
    cfg.pairs = 10**6  # more than there are problems
    assert vh.main() == 2 and "lower --pairs" in capsys.readouterr().err and len(closed) == 1 and not cfg.out.exists()


@pytest.mark.parametrize("out", ["missing/v.safetensors", "file/v.safetensors"])
def test_a_place_that_cannot_be_written_is_said_before_the_work(out, extraction, tmp_path, capsys):
    cfg, closed = extraction
    (tmp_path / "file").write_text("")
    cfg.out = tmp_path / out
    assert vh.main() == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "held-out" not in said.out and not closed


def test_a_direction_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    hack = vh.VHack(torch.ones(4) / 2, 1.0, [1], 1, 2, 1.0, 0.5, [(1, 1.0, 2.0)], "abc")
    vh.save(hack, tmp_path / "v.safetensors", "m")
    before = (tmp_path / "v.safetensors").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        vh.save(dataclasses.replace(hack, gap=2.0), tmp_path / "v.safetensors", "m")
    assert (tmp_path / "v.safetensors").read_bytes() == before and vh.load(tmp_path / "v.safetensors").gap == 1.0


def test_a_full_disk_ends_the_command_with_one_line(extraction, monkeypatch, capsys):
    cfg, closed = extraction
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert vh.main() == 2 and "No space left" in capsys.readouterr().err and len(closed) == 1 and not cfg.out.exists()


# --- setting up ----------------------------------------------------------------------------------------------------------------


def test_a_set_up_that_fails_after_the_engine_started_ends_the_engine(extraction, tmp_path, monkeypatch):
    """A run folder without an adapter; and a model that the adapter does not fit, which inject says."""
    cfg, closed = extraction
    cfg = filled(cfg, "pocket")
    (tmp_path / "config.json").write_text(json.dumps({"config": portable(cfg)}))
    with pytest.raises(UserError, match="cannot read the adapter"):
        setup.open_run(tmp_path)
    assert len(closed) == 1
    saved = {"config": portable(cfg), "hashes": setup.hashes(cfg)}
    for what, path in (("model", cfg.model), ("heldout", cfg.heldout)):
        other = saved | {"hashes": saved["hashes"] | {what: "of another"}}
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=f"was trained with another {path} than the one"):
            setup.open_run(tmp_path)
    assert len(closed) == 1, "nothing was started for it"
    monkeypatch.setattr(setup, "inject", partial(inject, targets="no such layer"))
    with pytest.raises(UserError, match="no linear layer"):
        setup.set_up(cfg)
    assert len(closed) == 2


def damaged(folder, how):
    shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("*.jsonl", "*.manifest", "*.py", "__pycache__"))
    files = {"weights": "model.safetensors", "tokenizer": "tokenizer.json", "config": "config.json"}
    path = folder / files.get(how, "chat_template.jinja")
    if how in ("weights", "tokenizer"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "config":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": "wide"}))
    elif how == "no template":
        path.unlink()
    elif how in ("nan", "huge"):
        weights = load_file(folder / "model.safetensors")
        name = next(n for n in weights if n.endswith("down_proj.weight"))
        weights[name][:] = float("nan") if how == "nan" else torch.finfo(weights[name].dtype).max
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        path.write_text({"broken": "{% if %}", "empty": "", "refusing": "{{ raise_exception('no') }}"}[how.split()[0]])


@pytest.mark.parametrize(
    "how, words",
    [
        ("weights", "cannot load the model"),
        ("tokenizer", "cannot load the tokenizer"),
        ("config", "hidden_size"),
        ("no template", "chat template"),
        ("broken template", "chat template"),
        ("empty template", "empty prompt"),
        ("refusing template", "chat template"),
        ("nan", "down_proj.weight holds values that are not finite"),
        ("huge", "weights are damaged"),
    ],
)
def test_a_damaged_model_is_one_line(how, words, extraction, tmp_path, capsys):
    """And none that blames the learning rate: no step was done."""
    cfg, _ = extraction
    damaged(tmp_path / "model", how)
    cfg.model = str(tmp_path / "model")
    assert vh.main() == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert words in line and "--lr" not in line and not cfg.out.exists()
