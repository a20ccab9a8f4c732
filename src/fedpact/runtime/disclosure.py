"""What of a reply leaves a member: what it shares, rounded, and no figure that rests on too little."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fedpact.errors import RefusedError
from fedpact.messages import (
    Averaged,
    Counted,
    Differentiate,
    Differentiated,
    Evaluated,
    Introduced,
    Reply,
    Trained,
)

EVERYTHING = ("rewards", "accuracy", "metrics", "gradients")
BY_DEFAULT = ("rewards", "accuracy")
DIGITS = 3
"""Significant digits of what leaves a site."""
FEWEST_COUNTED = 10
"""Between sites, fewer prompts of a domain are counted as none."""


def shared(reply: Reply, share: Collection[str], metrics: Collection[str], *, digits: int | None) -> Reply:
    """The reply with what `share` does not name withheld: means NaN, accuracy None, figures gone.

    `metrics` are patterns of the figures' names that may leave; `digits` significant ones, None for all.
    """
    if isinstance(reply, Counted) and digits is not None:
        return replace(reply, domains=reply.domains.masked_fill(reply.domains < FEWEST_COUNTED, 0))
    if isinstance(reply, Differentiated):
        told = reply.rewards if "rewards" in share else torch.full_like(reply.rewards, torch.nan)
        return replace(reply, rewards=rounded(told, digits))
    if not isinstance(reply, (Trained, Evaluated)):
        return reply
    accuracy = reply.accuracy if "accuracy" in share else None
    reply = replace(
        reply,
        rewards=rounded(reply.rewards, digits) if "rewards" in share else torch.full_like(reply.rewards, torch.nan),
        accuracy=None if accuracy is None else _rounded(accuracy, digits),
    )
    if not isinstance(reply, Trained):
        return reply
    figures = reply.metrics if "metrics" in share else {}
    named: Mapping[str, float] = {
        name: _rounded(value, digits)
        for name, value in figures.items()
        if any(fnmatchcase(name, pattern) for pattern in metrics)
    }
    return replace(reply, metrics=named)


def enough(
    reply: Reply, min_samples: int, *, trained_on: int, batch: int | None = None, measured: Tensor | None = None
) -> Reply:
    """The reply without means and figures that rest on fewer completions.

    A training reply's rest on `trained_on`, a measurement of gradients' on one `batch` (None: not known yet); of these
    an objective's mean rests on those `measured`, [m]: a reward may not apply to all.
    """
    if measured is not None and isinstance(reply, (Trained, Differentiated)) and reply.rewards.shape == measured.shape:
        rare = (measured > 0) & (measured < min_samples)  # [m]
        reply = replace(reply, rewards=reply.rewards.masked_fill(rare, torch.nan))
        if isinstance(reply, Trained) and bool(rare.any()):
            reply = replace(reply, accuracy=None)  # it may be one of these means
    if isinstance(reply, Differentiated) and batch is not None and batch < min_samples:
        return replace(reply, rewards=torch.full_like(reply.rewards, torch.nan))
    if isinstance(reply, Trained) and trained_on < min_samples:
        return replace(reply, rewards=torch.full_like(reply.rewards, torch.nan), accuracy=None, metrics={})
    if not isinstance(reply, Evaluated):
        return reply
    few = (reply.counts > 0) & (reply.counts < min_samples)  # [m]
    if not bool(few.any()):
        return reply
    return replace(
        reply,
        rewards=reply.rewards.masked_fill(few, torch.nan),
        counts=reply.counts.masked_fill(few, 0),
        accuracy=None,  # it may be one of these means
    )


def bare(reply: Reply) -> Reply:
    """The reply without what tells of the member beside the adapter: its weight, its numbers of prompts.

    Means and figures are for `shared`. Raises RefusedError where nothing would be left.
    """
    if isinstance(reply, Counted):
        raise RefusedError("site.noise_multiplier: its epsilon does not cover counts of prompts; leave this run")
    if isinstance(reply, Introduced):
        return replace(reply, num_prompts=1)
    if isinstance(reply, Evaluated):
        return replace(reply, weight=1.0, counts=torch.ones_like(reply.counts))
    return replace(reply, weight=1.0) if isinstance(reply, Averaged) else reply


def rounded(values: Tensor, digits: int | None) -> Tensor:
    """The values to so many significant digits, NaN as it is; in their own type."""
    if digits is None:
        return values
    told = [_rounded(value, digits) for value in values.double().flatten().tolist()]
    return torch.tensor(told, dtype=values.dtype).reshape(values.shape)


def _rounded(value: float, digits: int | None) -> float:
    if digits is None or value == 0 or not math.isfinite(value):
        return value
    return float(f"{value:.{digits}g}")


def withheld(request: Differentiate, num_objectives: int) -> Differentiated:
    """The answer of a member that does not share gradients: as if it had no objectives, and nothing computed."""
    blank = torch.full((num_objectives, num_objectives + request.rank), torch.nan)
    return Differentiated(1.0, blank[:, :num_objectives], blank[:, num_objectives:], {}, blank[:, 0])
