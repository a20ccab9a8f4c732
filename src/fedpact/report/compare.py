"""Variants of one run beside each other: means over seeds, differences paired by seed, and the front of trade-offs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedpact.report.frontier import bootstrap_interval, hypervolume, pareto_front, student_half_width
from fedpact.report.read import RunRecord
from fedpact.screen import printable

FEW_SEEDS = 10


@dataclass(frozen=True, slots=True)
class Runs:
    """The finished runs of one variant."""

    name: str
    algorithm: str
    records: Mapping[int, RunRecord]
    """By seed."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure over seeds. The interval is missing where there is one seed."""

    mean: float
    low: float | None
    high: float | None
    by_seed: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One variant."""

    name: str
    algorithm: str
    seeds: tuple[int, ...]
    objectives: Mapping[str, Figure | None]
    """Held-out means at the end, with Student's t interval; None where nothing was measured."""
    difference: Figure | None
    """To the baseline in the leading objective, seed by seed, with a bootstrap interval; None for the baseline."""
    wins: int
    ties: int
    hypervolume: Figure | None
    """Of this variant's point above the start, with a bootstrap interval."""
    on_front: bool
    """No other variant's means over seeds are at least as good in every objective of the front and better in one."""


@dataclass(frozen=True, slots=True)
class Front:
    """The variants of one algorithm together."""

    algorithm: str
    variants: tuple[str, ...]
    hypervolume: Figure | None
    """Of the front of all its variants, over the seeds that all of them have."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that the table shows."""

    objectives: tuple[str, ...]
    leading: str
    """What differences are taken in: the primary objective, or the first one."""
    baseline: str
    axes: tuple[str, ...]
    """The objectives of the front."""
    start: Mapping[str, Figure | None]
    rows: tuple[Row, ...]
    fronts: tuple[Front, ...]
    notes: tuple[str, ...]


def compared(
    variants: Sequence[Runs], *, objectives: Sequence[str], leading: str, baseline: str, axes: Sequence[str]
) -> Comparison:
    """The comparison of `variants`; `baseline` is one of their names, `leading` and `axes` are among `objectives`.

    A seed's start is round 0 of the baseline's run, or of the first variant that has that seed.
    """
    base = next(one for one in variants if one.name == baseline)
    starts: dict[str, dict[int, float]] = {objective: {} for objective in objectives}
    for one in (base, *variants):
        for objective in objectives:
            starts[objective] = _by_seed(one, objective, 0) | starts[objective]
    points = {one.name: _points(one, axes) for one in variants}
    references = {
        seed: [starts[axis][seed] for axis in axes]
        for seed in starts[axes[0]]
        if all(seed in starts[axis] for axis in axes)
    }
    on_front = _on_front(points)
    rows = [
        Row(
            name=one.name,
            algorithm=one.algorithm,
            seeds=tuple(sorted(one.records)),
            objectives={objective: _student(_by_seed(one, objective, -1)) for objective in objectives},
            difference=None if one is base else _bootstrap(gains),
            wins=sum(gain > 0 for gain in gains.values()) if one is not base else 0,
            ties=sum(gain == 0 for gain in gains.values()) if one is not base else 0,
            hypervolume=_volumes([points[one.name]], references),
            on_front=one.name in on_front,
        )
        for one in variants
        for gains in [_gains(one, base, leading)]
    ]
    return Comparison(
        objectives=tuple(objectives),
        leading=leading,
        baseline=baseline,
        axes=tuple(axes),
        start={objective: _student(starts[objective]) for objective in objectives},
        rows=tuple(rows),
        fronts=tuple(_fronts(variants, points, references)),
        notes=tuple(_notes(variants, objectives, starts)),
    )


def comparison_table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """A header and rows of text: the start, every variant, and every algorithm that has several."""
    header = ["variant", "seeds", *found.objectives, f"{found.leading} - baseline", "wins"]
    header += [f"hypervolume ({' x '.join(found.axes)})", "front"]
    rows = [["start", "", *(plus_minus(found.start[name]) for name in found.objectives), "", "", "", ""]]
    for row in found.rows:
        paired = len(row.difference.by_seed) if row.difference else 0
        rows.append(
            [
                row.name,
                str(len(row.seeds)),
                *(plus_minus(row.objectives[name]) for name in found.objectives),
                "baseline" if row.name == found.baseline else bracketed(row.difference, sign="+"),
                f"{row.wins} of {paired}" if paired else "",
                bracketed(row.hypervolume),
                "yes" if row.on_front else "",
            ]
        )
    blank = [""] * (len(found.objectives) + 2)
    for front in found.fronts:
        seeds = str(len(front.hypervolume.by_seed)) if front.hypervolume else "0"
        label = f"front of {front.algorithm}, {len(front.variants)} variants"
        rows.append([label, seeds, *blank, bracketed(front.hypervolume), ""])
    return header, rows


def comparison_markdown(found: Comparison) -> str:
    """The table as Markdown, and the notes below it. Names stay text, in a browser and in a spreadsheet."""
    header, rows = comparison_table(found)
    lines = [map(_named, header), ["---"] * len(header), *([_named(name), *map(_cell, row)] for name, *row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([table, *map(_cell, found.notes)]) + "\n"


def _cell(text: str) -> str:
    """`text` within a row: no bar, tag or link of its own, and no line end."""
    for character, instead in (("&", "&amp;"), ("<", "&lt;"), ("\\", "\\\\"), ("|", "\\|"), ("](", "]\\(")):
        text = text.replace(character, instead)
    return printable(text)


def _named(text: str) -> str:
    """The same for a name, which a spreadsheet must not take for a formula."""
    return f"'{_cell(text)}" if text.lstrip().startswith(("=", "+", "-", "@")) else _cell(text)


def plus_minus(figure: Figure | None) -> str:
    """As in 0.705 ± 0.014: two significant digits of doubt, and at most three of the mean."""
    if figure is None:
        return "–"
    half = 0.0 if figure.low is None or figure.high is None else (figure.high - figure.low) / 2
    decimals = _decimals(figure.mean, half)
    text = f"{figure.mean:.{decimals}f}"
    return text if figure.low is None else f"{text} ± {half:.{decimals}f}"


def bracketed(figure: Figure | None, *, sign: str = "") -> str:
    """As in 0.031 [0.012, 0.050]; `sign` "+" also marks what is not negative."""
    if figure is None:
        return "–"
    low, high = (figure.mean if end is None else end for end in (figure.low, figure.high))
    decimals = _decimals(max(abs(low), abs(high)), (high - low) / 2)
    mean, low_text, high_text = (f"{value:{sign}.{decimals}f}" for value in (figure.mean, low, high))
    return mean if figure.low is None else f"{mean} [{low_text}, {high_text}]"


def _decimals(mean: float, half: float) -> int:
    scale = max(half, abs(mean) / 10)
    return max(0, 1 - math.floor(math.log10(scale))) if scale > 0 else 3


def _student(values: Mapping[int, float]) -> Figure | None:
    half = student_half_width(list(values.values()))
    mean = fmean(values.values()) if values else 0.0
    return _figure(values, lambda: (mean - half, mean + half) if half is not None else None)


def _bootstrap(values: Mapping[int, float]) -> Figure | None:
    return _figure(values, lambda: bootstrap_interval(list(values.values())) if len(values) > 1 else None)


def _figure(values: Mapping[int, float], interval: Callable[[], tuple[float, float] | None]) -> Figure | None:
    if not values:
        return None
    low, high = interval() or (None, None)
    return Figure(fmean(values.values()), low, high, dict(sorted(values.items())))


def _by_seed(runs: Runs, objective: str, which: int) -> dict[int, float]:
    """The first (0) or last (-1) held-out mean of every seed."""
    found = {seed: record.heldout(objective) for seed, record in sorted(runs.records.items())}
    return {seed: series[which][1] for seed, series in found.items() if series}


def _gains(one: Runs, base: Runs, objective: str) -> dict[int, float]:
    theirs = _by_seed(base, objective, -1)
    return {seed: end - theirs[seed] for seed, end in _by_seed(one, objective, -1).items() if seed in theirs}


def _points(runs: Runs, axes: Sequence[str]) -> dict[int, list[float]]:
    """Where each seed ended, if all axes were measured."""
    ends = [_by_seed(runs, axis, -1) for axis in axes]
    return {seed: [end[seed] for end in ends] for seed in ends[0] if all(seed in end for end in ends)}


def _volumes(points: Sequence[Mapping[int, list[float]]], references: Mapping[int, list[float]]) -> Figure | None:
    """The hypervolume of all `points` of a seed together, over the seeds that each of them has."""
    shared = [seed for seed in sorted(references) if all(seed in one for one in points)]
    return _bootstrap({seed: hypervolume([one[seed] for one in points], references[seed]) for seed in shared})


def _on_front(points: Mapping[str, Mapping[int, list[float]]]) -> set[str]:
    means = {name: [fmean(axis) for axis in zip(*seeds.values(), strict=True)] for name, seeds in points.items()}
    measured = {name: mean for name, mean in means.items() if mean}
    return {name for name, front in zip(measured, pareto_front(list(measured.values())), strict=True) if front}


def _fronts(
    variants: Sequence[Runs], points: Mapping[str, Mapping[int, list[float]]], references: Mapping[int, list[float]]
) -> list[Front]:
    names: dict[str, list[str]] = {}
    for one in variants:
        names.setdefault(one.algorithm, []).append(one.name)
    return [
        Front(algorithm, tuple(members), _volumes([points[name] for name in members], references))
        for algorithm, members in names.items()
        if len(members) > 1
    ]


def _notes(variants: Sequence[Runs], objectives: Sequence[str], starts: Mapping[str, Mapping[int, float]]) -> list[str]:
    notes = ["± is half a 95 % interval over seeds (Student's t), brackets are a 95 % bootstrap interval over seeds."]
    seeds = max((len(one.records) for one in variants), default=0)
    if seeds < FEW_SEEDS:
        notes.append(f"Seeds: {seeds}. With fewer than {FEW_SEEDS} a percentile bootstrap interval is too narrow.")
    odd = [
        one.name
        for one in variants
        if any(value != starts[name][seed] for name in objectives for seed, value in _by_seed(one, name, 0).items())
    ]
    if odd:
        notes.append(f"Another start than the one shown, from which hypervolumes count: {', '.join(odd)}.")
    if len({frozenset(one.records) for one in variants}) > 1:
        notes.append("Not every variant has every seed: differences are over shared seeds, means and fronts are not.")
    return notes
