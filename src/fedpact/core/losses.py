"""The group-relative policy losses, as the backward passes that they need.

All objectives share the log-probabilities and differ only in their advantages, so that one backward pass serves all of
them as long as a token's gradient is (something all objectives share) x (something per objective and completion).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fedpact.types import Pass, Rollout

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
ImportanceSamplingLevel = Literal["token", "sequence"]


@dataclass(frozen=True, slots=True)
class GroupLoss:
    """TRL 1.16's GRPO losses with the whole batch as one micro-batch (where "bnpo" and "dapo" coincide).

    With r the ratio of new to old probability and A the advantage, a token costs -min(rA, clip(r, 1 - epsilon,
    1 + epsilon_high) A), or for "cispo" -min(r, epsilon_high) A log p with the first factor held fixed: its bound is
    `epsilon_high` itself. "sequence" takes r from the mean log-ratio of the completion. What tokens cost is then
    averaged: per completion first ("grpo"), over all tokens ("bnpo", "dapo", "cispo"), or with the constant divisor
    n x max_completion_length ("dr_grpo"). `beta` adds the k3 estimate of the KL divergence from the reference, times
    r, to every objective. `epsilon_high` None means `epsilon`.

    Shao et al. 2024, arXiv:2402.03300 (grpo); Liu et al. 2025, arXiv:2503.20783 (dr_grpo); Yu et al. 2025,
    arXiv:2503.14476 (dapo); MiniMax 2025, arXiv:2506.13585 (cispo); Zheng et al. 2025, arXiv:2507.18071 (sequence).
    """

    loss_type: LossType
    epsilon: float = 0.2
    epsilon_high: float | None = None
    beta: float = 0.0
    importance_sampling_level: ImportanceSamplingLevel = "token"
    max_completion_length: int = 256

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(LossType):
            raise ValueError(f"loss_type is {self.loss_type!r}; expected one of {', '.join(get_args(LossType))}")
        if self.importance_sampling_level not in get_args(ImportanceSamplingLevel):
            raise ValueError(
                f"importance_sampling_level is {self.importance_sampling_level!r}; expected 'token' or 'sequence'"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL term."""
        return self.beta != 0.0

    def passes(
        self, rollout: Rollout, logprobs: Tensor, reference: Tensor | None, advantages: Tensor
    ) -> Sequence[Pass]:
        """The passes whose gradients add up to those of `values`: one, plus one for clipped tokens, plus one for KL.

        `logprobs` and `reference` are [n, t], `advantages` [m, n]. The pass for clipped tokens touches only the
        completions that have any, and is left out if nobody needs it.
        """
        logprobs = logprobs.detach()
        mask = rollout.mask
        shares = self._shares(mask, logprobs.dtype)  # [n, t]
        ratio = self._ratio(rollout, logprobs)  # [n, t] or [n, 1]
        advantages = advantages.detach().to(logprobs)

        if self.loss_type == "cispo":
            passes = [Pass(shares * ratio.clamp(max=self._high), -advantages)]
        elif self.importance_sampling_level == "sequence":
            passes = [Pass(shares, self._clipped_sequences(ratio.squeeze(-1), advantages))]
        else:
            passes = self._clipped_tokens(ratio, shares, advantages)
        if self.needs_reference:
            slope = _kl_slope(_gap(mask, logprobs, reference), ratio, mask)
            passes.append(Pass(shares * slope, torch.full_like(advantages, self.beta)))
        return passes

    def values(self, rollout: Rollout, logprobs: Tensor, reference: Tensor | None, advantages: Tensor) -> Tensor:
        """The loss of every objective, differentiable in `logprobs`: [n, t], [n, t], [m, n] -> [m]."""
        mask = rollout.mask
        ratio = self._ratio(rollout, logprobs)
        gains = advantages.to(logprobs).unsqueeze(-1)  # [m, n, 1]
        if self.loss_type == "cispo":
            costs = -ratio.clamp(max=self._high).detach() * gains * logprobs.masked_fill(~mask, 0.0)
        else:
            clipped = ratio.clamp(1 - self.epsilon, 1 + self._high)
            costs = -torch.minimum(ratio * gains, clipped * gains)
        if self.needs_reference:
            gap = _gap(mask, logprobs, reference)
            costs = costs + self.beta * ratio * (gap.exp() - gap - 1)
        return (costs * self._shares(mask, logprobs.dtype)).sum((-2, -1))

    @property
    def _high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def _shares(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """How much each token's cost counts in the loss; zero outside the mask: [n, t]."""
        if self.loss_type == "grpo":
            return mask.to(dtype) / (mask.sum(-1, keepdim=True).clamp(min=1) * len(mask))
        if self.loss_type == "dr_grpo":
            return mask.to(dtype) / (len(mask) * self.max_completion_length)
        return mask.to(dtype) / mask.sum().clamp(min=1)

    def _ratio(self, rollout: Rollout, logprobs: Tensor) -> Tensor:
        """New over old probability: [n, t], or [n, 1] at sequence level; 1 outside the mask."""
        log_ratio = (logprobs - rollout.logprobs.to(logprobs)).masked_fill(~rollout.mask, 0.0)
        if self.importance_sampling_level == "sequence":
            log_ratio = log_ratio.sum(-1, keepdim=True) / rollout.mask.sum(-1, keepdim=True).clamp(min=1)
        return log_ratio.exp()

    def _clipped_sequences(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """Coefficients with the clip folded in, since one ratio serves the whole completion: [n], [m, n] -> [m, n]."""
        moves = torch.where(advantages > 0, ratio <= 1 + self._high, (advantages < 0) & (ratio >= 1 - self.epsilon))
        return -advantages * torch.where(moves, ratio, 0.0)

    def _clipped_tokens(self, ratio: Tensor, shares: Tensor, advantages: Tensor) -> list[Pass]:
        """One pass by the rule for positive advantages, and a correction for the negative ones."""
        above = ratio > 1 + self._high
        below = ratio < 1 - self.epsilon
        passes = [Pass(shares * ratio.masked_fill(above, 0.0), -advantages)]
        # Only a token outside the clip range tells the two rules apart: a positive advantage stops pushing above it, a
        # negative one below it.
        correction = shares * ratio.masked_fill(~(above | below), 0.0)
        correction = torch.where(below, -correction, correction)
        losers = -advantages.clamp(max=0.0)
        if ((correction != 0).any(-1) & (losers != 0).any(0)).any():
            passes.append(Pass(correction, losers))
        return passes


def _gap(mask: Tensor, logprobs: Tensor, reference: Tensor | None) -> Tensor:
    """The reference's log-probs minus ours: [n, t], zero outside the mask."""
    if reference is None:
        raise ValueError("beta is not 0, so the loss needs the reference model's log-probs; found None")
    return (reference.to(logprobs) - logprobs).masked_fill(~mask, 0.0)


def _kl_slope(gap: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
    """The derivative of ratio x k3, summed over tokens, by each token's log-prob: [n, t]."""
    if ratio.shape == gap.shape:
        return -ratio * gap  # the exponentials of k3 and of its derivative cancel
    k3 = gap.exp() - gap - 1
    mean = k3.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return ratio * (1 - gap.exp() + mean)
