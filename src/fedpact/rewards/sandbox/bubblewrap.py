"""Jail by `bwrap`: namespaces of its own, nothing mounted but the interpreter, a system-call filter from the start.

bwrap is given an empty environment because its own process inside the namespace would keep the caller's, where
`--clearenv` does not reach. It limits neither memory nor processor time, so the interpreter limits itself before it
reads a byte of what it is given.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from typing import IO

from fedpact.rewards.sandbox import syscalls
from fedpact.rewards.sandbox.interpreter import ENVIRONMENT, Interpreter, from_lasting_thread, interpreter
from fedpact.rewards.sandbox.jail import Jail, Limits


def found() -> Jail | None:
    """The jail where bwrap is on PATH."""
    program = shutil.which("bwrap")
    return Bubblewrap(program) if program else None


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """Interpreters in namespaces of their own; `program` is the path of bwrap."""

    program: str

    @property
    def name(self) -> str:
        return "bubblewrap"

    def start(self, program: str, limits: Limits) -> _Wrapped:
        return from_lasting_thread(lambda: self._start(interpreter().command(program, limits)))

    def _start(self, command: list[str]) -> _Wrapped:
        filter_fd, (told_fd, telling_fd) = _holding(syscalls.assemble(while_starting=True)), os.pipe()
        given = ["--seccomp", str(filter_fd), "--info-fd", str(telling_fd), "--", *command]
        with os.fdopen(told_fd, "rb") as told:
            try:
                process = subprocess.Popen(
                    [self.program, *_view(interpreter()), *given],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    bufsize=0, env=ENVIRONMENT,
                    # A group of its own: Ctrl-C is for the caller, who then ends it.
                    cwd="/", process_group=0, pass_fds=[filter_fd, telling_fd],
                )  # fmt: skip
            finally:
                os.close(filter_fd)
                os.close(telling_fd)
            text = told.read()  # to its end: bwrap closes it once the namespaces stand
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pid = int(json.loads(text)["child-pid"])
            return _Wrapped(process.stdin, process.stdout, pid, os.pidfd_open(pid), process)
        except (ValueError, KeyError, ProcessLookupError):
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
            raise OSError(f"bwrap did not start ({self._complaint()})") from None

    def _complaint(self) -> str:
        """What bwrap says when asked to run the interpreter without a filter."""
        command = [self.program, *_view(interpreter()), "--", interpreter().path, "-I", "-S", "-B", "-c", "pass"]
        done = subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, timeout=10, check=False)
        return (done.stderr.strip().splitlines() or ["no message"])[-1]


@dataclass(slots=True)
class _Wrapped:
    """The interpreter, which is process 1 of its namespace, and the bwrap outside that waits for it."""

    stdin: IO[bytes]
    stdout: IO[bytes]
    pid: int
    _pidfd: int
    _outside: subprocess.Popen[bytes]

    def kill(self) -> None:
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        try:
            self._outside.wait(timeout=5.0)  # it reaps the interpreter and ends
        except subprocess.TimeoutExpired:
            self._outside.kill()
            self._outside.wait()
        os.close(self._pidfd)
        self._pidfd = -1
        self.stdin.close()
        self.stdout.close()


@functools.cache
def _view(python: Interpreter) -> tuple[str, ...]:
    """bwrap's options: what is unshared and the few files that exist inside."""
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    for name, target in python.links:
        options += ["--symlink", target, name]
    options += ["--ro-bind", python.path, python.path, "--ro-bind", python.library, python.library]
    for name, file in python.objects:
        options += ["--ro-bind", file, name]
    for folder in python.hidden:
        options += ["--tmpfs", folder, "--remount-ro", folder]
    return (*options, "--remount-ro", "/", "--chdir", "/")


def _holding(content: bytes) -> int:
    """A descriptor from which `content`, smaller than a pipe, can be read to its end."""
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    return reading
