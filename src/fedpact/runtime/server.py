"""What an algorithm's server half sees: `protocols.Server`, for the length of one round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from torch import Tensor

from fedpact.errors import ConfigError
from fedpact.messages import Averaged, Introduced, Reply, Request, Trained
from fedpact.runtime.adapters import error_of_mean, mean_of_products
from fedpact.runtime.bounds import capped, robust_mean
from fedpact.runtime.config import FederationSettings, parse_algorithm
from fedpact.runtime.contract import Contract
from fedpact.runtime.exchange import Round, mean_reply
from fedpact.runtime.learner import Learner
from fedpact.runtime.trainer import Trainer
from fedpact.seeding import key, uniforms
from fedpact.types import NO_PROMPTS, ClientId, Memory, Prompts

R = TypeVar("R", bound=Reply)
A = TypeVar("A", bound=Averaged)


class ServerSide(Learner):
    """See `protocols.Server`. `clients` is this round's cohort; `memory` is written back when the round commits."""

    def __init__(
        self,
        one: Round,
        *,
        contract: Contract,
        clients: Mapping[ClientId, Introduced],
        memory: Memory,
        trainer: Trainer | None,
        num_members: int,
        federation: FederationSettings,
    ) -> None:
        self.num_members = num_members
        self._round, self._trainer_or_none, self._federation = one, trainer, federation
        self._per_objective = parse_algorithm(contract.algorithm).per_objective
        self.averaging_error: float | None = None
        """The largest of this round's means: |mean(BA) - BA of the mean| / |mean(BA)|; None if none was formed."""
        self.round = one.number
        self.clients: Mapping[ClientId, Introduced] = dict(sorted(clients.items()))
        super().__init__(
            contract=contract,
            rewards=trainer.rewards if trainer else {},
            audits=trainer.audits if trainer else frozenset(),
            train_prompts=trainer.prompts if trainer else NO_PROMPTS,
            policy=lambda: self._trainer.policy(one.number, 0, "server"),
            memory=memory,
            walk=("server",),  # not the round: the steps of a run are one walk
        )

    def auxiliary(self) -> Prompts:
        return self._trainer.auxiliary()

    def embed(self, prompts: Prompts) -> Tensor:
        return self._trainer.embed(prompts, lambda: self.policy)

    def uniforms(self, purpose: str, rows: int, columns: int) -> Tensor:
        return uniforms(key(self.contract.seed, self.round, "server", purpose), rows, columns)

    def ask(
        self, requests: Request[R] | Mapping[ClientId, Request[R]], *, min_replies: int | None = None
    ) -> Mapping[ClientId, R]:
        if isinstance(requests, Request):
            requests = dict.fromkeys(self.clients, requests)
        strangers = set(requests) - set(self.clients)
        if strangers:
            raise ValueError(f"ask: {sorted(strangers)} are not in this round's cohort {sorted(self.clients)}")
        if not requests:
            return {}
        replies = self._round.ask(requests, min_replies=min_replies)
        self._log(requests, replies)
        return replies

    def mean(self, requests: Request[A] | Mapping[ClientId, Request[A]]) -> A:
        return self._mean(self.ask(requests))

    def means(
        self, requests: Request[A] | Mapping[ClientId, Request[A]], groups: Mapping[str, Sequence[ClientId]]
    ) -> Mapping[str, A]:
        replies = self.ask(requests)
        present = {group: [client for client in clients if client in replies] for group, clients in groups.items()}
        return {
            group: self._mean({client: replies[client] for client in clients})
            for group, clients in present.items()
            if clients
        }

    def log(self, **metrics: float) -> None:
        self._round.log("server", metrics)

    def _mean(self, replies: Mapping[ClientId, A]) -> A:
        """The weighted mean; of adapters by the run's rule, and noting what averaging their factors gets wrong."""
        weights = capped({name: reply.weight for name, reply in replies.items()}, self._federation.max_share)
        mean = mean_reply(replace(replies[name], weight=weight) for name, weight in weights.items())
        return cast("A", self._of_adapters(cast("Any", replies), mean)) if isinstance(mean, Trained) else mean

    def _of_adapters(self, replies: Mapping[ClientId, Trained], mean: Trained) -> Trained:
        if self._federation.aggregation != "mean":
            adapter = robust_mean(replies, self._federation.aggregation, self._federation.trim)
            mean = replace(mean, adapter=adapter)
        if self._federation.averaging == "products":
            mean = replace(mean, adapter=mean_of_products(replies, mean.adapter, self.contract.lora.r))
        self.averaging_error = max(error_of_mean(replies, mean.adapter), self.averaging_error or 0.0)
        return mean

    @property
    def _trainer(self) -> Trainer:
        if self._trainer_or_none is None:
            raise ConfigError("server: missing in the run file; this algorithm trains at the server")
        return self._trainer_or_none

    def _log(self, requests: Mapping[ClientId, Request[Any]], replies: Mapping[ClientId, Reply]) -> None:
        for client, reply in replies.items():
            if isinstance(reply, Trained):
                rewards = dict(zip(self.objectives, reply.rewards.tolist(), strict=True))
                weights = getattr(requests[client], "weights", None)
                if self._per_objective and weights is not None:  # one of several exchanges, one for each
                    alone = self.objectives[int(weights.argmax())]
                    self._round.log(client, {f"train/reward/{alone}": rewards[alone]})
                    if "epsilon" in reply.metrics:
                        self._round.log(client, {f"train/epsilon/{alone}": reply.metrics["epsilon"]})
                    continue
                self._round.log(client, {f"train/reward/{name}": value for name, value in rewards.items()})
                if reply.accuracy is not None:
                    self._round.log(client, {"train/accuracy": reply.accuracy})
                self._round.log(client, {f"train/{name}": value for name, value in sorted(reply.metrics.items())})
