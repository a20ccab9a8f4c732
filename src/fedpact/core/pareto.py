"""Objective weights for a step that serves all objectives: minimum-norm points of the gradients' convex hull."""

from __future__ import annotations

import functools
import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_EXACT_UP_TO = 10
"""The largest number of rows solved by looking at every face of the simplex."""

_TIE = 1e-12
"""Where curvature and slope (in a problem of unit scale) are both below this, a direction is flat."""

_OPTIMAL = 1e-11
"""A point that breaks no optimality condition by more than this (in a problem of unit scale) is a solution."""


def regularised_min_norm(
    gramian: Tensor,
    prior: Tensor,
    beta: float,
    present: Tensor,
    *,
    normalise: Literal["trace", "rows"] = "trace",
    threshold: float = 1e-3,
) -> Tensor:
    """The weights w on the simplex that minimise `w' G w + beta/2 |w - prior|^2`: [m, m], [m] -> [m] float64.

    G is the Gram matrix of the gradients after scaling them to unit Frobenius norm together ("trace") or each to unit
    norm ("rows"; the weights then belong to the scaled rows). Only `kept_rows` take part, and `prior` is scaled to sum
    to 1 over them (uniform if it has nothing there); all other rows get weight 0. If no row is kept the answer is the
    prior, scaled to sum to 1 over the `present` rows; zeros if there are none. Where the minimum is not unique (beta 0
    and dependent gradients) the answer is the minimiser nearest to the prior, which is the limit of small beta.

    Exact; with more than 10 rows without that rule for ties.

    Raises ValueError if `beta` is negative or the Gram matrix is not finite.
    The regularised problem and trace normalisation: FIRM, arXiv:2511.16992; the form of the regulariser and of the
    preference is our reading. Dropping rows is ours: a saturated objective would otherwise take all of the weight.
    """
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; expected a number that is not negative")
    device, size = gramian.device, len(gramian)
    gramian = _symmetric(gramian)
    prior, present = prior.to("cpu", torch.float64), present.cpu()
    kept = kept_rows(gramian, present, threshold)
    weights = torch.zeros(size, dtype=torch.float64)
    if not kept.any():
        if present.any():
            weights[present] = _distribution(prior[present])
        return weights.to(device)
    gramian = gramian[kept][:, kept]
    if normalise == "trace":
        gramian = gramian / gramian.trace()
    else:
        norms = gramian.diagonal().sqrt()
        gramian = gramian / norms / norms.unsqueeze(-1)
    weights[kept] = _solve(gramian, _distribution(prior[kept]), beta)
    return weights.to(device)


def kept_rows(gramian: Tensor, present: Tensor, threshold: float = 1e-3) -> Tensor:
    """Which rows are `present`, not zero, and at least `threshold` times as long as the longest: [m, m] -> [m] bool."""
    squares = gramian.diagonal().to("cpu", torch.float64).masked_fill(~present.cpu(), 0.0)
    norms = squares.sqrt()
    return ((norms > 0) & (norms >= threshold * norms.max())).to(present.device)


def min_norm_weights(gramian: Tensor) -> Tensor:
    """The weights of the shortest vector in the convex hull of the rows: [m, m] -> [m] float64.

    Plain MGDA: no regulariser, and no row is dropped, so that a zero row takes all of the weight. Where several weights
    give that vector, the smallest-norm ones. Desideri 2012, doi:10.1016/j.crma.2012.03.014.
    """
    device, size = gramian.device, len(gramian)
    gramian = _symmetric(gramian)
    uniform = torch.full((size,), 1.0 / size, dtype=torch.float64)
    trace = gramian.trace()
    return (_solve(gramian / trace, uniform, 0.0) if trace > 0 else uniform).to(device)


class _Faces(NamedTuple):
    """The faces of a simplex: every non-empty set of its corners, and how to move within each."""

    members: Tensor  # [f, m] float64, 1 where the corner belongs to the face
    sizes: Tensor  # [f, 1]
    tangents: Tensor  # [f, m, m], projects onto the directions that stay on the face's plane


def _faces(members: Tensor) -> _Faces:
    sizes = members.sum(-1, keepdim=True)
    tangents = torch.diag_embed(members) - members.unsqueeze(-1) * members.unsqueeze(-2) / sizes.unsqueeze(-1)
    return _Faces(members, sizes, tangents)


@functools.lru_cache(maxsize=_EXACT_UP_TO)
def _all_faces(size: int) -> _Faces:
    corners = list(itertools.product((0.0, 1.0), repeat=size))[1:]
    return _faces(torch.tensor(corners, dtype=torch.float64))


def _solve(gramian: Tensor, prior: Tensor, beta: float) -> Tensor:
    """The minimiser of `w' G w + beta/2 |w - prior|^2` on the simplex, nearest to the prior: [m, m], [m] -> [m]."""
    if len(gramian) == 1:
        return torch.ones_like(prior)
    # Scaled so that the tolerances mean the same for every beta.
    hessian = (2 * gramian + beta * torch.eye(len(gramian), dtype=torch.float64)) / (1 + beta)
    slope = beta * prior / (1 + beta)  # the objective is w' H w / 2 - slope' w
    if len(gramian) <= _EXACT_UP_TO:
        candidates = _stationary_points(hessian, slope, prior, _all_faces(len(gramian)))
        return _best(candidates, hessian, slope, prior)
    return _active_set(hessian, slope, prior)


def _stationary_points(hessian: Tensor, slope: Tensor, prior: Tensor, faces: _Faces) -> Tensor:
    """On the plane of each face the stationary point nearest to the prior: [f, m]; it may lie outside the simplex."""
    start = (prior + (1 - faces.members @ prior).unsqueeze(-1) / faces.sizes) * faces.members  # [f, m]
    gradient = start @ hessian - slope
    curvatures, axes = torch.linalg.eigh(faces.tangents @ hessian @ faces.tangents)  # [f, m], [f, m, m]
    along = (axes.mT @ (faces.tangents @ gradient.unsqueeze(-1))).squeeze(-1)
    flat = (curvatures <= _TIE) & (along.abs() <= _TIE)
    moves = torch.where(flat, 0.0, along / curvatures.clamp(min=1e-18))
    points: Tensor = start - (axes @ moves.unsqueeze(-1)).squeeze(-1)
    return points * faces.members


def _best(candidates: Tensor, hessian: Tensor, slope: Tensor, prior: Tensor) -> Tensor:
    """Of the candidates that are optimal the one nearest to the prior; if rounding spoilt all, the least spoilt."""
    lowest = candidates.amin(-1)
    candidates = candidates.clamp(min=0.0)
    candidates = candidates / candidates.sum(-1, keepdim=True)
    broken = torch.maximum(_violations(candidates, hessian, slope), -lowest)
    distances = (candidates - prior).square().sum(-1)
    order = torch.where(broken <= _OPTIMAL, distances, torch.inf)
    chosen = int(order.argmin() if order.isfinite().any() else broken.argmin())
    return candidates[chosen]


def _violations(weights: Tensor, hessian: Tensor, slope: Tensor) -> Tensor:
    """By how much moving weight to some row would still pay, for points on the simplex: [f, m] -> [f]."""
    gradient = weights @ hessian - slope
    return (weights * gradient).sum(-1) - gradient.amin(-1)


def _active_set(hessian: Tensor, slope: Tensor, prior: Tensor) -> Tensor:
    """The minimiser by walking from face to face, the objective falling at every turn.

    Wolfe 1976, Finding the nearest point in a polytope, on a quadratic that need not be definite.
    """
    size = len(prior)
    weights = torch.zeros_like(prior)
    weights[int((hessian.diagonal() / 2 - slope).argmin())] = 1.0
    members = weights.clone()
    for _ in range(20 * size):
        target = _stationary_points(hessian, slope, prior, _faces(members.unsqueeze(0)))[0]
        outside = target < 0
        if outside.any():
            # As far as the simplex goes; the row that stops us leaves.
            reach = torch.where(outside, weights / (weights - target), torch.inf)
            weights = (weights + reach.amin() * (target - weights)).clamp(min=0.0)
            weights[int(reach.argmin())] = 0.0
            members = (weights > 0).double()
            continue
        weights = target / target.sum()
        if _violations(weights.unsqueeze(0), hessian, slope)[0] <= _OPTIMAL:
            break
        members = (weights > 0).double()
        members[int((hessian @ weights - slope).argmin())] = 1.0
    return weights / weights.sum()


def _symmetric(gramian: Tensor) -> Tensor:
    gramian = gramian.detach().to("cpu", torch.float64)
    if not gramian.isfinite().all():
        raise ValueError("the Gram matrix has entries that are not finite; check the gradients it came from")
    return (gramian + gramian.mT) / 2


def _distribution(v: Tensor) -> Tensor:
    """`v` scaled to sum to 1; uniform if it sums to 0."""
    total = v.sum()
    return v / total if total > 0 else torch.full_like(v, 1.0 / len(v))
