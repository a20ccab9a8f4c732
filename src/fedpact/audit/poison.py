"""A member that poisons: one member's training replies are changed on their way, under each defence in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from fedpact.audit.finding import Finding, signed
from fedpact.audit.trial import OFF, Bench, Outcome, Tamper, changed, first_drawn, members_at, short
from fedpact.errors import ConfigError
from fedpact.messages import Reply, Train, Trained
from fedpact.runtime.adapters import delta_start
from fedpact.runtime.admission import Limits
from fedpact.runtime.config import RunConfig
from fedpact.runtime.envelope import Envelope
from fedpact.runtime.transport import Failure

HEAVY = 1e12
NO_CAP = "without the weight cap"
AGGREGATIONS = ("mean", "geometric_median", "trimmed_mean")

Lie = Callable[[Trained, Train], Trained]


def scaled(factor: float) -> Lie:
    """The member's change of the adapter, times `factor`."""

    def lie(reply: Trained, request: Train) -> Trained:
        start = delta_start(request.adapter)
        return replace(reply, adapter={n: start[n] + factor * (x - start[n]) for n, x in reply.adapter.items()})

    return lie


def weighing(weight: float) -> Lie:
    """The reversed change, ten times as long, that claims to count for `weight` completions."""

    def lie(reply: Trained, request: Train) -> Trained:
        return replace(scaled(-10.0)(reply, request), weight=weight)

    return lie


def not_a_number(reply: Trained, request: Train) -> Trained:
    """One NaN in every tensor."""
    broken = {name: tensor.clone() for name, tensor in reply.adapter.items()}
    for tensor in broken.values():
        tensor.view(-1)[0] = torch.nan
    return replace(reply, adapter=broken)


def lies(config: RunConfig) -> dict[str, Lie]:
    """What a poisoning member tries. It does not see the others' norms and takes its own for theirs."""
    under = 0.99 * config.federation.clip_factor
    return {
        "poison: sign-flipped change x10": scaled(-10.0),
        f"poison: weight {HEAVY:.0e}": weighing(HEAVY),
        f"poison: weight {Limits(1).max_weight:.0e}": weighing(Limits(1).max_weight),
        "poison: NaN": not_a_number,
        "poison: reversed, just under the clip": scaled(-under),
    }


def defences(config: RunConfig) -> dict[str, dict[str, object]]:
    """Name to changes of the run file: as it is, without each of its defences, with the other aggregations."""
    federation, evaluation = config.federation, config.evaluation
    no_clip: dict[str, object] = {"federation.clip_factor": OFF, "federation.clip_norm": None}
    no_cap: dict[str, object] = {"federation.max_share": OFF}
    found: dict[str, dict[str, object]] = {"as configured": {}}
    if federation.clip_factor < OFF or federation.clip_norm is not None:
        found["without the clip"] = no_clip
    if federation.max_share < OFF:
        found[NO_CAP] = no_cap
    if evaluation.rollback is not None:
        found["without rollback"] = {"evaluation.rollback": None}
    for rule in AGGREGATIONS:
        if rule != federation.aggregation:
            found[f"with {rule}"] = {"federation.aggregation": rule}
    found["without any of them"] = {
        **no_clip, **no_cap, "federation.aggregation": "mean", "evaluation.rollback": None,
    }  # fmt: skip
    return found


def tampering(lie: Lie) -> Tamper:
    """The lie as a transport tells it."""

    def tamper(envelope: Envelope, reply: Reply) -> Reply | Failure:
        if not isinstance(reply, Trained):
            return reply
        request = envelope.open()
        assert isinstance(request, Train)
        return lie(reply, request)

    return tamper


def stay_away(envelope: Envelope, reply: Reply) -> Reply | Failure:
    """No training reply at all: what a member's absence changes is the yardstick for its lies."""
    return Failure("stays away") if isinstance(reply, Trained) else reply


@dataclass(frozen=True, slots=True)
class Damage:
    """What one attack did, over seeds."""

    change: Mapping[str, float]
    """Of the held-out means, by objective, against the honest run under the same defences."""
    moved: float
    """See `Outcome.moved`."""
    refused: str
    ended: str

    @classmethod
    def between(cls, attacked: Sequence[Outcome], honest: Sequence[Outcome], liars: Sequence[str]) -> Damage:
        """The mean over pairs of runs with one seed."""
        pairs = list(zip(attacked, honest, strict=True))
        names = [name for name in honest[0].end if all(name in one.end for one in (*attacked, *honest))]
        return cls(
            {name: fmean(one.end[name] - base.end[name] for one, base in pairs) for name in names},
            fmean(one.moved(base) for one, base in pairs),
            next((one.refused[liar] for one, liar in zip(attacked, liars, strict=True) if liar in one.refused), ""),
            next((one.ended for one in attacked if one.ended), ""),
        )


def doubt_of(honest: Sequence[Outcome]) -> float:
    """Two standard errors of the difference of two means of a 0/1 reward over all held-out completions."""
    return 2 * math.sqrt(0.5 / max(1, sum(one.completions for one in honest)))


def verdict(damage: Damage, leading: str, *, doubt: float, absence: float) -> tuple[str, bool]:
    """In words, and whether it did harm. `absence` is how far the adapter moves if the member just stays away."""
    change = damage.change.get(leading, math.nan)
    if damage.ended:
        return f"ENDED THE RUN: {damage.ended}", True
    if damage.refused:
        return f"refused, named: {damage.refused}", False
    if change < -doubt:
        return f"DAMAGE: {leading} fell by more than chance (±{doubt:.3f})", True
    if not damage.moved <= 2 * max(absence, 0.05):  # NaN too
        times = damage.moved / max(absence, 1e-9)
        return f"no loss shown yet, but the adapter is {times:.1f} times as far off as if this member had left", False
    return "contained: within twice what this member's absence changes", False


def poisoned(bench: Bench, config: RunConfig, *, rounds: int, seeds: int, leading: str) -> Iterator[Finding]:
    """Every attack under every defence. What admission refuses is tried once: no setting switches admission off."""
    where = str(bench.path)
    configs = [short(config, rounds, config.seed + k, where=where) for k in range(seeds)]
    liars = [first_drawn(one, members_at(bench, config)) for one in configs]
    doubt, absence = math.nan, 0.0
    refused: set[str] = set()
    for defence, changes in defences(config).items():
        try:
            variants = [changed(one, changes, where=where) for one in configs]
            honest = [bench.trial(one) for one in variants]
        except ConfigError as error:
            yield Finding("poison", defence, "–", "", f"not possible here: {error}")
            continue
        ended = next((one.ended for one in honest if one.ended), "")
        if ended:
            yield Finding("poison: none, all honest", defence, "–", "", f"ended the run: {ended}", True)
            continue
        if defence == "as configured":
            doubt = doubt_of(honest)
            away = _attacked(bench, variants, liars, stay_away)
            found = Damage.between(away, honest, liars)
            absence = found.moved
            yield described(
                "yardstick: the member stays away", defence, found, honest, leading, "what a loss of it costs"
            )
        for name, lie in lies(config).items():
            if name in refused or (defence == NO_CAP and "weight" not in name):
                continue  # who tells the truth about its weight is not what the cap is for
            found = Damage.between(_attacked(bench, variants, liars, tampering(lie)), honest, liars)
            if found.refused and not found.ended:
                refused.add(name)
            words, harm = verdict(found, leading, doubt=doubt, absence=absence)
            yield described(name, defence, found, honest, leading, words, harm)


def _attacked(bench: Bench, configs: Sequence[RunConfig], liars: Sequence[str], tamper: Tamper) -> list[Outcome]:
    return [bench.trial(one, liar=liar, tamper=tamper) for one, liar in zip(configs, liars, strict=True)]


def described(
    name: str, defence: str, found: Damage, honest: Sequence[Outcome], leading: str, words: str, harm: bool = False
) -> Finding:
    """A line about damage."""
    changes = ", ".join(
        f"{objective} {signed(value)}" for objective, value in found.change.items() if objective != "accuracy"
    )
    values: dict[str, float | str | None] = {f"change/{n}": v for n, v in found.change.items() if n != "accuracy"}
    return Finding(
        name,
        defence,
        f"{changes}; adapter off by {found.moved:.2f}",
        f"honest {leading} {fmean(one.end.get(leading, math.nan) for one in honest):.3f}",
        words,
        harm,
        {**values, "adapter_moved": found.moved, "seeds": float(len(honest))},
    )
