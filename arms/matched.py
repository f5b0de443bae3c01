"""Controls of the cone that remove as much as it does (--cone-match): the same share of |g|, step by step, but elsewhere.

The cone takes out 39 % of |g| in the mean of the first ten steps, its controls of --cone-rows .6 and 2.2 % (docs/results.md):
that those do nothing may be for want of mass. Here J is the real cone's, and only where the removal points is another matter:

    g' = g - s |g| u      s = |J^T lambda| / |g|, what the real cone would remove of this g
                          |u| = 1, J u = 0: no hack row is moved, up or down; <g, u> >= 0: what is taken out was in g

    random      u: where a cone of as many Gaussian rows removes
    shuffled    u: where a cone removes whose rows are J's with the entries of each LoRA tensor permuted, all rows alike. They
                have J's lengths, the angles between them and the values in every tensor, and say nothing of hacking.

Contrasts of mixed contexts would not do: the hack branch of context i against the fence of context j, or branches of i at j's
code, still say that hacking grows, in the sum over rows even by the same amount.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.lora import slices
from projection import Projected, project_cone, restore


def matched(
    real: Projected, g: Tensor, v: Tensor, params: dict[str, torch.nn.Parameter], step: int, cfg: Any, renorm: bool = True
) -> Projected:
    """`real`, what the cone makes of g; or by cfg.cone_match what a control makes of it that removes the same share.

    g: ascent direction [P]. v: the cone's rows [n, P]; to one direction [P] there is nothing to match. params: the adapter's."""
    if cfg.cone_match == "none" or v.dim() == 1 or real.removed == 0:
        return real
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    if cfg.cone_match == "random":
        elsewhere, active = _removal(g, torch.randn(v.shape, generator=generator).to(v), cfg.cone_ridge)
    else:
        order = shuffled(list(slices(params).values()), generator).to(g.device)
        moved, active = _removal(g[order], v, cfg.cone_ridge)  # that of the permuted rows, without a copy of them
        elsewhere = torch.empty_like(g)
        elsewhere[order] = moved
    u = off_rows(elsewhere, v)
    u = u / torch.linalg.vector_norm(u, dtype=torch.float64).clamp(min=1e-30).to(u.dtype)
    size = torch.linalg.vector_norm(g, dtype=torch.float64).item()
    sign = 1.0 if torch.dot(g, u) >= 0 else -1.0
    part = g - (sign * real.removed * size) * u
    removed = torch.linalg.vector_norm(g - part, dtype=torch.float64).item() / size
    gone = restore(part, torch.linalg.vector_norm(part, dtype=torch.float64).item(), size, renorm)
    return Projected(part, removed, int(gone), real.zero_blocks, active)


def _removal(g: Tensor, K: Tensor, ridge: float) -> tuple[Tensor, int]:
    """(what a cone of the rows K [n, P] removes of g [P], active rows); of the rows turned round where g respects them all."""
    out = project_cone(g, K, ridge, renorm=False)
    if not out.active:
        out = project_cone(g, -K, ridge, renorm=False)
    return g - out.g, out.active


def shuffled(blocks: list[slice], generator: torch.Generator) -> Tensor:
    """A random order of the entries [P] that leaves each in its block; the blocks follow each other."""
    return torch.cat([b.start + torch.randperm(b.stop - b.start, generator=generator) for b in blocks])


def off_rows(x: Tensor, J: Tensor) -> Tensor:
    """The part of x [P] that no row of J [n, P] has a component along."""
    norms = torch.linalg.vector_norm(J, dim=1, dtype=torch.float64)
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    gram = (J @ J.T).double() * inverse[:, None] * inverse[None, :]  # of the rows at unit length
    along = torch.linalg.pinv(gram, hermitian=True, rtol=1e-6) @ ((J @ x).double() * inverse)
    return x - (along * inverse).to(J.dtype) @ J
