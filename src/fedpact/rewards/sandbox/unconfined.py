"""No jail: for a machine that has none and whose owner says so. Nothing here stops a program from doing anything."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import IO

from fedpact.rewards.sandbox.interpreter import ENVIRONMENT, FLAGS
from fedpact.rewards.sandbox.jail import Limits


@dataclass(frozen=True, slots=True)
class Unconfined:
    """Bare interpreters with an empty environment."""

    name: str = "unsafe-none"

    def start(self, program: str, limits: Limits) -> _Process:
        command = [sys.executable, *FLAGS, "-c", program]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=ENVIRONMENT,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        return _Process(process.stdin, process.stdout, process)


@dataclass(frozen=True, slots=True)
class _Process:
    stdin: IO[bytes]
    stdout: IO[bytes]
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()
