"""Where generated code runs: a fresh interpreter that can read its own standard library and talk over two pipes.

A jail starts *our* program; hostile text reaches that program later, over its stdin, and is confined from the first
instruction of the interpreter on: empty environment, no network, no written file, no file of the member's read, no new
process, no signal to another, and limits of memory, processor time and wall clock. Confinement says nothing about the
verdict: a program that shares a process with its tests can award itself a reward in any jail.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import IO, Protocol

from fedpact.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """What one confined interpreter may use before it is killed."""

    seconds: float = 10.0  # wall clock from the start, enforced from outside
    cpu_seconds: int = 10
    memory_mb: int = 512
    output_bytes: int = 65536  # nobody reads more than this of one message


class Confined(Protocol):
    """A running interpreter: raw, unbuffered pipes to it and from it."""

    @property
    def stdin(self) -> IO[bytes]: ...
    @property
    def stdout(self) -> IO[bytes]: ...
    @property
    def pid(self) -> int: ...
    def kill(self) -> None:
        """Kill everything inside, reap it and close both pipes. A second call does nothing."""


class Jail(Protocol):
    """One way to confine."""

    @property
    def name(self) -> str: ...
    def start(self, program: str, limits: Limits) -> Confined:
        """A fresh Python (`interpreter.FLAGS`) that runs `program`, confined; it must end when its stdin does.

        It is confined by the time it has printed something: send hostile text only then. `program` has no
        `__future__` import. Raises OSError where it cannot be started.
        """


def available_jails() -> list[Jail]:
    """The back ends whose package or program is installed, preferred first; none of them tried yet.

    bubblewrap first: it starts as fast from a large process as from a small one, and hides even that a file exists.
    """
    from fedpact.rewards.sandbox import bubblewrap, sandlocked

    return [jail for jail in (bubblewrap.found(), sandlocked.found()) if jail is not None]


@functools.cache
def chosen_jail() -> Jail:
    """The first back end that stops every attack and still runs a correct program; tried once in a process.

    Raises ConfigError, in one line, where none does.
    """
    from fedpact.rewards.sandbox.selftest import self_test

    refused = []
    for jail in available_jails():
        report = self_test(jail)
        if report.passed:
            return jail
        refused.append(f"{jail.name} failed {', '.join(report.failures)}")
    raise ConfigError(
        f"code rewards: no sandbox on this machine holds ({'; '.join(refused) or 'none installed'}); "
        "install bubblewrap (the system's package) or sandlock (pip install sandlock, Linux 6.12 or later)"
    )
