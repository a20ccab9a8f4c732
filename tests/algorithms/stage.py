"""A client and a server whose numbers are written down in the test: gradients are given, steps are recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedpact.algorithms.base import Algorithm
from fedpact.errors import TooFewRepliesError
from fedpact.messages import Introduced, Reply, Request, Train, Trained
from fedpact.policy.gradients import FlatJacobian
from fedpact.runtime.admission import Limits, admit
from fedpact.runtime.exchange import mean_reply
from fedpact.seeding import key, uniforms
from fedpact.types import Adapter, ClientId, Direction, Memory, Prompts, Rollout

NAME = "base_model.model.x.lora_A.weight"


@dataclass
class StagePolicy:
    """Hands out the given gradients, one [m, d] a step, and keeps the directions that it was told to take."""

    rows: Sequence[Tensor]
    steps: list[Tensor] = field(default_factory=list)
    advantages: list[Tensor] = field(default_factory=list)
    learning_rate: float = 1.0
    group_size: int = 2
    loaded: list[tuple[Adapter, Memory | None]] = field(default_factory=list)

    def load(self, adapter: Adapter, *, optimizer: Memory | None = None) -> None:
        self.loaded.append((adapter, optimizer))
        self.theta = adapter[NAME].clone()

    def adapter(self) -> Adapter:
        return {NAME: self.theta.clone()}

    def optimizer(self) -> Memory:
        return {"optimizer/step": torch.tensor(float(len(self.steps)))}

    def generate(
        self, prompts: Prompts, *, draw: int, num_generations: int | None = None, greedy: bool = False
    ) -> Rollout:
        n = self.group_size * len(prompts)
        return Rollout(
            prompts=prompts.repeat(self.group_size),
            completions=[f"completion {i} of draw {draw}" for i in range(n)],
            prompt_ids=torch.zeros(n, 1, dtype=torch.long),
            prompt_mask=torch.ones(n, 1, dtype=torch.bool),
            completion_ids=torch.zeros(n, 3, dtype=torch.long),
            mask=torch.ones(n, 3, dtype=torch.bool),
            logprobs=torch.zeros(n, 3),
            truncated=torch.zeros(n, dtype=torch.bool),
            group_size=self.group_size,
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


# --- algorithms that train at the server ----------------------------------------------------------------------------

Rate = Callable[[Sequence[Any], Sequence[str]], Sequence[Sequence[float]]]
"""(questions, completions), one a completion -> ratings, one row an objective."""


@dataclass
class StageJudge:
    """A member that rates as it is told."""

    rate: Rate
    accuracy: Sequence[float] = (torch.nan, torch.nan)
    task: str = ""
    primary: int | None = 0
    objectives: Sequence[str] = ("correct", "brief")

    def judge(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        return torch.tensor(self.rate(prompts.text, completions), dtype=torch.float32)

    def fit_rewards(self) -> Tensor:
        return torch.tensor(self.accuracy)


@dataclass
class StageTrainer:
    """A server that trains a staged policy, and whose members answer through the algorithm's real client half.

    `away` are silent. Embeddings are rows of the identity by the question's first letter: questions with one first
    letter are the same, all others have nothing in common.
    """

    algorithm: Algorithm
    judges: Mapping[ClientId, StageJudge]
    questions: Prompts
    known: Prompts | None = None
    own: Rate = lambda questions, completions: torch.full((2, len(completions)), torch.nan).tolist()
    truth: Rate = lambda questions, completions: torch.full((2, len(completions)), torch.nan).tolist()
    group_size: int = 2
    away: set[ClientId] = field(default_factory=set)
    weights: Sequence[float] = (0.5, 0.5)
    objectives: Sequence[str] = ("correct", "brief")
    primary: int | None = 0
    round: int = 1
    scale_rewards: Any = "group"
    num_iterations: int = 1
    memory: Memory = field(default_factory=dict)
    asked: list[dict[ClientId, Request[Any]]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.policy = StagePolicy([torch.ones(1, 1)] * 1000, group_size=self.group_size)
        self.clients = {name: introduced(name, judge.task) for name, judge in sorted(self.judges.items())}

    @property
    def default_weights(self) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float64)

    @property
    def present(self) -> Tensor:
        return torch.ones(len(self.objectives), dtype=torch.bool)

    def play(self, rounds: int = 1) -> Adapter:
        """So many rounds more: the adapter after them."""
        moved = adapter(0.0) if not self.policy.loaded else self.policy.adapter()
        for _ in range(rounds):
            moved = self.algorithm.server(moved, self)
            self.round += 1
        return moved

    def prompts(self, step: int) -> Prompts:
        return self.questions

    def auxiliary(self) -> Prompts:
        assert self.known is not None
        return self.known

    def rewards(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        return torch.tensor(self.own(prompts.text, completions), dtype=torch.float32)

    def audit(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        return torch.tensor(self.truth(prompts.text, completions), dtype=torch.float32)

    def embed(self, prompts: Prompts) -> Tensor:
        return torch.eye(26)[[ord(text[0]) - ord("a") for text in prompts.text]]

    def uniforms(self, purpose: str, rows: int, columns: int) -> Tensor:
        return uniforms(key("stage", self.round, purpose), rows, columns)

    def ask(self, requests: Any, *, min_replies: int | None = None) -> dict[ClientId, Reply]:
        if requests:
            self.asked.append(dict(requests))
        replies = {}
        for name in sorted(set(requests) - self.away):
            replies[name] = self.algorithm.answer(requests[name], self.judges[name])
            admit(replies[name], Limits({}, len(self.objectives)), requests[name])
        if requests and len(replies) < (1 if min_replies is None else min_replies):
            raise TooFewRepliesError(f"{len(replies)} replies")
        return replies

    def log(self, **metrics: float) -> None:
        self.figures.update(metrics)


def questions(*texts: str, **columns: Sequence[Any]) -> Prompts:
    return Prompts(text=texts, ids=torch.arange(len(texts)), columns=columns)
