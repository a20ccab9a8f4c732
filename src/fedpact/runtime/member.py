"""A member: resident model, prompts, rewards, memory, gate and ledger. It answers envelopes and sends nothing else."""

from __future__ import annotations

import hashlib
import traceback
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from fedpact.algorithms.base import Algorithm
from fedpact.core.lora import initial_adapter
from fedpact.errors import ConfigError, FedPactError, RefusedError
from fedpact.faults import fault_point
from fedpact.messages import Differentiate, Evaluate, Evaluated, Hello, Introduced, Reply, Request, Train, Trained
from fedpact.policy.lora_policy import LoraPolicy
from fedpact.policy.model import resolve
from fedpact.rewards.answers import AnswerKey
from fedpact.runtime.adapters import completed, for_rank, private_part
from fedpact.runtime.admission import Limits, admit
from fedpact.runtime.client import ClientSide
from fedpact.runtime.client_config import ClientConfig
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import parse_algorithm
from fedpact.runtime.contract import Contract, contract_hash
from fedpact.runtime.disclosure import withheld
from fedpact.runtime.engines import Engines
from fedpact.runtime.envelope import Envelope, is_head, wrap
from fedpact.runtime.files import append_durably, storing
from fedpact.runtime.gate import Gate
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.memory import MemberStore
from fedpact.runtime.prompts import prompts_at, split_prompts
from fedpact.runtime.trainer import loaded
from fedpact.secrets import masked
from fedpact.seeding import key
from fedpact.types import NO_PROMPTS, Adapter, Memory


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
        self.config, self.where, self.engines, self.home = config, where, engines, home
        self.gate = Gate(config.site, where=where, home=home, simulation=simulation)
        own = config.model.path
        self.model = resolve(own, where=f"{where}: model.path", folder=folder) if own else model
        self.train_prompts, self.heldout = NO_PROMPTS, NO_PROMPTS
        if config.prompts is not None:
            self.train_prompts, self.heldout = split_prompts(config.prompts, folder, where=f"{where}: prompts")
        self.answers: AnswerKey | None = None
        if config.answers is not None:
            known = prompts_at(config.answers, folder, where=f"{where}: answers")
            self.answers = AnswerKey(known, id=config.answers.id, where=f"{where}: answers")
        self.rewards = {
            name: loaded(reward, where=f"{where}: rewards.{name}", folder=folder, home=home)
            for name, reward in config.rewards.items()
        }
        self.audits = frozenset(name for name, reward in config.rewards.items() if reward.audit)
        self.store = self.kept = MemberStore(home / "memory")
        """`store` is that of the run that said hello: between sites another's must not be taken for it."""
        self.ledger = Ledger(home / "ledger.jsonl")
        self.log_path = home / "log.jsonl"
        self.cache: dict[str, Any] = {}
        self.contract: Contract | None = None
        self.accepted: str | None = None

    def handle(self, data: bytes) -> bytes:
        """The answer to an envelope, both as bytes. Raises FedPactError; then nothing is sent."""
        envelope = decode(Envelope, data)
        digest = envelope.digest()
        fault_point("member.opened")
        try:
            self.gate.hear(envelope.run)
            self.gate.enter(envelope.verb, envelope.contract, self.accepted)
            request = envelope.open()
            reply = self._reply(envelope, request, digest)
        except FedPactError as error:
            self._note(envelope, digest, data, decision="refused", reason=type(error).__name__)
            raise
        except Exception as error:  # of an algorithm or of ours: this member fails, and the run goes on
            self._note(envelope, digest, data, decision="failed", reason=type(error).__name__)
            with storing(self.home / "errors.log"):
                append_durably(self.home / "errors.log", masked(traceback.format_exc()).encode())
            raise FedPactError(
                f"{self.where}: internal error ({type(error).__name__}); the traceback is in this member's errors.log"
            ) from error
        what: dict[str, Any] = {"reply": hashlib.sha256(reply).hexdigest(), "bytes_out": len(reply)}
        what |= {"counts": spent} if (spent := self.gate.spent(request)) else {}
        self._note(envelope, digest, data, decision="sent", **what)  # first the line, then the reply
        fault_point("member.noted")
        return wrap(envelope, reply, head=self.ledger.head)

    def _reply(self, envelope: Envelope, request: Request[Any], digest: str) -> bytes:
        if isinstance(request, Hello):
            introduced = self.gate.leave(request, self.hello(request))
            self._enter(envelope.run, request.contract)
            if not self.gate.simulation:
                self.kept.keep_hello(envelope.run, request.contract)
            return encode(introduced)
        self.gate.place(envelope, self.contract)
        self.gate.open(request, None if self.contract is None else self.algorithm())
        # asked again: the same bytes, and nothing is computed or spent twice
        cached = self.store.cached(self.gate.kept_under(digest))
        if cached is None:
            self.gate.afford(request, self.ledger.path)
        return cached or self._answer(envelope, request, digest)

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
            peer_head=envelope.head if is_head(envelope.head) else None,
            **what,
        )

    def hello(self, request: Hello) -> Introduced:
        """Accept the contract, or refuse it."""
        contract = self.gate.accept(request.contract)
        unknown = [name for name in self.rewards if name not in contract.objectives]
        if unknown:
            known = ", ".join(contract.objectives)
            raise ConfigError(f"{self.where}: rewards.{unknown[0]}: no such objective in the run; there are {known}")
        trained = tuple(name for name in contract.objectives if name in self.rewards and name not in self.audits)
        if not trained:
            raise ConfigError(f"{self.where}: rewards: all are audits; expected at least one to train on")
        algorithm = parse_algorithm(contract.algorithm)
        try:
            algorithm.check(list(contract.objectives))
        except ValueError as error:
            raise ConfigError(f"{self.where}: {error}") from error
        needs = algorithm.needs
        if "server" not in needs and self.config.prompts is None:
            raise ConfigError(f"{self.where}: prompts: missing; under this algorithm the members train")
        if "server" not in needs and self.model is None:
            raise ConfigError(f"{self.where}: model.path: missing; name this member's copy of the contract's model")
        primary = None if contract.primary is None else list(contract.objectives)[contract.primary]
        if "primary" in needs and primary not in trained:
            raise ConfigError(
                f"{self.where}: rewards: lacks the primary objective {primary!r}, which this algorithm needs; "
                f"add [rewards.{primary}]"
            )
        if self.config.rank is not None and self.config.rank > contract.lora.r:
            raise ConfigError(f"{self.where}: rank: found {self.config.rank}; the run's adapter has {contract.lora.r}")
        self.contract, self.accepted = contract, contract_hash(request.contract)
        if self.config.model.trust_remote_code:
            self.ledger.append(contract=self.accepted, decision="trusted", reason="model.trust_remote_code")
        return Introduced(
            name=self.config.name,
            task=self.config.task,
            objectives=trained,
            num_prompts=len(self.train_prompts),
            rank=self.config.rank or contract.lora.r,
            versions={package: version(package) for package in ("fedpact", "torch", "transformers", "peft")},
        )

    def restore(self) -> None:
        """Go on under the contract of the last hello, after a restart, if it is accepted still."""
        run, contract = self.kept.hello()
        if contract and contract_hash(contract) == self.gate.pinned():
            with suppress(RefusedError):
                self.hello(Hello(contract))
                self._enter(run, contract)

    def _enter(self, run: str, contract: str) -> None:
        """Work in this run; between sites its memory is its own."""
        if run != self.gate.run:
            self.cache.clear()
        self.gate.run = run
        if not self.gate.simulation:
            self.store = self.kept.of(run, contract)

    def evaluate(self, request: Evaluate) -> Evaluated:
        """Held-out results, for this member's own eyes: past the gate, and nothing is remembered."""
        client = self.side(round=0, exchange=0, since=None)
        own_rank = for_rank(request, self.config.rank or client.contract.lora.r)
        return client.evaluate(cast("Evaluate", own_rank), self.heldout)

    def _answer(self, envelope: Envelope, request: Request[Any], digest: str) -> bytes:
        personal = isinstance(request, Train) or (isinstance(request, Evaluate) and request.personal)
        client = self.side(envelope.round, envelope.exchange, envelope.since, personal=personal)
        algorithm = self.algorithm()
        measured = client.contract.evaluation.conflicts or "gradients" in algorithm.needs
        if isinstance(request, Differentiate) and not measured:
            raise RefusedError(f"{self.where}: gradients are asked for; the accepted contract asks for none")
        if isinstance(request, Differentiate) and not self.gate.shares_gradients:
            reply: Reply = withheld(request, len(client.objectives))
        elif isinstance(request, Evaluate) and "server" not in algorithm.needs:
            self.gate.fits(request, algorithm, client)
            reply = client.evaluate(request, self.heldout)
        elif hasattr(algorithm, request.verb):
            self.gate.fits(request, algorithm, client)
            reply = algorithm.answer(request, client)
        else:
            raise RefusedError(f"{self.where}: {algorithm.model_dump().get('name')} sends no {request.verb!r} requests")
        gap = {} if client.sampler_gap is None else {"sampler_gap": client.sampler_gap}
        if figures := {**gap, **client.outcomes()}:
            client.log(**figures)
        if isinstance(reply, Trained):
            client.memory.update(private_part(reply.adapter))
        assert self.contract is not None
        factor = self.contract.training.factor(envelope.round)
        question = (envelope.run, envelope.round, envelope.exchange, digest)
        reply = self.gate.leave(request, reply, factor=factor, what=question, measured=client.measured)
        admit(completed(reply, request, factor), Limits(len(client.objectives)), request)  # or it stays here
        data = encode(reply)
        self.store.save((envelope.round, envelope.exchange), client.memory, self.gate.kept_under(digest), data)
        if envelope.since is not None:
            self.store.prune(envelope.since)
        return data

    def side(self, round: int, exchange: int, since: tuple[int, int] | None, *, personal: bool = False) -> ClientSide:
        """What answers one request; `personal`: with this member's private adapter, if the contract has such."""
        contract, model = self.contract, self.model
        if contract is None:
            raise RefusedError(f"{self.where}: no contract yet; the server has to say hello first")

        def policy() -> LoraPolicy:
            if model is None:
                raise ConfigError(f"{self.where}: model.path: missing; name this member's copy of the contract's model")
            made = self.engines.policy(model, self.config.model, contract, where=self.where, rank=self.config.rank)
            private = self._private(made, contract, memory) if personal and contract.private else None
            factor = contract.training.factor(round)
            made.begin(
                self.gate.sampling_seed(contract.seed),
                round,
                exchange,
                self.config.name,
                private=private,
                factor=factor,
            )
            return made

        memory = self.store.load(since)
        return ClientSide(
            name=self.config.name,
            task=self.config.task,
            contract=contract,
            rewards=self.rewards,
            audits=self.audits,
            answers=self.answers,
            train_prompts=self.train_prompts,
            policy=policy,
            memory=memory,
            cache=self.cache,
            log_path=self.log_path,
            round=round,
            exchange=exchange,
        )

    def _private(self, policy: LoraPolicy, contract: Contract, memory: Memory) -> Adapter:
        """This member's private adapter as it remembers it; at first a fresh one of its own."""
        assert contract.private is not None
        layers = [replace(layer, r=contract.private.r) for layer in policy.bank.layers]
        fresh = initial_adapter(layers, key(contract.seed, self.config.name, "private adapter"))
        return private_part(memory) or {f"private/{name}": tensor for name, tensor in fresh.items()}

    def algorithm(self) -> Algorithm:
        """The accepted contract's."""
        assert self.contract is not None
        return parse_algorithm(self.contract.algorithm)
