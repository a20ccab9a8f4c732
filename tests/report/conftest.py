"""Run folders written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

Row = tuple[int, str, str, float]
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run folder: two members that weight `correct` (primary) and `brief`, four rounds."""

    def make(
        name: str = "one",
        *,
        rows: Iterable[Row] = (),
        ledger: Iterable[Mapping[str, Any]] = (),
        objectives: Iterable[str] = ("brief", "correct"),
        primary: str | None = "correct",
        members: Iterable[str] = ("north", "south"),
        finished: bool = True,
        **extra: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "seed": 11,
            "rounds": 4,
            "objectives": {one: {"primary": one == primary, "weight": None} for one in objectives},
            "algorithm": {"name": "firm", "beta": 0.25},
            "policy": {"model": "/home/somebody/tiny-model"},
        }
        run = {
            "schema": 1,
            "name": name,
            "config": config,
            "contract": "c0ffee" * 10,
            "model": {"path": "/home/somebody/tiny-model", "sha256": "ab" * 32},
            "clients": {},
            "members": {member: list(objectives) for member in members},
            "versions": {"fedpact": "9.8.7"},
            **extra,
        }
        (folder / "run.json").write_text(json.dumps(run))
        lines = [json.dumps({"round": r, "who": who, "key": key, "value": value}) for r, who, key, value in rows]
        (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        (folder / "ledger.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in ledger))
        if finished:
            (folder / "final").mkdir()
        return folder

    return make
