"""The member's own boundary: what it lets in, and what it lets out. Nothing that a run brings can change it.

A ceiling refuses; it never changes a request, because a clamped member would run another algorithm.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpact.algorithms.base import Algorithm
from fedpact.errors import RefusedError, UnacceptedError
from fedpact.messages import (
    Averaged,
    Differentiate,
    Evaluate,
    Examine,
    Examined,
    Fit,
    Reply,
    Request,
    Score,
    Scored,
    Train,
    Trained,
)
from fedpact.runtime.acceptance import accepted, offer
from fedpact.runtime.adapters import Factor, trained_factor
from fedpact.runtime.budget import Budget
from fedpact.runtime.client_config import SiteSettings
from fedpact.runtime.config import parse_algorithm
from fedpact.runtime.contract import Contract, contract_hash, read_contract
from fedpact.runtime.cover import covered, with_noise
from fedpact.runtime.disclosure import BY_DEFAULT, DIGITS, EVERYTHING, bare, enough, shared
from fedpact.runtime.envelope import Envelope
from fedpact.runtime.inspection import longest_text, malformed, misplaced, overdone, shared_shapes, unfit
from fedpact.runtime.learner import Learner
from fedpact.runtime.noise import member_secret
from fedpact.screen import printable
from fedpact.seeding import key

MAX_RUN_NAME = 200
"""Characters of a run's name."""
_MIN_SAMPLES = 20
"""Between sites, unless the member says otherwise."""


class Gate:
    """Applies a member's `[site]` settings. `home` is its private folder, where the secret of its noise lies.

    `simulation`: everything is on one machine, so nothing is withheld."""

    def __init__(self, site: SiteSettings, *, where: str, home: Path, simulation: bool) -> None:
        self.site, self.where, self.home, self.simulation = site, where, home, simulation
        by_default: tuple[str, ...] = EVERYTHING if simulation else BY_DEFAULT
        if site.noise_multiplier is not None:
            by_default = ()  # epsilon covers the adapter, and would be untrue of anything beside it
        self.share = site.share if site.share is not None else by_default
        self.min_samples = site.min_samples or (1 if simulation else _MIN_SAMPLES)
        self.budget: Budget | None = None
        if site.noise_multiplier is not None:
            self.budget = Budget(site.noise_multiplier, site.delta, site.epsilon)
        self.seed = 0
        """The accepted contract's."""
        self.trained_on = 0
        """Completions behind a mean of a training reply, under the accepted contract."""
        self.batch: int | None = None
        """Completions in one local step."""
        self.run: str | None = None
        """The run that last said hello."""
        self._trained: dict[tuple[str, int], set[str]] = {}

    def kept_under(self, digest: str) -> str:
        """The name of a cached reply: this request's, under these settings; under others it is worked out anew."""
        return hashlib.sha256((digest + self.site.model_dump_json()).encode()).hexdigest()

    @property
    def shares_gradients(self) -> bool:
        """Whether compressed gradients may leave."""
        return "gradients" in self.share

    def pinned(self) -> str | None:
        """The hash of the one contract that this member accepts; None: none, or in a simulation any."""
        return self.site.accept if self.simulation else self.site.accept or accepted(self.home)

    def accept(self, canonical: str) -> Contract:
        """The contract, if this member agrees to it. Raises RefusedError naming the key, what was asked and allowed."""
        try:
            found = contract_hash(canonical)
        except UnicodeEncodeError as error:
            raise RefusedError(f"{self.where}: contract not understood: it holds half a character") from error
        pinned = self.pinned()
        if pinned != found and not (pinned is None and self.simulation):
            if not self.simulation:
                offer(self.home, canonical)
            what = "no contract" if pinned is None else pinned
            raise UnacceptedError(
                f"{self.where}: site.accept: {what} is accepted; this run's contract is {found}: "
                "read and accept it with `fedpact site accept`"
            )
        contract = read_contract(canonical)
        self._trained.clear()  # a run of the same name may have begun anew; another name would not be counted either
        if self.budget is not None:
            self.budget.ready()
        local_steps = contract.algorithm.get("local_steps")
        trainings = len(contract.objectives) if parse_algorithm(contract.algorithm).per_objective else 1
        asked: dict[str, float | None] = {"max_rounds": contract.rounds}
        if "server" not in parse_algorithm(contract.algorithm).needs:  # otherwise nothing is trained here
            asked |= {
                "max_local_steps": local_steps and local_steps * contract.training.num_iterations * trainings,
                "max_completion_length": contract.rollout.max_completion_length,
                "max_learning_rate": contract.optimizer.learning_rate,
            }
        for ceiling, value in asked.items():
            limit = getattr(self.site, ceiling)
            if limit is not None and (value is None or value > limit):
                raise RefusedError(f"{self.where}: site.{ceiling}: the run asks for {value}, allowed are {limit}")
        if "gradients" in parse_algorithm(contract.algorithm).needs and "gradients" not in self.share:
            raise RefusedError(
                f'{self.where}: site.share: the algorithm asks for compressed gradients; add "gradients", or decline'
            )
        self.seed = contract.seed
        each = contract.training.prompts_per_step * contract.rollout.num_generations
        self.trained_on, self.batch = (local_steps or 1) * each, each
        return contract

    def hear(self, run: str) -> None:
        """Let a run's name in, which is kept and shown. Raises RefusedError."""
        if not 0 < len(run) <= MAX_RUN_NAME or not run.isprintable():
            raise RefusedError(
                f"{self.where}: run: found {ascii(run)[:40]}; expected 1 to {MAX_RUN_NAME} characters that can be seen"
            )

    def enter(self, verb: str, contract: str, accepted: str | None) -> None:
        """Let a request in. Raises RefusedError if its verb or its contract is not this member's choice."""
        if verb not in self.site.verbs:
            raise RefusedError(
                f"{self.where}: site.verbs: {ascii(verb)[:40]} is not allowed; allowed are {', '.join(self.site.verbs)}"
            )
        if verb != "hello" and contract != accepted:
            raise RefusedError(
                f"{self.where}: request under contract {printable(contract[:12])}, accepted is {str(accepted)[:12]}"
            )

    def place(self, envelope: Envelope, contract: Contract | None) -> None:
        """Let a request in by where it stands: in the run that said hello, and in the contract's rounds.

        Raises RefusedError. Several trainings in one round share the ceiling of its steps.
        """
        if contract is not None and (wrong := misplaced(envelope, contract.rounds, self.run)):
            raise RefusedError(f"{self.where}: {wrong}")
        if contract is not None and envelope.verb == "train" and self.site.max_local_steps is not None:
            each = (contract.algorithm.get("local_steps") or 1) * contract.training.num_iterations
            trained = self._trained.setdefault((envelope.run, envelope.round), set())
            steps = each * len(trained | {envelope.digest()})
            if steps > (limit := self.site.max_local_steps):
                raise RefusedError(
                    f"{self.where}: site.max_local_steps: round {envelope.round} asks for {steps}, allowed are {limit}"
                )
            trained.add(envelope.digest())

    def open(self, request: Request[Any], algorithm: Algorithm | None = None) -> None:
        """Let what an envelope holds in. Raises RefusedError if it asks for more work than this member does at once.

        `algorithm` is the accepted contract's.
        """
        if isinstance(request, Differentiate) and request.compression == "svd" and not self.shares_gradients:
            raise RefusedError(f'{self.where}: site.share: gradients are asked for, and "gradients" is not in it')
        wrong = overdone(request, algorithm)
        if wrong:
            raise RefusedError(f"{self.where}: malformed request: {wrong}")
        if not isinstance(request, (Score, Fit, Examine)):
            return
        answers = [*request.first, *request.second] if isinstance(request, Examine) else request.completions
        if (size := max(len(answers), len(request.prompts))) > self.site.max_candidates:
            limit = self.site.max_candidates
            raise RefusedError(f"{self.where}: site.max_candidates: the request has {size}, allowed are {limit}")
        if self.budget is not None and self.site.epsilon_per_prompt is None:
            raise RefusedError(
                f"{self.where}: site.noise_multiplier: its epsilon does not cover ratings; set site.epsilon_per_prompt "
                "as well, or leave this run"
            )
        if isinstance(request, Fit) and self.site.epsilon_per_prompt is not None:
            raise RefusedError(
                f"{self.where}: site.epsilon_per_prompt: a calibration tells exact means; remove it, or leave this run"
            )
        wrong = malformed(request)
        if wrong:
            raise RefusedError(f"{self.where}: malformed request: {wrong}")
        if (longest := longest_text(request)) > self.site.max_text_length:
            limit = self.site.max_text_length
            raise RefusedError(f"{self.where}: site.max_text_length: a text has {longest}, allowed are {limit}")

    def fits(self, request: Request[Any], algorithm: Algorithm, client: Learner) -> None:
        """Let in what the model is to compute with. Raises RefusedError if its tensors are not the contract's."""
        if not isinstance(request, (Train, Evaluate, Differentiate)):
            return
        wrong = unfit(request, algorithm, shared_shapes(client.policy), num_objectives=len(client.objectives))
        if wrong:
            raise RefusedError(f"{self.where}: malformed request: {wrong}")

    def afford(self, request: Request[Any], ledger: Path) -> None:
        """Raises RefusedError if an answer would spend more than is left of the budget of noise."""
        if self.budget is not None and isinstance(request, Train):
            self.budget.check(ledger, where=self.where)

    def spent(self, request: Request[Any]) -> dict[str, int]:
        """What the ledger's line of an answer has to say of the noise in it."""
        return self.budget.counts if self.budget is not None and isinstance(request, Train) else {}

    def leave(
        self,
        request: Request[Any],
        reply: Reply,
        *,
        factor: Factor = "all",
        what: Sequence[str | int] = (),
        measured: Tensor | None = None,
    ) -> Reply:
        """What of `reply` may leave, `factor` of its adapter. Raises RefusedError if none of it may.

        `what` names the question (run, round, exchange, digest): with the member's secret, the key of the noise.
        `measured`: how many completions had each objective's reward, [m] int64.
        """
        if type(reply) is not request.reply:
            found, expected = type(reply).__name__, request.reply.__name__
            raise RefusedError(
                f"{self.where}: the algorithm answers {request.verb!r} with {found}, expected {expected}"
            )
        if isinstance(reply, Averaged):
            reply = replace(reply, weight=min(reply.weight, self.site.max_weight or float("inf")))
        if isinstance(reply, Trained):
            own = {name: tensor for name, tensor in reply.adapter.items() if not name.startswith("private/")}
            sent = getattr(request, "adapter", {})
            adapter = covered(sent, own, self.site, self._secret, what=what, where=self.where)
            reply = replace(reply, adapter=trained_factor(adapter, factor))
        if isinstance(reply, (Scored, Examined)) and self.site.epsilon_per_prompt is not None:
            reply = with_noise(request, reply, self.site.epsilon_per_prompt, self._secret(), where=self.where)
        reply = enough(reply, self.min_samples, trained_on=self.trained_on, batch=self.batch, measured=measured)
        if self.budget is not None:
            reply = bare(reply)
        reply = shared(reply, self.share, self.site.metrics, digits=None if self.simulation else DIGITS)
        if self.budget is not None and isinstance(reply, Trained):  # known from settings and rounds alone
            epsilon = self.budget.after_next(self.home / "ledger.jsonl")
            if math.isfinite(epsilon):  # infinite where adapters have left without noise; a message holds no infinity
                reply = replace(reply, metrics={**reply.metrics, "epsilon": float(f"{epsilon:.4g}")})
        return reply

    def sampling_seed(self, public: int) -> int:
        """The seed of this member's sampling: between sites its own, so that the server, which knows the run's, cannot
        draw a guessed prompt's completions again."""
        return public if self.simulation or self.site.public_sampling else key(public, self._secret().hex())

    def _secret(self) -> bytes:
        """The key of this member's noise. A simulation's is public, so that the same seed gives the same bytes."""
        if self.simulation:
            return hashlib.sha256(json.dumps(["no secret", self.seed, self.home.name]).encode()).digest()
        return member_secret(self.home)
