"""What a member's noise is worth: epsilon, counted from the adapters that its ledger says have left.

Member level, replace-one: whatever all of this member's data were, others in their place would have led to a change of
the adapter at most `2 * clip_norm` away, since both are clipped. The server sees this member's own noised change, not
just a sum with others', so the noise of the others counts for nothing and neither does the size of the cohort. Noise
of standard deviation `noise_multiplier * clip_norm` therefore protects like a multiplier of `noise_multiplier / 2`.
*That* a member takes part is not hidden; hiding it would be the easier half, with `clip_norm` for `2 * clip_norm`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpact.errors import ConfigError, RefusedError
from fedpact.runtime.ledger import Ledger

NOISED = frozenset({"train"})
"""The verbs whose replies carry the noise."""

_UNIT = 1_000_000
_COUNT = "noise_millionths"


@dataclass(frozen=True, slots=True)
class Budget:
    """How much a member spends on one adapter, and how much it has. `epsilon`: where it stops; None: it only counts.

    The ledger outlives runs, and so does what was spent: another run, other noise or a restored memory change nothing
    about what has left already.
    """

    noise_multiplier: float
    delta: float
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(f"noise_multiplier is {self.noise_multiplier}; expected a positive number")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}; expected between 0 and 1")
        if self.epsilon is not None and not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"epsilon is {self.epsilon}; expected a positive number")

    def ready(self) -> None:
        """Raises ConfigError if the accountant is not installed."""
        _accountant()

    @property
    def counts(self) -> dict[str, int]:
        """What the ledger's line of a reply under this noise has to say under `counts`."""
        return {_COUNT: math.floor(self.noise_multiplier * _UNIT)}  # rounded against the member

    def spent(self, ledger: Path) -> float:
        """Epsilon of all that has left; infinite if any of it had no noise."""
        return epsilon_of(released(ledger), self.delta)

    def after_next(self, ledger: Path) -> float:
        """Epsilon once another adapter has left."""
        return epsilon_of(released(ledger) + Counter({self.counts[_COUNT] / _UNIT: 1}), self.delta)

    def left(self, ledger: Path) -> int | None:
        """How many more adapters may leave; None if there is no limit."""
        return None if self.epsilon is None else self._left(released(ledger), self.epsilon)

    def check(self, ledger: Path, *, where: str) -> None:
        """Raises RefusedError if another adapter would spend more than there is: ask before anything is computed.

        Raises ConfigError if dp-accounting is not installed: there is no noise without a count of it.
        """
        _accountant()
        if self.epsilon is None:
            return
        past = released(ledger)
        if past[0.0]:
            raise RefusedError(
                f"{where}: site.epsilon: {past[0.0]} adapters left without noise, and no budget covers them; "
                "for other data use another folder, or remove site.epsilon"
            )
        if self._left(past, self.epsilon) == 0:
            spent = epsilon_of(past, self.delta)
            raise RefusedError(
                f"{where}: site.epsilon: {spent:.4g} of {self.epsilon:g} is spent on {past.total()} adapters, and the "
                "next would exceed it; this member is done with these data"
            )

    def line(self, ledger: Path) -> str:
        """What has been spent, for every round's report."""
        past = released(ledger)
        limit = "no limit" if self.epsilon is None else f"of {self.epsilon:g}, {self._left(past, self.epsilon)} left"
        spent = epsilon_of(past, self.delta)
        return f"epsilon {spent:.4g} at delta {self.delta:g} after {past.total()} adapters ({limit})"

    def _left(self, past: Mapping[float, int], epsilon: float) -> int:
        noise = self.counts[_COUNT] / _UNIT

        def fits(more: int) -> bool:
            return epsilon_of(Counter(past) + Counter({noise: more}), self.delta) <= epsilon

        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def released(ledger: Path, verbs: Collection[str] = NOISED) -> Counter[float]:
    """Noise multiplier to how many different replies have left under it; 0.0: without noise.

    The same bytes sent again tell nothing new and count once. Torn lines count as nothing: a reply leaves only once
    its line is whole.

    Raises StoreError if there is no ledger, or its chain is broken.
    """
    noise: dict[str, int] = {}
    for entry in Ledger.entries(ledger):
        if entry.get("decision") == "sent" and entry.get("verb") in verbs:
            noise.setdefault(str(entry.get("reply")), int((entry.get("counts") or {}).get(_COUNT, 0)))
    return Counter(millionths / _UNIT for millionths in noise.values())


def releases(ledger: Path, verbs: Collection[str] = NOISED) -> int:
    """How many different replies to `verbs` have left."""
    return released(ledger, verbs).total()


def epsilon_of(released: Mapping[float, int], delta: float) -> float:
    """Epsilon at `delta` of this many adapters for each noise multiplier; infinite if one of the multipliers is 0.

    Rényi accounting by dp-accounting, which lets each request depend on what came before. Mironov 2017,
    arXiv:1702.07476, proposition 1 and corollary 3.

    Raises ConfigError if dp-accounting is not installed.
    """
    event, accountant = _accountant()
    for noise, count in sorted(released.items()):
        if count > 0:
            accountant.compose(event(noise / 2), count)  # replace-one: two clipped changes are 2 * clip_norm apart
    return float(accountant.get_epsilon(delta))


def epsilon_after(releases: int, noise_multiplier: float, delta: float) -> float:
    """Epsilon at `delta` of this many adapters under one noise multiplier. Raises ConfigError as `epsilon_of`."""
    return epsilon_of({noise_multiplier: releases}, delta)


def _accountant() -> tuple[Any, Any]:
    try:
        from dp_accounting import GaussianDpEvent, NeighboringRelation
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise ConfigError(
            "site.noise_multiplier needs dp-accounting, which is not installed; run: pip install 'fedpact[dp]'"
        ) from error
    return GaussianDpEvent, RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
