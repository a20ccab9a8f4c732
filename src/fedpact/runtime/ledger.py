"""A hash-chained list of what was asked and answered. Digests, names and counts; no values, texts or paths.

Every line is canonical JSON that holds the SHA-256 of the line before (`prev`) and of itself (`sha256`). The chain
shows a changed or missing line, but not a missing end: for that, each side keeps the other's head.

The ledger is never cut. Where a crash or a full disk tore the last line, the fragment stays as evidence: the next entry
says `torn` and holds the fragment's SHA-256, which takes it into the chain. Nothing was done on the strength of a torn
line, since a line is on the disk before its action begins.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedpact.errors import StoreError
from fedpact.faults import fault_point
from fedpact.runtime.envelope import START
from fedpact.runtime.files import append_durably, json_line, make_private, storing, sync_folder

_WHERE = {"time", "run", "round", "exchange", "attempt", "peer", "verb", "contract", "peer_head"}
_WHAT = {"request", "reply", "bytes_in", "bytes_out", "fields", "counts", "decision", "reason", "manifest"}
FIELDS = frozenset(_WHERE | _WHAT)
"""All that a line may say."""

_MAX_TEXT = 200
_PATH = re.compile(r"\S*[/\\]\S*")


class _Scan(NamedTuple):
    """How far the chain is whole."""

    head: str
    entries: int
    tail: bytes
    """Torn lines after the last entry."""
    whole: bool
    """Whether the file ends with a line end."""
    size: int


class Ledger:
    """The ledger at `path`, for one writer. Raises StoreError where its chain is broken."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._guard = threading.Lock()
        with storing(self.path):
            make_private(self.path.parent)
            append_durably(self.path, b"")
            sync_folder(self.path.parent)
        self._seen = _scan(self.path)

    @property
    def head(self) -> str:
        """The SHA-256 of the last line; `START` before the first."""
        return self._seen.head

    def append(self, **fields: Any) -> str:
        """Adds a line, on the disk when this returns, and returns the new head. `time` is filled in if not given.

        Text is cut to one line of 200 characters, and words of a `reason` that look like paths are taken out.
        Raises ValueError for a field outside `FIELDS`, or one that holds anything but names and whole numbers.
        """
        fields = {name: _admitted(name, value) for name, value in fields.items()}
        with self._guard, storing(self.path):
            if self.path.stat().st_size != self._seen.size:  # an append failed half-way, or someone else wrote
                self._seen = _scan(self.path)
            if self._seen.tail:
                self._write({"time": _now(), "decision": "torn", "torn": _digest(self._seen.tail)})
            return self._write({"time": _now(), **fields})

    @staticmethod
    def verify(path: Path) -> int:
        """The number of whole entries. Raises StoreError with the number of the line that breaks the chain."""
        return _scan(Path(path)).entries

    @staticmethod
    def entries(path: Path) -> list[dict[str, Any]]:
        """The whole entries, oldest first. Raises StoreError as `verify` does."""
        found: list[dict[str, Any]] = []
        _scan(Path(path), found)
        return found

    def _write(self, fields: dict[str, Any]) -> str:
        head, line = _chained({**fields, "prev": self._seen.head})
        if not self._seen.whole:
            line = b"\n" + line
        fault_point("ledger.append")
        append_durably(self.path, line)
        fault_point("ledger.appended")
        self._seen = _Scan(head, self._seen.entries + 1, b"", True, self._seen.size + len(line))
        return head


def _scan(path: Path, into: list[dict[str, Any]] | None = None) -> _Scan:
    """Follows the chain from the first line to the last.

    The beginning of a JSON object is never JSON itself, so a line that does not parse is a torn one: it must stand at
    the end, or be vouched for by the entry after it. A line that parses must continue the chain. Entries go `into`.
    """
    with storing(path):
        data = path.read_bytes()
    head, entries, tail = START, 0, b""
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        try:
            entry = json.loads(line)
            fields = {name: entry[name] for name in entry if name != "sha256"} if isinstance(entry, dict) else {}
            digest, canonical = _chained(fields)
        except (ValueError, RecursionError):
            tail += line
            continue
        vouched = fields.get("torn") == (_digest(tail) if tail else None)
        if fields.get("prev") != head or not vouched or canonical != line.removesuffix(b"\n") + b"\n":
            raise StoreError(
                f"{path}: line {number} breaks the chain: it, or what stood before it, was changed or removed; "
                f"put the file aside as evidence and start again with a new one"
            )
        head, entries, tail = digest, entries + 1, b""
        if into is not None:
            into.append({**fields, "sha256": digest})
    return _Scan(head, entries, tail, not data or data.endswith(b"\n"), len(data))


def _chained(fields: dict[str, Any]) -> tuple[str, bytes]:
    """The SHA-256 of an entry, and the line that holds both."""
    digest = hashlib.sha256(json_line(fields)).hexdigest()
    return digest, json_line({**fields, "sha256": digest})


def _digest(tail: bytes) -> str:
    return hashlib.sha256(tail.removesuffix(b"\n")).hexdigest()


def _admitted(name: str, value: Any) -> Any:
    """`value` as the ledger may hold it."""
    if name not in FIELDS:
        raise ValueError(f"the ledger has no field {name!r}, only: {', '.join(sorted(FIELDS))}")
    if isinstance(value, str):
        shown = _PATH.sub("...", value) if name == "reason" else value
        return " ".join(shown.split())[:_MAX_TEXT]
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str | int) for item in value):
        return [_admitted(name, item) for item in value]
    if isinstance(value, dict) and all(isinstance(count, int) for count in value.values()):
        return {_admitted(name, str(key)): count for key, count in value.items()}
    raise ValueError(f"the ledger's {name} takes names and whole numbers, found {type(value).__name__}")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
