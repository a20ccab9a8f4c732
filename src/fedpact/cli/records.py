"""What can be read and checked of a run or a member afterwards: ledgers, manifests, and a round done again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpact.edge.site import site_home
from fedpact.errors import ConfigError
from fedpact.runtime.client_config import load_client
from fedpact.runtime.envelope import START
from fedpact.runtime.ledger import Ledger
from fedpact.screen import say


def verify(out: Path, replay: Sequence[int]) -> None:
    """Recompute every chain and manifest, and do the chosen rounds again. Raises StoreError or CheckFailedError."""
    from fedpact.runtime.verification import verified

    for line in verified(out):
        say(line)
    if replay:
        from fedpact.edge.replay import replayed

        for round in replay:
            say(replayed(out, round))
    say(f"{out}: verified")


def ledger(path: Path, *, as_json: bool) -> None:
    """A member's ledger, verified: each line, and what it adds up to. Raises StoreError where the chain is broken."""
    if path.suffix == ".toml":
        path = site_home(load_client(path), path)
    file = path / "ledger.jsonl" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"{file}: no such ledger; name a client file, or a member's folder as in RUN/clients/NAME")
    entries = Ledger.entries(file)
    if as_json:
        print(json.dumps({"ledger": str(file), "entries": entries, "head": head(entries)}, indent=2))
        return
    for one in entries:
        place = f"round {one.get('round')}.{one.get('exchange')} attempt {one.get('attempt')}"
        what = f"{one.get('verb', '')} {one.get('decision', '')}".strip()
        size = f"{one.get('bytes_in') or 0} bytes in, {one.get('bytes_out') or 0} out"
        say(f"{one['time']}  {one.get('run', '')}  {place}  {what}  {size}  {one.get('reason') or ''}".rstrip())
    say(f"{file}: {summary(entries)}")


def summary(entries: Sequence[dict[str, Any]]) -> str:
    """What a ledger's entries add up to, in a line."""
    decisions = Counter(str(entry.get("decision")) for entry in entries)
    counted = ", ".join(f"{count} {decision}" for decision, count in sorted(decisions.items()))
    return f"{len(entries)} entries, whole ({counted or 'none'}), head {head(entries)[:16]}"


def head(entries: Sequence[dict[str, Any]]) -> str:
    """The head of the chain."""
    return str(entries[-1]["sha256"]) if entries else START
