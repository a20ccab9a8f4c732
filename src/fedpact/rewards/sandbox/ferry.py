"""The trusted middle: carries calls from the tests to the candidate and replies back, with a clock and a limit of size.

It reads nothing of what it carries but the length, the nonce and one letter; the process with the tests decodes. A
request's nonce is new and random: a reply that was written before its request was made belongs to none.
"""

from __future__ import annotations

import os
import secrets
import select
import time
from dataclasses import dataclass

from fedpact.rewards.outcome import Outcome
from fedpact.rewards.sandbox.candidate_side import NONCE_BYTES
from fedpact.rewards.sandbox.jail import Confined
from fedpact.rewards.sandbox.task import Grade, Task
from fedpact.rewards.sandbox.tests_side import MAX_REQUEST
from fedpact.rewards.sandbox.wire import NotPlainError, decode, encode, framed

Free = tuple[list[str], list[str]]
"""What `free_names` returns."""
_GONE = "it ended its process, or wrote to our pipe"
_TESTS_S = 10.0
"""For tests to come to their first call."""
_GRACE_S = 1.0
"""For tests that are told that their candidate is gone."""


class GoneError(Exception):
    """The process has ended, or does not keep to the protocol."""


class LateError(Exception):
    """The time is up."""


class FloodError(Exception):
    """More memory or more output than there may be."""


class BrokenTestsError(Exception):
    """The tests failed by no fault of the candidate."""


class Channel:
    """Frames to a confined process and from it, never waiting longer than until a deadline of `time.monotonic`."""

    def __init__(self, process: Confined) -> None:
        self.process = process
        self.uses = 0
        self._to, self._from = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._held = bytearray()

    def send(self, payload: bytes, deadline: float) -> None:
        rest = memoryview(framed(payload))
        while rest:
            _wait(self._to, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(self._to, rest) :]
            except BlockingIOError:
                continue
            except OSError:
                raise GoneError from None

    def receive(self, max_bytes: int, deadline: float) -> bytes:
        size = 4
        while True:
            if len(self._held) >= 4:
                size = 4 + int.from_bytes(self._held[:4], "big")
                if size > 4 + max_bytes:
                    raise FloodError
            if len(self._held) >= max(size, 4):
                payload = bytes(self._held[4:size])
                del self._held[:size]
                return payload
            _wait(self._from, select.POLLIN, deadline)
            try:
                piece = os.read(self._from, 1 << 16)
            except BlockingIOError:
                continue
            except OSError:
                raise GoneError from None
            if not piece:
                raise GoneError
            self._held += piece

    def kill(self) -> None:
        self.process.kill()


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    left_s = deadline - time.monotonic()
    if left_s <= 0 or not poll.poll(left_s * 1000):
        raise LateError


@dataclass(slots=True)
class Candidate:
    """One candidate in a process of its own."""

    channel: Channel
    max_bytes: int
    deadline: float

    def ask(self, request: bytes) -> bytes:
        """The reply without its nonce. Raises GoneError, LateError and FloodError."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        self.channel.send(nonce + request, self.deadline)
        reply = self.channel.receive(self.max_bytes + NONCE_BYTES + 1, self.deadline)
        if reply[:NONCE_BYTES] != nonce:
            raise GoneError
        return reply[NONCE_BYTES:]


def run_tests(candidate: Candidate, tests: Channel, program: str, task: Task, free: Free, go_on: bool) -> Grade:
    """The grade of `program` by `task.tests`, which run in `tests`; they can be used again unless this raises.

    Raises BrokenTestsError where the tests fail by themselves, and LateError where strange values keep them busy.
    """
    if refused := _load(candidate, task.prompt, program):
        return refused
    heard = False
    ended: Exception | None = None
    tests.uses += 1
    try:
        told = (task.prompt, task.setup, list(task.tests), task.entry_point, *free, go_on)
        tests.send(encode(told), time.monotonic() + _TESTS_S)
        while True:
            # A candidate that uses its time up while it is loaded must not make the tests look late.
            until = candidate.deadline + _GRACE_S * (ended is not None) if heard else time.monotonic() + _TESTS_S
            message = tests.receive(MAX_REQUEST + 64, until)
            if message[:1] == b"V":
                break
            if ended is None:
                try:
                    reply = candidate.ask(message)
                except (GoneError, FloodError, LateError) as error:
                    ended, reply = error, b"m"
                else:
                    ended = FloodError() if reply == b"m" else None
            heard = True
            tests.send(reply, candidate.deadline + _GRACE_S)
    except (GoneError, LateError, FloodError) as error:
        if heard or ended:
            raise LateError from error
        raise BrokenTestsError("the tests' process ended or hung before they called the candidate") from error
    results, calls, trouble = _verdict(message)
    if trouble or not calls:
        raise BrokenTestsError(f"the tests: {trouble or 'they never call the candidate'}")
    if isinstance(ended, LateError | FloodError):
        return limit_of(ended)
    share = sum(results) / task.size
    if share == 1.0 and ended is None:
        return Grade(Outcome.PASS, 1.0)
    return Grade(Outcome.FAIL, share, _GONE if ended else "a test does not hold")


def run_inputs(candidate: Candidate, program: str, task: Task, go_on: bool) -> Grade:
    """The grade of a program that reads and prints; what it prints is compared here, line by line."""
    passed = 0
    try:
        for given, expected in task.stdin_tests:
            reply = candidate.ask(b"I" + encode((program, given)))
            if reply == b"m":
                raise FloodError
            held = reply[:1] == b"v" and _printed(reply) == _lines(expected)
            passed += held
            if not held and not go_on:
                break
    except GoneError:
        pass
    share = passed / task.size
    return Grade(Outcome.PASS if share == 1.0 else Outcome.FAIL, share, "" if share == 1.0 else "an output differs")


def limit_of(error: LateError | FloodError) -> Grade:
    """The grade of a candidate that took more than there is."""
    return Grade(
        Outcome.LIMIT, reason="not done in time" if isinstance(error, LateError) else "too much memory or output"
    )


def _load(candidate: Candidate, prompt: str, program: str) -> Grade | None:
    """None if the program is loaded."""
    try:
        reply = candidate.ask(b"L" + encode((prompt, program)))
    except GoneError:
        return Grade(Outcome.FAIL, reason=_GONE)
    except (LateError, FloodError) as error:
        return limit_of(error)
    if reply == b"m":
        return limit_of(FloodError())
    return None if reply[:1] == b"v" else Grade(Outcome.FAIL, reason="it cannot be loaded")


def _verdict(message: bytes) -> tuple[list[bool], int, str]:
    results, calls, trouble = decode(message[1:])
    return results, calls, trouble


def _printed(reply: bytes) -> list[str] | None:
    try:
        output = decode(reply[1:])
    except NotPlainError:
        return None
    return _lines(output.decode("utf-8", "replace")) if type(output) is bytes else None


def _lines(text: str) -> list[str]:
    """Without white space at the ends of lines and empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
