"""The spool: admitted replies on the disk, so that a restarted server need not ask for them again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpact.faults import fault_point
from fedpact.runtime.files import atomic_write, json_bytes, make_private, storing
from fedpact.types import ClientId

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class Spool:
    """The admitted replies of one exchange, one file a client; closed by the list of those that count."""

    def __init__(self, folder: Path, *, then: str = "start again") -> None:
        self.folder = folder
        self._then = then

    def put(self, client: ClientId, data: bytes) -> None:
        """Keeps a reply; after a crash it is there whole or not at all."""
        fault_point("spool.put")
        with storing(self.folder, then=self._then):
            make_private(self.folder)
        atomic_write(self._path(client), data, then=self._then)
        fault_point("spool.kept")

    def get(self, client: ClientId) -> bytes:
        """The reply that `put` kept."""
        with storing(self._path(client), then=self._then):
            return self._path(client).read_bytes()

    def received(self) -> list[ClientId]:
        """Who has a reply here, sorted."""
        return sorted(path.stem for path in self.folder.glob("[!.]*.safetensors"))

    def close(self, roster: Sequence[ClientId], failures: Mapping[ClientId, str]) -> None:
        """Ends the exchange: a resumed round uses the replies of `roster`, whoever else answers."""
        fault_point("spool.close")
        with storing(self.folder, then=self._then):
            make_private(self.folder)
        content = json_bytes({"failures": dict(failures), "roster": sorted(roster)})
        atomic_write(self.folder / "roster.json", content, then=self._then)
        fault_point("spool.closed")

    def roster(self) -> list[ClientId] | None:
        """Whose replies count, sorted; None while the exchange is open."""
        closed = self._closed()
        return None if closed is None else list(closed["roster"])

    def failures(self) -> dict[ClientId, str]:
        """Why the others' do not; empty while the exchange is open."""
        return dict((self._closed() or {"failures": {}})["failures"])

    def _closed(self) -> dict[str, Any] | None:
        path = self.folder / "roster.json"
        if not path.exists():
            return None
        with storing(path, then=self._then):
            closed: dict[str, Any] = json.loads(path.read_bytes())
        return closed

    def _path(self, client: ClientId) -> Path:
        return self.folder / f"{safe_name(client)}.safetensors"


def begin_spools(folder: Path, members: Sequence[ClientId], *, then: str = "start again") -> None:
    """Opens the folder of a round's spools. What is there of a round for other members is removed: others would be
    asked other things, and whose replies count was settled among those."""
    note, now = folder / "members.json", json_bytes(sorted(members))
    with storing(folder, then=then):
        if folder.exists() and (not note.exists() or note.read_bytes() != now):
            shutil.rmtree(folder)
        if not folder.exists():
            make_private(folder)
            atomic_write(note, now, then=then)


def safe_name(name: str) -> str:
    """`name`, if it can be the name of a file. Raises ValueError; names from outside are checked where they enter."""
    if not _SAFE_NAME.fullmatch(name):
        raise ValueError(f"{ascii(name)[:80]} cannot be a file name: only letters, digits, '_', '.' and '-'")
    return name
