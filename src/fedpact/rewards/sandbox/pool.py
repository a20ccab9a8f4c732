"""Confined interpreters, started ahead: one for each candidate, and one for each set of tests at a time.

Whoever has seen tests never runs a candidate, and whoever has run a candidate is killed. A process that runs tests
serves further candidates of the same tests, in a fresh namespace each time, as long as nothing unusual has happened.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace

from fedpact.rewards.sandbox.ferry import Channel, FloodError, GoneError, LateError
from fedpact.rewards.sandbox.jail import Jail, Limits
from fedpact.rewards.sandbox.programs import candidate_program, tests_program

START_S = 30.0
_IDLE_S = 3600.0
_MAX_USES = 50


class Pool:
    """Starts processes in `jail`, keeps `size` waiting for candidates, and kills all in `close` or when it is dropped.

    `limits.seconds` are for one candidate, and whoever asks for a channel watches them; a process may wait for an hour.
    Threads may share a pool; a process that is forked off gets one of its own.
    """

    def __init__(self, jail: Jail, limits: Limits, size: int) -> None:
        self._jail, self._limits, self._size = jail, limits, size
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._waiting: dict[str, collections.deque[Channel]] = collections.defaultdict(collections.deque)
        self._tests: list[tuple[str, Channel]] = []
        self._all: set[Channel] = set()
        self._closed = False
        self._finalizer = weakref.finalize(self, _kill_all, self._all, self._owner)

    @contextlib.contextmanager
    def candidate(self) -> Iterator[Channel]:
        """A fresh process for one candidate, killed afterwards. Raises OSError where none can be started."""
        channel = self._fresh(candidate_program(self._limits.output_bytes))
        try:
            yield channel
        finally:
            self._kill(channel)

    @contextlib.contextmanager
    def tests(self, digest: str) -> Iterator[Channel]:
        """A process for the tests of that digest; kept for their next candidate unless the block raises."""
        self._forget_parents()
        with self._lock:
            found = next((pair for pair in self._tests if pair[0] == digest), None)
            if found:
                self._tests.remove(found)
        channel = found[1] if found else self._fresh(tests_program())
        try:
            yield channel
        except BaseException:
            self._kill(channel)
            raise
        spare = []
        with self._lock:
            self._tests.append((digest, channel))
            if channel.uses >= _MAX_USES or self._closed:
                spare.append(self._tests.pop()[1])
            while len(self._tests) > self._size:
                spare.append(self._tests.pop(0)[1])
        for one in spare:
            self._kill(one)

    def close(self) -> None:
        """Kills everything that waits or runs."""
        self._closed = True
        with self._lock:
            self._waiting.clear()
            self._tests.clear()
        _kill_all(self._all, self._owner)

    @property
    def num_processes(self) -> int:
        return len(self._all)

    def _fresh(self, program: str) -> Channel:
        """A process that has said that it is ready and has been told nothing; another one is started ahead."""
        self._forget_parents()
        with self._lock:
            waiting = self._waiting[program]
            channel = waiting.popleft() if waiting else None
        if channel is None or not self._answers(channel):  # one that has waited too long is dead
            channel = self._started(program)
            if not self._answers(channel):
                raise OSError(f"{self._jail.name}: the interpreter ended, or did not answer in {START_S:g} s")
        if len(waiting) < (1 if program == tests_program() else self._size):
            with contextlib.suppress(OSError):  # whoever needs it will try again, and say what is wrong
                ahead = self._started(program)
                with self._lock:
                    waiting.append(ahead)
        return channel

    def _started(self, program: str) -> Channel:
        uses = _MAX_USES if program == tests_program() else 1
        limits = replace(self._limits, seconds=_IDLE_S, cpu_seconds=self._limits.cpu_seconds * uses)
        channel = Channel(self._jail.start(program, limits))
        with self._lock:
            self._all.add(channel)
            closed = self._closed
        if closed:
            self._kill(channel)
            raise OSError("the pool is closed")
        return channel

    def _answers(self, channel: Channel) -> bool:
        try:
            return channel.receive(16, time.monotonic() + START_S) == b"ready"
        except (GoneError, LateError, FloodError):
            self._kill(channel)
            return False

    def _kill(self, channel: Channel) -> None:
        with contextlib.suppress(OSError):
            channel.kill()
        with self._lock:
            self._all.discard(channel)

    def _forget_parents(self) -> None:
        if self._owner != os.getpid():  # a fork must not share the pipes, nor kill its parent's processes
            self._finalizer.detach()
            self.__init__(self._jail, self._limits, self._size)  # type: ignore[misc]


def _kill_all(channels: set[Channel], owner: int) -> None:
    if os.getpid() == owner:
        while channels:
            with contextlib.suppress(OSError, KeyError):
                channels.pop().kill()
