"""Centralised GRPO: the server trains with rewards of its own. What federation is measured against."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveInt

from fedpact.algorithms.base import Algorithm
from fedpact.algorithms.judging import train_at_server
from fedpact.algorithms.steps import Aggregation
from fedpact.errors import DataError
from fedpact.protocols import Server
from fedpact.types import Adapter


class GRPO(Algorithm):
    """The server trains on its own questions with its own rewards, and no member is asked anything.

    The upper bound for FedGRPO if those rewards are the truth. Shao et al. 2024 (arXiv:2402.03300).
    """

    name: Literal["grpo"] = "grpo"
    server_steps: PositiveInt = 8
    """Steps in a round."""
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    """As for fedgrpo."""

    needs: ClassVar[frozenset[str]] = frozenset({"server"})

    def server(self, adapter: Adapter, server: Server) -> Adapter:
        if not bool(server.present.any()):
            raise DataError("server.rewards: none is trained on; set audit = false for one at least")
        return train_at_server(
            adapter,
            server,
            lambda rollout, step: server.rewards(rollout.prompts, rollout.completions),
            steps=self.server_steps,
            how=self.multi_objective_aggregation,
        )
