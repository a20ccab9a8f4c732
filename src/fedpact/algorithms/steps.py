"""What local training has in common: batches, and the tally that becomes a reply."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedpact.core.advantages import group_advantages, weighted_rewards
from fedpact.messages import Trained
from fedpact.protocols import Client, Learner
from fedpact.types import Adapter, Rollout, ScaleRewards


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One local step's completions, judged."""

    rollout: Rollout
    rewards: Tensor  # [m, n] float32, NaN: does not apply
    advantages: Tensor  # [m, n] float32, zero where there is no signal
    repeated: bool = False
    """This batch has been trained on before (`num_iterations` > 1)."""


def local_batches(learner: Learner, adapter: Adapter, steps: int) -> Iterator[Batch]:
    """Load `adapter`, then yield a freshly sampled batch for every step; the caller steps the policy in between.

    Advantages are standardised per objective. With `num_iterations` > 1 each batch comes that many times.
    """
    learner.policy.load(adapter)
    for step in range(steps):
        rollout = learner.policy.generate(learner.prompts(step), draw=step)
        yield from judged(learner, rollout, learner.rewards(rollout.prompts, rollout.completions))


def judged(learner: Learner, rollout: Rollout, rewards: Tensor) -> Iterator[Batch]:
    """The batch of a rollout with rewards [m, n], `num_iterations` times."""
    advantages = group_advantages(rewards, rollout.group_size, scale=learner.scale_rewards)
    for iteration in range(learner.num_iterations):
        yield Batch(rollout, rewards, advantages, repeated=iteration > 0)


Aggregation = Literal["normalize_then_sum", "sum_then_normalize"]
"""How several objectives become one advantage; TRL's names."""


def combined_advantages(batch: Batch, weights: Tensor, how: Aggregation, scale: ScaleRewards) -> Tensor:
    """One advantage a completion, from objective weights [m]: [1, n]."""
    if how == "normalize_then_sum":
        return weights.float()[None] @ batch.advantages
    total = weighted_rewards(batch.rewards, weights)[None]  # [1, n]
    return group_advantages(total, batch.rollout.group_size, scale=scale)


class Tally:
    """Adds up what happened in the local steps."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.rewards: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.lengths: list[Tensor] = []
        self.truncated: list[Tensor] = []

    def add(self, batch: Batch, weights: Tensor) -> None:
        """Count a batch ([m] objective weights); a repeated one counts its weights only."""
        self.weights.append(weights.detach().double().cpu())
        if not batch.repeated:
            self.rewards.append(batch.rewards)
            self.lengths.append(batch.rollout.lengths.float().cpu())
            self.truncated.append(batch.rollout.truncated.float().cpu())

    def mean_rewards(self) -> Tensor:
        """[m] float32, NaN where nothing was measured."""
        return torch.cat(self.rewards, dim=1).nanmean(dim=1)

    def accuracy(self) -> float | None:
        """Mean reward of the primary objective; None without one."""
        if self.client.primary is None:
            return None
        value = float(self.mean_rewards()[self.client.primary])
        return None if value != value else value

    def trained(self, adapter: Adapter, *, weight: float | None = None) -> Trained:
        """The reply. `weight`: None counts completions."""
        weights = torch.stack(self.weights).mean(0)
        metrics = {
            f"weight/{name}": float(w)
            for name, w, present in zip(self.client.objectives, weights, self.client.present, strict=True)
            if present
        }
        metrics["completion_length"] = float(torch.cat(self.lengths).mean())
        metrics["truncated"] = float(torch.cat(self.truncated).mean())
        if len(self.weights) > 1:
            metrics["weight_change"] = float(torch.stack(self.weights).diff(dim=0).abs().max(dim=1).values.mean())
        return Trained(
            weight=float(sum(rewards.shape[1] for rewards in self.rewards)) if weight is None else weight,
            adapter=adapter,
            rewards=self.mean_rewards(),
            accuracy=self.accuracy(),
            metrics=metrics,
        )
