"""The run folder: what survives `kill -9`.

A round exists once `rounds/0007` does, which appears by one rename with everything in it on the disk. Until then its
admitted replies lie in `rounds/0007.partial`, the spool, from which a restarted server works out the same bytes again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedpact.errors import ConfigError, StoreError
from fedpact.faults import fault_point
from fedpact.runtime import files
from fedpact.runtime.files import atomic_write, storing
from fedpact.runtime.spool import Spool, begin_spools, safe_name
from fedpact.types import Adapter, Memory

__all__ = ["Checkpoint", "RunFolder", "Spool"]

_ROUND_FILES = {"adapter_model.safetensors", "adapter_config.json", "memory.safetensors", "state.json", "metrics.jsonl"}
_UNPUBLISHED = ("critic/", "control/", "private/")
_NOTHING_YET = {".lock", ".run.json.tmp", "clients", "ledger.jsonl", "server"}
"""What a process leaves that was killed before it wrote run.json: there is no round, and nobody has been asked."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The run at the end of a round."""

    round: int
    adapter: Adapter
    memory: Memory
    """The server's."""
    state: dict[str, Any]


class RunFolder:
    """One run's files. `RunFolder(path)` only reads; `create` and `open` lock the folder as well, and may write."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._rounds = self.path / "rounds"
        self._resume = f"`fedpact resume {self.path}`"
        self._then = f"run {self._resume}"
        self._lock: int | None = None

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new run folder, locked. Raises ConfigError if `path` holds anything already."""
        folder = cls(path)
        folder._refuse_contents()
        with storing(folder.path):
            files.make_private(folder.path)
        fault_point("store.made")
        folder._acquire()
        try:
            folder._refuse_contents()  # another process may have been quicker
        except ConfigError:
            folder.close()
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run folder, locked, and cleared of what a killed process left half done."""
        folder = cls(path)
        folder.read_run()
        folder._acquire()
        try:
            folder._recover()
        except StoreError:
            folder.close()
            raise
        return folder

    def discard(self) -> None:
        """Removes the folder of a run that never began, its lock last: where this is cut short, `create` takes it."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != ".lock":
                path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Writes run.json: the resolved configuration, contract, versions, seeds and hashes."""
        self._require_lock()
        fault_point("store.run")
        # not sorted: the order of the objectives is part of the contract
        atomic_write(self.path / "run.json", files.json_bytes(dict(run), sort_keys=False), then=self._then)

    def read_run(self) -> dict[str, Any]:
        """What `write_run` wrote. Raises StoreError if this is no run folder."""
        path = self.path / "run.json"
        if not path.exists():
            raise StoreError(f"{self.path}: not a run folder (no run.json); start one with `fedpact run`")
        try:
            with storing(path, then=self._then):
                return dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise StoreError(f"{path}: changed since it was written, not a JSON object; restore a copy") from error

    def latest_round(self) -> int | None:
        """The last committed round; None before the first."""
        return max(self._committed(), default=None)

    def commit(
        self,
        round: int,
        *,
        adapter: Adapter,
        adapter_config: Mapping[str, Any],
        memory: Memory,
        state: Mapping[str, Any],
        metrics: Sequence[Mapping[str, Any]],
    ) -> None:
        """Makes a round final, removes its spool, and adds its `metrics` to metrics.jsonl.

        Rows whose `value` is not finite are left out: JSON has no NaN. A StoreError leaves every earlier round as it
        was, and before the round is final its spool too.
        """
        self._require_lock()
        folder = self._folder(round)
        if round in self._committed():
            raise StoreError(f"{folder}: committed already; delete it to do that round again, then {self._then}")
        fault_point("store.commit")
        lines = [files.json_line(row) for row in metrics if math.isfinite(row.get("value", 0))]
        content = {
            "adapter_model.safetensors": files.tensor_bytes(adapter),
            "adapter_config.json": files.json_bytes(dict(adapter_config)),
            "memory.safetensors": files.tensor_bytes(memory),
            "state.json": files.json_bytes(dict(state)),
            "metrics.jsonl": b"".join(lines),
        }
        with storing(folder, then=self._then):
            files.make_private(self._rounds)
            if folder.exists():  # without a MANIFEST it is not a round, and in the way
                shutil.rmtree(folder)
        files.write_folder(folder, content, then=self._then)
        fault_point("store.committed")
        self._remove_spools(round)
        fault_point("store.cleared")
        self._add_metrics(round, content["metrics.jsonl"])
        fault_point("store.metrics")

    def load(self, round: int) -> Checkpoint:
        """A committed round, compared with its MANIFEST. Raises StoreError naming the file that was changed."""
        folder = self._folder(round)
        remedy = f"restore it from a copy, or delete {folder} to resume from the round before"
        content = files.read_folder(folder, remedy=remedy)
        if set(content) != _ROUND_FILES:
            raise StoreError(f"{folder / files.MANIFEST}: changed since it was written; {remedy}")
        return Checkpoint(
            round=round,
            adapter=files.tensors_in(content["adapter_model.safetensors"], folder / "adapter_model.safetensors"),
            memory=files.tensors_in(content["memory.safetensors"], folder / "memory.safetensors"),
            state=json.loads(content["state.json"]),
        )

    def begin(self, round: int, members: Sequence[str]) -> None:
        """Opens a round for these members. What there is of it is kept only if it was begun for the same ones."""
        begin_spools(self._rounds / f"{round:04d}.partial", members, then=self._then)

    def spool(self, round: int, exchange: int = 0) -> Spool:
        """The admitted replies of one exchange of a round that is not final yet."""
        return Spool(self._rounds / f"{round:04d}.partial" / f"{exchange:02d}", then=self._then)

    def write_final(self, name: str, adapter: Adapter, adapter_config: Mapping[str, Any], readme: str) -> Path:
        """Writes an adapter that PEFT opens, with its model card, and returns its folder.

        "final" goes to final/, any other name to final-<name>/, in place of what lay there. Keys that begin with
        `critic/`, `control/` or `private/` stay out.
        """
        self._require_lock()
        folder = self.path / ("final" if name == "final" else f"final-{safe_name(name)}")
        published = {key: tensor for key, tensor in adapter.items() if not key.startswith(_UNPUBLISHED)}
        content = {
            "adapter_model.safetensors": files.tensor_bytes(published),
            "adapter_config.json": files.json_bytes(dict(adapter_config)),
            "README.md": readme.encode(),
        }
        files.write_folder(folder, content, then=self._then)
        fault_point("store.final")
        return folder

    def _folder(self, round: int) -> Path:
        return self._rounds / f"{round:04d}"

    def _committed(self) -> list[int]:
        """Rounds with a MANIFEST, in order; temporary, partial and half-copied folders are none."""
        with storing(self._rounds, then=self._then):
            names = [path.name for path in self._rounds.iterdir()] if self._rounds.is_dir() else []
            complete = [name for name in names if name.isdecimal() and (self._rounds / name / files.MANIFEST).is_file()]
        return sorted(int(name) for name in complete)

    def _remove_spools(self, up_to: int) -> None:
        with storing(self._rounds, then=self._then):
            for path in self._rounds.glob("*.partial"):
                if path.stem.isdecimal() and int(path.stem) <= up_to:
                    shutil.rmtree(path)

    def _add_metrics(self, round: int, lines: bytes) -> None:
        """Appends to metrics.jsonl if it holds exactly the rounds before; works it out from all rounds otherwise."""
        top, rounds = self.path / "metrics.jsonl", self._committed()
        with storing(top, then=self._then):
            before = sum((self._folder(r) / "metrics.jsonl").stat().st_size for r in rounds if r != round)
            if rounds[-1] == round and top.exists() and top.stat().st_size == before:
                files.append_durably(top, lines)
            else:
                self._rebuild_metrics()

    def _rebuild_metrics(self) -> None:
        top = self.path / "metrics.jsonl"
        with storing(top, then=self._then):
            lines = b"".join((self._folder(round) / "metrics.jsonl").read_bytes() for round in self._committed())
            if not top.exists() or top.read_bytes() != lines:
                atomic_write(top, lines, then=self._then)

    def _recover(self) -> None:
        """Removes temporary folders and the spools of final rounds; sets metrics.jsonl right."""
        with storing(self.path, then=self._then):
            for leftover in [*self.path.glob(".final*.???"), *self._rounds.glob(".*.???")]:
                files.recover_folder(leftover.with_name(leftover.stem[1:]))
        fault_point("store.recover")
        self._remove_spools(up_to=-1 if (latest := self.latest_round()) is None else latest)
        self._rebuild_metrics()

    def _refuse_contents(self) -> None:
        with storing(self.path):
            if not self.path.exists():
                return
            names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else {self.path.name}
            if names and (names - _NOTHING_YET or ".lock" not in names):  # without the lock it is not ours
                raise ConfigError(f"{self.path}: exists already; continue it with {self._resume}, or name another")

    def _acquire(self) -> None:
        files.refuse_shared(self.path)
        lock = self.path / ".lock"
        with storing(lock):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise StoreError(f"{self.path}: in use by another process; wait until it ends, or stop it") from error
            except OSError:
                os.close(descriptor)
                raise
        self._lock = descriptor

    def _require_lock(self) -> None:
        if self._lock is None:
            raise ValueError("this RunFolder only reads: use RunFolder.create or RunFolder.open to write")


def manifest_digest(folder: Path) -> str:
    """SHA-256 of a round's MANIFEST, which names those of its files."""
    with storing(folder):
        return hashlib.sha256((folder / files.MANIFEST).read_bytes()).hexdigest()
