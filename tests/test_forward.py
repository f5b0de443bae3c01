"""Rows shared by sequences that begin alike: masks against their definition, numbers against one sequence at a time."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.models import adapted_qwen3, tiny_model

from engine import forward
from engine.forward import Batch, Tree, batches, logprobs, trees
from engine.lora import flatten_grads, inject, lora_parameters
from engine.model import shares_prefixes

SEQUENCES = st.lists(st.lists(st.integers(2, 4), min_size=1, max_size=6), min_size=1, max_size=6)  # few tokens: much is shared


def grown(sequences, start=0):
    tree = Tree(0)
    for i, ids in enumerate(sequences):
        tree.grow(i, ids, min(start, len(ids)))
    return tree


@pytest.mark.invariant
@given(SEQUENCES, st.integers(0, 4))
@example([[2, 3], [4], [2, 3, 4]], 3)  # the row begins with the last one's tokens, in two branches
@settings(deadline=None)
def test_a_token_sees_its_own_past_and_nothing_else(sequences, start):
    tree = grown(sequences, start)
    width = len(tree.ids) + 2  # two columns of padding
    sees = tree.sees(width)
    for i, ids in enumerate(sequences):
        path = tree.paths[i]
        assert [tree.ids[c] for c in path] == ids and [tree.positions[c] for c in path] == list(range(len(ids)))
        for t, column in enumerate(path):
            assert sees[column].nonzero()[:, 0].tolist() == sorted(path[: t + 1])
    assert sees.any(1).all() and not sees[: len(tree.ids), len(tree.ids) :].any()  # a row of zeros would be nan
    assert len(tree.ids) == len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})  # nothing stands there twice


def one_by_one(model, sequences, temperature, vocab):
    """The definition: full logits of each sequence alone."""
    out = []
    for ids, start in sequences:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :, :vocab] / temperature
        logp = torch.log_softmax(logits, -1)
        out.append(torch.stack([logp[t - 1, ids[t]] for t in range(start, len(ids))]))
    return out


def cases():
    prompts = [[5, 6, 7], [5, 6, 8, 9, 10], [1, 1]]
    tails = [[3, 4, 1], [3, 4, 1], [3, 4, 5, 6, 7], [3], [8, 4, 5, 6, 1, 1], [3, 9, 1]]  # twins, and a prefix of another
    return [(p + t, len(p)) for t in tails for p in prompts]


@pytest.fixture(params=["qwen3", "qwen3_5_text"])
def model(request):
    model = inject(tiny_model(request.param), 4, 8, seed=0)
    for name, p in lora_parameters(model).items():
        if name.endswith(".B"):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return model


@pytest.mark.invariant
@pytest.mark.parametrize("max_tokens", [1, 9, 20, 10_000])
def test_values_and_gradients_are_those_of_one_sequence_at_a_time(model, max_tokens):
    sequences = cases()
    weight = torch.rand(sum(len(s) - start for s, start in sequences), generator=torch.Generator().manual_seed(2))
    results = []
    for found in (one_by_one(model, sequences, 0.7, 90), logprobs(model, sequences, 0.7, 90, max_tokens)):
        model.zero_grad()
        (torch.cat(found) * weight).sum().backward()
        results.append((torch.cat(found).detach(), flatten_grads(lora_parameters(model))))
    (want, g), (got, h) = results
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (h - g).norm() < 1e-5 * g.norm()


def test_every_sequence_is_asked_once_and_rows_keep_to_the_limit(model, monkeypatch):
    sequences, total = cases(), 0
    monkeypatch.setattr(forward, "ROW_TOKENS", 12)
    seen = []
    for batch in batches(model, sequences, 30):
        rows, width = batch.inputs["input_ids"].shape
        assert rows * width <= 30 and (width <= 12 or rows == 1)
        total += rows * width
        seen += batch.members
        lengths = [len(sequences[i][0]) - sequences[i][1] for i in batch.members]
        assert batch.sequence.tolist() == [i for i, n in zip(batch.members, lengths, strict=True) for _ in range(n)]
    assert sorted(seen) == list(range(len(sequences)))
    padded = sum(len(ids) for ids, _ in sequences)
    assert total < 0.8 * padded if shares_prefixes(model) else total >= padded


def test_prefixes_are_shared_where_every_layer_sees_what_the_mask_says():
    whole, hybrid, windowed = tiny_model("qwen3"), tiny_model("qwen3_5_text"), tiny_model("qwen3")
    windowed.config.layer_types = ["full_attention", "sliding_attention"]
    assert [shares_prefixes(m) for m in (whole, hybrid, windowed)] == [True, False, False]


def test_groups_own_their_rows(model):
    """Per-example gradients give a row the adapter's copy of its group, whether or not its sequences share the row."""
    sequences = cases()
    batch = Batch(sequences, trees(model, sequences, [[0, 3], [1, 4, 7]]), "cpu")
    assert batch.members == [0, 3, 1, 4, 7]
    assert batch.owner.tolist() == ([0, 1] if shares_prefixes(model) else [0, 0, 1, 1, 1])


def test_a_lone_sequence_needs_no_mask():
    model = adapted_qwen3()
    (batch,) = batches(model, [([5, 6, 7, 8], 2), ([9, 6, 7], 1)], 100)
    assert set(batch.inputs) == {"input_ids"}
