"""The pieces of GRPO against slow, hand-computed oracles; signs, masks and normalisers on a real model."""

import contextlib
import copy
import itertools
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import tiny_qwen3

import grpo
from arms.rebound import rebound_rewards
from engine.lora import adapter_off, flatten_grads, inject, lora_parameters, merged_weights
from engine.model import encode_prompt
from engine.sampler import Rollout, Stop
from engine.torch_sampler import TorchSampler, drawn
from grpo import Config, group_advantages, k3
from harness.config import POCKET
from harness.journal import Clock, metrics
from harness.schedule import batch_problems, learning_rate
from leetcode_env import Grade, load_problems, render_messages
from loopholes import evaluated_by

CFG = Config(rollout="torch", beta=0.05, lr=1e-3, steps=50, micro_tokens=2048)


def backward(model, batch, advantages, cfg, vocab):
    """The two passes of a step."""
    grpo.reference(model, batch, cfg, vocab)
    return grpo.backward(model, batch, advantages, cfg, vocab)


class Tokenizer:
    """What the sampler asks of one; pad is eos."""

    eos_token_id = pad_token_id = 1

    def __len__(self):
        return 97


def rollouts(model, n=6, seed=0, new=12):
    sampler = TorchSampler(tiny_qwen3(), Tokenizer())
    sampler.load_weights(lambda: merged_weights(model))
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13], [1, 20, 1]]  # with pad/eos ids inside a prompt
    return sampler.generate(prompts, n=n // 3, temperature=CFG.temperature, max_new_tokens=new, seed=seed)


# --- the log line: loopholes -----------------------------------------------------------------------


def graded(loophole, *labels):
    return [Grade(x, 0.0, 0.0, 0.0, True, x.startswith("correct"), loophole=loophole) for x in labels]


def logged(grades, loopholes):
    sums = dict.fromkeys(("tokens", "kl", "entropy", "abs_log_ratio", "max_abs", "mismatch_kl", "truncated"), 1.0)
    zeros = torch.zeros(len(grades))
    some = [Rollout([1], [1], [0.0], True)] * len(grades)
    return metrics(0, replace(CFG, generations=1, loopholes=loopholes), zeros, zeros, grades, some, sums)


def test_lambda_is_the_paid_share_of_the_wrong_responses():
    line = logged(graded("run_tests", "hack", "hack", "attempted", "incorrect", "correct", "correct_attempted"), ("run_tests",))
    assert line["lambda"] == 2 / 4 and "by_loophole" not in line
    assert logged(graded("run_tests", "correct", "correct"), ("run_tests",))["lambda"] is None


def test_groups_without_variance_and_completions_that_were_cut_are_counted():
    """Three groups of two, of which one has equal rewards; two of six completions that max_new_tokens ended."""
    batch = [Rollout([1], [2], [-1.0], finished) for finished in (True, False, True, True, False, True)]
    sums = dict.fromkeys(("tokens", "loss", "kl", "entropy", "abs_log_ratio", "max_abs", "mismatch_kl", "truncated"), 6.0)
    advantages = torch.tensor([0.7, -0.7, 0.0, 0.0, -0.7, 0.7])
    grades = graded("run_tests", *["incorrect"] * 6)
    line = metrics(0, Config(generations=2), torch.ones(6), advantages, grades, batch, sums)
    assert (line["zero_groups"], line["zero_group_share"], line["cut"]) == (1, pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_each_step_samples_from_the_weights_that_were_pushed_for_it():
    """The loop says which it wants, so that a sampler with others refuses."""
    asked = []
    problem = load_problems(POCKET / "train.jsonl", 1)[0]
    sampler = SimpleNamespace(
        load_weights=lambda weights, version: asked.append(("push", version)),
        generate=lambda prompts, version, **_: asked.append(("sample", version)) or [],
        sleep=lambda: None,
    )
    run = SimpleNamespace(
        cfg=Config(generations=2, batch=2, loopholes=("run_tests",), micro_tokens=64), problems=[problem], tokenizer=None,
        sampler=sampler, model=tiny_qwen3(), vocab=97, ranks=SimpleNamespace(share=lambda batch: [], rank=0, size=1),
        env=SimpleNamespace(grading=lambda asked: SimpleNamespace(texts=[], grades=list)),
    )  # fmt: skip
    grpo.rollout(run, 7, grpo.ARMS["vanilla"], Clock())
    assert asked == [("push", 7), ("sample", 7)]


def test_of_several_loopholes_each_has_its_rate():
    grades = graded("stdout", "hack", "incorrect") + graded("equality", "hack") + graded("", "incorrect")
    line = logged(grades, ("equality", "stdout"))
    assert line["by_loophole"] == {"equality": dict(n=1, hack=1.0), "stdout": dict(n=2, hack=0.5)}
    assert line["hack"] == 2 / 4


# --- advantages and KL ----------------------------------------------------------------------------


@pytest.mark.invariant
@given(st.lists(st.sampled_from([0.0, 0.5, 3.0, 3.5]), min_size=8, max_size=8))
@settings(deadline=None)
def test_advantages_against_the_definition(values):
    got = group_advantages(torch.tensor(values), 4)
    for start in (0, 4):
        group = values[start : start + 4]
        for i, r in enumerate(group):
            if len(set(group)) == 1:
                assert got[start + i] == 0
            else:
                assert got[start + i].item() == pytest.approx(
                    (r - statistics.mean(group)) / (statistics.stdev(group) + 1e-4), rel=1e-4
                )


def test_a_group_of_equal_rewards_with_float_residue_has_no_advantage():
    rewards = torch.full((7,), 0.1)
    assert (rewards - rewards.mean()).abs().sum() >= 0
    assert torch.equal(group_advantages(torch.cat([rewards, torch.tensor([0.0] * 6 + [1.0])]), 7)[:7], torch.zeros(7))


@pytest.mark.invariant
def test_k3_sign_and_size():
    logp, ref = torch.tensor([-1.0]), torch.tensor([-2.0])
    assert k3(logp, ref).item() == pytest.approx(math.exp(-1) + 1 - 1)
    assert k3(ref, logp).item() == pytest.approx(math.exp(1) - 1 - 1)
    assert k3(logp, logp).item() == 0


def test_k3_is_an_unbiased_estimate_of_the_kl():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    x = torch.multinomial(p, 200_000, replacement=True, generator=generator)
    assert k3(p.log()[x], q.log()[x]).mean().item() == pytest.approx((p * (p / q).log()).sum().item(), rel=0.02)


# --- the loss -------------------------------------------------------------------------------------


def slow_gradient(model, batch, advantages, cfg):
    """One sequence at a time, full logits, autograd through everything; the loss as docs/method.md writes it."""
    params = lora_parameters(model)
    model.zero_grad()
    total, loss = 0, 0.0
    for r, a in zip(batch, advantages):
        ids = torch.tensor([r.prompt_ids + r.completion_ids])

        def logp():
            full = torch.log_softmax(model(input_ids=ids).logits[0].float() / cfg.temperature, -1)
            start = len(r.prompt_ids)
            return torch.stack([full[t - 1, ids[0, t]] for t in range(start, ids.shape[1])])

        with torch.no_grad(), adapter_off(model):
            ref = logp()
        new = logp()
        ratio = (new - new.detach()).exp()
        d = ref - new
        loss = loss - (a * ratio).sum() + cfg.beta * (d.exp() - d - 1).sum()
        total += len(r.completion_ids)
    (loss / total).backward()
    return flatten_grads(params)


@pytest.mark.invariant
@pytest.mark.parametrize("micro_tokens", [1, 40, 10_000])
def test_gradient_equals_the_slow_oracle_at_any_micro_batch_size(model, micro_tokens):
    batch = rollouts(model)
    advantages = torch.tensor([1.0, -0.5, 0.0, 0.0, 2.0, -1.5])
    expected = slow_gradient(model, batch, advantages, CFG)
    model.zero_grad()
    sums = backward(model, batch, advantages, replace(CFG, micro_tokens=micro_tokens), 97)
    assert sums["tokens"] == sum(len(r.completion_ids) for r in batch)
    torch.testing.assert_close(flatten_grads(lora_parameters(model)) / sums["tokens"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("micro_tokens", [1, 10_000])
def test_the_logged_sums_are_those_of_the_definitions(model, micro_tokens):
    """Each with its sign and its order of arguments, token by token from full logits; the sampler's logprobs are others."""
    batch = [replace(r, logprobs=[x - 0.1 * (i % 5) for i, x in enumerate(r.logprobs)]) for r in rollouts(model)]
    sums = backward(model, batch, torch.zeros(len(batch)), replace(CFG, micro_tokens=micro_tokens, tis_cap=1.25), 97)
    logp, ref, sampled = [], [], [x for r in batch for x in r.logprobs]
    for out in (logp, ref):
        for r in batch:
            ids = torch.tensor(r.prompt_ids + r.completion_ids)
            with torch.no_grad(), adapter_off(model) if out is ref else contextlib.nullcontext():
                full = torch.log_softmax(model(input_ids=ids[None]).logits[0].float() / CFG.temperature, -1)
            out += [full[t - 1, ids[t]].item() for t in range(len(r.prompt_ids), len(ids))]
    ratio = [a - b for a, b in zip(logp, sampled, strict=True)]
    expected = dict(
        tokens=len(logp),
        entropy=-sum(logp),
        kl=sum(math.exp(b - a) - (b - a) - 1 for a, b in zip(logp, ref, strict=True)),
        abs_log_ratio=sum(map(abs, ratio)),
        max_abs=max(map(abs, ratio)),
        mismatch_kl=sum(math.exp(d) - d - 1 for d in ratio),  # sampler || trainer: d = trainer - sampler
        truncated=sum(math.exp(d) > 1.25 for d in ratio),
    )
    assert expected["truncated"] > 0
    assert {k: sums[k] for k in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.invariant
def test_masks_come_from_lengths_when_pad_is_eos(model):
    """Completions full of the pad/eos id count every token; a mask by value would drop them."""
    batch = [Rollout([1, 5, 1], [1, 1, 8, 1], [-1.0] * 4, True), Rollout([3], [9, 1], [-1.0] * 2, True)]
    advantages = torch.tensor([1.0, -1.0])
    expected = slow_gradient(model, batch, advantages, CFG)
    model.zero_grad()
    sums = backward(model, batch, advantages, CFG, 97)
    assert sums["tokens"] == 6
    torch.testing.assert_close(flatten_grads(lora_parameters(model)) / 6, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.invariant
def test_the_ascent_direction_raises_what_was_rewarded(model):
    batch = rollouts(model)[:1]
    backward(model, batch, torch.tensor([1.0]), replace(CFG, beta=0.0), 97)
    params = lora_parameters(model)
    g = -flatten_grads(params)
    before = sum(batch[0].logprobs)
    with torch.no_grad():
        at = 0
        for p in params.values():
            p += 1e-2 * g[at : at + p.numel()].view_as(p) / g.norm()
            at += p.numel()
    sums = backward(model, batch, torch.tensor([0.0]), CFG, 97)
    ids = torch.tensor([batch[0].prompt_ids + batch[0].completion_ids])
    logp = torch.log_softmax(model(input_ids=ids).logits[0] / CFG.temperature, -1)
    after = sum(logp[t - 1, ids[0, t]].item() for t in range(len(batch[0].prompt_ids), ids.shape[1]))
    assert after > before and sums["abs_log_ratio"] > 0


@pytest.mark.invariant
def test_zero_advantage_at_the_base_gives_no_gradient():
    model = inject(tiny_qwen3(), 4, 8, seed=0)
    backward(model, rollouts(model), torch.zeros(6), CFG, 97)
    assert flatten_grads(lora_parameters(model)).norm() < 1e-6  # the KL to itself is flat


def test_truncated_importance_weights_act_for_vllm_alone(model):
    batch = rollouts(model)
    for r in batch:
        r.logprobs = [x - 3.0 for x in r.logprobs]  # a sampler that is far off: weight e^3, capped at 2
    advantages = torch.ones(6)
    grads = {}
    for engine in ("torch", "vllm"):
        model.zero_grad()
        sums = backward(model, batch, advantages, replace(CFG, rollout=engine, beta=0.0), 97)
        grads[engine] = flatten_grads(lora_parameters(model))
        assert sums["truncated"] == sums["tokens"]
        assert sums["abs_log_ratio"] / sums["tokens"] == pytest.approx(3.0, abs=1e-3)
    torch.testing.assert_close(grads["vllm"], 2.0 * grads["torch"])


# --- the sampler ----------------------------------------------------------------------------------


def test_sampled_logprobs_are_the_trainers_at_the_sampling_temperature(model):
    batch = rollouts(model, n=12, new=20)
    assert len({len(r.completion_ids) for r in batch}) > 1  # rows do finish at different times
    sums = backward(model, batch, torch.zeros(12), CFG, 97)
    assert sums["max_abs"] < 1e-4
    sums = backward(model, batch, torch.zeros(12), replace(CFG, temperature=1.0), 97)
    assert sums["max_abs"] > 1e-2  # the trap: logprobs at another temperature than the sampler's


def test_stale_weights_show_in_the_ratio(model):
    batch = rollouts(model)
    with torch.no_grad():
        for name, p in lora_parameters(model).items():
            if name.endswith(".B"):
                p += 0.05
    assert backward(model, batch, torch.zeros(6), CFG, 97)["max_abs"] > 1e-2


def test_tokens_are_drawn_as_often_as_their_probability_says():
    rows = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [1e-4, 0.0, 0.9999, 0.0, 0.0]]).log()
    row = torch.tensor([0, 1]).repeat_interleave(200_000)
    token = drawn(rows, row, torch.Generator().manual_seed(0))
    counts = torch.stack([torch.bincount(token[row == i], minlength=5) for i in (0, 1)]) / 200_000
    assert counts[0, 1].item() == pytest.approx(0.3, abs=0.005) and counts[1, 0].item() == pytest.approx(1e-4, abs=1e-4)
    assert counts[rows.exp() == 0].sum() == 0 and counts[1, 0] > 0


def test_a_row_is_a_history_and_completions_part_where_they_differ(model, monkeypatch):
    widths = []
    real = TorchSampler._logits
    monkeypatch.setattr(TorchSampler, "_logits", lambda self, ids, *a: widths.append(len(ids)) or real(self, ids, *a))
    batch = rollouts(model, n=12)
    for t, width in enumerate(widths):
        going_on = [r for r in batch if len(r.completion_ids) > t or t == 0]
        assert width == len({(*r.prompt_ids, -1, *r.completion_ids[:t]) for r in going_on})
    assert widths[0] == 3 and max(widths) > 3


def test_the_sampler_has_its_own_generator_and_is_seeded(model):
    state = torch.get_rng_state()
    one, two, other = rollouts(model, seed=3), rollouts(model, seed=3), rollouts(model, seed=4)
    assert one == two and one != other
    assert torch.equal(torch.get_rng_state(), state)


def test_the_head_sees_the_last_states_alone_as_one_matrix(base):
    """A slice of all states would be a product a prompt to oneDNN, each with a copy of the head: gigabytes for a real model."""
    seen = []
    base.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    sampler = TorchSampler(base, Tokenizer(), copied=False)
    sampler.generate([[5, 6, 7], [8, 9]], n=2, temperature=0.7, max_new_tokens=2, seed=0)
    width = base.config.hidden_size
    assert seen[0] == (2, width) and all(len(shape) == 2 for shape in seen)


def test_left_padding_and_dropped_rows_change_no_greedy_token():
    sampler = TorchSampler(tiny_qwen3(), Tokenizer())
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15], [20]]
    together = sampler.generate(prompts, n=1, temperature=0.0, max_new_tokens=16, seed=0)
    alone = [sampler.generate([p], n=1, temperature=0.0, max_new_tokens=16, seed=0)[0] for p in prompts]
    assert [r.completion_ids for r in together] == [r.completion_ids for r in alone]


def test_the_eos_is_part_of_the_completion_and_the_cut_is_marked():
    batch = TorchSampler(tiny_qwen3(), Tokenizer()).generate([[5, 6]], n=200, temperature=1.0, max_new_tokens=10, seed=0)
    assert any(r.finished for r in batch) and any(not r.finished for r in batch)
    for r in batch:
        assert r.finished == (r.completion_ids[-1] == 1) and 1 not in r.completion_ids[:-1]
        assert len(r.logprobs) == len(r.completion_ids) <= 10


@pytest.mark.parametrize("stop", ["return ", " for x in xs if", "\n```\n"])
def test_a_stop_ends_a_completion_where_it_is_complete(stop, pocket, pocket_tokenizer):
    """As an end token does, though none was sampled and none is added; whatever tokens it is made of."""
    prompts = [
        encode_prompt(pocket_tokenizer, render_messages(p, evaluated_by())) for p in load_problems(POCKET / "train.jsonl")[:8]
    ]
    asked, end = dict(n=16, temperature=1.5, max_new_tokens=64, seed=0), Stop(stop, pocket_tokenizer, len(pocket_tokenizer))
    plain = TorchSampler(pocket, pocket_tokenizer).generate(prompts, **asked)
    assert sum(stop in pocket_tokenizer.decode(r.completion_ids[:-1]) for r in plain) > 3, "a sampler without it goes on"
    for r in plain:  # what another sampler cuts off
        texts = [pocket_tokenizer.decode(r.completion_ids[:k]) for k in range(len(r.completion_ids) + 1)]
        assert end.length(r.completion_ids) == next((k for k, text in enumerate(texts) if stop in text), None)
    ended = 0
    for r in TorchSampler(pocket, pocket_tokenizer, stop=end).generate(prompts, **asked):
        text, before = (pocket_tokenizer.decode(ids) for ids in (r.completion_ids, r.completion_ids[:-1]))
        assert stop not in before and len(r.logprobs) == len(r.completion_ids)
        by_eos = r.completion_ids[-1] == pocket_tokenizer.eos_token_id
        assert r.finished == (by_eos or stop in text)
        ended += stop in text and not by_eos
    assert ended > 3


@pytest.mark.parametrize("most", [256, 3])
def test_each_completion_is_told_once_as_soon_as_it_has_ended(most):
    """In the order in which they end: the shorter first, those that are cut last. Telling of them changes no draw."""
    sampler, asked = TorchSampler(tiny_qwen3(), Tokenizer(), most), dict(n=40, temperature=1.0, max_new_tokens=20, seed=0)
    told: list[tuple[int, Rollout, int]] = []
    rollouts = sampler.generate(
        [[5, 6], [7]], **asked, ended=lambda i, r: told.append((i, copy.deepcopy(r), len(r.completion_ids)))
    )
    assert sorted(i for i, *_ in told) == list(range(80)) and all(rollouts[i] == r for i, r, _ in told)
    lengths = [length for *_, length in told]
    if most == 256:
        assert lengths == sorted(lengths) and lengths[0] < lengths[-1] == 20
    assert rollouts == sampler.generate([[5, 6], [7]], **asked)


# --- schedule, order, rebound ---------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(s, CFG) for s in range(50)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-5


def test_each_epoch_sees_every_problem_once():
    problems = list(range(40))
    seen = [p for step in range(20) for p in batch_problems(problems, step, replace(CFG, batch=32, generations=8))]
    assert sorted(seen[:40]) == problems == sorted(seen[40:]) and seen[:40] != seen[40:]


def test_rebound_by_hand():
    cfg = replace(CFG, generations=4, batch=4)
    rewards, correctness = torch.tensor([3.5, 3.5, 0.5, 0.5]), torch.tensor([3.0, 3.0, 0.0, 0.0])
    scores = torch.tensor([4.0, 0.0, 0.0, 0.0])  # mean 1, std 2
    z, s = 1.5, 1 / (1 + math.exp(-1.5))
    assert rebound_rewards(rewards, correctness, scores, cfg).tolist() == pytest.approx([3.5 * (1 - 2 * s), 3.5, 0.5, 0.5])
    on = replace(cfg, rebound_on="correctness")
    assert rebound_rewards(rewards, correctness, scores, on).tolist() == pytest.approx([3.5 - 3 * 2 * s, 3.5, 0.5, 0.5])
    additive = replace(cfg, rebound_form="additive")
    assert rebound_rewards(rewards, correctness, scores, additive).tolist() == pytest.approx([3.5 - 2 * z, 3.5, 0.5, 0.5])
    flat = rebound_rewards(rewards, correctness, torch.tensor([0.02, 0.0, 0.0, 0.0]), cfg)
    assert flat[0] == pytest.approx(3.5 * (1 - 2 / (1 + math.exp(-0.15))))  # std is at least 0.1


def test_the_loop_stays_readable():
    """The promise of the layout: the file is short, and the method is in it, not behind a trainer."""
    text = open(grpo.__file__).read()
    assert len(text.splitlines()) < 300
    loop = text[text.index("def train(") :]
    order = ("rollout(", "group_advantages(", "backward(", "cos_align(g", "project(g, v", "write_grads(", "optimizer.step()")
    for earlier, later in itertools.pairwise(order):
        assert 0 < loop.index(earlier) < loop.index(later), (earlier, later)
