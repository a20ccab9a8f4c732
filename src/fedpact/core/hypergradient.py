"""Objective weights that follow a hypergradient: the steps of FedMOA's weight adaptation, as our reading has them.

FedMOA (arXiv:2602.00453) says that weights adapt by hypergradient descent; its formulas were not available to us, so
that every formula here is our reading, built on Baydin et al. 2018 (arXiv:1703.04782): after a step
`theta - lr * sum_k w_k g_k`, the derivative of a later loss F by w_k is `-lr * <grad F, g_k>`. Ascent in
`<grad F, g_k>` therefore lowers F. Log-weights live apart from weights: the floor must never be fed back into them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exponentiated_log_weights(
    log_weights: Tensor, hypergradient: Tensor, *, rate: float, present: Tensor, bound: float = 2.2
) -> Tensor:
    """One multiplicative step of the weights, in log space: [m], [m] -> [m].

    `log_weights + rate * hypergradient`, less its mean over the objectives that are `present` ([m] bool), cut to
    [-bound, bound]; absent ones stay 0. A hypergradient that is the same for all objectives changes nothing.
    Our reading of FedMOA; Baydin et al. 2018, section 3, with the exponentiated in place of the additive step.
    """
    moved = torch.where(present, log_weights + rate * hypergradient, 0.0)
    centred = moved - moved.sum() / present.sum().clamp(min=1)
    return torch.where(present, centred.clamp(-bound, bound), 0.0)


def floored_softmax(log_weights: Tensor, present: Tensor, floor: float) -> Tensor:
    """Weights that sum to 1, each at least `floor`: [m] -> [m]; absent objectives get 0.

    `floor + (1 - M * floor) * softmax`, over the M objectives that are `present` ([m] bool). All zeros if none is.
    The floor is our reading of FedMOA: an objective at weight zero could never show that it deserves more.

    Raises ValueError if M floors leave nothing to distribute.
    """
    count = int(present.sum())
    if floor < 0 or count * floor >= 1:
        raise ValueError(f"floor is {floor} for {count} objectives; expected at least 0 and below 1/{count}")
    if count == 0:
        return torch.zeros_like(log_weights)
    share = log_weights.masked_fill(~present, -torch.inf).softmax(0)
    return torch.where(present, floor + (1 - count * floor) * share, 0.0)


def cosine_hypergradient(dots: Tensor, current_norm: Tensor, previous_norms: Tensor) -> Tensor:
    """The cosines between the outer gradient and each earlier gradient: [m], [], [m] -> [m]; 0 where a norm is 0.

    `dots` are their inner products. Free of the scale of gradients, as in the multiplicative rule of Baydin et al.
    2018; its use for objective weights is our reading of FedMOA.
    """
    defined = (current_norm > 0) & (previous_norms > 0)
    # Two divisions, as the product of two small norms may underflow.
    return torch.where(defined, dots / current_norm / previous_norms, 0.0)


def shortfall(mean_rewards: Tensor) -> Tensor:
    """How far each mean reward is from 1, between 0 and 1: [m] -> [m]; 0 where it is NaN (not measured).

    The derivative, by the weights, of the weighted sum of shortfalls: a hypergradient that needs no gradients, for
    rewards between 0 and 1. Our reading of FedMOA.
    """
    return (1 - mean_rewards).clamp(0.0, 1.0).nan_to_num(nan=0.0)
