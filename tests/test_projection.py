"""The invariants of the projection, on random vectors (hypothesis) and on real gradients of a real model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import projection
from engine.lora import flatten, flatten_grads, flatten_params, lora_parameters, slices, write_params
from projection import cos_align, nnls_gram, project, project_cone

seeds = st.integers(0, 10_000)

pytestmark = pytest.mark.invariant


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seeds, st.integers(2, 300))
@settings(deadline=None, max_examples=60)
def test_removal_is_orthogonal_keeps_the_norm_and_is_one_sided(seed, size):
    g, v = draw(seed, size), draw(seed + 1, size)
    out = project(g, v)
    if cos_align(g, v) <= 0:
        assert torch.equal(out.g, g) and out.removed == 0 and out.active == 0
    else:
        left = math.sqrt(max(1 - cos_align(g, v) ** 2, 1e-15))  # share of |g| that stays; its rounding error grows
        assert abs(cos_align(out.g, v)) < 1e-6 / left or out.vanished
        assert out.g.norm().item() == pytest.approx(0 if out.vanished else g.norm().item(), rel=1e-5)
        assert out.removed == pytest.approx(cos_align(g, v), abs=1e-6)


@pytest.mark.parametrize("size", [projection.PIECE, projection.WHOLE, projection.WHOLE + 1, projection.WHOLE + projection.PIECE])
def test_in_pieces_is_as_a_whole(size, monkeypatch):
    """The result of a long vector is that of a walk without pieces; its sums may differ in the last digits of float64."""
    g = draw(0, size)
    v = draw(1, size) + 0.1 * g
    found, cosine = project(g, v), cos_align(g, v)
    monkeypatch.setattr(projection, "WHOLE", size)
    whole = project(g, v)
    torch.testing.assert_close(found.g, whole.g, rtol=1e-6, atol=0)
    assert found.removed == pytest.approx(whole.removed, rel=1e-12) and cosine == pytest.approx(cos_align(g, v), rel=1e-12)
    assert found.active == 1


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_a_long_vector_keeps_its_norm_however_little_of_it_is_left(share, monkeypatch):
    monkeypatch.setattr(projection, "WHOLE", 0)
    v, other = draw(0, 50_000), draw(1, 50_000)
    g = v + share * other
    out = project(g, v)
    assert out.g.norm().item() == pytest.approx(g.norm().item(), rel=1e-5) and out.vanished == 0
    assert abs(cos_align(out.g, v)) < 1e-6 / share


def test_what_no_block_covers_stays():
    g = draw(5, 30)
    out = project(g, g, blocks=[slice(0, 10)])
    assert torch.equal(out.g[10:], g[10:]) and out.vanished == 1


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_projecting_twice_is_projecting_once(seed):
    g, v = draw(seed, 64), draw(seed + 1, 64)
    once = project(g, v).g
    torch.testing.assert_close(project(once, v).g, once, rtol=1e-5, atol=1e-6)


def test_the_length_of_v_does_not_matter():
    g, v = draw(0, 50), draw(1, 50)
    g = g if cos_align(g, v) > 0 else -g
    torch.testing.assert_close(project(g, v).g, project(g, 37.0 * v).g)


def test_no_renorm_leaves_the_shorter_vector():
    g, v = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0])
    assert torch.equal(project(g, v, renorm=False).g, torch.tensor([0.0, 4.0]))
    assert torch.equal(project(g, v).g, torch.tensor([0.0, 5.0]))


def test_inputs_are_not_edited():
    g, v = draw(3, 20), draw(3, 20)
    kept = g.clone(), v.clone()
    project(g, v), project_cone(g, v[None])
    assert torch.equal(g, kept[0]) and torch.equal(v, kept[1])


def test_degenerate_cases():
    g, v = draw(0, 10), draw(1, 10)
    zero = torch.zeros(10)
    assert cos_align(zero, v) == 0 and torch.equal(project(zero, v).g, zero)
    assert project(g, zero).zero_blocks == 1 and torch.equal(project(g, zero).g, g)
    along = project(3 * v, v)
    assert torch.equal(along.g, zero) and along.vanished == 1  # not a rounding residue blown up to |g|


def test_blocks_are_projected_each_on_its_own():
    g, v = draw(5, 30), draw(6, 30)
    v[20:] = 0
    blocks = [slice(0, 10), slice(10, 20), slice(20, 30)]
    out = project(g, v, blocks=blocks)
    for b in blocks[:2]:
        assert torch.allclose(out.g[b], project(g[b], v[b]).g)
    assert torch.equal(out.g[20:], g[20:]) and out.zero_blocks == 1


def slow_cone(g, J):
    """The nearest point to g with J g' <= 0, by a general solver."""
    g, J = g.double().numpy(), J.double().numpy()
    solved = minimize(
        lambda x: ((x - g) ** 2).sum(),
        np.zeros_like(g),
        jac=lambda x: 2 * (x - g),
        method="SLSQP",
        constraints=dict(type="ineq", fun=lambda x: -J @ x, jac=lambda x: -J),
        options=dict(ftol=1e-14, maxiter=500),
    )
    return torch.tensor(solved.x)


@given(seeds, st.integers(1, 6))
@settings(deadline=None, max_examples=25)
def test_cone_at_ridge_0_is_the_nearest_point(seed, n):
    g, J = draw(seed, 12), draw(seed + 1, n, 12)
    out = project_cone(g, J, ridge=0.0, renorm=False)
    assert (J @ out.g).max() < 1e-4
    torch.testing.assert_close(out.g.double(), slow_cone(g, J), rtol=1e-3, atol=1e-4)


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_cone_of_one_row_at_ridge_0_is_project(seed):
    g, v = draw(seed, 40), draw(seed + 1, 40)
    torch.testing.assert_close(project_cone(g, v[None], ridge=0.0).g, project(g, v).g, rtol=1e-4, atol=1e-5)


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_cone_with_ridge_leaves_ridge_lambda_on_active_rows(seed):
    g, J = draw(seed, 50), draw(seed + 1, 8, 50)
    out = project_cone(g, J, ridge=1e-3, renorm=False)
    unit = (J / J.norm(dim=1, keepdim=True)).double()
    lam = nnls_gram(unit @ unit.T + 1e-3 * torch.eye(8), unit @ g.double())
    left, active = unit @ out.g.double(), lam > 0
    assert out.active == int(active.sum())
    torch.testing.assert_close(left[active], 1e-3 * lam[active], rtol=1e-2, atol=1e-5)
    assert (left[~active] <= 1e-5).all()


def test_cone_leaves_g_alone_when_no_row_is_violated():
    J = draw(0, 3, 20)
    g = -J.sum(0) * 0 - torch.linalg.pinv(J) @ torch.ones(3)  # J g = -1
    out = project_cone(g, J)
    assert torch.equal(out.g, g) and out.active == 0 and out.removed == 0


def test_cone_with_zero_duplicate_and_no_rows():
    g, v = draw(0, 20), draw(1, 20)
    v = v if cos_align(g, v) > 0 else -v
    doubled = project_cone(g, torch.stack([v, torch.zeros(20), v]), ridge=0.0)
    assert doubled.zero_blocks == 1
    torch.testing.assert_close(doubled.g, project(g, v).g, rtol=1e-4, atol=1e-5)
    assert torch.equal(project_cone(g, torch.zeros(0, 20)).g, g)
    assert torch.equal(project_cone(v * 2, v[None], ridge=0.0).g, torch.zeros(20))


def test_a_gradient_that_is_not_finite_passes_through_the_cone():
    g = torch.tensor([1.0, float("nan"), 2.0])
    assert torch.isnan(project_cone(g, draw(0, 2, 3)).g).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_makes_the_step_one_that_is_not(bad):
    """Else the step would be taken with nothing removed, and nobody would see it."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [bad, 0.0, 1.0]])
    assert not torch.isfinite(project_cone(torch.ones(3), rows).g).all()


# --- real gradients ------------------------------------------------------------------------------------------------------


def log_odds(model):
    """f: mean log-odds of token 5 against token 7 after a few prompts, in float64 for a fine finite difference."""
    ids = torch.tensor([[3, 4, 8, 9], [11, 12, 13, 14], [30, 31, 2, 6]])
    logits = model(input_ids=ids).logits[:, -1].double()
    return (logits[:, 5] - logits[:, 7]).mean()


def gradient(model, f):
    model.zero_grad()
    f(model).backward()
    return flatten_grads(lora_parameters(model))


@pytest.mark.parametrize("kind", ["project", "cone"])
def test_a_step_along_the_projected_direction_does_not_move_the_hack_odds(model, kind):
    """One-sidedness by sign: fails when g and -g are confused. A finite difference of the real model in float64."""
    model.double()
    params = lora_parameters(model)
    f_grad = gradient(model, log_odds)
    v = f_grad / f_grad.norm()
    other = gradient(model, lambda m: torch.log_softmax(m(input_ids=torch.tensor([[3, 4, 8, 9]])).logits[0, -1], -1)[40])
    g = other + 0.5 * other.norm() * v  # an ascent direction that leans hack-ward
    assert torch.dot(g, f_grad) > 0
    projected = project(g, v).g if kind == "project" else project_cone(g, f_grad[None], ridge=0.0).g

    theta, step = flatten([p.detach() for p in params.values()]).double(), 1e-4

    def change(direction):
        values = []
        for sign in (1, -1):
            at = 0
            for p in params.values():
                d = direction[at : at + p.numel()].view_as(p).double()
                p.data = theta[at : at + p.numel()].view_as(p) + sign * step * d / direction.norm()
                at += p.numel()
            values.append(log_odds(model).item())
        return values[0] - values[1]

    along_g, along_projected = change(g), change(projected)
    assert along_g > 0
    assert abs(along_projected) < 1e-3 * along_g
    # The trap: projecting the loss gradient as if it were g leaves the hack-ward motion in.
    wrong = -project(-g, v).g
    assert change(wrong) > 0.5 * along_g


def test_real_gradient_by_blocks(model):
    v = gradient(model, log_odds)
    g = gradient(model, lambda m: -torch.log_softmax(m(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1], -1)[9])
    table = slices(lora_parameters(model))
    out = project(g, v, blocks=table.values())
    for s in table.values():
        if cos_align(g[s], v[s]) > 0:
            assert abs(cos_align(out.g[s], v[s])) < 1e-4
            assert out.g[s].norm().item() == pytest.approx(g[s].norm().item(), rel=1e-4)
        else:
            assert torch.equal(out.g[s], g[s])


def test_write_params_round_trip(model):
    params = lora_parameters(model)
    theta = flatten_params(params)
    write_params(params, theta + 1)
    torch.testing.assert_close(flatten_params(params), theta + 1)


def test_project_takes_one_direction_or_a_cone_of_rows():
    g, J = draw(0, 30), draw(1, 4, 30)
    assert torch.equal(project(g, J, ridge=1e-2).g, project_cone(g, J, ridge=1e-2).g)
    assert torch.equal(project(g, J, renorm=False).g, project_cone(g, J, renorm=False).g)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_cosine_of_what_is_not_finite_is_no_number(bad):
    g, v = torch.tensor([1.0, bad]), torch.tensor([1.0, 1.0])
    assert math.isnan(cos_align(g, v)) and math.isnan(cos_align(v, g))


def test_least_squares_at_their_iteration_limit_still_answer(monkeypatch):
    """scipy gives up with a RuntimeError; the answer of the way on is the same point."""
    g, J = draw(0, 30), draw(1, 6, 30)
    expected = project_cone(g, J).g

    def gives_up(*_, **__):
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr(projection, "nnls", gives_up)
    torch.testing.assert_close(project_cone(g, J).g, expected, rtol=1e-4, atol=1e-5)
