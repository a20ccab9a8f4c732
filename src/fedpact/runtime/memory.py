"""What a member remembers, by version: (round, exchange) of the request after which it was written.

The server says from which version to start: the last one whose reply it took. There is no "latest": a member whose
reply was lost starts again from where the server believes it to be.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from fedpact.errors import StoreError
from fedpact.faults import fault_point
from fedpact.runtime.files import atomic_write, make_private, storing, tensor_bytes, tensors_in
from fedpact.types import Memory

_KEPT_RUNS = 4
"""Of which memories are kept: a run may be put aside for another one, and go on later."""
_VERSION = re.compile(r"(\d{4,})-(\d{2,})\.safetensors")


class MemberStore:
    """One member's memory and its last reply, in a folder that only it can read."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._reply, self._hello = self.folder / "reply", self.folder / "hello"

    def load(self, since: tuple[int, int] | None) -> Memory:
        """The memory of version `since`; empty for None. Raises StoreError if that version is not kept here."""
        if since is None:
            return {}
        path = self._path(since)
        with storing(path):
            if path.exists():
                return tensors_in(path.read_bytes(), path)
        kept = ", ".join(f"{round}-{exchange}" for round, exchange in self._versions()) or "none"
        raise StoreError(
            f"{path}: the server asks for this version, kept are: {kept}; restore it from a copy, or let the "
            f"coordinator start a new run"
        )

    def save(self, version: tuple[int, int], memory: Memory, request_digest: str, reply: bytes) -> None:
        """Keeps `memory` as `version`, and `reply` as the answer to `request_digest` in place of the last one.

        After a crash in between, the memory is there and the reply is not: the request is then worked out again, from
        its own `since`, and writes the same version.
        """
        fault_point("memory.save")
        with storing(self.folder):
            make_private(self.folder)
        atomic_write(self._path(version), tensor_bytes(memory))
        fault_point("memory.saved")
        atomic_write(self._reply, request_digest.encode() + b"\n" + reply)
        fault_point("memory.replied")

    def cached(self, request_digest: str) -> bytes | None:
        """The last reply, if it answered this request; None otherwise."""
        if not self._reply.exists():
            return None
        with storing(self._reply), self._reply.open("rb") as file:
            answered = file.readline().rstrip(b"\n")
            return file.read() if answered == request_digest.encode() else None

    def keep_hello(self, run: str, contract: str) -> None:
        """Keeps under which contract, in which run, this member works."""
        with storing(self.folder):
            make_private(self.folder)
        if self.hello() != (run, contract):
            atomic_write(self._hello, json.dumps([run, contract]).encode())

    def hello(self) -> tuple[str, str]:
        """What `keep_hello` was given last: run and contract; empty before."""
        with storing(self._hello):
            found = self._hello.read_bytes() if self._hello.exists() else b""
        try:
            run, contract = json.loads(found)
            return str(run), str(contract)
        except ValueError:  # none yet
            return "", ""

    def of(self, run: str, contract: str) -> MemberStore:
        """What is remembered of one run alone; of the others, the last few are kept."""
        place = self.folder / hashlib.sha256(json.dumps([run, contract]).encode()).hexdigest()[:16]
        with storing(self.folder):
            make_private(place)
            os.utime(place)
            others = [path for path in self.folder.iterdir() if path.is_dir() and path != place]
            for old in sorted(others, key=lambda path: path.stat().st_mtime_ns)[: -(_KEPT_RUNS - 1)]:
                shutil.rmtree(old)
        return MemberStore(place)

    def prune(self, since: tuple[int, int] | None) -> None:
        """Removes the versions older than `since`, which the server will not ask for again; None removes nothing."""
        for version in self._versions():
            if since is not None and version < since:
                with storing(self._path(version)):
                    self._path(version).unlink(missing_ok=True)

    def _versions(self) -> list[tuple[int, int]]:
        """The versions kept here, oldest first."""
        with storing(self.folder):
            names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted((int(found[1]), int(found[2])) for found in map(_VERSION.fullmatch, names) if found)

    def _path(self, version: tuple[int, int]) -> Path:
        round, exchange = version
        return self.folder / f"{round:04d}-{exchange:02d}.safetensors"
