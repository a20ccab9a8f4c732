"""All members in this process: the same server, members and bytes as between sites, without a network."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedpact.errors import ConfigError, FedPactError, InadmissibleError, RefusedError, StoreError
from fedpact.messages import Hello
from fedpact.runtime.adapters import refuse_rank
from fedpact.runtime.client_config import client_files, load_client
from fedpact.runtime.config import RunConfig
from fedpact.runtime.contract import contract_of
from fedpact.runtime.dry_run import dry_run
from fedpact.runtime.engines import Engines
from fedpact.runtime.member import Member
from fedpact.runtime.run import Start
from fedpact.runtime.transport import Failure
from fedpact.types import NO_PROMPTS, ClientId


class LocalTransport:
    """Members that answer one after another; each has an exchange's time for itself, as if it had its own machine."""

    def __init__(self, members: Mapping[ClientId, Member]) -> None:
        self.members = dict(sorted(members.items()))

    def clients(self) -> Sequence[ClientId]:
        return list(self.members)

    def exchange(
        self, envelopes: Mapping[ClientId, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[ClientId, bytes | Failure]]:
        for client, envelope in envelopes.items():
            start = time.monotonic()
            try:
                answer = self.members[client].handle(envelope)
                late = timeout_s is not None and time.monotonic() - start > timeout_s
                yield client, Failure(f"no reply within {timeout_s:g} s (federation.timeout_s)") if late else answer
            except StoreError:  # members and server share this disk: going on without them would change the result
                raise
            except FedPactError as error:
                yield client, Failure(str(error), refused=isinstance(error, RefusedError))


def local_members(folder: Path, *, home: Path, model: Path, engines: Engines) -> dict[ClientId, Member]:
    """The members of a simulation: one for each client file in `folder`. Raises ConfigError.

    `home` is where each keeps its memory and ledger, `model` the run's base model.
    """
    members: dict[ClientId, Member] = {}
    for path in client_files(folder):
        config = load_client(path)
        if config.name in members:
            raise ConfigError(f"{path}: name: {config.name!r} is taken by another client file; names must differ")
        members[config.name] = Member(
            config,
            folder=path.parent,
            home=home / config.name,
            where=str(path),
            engines=engines,
            model=model,
            simulation=True,
        )
    return members


def local_transport(config: RunConfig, folder: Path, out: Path, begin: Start) -> LocalTransport:
    """The simulated members of a run, after a dry run of each: what is wrong with a client file shows before round 0.

    Raises ConfigError or RewardError.
    """
    transport = resumed_transport(config, folder, out, begin)
    check_members(config, transport.members, begin)
    return transport


def resumed_transport(config: RunConfig, folder: Path, out: Path, begin: Start) -> LocalTransport:
    """The simulated members of a run that goes on. No dry run: a member that fails by now is dropped, as in any round.

    Raises ConfigError.
    """
    clients = folder / config.simulation.clients
    return LocalTransport(local_members(clients, home=out / "clients", model=begin.model.path, engines=Engines()))


def check_members(config: RunConfig, members: Mapping[ClientId, Member], begin: Start) -> list[str]:
    """Each member accepts the contract and rates two completions, or two of the server's examples; a line for each."""
    hello = Hello(contract_of(config, model=begin.model.sha256).canonical())
    examples = NO_PROMPTS if begin.trainer is None else begin.trainer.examples()
    lines = []
    for member in members.values():
        rank = member.hello(hello).rank
        try:
            refuse_rank(rank, config)
        except InadmissibleError as error:
            raise ConfigError(f"{member.where}: {error}") from error
        trusts = member.config.model.trust_remote_code
        warning = "; warning: model.trust_remote_code runs the model folder's code" if trusts else ""
        lines.append(dry_run(member, examples) + warning)
    return lines
