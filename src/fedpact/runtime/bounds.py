"""How far one member can move a round: its weight is capped, and its change of the adapter is clipped.

Both are worked out once an exchange is closed, from its roster and from the norms of committed rounds alone, so that a
resumed round bounds everybody as before, in whatever order replies came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from fedpact.core.aggregate import AdapterMean, weighted_sum
from fedpact.core.robust import (
    capped_shares,
    clip_threshold,
    cosine,
    delta_norm,
    geometric_median_weights,
    gram_of,
    product_change,
    trimmed_mean,
)
from fedpact.messages import Averaged, Differentiated, Introduced, Reply, Request, Train, Trained
from fedpact.runtime.adapters import delta_start, grouped, lora_part, shortened
from fedpact.types import Adapter, ClientId

_GRADIENTS = "gradients"
_REMEMBERED = 100
"""Accepted norms behind a running median."""

Norms = dict[str, list[float]]
"""Exchange and group of tensors, as in "0/adapter", to the norms accepted lately, oldest first."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The run's `[federation]` settings of the same names."""

    max_share: float = 2.0
    clip_factor: float = 2.0
    clip_norm: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """What is left of one member's reply."""

    weight: float
    start: Adapter = field(default_factory=dict)
    """What its adapter is compared with."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Group of tensors to the share of its change that counts; 1 where it is missing."""

    def apply(self, reply: Reply) -> Reply:
        """The reply as it counts."""
        if not isinstance(reply, Averaged):
            return reply
        reply = replace(reply, weight=self.weight)
        if isinstance(reply, Differentiated):
            return _scaled(reply, self.scales.get(_GRADIENTS, 1.0))
        return replace(reply, adapter=self._clipped(reply.adapter)) if isinstance(reply, Trained) else reply

    def _clipped(self, adapter: Adapter) -> Adapter:
        result = dict(adapter)
        for group, names in grouped(adapter).items():
            if (scale := self.scales.get(group, 1.0)) < 1.0:
                result |= {name: shortened(self.start[name], adapter[name], scale) for name in names}
        return result


def bounds_of(
    replies: Mapping[ClientId, Reply],
    requests: Mapping[ClientId, Request[Any]],
    rules: Rules,
    norms: Norms,
    *,
    exchange: int,
    log: Callable[[ClientId, Mapping[str, float]], None],
) -> dict[ClientId, Bound]:
    """A bound for each of `replies`, which are read one at a time; adds what was accepted to `norms`."""
    weights: dict[ClientId, float] = {}
    lengths: dict[ClientId, dict[str, float]] = {}
    for client, reply in replies.items():
        if isinstance(reply, Averaged):
            weights[client] = reply.weight
        if isinstance(reply, Differentiated):  # one length for all objectives: what is between them stays
            lengths[client] = {_GRADIENTS: math.sqrt(max(0.0, float(reply.gramian.diagonal().double().nansum())))}
        if isinstance(reply, Trained):
            start = delta_start(cast("Train", requests[client]).adapter)
            lengths[client] = {
                group: delta_norm(start, reply.adapter, n) for group, n in grouped(reply.adapter).items()
            }
    weights = capped(weights, rules.max_share)
    limits = {
        group: clip_threshold(
            norms.get(f"{exchange}/{group}", []),
            [one.get(group, 0.0) for one in lengths.values()],
            factor=rules.clip_factor,
            cap=rules.clip_norm,
        )
        for group in sorted({group for one in lengths.values() for group in one})
    }
    bounds = {}
    for client, weight in weights.items():
        scales = {g: limits[g] / norm for g, norm in lengths.get(client, {}).items() if norm > limits[g]}
        request = requests[client]
        start = delta_start(request.adapter) if isinstance(request, Train) and client in lengths else {}
        bounds[client] = Bound(weight, start, scales)
    for group, limit in limits.items():
        accepted = [min(one[group], limit) for one in lengths.values() if one.get(group, 0.0) > 0]
        norms[f"{exchange}/{group}"] = [*norms.get(f"{exchange}/{group}", []), *accepted][-_REMEMBERED:]
    if lengths and all(isinstance(requests[client], Train) for client in lengths):
        _describe({client: cast("Trained", replies[client]) for client in lengths}, lengths, bounds, log)
    return bounds


def capped(weights: Mapping[ClientId, float], max_share: float) -> dict[ClientId, float]:
    """The weights, each lowered to `max_share` / n of their sum if it is above; the sum stays as it is."""
    if not weights:
        return {}
    total = sum(weights.values())
    if max(weights.values()) * len(weights) <= max_share * total:
        return dict(weights)
    shares = capped_shares(list(weights.values()), max_share)
    return {client: share * total for client, share in zip(weights, shares, strict=True)}


def robust_mean(replies: Mapping[ClientId, Trained], aggregation: str, trim: float) -> Adapter:
    """The geometric median of the replies' adapters, or their trimmed mean; holds all of them at once."""
    found = {client: replies[client] for client in replies}
    adapters = [reply.adapter for reply in found.values()]
    if aggregation == "trimmed_mean":
        return {name: trimmed_mean([adapter[name] for adapter in adapters], trim) for name in adapters[0]}
    first = adapters[0]
    gram = gram_of([{name: one[name] - first[name] for name in first} for one in adapters])  # the median moves along
    shares = geometric_median_weights(gram, [reply.weight for reply in found.values()])
    return weighted_sum(adapters, shares)


def capped_prompts(clients: Mapping[ClientId, Introduced], max_share: float) -> dict[ClientId, Introduced]:
    """The members, with their numbers of prompts capped: they are claims as well, and algorithms weigh by them."""
    claims = {name: float(one.num_prompts) for name, one in clients.items() if one.num_prompts > 0}
    counts = capped(claims, max_share)
    if counts == claims:
        return dict(clients)
    return {name: replace(one, num_prompts=round(counts.get(name, 0.0))) for name, one in clients.items()}


def _scaled(reply: Differentiated, scale: float) -> Differentiated:
    """The reply as if all its gradients had this share of their length."""
    if scale >= 1.0:
        return reply
    factors = {name: tensor * scale if name == "left" else tensor for name, tensor in reply.factors.items()}
    return replace(reply, gramian=reply.gramian * scale**2, sketch=reply.sketch * scale, factors=factors)


def _describe(
    replies: Mapping[ClientId, Trained],
    lengths: Mapping[ClientId, Mapping[str, float]],
    bounds: Mapping[ClientId, Bound],
    log: Callable[[ClientId, Mapping[str, float]], None],
) -> None:
    """Log each change of the adapter as it came, its cosine with the mean of the others', and how much of it counts."""
    mean = AdapterMean()
    for client, bound in bounds.items():
        mean.add(_delta(bound, bound.apply(replies[client])), bound.weight)
    centre, total = mean.result(), sum(bound.weight for bound in bounds.values())
    for client, bound in bounds.items():
        came, counted = (_delta(bound, reply) for reply in (replies[client], bound.apply(replies[client])))
        others = {name: total * centre[name] - bound.weight * counted[name] for name in centre}
        log(
            client,
            {
                "update/norm": lengths[client].get("adapter", 0.0),
                "update/product_norm": product_change(lora_part(bound.start), lora_part(replies[client].adapter)),
                "update/cosine": cosine(came, others) if len(bounds) > 1 else float("nan"),
                "update/kept": min(bound.scales.values(), default=1.0),
            },
        )


def _delta(bound: Bound, reply: Reply) -> Adapter:
    """The change of the adapter, without what travels beside it."""
    assert isinstance(reply, Trained)
    return {name: reply.adapter[name] - bound.start[name] for name in grouped(reply.adapter).get("adapter", ())}
