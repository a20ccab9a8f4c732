"""A committed round once more, from what was before it, to see whether it comes to the same bytes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpact.edge.local import resumed_transport
from fedpact.errors import CheckFailedError, ConfigError
from fedpact.runtime.codec import decode
from fedpact.runtime.envelope import START, Envelope
from fedpact.runtime.files import json_line
from fedpact.runtime.launch import begun, refuse_sites
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.run import Run
from fedpact.runtime.store import RunFolder, manifest_digest
from fedpact.runtime.transport import Failure, Transport
from fedpact.types import ClientId


class Recorded:
    """A transport over which only those answer whose replies counted the first time."""

    def __init__(
        self, inner: Transport, members: Sequence[ClientId], rounds: Mapping[int, list[dict[str, Any]]]
    ) -> None:
        self._inner, self._members, self._rounds = inner, members, rounds

    def clients(self) -> Sequence[ClientId]:
        return [name for name in self._inner.clients() if name in self._members]

    def exchange(
        self, envelopes: Mapping[ClientId, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[ClientId, bytes | Failure]]:
        asked = dict(envelopes)
        for client, data in envelopes.items():
            envelope = decode(Envelope, data)
            if envelope.verb == "hello":
                continue
            exchange = self._rounds[envelope.round][envelope.exchange]
            if client not in exchange["roster"]:
                del asked[client]
                yield client, Failure(exchange["failures"].get(client, "it did not answer the first time"))
        yield from self._inner.exchange(asked, timeout_s=None)  # how long it took once says nothing about now


def replayed(out: Path, round: int) -> str:
    """What came of doing `round` again: a line. Raises CheckFailedError if its bytes differ.

    It starts from the round before where every member still has what it remembered then, otherwise from the beginning,
    in a scratch folder. Members that did not answer the first time do not now.
    """
    store = RunFolder(out)
    latest = store.latest_round()
    if latest is None or not 0 <= round <= latest:
        raise ConfigError(f"--replay {round}: committed are the rounds up to {latest}")
    record = store.read_run()
    refuse_sites(record, out)
    config, folder, begin = begun(record, out)
    states = {number: store.load(number).state for number in range(round + 1)}
    first = round if round > 0 and _remembered(out, states[round - 1]["since"]) else 0
    members = states[round].get("members", sorted(record["members"]))
    if any(states[number].get("members", members) != members for number in range(first, round + 1)):
        raise ConfigError(f"--replay {round}: members came or went between rounds {first} and {round}; choose another")
    scratch = Path(tempfile.mkdtemp(prefix="fedpact-"))
    try:
        again = scratch / out.resolve().name  # the run's name is part of what is asked
        _set_back(out, again, first)
        with RunFolder.open(again) as copy:
            exchanges = {number: state["exchanges"] for number, state in states.items()}
            transport = Recorded(resumed_transport(config, folder, again, begin), members, exchanges)
            run = Run(copy, config, begin, transport, _Nobody())
            run.go(run.introduce(), until=round)
        for number in range(first, round + 1):
            name = f"rounds/{number:04d}"
            if manifest_digest(again / name) != manifest_digest(out / name):
                raise CheckFailedError(
                    f"{out / name}: done again it came to other bytes; the machine, its versions or a reward's code "
                    "are not what they were, or the round was changed together with its MANIFEST"
                )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    span = f"rounds {first} to {round}" if first < round else f"round {round}"
    return f"replayed {span}: the same bytes, MANIFEST {manifest_digest(out / f'rounds/{round:04d}')[:16]}"


def _remembered(out: Path, since: Mapping[str, Sequence[int]]) -> bool:
    """Whether every member still has the version of its memory that this state names."""
    return all(
        (out / "clients" / name / "memory" / f"{version[0]:04d}-{version[1]:02d}.safetensors").exists()
        for name, version in since.items()
    )


def _set_back(out: Path, again: Path, first: int) -> None:
    """A copy of the run as it stood before round `first`; replies that members kept are left out."""
    again.mkdir()
    shutil.copy(out / "run.json", again)
    for number in range(first):
        shutil.copytree(out / "rounds" / f"{number:04d}", again / "rounds" / f"{number:04d}")
    for home in sorted((out / "clients").glob("*")):
        kept = again / "clients" / home.name
        ignore = shutil.ignore_patterns("reply", "*.jsonl", *([] if first else ["memory"]))
        shutil.copytree(home, kept, ignore=ignore)
        _cut_ledger(home / "ledger.jsonl", kept / "ledger.jsonl", before=first)


def _cut_ledger(path: Path, copy: Path, *, before: int) -> None:
    """What a member had on record before a round: it decides what its noise has cost."""
    lines, head = [], START
    for entry in Ledger.entries(path) if path.exists() else ():
        if int(entry.get("round") or 0) >= max(before, 1):
            break
        if entry["prev"] != head:
            break
        lines.append(json_line(entry))
        head = entry["sha256"]
    copy.write_bytes(b"".join(lines))


class _Nobody:
    def round_done(self, round: int, metrics: Any) -> None: ...
    def dropped(self, client: ClientId, reason: str) -> None: ...
