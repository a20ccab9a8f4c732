"""`fedpact site`: what a member does by itself. Nothing is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="A member's own commands.", no_args_is_help=True)


@app.command()
def ledger(
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="A member's folder, or its ledger.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read and verify what a member was asked and has answered."""
    from fedpact.cli import records

    records.ledger(path, as_json=json)
