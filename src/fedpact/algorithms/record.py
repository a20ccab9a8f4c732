"""What the server remembers of its raters: how often each was right, out of how often that could be told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpact.protocols import Server
from fedpact.types import ClientId, Memory

ENOUGH = 64
"""Judgements before a record says anything."""


def add_to_record(memory: Memory, kind: str, names: Sequence[ClientId], right: Tensor, of: Tensor) -> None:
    """Add [k] sums and [k] counts to the members' records of this kind."""
    for name, *new in zip(names, right.tolist(), of.tolist(), strict=True):
        before = memory.get(f"{kind}/{name}", torch.zeros(2, dtype=torch.float64))
        memory[f"{kind}/{name}"] = before + torch.tensor(new, dtype=torch.float64)


def rate_on_record(memory: Memory, kind: str, name: ClientId, *, enough: int = ENOUGH) -> float | None:
    """The share of a member's judgements that were right; None before there are `enough`."""
    if f"{kind}/{name}" not in memory:
        return None
    right, of = memory[f"{kind}/{name}"].tolist()
    return right / of if of >= enough else None


def log_record(server: Server, kinds: Sequence[str]) -> None:
    """The records of this round's cohort, as metrics."""
    for kind in kinds:
        rates = {f"{kind}/{name}": rate_on_record(server.memory, kind, name, enough=1) for name in server.clients}
        server.log(**{name: rate for name, rate in rates.items() if rate is not None})
