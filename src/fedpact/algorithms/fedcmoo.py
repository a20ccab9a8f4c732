"""FedCMOO: the server finds one set of objective weights for all members, from compressed gradients."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from fedpact.algorithms.base import Algorithm
from fedpact.algorithms.conflict import Conflict, from_factors
from fedpact.algorithms.steps import train_with
from fedpact.algorithms.weights import normalised, preferred
from fedpact.core.compress import upload_rank
from fedpact.core.fedcmoo import descended_weights, preferred_weights
from fedpact.errors import RewardError
from fedpact.messages import Differentiate, Differentiated, Train, Trained
from fedpact.protocols import Client, Server
from fedpact.types import Adapter


class FedCMOO(Algorithm):
    """In every round members send compressed gradients at the global adapter; the server answers with one weighting.

    Askin et al. 2025 (arXiv:2410.16398), after its official code: randomised SVD of the reshaped Jacobian, projected
    gradient descent on the weights from where they stood, and for a preference the exact Pareto linear program.
    Departures: the losses are GRPO's or PPO's (our adaptation to language models); an objective counts over those
    members that have it; the terms between a member's residual and the others' gradients are left out; and the first
    local step samples a batch of its own instead of keeping the Jacobian for it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "factors"})

    name: Literal["fedcmoo"] = "fedcmoo"
    local_steps: PositiveInt = 4
    """Optimiser batches between two averages."""
    compression: Literal["svd", "projection"] = "svd"
    """"svd" is the paper's; "projection", a linear sketch that can be summed without being seen, is ours."""
    upload: float = Field(default=1.0, gt=0, le=1000)
    """Numbers that a member sends for its Jacobian under "svd", in adapters."""
    rank: int = Field(default=1024, ge=1, le=65536)
    """Numbers for each objective under "projection"."""
    preference: dict[str, NonNegativeFloat] | None = None
    """Steer the losses, 1 minus mean rewards, to be inversely proportional to this; others count 1. For rewards in
    [0, 1]. None: common descent."""
    weight_steps: PositiveInt = 1000
    """Descent steps on the weights in a round."""
    weight_step_size: PositiveFloat = 1e-3
    """Times weight_steps about one: the weights need not reach their optimum in a round."""

    def check(self, objectives: Sequence[str]) -> None:
        unknown = sorted(set(self.preference or {}) - set(objectives))
        if unknown:
            raise ValueError(f"algorithm.preference: {unknown} are no objectives; there are {list(objectives)}")
        if self.preference is not None and all(self.preference.get(name, 1.0) == 0 for name in objectives):
            raise ValueError(f"algorithm.preference: found {self.preference}; expected one above 0")
        if self.preference is not None and len(objectives) > 8:
            raise ValueError(f"algorithm.preference: found with {len(objectives)} objectives; expected at most 8")

    def concerns(self) -> Collection[str]:
        return preferred(self.preference)

    def server(self, adapter: Adapter, server: Server) -> Adapter:
        found = self.conflict(adapter, server)
        weights = self.weights(found, server)
        server.memory["weights"] = remembered(weights, self.before(server), found.present)
        server.log(**{f"weight/{name}": float(w) for name, w in zip(server.objectives, weights, strict=True)})
        return server.mean(Train(adapter, weights=weights)).adapter

    def train(self, request: Train, client: Client) -> Trained:
        return train_with(client, request.adapter, self.local_steps, request.weights)

    def differentiate(self, request: Differentiate, client: Client) -> Differentiated:
        found = super().differentiate(request, client)
        told = found.rewards[~found.rewards.isnan()]
        if self.preference is not None and bool(((told < 0) | (told > 1 + 1e-6)).any()):
            raise RewardError(f"algorithm.preference: mean rewards are {told.tolist()}; expected them in [0, 1]")
        return found

    def conflict(self, adapter: Adapter, server: Server) -> Conflict:
        """The Gram matrix of the members' mean gradients, as well as it can be known."""
        if self.compression == "projection":
            mean = server.mean(Differentiate(adapter, self.rank, seed=server.round))
            present = ~mean.sketch.isnan().any(-1)
            sketch = mean.sketch.double().nan_to_num()
            return Conflict(sketch @ sketch.mT, present, mean.rewards)
        d, m = sum(tensor.numel() for tensor in adapter.values()), len(server.objectives)
        rank = upload_rank(d, m, self.upload)
        replies = server.ask(Differentiate(adapter, rank, seed=server.round, compression="svd"))
        return from_factors(replies, num_objectives=m, num_parameters=d)

    def weights(self, found: Conflict, server: Server) -> Tensor:
        """The next weights, zero for objectives that nobody has: [m] float64."""
        before = self.before(server)
        kept = found.present.nonzero()[:, 0]
        weights = torch.zeros_like(before)
        if not len(kept):
            return before
        gramian = found.gramian[kept][:, kept]
        if self.preference is None:
            start = normalised(before[kept])
            weights[kept] = descended_weights(gramian, start, steps=self.weight_steps, step_size=self.weight_step_size)
        else:
            wanted = [self.preference.get(name, 1.0) for name in server.objectives]
            if bool(found.rewards[kept].isnan().any()):
                server.log(rewards_withheld=1.0)  # nobody's `site.share` has them: the weights stay
                return before
            losses = (1 - found.rewards.double().nan_to_num().clamp(0, 1)).clamp(min=1e-3)
            preference = normalised(torch.tensor(wanted, dtype=torch.float64)[kept])
            weights[kept] = preferred_weights(gramian, losses[kept], preference)
        return weights

    def before(self, server: Server) -> Tensor:
        """Last round's weights, at first equal ones: [m] float64, summing to 1."""
        size = len(server.objectives)
        return server.memory.get("weights", torch.full((size,), 1 / size, dtype=torch.float64))


def remembered(weights: Tensor, before: Tensor, present: Tensor) -> Tensor:
    """What the next round goes on from: all [m]. An objective that nobody had in this one keeps its share."""
    return torch.where(present, weights * before[present].sum(), before) if bool(present.any()) else before
