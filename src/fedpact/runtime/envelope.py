"""How a request and its reply are wrapped on their way, and how a reply is matched to what it answers."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, replace
from typing import Any

from fedpact.errors import InadmissibleError
from fedpact.messages import REQUESTS, Reply, Request
from fedpact.runtime.codec import decode, encode

START = "0" * 64
"""The head of an empty ledger."""

_DIGEST = re.compile(r"[0-9a-f]{64}")

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
    sha256: str
    """Of `request`."""
    head: str = START
    """Of the server's ledger when it asked; the member keeps it."""

    def digest(self) -> str:
        """SHA-256 of what is asked; a repeated attempt has the same."""
        return hashlib.sha256(encode(replace(self, attempt=0, nonce="", head=START))).hexdigest()

    def open(self) -> Request[Any]:
        """The request. Raises InadmissibleError if it was damaged on its way, is malformed or of an unknown kind."""
        if _sha256(self.request) != self.sha256:
            raise InadmissibleError("request: damaged on its way: its SHA-256 is not the envelope's; ask again")
        if self.verb not in REQUESTS:
            raise InadmissibleError(
                f"request: unknown verb {ascii(self.verb)[:40]}; expected one of {', '.join(REQUESTS)}"
            )
        return decode(REQUESTS[self.verb], self.request)


class StrayError(InadmissibleError):
    """An answer to something else: late by a round, or another's."""


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
    head: str
    """Of the member's ledger, this answer's line included; the server keeps it."""
    sha256: str
    """Of `reply` and `head`."""


def seal(request: Request[Any], **where: Any) -> Envelope:
    """The envelope of `request`; `where` are the other fields, a fresh nonce if none is given."""
    data = encode(request)
    where = {"nonce": secrets.token_hex(16), "attempt": 0, "since": None, **where}
    return Envelope(**where, verb=request.verb, request=data, sha256=_sha256(data))


def wrap(envelope: Envelope, reply: bytes, *, head: str = START) -> bytes:
    """The reply to `envelope`, ready to send; `head` is that of the ledger that says so."""
    return encode(
        Answer(
            envelope.run,
            envelope.contract,
            envelope.round,
            envelope.exchange,
            envelope.nonce,
            envelope.digest(),
            reply,
            head,
            _sha256(reply + head.encode()),
        )
    )


def opened(envelope: Envelope, data: bytes, *, max_bytes: int | None = None) -> tuple[Reply, str]:
    """The reply in `data`, if it answers just this envelope, and the head of its member's ledger.

    Raises InadmissibleError; more than `max_bytes` are not decoded.
    """
    answer = decode(Answer, data, max_bytes=max_bytes)
    for name in ("run", "contract", "round", "exchange", "nonce"):
        if getattr(answer, name) != getattr(envelope, name):
            if name == "nonce":
                raise StrayError("reply: nonce is that of another request")
            found, expected = ascii(getattr(answer, name))[:80], getattr(envelope, name)
            raise StrayError(f"reply: {name} is {found}, expected {expected!r}")
    if answer.request != envelope.digest():
        raise StrayError("reply: it answers another request")
    if _sha256(answer.reply + answer.head.encode(errors="replace")) != answer.sha256:
        raise InadmissibleError("reply: damaged on its way: its SHA-256 is not the answer's")
    if not is_head(answer.head):
        raise InadmissibleError("reply: head is no SHA-256")
    reply: Reply = decode(REQUESTS[envelope.verb].reply, answer.reply)
    return reply, answer.head


def unwrap(envelope: Envelope, data: bytes) -> Reply:
    """The reply in `data`, if it answers just this envelope. Raises InadmissibleError."""
    return opened(envelope, data)[0]


def is_head(text: str) -> bool:
    """Whether this can be the head of a ledger."""
    return _DIGEST.fullmatch(text) is not None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
