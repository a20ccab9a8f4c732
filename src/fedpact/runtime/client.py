"""What an algorithm's client half sees: `protocols.Client`, for the length of one request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpact.policy.lora_policy import LoraPolicy
from fedpact.rewards.load import LoadedReward, RewardSet
from fedpact.runtime.config import ClientConfig
from fedpact.runtime.contract import Contract, default_weights
from fedpact.runtime.files import storing
from fedpact.seeding import permutation
from fedpact.types import Memory, Prompts, ScaleRewards


class ClientSide:
    """See `protocols.Client`. `memory` is this request's own copy; the member keeps it if the reply leaves."""

    def __init__(
        self,
        *,
        contract: Contract,
        config: ClientConfig,
        rewards: Mapping[str, LoadedReward],
        train_prompts: Prompts,
        policy: LoraPolicy,
        memory: Memory,
        cache: dict[str, Any],
        log_path: Path,
        round: int,
        exchange: int,
    ) -> None:
        self.contract, self.policy, self.memory, self.cache = contract, policy, memory, cache
        self.objectives = list(contract.objectives)
        self.present = torch.tensor([name in rewards and not config.rewards[name].audit for name in self.objectives])
        self.primary = contract.primary
        weights = torch.tensor(default_weights(contract.objectives), dtype=torch.float64) * self.present
        if weights.sum() == 0:  # every objective that this member has is weighted 0 by name
            weights = self.present.double()
        self.default_weights: Tensor = weights / weights.sum()
        self.scale_rewards: ScaleRewards = contract.loss.scale_rewards
        self.num_iterations: int = contract.training.num_iterations
        self._rewards, self._config, self._train_prompts = rewards, config, train_prompts
        self._round, self._exchange, self._log_path = round, exchange, log_path
        self._orders: dict[int, list[int]] = {}

    def prompts(self, step: int) -> Prompts:
        """`prompts_per_step` training prompts: each exchange walks through a shuffle of its own."""
        size = self.contract.training.prompts_per_step
        total = len(self._train_prompts)
        rows: list[int] = []
        for place in range(step * size, (step + 1) * size):
            lap, index = divmod(place, total)
            rows.append(self._shuffle(lap)[index])
        return self._train_prompts.select(rows)

    def rewards(self, prompts: Prompts, completions: Sequence[str], *, audits: bool = False) -> Tensor:
        """See `protocols.Client`. `audits` also measures the rewards that are never trained on."""
        wanted = {
            name: reward for name, reward in self._rewards.items() if audits or not self._config.rewards[name].audit
        }
        measured = RewardSet(wanted).measure(prompts, completions)
        result = torch.full((len(self.objectives), len(completions)), torch.nan)
        for name, row in zip(wanted, measured, strict=True):
            result[self.objectives.index(name)] = row
        return result

    def log(self, **metrics: float) -> None:
        line = {"round": self._round, "exchange": self._exchange, **metrics}
        with storing(self._log_path), self._log_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _shuffle(self, lap: int) -> list[int]:
        if lap not in self._orders:
            key = (self.contract.seed, self._round, self._exchange, self._config.name, "prompts", lap)
            self._orders[lap] = permutation(len(self._train_prompts), *key)
        return self._orders[lap]
