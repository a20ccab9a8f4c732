"""The site service's socket: who may speak, what comes back, and what stays inside."""

from __future__ import annotations

import os
import queue
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedpact.edge import service
from fedpact.edge.service import Answers, serve
from fedpact.errors import ConfigError, FedPactError, RefusedError, RewardError, StoreError, UnacceptedError
from fedpact_app.frames import HEAD, MAGIC, BrokenFrameError, Code, Kind, ask, receive, send

ME = frozenset({os.getuid()})
SECRET = "patient 4711 has an ulcer"


class Stand(Answers):
    """A member in whose place a function answers."""

    def __init__(self, answer: Callable[[bytes], bytes] = lambda data: b"to " + data) -> None:
        self.answer, self.at_once, self.most = answer, 0, 0

    def handle(self, data: bytes) -> bytes:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            return self.answer(data)
        finally:
            self.at_once -= 1


class End(BaseException):
    pass


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Starts a service in a thread; it ends by what it is sent last."""
    running: list[tuple[Path, threading.Thread]] = []

    def start(member: Answers, *, peers: frozenset[int] = ME, name: str = "s") -> Path:
        path = tmp_path / name / "site.sock"
        up: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                serve({path: Ending(member)}, peers=peers | ME, ready=lambda: up.put(None))
            except End:
                pass
            except BaseException as error:
                up.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        error = up.get(timeout=10)
        if error is not None:
            raise error
        running.append((path, thread))
        return path

    class Ending(Answers):
        def __init__(self, inner: Answers) -> None:
            self.inner = inner

        def handle(self, data: bytes) -> bytes:
            if data == b"end":
                raise End
            return self.inner.handle(data)

    yield start
    for path, thread in running:
        if path.exists():
            ended(path, thread)


def ended(path: Path, thread: threading.Thread | None = None) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        send(peer, Kind.REQUEST, b"end")
        deadline = time.monotonic() + 5
        while path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    if thread is not None:
        thread.join(timeout=5)


def test_a_request_is_answered_with_the_members_own_bytes(started: Callable[..., Path]) -> None:
    assert ask(started(Stand()), b"x" * 3_000_000) == b"to " + b"x" * 3_000_000


def test_requests_that_come_together_are_answered_one_after_another(started: Callable[..., Path]) -> None:
    def slowly(data: bytes) -> bytes:
        time.sleep(0.05)
        return data

    member = Stand(slowly)
    path = started(member)
    found: list[bytes | Code] = []
    threads = [threading.Thread(target=lambda n=n: found.append(ask(path, b"%d" % n))) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(b"%d" % n for n in range(12))
    assert member.most == 1


@pytest.mark.parametrize(
    "error, code",
    [
        (UnacceptedError(SECRET), Code.CONTRACT),
        (RefusedError(SECRET), Code.REFUSED),
        (StoreError(SECRET), Code.STORAGE),
        (RewardError(SECRET), Code.FAILED),
        (FedPactError(SECRET), Code.FAILED),
    ],
)
def test_an_error_leaves_as_a_code_and_its_text_stays(
    started: Callable[..., Path], capsys: pytest.CaptureFixture[str], error: FedPactError, code: Code
) -> None:
    def fails(data: bytes) -> bytes:
        raise error

    path = started(Stand(fails))
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        send(peer, Kind.REQUEST, b"x")
        assert receive(peer) == (Kind.FAILURE, code.encode())
        assert peer.recv(1) == b"", "nothing beside the code"
    assert SECRET in capsys.readouterr().out


def test_a_user_who_is_not_a_peer_gets_a_code_and_no_member(started: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "other" / "site.sock"
    member, up = Stand(), threading.Event()
    work = {"target": lambda: serve({path: member}, peers=frozenset({os.getuid() + 1}), ready=up.set), "daemon": True}
    threading.Thread(**work).start()
    up.wait(10)
    assert ask(path, b"x", patience_s=0) == Code.NOT_ALLOWED
    assert ask(path, b"x" * 5_000_000, patience_s=0) == Code.NOT_ALLOWED, "also where it could not send all of it"
    assert member.most == 0


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        HEAD.pack(b"FPS0", Kind.REQUEST, 1) + b"x",
        HEAD.pack(MAGIC, 9, 1) + b"x",
        HEAD.pack(MAGIC, Kind.ANSWER, 1) + b"x",
        HEAD.pack(MAGIC, Kind.REQUEST, 2**63) + b"x",
    ],
    ids=["another protocol", "magic", "kind", "no request", "length"],
)
def test_what_is_no_request_is_refused_and_the_next_one_answered(started: Callable[..., Path], sent: bytes) -> None:
    member = Stand()
    path = started(member)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        peer.sendall(sent)
        assert receive(peer) == (Kind.FAILURE, Code.MALFORMED.encode())
    assert member.most == 0
    assert ask(path, b"y") == b"to y"


def test_peers_that_go_away_or_never_speak_hold_up_nobody(started: Callable[..., Path]) -> None:
    path = started(Stand())
    silent = [socket.socket(socket.AF_UNIX) for _ in range(7)]
    for peer in silent:
        peer.connect(str(path))
    with socket.socket(socket.AF_UNIX) as gone:
        gone.connect(str(path))
        gone.sendall(HEAD.pack(MAGIC, Kind.REQUEST, 100) + b"half")
    assert ask(path, b"y") == b"to y"
    for peer in silent:
        peer.close()


def test_who_asks_waits_for_a_service_that_is_being_started(started: Callable[..., Path], tmp_path: Path) -> None:
    found: list[bytes | Code] = []
    thread = threading.Thread(target=lambda: found.append(ask(tmp_path / "s" / "site.sock", b"x", patience_s=10)))
    thread.start()
    time.sleep(0.3)
    started(Stand())
    thread.join()
    assert found == [b"to x"]


DIES = """
import os, sys
from pathlib import Path
from fedpact.edge.service import serve

class Dies:
    def handle(self, data):
        os._exit(9)

serve({Path(sys.argv[1]): Dies()}, peers=frozenset({os.getuid()}))
"""


def test_a_service_that_dies_at_work_is_asked_again_when_it_is_back(
    started: Callable[..., Path], tmp_path: Path
) -> None:
    first = subprocess.Popen([sys.executable, "-c", DIES, tmp_path / "s" / "site.sock"])
    found: list[bytes | Code] = []
    thread = threading.Thread(target=lambda: found.append(ask(tmp_path / "s" / "site.sock", b"x", patience_s=60)))
    thread.start()
    assert first.wait(60) == 9
    started(Stand(lambda data: b"the stored answer"))
    thread.join()
    assert found == [b"the stored answer"]


def test_patience_ends(tmp_path: Path) -> None:
    assert ask(tmp_path / "nobody.sock", b"x", patience_s=0.3) == Code.UNAVAILABLE


def test_the_socket_is_for_the_user_and_the_folders_group_and_goes_with_the_service(
    started: Callable[..., Path],
) -> None:
    path = started(Stand())
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
    ended(path)
    assert not path.exists()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o751])
def test_a_folder_that_others_can_enter_or_its_group_change_is_refused(
    started: Callable[..., Path], tmp_path: Path, mode: int
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(mode)
    with pytest.raises(ConfigError, match="chmod 0750"):
        started(Stand())


def test_a_second_service_on_one_socket_is_refused_and_the_first_stays(started: Callable[..., Path]) -> None:
    path = started(Stand())
    with pytest.raises(ConfigError, match="another site service listens here"):
        started(Stand())
    assert ask(path, b"x") == b"to x"


def test_a_dead_services_socket_is_taken_over(started: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o750)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s" / "site.sock"))
    assert ask(started(Stand()), b"x") == b"to x"


@pytest.mark.parametrize("error", [MemoryError(SECRET), ZeroDivisionError(SECRET), RecursionError(SECRET)])
def test_what_nobody_thought_of_costs_one_request_and_the_next_one_is_answered(
    started: Callable[..., Path], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fails(data: bytes) -> bytes:
        if data == b"big":
            raise error
        return data

    path = started(Stand(fails))
    assert said(path, b"big") == (Kind.FAILURE, b"failed")
    assert said(path, b"next") == (Kind.ANSWER, b"next")
    shown = capsys.readouterr().out
    assert f"internal error ({type(error).__name__})" in shown and SECRET not in shown


def said(path: Path, data: bytes) -> tuple[Kind, bytes]:
    """What comes back for one request, asked once."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(5)
        peer.connect(str(path))
        send(peer, Kind.REQUEST, data)
        return receive(peer)


def trickle(peer: socket.socket) -> None:
    """Announces 1000 bytes and sends one every 20 ms for 3 s, until it is not heard any more."""
    with peer, suppress(OSError):
        peer.sendall(HEAD.pack(MAGIC, Kind.REQUEST, 1000))
        for _ in range(150):
            peer.sendall(b"x")
            time.sleep(0.02)


def test_a_frame_that_trickles_is_cut_off() -> None:
    ours, theirs = socket.socketpair()
    threading.Thread(target=trickle, args=(theirs,), daemon=True).start()
    with ours:
        ours.settimeout(5)  # no single pause is as long
        with pytest.raises(BrokenFrameError, match="of 1000 bytes came in the time for all"):
            receive(ours, within_s=0.1)


def test_a_frame_in_time_is_whole() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(theirs, Kind.REQUEST, b"x" * 100)
        assert receive(ours, within_s=5) == (Kind.REQUEST, b"x" * 100)


def test_a_peer_that_trickles_is_told_so_by_the_service(
    started: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_REQUEST_S", 0.1)
    path = started(Stand())
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        peer.settimeout(2)
        threading.Thread(target=trickle, args=(peer.dup(),), daemon=True).start()
        assert receive(peer) == (Kind.FAILURE, b"malformed")


def test_a_folder_that_is_a_link_is_refused(started: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o750)
    (tmp_path / "real").chmod(0o750)
    (tmp_path / "s").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="must be this user's own"):
        started(Stand())
    assert list((tmp_path / "real").iterdir()) == []


def falling(path: Path, most: int) -> list[bytes]:
    """A service that goes under every request, and after `most` of them for good; the requests that it has read."""
    read: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def work() -> None:
        with listener:
            for _ in range(most):
                peer, _ = listener.accept()
                with peer:
                    read.append(receive(peer)[1])

    threading.Thread(target=work, daemon=True).start()
    return read


def test_a_request_under_which_the_service_falls_8_times_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 20))
    read = falling(tmp_path / "site.sock", 12)
    assert ask(tmp_path / "site.sock", b"poison", patience_s=0.1) == Code.UNAVAILABLE
    assert read == [b"poison"] * 8
