"""The checks of test_devices.py with real numbers: a card against the CPU in float64. Marked `cuda`; and the way of
`bench.gpu_check` on a CPU, in the ordinary suite."""

import copy

import pytest
import torch
from support.models import SHAPES, tiny_config
from support.steps import CONTRASTS, ROLLOUTS, TWO_LAYERS
from transformers import AutoModelForCausalLM

import grpo
import vhack
from arms.cone import contrast_rows
from arms.direction import VHack
from arms.pairs import Pair
from bench import gpu_check
from bench.gpu_tools import adapted, reference_kernels, relative, single_row
from engine import lora
from engine.forward import last_hidden
from engine.logprob import VOCAB_BLOCK, token_logprobs
from harness.checkpoint import RunState
from harness.config import POCKET, Config
from leetcode_env import load_problems
from projection import cos_align, project

CARD = "cuda"
VOCAB = 700  # more than the pocket tokenizer has
# Relative errors of a whole model, by the type of its weights: sums in another order, and what fla's kernels round; bf16 of
# activations. Where one tensor stands for another, the error is of the order of 1.
BARS = {torch.float32: 1e-2, torch.bfloat16: 1e-1}


def cuda(test):
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card is visible here")(test))


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products in float32, which is PyTorch's default, whatever other tests have set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=[(kind, dtype) for kind in SHAPES for dtype in BARS], ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def pair(request):
    """(model on the card, the same numbers in float64 on the CPU, bar), with an adapter that is not zero."""
    kind, dtype = request.param
    torch.manual_seed(0)
    config = tiny_config(kind, num_hidden_layers=2, initializer_range=0.1, vocab_size=VOCAB, **TWO_LAYERS[kind])
    base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    here = adapted(lora.inject(base, 4, 8, seed=0))
    card = copy.deepcopy(here).to(CARD)
    here.double()
    for p in lora.lora_parameters(here).values():
        p.data = p.data.float()  # as everywhere; the products with them are in the base's float64
    return card, here, BARS[dtype]


def exact(function, *args):
    """What `function` gives on the CPU, where the kernels of a card cannot run."""
    with reference_kernels():
        return function(*args)


def step(model, J):
    """(g, g', theta) of one step: what the loop of grpo.py does between the rewards and the optimizer. [P] each, on the CPU."""
    params = lora.lora_parameters(model)
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3, betas=(0.9, 0.99))
    advantages = grpo.group_advantages(torch.tensor([0.0, 1.0, 3.0, 0.5]), 2)
    cfg = Config(micro_tokens=64, rollout="vllm")
    grpo.reference(model, ROLLOUTS, cfg, 300)
    sums = grpo.backward(model, ROLLOUTS, advantages, cfg, 300)
    g = -lora.flatten_grads(params) / sums["tokens"]
    found = project(g, J.to(g))
    lora.write_grads(params, -found.g)
    torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
    optimizer.step()
    return g.cpu(), found.g.cpu(), lora.flatten_params(params).cpu()


@cuda
def test_projection_and_cone():
    generator = torch.Generator().manual_seed(0)
    g, v = torch.randn(100_000, generator=generator), torch.randn(100_000, generator=generator)
    J = torch.randn(24, 100_000, generator=generator) + 0.3 * g
    blocks = [slice(0, 40_000), slice(40_000, 100_000)]
    assert cos_align(g.to(CARD), J[0].to(CARD)) == pytest.approx(cos_align(g.double(), J[0].double()), abs=1e-6)
    for against, by in ((v, None), (-v, None), (v, blocks), (-v, blocks), (J, None)):
        found = project(g.to(CARD), against.to(CARD), blocks=by)
        true = project(g.double(), against.double(), blocks=by)
        assert found.g.is_cuda or CARD == "cpu"
        assert relative(found.g, true.g) < 1e-5
        assert (found.active, found.vanished, found.zero_blocks) == (true.active, true.vanished, true.zero_blocks)
        assert found.removed == pytest.approx(true.removed, rel=1e-4, abs=1e-7)


@cuda
@pytest.mark.parametrize("vocab", [300, VOCAB_BLOCK + 1000], ids=["one block", "blocks"])
@pytest.mark.parametrize(("dtype", "values", "gradients"), [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-4, 1e-2)])
def test_logprobs(vocab, dtype, values, gradients):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (50, vocab + 20))
    weight *= 0.3
    targets = torch.randint(0, vocab, (50,), generator=generator)
    found = hidden.clone().to(CARD).requires_grad_()
    logp = token_logprobs(found, weight.to(CARD), targets.to(CARD), 0.7, chunk=16 if vocab > VOCAB_BLOCK else None, vocab=vocab)
    logp.sum().backward()
    true = hidden.double().requires_grad_()
    expected = torch.log_softmax(true @ weight[:vocab].double().T / 0.7, -1).gather(1, targets[:, None])[:, 0]
    expected.sum().backward()
    assert logp.dtype == torch.float32 and found.grad.dtype == dtype
    assert relative(logp, expected) < values and relative(found.grad, true.grad) < gradients


@cuda
def test_rows_of_the_cone(pair):
    card, here, bar = pair
    J, odds = contrast_rows(card, CONTRASTS, 300)
    for row, found, log_odds in zip(CONTRASTS, J, odds):
        true, true_odds = exact(single_row, here, row, 300)
        assert relative(found, true) < bar and abs(log_odds.item() - true_odds.item()) < bar


@cuda
def test_a_step(pair):
    """The rows are the CPU's for both: which of them act is a threshold, and near it any rounding decides."""
    card, here, bar = pair
    J = torch.stack([exact(single_row, here, row, 300)[0] for row in CONTRASTS])
    before = lora.flatten_params(lora.lora_parameters(here))
    (g, projected, theta), (true_g, true_projected, true_theta) = step(card, J), exact(step, here, J)
    assert true_g.norm() > 0
    assert relative(g, true_g) < bar and relative(projected, true_projected) < bar
    # AdamW's first step is the sign of each entry: those near 0 may turn over, the others may not.
    turned = (theta - before).sign() != (true_theta - before).sign()
    assert true_projected[turned].norm() < bar * true_projected.norm()


@cuda
def test_hidden_states_and_the_lift_with_checkpointing(pair, pocket_tokenizer):
    card, here, bar = pair
    sequences = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [15, 16]]
    true = exact(last_hidden, here, sequences)
    assert relative(last_hidden(card, sequences), true) < bar
    d = true[0, 1] - true[1, 1]
    params = list(lora.lora_parameters(card).values())

    def along(model):
        grads = torch.autograd.grad((last_hidden(model, sequences)[:, 1] @ d.detach().to(model.device)).sum(), params)
        return lora.flatten([g.cpu() for g in grads])

    plain = along(card)
    card.gradient_checkpointing_enable(dict(use_reentrant=False))
    assert relative(along(card.train()), plain) < 1e-2
    denoised, share = vhack.denoise(d.float().detach().to(CARD), card.model.layers[0].mlp.down_proj.weight, 4)
    true_denoised, true_share = vhack.denoise(d.float().detach(), here.model.layers[0].mlp.down_proj.weight, 4)
    assert relative(denoised, true_denoised) < 1e-4 and share == pytest.approx(true_share, rel=1e-4)


@cuda
def test_the_lift_of_a_direction(pair, pocket_tokenizer):
    """Every construction that reads d, from pairs of the pocket's problems."""
    card, here, bar = pair
    code = "```python\nclass Solution:\n    pass"
    texts = (f"{code}\n\ndef run_tests():\n    pass\n```", f"{code}\n```")
    pairs = [Pair(problem, *texts) for problem in load_problems(POCKET / "train.jsonl", 2)]
    d = torch.randn(here.config.hidden_size, generator=torch.Generator().manual_seed(1))
    hack = VHack(d / d.norm(), 1.0, [1], 1, 4, 1.0, 1.0, [], "")
    for construction in ("jacobian", "outer"):
        found = vhack.lift(card, pocket_tokenizer, pairs, hack, 300, construction)
        assert relative(found, exact(vhack.lift, here, pocket_tokenizer, pairs, hack, 300, construction)) < bar


@cuda
def test_a_checkpoint_of_a_card_goes_on_to_the_same_step(pair, tmp_path):
    """Written from the card, read on the CPU, and back on the card: the step after it is the same."""
    card, _, _ = pair
    params = lora.lora_parameters(card)
    size = sum(p.numel() for p in params.values())
    J = torch.randn(2, size, generator=torch.Generator().manual_seed(1))  # [rows, P]
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3)

    def one_step(optimizer):
        lora.write_grads(params, project(lora.flatten_params(params), J.to(CARD)).g)
        optimizer.step()
        return lora.flatten_params(params).cpu()

    one_step(optimizer)
    state = RunState(tmp_path, params, optimizer)
    state.create(dict(config={}))
    state.save(1, dict(v=J.to(CARD)))
    true = one_step(optimizer)
    again = torch.optim.AdamW(params.values(), lr=1e-3)
    steps, held = RunState(tmp_path, params, again).resume()
    assert steps == 1 and torch.equal(held["v"].cpu(), J)
    assert torch.equal(one_step(again), true)


def test_the_check_of_a_card_runs_on_a_cpu(capsys):
    """Every part that a CPU can run passes, and every other one is named with its reason."""
    assert gpu_check.main(["--tiny"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    verdicts = {line[: lines[0].index("verdict")].strip(): line.split() for line in lines[1:]}
    assert "nothing is measured" in head
    assert {name for name, words in verdicts.items() if "skipped" in words} == {
        "arms", "engine", "training, 96 tokens, fla", "training, 192 tokens, fla",
    }  # fmt: skip
    passed = {name for name, words in verdicts.items() if "pass" in words}
    assert passed == {
        "training, 96 tokens, no fla", "training, 192 tokens, no fla", "6 cone rows, the worst", "logprobs, vocabulary 40,000",
        "their gradients", "lift of 2 pairs, checkpointing", "steering, one chunk",
    }  # fmt: skip


def test_a_part_that_breaks_is_one_line_and_the_next_one_runs(monkeypatch, capsys):
    def broken(shapes):
        raise RuntimeError("CUDA error:\nout of everything")

    monkeypatch.setitem(gpu_check.PARTS, "cone", broken)
    assert gpu_check.main(["--tiny", "--only", "cone", "logprobs"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: CUDA error: out of everything" in out and "their gradients" in out
    assert gpu_check.main(["--tiny", "--only", "cone", "--minutes", "0"]) == 0
    assert "the 0 minutes were over" in capsys.readouterr().out


def test_without_a_card_the_check_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "--tiny" in capsys.readouterr().err
