"""Exchanges: the server asks, replies are admitted one by one and spooled, and the roster closes the exchange."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from fedpact.core.aggregate import AdapterMean, WeightedMean
from fedpact.errors import InadmissibleError, TooFewRepliesError
from fedpact.faults import fault_point
from fedpact.messages import Averaged, Reply, Request
from fedpact.runtime.adapters import Factor, as_taken, at_rank, completed, for_rank
from fedpact.runtime.admission import Limits, admit, max_bytes
from fedpact.runtime.bounds import Bound, Norms, Rules, bounds_of
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.envelope import Envelope, StrayError, Version, opened, seal
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.spool import Spool
from fedpact.runtime.transport import Failure, Transport
from fedpact.types import ClientId

R = TypeVar("R", bound=Reply)
A = TypeVar("A", bound=Averaged)


class Replies(Mapping[ClientId, R], Generic[R]):
    """The admitted replies of one exchange, sorted by member, read from the spool when looked at."""

    def __init__(self, spool: Spool, kind: type[R], roster: Iterable[ClientId]) -> None:
        self._spool, self._kind, self._roster = spool, kind, sorted(roster)
        self.bounds: Mapping[ClientId, Bound] = {}
        """How much of each one counts."""

    def __getitem__(self, client: ClientId) -> R:
        if client not in self._roster:
            raise KeyError(client)
        reply = decode(self._kind, self._spool.get(client))
        return cast("R", self.bounds[client].apply(reply)) if client in self.bounds else reply

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self._roster)

    def __len__(self) -> int:
        return len(self._roster)


@dataclass
class Round:
    """Everything that the exchanges of one round share."""

    run: str
    contract: str
    number: int
    transport: Transport
    ledger: Ledger
    limits: Limits
    spool: Callable[[int], Spool]
    """The spool of the round's n-th exchange."""
    since: dict[ClientId, Version]
    """The last committed version of every member's memory; grows as replies are admitted."""
    min_replies: int
    timeout_s: float | None
    dropped: Callable[[ClientId, str], None]
    r: int = 1
    """The run's rank."""
    smaller_ranks: Mapping[ClientId, int] = field(default_factory=dict)
    """Of members that train less than the run's."""
    factor: Factor = "all"
    """What members train of the adapter in this round."""
    rules: Rules = field(default_factory=Rules)
    norms: Norms = field(default_factory=dict)
    """Of accepted changes of the adapter, of committed rounds; grows."""
    refused: set[ClientId] = field(default_factory=set)
    """Who said no."""
    exchanges: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    record: list[dict[str, Any]] = field(default_factory=list)
    """Of each exchange: whose replies counted, and why the others' did not."""

    def ask(self, requests: Mapping[ClientId, Request[R]], *, min_replies: int | None = None) -> Replies[R]:
        """One exchange. Raises TooFewRepliesError below `min_replies`, by default the run's.

        After a crash the same call finds the spool: a closed exchange is not repeated, and in an open one only those
        are asked whose replies are missing.
        """
        number = self.exchanges
        self.exchanges += 1
        spool = self.spool(number)
        roster = spool.roster()
        if roster is None:
            needed = min(self.min_replies, len(requests)) if min_replies is None else min_replies
            roster = self._collect(number, spool, requests, needed)
        for client in roster:
            self.since[client] = (self.number, number)
        first = next(iter(requests.values()))
        self.record.append({"verb": first.verb, "roster": roster, "failures": spool.failures()})
        replies: Replies[R] = Replies(spool, cast("type[R]", first.reply), roster)
        again = sum(one["verb"] == first.verb for one in self.record)
        replies.bounds = bounds_of(
            replies,
            {client: as_taken(requests[client], self.smaller_ranks.get(client), self.r) for client in roster},
            self.rules,
            self.norms,
            exchange=number,
            log=lambda who, figures: self.log(who, figures if again == 1 else _numbered(figures, again)),
        )
        return replies

    def log(self, who: str, metrics: Mapping[str, float]) -> None:
        """Add figures to this round's metrics; one that is not finite is left out."""
        for key, value in metrics.items():
            if value == value and abs(value) != float("inf"):
                self.metrics.append({"round": self.number, "who": who, "key": key, "value": value})

    def _collect(
        self, number: int, spool: Spool, requests: Mapping[ClientId, Request[R]], needed: int
    ) -> list[ClientId]:
        received = set(spool.received())
        missing = [client for client in sorted(requests) if client not in received]
        attempt = 1 if spool.folder.exists() else 0
        asked = {client: requests[client] for client in missing}
        asked |= {c: for_rank(requests[c], r) for c, r in self.smaller_ranks.items() if c in asked}
        envelopes = {client: self._envelope(client, number, attempt, asked[client]) for client in missing}
        sent = {client: encode(envelope) for client, envelope in envelopes.items()}
        for client, envelope in envelopes.items():
            self._note(envelope, client, decision="asked", bytes_out=len(sent[client]))
        fault_point("exchange.asked")
        failures: dict[ClientId, Failure] = {}
        voted: set[ClientId] = set()  # has answered just this, well or badly
        for client, answer in self.transport.exchange(sent, timeout_s=self.timeout_s):
            if client not in envelopes or client in voted:
                reason = "duplicate" if client in envelopes else "nobody asked"
                if about := envelopes.get(client) or next(iter(envelopes.values()), None):
                    self._note(about, client, decision="refused", reason=reason)
                continue
            envelope = envelopes[client]
            if isinstance(answer, Failure):
                failures[client] = answer
                self._note(envelope, client, decision="failed")
                continue
            try:
                reply, head = self._admitted(envelope, answer, asked[client])
            except InadmissibleError as error:
                if not isinstance(error, StrayError):
                    voted.add(client)
                failures[client] = Failure(str(error))
                what = str(error).partition(":")[0]
                self._note(envelope, client, decision="refused", bytes_in=len(answer), reason=what)
                continue
            data = encode(at_rank(reply, self.r) if client in self.smaller_ranks else reply)
            spool.put(client, data)
            voted.add(client)
            failures.pop(client, None)  # what came before answered something else
            digest = hashlib.sha256(data).hexdigest()
            self._note(envelope, client, decision="admitted", bytes_in=len(answer), reply=digest, peer_head=head)
            fault_point("exchange.admitted")
        for client, failure in failures.items():
            self.dropped(client, failure.reason)
            if failure.refused:
                self.refused.add(client)
        roster = [client for client in spool.received() if client in requests]
        if len(roster) < needed:
            first = f"; {next(iter(failures))}: {next(iter(failures.values())).reason}" if failures else ""
            raise TooFewRepliesError(
                f"round {self.number}, exchange {number}: {len(roster)} of {len(requests)} members replied, "
                f"expected at least {needed} (federation.min_replies){first}"
            )
        spool.close(roster, {client: failure.reason for client, failure in failures.items()})
        fault_point("exchange.closed")
        return sorted(roster)

    def _admitted(self, envelope: Envelope, answer: bytes, request: Request[Any]) -> tuple[Reply, str]:
        """The reply in `answer`, whole, and the head of its member's ledger. Raises InadmissibleError."""
        reply, head = opened(envelope, answer, max_bytes=max_bytes(request, self.limits))
        try:
            reply = completed(reply, request, self.factor)
            admit(reply, self.limits, request)
        except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise InadmissibleError(f"reply: cannot be checked ({type(error).__name__})") from error
        return reply, head

    def _envelope(self, client: ClientId, number: int, attempt: int, request: Request[Any]) -> Envelope:
        return seal(
            request,
            run=self.run,
            contract=self.contract,
            round=self.number,
            exchange=number,
            attempt=attempt,
            since=self.since.get(client),
            head=self.ledger.head,
        )

    def _note(self, envelope: Envelope, client: ClientId, **what: Any) -> None:
        self.ledger.append(
            run=self.run,
            round=self.number,
            exchange=envelope.exchange,
            attempt=envelope.attempt,
            peer=client,
            verb=envelope.verb,
            contract=self.contract,
            request=envelope.digest(),
            **what,
        )


def _numbered(figures: Mapping[str, float], again: int) -> dict[str, float]:
    """The figures of the second, third... exchange of a kind in one round, under names of their own."""
    return {key.replace("/", f"/{again}/", 1): value for key, value in figures.items()}


def mean_reply(replies: Iterable[A]) -> A:
    """The weighted mean of replies, field by field, in one pass: adapters, tensors, numbers and named figures.

    NaN and None count as not measured. Tensors of whole numbers are counts and are added. `weight` is the sum.
    """
    sums: dict[str, Any] = {}
    kind: type[A] | None = None
    weight = 0.0
    for reply in replies:
        kind = type(reply)
        weight += reply.weight
        for one in fields(reply):
            if one.name != "weight":
                _add(sums, one.name, getattr(reply, one.name), reply.weight)
    if kind is None:
        raise ValueError("no replies to average")
    return kind(weight=weight, **{name: _result(value) for name, value in sums.items()})


def _add(sums: dict[str, Any], name: str, value: Any, weight: float) -> None:
    if isinstance(value, Tensor) and not value.is_floating_point():
        sums[name] = sums[name] + value if name in sums else value
    elif isinstance(value, Tensor):
        sums.setdefault(name, WeightedMean()).add(value, weight)
    elif isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values()):
        sums.setdefault(name, AdapterMean()).add(dict(value), weight)
    elif isinstance(value, Mapping):
        figures = sums.setdefault(name, {})
        for key, entry in value.items():
            _add(figures, key, entry, weight)
    else:
        number = torch.tensor(torch.nan if value is None else float(value), dtype=torch.float64)
        sums.setdefault(name, _Number()).add(number, weight)


class _Number(WeightedMean):
    """A mean of plain numbers."""


def _result(value: Any) -> Any:
    if isinstance(value, _Number):
        number = float(value.result())
        return None if number != number else number
    if isinstance(value, (WeightedMean, AdapterMean)):
        return value.result()
    if isinstance(value, dict):
        return {key: _result(entry) for key, entry in value.items()}
    return value
