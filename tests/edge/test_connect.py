"""The direct link without a network: its lock, its memory, its lines, and that only bytes and fixed codes leave."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedpact[flower]'")

import httpx
from flwr.app import Message, Metadata, RecordDict

from fedpact.edge import connect as direct
from fedpact.edge import flower_private
from fedpact.edge.connect import SuperLink, answer, attend
from fedpact.edge.flower_private import Connection, Inbound, LostError, Standing, load_key, new_key
from fedpact.edge.refusals import authorities, check_address, told
from fedpact.errors import ConfigError, RefusedError
from fedpact_app import frames
from fedpact_app.frames import Code
from fedpact_app.records import MESSAGE_TYPE, carried, uncarried

ENVELOPE = bytes(range(256)) * 40
NAME = "superlink.example:9092"


def message(record: RecordDict, message_type: str = MESSAGE_TYPE) -> Message:
    metadata = Metadata(
        run_id=7, message_id="", src_node_id=1, dst_node_id=42, reply_to_message_id="", group_id="",
        created_at=1e9, ttl=3600.0, message_type=message_type,
    )  # fmt: skip
    made = Message(record, metadata=metadata)  # type: ignore[call-overload]
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


def inbound(record: RecordDict, message_type: str = MESSAGE_TYPE) -> Inbound:
    return Inbound(message_type, 7, record, message(record, message_type))


class Wire:
    """The eight parts of a Flower connection, on top of a list of messages and one of what was pushed."""

    def __init__(self, *messages: Message) -> None:
        self.waiting = list(messages)
        self.confirmed: list[tuple[int, str]] = []
        self.pushed: dict[str, bytes] = {}
        self.replies: list[Message] = []
        self.objects: dict[str, bytes] = {}

    def connection(self) -> Connection:
        return Connection(
            (42, self.receive, self.send, self.forbidden, self.forbidden, self.pull, self.push, self.confirm)
        )

    def receive(self) -> tuple[Message, Any] | None:
        if not self.waiting:
            return None
        whole = self.waiting.pop(0)
        nested = flower_private.get_all_nested_objects(whole)
        self.objects |= {name: part.deflate() for name, part in nested.items()}
        return whole, flower_private.get_object_tree(whole)

    def pull(self, run_id: int, object_id: str) -> bytes:
        return self.objects[object_id]

    def confirm(self, run_id: int, object_id: str) -> None:
        self.confirmed.append((run_id, object_id))

    def send(self, reply: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        self.replies.append(reply)
        return {part.object_id for part in flower_private.iterate_object_tree(tree)}, "session"

    def push(self, run_id: int, session: str, object_id: str, content: bytes) -> None:
        assert (run_id, session) == (7, "session")
        self.pushed[object_id] = content

    def forbidden(self, *_: object) -> None:
        raise AssertionError("asked for a run or for its FAB")


def link(
    open_: Callable[[], AbstractContextManager[Connection]], unlocked: list[int] | None = None,
    standing: Standing = Standing.FREE,
) -> SuperLink:  # fmt: skip
    def unlock(node_id: int) -> Standing:
        (unlocked if unlocked is not None else []).append(node_id)
        return standing

    return SuperLink(NAME, open_, unlock)


@contextmanager
def one_connection(*messages: Message, then: int = signal.SIGTERM) -> Iterator[Connection]:
    """Serves the messages, then sends this process a signal."""
    wire = Wire(*messages)

    def receive() -> tuple[Message, Any] | None:
        if not wire.waiting:
            signal.raise_signal(then)
        return Wire.receive(wire)

    wire.receive = receive  # type: ignore[method-assign]
    yield wire.connection()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    new_key(tmp_path / "node")
    return tmp_path / "node"


@contextmanager
def service(path: Path, kind: frames.Kind, data: bytes) -> Iterator[list[bytes]]:
    asked: list[bytes] = []

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            asked.append(frames.receive(peer)[1])
            frames.send(peer, kind, data)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield asked
        thread.join(5)


def test_an_envelope_reaches_the_service_and_its_answer_comes_back_byte_for_byte(tmp_path: Path) -> None:
    with service(tmp_path / "s", frames.Kind.ANSWER, b"reply" * 9) as asked:
        assert answer(inbound(carried(ENVELOPE)), socket=tmp_path / "s", patience_s=1.0) == b"reply" * 9
    assert asked == [ENVELOPE]


@pytest.mark.parametrize("code", list(Code))
def test_a_code_of_the_service_is_passed_on(code: Code, tmp_path: Path) -> None:
    with service(tmp_path / "s", frames.Kind.FAILURE, code.value.encode()):
        assert answer(inbound(carried(ENVELOPE)), socket=tmp_path / "s", patience_s=1.0) is code


@pytest.mark.parametrize(
    "found",
    [inbound(carried(ENVELOPE), "query.other"), inbound(RecordDict()), inbound(carried(Code.REFUSED))],
    ids=["another type", "nothing", "a code"],
)
def test_what_is_no_request_is_answered_as_malformed_without_asking_the_service(found: Inbound, tmp_path: Path) -> None:
    assert answer(found, socket=tmp_path / "absent", patience_s=0.0) is Code.MALFORMED


def test_a_service_that_does_not_run_is_answered_as_unavailable(tmp_path: Path) -> None:
    assert answer(inbound(carried(ENVELOPE)), socket=tmp_path / "absent", patience_s=0.0) is Code.UNAVAILABLE


def test_an_exception_leaves_as_a_code_without_its_text(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> bytes:
        raise ValueError("patient 17")

    monkeypatch.setattr(direct, "ask", broken)
    wire = Wire(message(carried(ENVELOPE)))
    said: list[str] = []
    direct._pass_one(wire.connection(), lambda one: answer(one, socket=key, patience_s=0.0), said.append)
    assert uncarried(wire.replies[0].content) is Code.FAILED
    assert not any(b"patient" in content for content in wire.pushed.values())
    assert said == ["run 7: sent the failure code failed: this member could not answer; its own log says why"]


def test_a_message_is_pulled_confirmed_and_answered_and_no_fab_is_asked_for() -> None:
    request = message(carried(ENVELOPE))
    wire = Wire(request)
    connection = wire.connection()
    found = connection.receive()
    assert found is not None
    assert (found.message_type, found.run_id, uncarried(found.content)) == (MESSAGE_TYPE, 7, ENVELOPE)
    assert wire.confirmed == [(7, request.object_id)]
    assert connection.reply(found, carried(b"answer"), 0.5)
    (reply,) = wire.replies
    assert (reply.metadata.reply_to_message_id, reply.metadata.dst_node_id) == (request.object_id, 1)
    assert set(wire.pushed) == set(flower_private.get_all_nested_objects(reply))
    assert reply.metadata.message_id == reply.object_id
    assert connection.receive() is None


def test_objects_that_make_no_message_are_an_empty_content() -> None:
    wire = Wire(message(carried(ENVELOPE)))
    whole = wire.waiting[0]
    found = wire.connection()
    wire.pull = lambda run_id, object_id: b"rubbish"  # type: ignore[method-assign]
    got = found.__class__((42, wire.receive, wire.send, None, None, wire.pull, wire.push, wire.confirm)).receive()
    assert got is not None
    assert (dict(got.content), got.message.object_id) == ({}, whole.object_id)


def test_a_run_that_has_ended_costs_its_message_and_nothing_else() -> None:
    def ended(*_: object) -> Any:
        raise flower_private.RunNotRunningException

    wire = Wire()
    connection = Connection((42, ended, ended, None, None, wire.pull, wire.push, wire.confirm))
    assert connection.receive() is None
    assert connection.reply(inbound(carried(ENVELOPE)), carried(b"answer"), 0.5) is False


def test_any_other_failure_of_the_connection_means_that_it_is_lost() -> None:
    def broken(*_: object) -> Any:
        raise httpx.ReadTimeout("too slow")

    connection = Connection((42, broken, broken, None, None, None, None, None))
    with pytest.raises(LostError, match="ReadTimeout: too slow"):
        connection.receive()
    with pytest.raises(LostError, match="ReadTimeout: too slow"):
        connection.reply(inbound(carried(ENVELOPE)), carried(b"answer"), 0.5)


def test_a_connection_whose_heartbeat_died_is_lost() -> None:
    connection = Wire().connection()
    connection.break_off(SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(LostError, match="the heartbeat failed"):
        connection.receive()


def test_a_link_says_when_it_is_connected_and_each_code_it_sends(key: Path) -> None:
    said: list[str] = []
    messages = [message(carried(ENVELOPE)), message(carried(b"more"))]
    codes = iter([Code.CONTRACT, b"fine"])
    attend(link(lambda: one_connection(*messages)), key, lambda _: next(codes), poll_s=0.0, say=said.append)
    assert said == [
        f"connected to {NAME} as node ID 42",
        "run 7: sent the failure code contract: this member has not accepted this run's contract; "
        "there: `fedpact site accept`",
    ]


def test_a_link_remembers_its_node_id_and_unlocks_it_when_it_starts_again(key: Path) -> None:
    unlocked: list[int] = []
    for _ in range(2):
        attend(link(one_connection, unlocked), key, lambda _: b"", poll_s=0.0, say=lambda _: None)
    assert unlocked == [42]
    assert key.with_name("node.node").read_text() == f"{NAME} 42\n"


@pytest.mark.parametrize("memo", ["another.example:1 42\n", f"{NAME} forty-two\n", "", "\x00" * 9])
def test_a_node_id_of_another_superlink_or_an_unreadable_one_is_not_unlocked(memo: str, key: Path) -> None:
    unlocked: list[int] = []
    key.with_name("node.node").write_text(memo)
    attend(link(one_connection, unlocked), key, lambda _: b"", poll_s=0.0, say=lambda _: None)
    assert unlocked == []


def test_a_lost_connection_is_said_once_and_taken_up_again(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(direct.time, "sleep", waits.append)

    @contextmanager
    def absent() -> Iterator[Connection]:
        raise LostError("ConnectError: refused")
        yield

    @contextmanager
    def breaking() -> Iterator[Connection]:
        wire = Wire()
        connection = wire.connection()
        connection.broken = True
        yield connection

    attempts = iter([absent(), absent(), breaking(), *(absent() for _ in range(6)), one_connection()])
    said: list[str] = []
    unlocked: list[int] = []
    attend(link(lambda: next(attempts), unlocked), key, lambda _: b"", poll_s=0.0, say=said.append)
    assert said == [
        f"no connection to {NAME}; trying until there is one (ConnectError: refused)",
        f"connected to {NAME} as node ID 42",
        f"no connection to {NAME}; trying until there is one (the heartbeat failed)",
        f"connected to {NAME} again as node ID 42",
    ]
    assert waits == [0.5, 1.0, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert unlocked == [42] * 7


def test_a_second_link_with_the_same_key_is_refused(key: Path) -> None:
    refused: list[str] = []

    @contextmanager
    def twin() -> Iterator[Connection]:
        with pytest.raises(RefusedError) as error:
            attend(link(one_connection), key, lambda _: b"", poll_s=0.0, say=lambda _: None)
        refused.append(str(error.value))
        with one_connection() as connection:
            yield connection

    attend(link(twin), key, lambda _: b"", poll_s=0.0, say=lambda _: None)
    assert refused == [f"{key}: another link uses this key already; stop that one first"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_connection_in_order_and_restores_the_handlers(number: int, key: Path) -> None:
    before = signal.getsignal(number)
    left: list[str] = []

    @contextmanager
    def watched() -> Iterator[Connection]:
        try:
            with one_connection(then=number) as connection:
                yield connection
        finally:
            signal.raise_signal(signal.SIGTERM)  # an impatient second one does not disturb this
            left.append("deactivated")

    attend(link(watched), key, lambda _: b"", poll_s=0.0, say=lambda _: None)
    assert left == ["deactivated"]
    assert signal.getsignal(number) is before


def test_a_key_that_was_unregistered_meanwhile_is_an_error_and_no_orderly_end(key: Path) -> None:
    unknown = link(lambda: one_connection(then=signal.SIGINT), standing=Standing.UNKNOWN)
    with pytest.raises(RefusedError) as error:
        attend(unknown, key, lambda _: b"", poll_s=0.0, say=lambda _: None)
    assert str(error.value) == f"{NAME}: the SuperLink no longer knows {key}; register {key}.pub there again"


def test_sigterm_ends_the_process_with_0_and_torch_was_never_loaded(key: Path) -> None:
    code = """
import sys, time
from contextlib import contextmanager
from pathlib import Path
from fedpact.edge import connect as direct
from fedpact.edge.flower_private import Connection, Standing

@contextmanager
def opened(*_, **__):
    print("torch" in sys.modules, "transformers" in sys.modules, flush=True)
    try:
        yield Connection((42, lambda: time.sleep(60), *[None] * 6))
    finally:
        print("deactivated", flush=True)

direct.fleet = opened
direct.connect("localhost:1", socket=Path("s"), key=Path(sys.argv[1]), root_certificates=None, insecure=True)
"""
    with subprocess.Popen([sys.executable, "-c", code, key], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [
            "False False\n", "connected to localhost:1 as node ID 42\n"
        ]  # fmt: skip
        process.terminate()
        assert process.stdout.read() == "deactivated\n"
        assert process.wait(10) == 0


def test_a_superlink_that_is_not_there_is_lost_and_not_refused(key: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with (
            pytest.raises(LostError, match=r"ConnectError: .*refused; if it expects TLS, leave out --insecure"),
            flower_private.fleet(address, root_certificates=None, key=key, insecure=True),
        ):
            pass


def test_an_exception_inside_a_flower_connection_is_not_swallowed(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def swallowing(*_: object, **__: object) -> Iterator[tuple[Any, ...]]:
        with suppress(Exception):
            yield (42, *[None] * 7)

    monkeypatch.setattr(flower_private, "_try", lambda *_: None)
    monkeypatch.setattr(flower_private, "http_request_response", swallowing)
    with (
        pytest.raises(LostError, match="gone"),
        flower_private.fleet("localhost:1", root_certificates=None, key=key, insecure=True),
    ):
        raise LostError("gone")


def test_flowers_exit_while_connecting_is_one_line(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def leaving(*_: object, **__: object) -> Iterator[tuple[Any, ...]]:
        raise SystemExit(1)
        yield ()

    monkeypatch.setattr(flower_private, "_try", lambda *_: None)
    monkeypatch.setattr(flower_private, "http_request_response", leaving)
    with (
        pytest.raises(RefusedError, match="went away while this link connected"),
        flower_private.fleet("localhost:1", root_certificates=None, key=key, insecure=True),
    ):
        pass


@pytest.mark.parametrize(
    ("status", "expected"),
    [(412, "is not registered there"), (401, "set the clocks"), (404, "found no Flower SuperLink"), (500, "HTTP 500")],
)
def test_a_refusal_of_the_superlink_is_one_line_with_a_remedy(status: int, expected: str) -> None:
    request = httpx.Request("POST", "https://x")
    with pytest.raises(RefusedError, match=expected) as error, told(NAME, Path("node"), False):
        httpx.Response(status, request=request).raise_for_status()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_gateway_without_its_superlink_is_tried_again(status: int) -> None:
    with pytest.raises(LostError, match=f"HTTP {status}"), told(NAME, Path("node"), False):
        httpx.Response(status, request=httpx.Request("POST", "https://x")).raise_for_status()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer (_ssl.c:1006)",
            r"its certificate is not trusted \(unable to get local issuer\); --root-certificates must name",
        ),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)", "does not speak TLS"),
    ],
)
def test_trouble_with_tls_is_refused_at_once(text: str, expected: str) -> None:
    with pytest.raises(RefusedError, match=expected), told(NAME, Path("node"), False):
        raise httpx.ConnectError(text)


@pytest.mark.parametrize("address", ["", "host", "https://host:1", "host:0", "host:65536", ":9092", "host:x"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match="found no HOST:PORT"):
        check_address(address)


def test_an_address_may_be_a_name_or_a_number() -> None:
    for address in ("localhost:9092", "127.0.0.1:1", "[::1]:65535"):
        check_address(address)


def test_root_certificates_are_read_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca\.pem: No such file or directory; expected root certificates in PEM"):
        authorities(tmp_path / "ca.pem")
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"ca\.pem: found no certificate; expected root certificates in PEM"):
        authorities(tmp_path / "ca.pem")
    assert authorities(None) is None


def test_a_new_key_is_private_and_can_be_loaded_and_has_a_public_half(key: Path) -> None:
    assert load_key(key).curve.name == "secp384r1"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.with_name("node.pub").read_text().startswith("ecdsa-sha2-nistp384 ")


def test_a_key_is_never_replaced(key: Path) -> None:
    before = key.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        new_key(key)
    assert key.read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610])
def test_a_key_that_others_may_use_is_refused(mode: int, key: Path) -> None:
    key.chmod(mode)
    with pytest.raises(ConfigError, match=rf"node: others may use this private key \(mode {mode:04o}\); chmod 600 it"):
        load_key(key)


def test_what_is_no_node_key_is_refused(key: Path) -> None:
    for data in (b"", b"-----BEGIN OPENSSH PRIVATE KEY-----\n", key.with_name("node.pub").read_bytes()):
        key.write_bytes(data)
        with pytest.raises(ConfigError, match="found no OpenSSH private key on the curve P-384"):
            load_key(key)
    key.unlink()
    with pytest.raises(ConfigError, match="No such file or directory; expected a node's private key"):
        load_key(key)


def test_nodes_are_named_as_registered_and_sorted() -> None:
    info = [
        SimpleNamespace(name="south", node_id=9, last_activated_at="2026-01-02", status="online"),
        SimpleNamespace(name="north", node_id=3, last_activated_at="", status="offline"),
    ]
    assert flower_private.nodes(SimpleNamespace(get_nodes=lambda: info)) == [
        flower_private.Node("north", 3, "", False),
        flower_private.Node("south", 9, "2026-01-02", True),
    ]
