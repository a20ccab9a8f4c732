"""A member's contract and its service."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from fedpact.cli.ending import Stopped
from fedpact.edge.service import serve as serve_members
from fedpact.edge.site import alone, load_site, site_home, site_peers, site_socket
from fedpact.errors import ConfigError, RefusedError
from fedpact.runtime import acceptance
from fedpact.runtime.client_config import load_client
from fedpact.runtime.contract import contract_hash, read_contract
from fedpact.runtime.files import storing
from fedpact.runtime.gate import Gate
from fedpact.runtime.plain import in_words, leaves
from fedpact.screen import say


def accept(client: Path, contract: Path | None, *, yes: bool) -> None:
    """Show a contract in plain words and pin it. Raises RefusedError if the client file's ceilings forbid it."""
    config = load_client(client)
    home = site_home(config, client)
    if contract is None:
        if yes:
            raise ConfigError(
                "--yes: only with the file of a contract that was read before; name it, or leave out --yes"
            )
        canonical = acceptance.offered_contract(home)
        if canonical is None:
            raise ConfigError(
                f"{client}: no contract was offered yet; name the file that the coordinator wrote with "
                "`fedpact contract`, or wait for its run to say hello"
            )
    else:
        with storing(contract):
            canonical = contract.read_bytes().decode(errors="replace").strip()
    found = contract_hash(canonical)
    agreed = read_contract(canonical)
    if canonical != json.dumps(json.loads(canonical), separators=(",", ":")):
        raise ConfigError(f"{contract}: was reformatted, and its hash is now no run's; take the file as it was written")
    if config.site.accept not in (None, found):
        raise RefusedError(f"{client}: site.accept: {config.site.accept} is accepted there; this contract is {found}")
    pinned = config.site.model_copy(update={"accept": found})
    Gate(pinned, where=str(client), home=home, simulation=False).accept(canonical)
    for line in [*in_words(agreed, found), *leaves(config.site, agreed)]:
        say(line)
    if not yes and not typer.confirm(f"Accept this contract for {config.name}?"):
        raise RefusedError(f"{client}: not accepted; nothing has changed")
    acceptance.accept(home, canonical)
    say(f"{config.name}: accepted {found}; a service that runs takes it from the next hello on")


def serve(client: Path) -> None:
    """The site service, until SIGTERM or SIGINT."""
    config = load_client(client)
    path, peers = site_socket(config, client), site_peers(config, str(client))
    home = site_home(config, client)

    def ready() -> None:
        accepted = config.site.accept or acceptance.accepted(home)
        under = "no contract accepted yet" if accepted is None else f"contract {accepted[:16]} accepted"
        say(f"{config.name}: serving on {path}, {under}")

    try:
        with alone(home):
            serve_members({path: load_site(client)}, peers=peers, ready=ready)
    except Stopped:
        say(f"{config.name}: stopped; `fedpact site serve {client}` goes on from here")
