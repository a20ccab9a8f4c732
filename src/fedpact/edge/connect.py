"""The direct link: a small process that carries messages between a SuperLink and the site service beside it.

It runs as the node's user and holds the node's key and nothing else: no data, no model, no reward. Nothing that a run
ships is fetched. Of an error only a fixed code leaves the member.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from fedpact.edge.flower_private import Connection, Inbound, LostError, Standing, fleet, load_key, unlock
from fedpact.errors import ConfigError, RefusedError
from fedpact.screen import say as _say
from fedpact_app.frames import MAX_BYTES, MEANING, Code, ask
from fedpact_app.records import MESSAGE_TYPE, carried, uncarried

_LONGEST_WAIT_S = 10.0


@dataclass(frozen=True)
class SuperLink:
    """How one SuperLink is reached: `open` is `fleet`, `unlock` takes a node ID."""

    name: str
    open: Callable[[], AbstractContextManager[Connection]]
    unlock: Callable[[int], Standing]


def connect(
    superlink: str,
    *,
    socket: Path,
    key: Path,
    root_certificates: Path | None,
    insecure: bool,
    poll_s: float = 0.2,
    patience_s: float = 60.0,
    say: Callable[[str], None] = _say,
) -> None:
    """Serves a SuperLink (HOST:PORT) until SIGTERM or SIGINT, which end it in order.

    A SuperLink that is away is tried again for as long as it takes; a site service that is away, for `patience_s`.
    Beside the key lie its lock (KEY.lock) and the node's ID (KEY.node), by which a killed link comes back at once.
    Raises RefusedError where the SuperLink or a twin of this link does not allow it, ConfigError for a file or address.
    """
    load_key(key)
    link = SuperLink(
        superlink,
        lambda: fleet(superlink, root_certificates=root_certificates, key=key, insecure=insecure),
        lambda node_id: unlock(
            superlink, root_certificates=root_certificates, key=key, insecure=insecure, node_id=node_id
        ),
    )
    attend(link, key, partial(answer, socket=socket, patience_s=patience_s), poll_s=poll_s, say=say)


def answer(inbound: Inbound, *, socket: Path, patience_s: float) -> bytes | Code:
    """The site service's answer, or the code that stands for it. Raises nothing: an error's text could quote data."""
    try:
        envelope = uncarried(inbound.content) if inbound.message_type == MESSAGE_TYPE else Code.MALFORMED
        if isinstance(envelope, Code) or len(envelope) > MAX_BYTES:
            return Code.MALFORMED
        return ask(socket, envelope, patience_s=patience_s)
    except Exception:
        return Code.FAILED


def attend(
    link: SuperLink,
    key: Path,
    answered: Callable[[Inbound], bytes | Code],
    *,
    poll_s: float,
    say: Callable[[str], None],
) -> None:
    """`connect`, given a way to the SuperLink and one to the site service."""
    stop = _Stop()
    with _alone(key):
        with _stoppable(stop):
            _attend(link, _memo(key), answered, poll_s, say, stop)
        if stop.signal == signal.SIGINT:
            _refuse_unknown(link, key)


def _attend(
    link: SuperLink,
    memo: Path,
    answered: Callable[[Inbound], bytes | Code],
    poll_s: float,
    say: Callable[[str], None],
    stop: _Stop,
) -> None:
    node_id, again, wait_s = _remembered(memo, link.name), "", 0.0
    while stop.signal is None:
        try:
            if node_id is not None:
                link.unlock(node_id)
            with link.open() as connection:
                node_id, wait_s = connection.node_id, 0.0
                _remember(memo, link.name, node_id)
                say(f"connected to {link.name}{again} as node ID {node_id}")
                while stop.signal is None:
                    if not _pass_one(connection, answered, say):
                        time.sleep(poll_s)
        except LostError as error:
            if not wait_s:
                say(f"no connection to {link.name}; trying until there is one ({error})")
                again = " again" if node_id is not None else ""
            wait_s = min(max(2 * wait_s, 0.5), _LONGEST_WAIT_S)
            time.sleep(wait_s)


def _pass_one(connection: Connection, answered: Callable[[Inbound], bytes | Code], say: Callable[[str], None]) -> bool:
    """Carries one message there and its answer back; False if there was none."""
    if (inbound := connection.receive()) is None:
        return False
    began = time.monotonic()
    found = answered(inbound)
    if isinstance(found, Code):
        say(f"run {inbound.run_id}: sent the failure code {found.value}: this member {MEANING[found]}")
    if not connection.reply(inbound, carried(found), time.monotonic() - began):
        say(f"run {inbound.run_id}: ended before its answer was sent")
    return True


@contextmanager
def _alone(key: Path) -> Iterator[None]:
    """Two links with one key would evict each other."""
    path = key.with_name(key.name + ".lock")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{path}: {os.strerror(error.errno or 0)}; the key's folder must be this user's own"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise RefusedError(f"{key}: another link uses this key already; stop that one first") from error
    try:
        yield
    finally:
        os.close(descriptor)


class _Stopped(BaseException):
    """Not an Exception: Flower logs and swallows those."""


@dataclass
class _Stop:
    signal: int | None = None


@contextmanager
def _stoppable(stop: _Stop) -> Iterator[None]:
    """SIGTERM and SIGINT end the block, so that the node is deactivated; more of them do not disturb that."""

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.signal is None:
            stop.signal = number
            raise _Stopped

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except _Stopped:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_unknown(link: SuperLink, key: Path) -> None:
    """After a SIGINT: Flower sends one to its own process when it gets HTTP 401, as when the key was unregistered."""
    node_id = _remembered(_memo(key), link.name)
    try:
        unknown = node_id is not None and link.unlock(node_id) == Standing.UNKNOWN
    except (LostError, RefusedError):
        return
    if unknown:
        raise RefusedError(f"{link.name}: the SuperLink no longer knows {key}; register {key}.pub there again")


def _memo(key: Path) -> Path:
    return key.with_name(key.name + ".node")


def _remembered(memo: Path, superlink: str) -> int | None:
    try:
        name, node_id = memo.read_text(encoding="utf-8").split()
        return int(node_id) if name == superlink else None
    except (OSError, ValueError):  # then a killed link waits a minute, no more
        return None


def _remember(memo: Path, superlink: str, node_id: int) -> None:
    temporary = memo.with_name(memo.name + ".tmp")
    try:
        temporary.write_text(f"{superlink} {node_id}\n", encoding="utf-8")
        temporary.replace(memo)
    except OSError as error:
        raise ConfigError(
            f"{memo}: {os.strerror(error.errno or 0)}; the key's folder must be this user's own"
        ) from error
