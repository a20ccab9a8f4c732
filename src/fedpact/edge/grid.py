"""Members behind Flower's SuperLink: envelopes go out, and answers come in, as messages of Flower's Grid.

A link or a SuperNode that restarts while a request is with it loses the request without a word. So a request is pushed
again, byte for byte, when its member's node is another than the one that got it; a member answers what it has
answered before from its store.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import httpx
from flwr.app import DEFAULT_TTL, Message
from flwr.serverapp import Grid

from fedpact import screen
from fedpact.errors import TooFewRepliesError
from fedpact.runtime.client_config import Name
from fedpact.runtime.transport import Failure
from fedpact.types import ClientId
from fedpact_app.frames import MAX_BYTES, MEANING, Code
from fedpact_app.records import MESSAGE_TYPE, carried, uncarried

_LOOK_S = 1.0
"""Between two looks at who is online."""
_GRACE_S = 60.0
"""How much longer Flower keeps a message than we wait: an answer in time may be fetched a little later."""
_MAX_PUSHES = 8
"""Of one request: one that makes its link fall must not go on for ever."""
_MAX_NAME = 64
_LOST = {3, 4, 5}
"""Flower's error codes for a message, a reply or a node that is gone."""
_ERRORS = {
    1: "could not load the Flower app",
    2: "its front end failed; its own log says why",
    6: "a mod of its Flower app refused",
    7: "took the Flower app for invalid",
    8: "its Flower app's process died",
}
"""What Flower's other error codes tell the coordinator. The text beside a code comes from outside and is not shown."""


class Node(Protocol):
    """A link or SuperNode that is online."""

    @property
    def name(self) -> str | None: ...
    @property
    def id(self) -> int: ...
    @property
    def activated_at(self) -> str:
        """When it came online; another time is another life, in which it knows of no request."""
        ...


@dataclass
class _Request:
    """What one member is asked in an exchange."""

    envelope: bytes
    pushed: list[str] = field(default_factory=list)
    """Ids of the messages that may still be answered, newest last."""
    holder: tuple[int, str] | None = None
    """Id and activation of the node that the newest message went to; None: nobody has the request."""
    num_pushes: int = 0

    def forget(self, message_id: str) -> None:
        """This message will not be answered; without the newest, nobody has the request."""
        if message_id == self.pushed[-1]:
            self.holder = None
        self.pushed.remove(message_id)


class GridTransport:
    """A fedpact.runtime.transport.Transport; a member is the name under which its node's key was registered.

    `nodes` tells who is online; nodes without a name are nobody's. A member that is away, whether seen before or not,
    has `reconnect_s` to come back, counted from the first look that missed it, through all exchanges: who has left for
    good is waited for once.

    While the SuperLink is down, Flower repeats each call until it is back, so an exchange can outlast its `timeout_s`
    by that time. What Flower does not repeat is raised here, except for pushes: they fail for one member.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Callable[[], Sequence[Node]],
        *,
        reconnect_s: float = 90.0,
        poll_s: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        say: Callable[[str], object] = screen.say,
    ) -> None:
        self._grid, self._nodes, self._reconnect_s, self._poll_s = grid, nodes, reconnect_s, poll_s
        self._clock, self._sleep, self._say = clock, sleep, say
        self._seen: set[ClientId] = set()
        self._away: dict[ClientId, float] = {}
        """When we first missed each member that was seen or asked, and is not online."""
        self._said: set[str] = set()
        self._one_by_one = False
        """Whether somebody has answered with what Flower cannot put together."""

    def clients(self) -> Sequence[ClientId]:
        """Who is online, sorted."""
        return sorted(self._look())

    def wait_for(
        self, count: int, timeout_s: float | None = None, *, among: Collection[ClientId] | None = None
    ) -> Sequence[ClientId]:
        """Who is online, of `among` if given, sorted, once it is at least `count`. Raises TooFewRepliesError after
        `timeout_s`."""
        end = math.inf if timeout_s is None else self._clock() + timeout_s
        while len(names := [one for one in self.clients() if among is None or one in among]) < count:
            if self._clock() >= end:
                raise TooFewRepliesError(
                    f"{len(names)} of {count} members connected within {timeout_s:g} s ({', '.join(names) or 'none'}); "
                    "start the others' links, or lower federation.min_replies"
                )
            self._sleep(min(_LOOK_S, max(0.0, end - self._clock())))
        return names

    def exchange(
        self, envelopes: Mapping[ClientId, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[ClientId, bytes | Failure]]:
        """Each member's answer as it arrives, one each; `timeout_s` is for all of them together."""
        end = math.inf if timeout_s is None else self._clock() + timeout_s
        ttl = DEFAULT_TTL if timeout_s is None else timeout_s + _GRACE_S
        waiting = {client: _Request(envelope) for client, envelope in envelopes.items()}
        looked = -math.inf
        while waiting:
            now = self._clock()  # before the pull: what had arrived by the end counts, however long the caller took
            yield from self._answers(waiting)
            if now >= end:
                break
            if now - looked >= _LOOK_S:
                looked = now
                yield from self._ask(waiting, ttl)
            if waiting:
                self._sleep(min(self._poll_s, max(0.0, end - self._clock())))
        for client in waiting:
            yield client, Failure(f"no reply within {timeout_s:g} s (federation.timeout_s)")

    def _ask(self, waiting: dict[ClientId, _Request], ttl: float) -> Iterator[tuple[ClientId, Failure]]:
        """Push each request that no living node has; yield who cannot be asked any more."""
        online = self._look(waiting)
        for client, request in list(waiting.items()):
            if failure := self._asked(client, request, online.get(client), ttl):
                del waiting[client]
                yield client, failure

    def _asked(self, client: ClientId, request: _Request, node: Node | None, ttl: float) -> Failure | None:
        if len(request.envelope) > MAX_BYTES:
            return Failure(f"request: found {len(request.envelope)} bytes, expected at most {MAX_BYTES}")
        if node is None:
            if self._clock() - self._away[client] < self._reconnect_s:
                return None
            again = f"lost its connection and was not back within {self._reconnect_s:g} s"
            return Failure(again if request.num_pushes else "not connected")
        if request.holder == (node.id, node.activated_at):
            return None
        if request.num_pushes == _MAX_PUSHES:
            return Failure(f"lost its connection {_MAX_PUSHES} times while it was asked")
        request.num_pushes += 1
        message = Message(carried(request.envelope), dst_node_id=node.id, message_type=MESSAGE_TYPE, ttl=ttl)
        try:  # one at a time: a Grid may leave out what it could not push
            pushed = list(self._grid.push_messages([message]))
        except Exception as error:  # as where the SuperLink falls while it takes the message: once more, a little later
            last = request.num_pushes == _MAX_PUSHES
            return Failure(f"could not be asked: Flower raised {type(error).__name__}") if last else None
        if not pushed or not pushed[0]:
            return Failure("could not be asked: the SuperLink did not take the message")
        request.pushed.append(pushed[0])
        request.holder = (node.id, node.activated_at)
        return None

    def _answers(self, waiting: dict[ClientId, _Request]) -> Iterator[tuple[ClientId, bytes | Failure]]:
        """What has arrived. By the message it answers: the SuperLink's own errors do not say which node they are about.

        A failure counts if it answers the newest message; an answer always does, and before any failure.
        """
        asked = {message_id: client for client, request in waiting.items() for message_id in request.pushed}
        if not asked:
            return
        pulls = [[message_id] for message_id in asked] if self._one_by_one else [[*asked]]
        replies = [reply for pull in pulls for reply in self._pulled(pull)]
        for message_id, answer in sorted(replies, key=lambda reply: not isinstance(reply[1], bytes)):
            client = asked.pop(message_id, None)
            request = waiting.get(client) if client is not None else None
            if client is None or request is None:
                continue
            final = isinstance(answer, Failure) and message_id == request.pushed[-1]
            if answer is not None and (final or isinstance(answer, bytes)):
                del waiting[client]
                yield client, answer
            else:
                request.forget(message_id)

    def _pulled(self, ids: list[str]) -> list[tuple[str, bytes | Failure | None]]:
        """What has arrived of these, by the message it answers. What Flower cannot put together spoils a whole pull."""
        try:
            return [(reply.metadata.reply_to_message_id, _content(reply)) for reply in self._grid.pull_messages(ids)]
        except (httpx.HTTPError, OSError):  # of the SuperLink or of this machine: nobody's reply
            raise
        except Exception:
            if len(ids) == 1:
                return [(ids[0], Failure("sent what Flower cannot read"))]
            self._one_by_one = True
            return [(message_id, None) for message_id in ids]  # lost with it; asked again, they answer from their store

    def _look(self, asked: Iterable[ClientId] = ()) -> dict[ClientId, Node]:
        """The members that are online; notes since when the others are not."""
        named: dict[ClientId, list[Node]] = {}
        for node in self._nodes():
            if node.name:
                named.setdefault(node.name, []).append(node)
        online = {name: nodes[0] for name, nodes in sorted(named.items()) if self._member(name, len(nodes))}
        now = self._clock()
        self._seen |= online.keys()
        for name in {*self._seen, *asked} - online.keys():
            self._away.setdefault(name, now)
        for name in online:
            self._away.pop(name, None)
        return online

    def _member(self, name: ClientId, num_nodes: int) -> bool:
        if name in ("all", "server") or len(name) > _MAX_NAME or not re.fullmatch(Name, name):
            self._once(f"node {name!r:.80} is ignored: its name cannot be a member's; register it under another")
            return False
        if num_nodes > 1:
            self._once(f"{name}: {num_nodes} nodes have this name, none of them is asked; remove all but one")
            return False
        return True

    def _once(self, warning: str) -> None:
        if warning not in self._said:
            self._said.add(warning)
            self._say(warning)


def _content(reply: Message) -> bytes | Failure | None:
    """A reply's answer; None if it says that nobody will answer."""
    if reply.has_error():
        code = reply.error.code
        return None if code in _LOST else Failure(_ERRORS.get(code, "failed; Flower does not say why"))
    answer = uncarried(reply.content) if reply.has_content() else Code.MALFORMED
    if isinstance(answer, Code):
        return Failure(MEANING[answer], refused=answer in (Code.REFUSED, Code.CONTRACT))
    return answer
