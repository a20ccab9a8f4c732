"""Whether a run folder is what its ledgers and manifests say, without running anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedpact.errors import StoreError
from fedpact.runtime.envelope import START
from fedpact.runtime.files import MANIFEST, read_folder, storing
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.store import RunFolder, manifest_digest

Entries = list[dict[str, Any]]


def verified(out: Path) -> list[str]:
    """What was found to hold, a line each. Raises StoreError at the first thing that does not, with what to do."""
    store = RunFolder(out)
    record = store.read_run()
    server = Ledger.entries(out / "ledger.jsonl")
    members = {path.parent.name: Ledger.entries(path) for path in sorted(out.glob("clients/*/ledger.jsonl"))}
    lines = [f"ledger: {len(server)} entries, whole, head {_head(server)[:16]}"]
    lines += [f"ledger of {name}: {len(own)} entries, whole, head {_head(own)[:16]}" for name, own in members.items()]
    if members:
        compared = sum(_compared(out, server, name, own) for name, own in members.items())
        lines.append(f"heads: {compared} that one side kept of the other are where they were")
    rounds = sorted(path for path in (out / "rounds").glob("[0-9]*") if (path / MANIFEST).is_file())
    metrics, noted = b"", {e["round"]: e["manifest"] for e in server if e.get("decision") == "committed"}
    for path in rounds:
        content = read_folder(path, remedy=f"restore {path} from a copy")
        contract = store.load(int(path.name)).state["contract"]
        if contract != record["contract"]:
            raise StoreError(f"{path}: was made under contract {contract[:12]}, run.json has {record['contract'][:12]}")
        lost = path == rounds[-1] and int(path.name) not in noted  # its line, to a crash
        if not lost and noted.get(int(path.name)) != manifest_digest(path):
            raise StoreError(f"{path}: its MANIFEST is not the one in the ledger; restore {path} from a copy")
        metrics += content["metrics.jsonl"]
    missing = sorted(set(range(len(rounds))) - {int(path.name) for path in rounds})
    if missing:
        raise StoreError(f"{out / 'rounds' / f'{missing[0]:04d}'}: missing; restore it from a copy")
    lines.append(f"rounds: {len(rounds)}, every file as its MANIFEST says")
    with storing(out / "metrics.jsonl"):
        if rounds and (out / "metrics.jsonl").read_bytes() != metrics:
            raise StoreError(f"{out / 'metrics.jsonl'}: is not that of the rounds; `fedpact resume {out}` rebuilds it")
    finals = sorted(path.parent for path in out.glob(f"final*/{MANIFEST}"))
    for path in finals:
        read_folder(path, remedy=f"`fedpact resume {out}` writes it again")
    lines.append(f"exports: {', '.join(path.name for path in finals) or 'none yet'}")
    return lines


def _compared(out: Path, server: Entries, name: str, own: Entries) -> int:
    """How many heads of the one ledger are in the other. Raises StoreError for one that is not: an end was cut off."""
    kept = 0
    for where, lines, other in (
        (out / "clients" / name / "ledger.jsonl", list(_heads(server, name)), own),
        (out / "ledger.jsonl", list(_heads(own, "server")), server),
    ):
        known = {START, *(entry["sha256"] for entry in other)}
        for entry in lines:
            if entry["peer_head"] not in known:
                raise StoreError(
                    f"{where}: lacks the line {entry['peer_head'][:16]} that it had in round {entry.get('round')}: "
                    "it was cut or replaced; keep both files as evidence"
                )
        kept += len(lines)
    return kept


def _heads(entries: Entries, peer: str) -> Iterator[Mapping[str, Any]]:
    return (entry for entry in entries if entry.get("peer") == peer and entry.get("peer_head"))


def _head(entries: Entries) -> str:
    return str(entries[-1]["sha256"]) if entries else START
