"""A member's rewards: found by import path, called as TRL calls them, and checked.

What a function gets is read from its signature. Keyword-only parameters with a default are settings, bound once by
`kwargs` in the member's file; every other parameter that `kwargs` does not bind is a column of the data set, and
`**columns` takes all that remain.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedpact.errors import FedPactError, RewardError
from fedpact.rewards.calling import Call, NoAnswerError, in_thread, together
from fedpact.rewards.modules import module_of_file, public_names
from fedpact.secrets import masked
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
    otherwise: LoadedReward | None = None
    """Asked about just those completions for which the function returned None."""

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
        Plain functions run one after another, async ones together; then each `otherwise` is asked about the rows that
        are NaN. Raises RewardError for the first function that fails, hangs, or does not return one finite number or
        None a completion.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions; expected one prompt each")
        calls = {name: _call(reward, prompts, completions) for name, reward in self.functions.items()}
        values: dict[str, list[float]] = {}
        for name, reward in self.functions.items():
            if not reward.is_async:
                values[name] = _values(reward, in_thread(calls[name]), len(completions))
        waiting = {name: call for name, call in calls.items() if name not in values}
        if waiting:
            for name, answer in together(waiting).items():
                values[name] = _values(self.functions[name], answer, len(completions))
        for name, reward in self.functions.items():
            rows = [row for row, value in enumerate(values[name]) if math.isnan(value)]
            if reward.otherwise is not None and rows:
                second = RewardSet({name: reward.otherwise})
                answers = second.measure(prompts.select(rows), [completions[row] for row in rows])[0].tolist()
                for row, value in zip(rows, answers, strict=True):
                    values[name][row] = value
        table = [values[name] for name in self.functions]
        return torch.tensor(table, dtype=torch.float32).reshape(len(table), len(completions))


def load_reward(
    use: str,
    kwargs: Mapping[str, Any],
    *,
    where: str,
    folder: Path | None = None,
    home: Path | None = None,
    timeout_s: float = 60.0,
) -> LoadedReward:
    """The reward at `package.module:name`, or at `file.py:name` relative to `folder`, with `kwargs` bound.

    `name` is a function, a callable object, or a class, which is instantiated with `kwargs`; if its `__init__` has
    keyword-only parameters `folder` and `home`, they get the folder of the member's file and the member's private one.
    `where` is the file and table that name it. A file is loaded by itself: it cannot import its neighbours. Raises
    RewardError.
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
    folder = folder or Path()
    paths = {"folder": folder, "home": home or folder}
    return LoadedReward(use, where, _bound(target, kwargs, paths, where, use), timeout_s)


def _module(name: str, where: str, folder: Path) -> ModuleType:
    path = folder / name
    if name.endswith(".py") and not os.path.isfile(path):  # noqa: PTH113  Path.is_file raises for a name too long
        raise RewardError(f"{where}.use: no file {path}; expected a path relative to the member's file")
    try:
        return module_of_file(path) if name.endswith(".py") else importlib.import_module(name)
    except (Exception, SystemExit) as error:
        lacking = isinstance(error, ModuleNotFoundError) and error.name is not None and name.startswith(error.name)
        remedy = "install the package, or write 'file.py:name' for a file of your own" if lacking else "mend it"
        raise RewardError(f"{where}.use: cannot import {name}: {_described(error)}; {remedy}") from error


def _bound(
    target: Callable[..., Any], kwargs: Mapping[str, Any], paths: Mapping[str, Path], where: str, use: str
) -> Callable[..., Any]:
    """`target` with its settings; a class becomes an instance, and gets those of `paths` that it asks for."""
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
    given = {p.name: paths[p.name] for p in parameters if is_class and p.kind is p.KEYWORD_ONLY and p.name in paths}
    takes_any = is_class and any(p.kind is p.VAR_KEYWORD for p in parameters)
    for unknown in sorted(kwargs.keys() - set(settings)) if not takes_any else ():
        listed = ", ".join(name for name in settings if name not in given) or "no settings"
        raise RewardError(f"{where}.kwargs: {use} has no setting {unknown!r}; it takes {listed}")
    try:
        function = (
            target(**{**given, **kwargs}) if is_class else functools.partial(target, **kwargs) if kwargs else target
        )
    except FedPactError as error:
        raise RewardError(f"{where}.kwargs: {use}: {masked(str(error))}") from error
    except (Exception, SystemExit) as error:
        raise RewardError(f"{where}.kwargs: {use} could not be created: {_described(error)}") from error
    if not callable(function):
        raise RewardError(f"{where}.use: {use} is a class without __call__; expected a function or callable object")
    takes = inspect.signature(function).parameters.values()
    if not any(p.name == "completions" or p.kind is p.VAR_KEYWORD for p in takes):
        listed = ", ".join(p.name for p in takes)
        raise RewardError(f"{where}.use: {use} takes ({listed}); expected a parameter named 'completions', as in TRL")
    return function


def _call(reward: LoadedReward, prompts: Prompts, completions: Sequence[str]) -> Call:
    spoken = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts.text, completions, strict=True)
    ]
    columns = {name: list(values) for name, values in prompts.columns.items() if name not in _GIVEN}
    return Call(functools.partial(reward, list(prompts.text), spoken, **columns), reward.timeout_s)


def _values(reward: LoadedReward, answer: Any, count: int) -> list[float]:
    """The answer as numbers, NaN for None; RewardError if it is none."""
    at = f"{reward.where}: {reward.name}"
    if isinstance(answer, NoAnswerError):
        remedy = "look for a call that blocks the event loop" if reward.is_async else "make it faster"
        raise RewardError(f"{at}: no answer after {reward.timeout_s:g} s (timeout_s); raise timeout_s, or {remedy}")
    if isinstance(answer, RewardError) and str(answer).startswith(reward.where):
        raise RewardError(masked(str(answer))) from answer
    if isinstance(answer, BaseException):
        raised = masked(str(answer)) if isinstance(answer, FedPactError) else f"raised {_described(answer)}"
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
        raise RewardError(f"{at} returned {masked(repr(value)):.60} for completion {row}; {remedy}")
    return float(value)


def _described(error: BaseException) -> str:
    lines = masked(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
