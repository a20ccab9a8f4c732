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
    candidate's score is the length of its best hypothesis' contribution, 0 if its gradients are.
    """
    c, b, g, d = gradients.shape
    rows = gradients.reshape(-1, d).double()
    gram = rows @ rows.mT
    scale = gram.diagonal().mean().clamp(min=_TINY)
    damped = gram + ridge * scale * torch.eye(len(gram), dtype=torch.float64)
    shares = torch.linalg.solve(damped, rows @ change.double())
    # |sum_i s_i g_i|^2 of a block from the Gram matrix alone
    blocks = torch.einsum("igjh->ijgh", gram.view(c * b, g, c * b, g)).diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    own = shares.view(c * b, g)
    squares = torch.einsum("ig,igh,ih->i", own, blocks, own)
    return squares.clamp(min=0).sqrt().view(c, b).amax(1)


def token_scores(change: Tensor, inputs: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """How much of a B's change each token accounts for: [out, r], [v, r] -> [v].

    With B's gradient the sum over tokens of (error) x (A h), and `inputs` the A h of every token, the errors of least
    length that explain the change; a token's score is the length of its error. With fewer different tokens than ranks
    this would be exact; with more it is a hint.
    """
    gram = (inputs.mT @ inputs).double()  # [r, r]
    scale = gram.diagonal().mean().clamp(min=_TINY)
    damped = gram + ridge * scale * torch.eye(len(gram), dtype=torch.float64)
    return (change.double() @ torch.linalg.solve(damped, inputs.double().mT)).norm(dim=0)


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
