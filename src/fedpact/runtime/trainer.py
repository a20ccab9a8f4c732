"""The server's own model, questions, labelled examples and rewards, where an algorithm trains at the server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from fedpact.algorithms.base import Algorithm
from fedpact.errors import DataError
from fedpact.messages import Evaluate, Evaluated
from fedpact.policy.encoders import Encoder, encoder
from fedpact.policy.lora_policy import LoraPolicy
from fedpact.rewards.load import LoadedReward, load_reward
from fedpact.runtime.client_config import RewardSettings
from fedpact.runtime.config import ServerSettings
from fedpact.runtime.contract import Contract
from fedpact.runtime.engines import Engines
from fedpact.runtime.learner import Learner
from fedpact.runtime.prompts import prompts_at, split_prompts
from fedpact.types import Prompts


class Trainer:
    """What the `[server]` table of a run file names, loaded. `folder` is the run file's, `home` the run's.

    Raises ConfigError. The model is loaded when it is first used.
    """

    def __init__(
        self, settings: ServerSettings, contract: Contract, *, folder: Path, home: Path, model: Path, where: str
    ) -> None:
        self.settings, self.contract, self.model, self.where = settings, contract, model, where
        self.prompts, self.heldout = split_prompts(settings.prompts, folder, where=f"{where}: server.prompts")
        self._auxiliary = self._labelled(folder)
        self.rewards = {
            name: loaded(reward, where=f"{where}: server.rewards.{name}", folder=folder, home=home)
            for name, reward in settings.rewards.items()
        }
        self.audits = frozenset(name for name, reward in settings.rewards.items() if reward.audit)
        self._engines = Engines()
        self._encoder: Encoder = encoder(
            settings.encoder, self.examples(), folder=folder, where=f"{where}: server.encoder"
        )
        self._embedded: Tensor | None = None  # of the auxiliary examples: frozen, so worked out once

    def check(self, algorithm: Algorithm) -> None:
        """Raises DataError if the algorithm needs more than there is."""
        try:
            algorithm.check_data(self.prompts, self._auxiliary)
        except ValueError as error:
            raise DataError(f"{self.where}: {error}") from error

    def policy(self, *parts: str | int) -> LoraPolicy:
        """The server's policy, its draws keyed by `parts`."""
        policy = self._engines.policy(self.model, self.settings.model, self.contract, where=f"{self.where}: server")
        policy.begin(self.contract.seed, *parts)
        return policy

    def evaluate(self, request: Evaluate, *, round: int) -> Evaluated:
        """Results on the server's held-out prompts, by all of its rewards."""
        learner = Learner(
            contract=self.contract,
            rewards=self.rewards,
            audits=self.audits,
            train_prompts=self.prompts,
            policy=lambda: self.policy(round, "heldout", "server"),
            memory={},
            walk=(),
        )
        return learner.evaluate(request, self.heldout)

    def auxiliary(self) -> Prompts:
        """The labelled examples. Raises DataError if the run file names none."""
        if self._auxiliary is None:
            raise DataError(f"{self.where}: server.auxiliary: missing; this algorithm needs labelled examples")
        return self._auxiliary

    def embed(self, prompts: Prompts, policy: Callable[[], LoraPolicy]) -> Tensor:
        """[p, h] unit rows; `policy` gives the policy of this round."""
        if prompts is not self._auxiliary:
            return self._encoder(prompts, policy)
        if self._embedded is None:
            self._embedded = self._encoder(prompts, policy)
        return self._embedded

    def examples(self) -> Prompts:
        """What a dry run shows to members that only judge: the auxiliary examples, or questions."""
        return self.prompts if self._auxiliary is None else self._auxiliary

    def _labelled(self, folder: Path) -> Prompts | None:
        if self.settings.auxiliary is None:
            return None
        found = prompts_at(self.settings.auxiliary, folder, where=f"{self.where}: server.auxiliary")
        answers = found.columns.get("answer")
        if answers is None:
            return found
        missing = [row for row, answer in enumerate(answers) if answer is None]
        if missing:
            raise DataError(
                f"{self.where}: server.auxiliary: row {missing[0]} has no answer; give it one, or remove it"
            )
        references = [self.settings.reference.replace("{answer}", str(answer)) for answer in answers]
        return dataclasses.replace(found, columns={**found.columns, "reference": references})


def loaded(reward: RewardSettings, *, where: str, folder: Path, home: Path) -> LoadedReward:
    """The reward that the table `where` names, with the one that is asked where it does not apply."""
    first = load_reward(reward.use, reward.kwargs, where=where, folder=folder, home=home, timeout_s=reward.timeout_s)
    if reward.otherwise is None:
        return first
    second = loaded(reward.otherwise, where=f"{where}.otherwise", folder=folder, home=home)
    return dataclasses.replace(first, otherwise=second)
