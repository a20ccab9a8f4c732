"""One short run of the user's own configuration in a scratch folder, with a transport that may lie or listen."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpact.audit.remembering import Remembering
from fedpact.core.lora import flatten
from fedpact.edge.local import LocalTransport
from fedpact.errors import TooFewRepliesError
from fedpact.messages import Reply
from fedpact.runtime import launch
from fedpact.runtime.client_config import SiteSettings, client_files, load_client
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import RunConfig
from fedpact.runtime.engines import Engines
from fedpact.runtime.envelope import Envelope, opened, wrap
from fedpact.runtime.member import Member
from fedpact.runtime.run import Start
from fedpact.runtime.store import RunFolder
from fedpact.runtime.toml import validated
from fedpact.runtime.transport import Failure, Transport
from fedpact.seeding import permutation
from fedpact.types import Adapter, ClientId

Tamper = Callable[[Envelope, Reply], Reply | Failure]
"""What the liar says instead of its reply."""

OFF = 1e30
"""So large a bound that it binds nobody."""


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """A message and its answer, as the server has them."""

    who: ClientId
    envelope: Envelope
    reply: Reply


class Tampered:
    """A transport around another: it changes what `liar` says, and keeps the exchanges of the verbs in `keeps`."""

    def __init__(
        self, inner: Transport, *, liar: ClientId = "", tamper: Tamper | None = None, keeps: Collection[str] = ()
    ) -> None:
        self.inner, self.liar, self.tamper, self.keeps = inner, liar, tamper, keeps
        self.heard: list[Heard] = []

    def clients(self) -> Sequence[ClientId]:
        return self.inner.clients()

    def exchange(
        self, envelopes: Mapping[ClientId, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[ClientId, bytes | Failure]]:
        for who, answer in self.inner.exchange(envelopes, timeout_s=timeout_s):
            if isinstance(answer, Failure) or not (self.keeps or who == self.liar):
                yield who, answer
                continue
            envelope = decode(Envelope, envelopes[who])
            reply, head = opened(envelope, answer)
            if envelope.verb in self.keeps:
                self.heard.append(Heard(who, envelope, reply))
            lie = self.tamper(envelope, reply) if self.tamper is not None and who == self.liar else reply
            if lie is reply:
                yield who, answer
            else:
                yield who, lie if isinstance(lie, Failure) else wrap(envelope, encode(lie), head=head)


@dataclass(slots=True, eq=False)
class Outcome:
    """How a trial ended. It is the run's observer, too."""

    start: dict[str, float] = field(default_factory=dict)
    """Held-out means before the first round, by objective."""
    end: dict[str, float] = field(default_factory=dict)
    """And of the adapter that the run ended with."""
    refused: dict[ClientId, str] = field(default_factory=dict)
    """Why a member was dropped, the first time."""
    rolled_back: bool = False
    ended: str = ""
    """Why the run did not reach its end."""
    first: Adapter = field(default_factory=dict)
    final: Adapter = field(default_factory=dict)
    heard: list[Heard] = field(default_factory=list)
    members: dict[ClientId, Member] = field(default_factory=dict)
    completions: int = 0
    """Behind a held-out mean."""
    logged: dict[str, float] = field(default_factory=dict)
    """The server's last figures."""

    def round_done(self, round: int, metrics: Sequence[Mapping[str, Any]]) -> None:
        """`runtime.run.Observer`."""
        heldout = {
            str(row["key"]).removeprefix("heldout/"): float(row["value"])
            for row in metrics
            if row["who"] == "all" and str(row["key"]).startswith("heldout/")
        }
        if round == 0:
            self.start = heldout
        self.end = heldout or self.end
        self.logged |= {str(row["key"]): float(row["value"]) for row in metrics if row["who"] == "server"}
        self.rolled_back = "rolled_back_to" in self.logged

    def dropped(self, client: ClientId, reason: str) -> None:
        """`runtime.run.Observer`."""
        self.refused.setdefault(client, reason)

    def moved(self, other: Outcome) -> float:
        """How far this run's adapter is from the other's, in lengths of the other's own way from the start."""
        way = float((flatten(other.final) - flatten(other.first)).norm())
        return float((flatten(self.final) - flatten(other.final)).norm()) / max(way, 1e-12)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where trials run: the run file, and a folder that nobody needs afterwards unless `keep` is set."""

    path: Path
    scratch: Path
    keep: bool = False

    def trial(
        self,
        config: RunConfig,
        *,
        liar: ClientId = "",
        tamper: Tamper | None = None,
        keeps: Collection[str] = (),
        site: Mapping[str, Any] | None = None,
    ) -> Outcome:
        """Run `config` to its end; `site` changes every member's gate. Raises ConfigError if it cannot begin."""
        out = Path(tempfile.mkdtemp(prefix="trial-", dir=self.scratch)) / "run"
        outcome = Outcome()

        def make(config: RunConfig, folder: Path, out: Path, begin: Start) -> Transport:
            members = members_of(config, folder, out, begin, site or {})
            outcome.completions = _completions(config, members, begin)
            outcome.members = members if keeps else {}  # they hold a model each trial
            inner = LocalTransport(members) if site else Remembering(members, self.scratch / "replies")
            transport = Tampered(inner, liar=liar, tamper=tamper, keeps=keeps)
            outcome.heard = transport.heard
            return transport

        try:
            launch.start(config, self.path.parent, out, where=str(self.path), make=make, observer=outcome)
        except TooFewRepliesError as error:
            outcome.ended = str(error)
        store = RunFolder(out)
        latest = store.latest_round()
        if latest is not None:
            outcome.first, outcome.final = store.load(0).adapter, store.load(latest).adapter
        if outcome.rolled_back:
            outcome.end = outcome.start
        if not self.keep:
            shutil.rmtree(out.parent, ignore_errors=True)
        return outcome


def _completions(config: RunConfig, members: Mapping[ClientId, Member], begin: Start) -> int:
    if "server" in config.algorithm.needs and begin.trainer is not None:
        sizes = [len(begin.trainer.heldout)]
    else:
        sizes = [len(member.heldout) for member in members.values()]
    limit = config.evaluation.num_prompts
    return sum(size if limit is None else min(size, limit) for size in sizes) * config.evaluation.num_generations


def members_of(
    config: RunConfig, folder: Path, out: Path, begin: Start, site: Mapping[str, Any]
) -> dict[ClientId, Member]:
    """The members of a simulation, each with `site` put over its own settings. Raises ConfigError."""
    members: dict[ClientId, Member] = {}
    engines = Engines()
    for path in client_files(folder / config.simulation.clients):
        own = load_client(path)
        gate = validated(SiteSettings, {**own.site.model_dump(), **site}, where=str(path), prefix="site")
        members[own.name] = Member(
            own.model_copy(update={"site": gate}),
            folder=path.parent,
            home=out / "clients" / own.name,
            where=str(path),
            engines=engines,
            model=begin.model.path,
            simulation=True,
        )
    return members


def changed(config: RunConfig, changes: Mapping[str, Any], *, where: str) -> RunConfig:
    """`config` with other values at dotted keys. Raises ConfigError if that is no configuration."""
    data = config.dump()
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        place = data
        for parent in parents:
            place = place[parent]
        place[last] = value
    return validated(RunConfig, data, where=where)


def short(config: RunConfig, rounds: int, seed: int, *, where: str) -> RunConfig:
    """`config` for that many rounds, measured at their start and end only."""
    changes = {"rounds": rounds, "seed": seed, "evaluation.every": rounds, "evaluation.conflicts": False}
    return changed(config, changes, where=where)


def first_drawn(config: RunConfig, names: Sequence[ClientId]) -> ClientId:
    """The member that round 1 draws first: it takes part whatever the participation is."""
    ordered = sorted(names)
    return ordered[permutation(len(ordered), config.seed, 1, "cohort")[0]]


def members_at(bench: Bench, config: RunConfig) -> list[ClientId]:
    """The names of the run's members. Raises ConfigError."""
    return sorted(load_client(path).name for path in client_files(bench.path.parent / config.simulation.clients))
