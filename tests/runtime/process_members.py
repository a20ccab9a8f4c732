"""Members as processes of their own, so that the server, one member, or both can be killed.

A member process is forked with everything loaded and speaks frames over a socket pair: a number, a kind, the bytes. One
that dies is started again and asked again with the same envelope, a few times; then its exchange is a Failure.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fedpact.errors import FedPactError, StoreError
from fedpact.messages import Hello
from fedpact.runtime.codec import decode
from fedpact.runtime.envelope import Envelope
from fedpact.runtime.member import Member
from fedpact.runtime.transport import Failure

_HEAD = struct.Struct("!IBI")
ANSWER, FAILURE, STORE = range(3)


class ProcessMembers:
    """`runtime.transport.Transport`. `make(name)` runs in the member's process; `arm(name, starts)` before it."""

    def __init__(
        self,
        names: Sequence[str],
        make: Callable[[str], Member],
        *,
        locks: Path,
        arm: Callable[[str, int], None] = lambda name, starts: None,
        died: Callable[[str, int], None] = lambda name, status: None,
        left: Callable[[str], None] = lambda name: None,
        attempts: int = 4,
    ) -> None:
        self.names, self.make, self.locks, self.arm = sorted(names), make, locks, arm
        self.died, self.left, self.attempts = died, left, attempts
        self.sockets: dict[str, socket.socket] = {}
        self.pids: dict[str, int] = {}
        self.starts = dict.fromkeys(self.names, 0)
        self.hello: dict[str, bytes] = {}
        self.number = 0

    def clients(self) -> Sequence[str]:
        return self.names

    def exchange(
        self, envelopes: Mapping[str, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        self.number += 1
        waiting = dict.fromkeys(envelopes, self.attempts)
        for client, envelope in envelopes.items():
            if decode(Envelope, envelope).verb == Hello.verb:
                self.hello[client] = envelope
            self._send(client, envelope)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while waiting:
            left = None if deadline is None else deadline - time.monotonic()
            for client in self._readable(waiting, left):
                frame = _receive(self.sockets[client])
                if frame is None:
                    self._reap(client)
                    waiting[client] -= 1
                    if waiting[client]:
                        self._send(client, envelopes[client])
                    else:
                        del waiting[client]
                        yield client, Failure(f"its process died {self.attempts} times")
                    continue
                number, kind, data = frame
                if number != self.number:  # the hello of a new process, or too late for the exchange before
                    continue
                del waiting[client]
                if kind == STORE:
                    raise StoreError(data.decode())
                yield client, data if kind == ANSWER else Failure(data.decode())
            if deadline is not None and time.monotonic() > deadline:
                for client in waiting:
                    yield client, Failure(f"no reply within {timeout_s:g} s (federation.timeout_s)")
                return

    def close(self) -> None:
        """Ends all members and waits for them."""
        for client in list(self.sockets):
            self.sockets.pop(client).close()
            os.waitpid(self.pids.pop(client), 0)

    def _readable(self, waiting: Mapping[str, int], left: float | None) -> list[str]:
        with selectors.DefaultSelector() as selector:
            for client in waiting:
                selector.register(self.sockets[client], selectors.EVENT_READ, client)
            return sorted(key.data for key, _ in selector.select(left))

    def _send(self, client: str, envelope: bytes) -> None:
        for _ in range(self.attempts):
            if client not in self.sockets:
                self._start(client)
                if client in self.hello and envelope != self.hello[client]:
                    _transmit(self.sockets[client], 0, ANSWER, self.hello[client])
            try:
                _transmit(self.sockets[client], self.number, ANSWER, envelope)
                return
            except OSError:
                self._reap(client)

    def _reap(self, client: str) -> None:
        self.sockets.pop(client).close()
        self.died(client, os.waitpid(self.pids.pop(client), 0)[1])

    def _start(self, client: str) -> None:
        self.starts[client] += 1
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid:
            theirs.close()
            self.sockets[client], self.pids[client] = ours, pid
            return
        try:
            for other in [ours, *self.sockets.values()]:
                other.close()
            _let_go_of_locks()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self.locks.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.locks / f"{client}.lock", os.O_RDWR | os.O_CREAT)
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the process before, whose server was killed, is gone
            self.arm(client, self.starts[client])
            _serve(self.make(client), theirs)
            self.left(client)
        except BrokenPipeError:
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)


def _serve(member: Member, peer: socket.socket) -> None:
    while (frame := _receive(peer)) is not None:
        number, _, envelope = frame
        try:
            answer, kind = member.handle(envelope), ANSWER
        except StoreError as error:
            answer, kind = str(error).encode(), STORE
        except FedPactError as error:
            answer, kind = str(error).encode(), FAILURE
        _transmit(peer, number, kind, answer)


def _let_go_of_locks() -> None:
    """The run folder's lock is the server's; a forked child would hold on to it when the server is gone."""
    for one in Path("/proc/self/fd").iterdir():
        if one.is_symlink() and str(one.readlink()).endswith(".lock"):
            os.close(int(one.name))


def _transmit(peer: socket.socket, number: int, kind: int, data: bytes) -> None:
    peer.sendall(_HEAD.pack(number, kind, len(data)) + data)


def _receive(peer: socket.socket) -> tuple[int, int, bytes] | None:
    """One frame; None where the other side is gone."""
    head = _exactly(peer, _HEAD.size)
    if head is None:
        return None
    number, kind, size = _HEAD.unpack(head)
    data = _exactly(peer, size)
    return None if data is None else (number, kind, data)


def _exactly(peer: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        try:
            more = peer.recv(min(size - len(data), 1 << 16))
        except ConnectionResetError:
            return None
        if not more:
            return None
        data += more
    return data
