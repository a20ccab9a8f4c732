"""Jail by the `sandlock` package: Landlock and a list of forbidden system calls, no namespace, no root.

sandlock 0.9 forbids calls by name and by default lets the rest pass, and has no limit of processor time, so the
interpreter puts the same allow-list and limits on itself as under bwrap before it reads a byte of what it is given.
Of two filters the kernel applies the stricter. Stays behind bwrap in preference: it forks this process, which takes
longer the larger this process is, and does not hide that a file exists.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from dataclasses import dataclass
from typing import IO, Any

from fedpact.rewards.sandbox.interpreter import ENVIRONMENT, from_lasting_thread, interpreter
from fedpact.rewards.sandbox.jail import Jail, Limits

# Beyond sandlock's own list. It refuses to forbid what it judges itself (`socket`, `connect`, `fork`, `unlink` and
# their like; no rule of ours allows any of them) and what it starts the interpreter with (`clone`, `execve`).
_FORBIDDEN = (
    "socketpair", "listen", "accept", "accept4", "memfd_create", "memfd_secret", "kill", "tkill", "rt_sigqueueinfo",
    "rt_tgsigqueueinfo", "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "ftruncate", "symlink", "symlinkat",
    "mkdir", "mkdirat", "mknod", "mknodat", "chmod", "fchmod", "fchmodat", "chown", "lchown", "fchown", "fchownat",
    "utimensat", "setpriority", "userfaultfd", "mq_open",
)  # fmt: skip


def found() -> Jail | None:
    """The jail where the package is installed."""
    try:
        return Sandlock() if importlib.util.find_spec("sandlock") else None
    except ValueError:  # hidden on purpose: sys.modules["sandlock"] is None
        return None


@dataclass(frozen=True, slots=True)
class Sandlock:
    """Interpreters that Landlock lets read their own files and nothing else."""

    @property
    def name(self) -> str:
        return "sandlock"

    def start(self, program: str, limits: Limits) -> _Locked:
        return from_lasting_thread(lambda: self._start(interpreter().command(program, limits)))

    def _start(self, command: list[str]) -> _Locked:
        try:
            sandlock: Any = importlib.import_module("sandlock")
        except (ImportError, OSError) as error:
            raise OSError(f"sandlock does not load ({error})") from None
        python, mode = interpreter(), sandlock.StdioMode
        sandbox = sandlock.Sandbox(
            fs_readable=[python.path, python.library, *sorted({file for _, file in python.objects})],
            fs_denied=list(python.hidden),
            extra_deny_syscalls=_FORBIDDEN,
            clean_env=True,
            env=ENVIRONMENT,
            no_coredump=True,
            max_open_files=32,
            max_processes=1,
            cwd="/",
        )
        try:
            process = sandbox.popen(command, stdin=mode.PIPED, stdout=mode.PIPED, stderr=mode.NULL)
        except (RuntimeError, ValueError, sandlock.SandlockError) as error:
            abi, needed = sandlock.landlock_abi_version(), sandlock.min_landlock_abi()
            raise OSError(f"sandlock did not start ({error}; Landlock ABI {abi}, it needs {needed})") from None
        return _Locked(process.stdin, process.stdout, process.pid, process)


@dataclass(slots=True)
class _Locked:
    """The interpreter as sandlock's own process object holds it."""

    stdin: IO[bytes]
    stdout: IO[bytes]
    pid: int
    _process: Any

    def kill(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(OSError):
            process.kill()
        process.wait(timeout=5.0)  # closes stdin, reaps, and ends sandlock's own thread
        for stream in (self.stdin, self.stdout):
            stream.close()
