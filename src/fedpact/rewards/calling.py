"""Calling what may hang: a plain function in a thread of its own, async ones together in one event loop."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """What is called, and how long that may take."""

    function: Callable[[], Any]
    timeout_s: float


class NoAnswerError(Exception):
    """The time is up."""


def in_thread(call: Call) -> Any:
    """What the call returned, or the exception that it raised, or `NoAnswerError`.

    In a daemon thread, which cannot keep the process from exiting. A call that never lets go of the interpreter lock
    cannot be timed out.
    """
    answers: list[Any] = []

    def run() -> None:
        try:
            value = call.function()
            answers.append(asyncio.run(value) if inspect.iscoroutine(value) else value)
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=run, daemon=True, name="fedpact-reward")
    thread.start()
    thread.join(min(call.timeout_s, threading.TIMEOUT_MAX))
    return answers[0] if answers else NoAnswerError()


def together(calls: Mapping[str, Call]) -> dict[str, Any]:
    """The answers of async calls as `in_thread` has them; they run at the same time, in the process's own loop."""
    answers: dict[str, Any] = {}

    async def answer(name: str, call: Call) -> None:
        clock = asyncio.timeout(call.timeout_s)
        try:
            async with clock:
                answers[name] = await call.function()
        except BaseException as error:
            answers[name] = NoAnswerError() if clock.expired() else error

    async def gather() -> None:
        await asyncio.gather(*(answer(name, call) for name, call in calls.items()))

    future = asyncio.run_coroutine_threadsafe(gather(), _event_loop(os.getpid()))
    try:
        future.result(min(max(call.timeout_s for call in calls.values()) + 1.0, threading.TIMEOUT_MAX))
    except TimeoutError:
        _event_loop.cache_clear()  # something in it blocks; the next call gets a fresh one
    return {name: answers.get(name, NoAnswerError()) for name in calls}


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """One for the life of the process, so that a reward can keep its connections from call to call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="fedpact-async-rewards").start()
    return loop
