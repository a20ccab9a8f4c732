"""A whole federation on one machine: a SuperLink, and members with their sites and front ends, each a process.

Run by root, every member's site and its front end are users of their own, by number, without an entry in any file;
otherwise, or where other users reach no Python that has everything, all is one user's and `Federation.reason` says why.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedpact.edge.submission import SWITCHES
from scripts.certificates import write_certificates, write_node_key
from scripts.processes import Guard, LoopbackError, Part, User, import_path, shared_python, write_commands

LINK = "loopback"
"""The SuperLink's name in Flower's configuration, which lies in `Federation.env["FLWR_HOME"]`."""
_FIRST_UID = 61_000 + 64 * (os.getpid() % 60)
"""Two numbers from here on for each member; below those that systemd hands out. Two federations at
once have others, but for one case in 60."""


@dataclass(frozen=True)
class Member:
    """A member: its folders, its users, and the parts that it may start: `site`, and `link` or `supernode`."""

    name: str
    client: Path
    """Its client file."""
    socket: Path
    key: Path
    """Its SuperNode key; the public one lies beside it with .pub."""
    node_id: str
    site: Part
    link: Part
    supernode: Part

    @property
    def front(self) -> Part:
        """What stands between its site and the SuperLink: the link, unless the SuperNode was started alone."""
        return self.supernode if self.supernode.running or self.link.process is None else self.link

    def listens(self) -> bool:
        """Whether its service's socket is open; nobody connects to find out."""
        lines = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
        return any(line.endswith(f" {self.socket}") and " 00010000 " in line for line in lines)

    def serve(self, timeout_s: float = 120.0, **env: str) -> float:
        """Starts its site and waits until it listens: seconds."""
        return self.site.start(**env).wait(self.listens, "listening", timeout_s)


@dataclass
class Federation:
    """A SuperLink, its SuperExec and members. `folder` is new or empty; leaving the context ends every process."""

    folder: Path
    project: Path
    """FEDPACT_FOLDER of the ServerApp: run files, and runs/."""
    members: dict[str, Member] = field(default_factory=dict)
    separate: bool = False
    """Whether members run as users of their own."""
    reason: str = ""
    """Why they do not."""

    def __enter__(self) -> Self:
        self.folder = self.folder.resolve()
        for name, mode in {".": 0o711, "bin": 0o755, "tls": 0o711, "logs": 0o700, "server": 0o700}.items():
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name).chmod(mode)
        self._parts: list[Part] = []
        python = self._python()
        write_commands(self.folder / "bin", python)
        self._guard = Guard()
        write_certificates(self.folder / "tls")
        self.ca, self.address = self.folder / "tls" / "ca.crt", f"127.0.0.1:{free_port()}"
        user = User(self.folder / "server")
        self.env = self.env_of(user)
        (user.home / "flwr").mkdir(exist_ok=True)
        connection = f"address = {json.dumps(self.address)}\nroot-certificates = {json.dumps(str(self.ca))}\n"
        text = f"[superlink]\ndefault = {json.dumps(LINK)}\n\n[superlink.{LINK}]\n{connection}"
        (user.home / "flwr" / "config.toml").write_text(text, encoding="utf-8")
        tls, secret = self.folder / "tls", user.home / "superexec.secret"
        secret.touch(mode=0o600)
        secret.write_bytes(os.urandom(32))
        command = ["flower-superlink", "--isolation", "process", "--enable-supernode-auth"]
        command += ["--disable-runtime-dependency-installation", "--host", "127.0.0.1"]
        command += ["--port", self.address.rpartition(":")[2], "--database", str(user.home / "link.db")]
        command += ["--superexec-auth-secret-file", str(secret), "--ssl-ca-certfile", str(self.ca)]
        command += ["--ssl-certfile", str(tls / "server.crt"), "--ssl-keyfile", str(tls / "server.key")]
        self.superlink = self.part("superlink", command, user)
        command = ["flower-superexec", "--runtime-api-address", self.address, "--root-certificates", str(self.ca)]
        command += ["--superexec-auth-secret-file", str(secret)]
        self.superexec = self.part("superexec", command, user, {"FEDPACT_FOLDER": str(self.project.resolve())})
        return self

    def __exit__(self, *_: object) -> None:
        for parts in ([one for one in self._parts if one is not self.superlink], [self.superlink]):
            for part in parts:
                part.kill(signal.SIGTERM)  # all at once: each takes its time
            for part in parts:
                part.reap()
        self._guard.close()

    def open(self, timeout_s: float = 60.0) -> float:
        """Starts SuperLink and SuperExec, whichever does not run, and waits until the former listens: seconds."""
        for part in (self.superlink, self.superexec):  # the second tries until the first is there
            if not part.running:
                part.start()
        return self.superlink.wait(lambda: _accepts(self.address), "listening", timeout_s)

    def join(self, name: str, write: Callable[[Path, str], Path], *, register: bool = True) -> Member:
        """A new member, registered under its name; nothing of it runs yet.

        `write(folder, service)` writes the site's files into a folder that is closed to others, and returns its client
        file's path; `service` is that file's [service] table.
        """
        top, number = self.folder / name, 2 * len(self.members)
        site, node, place = top / "site", top / "node", top / "socket" / "s"
        for folder, mode in {top: 0o711, site: 0o700, node: 0o700, place.parent: 0o750}.items():
            folder.mkdir()
            folder.chmod(mode)
        pair: list[User] = [User(site), User(node)]
        if self.separate:
            pair = [User(site, _FIRST_UID + number, (_FIRST_UID + number + 1,)), User(node, _FIRST_UID + number + 1)]
        uids = [] if pair[1].uid is None else [str(pair[1].uid)]
        about = {"home": str(site / "home"), "socket": str(place), "peers": uids, "num_threads": 1}
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in about.items())
        client, key = write(site, "[service]\n" + "".join(lines)), node / "node_key"
        write_node_key(key)
        pair[0].own(site)
        pair[0].own(place.parent, group=pair[1].uid)
        pair[1].own(node)
        node_id = self.register(name, key.with_suffix(".pub")) if register else ""
        reach = ["--superlink", self.address, "--root-certificates", str(self.ca)]
        link = ["fedpact", "site", "connect", *reach, "--key", str(key), "--socket", str(place)]
        config = ["--node-config", f"site-socket={json.dumps(str(place))}", "--port", str(free_port())]
        supernode = ["flower-supernode", *reach, "--auth-supernode-private-key", str(key), *config]
        self.members[name] = Member(
            name,
            client,
            place,
            key,
            node_id,
            site=self.part(f"{name}-site", ["fedpact", "site", "serve", str(client)], pair[0]),
            link=self.part(f"{name}-link", link, pair[1]),
            supernode=self.part(f"{name}-supernode", supernode, pair[1]),
        )
        return self.members[name]

    def register(self, name: str, public_key: Path) -> str:
        """Registers a SuperNode's public key under a member's name: the node's id."""
        return str(self.flwr("supernode", "register", str(public_key), LINK, "--name", name)["node-id"])

    def online(self) -> set[str]:
        """The members whose nodes the SuperLink takes for online: after kill -9 for up to a minute too."""
        nodes = self.flwr("supernode", "list", LINK)["nodes"]
        up = {node["node-id"] for node in nodes if node["status"] == "online"}
        return {name for name, member in self.members.items() if member.node_id in up}

    def wait_online(self, *names: str, timeout_s: float = 60.0) -> float:
        """Waits until the SuperLink sees these members: seconds."""
        began = time.monotonic()
        while missing := sorted(set(names) - self.online()):
            for front in (self.members[name].front for name in missing):
                if not front.running or time.monotonic() - began > timeout_s:
                    raise front.failure(f"not online within {timeout_s:g} s")
            time.sleep(0.2)
        return time.monotonic() - began

    def flwr(self, *arguments: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """What `flwr ... --format json` prints. Raises LoopbackError if it is no success."""
        code, text = self.run(["flwr", *arguments, "--format", "json"], timeout_s=timeout_s)
        with suppress(ValueError):
            found = json.loads(text[text.index("{") :])
            if isinstance(found, dict) and found.get("success"):
                return found
        raise LoopbackError(f"flwr {' '.join(arguments)}: ended with {code}: {' '.join(text.split())[-900:]}")

    def run(self, command: Sequence[str], user: User | None = None, *, timeout_s: float = 300.0) -> tuple[int, str]:
        """Runs one of the commands to its end, as the server's user unless another is named: status and output."""
        who = user or self.superlink.user
        done = subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            env=self.env_of(who),
            cwd=who.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            **who.run_as(),
        )
        return done.returncode, done.stdout.decode(errors="replace")

    def part(self, name: str, command: Sequence[str], user: User, env: Mapping[str, str] | None = None) -> Part:
        """A process of this federation, not started; it is ended with it. `command` begins with a name in bin/."""
        full = [str(self.folder / "bin" / command[0]), *command[1:]]
        log = self.folder / "logs" / f"{name}.log"
        self._parts.append(Part(name, full, {**self.env_of(user), **(env or {})}, user, log, self._guard))
        return self._parts[-1]

    def env_of(self, user: User) -> dict[str, str]:
        """The whole environment of a process of `user`: nothing of ours is in it."""
        names = {"HOME": str(user.home), "USER": user.home.name, "LOGNAME": user.home.name, "LANG": "C.UTF-8"}
        paths = {"PATH": f"{self.folder / 'bin'}:{os.defpath}", "PYTHONPATH": import_path(), "PYTHONUNBUFFERED": "1"}
        return {**names, **paths, **SWITCHES, "FLWR_HOME": str(user.home / "flwr"), "OMP_NUM_THREADS": "1"}

    def _python(self) -> str:
        """A Python for everybody's commands."""
        stranger = User(self.folder, _FIRST_UID)
        python = shared_python(self.folder, stranger, self.env_of(stranger)) if os.geteuid() == 0 else None
        self.separate = python is not None
        if python is None:
            unable = f"other users reach no Python with these packages, or not {self.folder}"
            self.reason = unable if os.geteuid() == 0 else "not run by root"
        return python or sys.executable


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0
