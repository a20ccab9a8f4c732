"""What an audit found: one line for each attack under each defence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

HEADER = ("attack", "defence", "figure", "baseline", "verdict")


@dataclass(frozen=True, slots=True)
class Finding:
    """One attack under one defence."""

    attack: str
    defence: str
    figure: str
    baseline: str
    """What the figure is compared with."""
    verdict: str
    harm: bool = False
    """Whether the attack got what it wanted."""
    values: Mapping[str, float | str | None] = field(default_factory=dict)
    """The figures behind the words."""

    def row(self) -> list[str]:
        """The cells under `HEADER`."""
        return [self.attack, self.defence, self.figure, self.baseline, self.verdict]

    def dump(self) -> dict[str, Any]:
        """As JSON has it: a figure that is not finite is null."""
        found = asdict(self)
        found["values"] = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in self.values.items()
        }
        return found


def plain_line(finding: Finding) -> str:
    """One line of text for pipes and files."""
    against = f" (against {finding.baseline})" if finding.baseline else ""
    return f"{finding.attack} | {finding.defence} | {finding.figure}{against} | {finding.verdict}"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Their mean and its standard error; the error of a single value is infinite, that of none NaN as the mean is."""
    if not values:
        return math.nan, math.nan
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def signed(value: float) -> str:
    """As in +0.031; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:+.3f}"
