"""What surrounds a jail while it is attacked: things worth stealing, someone to hurt, and eyes outside."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from fedpact.rewards.sandbox.interpreter import interpreter
from fedpact.rewards.sandbox.jail import Confined, Limits

CANARY = "FEDPACT_CANARY"
_VICTIM = """
import os, sys, time, signal
token = bytearray(os.environ["FEDPACT_CANARY"].encode().ljust(64, b"."))
import _ctypes
class B(_ctypes._SimpleCData):
    _type_ = "c"
class A(_ctypes.Array):
    _type_, _length_ = B, 64
print(_ctypes.addressof(A.from_buffer(token)), flush=True)
time.sleep(60)
"""
# perf_event_open, userfaultfd, bpf, inotify_init1, timerfd_create, fsopen, io_uring_setup, landlock_create_ruleset
_RARE_CALLS = {"x86_64": (298, 323, 321, 294, 283, 430, 425, 444), "aarch64": (241, 282, 280, 26, 85, 430, 425, 444)}
_ADD_KEY = {"x86_64": 248, "aarch64": 217}


def _text(pid: int, name: str) -> str:
    """A file of /proc, empty where the process is gone."""
    try:
        return Path("/proc", str(pid), name).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def field(pid: int, name: str) -> int:
    """A number of /proc/PID/status (sizes in kB); 0 where the process is gone."""
    lines = [line for line in _text(pid, "status").splitlines() if line.startswith(f"{name}:")]
    return int(lines[0].split()[1]) if lines else 0


def state(pid: int) -> str:
    """The letter of the process's state, empty where it is gone."""
    return _text(pid, "stat").rpartition(")")[2].strip()[:1]


def links(pid: int) -> list[str]:
    """What the open descriptors of a process stand for. Raises PermissionError where we may not see them."""
    folder = Path("/proc", str(pid), "fd")
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in folder.iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.append(str(entry.readlink()))
    return found


class Trace:
    """One attacked process, seen from outside."""

    def __init__(self, confined: Confined) -> None:
        self.pid, self.stdout, self.output = confined.pid, confined.stdout, b""
        self.first_namespace = self.namespace()

    def namespace(self) -> str:
        try:
            return str(Path("/proc", str(self.pid), "ns/user").readlink())
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def cpu_seconds(self) -> float:
        fields = _text(self.pid, "stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


class Scene:
    """Files, listeners, a terminal, a descriptor and a process, all ours and all taken away at the end.

    Whoever is to be attacked is started inside the `with`: the token is then in this process's environment too.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.token, self.mark = secrets.token_hex(16), f"fedpact-jail-{secrets.token_hex(8)}"

    def __enter__(self) -> Scene:
        self.folder = tempfile.mkdtemp(prefix="fedpact-jail-")
        Path(self.folder, "private").write_text(self.token)
        Path(self.folder, self.token).mkdir()
        tcp, udp, unix, abstract = (socket.socket(f, k) for f, k in ((2, 1), (2, 2), (1, 1), (1, 1)))
        tcp.bind(("127.0.0.1", 0))
        udp.bind(("127.0.0.1", 0))
        unix.bind(f"{self.folder}/listening")
        abstract.bind(f"\0{self.mark}")
        self._sockets = {"tcp": tcp, "udp": udp, "unix": unix, "abstract": abstract}
        for name, listener in self._sockets.items():
            listener.setblocking(False)
            if name != "udp":
                listener.listen()
        self._terminal = os.openpty()
        os.set_blocking(self._terminal[0], False)
        self._pipe = os.pipe()
        os.set_inheritable(self._pipe[0], True)
        os.write(self._pipe[1], self.token.encode())
        command = [interpreter().path, "-I", "-S", "-B", "-c", _VICTIM]
        self.victim = subprocess.Popen(command, env={CANARY: self.token}, stdout=subprocess.PIPE, process_group=0)
        assert self.victim.stdout is not None
        self._address = int(self.victim.stdout.readline())
        os.environ[CANARY] = self.token
        self._first = self._snapshot()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.environ.pop(CANARY, None)
        for pid in (*self.processes(), *self._executed()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.victim.kill()
        self.victim.wait()
        assert self.victim.stdout is not None
        self.victim.stdout.close()
        for listener in self._sockets.values():
            listener.close()
        for fd in (*self._terminal, *self._pipe):
            os.close(fd)
        shutil.rmtree(self.folder, ignore_errors=True)
        for stray in (Path("/dev/shm"), Path(tempfile.gettempdir()), Path.home(), Path("/")):
            with contextlib.suppress(OSError):
                (stray / self.mark).unlink()

    def facts(self) -> str:
        """Assignments for the head of an attack: where everything is, never the token."""
        machine = platform.machine()
        known = {
            "FOLDER": self.folder, "MARK": self.mark, "VICTIM": self.victim.pid, "ADDRESS": self._address,
            "TCP": self._sockets["tcp"].getsockname()[1], "UDP": self._sockets["udp"].getsockname()[1],
            "TERMINAL": os.ttyname(self._terminal[1]), "RARE_CALLS": _RARE_CALLS.get(machine, ()),
            "ADD_KEY": _ADD_KEY.get(machine, -1),
        }  # fmt: skip
        return "".join(f"{name} = {value!r}\n" for name, value in known.items())

    def processes(self) -> list[int]:
        """Every process whose command line bears our mark: the jailed program, its wrapper, whatever it forked."""
        return [pid for pid, line in _command_lines() if self.mark in line and f"executed-{self.mark}" not in line]

    def others(self, pid: int) -> list[int]:
        """The same without the jailed program and its wrapper."""
        return [p for p in self.processes() if p not in (pid, field(pid, "PPid"))]

    def executed(self) -> bool:
        """Whether a program runs that only an attack would have executed."""
        return bool(self._executed())

    def _executed(self) -> list[int]:
        return [pid for pid, line in _command_lines() if line.split("\0")[-2:-1] == [f"executed-{self.mark}"]]

    def reached(self, name: str) -> bool:
        """Whether anything arrived at the listener `name` or at the terminal."""
        try:
            if name == "terminal":
                return bool(os.read(self._terminal[0], 10))
            if name == "udp":
                return bool(self._sockets["udp"].recv(10))
            self._sockets[name].accept()[0].close()
            return True
        except BlockingIOError:
            return False

    def changed(self) -> bool:
        """Whether anything in our folder, or a file of ours anywhere an attack tries, is not as it was."""
        strays = (Path(tempfile.gettempdir()), Path.home(), Path("/"))
        return self._snapshot() != self._first or any((stray / self.mark).exists() for stray in strays)

    def victim_died(self) -> bool:
        """Whether the victim is gone, a signal being given a moment to arrive."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.victim.wait(timeout=0.15)
        return self.victim.returncode is not None

    def kernel_keys(self) -> str:
        """The kernel's keys that we can see, empty where there is no such list."""
        try:
            return Path("/proc/keys").read_text()
        except FileNotFoundError:
            return ""

    def _snapshot(self) -> list[tuple[str, int, int, int]]:
        found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(self.folder)]
        return sorted((name, stat.st_mode, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def _command_lines() -> list[tuple[int, str]]:
    """(pid, command line with NUL between its words) of every process we can see; zombies have none."""
    return [(int(name), _text(int(name), "cmdline")) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
