"""What a gradient tells of its prompts: pure functions of a delta and of what a curious server works out for itself."""

from __future__ import annotations

import torch
from torch import Tensor

from fedpact.core.compress import hashed_sketch

MOST_NUMBERS = 2**15
"""Longer gradients are compared by a linear sketch of this length."""
_TINY = 1e-30


def shortened(rows: Tensor) -> Tensor:
    """[n, d] -> [n, at most MOST_NUMBERS], always the same projection."""
    return rows if rows.shape[1] <= MOST_NUMBERS else hashed_sketch(rows, MOST_NUMBERS, 0)


def centred(gradients: Tensor) -> Tensor:
    """[..., g, d] less the mean of each group: advantages of a group sum to zero, so that its mean says nothing."""
    return gradients - gradients.mean(-2, keepdim=True)


def presence(gradients: Tensor, change: Tensor, *, ridge: float) -> Tensor:
    """How much each candidate's gradients contribute to `change`: [c, b, g, d], [d] -> [c].

    A candidate has b hypotheses of g gradients each; what the server does not know, the advantages, are the unknowns of
    one ridge regression of the change on all of them together. `ridge` is in mean squared lengths of a gradient. A
    hypothesis' score is the squared length of its contribution, over what pure noise of the change's length would give
    it: long gradients are no evidence. A candidate's score is its best hypothesis'; 0 if all its gradients are 0.
    """
    c, b, g, d = gradients.shape
    rows = gradients.reshape(-1, d)
    used = (rows != 0).any(0)  # of a fresh adapter, only B has gradients
    rows, change = rows[:, used], change[used]
    gram = (rows @ rows.mT).double()  # [cbg, cbg]
    scale = gram.diagonal().mean().clamp(min=_TINY)
    solve = torch.linalg.inv(gram + ridge * scale * torch.eye(len(gram), dtype=torch.float64))
    shares = (solve @ (rows @ change).double()).view(c * b, g)
    spread = solve @ gram @ solve  # of the shares under noise of variance 1
    own, noise = (_blocks(matrix, g) for matrix in (gram, spread))  # [cb, g, g]
    found = torch.einsum("ig,igh,ih->i", shares, own, shares)
    expected = (own * noise).sum((1, 2)) * change.double().square().mean()
    scores: Tensor = torch.where(expected > _TINY, found / expected.clamp(min=_TINY), 0.0).view(c, b)
    return scores.amax(1)


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """The square blocks of that size on the diagonal: [k * size, k * size] -> [k, size, size]."""
    count = len(matrix) // size
    return torch.stack([matrix[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])


def token_scores(change: Tensor, inputs: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """How much of a B's change each token accounts for: [out, r], [v, r] -> [v].

    With B's gradient the sum over tokens of (error) x (A h), and `inputs` the A h of every token, the errors of least
    length that explain the change; a token's score is the length of its error. With fewer different tokens than ranks
    this would be exact; with more it is a hint.
    """
    gram = (inputs.mT @ inputs).double()  # [r, r]
    scale = gram.diagonal().mean().clamp(min=_TINY)
    damped = gram + ridge * scale * torch.eye(len(gram), dtype=torch.float64)
    errors = change.double() @ torch.linalg.solve(damped, inputs.double().mT)  # [out, v]
    scores: Tensor = errors.norm(dim=0)
    return scores


def area_under_curve(members: Tensor, others: Tensor) -> float:
    """The chance that a score of `members` is above one of `others`, ties as half: 0.5 is guessing."""
    above = (members[:, None] > others[None]).double()
    ties = (members[:, None] == others[None]).double()
    return float((above + ties / 2).mean())


def precision_at(members: Tensor, others: Tensor, k: int) -> float:
    """The share of members among the k highest scores; of equal scores, others come first."""
    scores = torch.cat([others, members])
    belongs = torch.cat([torch.zeros(len(others)), torch.ones(len(members))])
    order = torch.argsort(scores, descending=True, stable=True)[:k]
    return float(belongs[order].mean())
