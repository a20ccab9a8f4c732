"""What an algorithm's client half sees: `protocols.Client`, for the length of one request."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpact.rewards.answers import AnswerKey
from fedpact.rewards.load import LoadedReward
from fedpact.runtime.files import storing
from fedpact.runtime.learner import Learner
from fedpact.secrets import masked
from fedpact.types import Prompts


class ClientSide(Learner):
    """See `protocols.Client`. The member keeps `memory` if the reply leaves."""

    def __init__(
        self,
        *,
        name: str,
        task: str,
        answers: AnswerKey | None,
        cache: dict[str, Any],
        log_path: Path,
        round: int,
        exchange: int,
        **learner: Any,
    ) -> None:
        super().__init__(walk=(round, exchange, name), **learner)
        weights = self.default_weights * self.present
        if weights.sum() == 0:  # every objective that this member has is weighted 0 by name
            weights = self.present.double()
        self.default_weights = weights / weights.sum()
        self.cache, self._task = cache, task
        self._answers, self._round, self._exchange, self._log_path = answers, round, exchange, log_path

    def domains(self, prompts: Prompts | None = None) -> Sequence[str]:
        prompts = self._train_prompts if prompts is None else prompts
        named = prompts.columns.get("domain", [None] * len(prompts))
        return [self._task if domain is None else str(domain) for domain in named]

    def judge(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        # Without answers of its own no column: the server must not plant what this member's rewards take for theirs.
        joined = replace(prompts, columns={}) if self._answers is None else self._answers.join(prompts)
        return self.rewards(joined, completions)

    def fit_rewards(self) -> Tensor:
        found = torch.full((len(self.objectives),), torch.nan)
        for m, name in enumerate(self.objectives):
            fit: Callable[[], float] | None = getattr(getattr(self._rewards.get(name), "function", None), "fit", None)
            if fit is not None and name not in self._audits:
                found[m] = fit()
        return found

    def outcomes(self) -> dict[str, float]:
        """How often its judges passed, failed, or could not judge, so far in this process: for the member's own log."""
        found: dict[str, float] = {}
        for name, reward in self._rewards.items():
            one: LoadedReward | None = reward
            while one is not None:
                counts = getattr(one.function, "outcomes", {})
                found |= {f"judge/{name}/{outcome}": float(count) for outcome, count in counts.items()}
                one = one.otherwise
        return found

    def log(self, **metrics: float) -> None:
        line = {"round": self._round, "exchange": self._exchange, **metrics}
        with storing(self._log_path), self._log_path.open("a", encoding="utf-8") as stream:
            stream.write(masked(json.dumps(line)) + "\n")
