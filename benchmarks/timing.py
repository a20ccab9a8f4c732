"""Fair ratios on a machine that does other things too.

Candidates take turns in one process. On a CPU the clock is the process's own CPU time, and the best of some rounds
counts: other jobs can only add to a time. On a GPU the clock is wall time between synchronisations.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import torch

PACKAGES = ("fedpact", "torch", "transformers", "peft", "trl", "torchjd")

Part = Literal["whole", "marked"]


class Lap(NamedTuple):
    """The seconds of one run: all of it, and what came after the last mark."""

    whole: float
    marked: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Best time over best time, with the lowest and highest quotient of a single round."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:6.2f}  ({self.low:.2f}-{self.high:.2f})"


class Clock:
    """Measures one run: from its making, or from `restart`, until `stop` or `lap`; `mark` begins the marked part."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._start = self._mark = self.now()
        self._end: float | None = None

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self) -> None:
        self._mark = self.now()

    def restart(self) -> None:
        self._start = self._mark = self.now()

    def stop(self) -> None:
        self._end = self.now()

    def lap(self) -> Lap:
        end = self.now() if self._end is None else self._end
        return Lap(end - self._start, end - self._mark)


@dataclass(slots=True)
class Timings:
    """The laps of every candidate, in rounds, and on a GPU the most memory that each has held."""

    laps: dict[str, list[Lap]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def ratio(self, above: str, below: str, *, part: Part = "whole") -> Ratio:
        """How often `below` fits into `above`."""
        numerators = [getattr(lap, part) for lap in self.laps[above]]
        denominators = [getattr(lap, part) for lap in self.laps[below]]
        rounds = [a / b for a, b in zip(numerators, denominators, strict=True)]
        return Ratio(min(numerators) / min(denominators), min(rounds), max(rounds))


def interleaved(candidates: Mapping[str, Callable[[Clock], None]], *, rounds: int, device: str) -> Timings:
    """Run every candidate once a round. The first of several rounds warms up and does not count."""
    timings = Timings(laps={name: [] for name in candidates})
    for round in range(rounds):
        for name, run in candidates.items():
            gc.collect()
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            clock = Clock(device)
            run(clock)
            lap = clock.lap()
            if round > 0 or rounds == 1:
                timings.laps[name].append(lap)
            if device != "cpu":
                timings.peak_bytes[name] = torch.cuda.max_memory_allocated()
    return timings


def surroundings(device: str) -> dict[str, str]:
    """Where and when this is measured: without it a ratio says little."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "cores": f"{os.cpu_count()} seen, {torch.get_num_threads()} used",
        "load": f"{os.getloadavg()[0]:.1f} before",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
