"""What the two halves of an algorithm have in common: `protocols.Learner`, for the length of one request or round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedpact.messages import Evaluate, Evaluated
from fedpact.policy.lora_policy import LoraPolicy
from fedpact.rewards.load import LoadedReward, RewardSet
from fedpact.runtime.contract import Contract, default_weights
from fedpact.seeding import permutation
from fedpact.types import Memory, Prompts, ScaleRewards


class Learner:
    """See `protocols.Learner`. `memory` is this request's or round's own copy.

    `audits` names the rewards that are measured and never trained on; `walk` keys the order of the training prompts.
    """

    def __init__(
        self,
        *,
        contract: Contract,
        rewards: Mapping[str, LoadedReward],
        audits: frozenset[str],
        train_prompts: Prompts,
        policy: Callable[[], LoraPolicy],
        memory: Memory,
        walk: tuple[str | int, ...],
    ) -> None:
        self.contract, self.memory = contract, memory
        self.objectives: Sequence[str] = list(contract.objectives)
        self.present = torch.tensor([name in rewards and name not in audits for name in self.objectives])
        self.primary = contract.primary
        self.default_weights: Tensor = torch.tensor(default_weights(contract.objectives), dtype=torch.float64)
        self.scale_rewards: ScaleRewards = contract.loss.scale_rewards
        self.loss, self.ppo = contract.loss, contract.ppo
        self.num_iterations: int = contract.training.num_iterations
        self.measured = torch.zeros(len(self.objectives), dtype=torch.int64)
        """Completions that had each objective's training reward so far: [m]."""
        self._rewards, self._audits, self._train_prompts, self._walk = rewards, audits, train_prompts, walk
        self._make_policy = policy
        self._policy: LoraPolicy | None = None
        self._orders: dict[int, list[int]] = {}

    @property
    def policy(self) -> LoraPolicy:
        if self._policy is None:
            self._policy = self._make_policy()
        return self._policy

    @property
    def sampler_gap(self) -> float | None:
        """See `LoraPolicy.sampler_gap`; None if the policy was not used."""
        return None if self._policy is None else self._policy.sampler_gap

    def prompts(self, step: int) -> Prompts:
        """`prompts_per_step` training prompts: a walk through one shuffle after another."""
        size = self.contract.training.prompts_per_step
        total = len(self._train_prompts)
        rows: list[int] = []
        for place in range(step * size, (step + 1) * size):
            lap, index = divmod(place, total)
            rows.append(self._shuffle(lap)[index])
        return self._train_prompts.select(rows)

    def rewards(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        found = self._measured(prompts, completions, [name for name in self._rewards if name not in self._audits])
        self.measured += (~found.isnan()).sum(dim=1)
        return found

    def audit(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        """[m, n] all rewards, those included that are never trained on."""
        return self._measured(prompts, completions, list(self._rewards))

    def evaluate(self, request: Evaluate, heldout: Prompts) -> Evaluated:
        """Held-out results of the adapter in `request`."""
        settings = self.contract.evaluation
        prompts = heldout.select(list(range(min(settings.num_prompts or len(heldout), len(heldout)))))
        self.policy.load(request.adapter)
        rollout = self.policy.generate(prompts, draw=0, num_generations=settings.num_generations, greedy=request.greedy)
        rewards = self.audit(rollout.prompts, rollout.completions)
        means = rewards.nanmean(dim=1)
        accuracy = None if self.primary is None else float(means[self.primary])
        return Evaluated(
            weight=float(rewards.shape[1]),
            rewards=means,
            counts=(~rewards.isnan()).sum(dim=1),
            accuracy=None if accuracy is None or accuracy != accuracy else accuracy,
        )

    def _measured(self, prompts: Prompts, completions: Sequence[str], names: Sequence[str]) -> Tensor:
        measured = RewardSet({name: self._rewards[name] for name in names}).measure(prompts, completions)
        result = torch.full((len(self.objectives), len(completions)), torch.nan)
        for name, row in zip(names, measured, strict=True):
            result[self.objectives.index(name)] = row
        return result

    def _shuffle(self, lap: int) -> list[int]:
        if lap not in self._orders:
            key = (self.contract.seed, *self._walk, "prompts", lap)
            self._orders[lap] = permutation(len(self._train_prompts), *key)
        return self._orders[lap]
