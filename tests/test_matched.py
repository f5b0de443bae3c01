"""The cone's mass-matched controls: the same share of |g|, none of it along a hack row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import adapted_qwen3

from arms.matched import matched, off_rows, shuffled
from engine.lora import lora_parameters, slices
from harness.config import Config
from projection import project, project_cone

KINDS = ("random", "shuffled")
seeds = st.integers(0, 10_000)
pytestmark = pytest.mark.invariant


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hackward(seed, n=6):
    """(g [P], J [n, P]) on the shapes of a real adapter, where the cone has much to remove, and the adapter's parameters."""
    params = lora_parameters(adapted_qwen3())
    size = sum(p.numel() for p in params.values())
    J = draw(seed, n, size) + draw(seed + 1, size)  # nearly parallel, as contexts that resemble each other make them
    return draw(seed + 2, size) + 0.3 * J.mean(0), J * (1 + torch.arange(n))[:, None], params


def changed(g, J, params, kind, step=3, renorm=True, **options):
    real = project(g, J, renorm=renorm)
    return real, matched(real, g, J, params, step, Config(seed=5, cone_match=kind, **options), renorm)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
@settings(deadline=None, max_examples=15)
def test_as_much_is_removed_as_by_the_cone_and_none_of_it_along_a_hack_row(seed, kind):
    g, J, params = hackward(seed)
    real, control = changed(g, J, params, kind, renorm=False)
    assert real.removed > 0.1 and control.removed == pytest.approx(real.removed, rel=1e-5)
    taken = g - control.g
    assert taken.norm().item() == pytest.approx(real.removed * g.norm().item(), rel=1e-5)
    assert torch.dot(taken, g) >= 0, "what is removed was in g, not put into it"
    cosines = (J @ taken) / (J.norm(dim=1) * taken.norm())
    assert cosines.abs().max() < 1e-5, "no hack row is moved, up or down"
    assert abs(torch.dot(taken, g - real.g)) < 1e-4 * taken.norm() ** 2, "the real cone's removal lies along its rows"


@pytest.mark.parametrize("kind", KINDS)
def test_the_magnitude_is_restored_and_hack_rows_are_diluted_alone(kind):
    g, J, params = hackward(7)
    _, control = changed(g, J, params, kind)
    _, bare = changed(g, J, params, kind, renorm=False)
    assert control.g.norm().item() == pytest.approx(g.norm().item(), rel=1e-5)
    scale = (g.norm() / bare.g.norm()).item()
    torch.testing.assert_close(J @ control.g, scale * (J @ g), rtol=1e-3, atol=1e-2)


def test_shuffled_is_the_cone_of_rows_with_permuted_entries():
    g, J, params = hackward(11)
    real, control = changed(g, J, params, "shuffled", renorm=False)
    order = shuffled(list(slices(params).values()), torch.Generator().manual_seed(5 * 1_000_003 + 3))
    K = torch.empty_like(J)
    K[:, order] = J
    torch.testing.assert_close(K @ K.T, J @ J.T, rtol=1e-4, atol=1e-2)  # the same lengths and angles
    u = off_rows(g - project_cone(g, K, renorm=False).g, J)
    torch.testing.assert_close(g - control.g, u * (real.removed * g.norm() / u.norm()), rtol=1e-3, atol=1e-4)
    for block in slices(params).values():
        assert torch.equal(K[:, block].sort(1).values, J[:, block].sort(1).values), "entries stay in their tensor"


def test_random_rows_are_not_the_shuffled_ones_and_both_are_drawn_anew_each_step():
    g, J, params = hackward(13)
    at = {(kind, step): changed(g, J, params, kind, step)[1].g for kind in KINDS for step in (0, 1)}
    assert torch.equal(at["random", 0], changed(g, J, params, "random", 0)[1].g)
    assert len({tuple(x[:5].tolist()) for x in at.values()}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_cone_removes_nothing_neither_does_the_control(kind):
    g, J, params = hackward(17)
    g = -J.mean(0)  # away from every row
    real, control = changed(g, J, params, kind)
    assert real.removed == 0 and control is real and torch.equal(control.g, g)


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_that_the_draw_respects_is_turned_round(kind):
    """Else a cone of one row would have nothing to remove in every second step."""
    g, J, params = hackward(19, n=1)
    for step in range(6):
        real, control = changed(g, J, params, kind, step)
        assert control.removed == pytest.approx(real.removed, rel=1e-5) and control.active == 1


def test_nothing_else_is_touched():
    g, J, params = hackward(23)
    kept = g.clone(), J.clone()
    for kind in KINDS:
        changed(g, J, params, kind)
    assert torch.equal(g, kept[0]) and torch.equal(J, kept[1])
    real, same = changed(g, J, params, "none")
    assert same is real
    one = project(g, J[0])
    assert matched(one, g, J[0], params, 0, Config(cone_match="random")) is one
