"""What both confined programs do first: take the pipes away from 0, 1 and 2, and talk over them in frames.

The source of this module is part of the programs that run confined; nothing else uses it.
"""

from __future__ import annotations

import io
import posix  # what `os` is made of here, and loaded when an interpreter starts
import sys
from collections.abc import Callable
from typing import Any

from fedpact.rewards.sandbox.wire import framed


class Nowhere(io.RawIOBase):
    """Takes what is printed and forgets it."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


def open_pipes() -> tuple[Callable[[], bytes], Callable[[bytes], None]]:
    """`receive` and `send` for frames. Afterwards what is written to 1 and 2 arrives nowhere, and 0 is empty."""
    source, sink = posix.dup(0), posix.dup(1)
    try:
        empty = posix.open("/dev/null", posix.O_RDWR)
        ends = (empty, empty, empty)
    except OSError:  # no such file in this jail: ends of pipes whose other ends are closed
        (reading, closed), (gone, writing) = posix.pipe(), posix.pipe()
        posix.close(closed)
        posix.close(gone)
        ends = (reading, writing, writing)
    for number, end in enumerate(ends):
        posix.dup2(end, number)
    for end in set(ends):
        posix.close(end)
    sys.stdin = io.StringIO()
    sys.stdout = sys.stderr = io.TextIOWrapper(io.BufferedWriter(Nowhere()), encoding="utf-8", errors="replace")

    def exactly(count: int) -> bytes:
        found = b""
        while len(found) < count:
            piece = posix.read(source, min(count - len(found), 1 << 20))
            if not piece:
                posix._exit(0)
            found += piece
        return found

    def receive() -> bytes:
        return exactly(int.from_bytes(exactly(4), "big"))

    def send(payload: bytes) -> None:
        rest = framed(payload)
        while rest:
            rest = rest[posix.write(sink, rest) :]

    send(b"ready")
    return receive, send
