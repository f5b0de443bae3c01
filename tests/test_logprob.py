"""Chunked log-probabilities against the plain computation in float64, and the packing of micro-batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import logprob
from engine.logprob import micro_batches, token_logprobs


def plain(hidden, weight, targets, temperature, vocab=None):
    """The definition, in the type of its inputs."""
    logits = hidden @ weight[:vocab].T / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


def case(n=256, d=48, v=1000, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).to(dtype)
    targets = torch.randint(0, v, (n,), generator=generator)
    return hidden, weight, targets, torch.randn(n, generator=generator)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(logprob, "VOCAB_BLOCK", 77)
        monkeypatch.setattr(logprob, "BLOCK_ELEMENTS", 77 * 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [None, 990])
def test_values_and_gradients_are_those_of_the_plain_computation(blocks, dtype, vocab):
    hidden, weight, targets, incoming = case(dtype=dtype)
    targets = targets.clamp(max=(vocab or 1000) - 1)
    got = token_logprobs(hidden, weight, targets, 0.7, vocab=vocab)
    got.backward(incoming)
    exact = hidden.detach().double().requires_grad_()
    want = plain(exact, weight.double(), targets, 0.7, vocab)
    want.backward(incoming.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-5)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]  # the gradient comes back in hidden's type
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=rounding, atol=2e-5)


def test_gradcheck(blocks):
    hidden, weight, targets, _ = case(n=7, d=5, v=300, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: token_logprobs(h, weight, targets, 0.7), hidden)


@pytest.mark.parametrize("chunk", [1, 3, 100, 255, 256, 1000])
def test_the_chunk_size_changes_nothing(blocks, chunk):
    hidden, weight, targets, incoming = case()
    want = token_logprobs(hidden, weight, targets, 0.7)
    (want_grad,) = torch.autograd.grad(want, hidden, incoming)
    got = token_logprobs(hidden, weight, targets, 0.7, chunk=chunk)
    (got_grad,) = torch.autograd.grad(got, hidden, incoming)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-5, atol=2e-5)


def test_it_is_the_same_bit_for_bit_from_run_to_run(blocks):
    runs = []
    for _ in range(2):
        hidden, weight, targets, incoming = case()
        logp = token_logprobs(hidden, weight, targets, 0.7)
        runs.append((logp, torch.autograd.grad(logp, hidden, incoming)[0]))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_huge_logits_do_not_overflow(blocks):
    hidden, weight, targets, _ = case()
    logp = token_logprobs(hidden * 1e4, weight, targets, 0.7)
    (grad,) = torch.autograd.grad(logp.sum(), hidden)
    assert torch.isfinite(logp).all() and torch.isfinite(grad).all() and (logp <= 0).all()


def test_padding_rows_have_no_mass(blocks):
    hidden, weight, _, _ = case(n=1)
    logps = token_logprobs(hidden.expand(990, -1), weight, torch.arange(990), 0.7, vocab=990)
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_no_block_of_logits_is_larger_than_asked(monkeypatch):
    hidden, weight, targets, _ = case()
    monkeypatch.setattr(logprob, "VOCAB_BLOCK", 100)
    sizes, real = [], logprob._logits
    monkeypatch.setattr(logprob, "_logits", lambda *a: sizes.append(real(*a).numel()) or real(*a))
    token_logprobs(hidden, weight, targets, 0.7, chunk=32).sum().backward()
    assert max(sizes) <= 3200 and sum(sizes) == 2 * 256 * 1000  # every logit twice: forward and backward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(temperature=0.0), "temperature"),
        (dict(targets=torch.tensor([0, 10])), "outside the vocabulary of 10"),
        (dict(targets=torch.tensor([0, -1])), "outside the vocabulary"),
        (dict(targets=torch.tensor([0, 9]), vocab=9), "outside the vocabulary of 9"),
        (dict(weight=torch.zeros(10, 4, requires_grad=True)), "freeze"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = dict(hidden=torch.zeros(2, 4), weight=torch.zeros(10, 4), targets=torch.tensor([0, 1]), temperature=1.0)
    with pytest.raises(ValueError, match=message):
        token_logprobs(**(good | change))


def test_an_empty_batch_is_empty():
    assert token_logprobs(torch.zeros(0, 4), torch.zeros(10, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_micro_batches_hold_every_sequence_once_within_the_limit(lengths, max_tokens):
    groups = micro_batches(lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= max_tokens
    order = [lengths[i] for group in groups for i in group]
    assert order == sorted(lengths, reverse=True)


def test_micro_batches_pack_by_length():
    assert micro_batches([3, 9, 4, 1, 4], 8) == [[1], [2, 4], [0, 3]]
    assert micro_batches([], 8) == []
    with pytest.raises(ValueError, match="positive"):
        micro_batches([1], 0)
