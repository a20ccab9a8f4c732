"""Local members whose first replies are kept, so that many trials of one contract work them out once."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedpact.edge.local import LocalTransport
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.envelope import Envelope, opened, wrap
from fedpact.runtime.files import make_private
from fedpact.runtime.member import Member
from fedpact.runtime.transport import Failure
from fedpact.types import ClientId

_KEPT_ROUNDS = 1
"""Later rounds begin with an adapter that the attack has touched: nobody asks for their replies again."""


class Remembering(LocalTransport):
    """A member asked again what it was asked in another trial gives that reply, and has that memory afterwards.

    Only for members that are alike in all trials: the same files, gates and contract.
    """

    def __init__(self, members: Mapping[ClientId, Member], folder: Path) -> None:
        super().__init__(members)
        self.folder = folder

    def exchange(
        self, envelopes: Mapping[ClientId, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[ClientId, bytes | Failure]]:
        for client, data in envelopes.items():
            envelope = decode(Envelope, data)
            kept, memory = self._place(client, envelope), self.members[client].store.folder
            if kept.exists():
                if (kept / "memory").is_dir():
                    shutil.rmtree(memory, ignore_errors=True)
                    make_private(memory.parent)
                    shutil.copytree(kept / "memory", memory)
                yield client, wrap(envelope, (kept / "reply").read_bytes())
                continue
            for _, answer in super().exchange({client: data}, timeout_s=timeout_s):
                if not isinstance(answer, Failure) and envelope.round <= _KEPT_ROUNDS and envelope.verb != "hello":
                    make_private(kept)
                    if memory.is_dir():
                        shutil.copytree(memory, kept / "memory")
                    (kept / "reply").write_bytes(encode(opened(envelope, answer)[0]))
                yield client, answer

    def _place(self, client: ClientId, envelope: Envelope) -> Path:
        where = (client, envelope.contract, envelope.round, envelope.exchange, envelope.since, envelope.verb)
        digest = hashlib.sha256(repr(where).encode() + envelope.request)
        return self.folder / digest.hexdigest()
