"""How a front end asks a site service over its Unix socket: one frame there, one frame back. Standard library only.

A frame is four bytes of magic, one of kind, eight of length (big-endian), then that many bytes.
"""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress
from enum import IntEnum, StrEnum
from pathlib import Path

HEAD = struct.Struct(">4sBQ")
MAGIC = b"FPS1"
MAX_BYTES = 2**30
"""Of a frame; a longer one is refused before it is read."""
_PIECE = 2**20
_MOST_LOST = 8


class Kind(IntEnum):
    """What a frame holds."""

    REQUEST = 1
    """An envelope."""
    ANSWER = 2
    """A reply on its way back."""
    FAILURE = 3
    """A `Code`, as ASCII."""


class Code(StrEnum):
    """Why a member sends no answer. Nothing else of an error leaves it: its text could quote private data."""

    CONTRACT = "contract"
    """The member has not accepted this run's contract."""
    REFUSED = "refused"
    """The gate said no; the member's own log says why."""
    FAILED = "failed"
    """A reward, the data or the program at the member."""
    STORAGE = "storage"
    """The member's disk."""
    NOT_ALLOWED = "not-allowed"
    """This user may not speak to the service."""
    MALFORMED = "malformed"
    """What arrived was no request."""
    UNAVAILABLE = "unavailable"
    """The site service is not running."""


MEANING = {
    Code.CONTRACT: "has not accepted this run's contract; there: `fedpact site accept`",
    Code.REFUSED: "its gate refused; its own log says why",
    Code.FAILED: "could not answer; its own log says why",
    Code.STORAGE: "cannot read or write its memory; its own log says why",
    Code.NOT_ALLOWED: "its front end may not speak to its site service; there: service.peers",
    Code.MALFORMED: "took what arrived for no request; both must run compatible versions",
    Code.UNAVAILABLE: "its site service is not running; there: `fedpact site serve`",
}
"""What a code tells the coordinator, after the member's name."""


class BrokenFrameError(ConnectionError):
    """The peer is gone, or does not speak this protocol."""


class SilentError(BrokenFrameError):
    """The peer is gone and has said nothing."""


def send(peer: socket.socket, kind: Kind, data: bytes) -> None:
    """Sends one frame. Raises OSError."""
    peer.sendall(HEAD.pack(MAGIC, kind, len(data)))
    peer.sendall(data)


def receive(peer: socket.socket, *, max_bytes: int = MAX_BYTES, within_s: float | None = None) -> tuple[Kind, bytes]:
    """One frame. Raises BrokenFrameError, or OSError; memory grows with what arrives, not with what is announced.

    `within_s` is for the whole of it, however it trickles in.
    """
    end = None if within_s is None else time.monotonic() + within_s
    magic, kind, size = HEAD.unpack(_exactly(peer, HEAD.size, end))
    if magic != MAGIC or kind not in set(Kind):
        raise BrokenFrameError("found no frame; expected a FedPact front end and its site service")
    if size > max_bytes:
        raise BrokenFrameError(f"found a frame of {size} bytes, expected at most {max_bytes}")
    return Kind(kind), _exactly(peer, size, end)


def ask(path: str | Path, envelope: bytes, *, patience_s: float = 60.0) -> bytes | Code:
    """The site service's answer to an envelope, or why there is none.

    A service that is gone, or goes while it works, is asked again until `patience_s` are over since it was last seen:
    it answers what it has answered before from its store. How long it works is its own affair. A request under which
    it goes `_MOST_LOST` times is given up: it may be what makes it fall.
    """
    seen, num_lost = time.monotonic(), 0
    while True:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.connect(str(path))
                seen = time.monotonic()
                with suppress(BrokenPipeError, ConnectionResetError):  # refused unread; the reason may have arrived
                    send(peer, Kind.REQUEST, envelope)
                kind, data = receive(peer)
                return data if kind == Kind.ANSWER else _code(data)
        except PermissionError:
            return Code.NOT_ALLOWED
        except BrokenFrameError:
            num_lost += 1
            if num_lost == _MOST_LOST:
                return Code.UNAVAILABLE
            time.sleep(0.2)
        except OSError:
            if time.monotonic() - seen > patience_s:
                return Code.UNAVAILABLE
            time.sleep(0.2)


def _code(data: bytes) -> Code:
    try:
        return Code(data.decode("ascii"))
    except ValueError:
        return Code.FAILED


def _exactly(peer: socket.socket, size: int, end: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if end is not None and time.monotonic() > end:
            raise BrokenFrameError(f"{len(data)} of {size} bytes came in the time for all")
        piece = peer.recv(min(size - len(data), _PIECE))
        if not piece:
            kind = BrokenFrameError if data or size != HEAD.size else SilentError
            raise kind(f"the peer closed after {len(data)} of {size} bytes")
        data += piece
    return bytes(data)
