"""A member: resident model, prompts, rewards, memory, gate and ledger. It answers envelopes and sends nothing else."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedpact.errors import ConfigError, DataError, FedPactError, RefusedError
from fedpact.messages import Evaluate, Evaluated, Hello, Introduced, Reply, Request
from fedpact.policy.model import resolve
from fedpact.rewards.load import LoadedReward, load_reward
from fedpact.runtime.client import ClientSide
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import ClientConfig, RewardSettings, parse_algorithm
from fedpact.runtime.contract import Contract, contract_hash
from fedpact.runtime.engines import Engines
from fedpact.runtime.envelope import Envelope, wrap
from fedpact.runtime.gate import Gate
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.memory import MemberStore
from fedpact.tasks.files import load_prompts, split_heldout
from fedpact.types import Prompts


class Member:
    """One member. `home` is its private folder; `where` names its file in messages; `simulation` if all is local."""

    def __init__(
        self,
        config: ClientConfig,
        *,
        folder: Path,
        home: Path,
        where: str,
        engines: Engines,
        model: Path | None = None,
        simulation: bool = False,
    ) -> None:
        self.config, self.where, self.engines = config, where, engines
        self.gate = Gate(config.site, where=where, simulation=simulation)
        if config.model.path is None and not simulation:
            raise ConfigError(f"{where}: model.path: missing; a member names its own copy of the contract's model")
        own = config.model.path
        self.model = resolve(own, where=f"{where}: model.path", folder=folder) if own else model
        self.train_prompts, self.heldout = self._prompts(folder)
        self.rewards = {
            name: _loaded(name, reward, where=where, folder=folder) for name, reward in config.rewards.items()
        }
        self.store = MemberStore(home / "memory")
        self.ledger = Ledger(home / "ledger.jsonl")
        self.log_path = home / "log.jsonl"
        self.cache: dict[str, Any] = {}
        self.contract: Contract | None = None
        self.accepted: str | None = None

    def handle(self, data: bytes) -> bytes:
        """The answer to an envelope, both as bytes. Raises FedPactError; then nothing is sent."""
        envelope = decode(Envelope, data)
        digest = envelope.digest()
        try:
            self.gate.enter(envelope.verb, envelope.contract, self.accepted)
            reply = self._reply(envelope, digest)
        except FedPactError as error:
            self._note(envelope, digest, data, decision="refused", reason=type(error).__name__)
            raise
        sha256 = hashlib.sha256(reply).hexdigest()
        self._note(envelope, digest, data, decision="sent", reply=sha256, bytes_out=len(reply))
        return wrap(envelope, reply)

    def _reply(self, envelope: Envelope, digest: str) -> bytes:
        request = envelope.open()
        if isinstance(request, Hello):
            return encode(self.gate.leave(request, self.hello(request)))
        # asked again: the same bytes, and nothing is computed or spent twice
        return self.store.cached(digest) or self._answer(envelope, request, digest)

    def _note(self, envelope: Envelope, digest: str, data: bytes, **what: Any) -> None:
        self.ledger.append(
            run=envelope.run,
            round=envelope.round,
            exchange=envelope.exchange,
            attempt=envelope.attempt,
            peer="server",
            verb=envelope.verb,
            contract=envelope.contract,
            request=digest,
            bytes_in=len(data),
            **what,
        )

    def hello(self, request: Hello) -> Introduced:
        """Accept the contract, or refuse it."""
        contract = self.gate.accept(request.contract)
        unknown = [name for name in self.rewards if name not in contract.objectives]
        if unknown:
            known = ", ".join(contract.objectives)
            raise ConfigError(f"{self.where}: rewards.{unknown[0]}: no such objective in the run; there are {known}")
        trained = tuple(name for name in contract.objectives if name in self.rewards and not self._audit(name))
        if not trained:
            raise ConfigError(f"{self.where}: rewards: all are audits; expected at least one to train on")
        primary = None if contract.primary is None else list(contract.objectives)[contract.primary]
        if "primary" in parse_algorithm(contract.algorithm).needs and primary not in trained:
            raise ConfigError(
                f"{self.where}: rewards: lacks the primary objective {primary!r}, which this algorithm needs; "
                f"add [rewards.{primary}]"
            )
        self.contract, self.accepted = contract, contract_hash(request.contract)
        return Introduced(
            name=self.config.name,
            task=self.config.task,
            objectives=trained,
            num_prompts=len(self.train_prompts),
            rank=contract.lora.r,
            versions={package: version(package) for package in ("fedpact", "torch", "transformers", "peft")},
        )

    def check(self) -> str:
        """Dry-run two prompts with the untrained model, after `hello`; what there is to say, in a line."""
        client = self._client(round=0, exchange=0, since=None)
        two = self.train_prompts.select([0, min(1, len(self.train_prompts) - 1)])
        try:
            rollout = client.policy.generate(two, draw=0)
        except DataError as error:
            raise DataError(f"{self.where}: prompts: {error}") from error
        rewards = client.rewards(rollout.prompts, rollout.completions, audits=True)
        figures = ", ".join(
            f"{name} {float(row.nanmean()):.2f}"
            for name, row in zip(client.objectives, rewards, strict=True)
            if name in self.rewards
        )
        return (
            f"{self.config.name}: {len(self.train_prompts)} prompts, {len(self.heldout)} held out; mean rewards of "
            f"{len(rollout.completions)} completions: {figures}"
        )

    def evaluate(self, request: Evaluate) -> Evaluated:
        """Held-out results, for this member's own eyes: past the gate, and nothing is remembered."""
        return self._evaluate(request, self._client(round=0, exchange=0, since=None))

    def _answer(self, envelope: Envelope, request: Request[Any], digest: str) -> bytes:
        client = self._client(envelope.round, envelope.exchange, envelope.since)
        algorithm = parse_algorithm(client.contract.algorithm)
        if isinstance(request, Evaluate):
            reply: Reply = self._evaluate(request, client)
        elif hasattr(algorithm, request.verb):
            reply = algorithm.answer(request, client)
        else:
            raise RefusedError(f"{self.where}: {algorithm.model_dump().get('name')} sends no {request.verb!r} requests")
        client.log(sampler_gap=client.policy.sampler_gap)
        data = encode(self.gate.leave(request, reply))
        self.store.save((envelope.round, envelope.exchange), client.memory, digest, data)
        if envelope.since is not None:
            self.store.prune(envelope.since)
        return data

    def _client(self, round: int, exchange: int, since: tuple[int, int] | None) -> ClientSide:
        if self.contract is None or self.model is None:
            raise RefusedError(f"{self.where}: no contract yet; the server has to say hello first")
        policy = self.engines.policy(self.model, self.config.model, self.contract, where=self.where)
        policy.begin(self.contract.seed, round, exchange, self.config.name)
        return ClientSide(
            contract=self.contract,
            config=self.config,
            rewards=self.rewards,
            train_prompts=self.train_prompts,
            policy=policy,
            memory=self.store.load(since),
            cache=self.cache,
            log_path=self.log_path,
            round=round,
            exchange=exchange,
        )

    def _evaluate(self, request: Evaluate, client: ClientSide) -> Evaluated:
        settings = client.contract.evaluation
        prompts = self.heldout.select(list(range(min(settings.num_prompts or len(self.heldout), len(self.heldout)))))
        client.policy.load(request.adapter)
        rollout = client.policy.generate(
            prompts, draw=0, num_generations=settings.num_generations, greedy=request.greedy
        )
        rewards = client.rewards(rollout.prompts, rollout.completions, audits=True)
        means = rewards.nanmean(dim=1)
        accuracy = None if client.primary is None else float(means[client.primary])
        return Evaluated(
            weight=float(rewards.shape[1]),
            rewards=means,
            counts=(~rewards.isnan()).sum(dim=1),
            accuracy=None if accuracy is None or accuracy != accuracy else accuracy,
        )

    def _prompts(self, folder: Path) -> tuple[Prompts, Prompts]:
        settings = self.config.prompts
        shared: dict[str, Any] = {
            "folder": folder,
            "prompt": settings.prompt,
            "template": settings.template,
            "system": settings.system,
            "as_chat": settings.as_chat,
            "split": settings.split,
            "rename": settings.rename,
        }
        prompts = load_prompts(settings.path, limit=settings.limit, where=f"{self.where}: prompts.path", **shared)
        if settings.heldout is not None:
            return prompts, load_prompts(settings.heldout, where=f"{self.where}: prompts.heldout", **shared)
        try:
            train, heldout = split_heldout(prompts, settings.heldout_share, 0)
        except DataError as error:
            raise DataError(f"{self.where}: prompts.heldout_share: {error}") from error
        return train, heldout

    def _audit(self, name: str) -> bool:
        return self.config.rewards[name].audit


def _loaded(name: str, reward: RewardSettings, *, where: str, folder: Path) -> LoadedReward:
    place = f"{where}: rewards.{name}"
    return load_reward(reward.use, reward.kwargs, where=place, folder=folder, timeout_s=reward.timeout_s)
