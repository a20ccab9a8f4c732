"""The report: one HTML page about one run or several, without a script and without the network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, StrictUndefined, Undefined

from fedpact.errors import StoreError
from fedpact.report.conflicts import NOISE, SKETCH_RANK, ConflictMap, conflict_map, cosine
from fedpact.report.heatmap import colour_scale, colour_span, heat_map
from fedpact.report.personal import personal_rows
from fedpact.report.plots import bar_pairs, colour, line_chart
from fedpact.report.read import (
    RunRecord,
    Series,
    all_objectives,
    disagreement,
    method_names,
    number,
    read_run,
    summary_rows,
)
from fedpact.screen import printable

MAX_MEMBERS = 24
"""How many members of a run get a chart of their weights."""

MAX_GRADIENTS = 40
"""How many rows a conflict map may have."""

NUM_WORST = 5
"""How many of the most opposed pairs are named below a conflict map."""


def write_report(folders: Sequence[Path], out: Path, *, title: str) -> Path:
    """Writes the page about the runs in `folders` to `out` and returns `out`. Raises StoreError."""
    records = [read_run(folder) for folder in folders]
    page = render(records, title=title)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(page.encode(errors="replace"))
        temporary.replace(out)
    except OSError as error:
        raise StoreError(f"{out}: {os.strerror(error.errno or 0)}; name another place for the page") from error
    return out


def render(records: Sequence[RunRecord], *, title: str) -> str:
    """The page as text. Raises ValueError without a record."""
    if not records:
        raise ValueError("a report needs one run at least")
    environment = Environment(
        autoescape=True, finalize=_plain, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, size=size, colour=colour, cosine=cosine)
    template = environment.from_string(files("fedpact.report").joinpath("page.html.jinja").read_text("utf-8"))
    names, objectives = method_names(records), all_objectives(records)
    maps = [(name, found) for name, record in zip(names, records, strict=True) if (found := conflict_map(record))]
    span = colour_span([found for _, found in maps])
    settings = _settings(records)
    return template.render(
        title=title,
        names=names,
        records=records,
        objectives=objectives,
        primaries=[name for name in objectives if name in {record.primary for record in records}],
        members=list(dict.fromkeys(member for record in records for member in record.members)),
        lead=_lead(records),
        tables=_tables(records),
        curves=_curves(records, names, objectives),
        bars=_bars(records, names),
        weights=[_weights(record, name, objectives) for record, name in zip(records, names, strict=True)],
        max_members=MAX_MEMBERS,
        personal=[(name, rows) for name, one in zip(names, records, strict=True) if (rows := personal_rows(one))],
        disagreements=_disagreements(records, names),
        conflicts=[_conflicts(found, name, span) for name, found in maps],
        scale=colour_scale(span),
        noise=NOISE,
        sketch_rank=SKETCH_RANK,
        origins=[_origin(record) for record in records],
        differing=[(key, row) for key, row in settings if len(set(row)) > 1],
        shared=[(key, row[0]) for key, row in settings if len(set(row)) == 1],
    )


def change(start: float | None, end: float | None) -> str:
    """By how much `end` is above `start`, with the decimals that both are shown with; "" where one is missing."""
    if start is None or end is None:
        return ""
    if max(abs(start), abs(end)) < 1e-3 or max(abs(start), abs(end)) >= 1e3:
        text = number(end - start)
        return text if end <= start else f"+{text}"
    decimals = min(len(number(value).partition(".")[2]) for value in (start, end) if value)
    text = f"{abs(end - start):.{decimals}f}".removeprefix("0" if abs(end - start) < 1 and decimals else "")
    return f"±{text}" if not text.strip("0.") else f"{'+' if end > start else '−'}{text}"


def size(count: int) -> str:
    """Bytes for people: 950 B, 1.21 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{number(count / factor)} {unit}"
    return f"{count} B"


def _plain(value: Any) -> Any:
    """What the template writes, before it is escaped: without controls, except for our own charts."""
    return value if isinstance(value, Undefined) or hasattr(value, "__html__") else printable(str(value))


def _lead(records: Sequence[RunRecord]) -> dict[str, Any] | None:
    """The best end of the main objective, of the finished runs if there are any; None before there is an end."""
    main = all_objectives(records)[:1]
    rows = [row for row in summary_rows(records) if row["objective"] in main and row["end"] is not None]
    rows = [row for row in rows if row["finished"]] or rows
    return max(rows, key=lambda row: float(row["end"]), default=None)


def _tables(records: Sequence[RunRecord]) -> list[tuple[str, list[list[dict[str, Any]]]]]:
    """(caption, one row of cells for each method), for sampled completions and, where measured, for the likeliest."""
    tables = []
    for caption, greedy in (("sampled completions", False), ("likeliest completions (greedy)", True)):
        rows = summary_rows(records, greedy=greedy)
        if not greedy or any(row["start"] is not None for row in rows):
            cells = [{**row, "change": change(row["start"], row["end"])} for row in rows]
            by_method = [cells[i :: len(records)] for i in range(len(records))]
            measured = [row for row in by_method if not greedy or any(cell["start"] is not None for cell in row)]
            tables.append((caption, measured))
    return tables


def _curves(records: Sequence[RunRecord], names: Sequence[str], objectives: Sequence[str]) -> list[str]:
    last = max(record.rounds for record in records)
    primaries = {record.primary for record in records}
    return [
        line_chart(
            [(name, record.heldout(objective)) for name, record in zip(names, records, strict=True)],
            title=f"{objective} (primary)" if objective in primaries else objective,
            last_round=last,
        )
        for objective in objectives
    ]


def _bars(records: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    """Held-out start and end of the main objective, for every member of every run, on one axis."""
    pairs: list[list[tuple[str, float | None, float | None]]] = []
    for record in records:
        found = [(member, record.heldout(record.objectives[0], member)) for member in record.members]
        pairs.append([(m, s[0][1], s[-1][1] if len(s) > 1 else None) for m, s in found if s])
    values = [value for rows in pairs for _, *pair in rows for value in pair if value is not None]
    span = (min(values), max(values)) if values else None
    return [
        bar_pairs(rows, title=f"{names[i]}: {records[i].objectives[0]}", series=i, span=span)
        for i, rows in enumerate(pairs)
        if rows
    ]


def _weights(record: RunRecord, method: str, objectives: Sequence[str]) -> dict[str, Any]:
    """A small chart for each member that shared its weights; none where no weight ever moved."""
    found = {member: weights for member in record.members if (weights := record.weights(member))}
    moved = any(len({value for _, value in s}) > 1 for weights in found.values() for s in weights.values())
    charts = [
        line_chart(
            [(objective, weights.get(objective, [])) for objective in objectives],
            title=member,
            width=226,
            height=140,
            span=(0.0, 1.0),
            last_round=record.rounds,
            labels=False,
        )
        for member, weights in list(found.items())[: MAX_MEMBERS if moved else 0]
    ]
    return {"method": method, "charts": charts, "shared": len(found), "moved": moved}


def _disagreements(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    lines: list[tuple[str, Series]] = [(n, disagreement(record)) for n, record in zip(names, records, strict=True)]
    if not any(series for _, series in lines):
        return ""
    return line_chart(lines, title="standard deviation of the weights", span=(0.0, 0.0), width=620)


def _conflicts(found: ConflictMap, method: str, span: float) -> dict[str, Any]:
    """A heat map for each round with the worst pairs, and the means by pair of objectives."""
    drawn = found.first_members(MAX_GRADIENTS)
    rounds = range(len(found.rounds))
    means = [found.means(i) for i in rounds]
    return {
        "method": method,
        "rounds": found.rounds,
        "layout": "grid third" if len(drawn.labels) <= 8 else "grid" if len(drawn.labels) <= 16 else "stack",
        "drawn": len(drawn.members),
        "members": len(found.members),
        "maps": [
            {
                "chart": heat_map(drawn, i, title=f"Round {found.rounds[i]}", span=span),
                "between": found.worst_between(i, NUM_WORST),
                "within": found.worst_within(i, NUM_WORST),
            }
            for i in rounds
        ],
        "means": list(zip(*means, strict=True)),
    }


def _origin(record: RunRecord) -> dict[str, str]:
    """What made a run, for those who want to make it again."""
    versions = _part(record, "versions")
    return {
        "run": record.name,
        "state": record.state,
        "seed": str(record.run["config"].get("seed", "–")),
        "contract": str(record.run.get("contract", "–")),
        "FedPact": str(versions.get("fedpact", "–")),
        "torch": str(versions.get("torch", "–")),
        "threads": str(record.run.get("threads", "–")),
    }


def _settings(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Every setting with its value in each run; a dash where a run has no such setting."""
    columns = []
    for record in records:
        column = dict(_flat(record.run["config"]))
        column["policy.model"] = PurePath(column.get("policy.model", "")).name  # the folder is nobody's business
        if "policy.adapter" in column:
            column["policy.adapter"] = PurePath(column["policy.adapter"]).name
        column["policy.model.sha256"] = str(_part(record, "model").get("sha256", "–"))[:16]
        column["members"] = ", ".join(record.members)
        columns.append(column)
    keys = sorted({key for column in columns for key in column})
    return [(key, [column.get(key, "–") for column in columns]) for key in keys]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _part(record: RunRecord, key: str) -> Mapping[str, Any]:
    """A table of run.json; empty if there is none."""
    found = record.run.get(key)
    return found if isinstance(found, Mapping) else {}
