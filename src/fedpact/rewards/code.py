"""A reward for programs: run against the member's tests, where they can reach neither the machine nor the verdict."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedpact.errors import ConfigError, RewardError
from fedpact.rewards.builtin import Completion, Rewards, text_of
from fedpact.rewards.outcome import Outcome
from fedpact.rewards.sandbox.grading import Grader
from fedpact.rewards.sandbox.jail import Jail, Limits, available_jails, chosen_jail
from fedpact.rewards.sandbox.task import Grade, Task

Sandbox = Literal["auto", "sandlock", "bubblewrap", "unsafe-none"]

_FENCED = re.compile(r"```[ \t]*(?:python3?|py)[ \t]*\r?\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE)
_LOG = logging.getLogger(__name__)
_warned = False


class CodeTests:
    """1.0 where a completion's program passes its tests, 0.0 where it fails or takes too much, None where we failed.

    The program is what stands in the last ```python fence, or else the whole completion. Columns:

    - `tests`: a script of asserts, or a list of them (MBPP's `test_list`). They may use names that only the program
      defines, and compare plain data: numbers, strings, bytes, lists, tuples, dicts, sets. None: no signal.
    - `entry_point`: the function that is asked for; `check(candidate)` of HumanEval's tests is called with it.
    - `prompt_code`: what the program goes on from (HumanEval's `prompt`): imports, helpers, the signature.
    - `test_setup_code`: runs before the tests.
    - `stdin_tests`: instead of `tests`, a list of `{"input": ..., "output": ...}` for a program that reads and prints.
      White space at the ends of lines does not count.

    Of a list of tests `partial` rewards the share that pass; too much is worth 0.0 still. All the tests of a completion
    together may take `limit_s`, `memory_mb`, and `output_bytes` for the value of one call. `workers` run at a time (as
    many as there are cores), so `timeout_s` of the reward should exceed completions / `workers` x `limit_s`. With
    "auto", the best sandbox that holds on this machine is used; "unsafe-none" is none at all, and says so.

    Programs cannot start threads or processes, nor open files, and have the standard library alone. A failure of ours
    is tried again, then it is None; RewardError if it befalls more than `max_infrastructure_errors` of the completions
    of a call. Raises ConfigError where there is no sandbox that holds. `outcomes` counts what became of programs.
    """

    def __init__(
        self,
        *,
        sandbox: Sandbox = "auto",
        partial: bool = False,
        limit_s: float = 5.0,
        memory_mb: int = 512,
        output_bytes: int = 65536,
        workers: int | None = None,
        cache_size: int = 4096,
        max_infrastructure_errors: float = 0.05,
    ) -> None:
        floors: dict[str, tuple[float, float]] = {
            "limit_s": (limit_s, 0.1),
            "memory_mb": (memory_mb, 64),
            "output_bytes": (output_bytes, 1024),
            "workers": (1 if workers is None else workers, 1),
            "cache_size": (cache_size, 0),
            "max_infrastructure_errors": (max_infrastructure_errors, 0),
        }
        for name, (value, floor) in floors.items():
            if not value >= floor:
                raise ConfigError(f"{name} is {value}; expected at least {floor}")
        # One second more than the clock gives, so that the clock, which tells a limit from an exit, is first.
        limits = Limits(limit_s, int(limit_s) + 2, memory_mb, output_bytes)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.partial, self.max_infrastructure_errors = partial, max_infrastructure_errors
        self.outcomes: Counter[Outcome] = Counter()
        jail = _jail(sandbox)
        self._grader = Grader(jail, limits, workers=workers or cores, cache_size=cache_size, go_on=partial)

    def __call__(
        self,
        completions: Sequence[Completion],
        tests: Sequence[Any] | None = None,
        entry_point: Sequence[Any] | None = None,
        prompt_code: Sequence[Any] | None = None,
        test_setup_code: Sequence[Any] | None = None,
        stdin_tests: Sequence[Any] | None = None,
        **columns: Any,
    ) -> Rewards:
        if tests is None and stdin_tests is None:
            raise RewardError("code_tests needs a column 'tests' or 'stdin_tests'; the prompts have neither")
        nothing = [None] * len(completions)
        parts = (tests, entry_point, prompt_code, test_setup_code, stdin_tests)
        rows = zip(*(nothing if part is None else part for part in parts), strict=True)
        tasks = [task_of(*row) for row in rows]
        pairs = [(program_of(text_of(one)), task) for one, task in zip(completions, tasks, strict=True) if task]
        grades = self._grader.grades(pairs)
        self.outcomes.update(grade.outcome for grade in grades)
        self._check_errors(grades)
        left = iter(grades)
        return [self._reward(next(left)) if task else None for task in tasks]

    def close(self) -> None:
        """Kills the processes that wait for the next call."""
        self._grader.close()

    def _reward(self, grade: Grade) -> float | None:
        return grade.share if self.partial and grade.outcome is Outcome.FAIL else grade.outcome.reward

    def _check_errors(self, grades: Sequence[Grade]) -> None:
        failures = Counter(grade.reason for grade in grades if grade.outcome is Outcome.ERROR)
        if failures.total() > self.max_infrastructure_errors * len(grades):
            listed = ", ".join(f"{reason}: {count}" for reason, count in failures.most_common(3))
            raise RewardError(
                f"code_tests: {failures.total()} of {len(grades)} programs could not be graded ({listed}), above "
                f"max_infrastructure_errors {self.max_infrastructure_errors:g}; see to the sandbox or to the tests"
            )


code_tests = CodeTests
"""The name to `use`, like those of the other built-in rewards."""


def program_of(text: str) -> str:
    """What stands in the last ```python fence, which the end may close; without one, all of `text`."""
    fenced = _FENCED.findall(text)
    return fenced[-1] if fenced else text


def task_of(tests: Any, entry_point: Any, prompt_code: Any, setup: Any, stdin_tests: Any) -> Task | None:
    """One row's columns as a task; None if it has no tests. Raises RewardError for what is none."""
    if tests is not None and stdin_tests is not None:
        raise RewardError("tests, stdin_tests: found both in one row; expected one of them, and None in the other")
    for name, text in (("entry_point", entry_point), ("prompt_code", prompt_code), ("test_setup_code", setup)):
        if not isinstance(text, str | None):
            raise RewardError(f"{name}: found {type(text).__name__}; expected a string")
    if stdin_tests is not None:
        pairs: Any = stdin_tests if isinstance(stdin_tests, Sequence) and not isinstance(stdin_tests, str) else [None]
        if not all(isinstance(pair, Mapping) and all(isinstance(pair.get(k), str) for k in _PAIR) for pair in pairs):
            raise RewardError('stdin_tests: expected a list of {"input": "...", "output": "..."}')
        return Task(stdin_tests=tuple((pair["input"], pair["output"]) for pair in pairs)) if pairs else None
    listed = [tests] if isinstance(tests, str) else tests
    if listed is None or listed == [""]:
        return None
    if not isinstance(listed, Sequence) or not all(isinstance(test, str) for test in listed):
        raise RewardError(f"tests: found {type(tests).__name__}; expected a script or a list of assert statements")
    if not listed:
        return None
    return Task(tuple(listed), entry_point or "", prompt_code or "", setup=setup or "")


_PAIR = ("input", "output")


def _jail(sandbox: Sandbox) -> Jail:
    global _warned
    if sandbox == "auto":
        return chosen_jail()
    if sandbox == "unsafe-none":
        from fedpact.rewards.sandbox.unconfined import Unconfined

        if not _warned:
            _warned = True
            _LOG.warning("code_tests: sandbox is unsafe-none: what the model writes runs here with all your rights")
        return Unconfined()
    from fedpact.rewards.sandbox.selftest import self_test

    jails = {jail.name: jail for jail in available_jails()}
    if sandbox not in jails:
        found = ", ".join(jails) or "none"
        raise ConfigError(f"sandbox is {sandbox!r}; installed here: {found}; expected one of them, or 'auto'")
    report = self_test(jails[sandbox])
    if not report.passed:
        raise ConfigError(f"sandbox {sandbox!r} does not hold here: failed {', '.join(report.failures)}; use 'auto'")
    return jails[sandbox]
