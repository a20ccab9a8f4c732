"""How a request and its reply are wrapped on their way, and how a reply is matched to what it answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from fedpact.errors import InadmissibleError
from fedpact.messages import REQUESTS, Reply, Request
from fedpact.runtime.codec import decode, encode

Version = tuple[int, int]
"""(round, exchange): after which exchange a member's memory stood like this."""


@dataclass(frozen=True, slots=True, eq=False)
class Envelope:
    """A request on its way to one member."""

    run: str
    contract: str
    """Hash of the contract that the member has accepted."""
    round: int
    exchange: int
    attempt: int
    since: Version | None
    """The last version of this member's memory that the server committed; None: none yet."""
    nonce: str
    verb: str
    request: bytes

    def digest(self) -> str:
        """SHA-256 of what is asked; a repeated attempt has the same."""
        return hashlib.sha256(encode(replace(self, attempt=0, nonce=""))).hexdigest()

    def open(self) -> Request[Any]:
        """The request. Raises InadmissibleError if it is malformed or of an unknown kind."""
        if self.verb not in REQUESTS:
            raise InadmissibleError(f"request: unknown verb {self.verb!r}; expected one of {', '.join(REQUESTS)}")
        return decode(REQUESTS[self.verb], self.request)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A reply on its way back."""

    run: str
    contract: str
    round: int
    exchange: int
    nonce: str
    request: str
    """Digest of the envelope that it answers."""
    reply: bytes


def wrap(envelope: Envelope, reply: bytes) -> bytes:
    """The reply to `envelope`, ready to send."""
    return encode(
        Answer(
            envelope.run,
            envelope.contract,
            envelope.round,
            envelope.exchange,
            envelope.nonce,
            envelope.digest(),
            reply,
        )
    )


def unwrap(envelope: Envelope, data: bytes) -> Reply:
    """The reply in `data`, if it answers just this envelope. Raises InadmissibleError."""
    answer = decode(Answer, data)
    for name in ("run", "contract", "round", "exchange", "nonce"):
        if getattr(answer, name) != getattr(envelope, name):
            raise InadmissibleError(f"reply: {name} is {getattr(answer, name)!r}, expected {getattr(envelope, name)!r}")
    if answer.request != envelope.digest():
        raise InadmissibleError("reply: it answers another request")
    reply: Reply = decode(REQUESTS[envelope.verb].reply, answer.reply)
    return reply
