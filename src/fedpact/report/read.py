"""A run folder as figures: what was run, how it went, what travelled. Reads only; loads no model and no tensor."""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedpact.errors import StoreError

Series = list[tuple[int, float]]
"""(round, value), by round."""

_LARGEST = 1e30
_NO_MEMBERS = ("all", "server")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What crossed the server's boundary, in its own ledger. A reply that never came counts as failed."""

    to_members: int = 0
    """Bytes."""
    from_members: int = 0
    """Bytes, of the replies that were refused too."""
    asked: int = 0
    admitted: int = 0
    failed: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class RunRecord:
    """One run, finished or not."""

    name: str
    label: str
    """What the run's method is called: run.json's `label`, or the algorithm's name."""
    objectives: tuple[str, ...]
    """The primary one first."""
    primary: str | None
    members: tuple[str, ...]
    rounds: int
    """As planned."""
    done: int
    """The last round that was committed."""
    finished: bool
    traffic: Traffic
    run: Mapping[str, Any]
    """All of run.json."""
    metrics: Mapping[tuple[str, str], Series]
    """(who, key) -> figures."""

    def series(self, key: str, who: str = "all") -> Series:
        """The figures under `key`, by round; empty if there are none."""
        return list(self.metrics.get((who, key), []))

    def heldout(self, objective: str, who: str = "all", *, greedy: bool = False) -> Series:
        """Held-out mean rewards. The primary objective's are its accuracy where a member shares nothing else."""
        prefix = "heldout_greedy" if greedy else "heldout"
        found = self.series(f"{prefix}/{objective}", who)
        return found or (self.series(f"{prefix}/accuracy", who) if objective == self.primary else [])

    def weights(self, member: str) -> dict[str, Series]:
        """The objective weights that a member trained with, by objective; empty if it does not share them."""
        found = {objective: self.series(f"train/weight/{objective}", member) for objective in self.objectives}
        return {objective: series for objective, series in found.items() if series}

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        return f"{self.rounds} rounds" if self.finished else f"unfinished, round {self.done} of {self.rounds}"


def read_run(folder: Path) -> RunRecord:
    """The run in `folder`, as far as it is. Raises StoreError if this is no run folder or its files were changed.

    A last line without an end is still being written and is left out, and so are figures that are not finite or
    beyond 1e30.
    """
    folder = Path(folder)
    path = folder / "run.json"
    if not path.is_file():
        raise StoreError(f"{folder}: not a run folder (no run.json); name one that `fedpact run` made")
    try:
        run = json.loads(_bytes(path))
        if run["schema"] != 1:
            raise StoreError(f"{path}: schema {run['schema']!r}, expected 1; use the FedPact version that wrote it")
        config = run["config"]
        primary = next((str(name) for name, one in config["objectives"].items() if one.get("primary")), None)
        objectives = sorted(map(str, config["objectives"]), key=lambda name: name != primary)
        label = str(run.get("label") or config["algorithm"]["name"])
        name, rounds = str(run["name"]), int(config["rounds"])
        named = [str(member) for member in run.get("members", ())]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path}: not understood ({type(error).__name__}: {error}); restore it from a copy") from error
    metrics = _metrics(folder / "metrics.jsonl")
    committed = [int(path.parent.name) for path in folder.glob("rounds/*/MANIFEST") if path.parent.name.isdecimal()]
    return RunRecord(
        name=name,
        label=label,
        objectives=tuple(objectives),
        primary=primary,
        members=tuple(named or sorted({who for who, _ in metrics} - set(_NO_MEMBERS))),
        rounds=rounds,
        done=max([*committed, *(series[-1][0] for series in metrics.values())], default=0),
        finished=(folder / "final").is_dir(),
        traffic=_traffic(folder / "ledger.jsonl"),
        run=run,
        metrics=metrics,
    )


def method_names(records: Sequence[RunRecord]) -> list[str]:
    """What to call each run beside the others: its label, and what it takes beyond that to tell them apart."""
    labels = Counter(record.label for record in records)
    names = [r.label if labels[r.label] == 1 or r.name == r.label else f"{r.label} ({r.name})" for r in records]
    repeated, seen = Counter(names), Counter[str]()
    for i, name in enumerate(names):
        if repeated[name] > 1:
            seen[name] += 1
            names[i] = f"{name} #{seen[name]}"
    return names


def all_objectives(records: Sequence[RunRecord]) -> list[str]:
    """The objectives of all runs, each once: primary ones first, then in order of appearance."""
    primaries = {record.primary for record in records}
    names = dict.fromkeys(name for record in records for name in record.objectives)
    return sorted(names, key=lambda name: name not in primaries)


def summary_rows(records: Sequence[RunRecord], *, greedy: bool = False) -> list[dict[str, Any]]:
    """Every method by every objective, held out, mean over members: `start`, `end`, and whether the end is the `best`.

    `start` is the first evaluation and `end` the last, None where there is none yet. Larger is better; equal ends
    share the mark; an unfinished run gets none, and neither does one that has no other to beat.
    """
    rows = []
    for objective in all_objectives(records):
        found = [record.heldout(objective, greedy=greedy) for record in records]
        ends = [series[-1][1] if len(series) > 1 else None for series in found]
        reached = [end for end, record in zip(ends, records, strict=True) if end is not None and record.finished]
        for method, record, series, end in zip(method_names(records), records, found, ends, strict=True):
            rows.append(
                {
                    "method": method,
                    "state": record.state,
                    "finished": record.finished,
                    "objective": objective,
                    "primary": objective == record.primary,
                    "start": series[0][1] if series else None,
                    "end": end,
                    "best": record.finished and len(reached) > 1 and end == max(reached),
                }
            )
    return rows


def summary_table(records: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """`summary_rows` for a terminal: a header, and one row for each method."""
    header = ["method", *(f"{objective} start → end" for objective in all_objectives(records))]
    table = [
        [name if r.finished else f"{name} ({r.state})"] for name, r in zip(method_names(records), records, strict=True)
    ]
    for i, row in enumerate(summary_rows(records)):
        table[i % len(records)].append(f"{number(row['start'])} → {number(row['end'])}")
    return header, table


def disagreement(record: RunRecord) -> Series:
    """How differently members weight the same objectives, by round: 0 if all that could agree do.

    The population standard deviation of an objective's weight over the members with the same set of objectives, meaned
    over the set; sets with two members or more are meaned by their number of members.
    """
    by_round: dict[int, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for member in record.members:
        for objective, series in record.weights(member).items():
            for turn, value in series:
                by_round[turn][member][objective] = value
    result = []
    for turn, members in sorted(by_round.items()):
        groups: dict[frozenset[str], list[dict[str, float]]] = defaultdict(list)
        for weights in members.values():
            groups[frozenset(weights)].append(weights)
        spreads: list[float] = []
        for objectives, group in groups.items():
            if len(group) > 1:
                spread = fmean(
                    _deviation([weights[objective] for weights in group]) for objective in sorted(objectives)
                )
                spreads += [spread] * len(group)
        if spreads:
            result.append((turn, fmean(spreads)))
    return result


def number(value: float | None) -> str:
    """Three significant digits, as in .471, −5.38 and 12,300; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = float(f"{abs(value):.2e}")  # rounded first, so that .9999 is 1.00 and not 1.000
    if 1e-4 <= size < 1e7:
        text = f"{size:,.{max(0, 2 - math.floor(math.log10(size)))}f}".removeprefix("0" if size < 1 else "")
    else:
        text = f"{size:.2e}"
    return f"−{text}" if value < 0 else text


def _deviation(values: Sequence[float]) -> float:
    mean = fmean(values)
    return math.sqrt(fmean((value - mean) ** 2 for value in values))  # statistics.pstdev is exact and takes seconds


def _metrics(path: Path) -> dict[tuple[str, str], Series]:
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for where, row in _lines(path):
        try:
            place, turn, value = (str(row["who"]), str(row["key"])), int(row["round"]), row["value"]
            if abs(value) <= _LARGEST:
                found[place][turn] = float(value)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StoreError(f"{where}: found no round, who, key and value; restore the file from a copy") from error
    return {place: sorted(values.items()) for place, values in found.items()}


def _traffic(path: Path) -> Traffic:
    totals: Counter[str] = Counter()
    for _, row in _lines(path, torn=True):
        decision = row.get("decision")
        if decision in ("asked", "admitted", "failed", "refused"):
            totals[decision] += 1
            totals["to_members"] += _count(row.get("bytes_out"))
            totals["from_members"] += _count(row.get("bytes_in"))
    return Traffic(**totals)


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _lines(path: Path, *, torn: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of a file of JSON lines, and where it stands. `torn`: a line that is cut short is left out."""
    lines = _bytes(path).split(b"\n") if path.exists() else [b""]
    for i, line in enumerate(lines):
        where = f"{path}: line {i + 1}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"found {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            if torn or i == len(lines) - 1:
                continue
            raise StoreError(f"{where}: not a JSON object; restore the file from a copy") from error
        yield where, row


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: {os.strerror(error.errno or 0)}; check that path") from error
