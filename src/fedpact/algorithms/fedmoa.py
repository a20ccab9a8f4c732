"""FedMOA: objective weights that adapt online, and averaging by task and accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from fedpact.algorithms.base import Algorithm
from fedpact.algorithms.batch import Batch
from fedpact.algorithms.steps import Tally, local_batches
from fedpact.core.aggregate import accuracy_weight, mix
from fedpact.core.hypergradient import cosine_hypergradient, exponentiated_log_weights, floored_softmax, shortfall
from fedpact.messages import Introduced, Train, Trained
from fedpact.protocols import Client, Jacobian, Server
from fedpact.types import Adapter, ClientId, Memory


class FedMOA(Algorithm):
    """Members adapt their objective weights by hypergradient descent; the server averages by task and accuracy.

    Attested for arXiv:2602.00453 (abstract): weights are adapted online during local GRPO by hypergradient descent, the
    primary objective gains once the others saturate, and the server's averaging is aware of task and accuracy. Every
    formula here is our reading: a reconstruction in the paper's spirit, not a reproduction.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"primary", "factors"})

    name: Literal["fedmoa"] = "fedmoa"
    local_steps: PositiveInt = 4
    """Optimiser batches between two averages; the weights move from the second on."""
    hypergradient: Literal["total", "primary", "gap"] = "primary"
    """Whose improvement the weights follow: "total" the weighted loss (H1, hypergradient descent to the letter),
    "primary" the primary objective alone (H2), "gap" how far each mean reward is below 1, without gradients (H3)."""
    weight_learning_rate: NonNegativeFloat = 0.5
    """Step of the log-weights along the normalised hypergradient."""
    weight_floor: float = Field(default=0.05, ge=0, lt=0.5)
    """No objective that a member has falls below this weight."""
    by_accuracy: bool = True
    """Count a member's adapter by exp(accuracy / accuracy_temperature) among the members of its task."""
    accuracy_temperature: PositiveFloat = 0.1
    """Small values leave the average to the most accurate."""
    task_share: float = Field(default=0.5, ge=0, le=1)
    """How much of its own task's adapter a member starts from, the rest being the global one. 0: global only."""

    def check(self, objectives: Sequence[str]) -> None:
        if self.weight_floor * len(objectives) >= 1:
            raise ValueError(
                f"algorithm.weight_floor: found {self.weight_floor} for {len(objectives)} objectives; "
                f"expected below 1/{len(objectives)}"
            )

    # --- server -----------------------------------------------------------------------------------------------------

    def server(self, adapter: Adapter, server: Server) -> Adapter:
        tasks = members_by_task(server.clients)
        requests: dict[ClientId, Train] = {}
        for task, members in tasks.items():
            own = task_adapter(server.memory, task) or adapter
            start = Train(mix(own, adapter, self.task_share))
            requests.update(dict.fromkeys(members, start))
        means = server.means(requests, tasks)
        shares = {task: max(1, sum(server.clients[member].num_prompts for member in tasks[task])) for task in means}
        result: Adapter = {name: torch.zeros_like(tensor) for name, tensor in adapter.items()}
        for task, mean in means.items():
            for name, tensor in mean.adapter.items():
                server.memory[f"task/{task}/{name}"] = tensor
                result[name] = result[name] + tensor * (shares[task] / sum(shares.values()))
        return result

    def exports(self, adapter: Adapter, memory: Memory) -> Mapping[str, Adapter]:
        tasks = sorted({name.split("/", 2)[1] for name in memory if name.startswith("task/")})
        named = {f"task-{task}": task_adapter(memory, task) for task in tasks if task}
        return {"final": adapter, **{name: found for name, found in named.items() if found}}

    # --- client -----------------------------------------------------------------------------------------------------

    def train(self, request: Train, client: Client) -> Trained:
        log_weights = client.memory.get("log_weights", torch.zeros(len(client.objectives), dtype=torch.float64))
        weights = floored_softmax(log_weights, client.present, self.weight_floor)
        previous: Jacobian | None = None  # the last step's gradients, as the optimiser scaled them
        tally = Tally(client)
        for batch in local_batches(client, request.adapter, self.local_steps):
            jacobian = client.policy.gradients(batch.rollout, batch.advantages, loss=batch.loss)
            if previous is not None:
                direction = self.improvement(jacobian, previous, weights, batch, client)
                log_weights = exponentiated_log_weights(
                    log_weights, direction, rate=self.weight_learning_rate, present=client.present
                )
                weights = floored_softmax(log_weights, client.present, self.weight_floor)
            client.policy.step(jacobian.combine(weights))
            previous = jacobian.scaled(client.policy.preconditioner())
            tally.add(batch, weights)
        client.memory["log_weights"] = log_weights
        return tally.trained(client.policy.adapter(), weight=self.weight(tally, client))

    def improvement(
        self, jacobian: Jacobian, previous: Jacobian, weights: Tensor, batch: Batch, client: Client
    ) -> Tensor:
        """By how much more weight on each objective would have helped: [m], in [-1, 1].

        After theta' = theta - eta P sum_k w_k g_k the outer loss F has dF(theta')/dw_k = -eta <grad F(theta'), P g_k>;
        we keep the cosine, which is free of the scales of eta, P and the gradients.
        """
        if self.hypergradient == "gap":
            return shortfall(batch.rewards.nanmean(dim=1))
        if self.hypergradient == "total" or client.primary is None:
            outer = jacobian.combine(weights)
        else:
            outer = jacobian[client.primary]
        return cosine_hypergradient(previous.dots(outer), outer.norm().cpu(), previous.gramian.diagonal().sqrt())

    def weight(self, tally: Tally, client: Client) -> float:
        """What this member's adapter counts in the average of its task."""
        count = float(sum(rewards.shape[1] for rewards in tally.rewards))
        temperature = self.accuracy_temperature if self.by_accuracy else float("inf")
        return accuracy_weight(count, tally.accuracy(), temperature, by_count=True)


def members_by_task(clients: Mapping[ClientId, Introduced]) -> dict[str, list[ClientId]]:
    """Task to its members, both sorted; accuracies are comparable within a task only."""
    tasks: dict[str, list[ClientId]] = {}
    for name in sorted(clients):
        tasks.setdefault(clients[name].task, []).append(name)
    return dict(sorted(tasks.items()))


def task_adapter(memory: Memory, task: str) -> Adapter | None:
    """What the server remembers of a task; None before its first round."""
    prefix = f"task/{task}/"
    found = {name.removeprefix(prefix): tensor for name, tensor in memory.items() if name.startswith(prefix)}
    return found or None
