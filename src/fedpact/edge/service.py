"""The site service: a member behind a Unix socket. It knows nothing of a network, and nothing from one is run here.

One request is answered at a time, in the main thread; others wait. What the member has answered before it answers from
its store, so a front end may ask again after any failure. Only the listed users get a word in, and an error leaves as a
fixed code: its text, which may quote private data, stays in this process's own output.
"""

from __future__ import annotations

import os
import queue
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedpact.errors import ConfigError, FedPactError, RefusedError, StoreError, UnacceptedError
from fedpact.runtime.codec import decode
from fedpact.runtime.envelope import Envelope
from fedpact.runtime.files import storing
from fedpact.screen import say
from fedpact_app.frames import BrokenFrameError, Code, Kind, SilentError, receive, send

_CONNECTIONS = 8
"""At once, of all peers."""
_FRAME_S = 60.0
"""How long a peer may pause within a frame."""
_REQUEST_S = 600.0
"""How long a whole request may take to arrive."""
_LINGER_S = 5.0


class Answers(Protocol):
    """A member, as far as the service needs it."""

    def handle(self, data: bytes) -> bytes:
        """The answer to an envelope. Raises FedPactError."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """A request that waits for its turn."""

    member: Answers
    envelope: bytes
    answer: queue.SimpleQueue[bytes | Code] = field(default_factory=queue.SimpleQueue)


def serve(members: Mapping[Path, Answers], *, peers: frozenset[int], ready: Callable[[], None] = lambda: None) -> None:
    """Answers requests to each socket's member until a signal's handler raises. `peers` are users' numbers.

    Raises ConfigError if a socket's folder is open to others, or another service listens there.
    """
    asked: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
    with ExitStack() as stack:
        for path, member in members.items():
            work = (stack.enter_context(listening(path)), member, peers, asked)
            threading.Thread(target=_listen, args=work, daemon=True).start()
        ready()
        while True:
            with suppress(queue.Empty):  # once a second: a signal just before the wait would not end it
                one = asked.get(timeout=1)
                one.answer.put(answered(one.member, one.envelope))


def answered(member: Answers, envelope: bytes) -> bytes | Code:
    """The member's answer, or the code of its refusal; a line about either on this process's output."""
    start = time.monotonic()
    try:
        answer: bytes | Code = member.handle(envelope)
        said = f"answered, {len(answer)} bytes out"
    except FedPactError as error:
        answer, said = _code(error), str(error)
    except Exception as error:  # out of memory, or a bug of ours: the service lives on
        answer, said = Code.FAILED, f"internal error ({type(error).__name__})"
    say(f"{_about(envelope)}: {said}, {time.monotonic() - start:.1f} s")
    return answer


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A listening socket at `path`, for this user and the group of its folder; removed afterwards."""
    with storing(path.parent):
        if not path.parent.exists():
            path.parent.mkdir(parents=True, mode=0o750)
            path.parent.chmod(0o750)
        found = path.parent.lstat()
    mine = found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode)  # a link may be turned elsewhere later
    if not mine or found.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise ConfigError(
            f"{path.parent}: mode {stat.S_IMODE(found.st_mode):04o} of user {found.st_uid}; the socket's folder must "
            "be this user's own, closed to others and not writable by its group: chmod 0750"
        )
    if _alive(path):
        raise ConfigError(f"{path}: another site service listens here; stop it first")
    with storing(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        own = path.lstat()
        if own.st_gid != found.st_gid:
            os.chown(path, -1, found.st_gid)
        path.chmod(0o660)
        listener.listen(_CONNECTIONS)
        try:
            yield listener
        finally:
            with suppress(OSError):
                if path.lstat().st_ino == own.st_ino:  # not the socket of a service that came after
                    path.unlink()


def _listen(listener: socket.socket, member: Answers, peers: frozenset[int], asked: queue.SimpleQueue[_Asked]) -> None:
    seats = threading.BoundedSemaphore(_CONNECTIONS)
    while True:
        seats.acquire()
        try:
            peer, _ = listener.accept()
        except OSError:
            return  # closed: the service ends
        threading.Thread(target=_converse, args=(peer, member, peers, asked, seats), daemon=True).start()


def _converse(
    peer: socket.socket,
    member: Answers,
    peers: frozenset[int],
    asked: queue.SimpleQueue[_Asked],
    seats: threading.BoundedSemaphore,
) -> None:
    try:
        with peer, suppress(OSError):  # it has gone; what was answered is kept for when it asks again
            peer.settimeout(_FRAME_S)
            _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in peers:
                say(f"refused a connection of user {uid}, who is not in service.peers")
                _refuse(peer, Code.NOT_ALLOWED)
                return
            try:
                kind, envelope = receive(peer, within_s=_REQUEST_S)
            except SilentError:
                return
            except BrokenFrameError as error:
                kind, envelope = Kind.FAILURE, b""
                say(f"user {uid}: {error}")
            if kind is not Kind.REQUEST:
                _refuse(peer, Code.MALFORMED)
                return
            one = _Asked(member, envelope)
            asked.put(one)
            answer = one.answer.get()
            if isinstance(answer, Code):
                send(peer, Kind.FAILURE, answer.encode())
            else:
                send(peer, Kind.ANSWER, answer)
    finally:
        seats.release()


def _refuse(peer: socket.socket, code: Code) -> None:
    """Say why, then take what the peer still sends for a while: closed at once, it would never read the reason."""
    send(peer, Kind.FAILURE, code.encode())
    peer.shutdown(socket.SHUT_WR)
    peer.settimeout(_LINGER_S)
    end = time.monotonic() + _LINGER_S
    while time.monotonic() < end and peer.recv(2**16):
        pass


def _alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _code(error: FedPactError) -> Code:
    if isinstance(error, UnacceptedError):
        return Code.CONTRACT
    if isinstance(error, RefusedError):
        return Code.REFUSED
    return Code.STORAGE if isinstance(error, StoreError) else Code.FAILED


def _about(envelope: bytes) -> str:
    try:
        about = decode(Envelope, envelope)
    except Exception:
        return "what was no envelope"
    return f"{about.run:.80} round {about.round!s:.20}.{about.exchange!s:.20} {about.verb:.20}"
