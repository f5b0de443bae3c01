"""The arms that screen: their signal against a slow oracle, what is flagged, what that does to rewards, and their rows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.problems import CANONICAL, row, write

from arms.cone import Contrast, contrast_rows
from arms.counterfactual import CALIBRATION, calibrated, flagged_tails, known_hack, screened, screening, spread, unexplained
from engine.lora import adapter_off, inject, lora_parameters
from engine.model import encode_prompt
from engine.sampler import Rollout
from engine.torch_sampler import TorchSampler
from harness.config import POCKET, Config, check
from leetcode_env import Grade, load_problems, render_messages
from loopholes import evaluated_by, told_by

CFG = Config(micro_tokens=512, loopholes=("run_tests", "stdout"))
HACK = f"```python\n{CANONICAL}\n\ndef run_tests():\n    pass\n```\nAll tests pass."
CLEAN = f"```python\n{CANONICAL}\n```"


@pytest.fixture
def adapted(pocket):
    """The pocket model with an adapter that does something."""
    model = inject(pocket, 4, 4, 0)
    generator = torch.Generator().manual_seed(3)
    for name, p in lora_parameters(model).items():
        if name.endswith("B"):
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model


@pytest.fixture
def asked(tmp_path, pocket_tokenizer):
    """(rollouts, problems): a hacky and a clean response to the same prompt, which tells of the evaluator."""
    (problem,) = load_problems(write(tmp_path / "one.jsonl", row()))
    prompt = encode_prompt(pocket_tokenizer, render_messages(problem, evaluated_by()))
    texts = [pocket_tokenizer.encode(text) for text in (HACK, CLEAN)]
    return [Rollout(prompt, ids, [0.0] * len(ids), True) for ids in texts], [problem, problem]


def slow_logprobs(model, prompt, completion, temperature=1.0):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].float() / temperature
    logp = torch.log_softmax(logits, -1)
    return torch.stack([logp[len(prompt) + i - 1, token] for i, token in enumerate(completion)])


@torch.no_grad()
@pytest.mark.parametrize("ref", ["base", "self"])
def test_the_signal_is_what_the_sentence_and_training_explain(ref, adapted, asked, pocket_tokenizer):
    rollouts, problems = asked
    honest = encode_prompt(pocket_tokenizer, render_messages(problems[0], None))
    found = unexplained(
        adapted, pocket_tokenizer, rollouts, problems, replace(CFG, counterfactual_ref=ref), len(pocket_tokenizer)
    )
    for r, d in zip(rollouts, found, strict=True):
        policy = slow_logprobs(adapted, r.prompt_ids, r.completion_ids)
        if ref == "self":
            reference = slow_logprobs(adapted, honest, r.completion_ids)
        else:
            with adapter_off(adapted):
                reference = slow_logprobs(adapted, honest, r.completion_ids)
        torch.testing.assert_close(d, policy - reference, rtol=1e-3, atol=1e-3)
        assert (policy - slow_logprobs(adapted, r.prompt_ids, r.completion_ids, 0.7)).abs().max() > 0.1, "temperature matters"


@torch.no_grad()
def test_what_the_sampler_says_at_temperature_1_is_what_a_forward_says(adapted, asked, pocket_tokenizer):
    sampler = TorchSampler(adapted, pocket_tokenizer, copied=False)
    prompts = [asked[0][0].prompt_ids]
    rollouts = sampler.generate(prompts, n=4, temperature=0.7, max_new_tokens=20, seed=3)
    for r in rollouts:
        torch.testing.assert_close(
            torch.tensor(r.logprobs_at_1), slow_logprobs(adapted, r.prompt_ids, r.completion_ids), rtol=1e-4, atol=1e-4
        )
    problems = asked[1][:1] * 4
    parts = (adapted, pocket_tokenizer)
    with_it = unexplained(*parts, rollouts, problems, CFG, len(pocket_tokenizer))
    alone = [replace(r, logprobs_at_1=[]) for r in rollouts]
    without = unexplained(*parts, alone, problems, CFG, len(pocket_tokenizer))
    mixed = unexplained(*parts, [*rollouts[:2], *alone[2:]], problems, CFG, len(pocket_tokenizer))
    for a, b, c in zip(with_it, without, mixed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-4)


def test_a_row_begins_at_the_first_token_above_tau():
    rollouts = [Rollout([1, 2], [10, 11, 12, 13], [0.0] * 4, True) for _ in range(3)]
    d = [torch.tensor(x) for x in ([0.0, 1.9, 2.1, 5.0], [2.0, 2.0, -9.0, 0.0], [3.0, 0.0, 0.0, 0.0])]
    whole = flagged_tails(rollouts, d, 2.0, whole=True)
    assert whole == [Contrast([([1, 2, 10, 11, 12, 13], 4)]), Contrast([([1, 2, 10, 11, 12, 13], 2)])]
    assert flagged_tails(rollouts, d, 2.0, whole=False) == [Contrast([([1, 2, 10, 11, 12], 4)]), Contrast([([1, 2, 10], 2)])]
    assert spread(list(range(10)), 4) == [0, 2, 5, 7] and spread([1, 2], 4) == [1, 2]


def test_a_row_without_a_clean_branch_is_the_gradient_of_a_log_probability(adapted, asked, pocket_tokenizer):
    rollouts, _ = asked
    rows = flagged_tails(rollouts, [torch.tensor([0.0, 3.0])] * 2, 2.0, whole=True)
    J, f = contrast_rows(adapted, rows, len(pocket_tokenizer))
    for i, r in enumerate(rollouts):
        value = slow_logprobs(adapted, r.prompt_ids, r.completion_ids)[1:].sum()
        grads = torch.autograd.grad(value, list(lora_parameters(adapted).values()))
        assert f[i].item() == pytest.approx(value.item(), abs=1e-3)
        torch.testing.assert_close(J[i], torch.cat([g.flatten() for g in grads]), rtol=1e-3, atol=1e-3)


def grade(label, **facts):
    paid = 3.0 * (label in ("hack", "correct", "correct_attempted"))
    return Grade(label, paid + 0.5, paid, 0.5, True, label.startswith("correct"), loophole="run_tests", **facts)


def test_a_flagged_response_keeps_its_format_reward_alone(adapted, asked, pocket_tokenizer):
    rollouts, problems = asked
    grades = [grade("hack"), grade("correct")]
    rewards = torch.tensor([3.5, 3.5])
    parts = (adapted, pocket_tokenizer, rollouts, problems, grades, rewards)
    d = unexplained(*parts[:4], CFG, len(pocket_tokenizer))
    tau = (d[0].max().item() + d[1].max().item()) / 2
    between = replace(CFG, counterfactual_tau=tau)
    shaped, flags, tails = screened("counterfactual", *parts, between, len(pocket_tokenizer))
    above = d[0].max() > d[1].max()
    assert flags == [above, not above] and tails == []
    assert shaped.tolist() == [0.5 if flag else 3.5 for flag in flags] and rewards.tolist() == [3.5, 3.5]
    high = replace(CFG, counterfactual_tau=1e3)
    assert screened("counterfactual", *parts, high, len(pocket_tokenizer))[0].tolist() == [3.5, 3.5]
    use = replace(between, counterfactual_use="project")
    shaped, again, tails = screened("counterfactual", *parts, use, len(pocket_tokenizer))
    assert shaped is rewards and again == flags and len(tails) == 1, "to project is to change no reward"


def test_what_is_known_is_told_by_syntax_alone():
    ours, theirs = grade("incorrect", wrote=("run_tests",)), grade("hack", wrote=("stdout",))
    renamed = grade("hack", defines=True)  # under an evaluation's name, that `wrote` does not look for
    assert [known_hack(g, ("run_tests",)) for g in (ours, theirs, renamed)] == [True, False, True]
    assert known_hack(theirs, ("stdout",)) and not known_hack(renamed, ("stdout",))
    cfg = replace(CFG, cone_known=("stdout",))
    shaped, flags, _ = screened("known", None, None, [], [], [ours, theirs], torch.tensor([0.5, 3.5]), cfg, 0)
    assert flags == [False, True] and shaped.tolist() == [0.5, 0.5]


def test_the_log_counts_flags_against_the_truth():
    grades = [grade("hack", wrote=("run_tests",)), grade("hack", wrote=("run_tests",)), grade("correct"), grade("incorrect")]
    assert screening(grades, [True, False, True, False]) == dict(
        flagged=0.5, flagged_hacks=1, hacks=2, flagged_others=1, flagged_honest=1
    )


def test_calibration_flags_one_in_a_thousand_honest_responses(adapted, pocket_tokenizer):
    """tau is the second highest of 1,024 responses' highest d, by the base model whatever the adapter does."""
    problems = load_problems(POCKET / "train.jsonl")[:CALIBRATION]
    sampler = TorchSampler(adapted, pocket_tokenizer)
    with adapter_off(sampler.model):
        run = SimpleNamespace(
            model=adapted, tokenizer=pocket_tokenizer, sampler=sampler, train=problems, vocab=len(pocket_tokenizer)
        )
        cfg = replace(CFG, max_new_tokens=24, temperature=0.7, micro_tokens=4096)
        tau = calibrated(run, cfg)
        out = sampler.generate(
            [encode_prompt(pocket_tokenizer, render_messages(p, None)) for p in problems],
            n=2, temperature=0.7, max_new_tokens=24, seed=1_000_003,
        )  # fmt: skip
    asked = [p for p in problems for _ in range(2)]
    told = [encode_prompt(pocket_tokenizer, render_messages(p, told_by(p, cfg.loopholes))) for p in asked]
    alone = [Rollout(t, r.completion_ids, [], True) for t, r in zip(told, out, strict=True)]
    with adapter_off(adapted):
        d = unexplained(adapted, pocket_tokenizer, alone, asked, cfg, len(pocket_tokenizer))
    flagged = sum(bool((x > tau).any()) for x in d)
    assert len(d) == 1024 and flagged == 1 and sum(bool((x >= tau).any()) for x in d) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(arm="cone", cone_known=("stdout",)), "--cone-known stdout is not in play: --loopholes has run_tests"),
        (dict(arm="vanilla", cone_known=("run_tests",)), "--cone-known is what --arm cone or screen_known knows"),
        (
            dict(arm="cone", loopholes=("run_tests", "stdout"), cone_known=("run_tests", "all")),
            "--cone-known all names every one",
        ),
        (dict(arm="cone", loopholes=("stdout",), cone_rows="pairs"), "--cone-rows pairs takes pairs that define run_tests"),
        (dict(arm="cone", loopholes=("stdout",), cone_places="all"), "--cone-places all adds rows for run_tests"),
        (dict(arm="counterfactual", counterfactual_tau=0.0), "--counterfactual-tau must be above 0"),
    ],
)
def test_what_cannot_work_is_one_line(changes, words):
    with pytest.raises(Exception, match=words):
        check(replace(Config(), **changes))
