"""`fedpact site`: what a member does by itself. Nothing is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="A member's own commands.", no_args_is_help=True)

ClientFile = Annotated[Path, typer.Argument(metavar="CLIENT.toml", help="The member's client file.")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    name: Annotated[str, typer.Option(help="The member's name, under which its key is registered.")],
) -> None:
    """Write a member's example files, its secret, and the key of its SuperNode."""
    from fedpact.cli import site_files

    site_files.init(folder, name)


@app.command()
def check(client: ClientFile) -> None:
    """Load everything that the service would, look at permissions, and say what may leave. Writes nothing."""
    from fedpact.cli import site_files

    site_files.check(client)


@app.command()
def accept(
    client: ClientFile,
    contract: Annotated[
        Path | None, typer.Argument(metavar="[CONTRACT.json]", help="By default the one that a run last offered.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Show a run's contract in plain words, and accept it."""
    from fedpact.cli import site_service

    site_service.accept(client, contract, yes=yes)


@app.command()
def serve(client: ClientFile) -> None:
    """Answer requests on the service's socket: resident, with model, data, rewards, memory, gate and ledger."""
    from fedpact.cli import site_service

    site_service.serve(client)


@app.command()
def connect(
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="The coordinator's SuperLink.")],
    socket: Annotated[Path, typer.Option(help="The site service's socket.")],
    key: Annotated[Path, typer.Option(help="The node's private key, as `fedpact site init` writes it.")],
    root_certificates: Annotated[
        Path | None, typer.Option(help="The authority that signed the SuperLink's certificate, PEM.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS: on one machine, for tests.")] = False,
) -> None:
    """Carry requests from the SuperLink to the site service, under a user of its own. Fetches and runs no code."""
    from fedpact.edge.connect import connect

    connect(superlink, socket=socket, key=key, root_certificates=root_certificates, insecure=insecure)


@app.command()
def ledger(
    path: Annotated[
        Path, typer.Argument(metavar="CLIENT.toml", help="A client file, a member's folder, or its ledger.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read and verify what a member was asked and has answered."""
    from fedpact.cli import records

    records.ledger(path, as_json=json)
