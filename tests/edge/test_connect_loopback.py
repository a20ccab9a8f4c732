"""The direct link against a real SuperLink on this machine: TLS, node authentication, sqlite."""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedpact[flower]'")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedpact.edge.flower_private import new_key
from fedpact_app import frames

pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]
BIN = Path(sys.executable).parent
LINK = """
import sys
from pathlib import Path
from fedpact.edge.connect import connect
from fedpact.errors import FedPactError
link, site, key, authority = sys.argv[1:]
try:
    connect(link, socket=Path(site), key=Path(key), root_certificates=Path(authority), insecure=False, patience_s=1.0)
except FedPactError as error:
    print(error, flush=True)
    raise SystemExit(error.exit_code)
"""
SERVER_APP = """
import json, os, time
from flwr.app import Message
from flwr.serverapp import ServerApp
from fedpact.edge.flower_private import in_simulation, nodes
from fedpact_app.records import MESSAGE_TYPE, carried, uncarried

app = ServerApp()


@app.main()
def main(grid, context):
    node, = nodes(grid)
    data = bytes(range(256)) * 24000
    kinds = [MESSAGE_TYPE, "query.other"]
    sent = [list(grid.push_messages([Message(carried(data), node.id, kind)]))[0] for kind in kinds]
    found = {}
    while len(found) < len(sent):
        for reply in grid.pull_messages([wanted for wanted in sent if wanted not in found]):
            found[reply.metadata.reply_to_message_id] = uncarried(reply.content)
        time.sleep(0.2)
    report = {
        "name": node.name, "id": node.id, "online": node.online, "activated_at": node.activated_at,
        "in_simulation": in_simulation(grid), "reversed": found[sent[0]] == data[::-1], "other": found[sent[1]],
    }
    with open(os.environ["LOOPBACK_REPORT"], "w") as file:
        json.dump(report, file)
"""
PYPROJECT = """
[project]
name = "loopback"
version = "1.0.0"
[tool.flwr.app]
publisher = "fedpact"
[tool.flwr.app.components]
serverapp = "loopback.server:app"
clientapp = "loopback.client:app"
"""


@dataclass
class Loopback:
    """A SuperLink that may be killed and started again, with what a link needs to reach it."""

    home: Path
    address: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    start: Callable[[], subprocess.Popen[bytes]]

    def flwr(self, *arguments: str | Path) -> str:
        done = subprocess.run(
            [BIN / "flwr", *arguments], env=self.environment, cwd=self.home, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def new_key(self, name: str) -> Path:
        folder = self.home / name
        folder.mkdir()
        new_key(folder / "node")
        return folder / "node"

    def registered_key(self, name: str) -> Path:
        key = self.new_key(name)
        self.flwr("supernode", "register", f"{key}.pub", "loop", "--name", name)
        return key

    def link(self, key: Path, authority: str = "ca.pem") -> subprocess.Popen[str]:
        arguments = [self.address, self.home / "site.sock", key, self.home / authority]
        return subprocess.Popen(
            [sys.executable, "-c", LINK, *map(str, arguments)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    home = tmp_path_factory.mktemp("loop")
    write_certificates(home, "ca.pem", server="server")
    write_certificates(home, "other.pem")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (home / "flwr").mkdir()
    (home / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "loop"\n[superlink.loop]\naddress = "{address}"\n'
        f'root-certificates = "{home / "ca.pem"}"\n'
    )
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "LOOPBACK_REPORT": str(home / "report.json"),
    }

    def start() -> subprocess.Popen[bytes]:
        command: list[str | Path] = [BIN / "flower-superlink", "--host", "127.0.0.1", "--port", address.split(":")[1]]
        command += ["--ssl-ca-certfile", home / "ca.pem", "--ssl-certfile", home / "server.pem"]
        command += ["--ssl-keyfile", home / "server.key", "--enable-supernode-auth", "--database", home / "state.db"]
        with (home / "superlink.log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        wait_for_port(address, process)
        return process

    with site_service(home / "site.sock"):
        loopback = Loopback(home, address, environment, start(), start)
        try:
            yield loopback
        finally:
            end(loopback.process)


@pytest.fixture(scope="module")
def key(loop: Loopback) -> Path:
    return loop.registered_key("north")


def test_a_message_goes_there_and_back_under_the_name_of_the_key(loop: Loopback, key: Path) -> None:
    package = loop.home / "app" / "loopback"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").touch()
    (package / "server.py").write_text(SERVER_APP)
    (package / "client.py").write_text("app = None\nraise SystemExit('a run shipped this')\n")
    with running(loop.link(key)) as link:
        node_id = connected(link)
        run = json.loads(loop.flwr("run", package.parent, "loop", "--format", "json"))
        assert line(link) == (
            f"run {run['run-id']}: sent the failure code malformed: this member took what arrived for no request; "
            "both must run compatible versions"
        )
        report = wait_for_report(loop.home / "report.json")
        assert report.pop("activated_at").startswith("20")
        assert report == {
            "name": "north", "id": node_id, "online": True, "in_simulation": False, "reversed": True,
            "other": "malformed",
        }  # fmt: skip
    log = (loop.home / "superlink.log").read_text()
    assert "[Fleet.PushMessages]" in log
    assert "[Fleet.GetRun]" not in log
    assert "[Fleet.GetFab]" not in log


def test_a_key_that_is_not_registered_is_refused_in_one_line(loop: Loopback) -> None:
    stranger = loop.new_key("stranger")
    with running(loop.link(stranger)) as link:
        text, _ = link.communicate(timeout=30)
    assert text == (
        f"{loop.address}: the SuperLink answered HTTP 412: {stranger} is not registered there "
        f"(`flwr supernode register {stranger}.pub --name NAME` on its side), or its node still counts as active "
        "(stop the other link or SuperNode that uses it, or wait a minute)\n"
    )
    assert link.returncode == 3


def test_a_wrong_certificate_authority_is_refused_in_one_line(loop: Loopback, key: Path) -> None:
    with running(loop.link(key, "other.pem")) as link:
        text, _ = link.communicate(timeout=30)
    assert text.startswith(f"{loop.address}: its certificate is not trusted (")
    assert text.endswith("); --root-certificates must name the authority that signed it\n")
    assert text.count("\n") == 1
    assert link.returncode == 3


def test_a_killed_link_comes_back_at_once_as_the_same_node(loop: Loopback, key: Path) -> None:
    with running(loop.link(key)) as link:
        node_id = connected(link)
        link.kill()
        link.wait()
    with running(loop.link(key)) as link:
        assert connected(link) == node_id


def test_a_link_ended_by_sigterm_comes_back_even_if_it_has_forgotten_its_node_id(loop: Loopback, key: Path) -> None:
    with running(loop.link(key)) as link:
        node_id = connected(link)
        link.terminate()
        assert link.wait(timeout=15) == 0
    key.with_name("node.node").unlink()
    with running(loop.link(key)) as link:
        assert connected(link) == node_id


def test_a_link_outlives_its_superlink_and_ends_when_its_key_is_unregistered(loop: Loopback) -> None:
    key = loop.registered_key("south")
    with running(loop.link(key)) as link:
        node_id = connected(link)
        end(loop.process)
        assert line(link).startswith(f"no connection to {loop.address}; trying until there is one (")
        loop.process = loop.start()
        assert line(link) == f"connected to {loop.address} again as node ID {node_id}"
        loop.flwr("supernode", "unregister", str(node_id), "loop")
        text, _ = link.communicate(timeout=30)
    assert text == f"{loop.address}: the SuperLink no longer knows {key}; register {key}.pub there again\n"
    assert link.returncode == 3


def line(link: subprocess.Popen[str]) -> str:
    assert link.stdout is not None
    return link.stdout.readline().rstrip("\n")


def connected(link: subprocess.Popen[str]) -> int:
    text = line(link)
    assert text.startswith("connected to 127.0.0.1:"), text
    return int(text.split(" as node ID ")[1])


def wait_for_report(path: Path) -> dict[str, object]:
    deadline = time.monotonic() + 30
    while True:
        with suppress(OSError, ValueError):
            return dict(json.loads(path.read_text()))
        assert time.monotonic() < deadline, "the ServerApp wrote no report"
        time.sleep(0.1)


def wait_for_port(address: str, process: subprocess.Popen[bytes]) -> None:
    host, port = address.split(":")
    for _ in range(600):
        assert process.poll() is None, "the SuperLink did not start"
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("the SuperLink does not listen")


@contextmanager
def running(link: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield link
    finally:
        if link.poll() is None:
            link.terminate()
            link.wait(timeout=20)
        if link.stdout is not None:
            link.stdout.close()


def end(superlink: subprocess.Popen[bytes]) -> None:
    """Kills it and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(superlink.pid, signal.SIGKILL)
    superlink.wait()


@contextmanager
def site_service(path: Path) -> Iterator[None]:
    """Answers every request with its bytes in reverse."""

    def serve() -> None:
        with suppress(OSError):
            while True:
                peer, _ = listener.accept()
                with peer:
                    frames.send(peer, frames.Kind.ANSWER, frames.receive(peer)[1][::-1])

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=serve, daemon=True).start()
        yield


def write_certificates(folder: Path, authority: str, *, server: str | None = None) -> None:
    """An authority's certificate in `authority`; if `server` is given, SERVER.pem for 127.0.0.1 and its SERVER.key."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(subject: str, public: ec.EllipticCurvePublicKey, *, is_authority: bool) -> x509.Certificate:
        name = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, authority)]
        builder = x509.CertificateBuilder().subject_name(name[0]).issuer_name(name[1]).public_key(public)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(hours=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        address = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
        return builder.add_extension(address, critical=False).sign(issuer, hashes.SHA256())

    issuer = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    own = certificate(authority, issuer.public_key(), is_authority=True)
    (folder / authority).write_bytes(own.public_bytes(pem))
    if server is not None:
        key = ec.generate_private_key(ec.SECP256R1())
        signed = certificate("server", key.public_key(), is_authority=False)
        (folder / f"{server}.pem").write_bytes(signed.public_bytes(pem))
        plain = serialization.NoEncryption()
        (folder / f"{server}.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
