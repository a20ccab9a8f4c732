"""How a judge's look at one completion ended: four ways, not two."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum


class Outcome(StrEnum):
    """What became of one completion, and what that is worth as a reward.

    A judge that could not be reached says nothing about the completion: counted as 0, it would teach the policy noise.
    """

    PASS = "pass"
    FAIL = "fail"
    LIMIT = "limit"
    """More than the judge takes, by the completion's own fault."""
    ERROR = "error"
    """The judge failed, not the completion."""

    @property
    def reward(self) -> float | None:
        """1.0 for a pass, 0.0 for a fail and for too much, None (no signal) for an error."""
        return None if self is Outcome.ERROR else float(self is Outcome.PASS)


def pass_share(outcomes: Counter[Outcome]) -> float:
    """Passes among the outcomes that are no errors; 0.0 if there is none."""
    judged = outcomes.total() - outcomes[Outcome.ERROR]
    return outcomes[Outcome.PASS] / judged if judged else 0.0
