"""A client and a server whose numbers are written down in the test: gradients are given, steps are recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedpact.messages import Introduced, Train, Trained
from fedpact.policy.gradients import FlatJacobian
from fedpact.runtime.exchange import mean_reply
from fedpact.types import Adapter, Direction, Memory, Prompts, Rollout

NAME = "base_model.model.x.lora_A.weight"


@dataclass
class StagePolicy:
    """Hands out the given gradients, one [m, d] a step, and keeps the directions that it was told to take."""

    rows: Sequence[Tensor]
    steps: list[Tensor] = field(default_factory=list)
    advantages: list[Tensor] = field(default_factory=list)
    learning_rate: float = 1.0

    def load(self, adapter: Adapter, *, optimizer: Memory | None = None) -> None:
        self.theta = adapter[NAME].clone()

    def adapter(self) -> Adapter:
        return {NAME: self.theta.clone()}

    def optimizer(self) -> Memory:
        return {}

    def generate(
        self, prompts: Prompts, *, draw: int, num_generations: int | None = None, greedy: bool = False
    ) -> Rollout:
        n = 2 * len(prompts)
        return Rollout(
            prompts=prompts.repeat(2),
            completions=[f"completion {i} of draw {draw}" for i in range(n)],
            prompt_ids=torch.zeros(n, 1, dtype=torch.long),
            prompt_mask=torch.ones(n, 1, dtype=torch.bool),
            completion_ids=torch.zeros(n, 3, dtype=torch.long),
            mask=torch.ones(n, 3, dtype=torch.bool),
            logprobs=torch.zeros(n, 3),
            truncated=torch.zeros(n, dtype=torch.bool),
            group_size=2,
        )

    def logprobs(self, rollout: Rollout, *, reference: bool = False) -> Tensor:
        return rollout.logprobs

    def gradients(self, rollout: Rollout, advantages: Tensor, *, loss: Any = None) -> FlatJacobian:
        self.advantages.append(advantages)
        rows = self.rows[len(self.steps)][: len(advantages)]
        return FlatJacobian(rows, (advantages != 0).any(-1), [slice(0, rows.shape[1])])

    def preconditioner(self) -> Direction:
        return torch.ones_like(self.rows[0][0])

    def step(self, direction: Direction) -> None:
        self.steps.append(direction)
        self.theta = self.theta - direction[None]


@dataclass
class StageClient:
    """Two prompts a step; `scores` is [m, 4], the same in every step."""

    policy: StagePolicy
    scores: Tensor
    objectives: Sequence[str] = ("correct", "brief")
    primary: int | None = 0
    memory: Memory = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    scale_rewards: Any = "group"
    num_iterations: int = 1
    weights: Tensor | None = None
    logged: list[dict[str, float]] = field(default_factory=list)

    @property
    def present(self) -> Tensor:
        return ~self.scores.isnan().all(-1)

    @property
    def default_weights(self) -> Tensor:
        given = torch.ones(len(self.objectives), dtype=torch.float64) if self.weights is None else self.weights
        return given * self.present / (given * self.present).sum()

    def prompts(self, step: int) -> Prompts:
        return Prompts(text=["a", "b"], ids=torch.arange(2), columns={})

    def rewards(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        return self.scores

    def log(self, **metrics: float) -> None:
        self.logged.append(metrics)


@dataclass
class StageServer:
    """Members answer with the adapters and weights written down; requests are kept."""

    replies: Mapping[str, Trained]
    clients: Mapping[str, Introduced]
    objectives: Sequence[str] = ("correct", "brief")
    memory: Memory = field(default_factory=dict)
    round: int = 1
    requests: dict[str, Train] = field(default_factory=dict)

    def ask(self, requests: Any) -> Any:
        self.requests = requests if isinstance(requests, dict) else dict.fromkeys(self.clients, requests)
        return {name: self.replies[name] for name in sorted(self.requests) if name in self.replies}

    def mean(self, requests: Any) -> Trained:
        return mean_reply(self.ask(requests).values())

    def means(self, requests: Any, groups: Mapping[str, Sequence[str]]) -> Mapping[str, Trained]:
        replies = self.ask(requests)
        present = {group: [replies[name] for name in names if name in replies] for group, names in groups.items()}
        return {group: mean_reply(found) for group, found in present.items() if found}

    def log(self, **metrics: float) -> None: ...


def adapter(*values: float) -> Adapter:
    return {NAME: torch.tensor([values])}


def trained(weight: float, *values: float, accuracy: float | None = None) -> Trained:
    return Trained(weight=weight, adapter=adapter(*values), rewards=torch.tensor([0.0, 0.0]), accuracy=accuracy)


def introduced(name: str, task: str = "", num_prompts: int = 10) -> Introduced:
    return Introduced(
        name=name, task=task, objectives=("correct", "brief"), num_prompts=num_prompts, rank=1, versions={}
    )
