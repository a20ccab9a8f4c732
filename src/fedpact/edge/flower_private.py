"""Everything of Flower that its documentation does not promise, in one place: the link to a SuperLink, and nodes.

Read in the sources of flwr 1.41.0. `TOUCH_POINTS` lists what is used; a test holds each of them to its signature, so a
new version of flwr shows there first. Importing this module also switches off what Flower would send or install on
its own, which only helps before flwr itself is imported: other modules import this one first.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedpact.edge.submission import SWITCHES
from fedpact.errors import ConfigError, RefusedError

for _switch, _value in SWITCHES.items():
    os.environ.setdefault(_switch, _value)

_OBJECTS_S = 200.0
"""For a message's objects to arrive: after 180 s the SuperLink takes no more of them. Flower would wait two hours."""
OLDEST, BELOW = (1, 41), (1, 43)
_REMEDY = "pip install 'fedpact[flower]'"


def _check_version() -> None:
    expected = f"expected at least {'.'.join(map(str, OLDEST))}, below {'.'.join(map(str, BELOW))}; {_REMEDY}"
    try:
        found = version("flwr")
    except PackageNotFoundError as error:
        raise ConfigError(f"flwr: not installed, {expected}") from error
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not OLDEST <= numbers < BELOW:
        raise ConfigError(f"flwr: found {found}, {expected}")


_check_version()
try:
    import httpx
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from flwr.app import Message, RecordDict
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.fleet_http_connection import http_request_response
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    from fedpact.edge.node_key import load_key, new_key
    from fedpact.edge.refusals import LostError, authorities, check_address, reason, told
except ImportError as _error:
    raise ConfigError(f"flwr: {version('flwr')} has another {_error.name} than 1.41.0; {_REMEDY}") from _error

__all__ = [
    "TOUCH_POINTS",
    "Connection",
    "Inbound",
    "LostError",
    "Node",
    "Standing",
    "fleet",
    "in_simulation",
    "load_key",
    "new_key",
    "nodes",
    "unlock",
]
TOUCH_POINTS: tuple[tuple[str, str], ...] = tuple(
    (module, name)
    for module, names in {
        "flwr.common.constant": "HEARTBEAT_DEFAULT_INTERVAL",
        "flwr.proto.fleet_pb2": "ActivateNodeRequest DeactivateNodeRequest",
        "flwr.proto.node_pb2": "NodeInfo",
        "flwr.supercore.inflatable.inflatable_object": (
            "get_all_nested_objects get_object_tree iterate_object_tree no_object_id_recompute"
        ),
        "flwr.supercore.inflatable.inflatable_utils": "inflate_object_from_contents pull_objects push_objects",
        "flwr.supercore.interceptors.http.runtime_version": "RuntimeVersionHttpInterceptor",
        "flwr.supercore.run": "RunNotRunningException",
        "flwr.superlink.grid.http_grid": "HttpGrid.get_nodes",
        "flwr.superlink.grid.inmemory_grid": "InMemoryGrid",
        "flwr.supernode.fleet_http_client": (
            "FleetHttpClient.ActivateNode FleetHttpClient.DeactivateNode FleetHttpClient.from_server_address"
        ),
        "flwr.supernode.fleet_http_connection": "http_request_response",
        "flwr.supernode.node_auth_http_interceptor": "NodeAuthHttpInterceptor",
    }.items()
    for name in names.split()
)
"""(module, name); beside these, the `_message_id` of a reply's metadata is set by hand, to the reply's `object_id`."""


class Standing(Enum):
    """What `unlock` found."""

    RELEASED = "the node counted as active; now it does not"
    FREE = "the node did not count as active"
    UNKNOWN = "the SuperLink does not know this key under this node ID"


@dataclass(frozen=True)
class Node:
    """A registered node. `name` is the one it was registered under, `activated_at` is ISO 8601, "" if never."""

    name: str
    id: int
    activated_at: str
    online: bool


@dataclass(frozen=True)
class Inbound:
    """A message for this node. `content` is empty where the server sent none or it could not be put together."""

    message_type: str
    run_id: int
    content: RecordDict
    message: Message
    """Without its content; a reply names it."""


def nodes(grid: Any) -> list[Node]:
    """The nodes a Grid knows, by id. In flwr 1.41 only those online are listed, deployed or simulated."""
    found = [
        Node(info.name, info.node_id, info.last_activated_at, info.status == "online") for info in grid.get_nodes()
    ]
    return sorted(found, key=lambda node: node.id)


def in_simulation(grid: object) -> bool:
    """Whether the Grid is that of Flower's simulation."""
    from flwr.superlink.grid.inmemory_grid import InMemoryGrid

    return isinstance(grid, InMemoryGrid)


class Connection:
    """An active node. What a run ships (its FAB) is never asked for, so nothing of it can run here."""

    def __init__(self, parts: tuple[Any, ...]) -> None:
        """`parts` as `http_request_response` yields them."""
        self.node_id: int
        self.broken = False
        """Set when the heartbeat has died: the SuperLink would soon count this node as gone."""
        self.node_id, self._receive, self._send, _run, _fab, self._pull, self._push, self._confirm = parts

    def break_off(self, _thread: threading.ExceptHookArgs) -> None:
        """What an exception in the heartbeat's thread does."""
        self.broken = True

    def receive(self) -> Inbound | None:
        """The next message, whole and confirmed; None if there is none or its run has ended. Raises LostError."""
        if self.broken:
            raise LostError("the heartbeat failed")
        try:
            if (found := self._receive()) is None:
                return None
            message, tree = found
            run_id = message.metadata.run_id
            ids = [part.object_id for part in iterate_object_tree(tree)]
            contents = pull_objects(ids, partial(self._pull, run_id), max_time=_OBJECTS_S)
            self._confirm(run_id, message.metadata.message_id)
        except RunNotRunningException:  # a BaseException
            return None
        except Exception as error:
            raise LostError(reason(error)) from error
        return Inbound(message.metadata.message_type, run_id, _content(tree.object_id, contents), message)

    def reply(self, inbound: Inbound, content: RecordDict, seconds: float) -> bool:
        """Sends the answer; `seconds` is how long it took. False if the run has ended. Raises LostError."""
        message = Message(content, reply_to=inbound.message)
        message.metadata.__dict__["_message_id"] = message.object_id
        try:
            with no_object_id_recompute():
                wanted, session = self._send(message, get_object_tree(message), seconds)
                push = partial(self._push, inbound.run_id, session)
                push_objects(get_all_nested_objects(message), push, object_ids_to_push=wanted)
        except RunNotRunningException:
            return False
        except Exception as error:
            raise LostError(reason(error)) from error
        return True


@contextmanager
def fleet(superlink: str, *, root_certificates: Path | None, key: Path, insecure: bool) -> Iterator[Connection]:
    """An active node at the SuperLink (HOST:PORT), with heartbeats; leaving the block deactivates it.

    Raises RefusedError where another attempt cannot help (a key, a certificate authority), ConfigError for an address
    or a file, LostError for the rest. Not `http_request_response` alone: where that cannot activate the node it ends
    the process, and an exception inside its block it only logs. So the node is activated here first, plainly.
    """
    _try(superlink, root_certificates, key, insecure)
    private, trusted = load_key(key), None if insecure else authorities(root_certificates)
    connection: Connection | None = None
    failure: Exception | None = None
    flower_log = logging.getLogger("flwr")
    level, hook = flower_log.level, threading.excepthook
    flower_log.setLevel(logging.CRITICAL)
    try:
        with http_request_response(
            superlink, insecure, trusted, (private, private.public_key()), max_retries=2
        ) as parts:
            connection = Connection(parts)
            threading.excepthook = connection.break_off
            try:
                yield connection
            except Exception as error:
                failure = error
    except SystemExit as error:
        if connection is not None:
            raise
        raise RefusedError(f"{superlink}: the SuperLink went away while this link connected; start it again") from error
    finally:
        threading.excepthook = hook
        flower_log.setLevel(level)
    if failure is not None:
        raise failure


def unlock(superlink: str, *, root_certificates: Path | None, key: Path, insecure: bool, node_id: int) -> Standing:
    """Ends what is left of a killed link, which would count as active for another minute.

    It would also end a live one with the same key: hold a lock. Raises as `fleet`.
    """
    with _client(superlink, root_certificates, key, insecure) as client, told(superlink, key, insecure):
        try:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
        except httpx.HTTPStatusError as error:
            if error.response.status_code not in (401, 412):
                raise
            return Standing.UNKNOWN if error.response.status_code == 401 else Standing.FREE
    return Standing.RELEASED


def _try(superlink: str, root_certificates: Path | None, key: Path, insecure: bool) -> None:
    """Activates the node and deactivates it again; raises what speaks against it."""
    public = load_key(key).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
    with _client(superlink, root_certificates, key, insecure) as client, told(superlink, key, insecure):
        node_id = client.ActivateNode(request).node_id
        client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))


@contextmanager
def _client(superlink: str, root_certificates: Path | None, key: Path, insecure: bool) -> Iterator[FleetHttpClient]:
    check_address(superlink)
    private = load_key(key)
    signs = NodeAuthHttpInterceptor(private, private.public_key())
    introduces = RuntimeVersionHttpInterceptor(component_name="SuperNode")
    trusted = None if insecure else authorities(root_certificates)
    with FleetHttpClient.from_server_address(superlink, insecure, trusted, interceptors=[introduces, signs]) as client:
        yield client


def _content(message_id: str, contents: dict[str, bytes]) -> RecordDict:
    try:
        message = inflate_object_from_contents(message_id, contents)
        return message.content if isinstance(message, Message) else RecordDict()
    except Exception:  # whatever a server may have put there
        return RecordDict()
