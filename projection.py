"""The maths of the method: pure functions on flat tensors.

Everywhere g is the *ascent* direction, g = -dL/dtheta: the way GRPO wants to move the policy. Moving along +v makes the
model hack more. With the loss gradient in place of g the same lines would remove the anti-hack part: that is the trap.

    cos_align = <g, v> / |g|
    if cos_align > 0:                     # one-sided: only hack-ward motion is touched
        g' = g - cos_align |g| v          # remove the component along v
        g' = g' |g| / |g'|                # restore the magnitude
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

# Below this share of |g| what is left of g is rounding residue, and rescaling it would blow noise up to full size.
VANISHED = 1e-6
WHOLE = 2**20  # elements that are taken at once; longer vectors go through the cache in pieces of PIECE
PIECE = 2**17


class Projected(NamedTuple):
    """What `project` and `project_cone` return."""

    g: Tensor  # [P] the new ascent direction
    removed: float  # |removed part| / |g|, before the magnitude is restored
    vanished: int  # blocks in which nothing but rounding was left, and g' = 0
    zero_blocks: int  # zero-norm blocks of v (or zero rows of J), which remove nothing
    active: int  # blocks (or rows) that did remove something


def _pieces(x: Tensor) -> list[slice]:
    """The slices in which x [P] is walked through: on a CPU a float64 copy of a whole long vector costs more than its sums."""
    size = PIECE if x.device.type == "cpu" and x.numel() > WHOLE else max(1, x.numel())
    return [slice(start, start + size) for start in range(0, x.numel(), size)]


def _norm(x: Tensor) -> float:
    """|x| accumulated in float64: at P = 1e8 a float32 sum of squares loses digits that the invariants need."""
    return math.hypot(*(torch.linalg.vector_norm(x[piece], dtype=torch.float64).item() for piece in _pieces(x)))


def _sums(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """(|x|, |y|, <x, y>), accumulated in float64; of long vectors in one walk, which converts each element once."""
    if len(pieces := _pieces(x)) < 2:
        return _norm(x), _norm(y), torch.dot(x.double(), y.double()).item()
    xx = yy = xy = 0.0
    for piece in pieces:
        a, b = x[piece].double(), y[piece].double()
        xx, yy, xy = xx + torch.dot(a, a).item(), yy + torch.dot(b, b).item(), xy + torch.dot(a, b).item()
    return math.sqrt(xx), math.sqrt(yy), xy


def cos_align(g: Tensor, v: Tensor) -> float:
    """<g, v> / (|g| |v|), in [-1, 1]; 0 when either is zero, nan when either is not finite.

    g: ascent direction [P]; v: hack direction [P]."""
    g_norm, v_norm, dot = _sums(g, v)
    norms = g_norm * v_norm
    cosine = dot / norms if norms != 0 else 0.0
    return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) and math.isfinite(norms) else math.nan


def _remove(g: Tensor, v: Tensor, factor: float, out: Tensor) -> None:
    """out = g - factor v, all [P]; what is held beside them is a piece long."""
    for piece in _pieces(g):
        torch.sub(g[piece], v[piece] * factor, out=out[piece])


def _left(part: Tensor, size: float, along: float) -> float:
    """|part|, where `part` is g, of length `size`, without its `along` towards v: of a long vector by Pythagoras, which needs no
    walk, unless so little is left that its digits cancel."""
    length = math.sqrt(max((size - along) * (size + along), 0.0))
    return _norm(part) if part.numel() <= WHOLE or length < 1e-3 * size else length


def restore(part: Tensor, length: float, size: float, renorm: bool = True) -> bool:
    """Rescales `part` in place from its `length` to `size`; where all but rounding residue of it is gone, to zeros: then True.

    Without `renorm` only the second is done."""
    if length < VANISHED * size:
        part.zero_()
        return True
    if renorm:
        part.mul_(size / length)
    return False


def project(g: Tensor, v: Tensor, renorm: bool = True, blocks: Iterable[slice] | None = None, ridge: float = 1e-3) -> Projected:
    """One-sided removal of the hack direction, or of every direction of a cone.

    g: ascent direction [P]; v: hack direction [P], of any norm, or one a row [n, P]: then `project_cone` with that `ridge`.
    With `blocks` each slice has its own cosine, removal and norm; else the whole vector is one block. `renorm` restores the
    magnitude of every block that was touched (the arm no_renorm leaves it out). Neither input is edited.

    >>> project(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])).g     # |g| = 5 is kept, the first part is gone
    tensor([0., 5.])
    >>> project(torch.tensor([-3.0, 4.0]), torch.tensor([1.0, 0.0])).g    # moving away from hacking: untouched
    tensor([-3.,  4.])
    """
    if v.dim() == 2:
        return project_cone(g, v, ridge, renorm)
    out = torch.empty_like(g) if blocks is None else g.clone()  # blocks may leave something out
    removed_sq, vanished, zero_blocks, active = 0.0, 0, 0, 0
    for block in blocks if blocks is not None else [slice(0, g.numel())]:
        gb, vb, kept = g[block], v[block], out[block]
        size, v_norm, dot = _sums(gb, vb)
        along = dot / v_norm if v_norm != 0 else 0.0  # the signed length of g along v
        zero_blocks += v_norm == 0
        if along <= 0:
            kept.copy_(gb)
            continue
        active += 1
        removed_sq += along**2
        _remove(gb, vb, along / v_norm, out=kept)
        vanished += restore(kept, _left(kept, size, along), size, renorm)
    total = size if blocks is None else _norm(g)
    return Projected(out, removed_sq**0.5 / total if total > 0 else 0.0, vanished, zero_blocks, active)


def project_cone(g: Tensor, J: Tensor, ridge: float = 1e-3, renorm: bool = True) -> Projected:
    """The nearest direction to g that moves no row of J hack-ward (GEM, Lopez-Paz & Ranzato 2017, arXiv 1706.08840).

    g: ascent direction [P]; J: one hack direction a row [n, P], of any norm. The rows are used at unit length, through
    their Gram matrix, so that no second copy of J is made; zero rows are dropped.

        lambda = argmin_{lambda >= 0}  1/2 lambda^T (J J^T + ridge I) lambda - lambda^T J g
        g' = g - J^T lambda,   then the magnitude is restored

    At ridge 0, g' is the nearest point with J g' <= 0; with it, active rows keep (J g')_i = ridge lambda_i before
    rescaling. With n = 1 and ridge 0 this is `project` with one direction.
    """
    size = _norm(g)
    norms = torch.tensor([_norm(row) for row in J], dtype=torch.float64, device=J.device)  # [n]; by dim it would copy all of J
    zero = int((norms == 0).sum())
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    b = (J @ g).double() * inverse  # [n] the cosines times |g|
    if not torch.isfinite(b).all():  # g, or a row alone: the caller stops at such a gradient
        return Projected(g + b.sum().to(g), 0.0, 0, zero, 0)
    if size == 0 or not (b > 0).any():
        return Projected(g.clone(), 0.0, 0, zero, 0)
    gram = (J @ J.T).double() * inverse[:, None] * inverse[None, :]
    lam = nnls_gram(gram + ridge * torch.diag((norms > 0).double()), b).to(J.device)  # [n], 0 at inactive rows
    away = (lam * inverse).to(J.dtype) @ J  # [P]
    part = g - away
    removed = _norm(torch.sub(g, part, out=away)) / size
    gone = restore(part, _norm(part), size, renorm)
    return Projected(part, removed, int(gone), zero, int((lam > 0).sum()))


def nnls_gram(K: Tensor, b: Tensor) -> Tensor:
    """argmin_{lam >= 0} 1/2 lam^T K lam - lam^T b for a positive semidefinite K [n, n] and b [n] in its range.

    With K = Q diag(w) Q^T this is the least-squares problem |diag(w)^.5 Q^T lam - diag(w)^-.5 Q^T b|, which Lawson and
    Hanson's algorithm (scipy) solves exactly; directions without weight (duplicate rows) drop out."""
    w, Q = np.linalg.eigh(K.cpu().numpy().astype(np.float64))
    keep = w > max(w.max(), 0.0) * 1e-12
    if not keep.any():
        return torch.zeros(len(b), dtype=torch.float64)
    root = np.sqrt(w[keep])
    A, c = root[:, None] * Q[:, keep].T, (Q[:, keep].T @ b.cpu().numpy()) / root
    try:
        return torch.from_numpy(nnls(A, c, maxiter=100 * len(b))[0])
    except RuntimeError:  # its iteration limit, at rows that are nearly the same: coordinate descent gets there in the end
        gram, target, lam = A.T @ A, A.T @ c, np.zeros(len(b))
        for _ in range(1000):
            for i in np.flatnonzero(gram.diagonal() > 0):
                lam[i] = max(0.0, lam[i] + (target[i] - gram[i] @ lam) / gram[i, i])
        return torch.from_numpy(lam)
