"""A judge that lies: one member returns the opposite of its ratings, with the raters chosen and combined in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fedpact.audit.finding import Finding
from fedpact.audit.poison import Damage, described, doubt_of, verdict
from fedpact.audit.trial import Bench, changed, first_drawn, members_at, short
from fedpact.errors import ConfigError
from fedpact.messages import Reply, Scored
from fedpact.runtime.config import RunConfig
from fedpact.runtime.envelope import Envelope
from fedpact.runtime.transport import Failure

ATTACK = "lying judge"


def opposite(envelope: Envelope, reply: Reply) -> Reply | Failure:
    """One minus each rating where all are 0 or 1, their negative elsewhere. Examinations are answered honestly."""
    if not isinstance(reply, Scored):
        return reply
    given = reply.rewards[~reply.rewards.isnan()]
    binary = bool(((given == 0) | (given == 1)).all())
    return replace(reply, rewards=1 - reply.rewards if binary else -reply.rewards)


def silent(envelope: Envelope, reply: Reply) -> Reply | Failure:
    """No ratings at all."""
    return Failure("stays away") if isinstance(reply, Scored) else reply


def defences(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Name to changes of the run file, of those settings that the algorithm has."""
    algorithm = config.algorithm
    found: dict[str, dict[str, Any]] = {"as configured": {}}
    if hasattr(algorithm, "canaries"):
        if algorithm.canaries:
            found["without canaries"] = {"canaries": 0, "min_canary": None}
        if getattr(algorithm, "min_canary", None) is None:
            found["with canaries"] = {"canaries": algorithm.canaries or 2, "min_canary": 0.75}
    if hasattr(algorithm, "aggregation"):
        together = {"assignment": "everybody", "num_experts": max(3, int(getattr(algorithm, "num_experts", 3)))}
        for rule in ("mean", "median", "trimmed_mean"):
            found[f"three raters or more, {rule}"] = {**together, "aggregation": rule}
    return {name: {f"algorithm.{key}": value for key, value in one.items()} for name, one in found.items()}


def judged(bench: Bench, config: RunConfig, *, rounds: int, seeds: int, leading: str) -> Iterator[Finding]:
    """The lie under every way of asking; the figure is the held-out mean of the server's own prompts."""
    where = str(bench.path)
    configs = [short(config, rounds, config.seed + k, where=where) for k in range(seeds)]
    liars = [first_drawn(one, members_at(bench, config)) for one in configs]
    for defence, changes in defences(config).items():
        try:
            variants = [changed(one, changes, where=where) for one in configs]
            honest = [bench.trial(one) for one in variants]
        except ConfigError as error:
            yield Finding(ATTACK, defence, "–", "", f"not possible here: {error}")
            continue
        pairs = list(zip(variants, liars, strict=True))
        away = Damage.between([bench.trial(one, liar=who, tamper=silent) for one, who in pairs], honest, liars)
        if defence == "as configured":
            yield described(
                "yardstick: the judge stays away", defence, away, honest, leading, "what a loss of it costs"
            )
        lied = [bench.trial(one, liar=who, tamper=opposite) for one, who in pairs]
        found = Damage.between(lied, honest, liars)
        words, harm = verdict(found, leading, doubt=doubt_of(honest), absence=away.moved)
        rates = [one.logged.get(f"canary/{who}") for one, who in zip(lied, liars, strict=True)]
        known = [rate for rate in rates if rate is not None]
        if known:
            words += f"; right on {sum(known) / len(known):.2f} of the canaries"
        yield described(ATTACK, defence, found, honest, leading, words, harm)
