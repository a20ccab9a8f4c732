"""Hello: each member is offered the contract once it can be asked, and again as long as it has not accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fedpact.errors import InadmissibleError
from fedpact.messages import Hello, Introduced
from fedpact.runtime.adapters import refuse_rank
from fedpact.runtime.admission import Limits, admit, max_bytes
from fedpact.runtime.codec import encode
from fedpact.runtime.config import RunConfig
from fedpact.runtime.contract import contract_hash
from fedpact.runtime.envelope import Envelope, opened, seal
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.transport import Failure, Transport
from fedpact.screen import printable
from fedpact.types import ClientId


class Greeting:
    """Says hello over `transport`. `dropped` is told why a member did not come in, once for each reason."""

    def __init__(
        self,
        run: str,
        canonical: str,
        config: RunConfig,
        transport: Transport,
        ledger: Ledger,
        dropped: Callable[[ClientId, str], None],
    ) -> None:
        self.hello, self.hash, self.run = Hello(canonical), contract_hash(canonical), run
        self.config, self.transport, self.ledger, self.dropped = config, transport, ledger, dropped
        self.limits = Limits(len(config.objectives), frozenset(config.objectives))
        self._strangers: dict[ClientId, str] = {}
        """Who has not come in, and why."""

    def met(self, clients: Iterable[ClientId], *, within_s: float | None = None) -> dict[ClientId, Introduced]:
        """Who of these accepts the contract, sorted by name; `within_s`: how long to wait, if less than `timeout_s`."""
        limits = [limit for limit in (self.config.federation.timeout_s, within_s) if limit is not None]
        where = {"run": self.run, "contract": self.hash, "round": 0, "exchange": 0, "head": self.ledger.head}
        envelopes = {client: seal(self.hello, **where) for client in clients}
        sent = {client: encode(envelope) for client, envelope in envelopes.items()}
        for client, envelope in envelopes.items():
            self._note(envelope, client, "asked", bytes_out=len(sent[client]))
        introduced: dict[ClientId, Introduced] = {}
        for client, answer in self.transport.exchange(sent, timeout_s=min(limits, default=None)):
            if client not in envelopes or client in introduced:
                continue  # nobody asked, or it has answered
            if isinstance(answer, Failure):
                self._note(envelopes[client], client, "failed")
                self._turned_away(client, answer.reason)
                continue
            try:
                reply, head = self._admitted(envelopes[client], client, answer)
            except InadmissibleError as error:
                self._note(envelopes[client], client, "refused", bytes_in=len(answer))
                self._turned_away(client, str(error))
                continue
            self._note(envelopes[client], client, "admitted", bytes_in=len(answer), peer_head=head)
            introduced[client] = reply
            self._strangers.pop(client, None)
        return dict(sorted(introduced.items()))

    def excuse(self) -> str:
        """What the first of those said who did not come in; empty if all did."""
        return "".join(f"; {name}: {reason}" for name, reason in list(self._strangers.items())[:1])

    def _admitted(self, envelope: Envelope, client: ClientId, answer: bytes) -> tuple[Introduced, str]:
        reply, head = opened(envelope, answer, max_bytes=max_bytes(self.hello, self.limits))
        admit(reply, self.limits, self.hello)
        assert isinstance(reply, Introduced)
        refuse_rank(reply.rank, self.config)
        if reply.name != client:
            raise InadmissibleError(
                f"reply: name is {printable(reply.name)!r:.80}, expected {client!r}, under which it is registered; "
                "its client file must say the same"
            )
        return reply, head

    def _turned_away(self, client: ClientId, reason: str) -> None:
        if self._strangers.get(client) != reason:
            self.dropped(client, reason)
        self._strangers[client] = reason

    def _note(self, envelope: Envelope, client: ClientId, decision: str, **what: int | str) -> None:
        where = {"verb": envelope.verb, "contract": self.hash, "request": envelope.digest(), "decision": decision}
        self.ledger.append(run=self.run, round=0, peer=client, **where, **what)
