"""The member's own boundary: what it lets in, and what it lets out. Nothing that a run brings can change it.

A ceiling refuses; it never changes a request, because a clamped member would run another algorithm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fedpact.errors import RefusedError
from fedpact.messages import Averaged, Evaluated, Reply, Request, Trained
from fedpact.runtime.config import SiteSettings
from fedpact.runtime.contract import Contract, contract_hash, read_contract
from fedpact.types import Adapter

EVERYTHING = ("rewards", "accuracy", "metrics")
BY_DEFAULT = ("rewards", "accuracy")


class Gate:
    """Applies a member's `[site]` settings. `simulation`: everything is on one machine, so nothing is withheld."""

    def __init__(self, site: SiteSettings, *, where: str, simulation: bool) -> None:
        self.site, self.where, self.simulation = site, where, simulation
        self.share = site.share if site.share is not None else (EVERYTHING if simulation else BY_DEFAULT)

    def accept(self, canonical: str) -> Contract:
        """The contract, if this member agrees to it. Raises RefusedError naming the key, what was asked and allowed."""
        found = contract_hash(canonical)
        if self.site.accept is None and not self.simulation:
            raise RefusedError(f"{self.where}: site.accept: no contract accepted; this run's is {found}")
        if self.site.accept not in (None, found):
            raise RefusedError(
                f"{self.where}: site.accept: {self.site.accept} is accepted; this run's contract is {found}"
            )
        contract = read_contract(canonical)
        local_steps = contract.algorithm.get("local_steps")
        asked = {
            "max_rounds": contract.rounds,
            "max_local_steps": local_steps and local_steps * contract.training.num_iterations,
            "max_completion_length": contract.rollout.max_completion_length,
            "max_learning_rate": contract.optimizer.learning_rate,
        }
        for ceiling, value in asked.items():
            limit = getattr(self.site, ceiling)
            if limit is not None and (value is None or value > limit):
                raise RefusedError(f"{self.where}: site.{ceiling}: the run asks for {value}, allowed are {limit}")
        return contract

    def enter(self, verb: str, contract: str, accepted: str | None) -> None:
        """Let a request in. Raises RefusedError if its verb or its contract is not this member's choice."""
        if verb not in self.site.verbs:
            raise RefusedError(
                f"{self.where}: site.verbs: {verb!r} is not allowed; allowed are {', '.join(self.site.verbs)}"
            )
        if verb != "hello" and contract != accepted:
            raise RefusedError(
                f"{self.where}: request under contract {contract[:12]}, accepted is {str(accepted)[:12]}"
            )

    def leave(self, request: Request[Any], reply: Reply) -> Reply:
        """What of `reply` may leave. Raises RefusedError if none of it may."""
        if isinstance(reply, Averaged):
            reply = replace(reply, weight=min(reply.weight, self.site.max_weight or float("inf")))
        fewest = _fewest(reply)
        if fewest is not None and fewest < self.site.min_samples:
            found, wanted = fewest, self.site.min_samples
            raise RefusedError(
                f"{self.where}: site.min_samples: figures rest on {found} completions, expected {wanted}"
            )
        if isinstance(reply, Trained):
            reply = replace(reply, adapter=self._clipped(getattr(request, "adapter", {}), reply.adapter))
        return self._shared(reply)

    def _clipped(self, sent: Adapter, adapter: Adapter) -> Adapter:
        kept = {name: tensor for name, tensor in adapter.items() if not name.startswith("private/")}
        if self.site.clip_norm is None:
            return kept
        if kept.keys() != sent.keys():
            odd = sorted(kept.keys() ^ sent.keys())
            raise RefusedError(
                f"{self.where}: site.clip_norm: {odd[0]} has no counterpart; expected the tensors asked for"
            )
        deltas = {name: tensor - sent[name] for name, tensor in kept.items()}
        norm = float(torch.stack([delta.double().norm() for delta in deltas.values()]).norm())
        if norm <= self.site.clip_norm:
            return kept
        return {name: sent[name] + delta * (self.site.clip_norm / norm) for name, delta in deltas.items()}

    def _shared(self, reply: Reply) -> Reply:
        if not isinstance(reply, (Trained, Evaluated)):
            return reply
        reply = replace(
            reply,
            rewards=reply.rewards if "rewards" in self.share else torch.full_like(reply.rewards, torch.nan),
            accuracy=reply.accuracy if "accuracy" in self.share else None,
        )
        if not isinstance(reply, Trained):
            return reply
        shared = reply.metrics if "metrics" in self.share else {}
        digits = None if self.simulation else 3
        return replace(reply, metrics={n: v if digits is None else round(v, digits) for n, v in shared.items()})


def _fewest(reply: Reply) -> int | None:
    """The fewest completions that a held-out mean in `reply` rests on; None if it holds none."""
    if not isinstance(reply, Evaluated) or not bool((reply.counts > 0).any()):
        return None
    return int(reply.counts[reply.counts > 0].min())
