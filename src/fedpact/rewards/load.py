"""A member's rewards: found by import path, called as TRL calls them, and checked.

What a function gets is read from its signature. Keyword-only parameters with a default are settings, bound once by
`kwargs` in the member's file; every other parameter that `kwargs` does not bind is a column of the data set, and
`**columns` takes all that remain.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedpact.errors import FedPactError, RewardError
from fedpact.rewards.modules import module_of_file, public_names
from fedpact.types import Prompts

_GIVEN = ("prompts", "completions")


@dataclass(frozen=True, slots=True)
class LoadedReward:
    """A reward function with its settings bound, and what an error about it has to say."""

    name: str
    """Its import path, as written in the member's file."""
    where: str
    """The file and the table that name it: `clients/north.toml: rewards.helpful`."""
    function: Callable[..., Any]
    timeout_s: float = 60.0

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        """The function's own answer, unchecked, from those of the columns that it takes."""
        parameters = inspect.signature(self.function).parameters.values()
        offered = {**columns, "prompts": prompts, "completions": completions}
        settings = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - settings
        missing = [p.name for p in parameters if p.name in named - offered.keys() and p.default is p.empty]
        if missing:
            raise RewardError(
                f"{self.where}: {self.name} needs the column {missing[0]!r}; the prompts have "
                f"{', '.join(sorted(columns)) or 'no columns'}; rename a column, or bind {missing[0]!r} in kwargs"
            )
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        taken = {n: v for n, v in offered.items() if n in named or (takes_all and n not in settings)}
        return self.function(**taken)

    @property
    def is_async(self) -> bool:
        inner = self.function.func if isinstance(self.function, functools.partial) else self.function
        return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


@dataclass(frozen=True, slots=True)
class RewardSet:
    """A member's rewards by objective."""

    functions: Mapping[str, LoadedReward]

    def measure(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        """Every reward of every completion: [m_i, n] float32, in the order of `functions`; NaN: does not apply.

        `prompts` has one row a completion. Where the prompt is a chat, the completion goes over as one, like TRL's.
        Plain functions run one after another, async ones together. Raises RewardError for the first function that
        fails, hangs, or does not return one finite number or None a completion.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions; expected one prompt each")
        calls = {name: _call(reward, prompts, completions) for name, reward in self.functions.items()}
        values: dict[str, list[float]] = {}
        for name, reward in self.functions.items():
            if not reward.is_async:
                values[name] = _values(reward, _in_thread(calls[name], reward.timeout_s), len(completions))
        together = {name: reward for name, reward in self.functions.items() if reward.is_async}
        if together:
            for name, answer in _together(together, calls).items():
                values[name] = _values(self.functions[name], answer, len(completions))
        rows = [values[name] for name in self.functions]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(completions))


def load_reward(
    use: str, kwargs: Mapping[str, Any], *, where: str, folder: Path | None = None, timeout_s: float = 60.0
) -> LoadedReward:
    """The reward at `package.module:name`, or at `file.py:name` relative to `folder`, with `kwargs` bound.

    `name` is a function, a callable object, or a class, which is instantiated with `kwargs`. `where` is the file and
    table that name it. A file is loaded by itself: it cannot import its neighbours. Raises RewardError.
    """
    module_name, _, name = use.rpartition(":")
    if not (module_name and name):
        raise RewardError(
            f"{where}.use: found {use!r}, expected 'package.module:name' or 'file.py:name'; "
            "the built-in ones are 'fedpact.rewards:exact_answer' and so on"
        )
    module = _module(module_name, where, folder or Path())
    target = getattr(module, name, None)
    if not callable(target):
        found = ", ".join(public_names(module)) or "no functions"
        raise RewardError(f"{where}.use: {module_name} has no function or class {name!r}; it has {found}")
    return LoadedReward(use, where, _bound(target, kwargs, where, use), timeout_s)


def _module(name: str, where: str, folder: Path) -> ModuleType:
    path = folder / name
    if name.endswith(".py") and not path.is_file():
        raise RewardError(f"{where}.use: no file {path}; expected a path relative to the member's file")
    try:
        return module_of_file(path) if name.endswith(".py") else importlib.import_module(name)
    except Exception as error:
        lacking = isinstance(error, ModuleNotFoundError) and error.name is not None and name.startswith(error.name)
        remedy = "install the package, or write 'file.py:name' for a file of your own" if lacking else "mend it"
        raise RewardError(f"{where}.use: cannot import {name}: {_described(error)}; {remedy}") from error


def _bound(target: Callable[..., Any], kwargs: Mapping[str, Any], where: str, use: str) -> Callable[..., Any]:
    """`target` with its settings; a class becomes an instance."""
    is_class = isinstance(target, type)
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError as error:
        raise RewardError(f"{where}.use: {use} has no readable signature; wrap it in a Python function") from error
    settings = [
        p.name
        for p in parameters
        if p.name not in _GIVEN
        and (p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and (is_class or p.default is not p.empty)))
    ]
    takes_any = is_class and any(p.kind is p.VAR_KEYWORD for p in parameters)
    for unknown in sorted(kwargs.keys() - set(settings)) if not takes_any else ():
        listed = ", ".join(settings) or "no settings"
        raise RewardError(f"{where}.kwargs: {use} has no setting {unknown!r}; it takes {listed}")
    try:
        function = target(**kwargs) if is_class else functools.partial(target, **kwargs) if kwargs else target
    except Exception as error:
        raise RewardError(f"{where}.kwargs: {use} could not be created: {_described(error)}") from error
    if not callable(function):
        raise RewardError(f"{where}.use: {use} is a class without __call__; expected a function or callable object")
    takes = inspect.signature(function).parameters.values()
    if not any(p.name == "completions" or p.kind is p.VAR_KEYWORD for p in takes):
        listed = ", ".join(p.name for p in takes)
        raise RewardError(f"{where}.use: {use} takes ({listed}); expected a parameter named 'completions', as in TRL")
    return function


def _call(reward: LoadedReward, prompts: Prompts, completions: Sequence[str]) -> Callable[[], Any]:
    spoken = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts.text, completions, strict=True)
    ]
    columns = {name: list(values) for name, values in prompts.columns.items() if name not in _GIVEN}
    return functools.partial(reward, list(prompts.text), spoken, **columns)


class _NoAnswerError(Exception):
    """The time is up."""


def _in_thread(call: Callable[[], Any], timeout_s: float) -> Any:
    """What `call` returned, or the exception that it raised, or `_NoAnswerError`.

    In a daemon thread, which cannot keep the process from exiting. A call that never lets go of the interpreter lock
    cannot be timed out.
    """
    answers: list[Any] = []

    def run() -> None:
        try:
            value = call()
            answers.append(asyncio.run(value) if inspect.iscoroutine(value) else value)
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=run, daemon=True, name="fedpact-reward")
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else _NoAnswerError()


def _together(rewards: Mapping[str, LoadedReward], calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """The answers of async rewards as `_in_thread` has them; they run at the same time, in the process's own loop."""
    answers: dict[str, Any] = {}

    async def answer(name: str, timeout_s: float) -> None:
        clock = asyncio.timeout(timeout_s)
        try:
            async with clock:
                answers[name] = await calls[name]()
        except BaseException as error:
            answers[name] = _NoAnswerError() if clock.expired() else error

    async def gather() -> None:
        await asyncio.gather(*(answer(name, reward.timeout_s) for name, reward in rewards.items()))

    future = asyncio.run_coroutine_threadsafe(gather(), _event_loop(os.getpid()))
    try:
        future.result(max(reward.timeout_s for reward in rewards.values()) + 1.0)
    except TimeoutError:
        _event_loop.cache_clear()  # something in it blocks; the next call gets a fresh one
    return {name: answers.get(name, _NoAnswerError()) for name in rewards}


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """One for the life of the process, so that a reward can keep its connections from call to call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="fedpact-async-rewards").start()
    return loop


def _values(reward: LoadedReward, answer: Any, count: int) -> list[float]:
    """The answer as numbers, NaN for None; RewardError if it is none."""
    at = f"{reward.where}: {reward.name}"
    if isinstance(answer, _NoAnswerError):
        remedy = "look for a call that blocks the event loop" if reward.is_async else "make it faster"
        raise RewardError(f"{at}: no answer after {reward.timeout_s:g} s (timeout_s); raise timeout_s, or {remedy}")
    if isinstance(answer, RewardError):
        raise answer
    if isinstance(answer, BaseException):
        raised = answer if isinstance(answer, FedPactError) else f"raised {_described(answer)}"
        raise RewardError(f"{at}: {raised}") from answer
    values = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(values, list | tuple):
        raise RewardError(f"{at} returned {type(answer).__name__}; expected a list with one number for each completion")
    if len(values) != count:
        raise RewardError(f"{at} returned {len(values)} values for {count} completions; return one number for each")
    return [math.nan if value is None else _number(at, row, value) for row, value in enumerate(values)]


def _number(at: str, row: int, value: Any) -> float:
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, int | float) or not abs(value) <= torch.finfo(torch.float32).max:
        remedy = "return a finite number, or None where it does not apply"
        raise RewardError(f"{at} returned {value!r:.60} for completion {row}; {remedy}")
    return float(value)


def _described(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
