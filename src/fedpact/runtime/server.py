"""What an algorithm's server half sees: `protocols.Server`, for the length of one round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from fedpact.messages import Averaged, Introduced, Reply, Request, Trained
from fedpact.runtime.exchange import Round, mean_reply
from fedpact.types import ClientId, Memory

R = TypeVar("R", bound=Reply)
A = TypeVar("A", bound=Averaged)


class ServerSide:
    """See `protocols.Server`. `clients` is this round's cohort; `memory` is written back when the round commits."""

    def __init__(
        self, one: Round, *, clients: Mapping[ClientId, Introduced], objectives: Sequence[str], memory: Memory
    ) -> None:
        self._round = one
        self.round = one.number
        self.clients: Mapping[ClientId, Introduced] = dict(sorted(clients.items()))
        self.objectives = objectives
        self.memory = memory

    def ask(self, requests: Request[R] | Mapping[ClientId, Request[R]]) -> Mapping[ClientId, R]:
        if isinstance(requests, Request):
            requests = dict.fromkeys(self.clients, requests)
        strangers = set(requests) - set(self.clients)
        if strangers:
            raise ValueError(f"ask: {sorted(strangers)} are not in this round's cohort {sorted(self.clients)}")
        replies = self._round.ask(requests)
        self._log(replies)
        return replies

    def mean(self, requests: Request[A] | Mapping[ClientId, Request[A]]) -> A:
        replies = self.ask(requests)
        return mean_reply(replies[client] for client in replies)

    def means(
        self, requests: Request[A] | Mapping[ClientId, Request[A]], groups: Mapping[str, Sequence[ClientId]]
    ) -> Mapping[str, A]:
        replies = self.ask(requests)
        present = {group: [client for client in clients if client in replies] for group, clients in groups.items()}
        return {
            group: mean_reply(replies[client] for client in clients) for group, clients in present.items() if clients
        }

    def log(self, **metrics: float) -> None:
        self._round.log("server", metrics)

    def _log(self, replies: Mapping[ClientId, Reply]) -> None:
        for client, reply in replies.items():
            if isinstance(reply, Trained):
                rewards = dict(zip(self.objectives, reply.rewards.tolist(), strict=True))
                self._round.log(client, {f"train/reward/{name}": value for name, value in rewards.items()})
                if reply.accuracy is not None:
                    self._round.log(client, {"train/accuracy": reply.accuracy})
                self._round.log(client, {f"train/{name}": value for name, value in sorted(reply.metrics.items())})
