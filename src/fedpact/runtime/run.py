"""A run, round by round, from wherever its folder stands to the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedpact.core.server_optimizer import server_step
from fedpact.errors import ConfigError, StoreError, TooFewRepliesError
from fedpact.faults import fault_point
from fedpact.messages import Introduced
from fedpact.runtime.admission import Limits
from fedpact.runtime.bounds import Norms, Rules, capped_prompts
from fedpact.runtime.card import model_card
from fedpact.runtime.config import RunConfig
from fedpact.runtime.contract import Contract, contract_hash, contract_of
from fedpact.runtime.engines import Skeleton
from fedpact.runtime.envelope import Version
from fedpact.runtime.exchange import Round
from fedpact.runtime.greeting import Greeting
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.measure import conflicts, evaluate, maps_conflicts
from fedpact.runtime.server import ServerSide
from fedpact.runtime.store import RunFolder, manifest_digest
from fedpact.runtime.trainer import Trainer
from fedpact.runtime.transport import Transport
from fedpact.seeding import permutation
from fedpact.types import Adapter, ClientId, Memory

_GREETING_S = 30.0
"""How long a round waits for who is not in it yet."""


class Observer(Protocol):
    """Somebody who watches a run."""

    def round_done(self, round: int, metrics: Sequence[Mapping[str, Any]]) -> None: ...
    def dropped(self, client: ClientId, reason: str) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What a run begins with."""

    model: Skeleton
    adapter: Adapter
    adapter_config: Mapping[str, Any]
    trainer: Trainer | None = None
    """The server's own model, questions and rewards, if the run file names any."""


class Run:
    """One run over one transport. `folder` is open for writing; it may hold rounds already."""

    def __init__(
        self, folder: RunFolder, config: RunConfig, start: Start, transport: Transport, observer: Observer
    ) -> None:
        self.folder, self.config, self.start, self.transport, self.observer = folder, config, start, transport, observer
        self.contract: Contract = contract_of(config, model=start.model.sha256)
        self.trainer = start.trainer
        self.canonical = self.contract.canonical()
        self.hash = contract_hash(self.canonical)
        self.name = folder.path.resolve().name
        self.limits = Limits(len(config.objectives), frozenset(config.objectives))
        federation = config.federation
        self.rules = Rules(federation.max_share, federation.clip_factor, federation.clip_norm)
        self.ledger = Ledger(folder.path / "ledger.jsonl")
        self.greeting = Greeting(self.name, self.canonical, config, transport, self.ledger, observer.dropped)
        self.since: dict[ClientId, Version] = {}
        self.norms: Norms = {}
        self._refused: set[ClientId] = set()
        """Who said no in the last round: it may have lost sight of this run."""
        self.passed: tuple[int, float] | None = None
        """The last round whose evaluation was good enough, and its score."""

    def introduce(self) -> dict[ClientId, Introduced]:
        """Say hello to everybody; who refuses the contract is dropped. Raises TooFewRepliesError or ConfigError."""
        asked = list(self.transport.clients())
        introduced = self.greeting.met(asked)
        if len(introduced) < self.config.federation.min_replies:
            raise TooFewRepliesError(
                f"{len(introduced)} of {len(asked)} members said hello, expected at least "
                f"{self.config.federation.min_replies} (federation.min_replies){self.greeting.excuse()}"
            )
        size, needed = self._cohort_size(len(introduced)), self.config.federation.min_replies
        if size < needed:
            raise ConfigError(
                f"federation.min_replies: found {needed}; with participation {self.config.federation.participation:g} "
                f"a round asks {size} of {len(introduced)} members; lower one or raise the other"
            )
        trained = {name for one in introduced.values() for name in one.objectives}
        if idle := sorted(set(self.config.algorithm.concerns()) - trained):
            raise ConfigError(
                f"algorithm: its settings name {idle[0]!r}, on which no member trains; let one do so, or remove it"
            )
        return introduced

    def go(self, clients: Mapping[ClientId, Introduced], *, until: int | None = None) -> None:
        """All rounds that are left, then the exports. Every committed round can be resumed from.

        `until` ends it after that round, without exports.
        """
        fault_point("run.introduced")
        latest = self.folder.latest_round()
        if latest is None:
            adapter, memory = self.start.adapter, Memory()
            self._round(0, adapter, memory, clients)
            latest = 0
        else:
            checkpoint = self.folder.load(latest)
            if checkpoint.state["contract"] != self.hash:
                raise StoreError(
                    f"{self.folder.path}: round {latest} was made under contract {checkpoint.state['contract'][:12]}, "
                    f"now it is {self.hash[:12]}; the configuration or the model has changed: put it back"
                )
            adapter, memory = checkpoint.adapter, checkpoint.memory
            if not any(one.get("decision") == "committed" and one["round"] == latest for one in self._entries()):
                self._committed(latest)  # a crash came between the two
            self.since = {client: (v[0], v[1]) for client, v in checkpoint.state["since"].items()}
            self.norms = checkpoint.state.get("norms", {})
            passed = checkpoint.state.get("passed")
            self.passed = None if passed is None else (int(passed[0]), float(passed[1]))
        for number in range(latest + 1, (self.config.rounds if until is None else until) + 1):
            if again := [one for one in self.transport.clients() if one not in clients or one in self._refused]:
                met = self.greeting.met(again, within_s=_GREETING_S)  # come lately, or changed its mind
                clients = dict(sorted({**clients, **met}.items()))
            adapter = self._round(number, adapter, memory, clients)
        if until is not None:
            return
        exports = self.config.algorithm.exports(adapter, memory)
        for name, exported in sorted(exports.items(), key=lambda one: one[0] == "final"):  # last: it says "finished"
            self.folder.write_final(name, exported, self.start.adapter_config, model_card(self, len(clients)))
        fault_point("run.finished")

    def _round(self, number: int, adapter: Adapter, memory: Memory, clients: Mapping[ClientId, Introduced]) -> Adapter:
        self.folder.begin(number, sorted(clients))
        one = Round(
            run=self.name,
            contract=self.hash,
            number=number,
            transport=self.transport,
            ledger=self.ledger,
            limits=self.limits,
            spool=lambda exchange: self.folder.spool(number, exchange),
            since=dict(self.since),
            min_replies=self.config.federation.min_replies,
            timeout_s=self.config.federation.timeout_s,
            dropped=self.observer.dropped,
            r=self.config.policy.lora.r,
            smaller_ranks={name: it.rank for name, it in clients.items() if it.rank < self.config.policy.lora.r},
            factor=self.config.training.factor(number),
            rules=self.rules,
            norms={kind: list(norms) for kind, norms in self.norms.items()},
        )
        if number > 0:
            drawn = {client: clients[client] for client in self._cohort(number, sorted(clients))}
            cohort = capped_prompts(drawn, self.rules.max_share)
            side = ServerSide(
                one,
                contract=self.contract,
                clients=cohort,
                memory=memory,
                trainer=self.trainer,
                num_members=len(clients),
                federation=self.config.federation,
            )
            adapter = self._stepped(adapter, self.config.algorithm.server(adapter, side), memory)
            fault_point("run.aggregated")
            for name in ("sampler_gap", "averaging_error"):
                if getattr(side, name) is not None:
                    side.log(**{name: getattr(side, name)})
        if number % self.config.evaluation.every == 0 or number == self.config.rounds:
            score = evaluate(one, self.config, adapter, clients, self.trainer)
            adapter = self._gated(one, adapter, memory, score)
            fault_point("run.evaluated")
        if maps_conflicts(self.config, clients, number):
            conflicts(one, self.config, adapter, clients)
        self.folder.commit(
            number,
            adapter=adapter,
            adapter_config=self.start.adapter_config,
            memory=memory,
            state={
                "schema": 2,
                "round": number,
                "contract": self.hash,
                "since": one.since,
                "norms": one.norms,
                "passed": self.passed,
                "exchanges": one.record,
                "members": sorted(clients),
            },
            metrics=one.metrics,
        )
        fault_point("run.committed")
        self._committed(number)
        self.since, self.norms, self._refused = one.since, one.norms, one.refused
        self.observer.round_done(number, one.metrics)
        return adapter

    def _gated(self, one: Round, adapter: Adapter, memory: Memory, score: float) -> Adapter:
        """The adapter; or the last that passed, with the memory of then, if the score has fallen too far from its."""
        fall = self.config.evaluation.rollback
        if fall is not None and self.passed is not None and score < self.passed[1] - fall:
            one.log("server", {"rolled_back_to": self.passed[0]})
            before = self.folder.load(self.passed[0])
            memory.clear()
            memory.update(before.memory)
            return before.adapter
        self.passed = (one.number, score) if fall is not None and score == score else self.passed
        return adapter

    def _stepped(self, adapter: Adapter, result: Adapter, memory: Memory) -> Adapter:
        """What the server's optimiser makes of a round that led from `adapter` to `result`."""
        settings = self.config.server_optimizer
        if settings.name == "none":
            return result
        stepped, moments = server_step(
            settings.name,
            adapter,
            result,
            memory,
            learning_rate=settings.rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            tau=settings.tau,
        )
        memory.update(moments)
        return stepped

    def _entries(self) -> list[dict[str, Any]]:
        return Ledger.entries(self.ledger.path)

    def _committed(self, number: int) -> None:
        """Note a round's MANIFEST in the ledger, whose head members keep."""
        digest = manifest_digest(self.folder.path / "rounds" / f"{number:04d}")
        self.ledger.append(run=self.name, round=number, contract=self.hash, decision="committed", manifest=digest)

    def _cohort_size(self, members: int) -> int:
        return max(1, math.ceil(round(self.config.federation.participation * members, 9)))

    def _cohort(self, number: int, names: list[ClientId]) -> list[ClientId]:
        size = self._cohort_size(len(names))
        order = permutation(len(names), self.config.seed, number, "cohort")
        return sorted(names[i] for i in order[:size])
