"""Processes with a user, a log and a group each, that can be killed, started again and waited for."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CHATTER = "INFO:     "
"""How lines of the HTTP server in SuperNodes begin: they explain nothing."""
_GUARD = """
import os, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, 9)
    except OSError:
        pass
"""


class LoopbackError(RuntimeError):
    """A part that did not do what it should; one line, with the end of its log."""


class Guard:
    """A process that outlives us if we are killed, and then ends every group that we have started and not ended."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _GUARD]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True)

    def note(self, line: str) -> None:
        """`+` or `-`, and a group's number."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """We live: nothing is left to end."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True)
class User:
    """As whom a process runs; `home` is its home folder. Without a `uid`, as we do."""

    home: Path
    uid: int | None = None
    groups: tuple[int, ...] = ()

    def run_as(self) -> dict[str, Any]:
        return {} if self.uid is None else {"user": self.uid, "group": self.uid, "extra_groups": self.groups}

    def own(self, *paths: Path, group: int | None = None) -> None:
        """Gives files and folders, with everything below, to this user."""
        if self.uid is not None:
            for path in [below for top in paths for below in (top, *top.rglob("*"))]:
                os.chown(path, self.uid, self.uid if group is None else group, follow_symlinks=False)


@dataclass
class Part:
    """One process, with those that it starts, and its log, to which every start adds. Each is a process group."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    user: User
    log: Path
    guard: Guard
    process: subprocess.Popen[bytes] | None = None

    def start(self, **env: str) -> Self:
        """Starts it, with these variables too."""
        if self.running:
            raise LoopbackError(f"{self.name}: runs already")
        self.reap()  # what a killed one has left
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env={**self.env, **env},
                cwd=self.user.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self.user.run_as(),
            )
        self.guard.note(f"+{self.process.pid}")
        return self

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self, with_signal: int = signal.SIGKILL, *, command: str | None = None) -> None:
        """Sends a signal to this process; or to those of its group whose command line has `command` in it.

        Of SIGKILL it waits for this process to be gone; those that it has started may live on.
        """
        if command is None and self.process is not None:
            self.process.send_signal(with_signal)
            if with_signal == signal.SIGKILL:
                self.process.wait()
        for pid in self.pids(command) if command is not None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, with_signal)

    def stop(self, timeout_s: float = 10.0) -> int:
        """Ends it with SIGTERM: its exit status."""
        self.kill(signal.SIGTERM)
        return self.reap(timeout_s)

    def reap(self, timeout_s: float = 10.0) -> int:
        """Waits for its end, and after `timeout_s` no longer; what is left of its group is killed. Its exit status."""
        if self.process is None:
            return 0
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self.guard.note(f"-{self.process.pid}")
        return status

    def pids(self, command: str) -> list[int]:
        """The processes of this group whose command line contains `command`."""
        group, found = self.process.pid if self.process else 0, []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.getpgid(int(entry.name)) == group and command.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return found

    def text(self) -> str:
        """Its log."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait(self, ready: Callable[[], object], what: str, timeout_s: float = 60.0, poll_s: float = 0.1) -> float:
        """Waits until `ready()`, seconds. Raises LoopbackError if it ends before, or `timeout_s` are over."""
        began = time.monotonic()
        while not ready():
            took = time.monotonic() - began
            if not self.running or took > timeout_s:
                raise self.failure(f"not {what} within {timeout_s:g} s")
            time.sleep(poll_s)
        return time.monotonic() - began

    def failure(self, what: str) -> LoopbackError:
        """The error that says `what`, how the process ended if it did, and what its log says last."""
        status = None if self.process is None else self.process.poll()
        ended = "" if self.running else " (not started)" if status is None else f" (it ended with {status})"
        lines = [line.strip() for line in _COLOUR.sub("", self.text()).splitlines() if not line.startswith(_CHATTER)]
        tail = " | ".join(line for line in lines if line)
        return LoopbackError(f"{self.name}: {what}{ended}; {self.log} ends: {tail[-900:]}")


def shared_python(folder: Path, stranger: User, env: Mapping[str, str]) -> str | None:
    """A Python with which another user can run all this in `folder`: ours, or else the system's; None if neither."""
    program = "import sys, os, cryptography.hazmat.bindings._rust, fedpact, flwr, numpy; print(os.listdir(sys.argv[1]))"
    system = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/local/bin:/usr/bin")
    for python in (sys.executable, system):
        with suppress(OSError, subprocess.SubprocessError):
            if python is not None:
                command = [python, "-c", program, str(folder / "bin")]
                subprocess.run(command, check=True, capture_output=True, env=env, timeout=60, **stranger.run_as())
                return python
    return None


def import_path() -> str:
    """Where fedpact, its Flower app and the installed packages lie, whichever Python asks: PYTHONPATH."""
    found = [find_spec(name) for name in ("fedpact", "fedpact_app", "flwr", "torch")]
    return os.pathsep.join(dict.fromkeys(str(Path(one.origin).parents[1]) for one in found if one and one.origin))


def write_commands(folder: Path, python: str) -> None:
    """The commands of FedPact and Flower, for a Python that need not be that of their environment."""
    for entry in (one for name in ("fedpact", "flwr") for one in distribution(name).entry_points):
        if entry.group == "console_scripts":
            text = f"from {entry.module} import {entry.attr} as main\nimport sys\nsys.exit(main())\n"
            path = folder / entry.name
            path.write_text(f"#!/bin/sh\n'''exec' {shlex.quote(python)} \"$0\" \"$@\"\n' '''\n{text}", encoding="utf-8")
            path.chmod(0o755)
