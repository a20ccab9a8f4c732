"""Grading programs: grades for each second of one core, and how long one takes, in every jail of this machine.

A core's rate is over the processor time of everything that a grade starts, so that other jobs on the machine hardly
change it; the time of one grade is wall time. Beside them stands what a bare interpreter costs: each candidate gets one
of its own, which bounds the rate of every jail.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from dataclasses import dataclass

from fedpact.rewards.outcome import Outcome
from fedpact.rewards.sandbox.grading import Grader
from fedpact.rewards.sandbox.jail import Jail, Limits, available_jails
from fedpact.rewards.sandbox.task import Task
from fedpact.rewards.sandbox.unconfined import Unconfined

GOAL = 100.0
"""Grades for each second of a core."""
GROUP = 8
PROGRAMS = {
    "def add(a, b):\n    return a + b\n": (
        "assert add(1, 2) == 3",
        "assert add([1], [2]) == [1, 2]",
        "assert add('a', 'b') == 'ab'",
    ),
    "from typing import List\ndef evens(xs: List[int]) -> List[int]:\n    return [x for x in xs if x % 2 == 0]\n": (
        "assert evens([1, 2, 3, 4]) == [2, 4]",
        "assert evens([]) == []",
        "assert evens(list(range(1000))) == list(range(0, 1000, 2))",
    ),
}
"""The second imports `typing`, as every task of HumanEval does: half as much again as starting the interpreter."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What grading costs in one jail."""

    grades_per_core_s: float
    median_ms: float
    p95_ms: float

    def __str__(self) -> str:
        return f"{self.grades_per_core_s:6.1f}  ({self.median_ms:.0f}, p95 {self.p95_ms:.0f} ms)"


def measure(*, rounds: int) -> dict[str, Rate]:
    """Rates by name; `rounds` groups of each program in each jail."""
    rates = {"a bare interpreter": _bare(rounds * GROUP)}
    for jail in (Unconfined(), *available_jails()):
        for name, (program, tests) in zip(("no import", "typing"), PROGRAMS.items(), strict=True):
            rates[f"{jail.name}, {name}"] = _graded(jail, program, tests, rounds)
    return rates


def show(rates: dict[str, Rate]) -> None:
    print("\nsandbox: grades for each second of a core (wall time of one)")
    for name, rate in rates.items():
        verdict = f"goal >= {GOAL:.0f}: {'met' if rate.grades_per_core_s >= GOAL else 'missed'}" if "," in name else ""
        print(f"  {name:66} {rate!s:24} {verdict}".rstrip())


def _graded(jail: Jail, program: str, tests: tuple[str, ...], rounds: int) -> Rate:
    """Groups of different programs for the same tests, one at a time; the first of several groups does not count."""
    grader = Grader(jail, Limits(seconds=60.0, cpu_seconds=60))
    took: list[float] = []
    try:
        for round in range(rounds + 1):
            if round == 1:
                began, took = _processor_s(), []
            for member in range(GROUP):
                start = time.perf_counter()
                grades = grader.grades([(f"{program}# {round} {member}", Task(tests))])
                took.append(time.perf_counter() - start)
                assert grades[0].outcome is Outcome.PASS, grades
    finally:
        grader.close()
    return _rate(took, _processor_s() - began)


def _bare(count: int) -> Rate:
    began, took = _processor_s(), []
    for _ in range(count):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-S", "-B", "-c", "pass"], check=True, env={})
        took.append(time.perf_counter() - start)
    return _rate(took, _processor_s() - began)


def _rate(took: list[float], spent_s: float) -> Rate:
    took.sort()
    return Rate(len(took) / spent_s, 1000 * took[len(took) // 2], 1000 * took[int(0.95 * (len(took) - 1))])


def _processor_s() -> float:
    """Of this process and of all children that have ended."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
