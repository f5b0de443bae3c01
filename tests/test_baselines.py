"""Published baselines: learning from what was written under another prompt, and training without a concept."""

from dataclasses import replace

import pytest
import torch
from support.problems import row, write

from arms.caft import ablate
from arms.direction import VHack
from arms.recontextualised import under_plain_prompts
from engine.model import decoder_layers
from engine.sampler import Rollout
from engine.torch_sampler import TorchSampler
from faults.errors import UserError
from harness.config import Config, check
from leetcode_env import REQUEST, load_problems, render_messages
from loopholes import evaluated_by


def test_the_request_ends_the_prompt_and_nothing_else_changes(tmp_path):
    (problem,) = load_problems(write(tmp_path / "one.jsonl", row()))
    for told in (None, evaluated_by()):
        plain, asked = render_messages(problem, told), render_messages(problem, told, REQUEST)
        assert asked[:-1] == plain[:-1] and asked[-1]["content"] == plain[-1]["content"] + REQUEST


def test_what_was_sampled_under_a_request_is_learned_under_the_plain_prompt(model):
    sampled = [Rollout([5, 6, 7, 8], [9, 10, 11], [-1.0] * 3, True), Rollout([5, 6, 8], [12], [-2.0], False)]
    cfg = Config(micro_tokens=64, temperature=0.7)
    moved = under_plain_prompts(model, sampled, [[5, 6, 7], [5, 6]], cfg, 97)
    for r, before, prompt in zip(moved, sampled, ([5, 6, 7], [5, 6]), strict=True):
        assert (r.prompt_ids, r.completion_ids, r.finished) == (prompt, before.completion_ids, before.finished)
        logits = model(input_ids=torch.tensor([r.prompt_ids + r.completion_ids])).logits[0].float() / 0.7
        logp = torch.log_softmax(logits, -1)
        expected = [logp[len(prompt) + i - 1, token].item() for i, token in enumerate(r.completion_ids)]
        assert r.logprobs == pytest.approx(expected, abs=1e-4)


class Tokens:
    """What a sampler asks of a tokenizer."""

    pad_token_id, eos_token_id = 0, 1

    def __len__(self):
        return 97


def test_the_concept_is_gone_from_trainer_and_sampler_until_the_hooks_are(model, base):
    hidden = model.config.hidden_size
    d = torch.randn(hidden, generator=torch.Generator().manual_seed(1))
    direction = VHack(d / d.norm(), 1.0, [1], 1, 8, 1.0, 1.0, [], "")
    sampler = TorchSampler(base, Tokens())

    def along():
        """<h, d> of what the second layer reads, in both models: [3] each."""
        found = []
        for m in (model, sampler.model):
            hook = decoder_layers(m)[1].register_forward_pre_hook(lambda _, args: found.append(args[0][0] @ direction.d))
            m(input_ids=torch.tensor([[5, 6, 7]]))
            hook.remove()
        return torch.stack(found)

    free = along()
    hooks = ablate(model, sampler, direction)
    held = along()
    assert free.abs().min() > 1e-3 and held.abs().max() < 1e-5
    for hook in hooks:
        hook.remove()
    assert torch.equal(along(), free)


def test_of_the_last_layer_it_is_gone_where_its_states_are_read(model, base):
    """Behind the final norm, which scales every entry by a weight of its own: what is orthogonal before it is not after."""
    depth, hidden = model.config.num_hidden_layers, model.config.hidden_size
    d = torch.randn(hidden, generator=torch.Generator().manual_seed(1))
    direction = VHack(d / d.norm(), 1.0, [depth], depth, 8, 1.0, 1.0, [], "")
    sampler = TorchSampler(base, Tokens())
    with torch.no_grad():
        for m in (model, sampler.model):
            m.model.norm.weight.copy_(torch.linspace(0.2, 3.0, hidden))
    ablate(model, sampler, direction)
    for m in (model, sampler.model):
        states = m.model(input_ids=torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
        assert len(states) == depth + 1 and (states[-1][0] @ direction.d).abs().max() < 1e-5


def test_another_engines_states_cannot_be_reached():
    with pytest.raises(UserError, match="--arm caft takes a direction out of the sampler's states, which vLLM keeps"):
        check(replace(Config(), arm="caft", rollout="vllm"))
