"""Charts as SVG text, without a script: figures in, one well-formed element out, every name escaped.

Colours are the classes `s0` to `s5`, which the page defines for light, dark and paper; from the seventh line on they
come again, dashed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

from fedpact.report.read import Series, number
from fedpact.screen import printable

NUM_COLOURS = 6

_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CHARACTER = 6.4  # width of one at 11 px, about
_MAX_MARKS = 40


def line_chart(
    lines: Sequence[tuple[str, Series]],
    *,
    title: str,
    width: int = 460,
    height: int = 230,
    span: tuple[float, float] | None = None,
    last_round: int | None = None,
    labels: bool = True,
) -> str:
    """One line for each (name, series) over rounds; an empty series keeps its colour free.

    The value axis holds all values and `span`, the round axis all rounds and `last_round`. `labels` writes each name
    at the end of its line.
    """
    points = [point for _, series in lines for point in series]
    values = [value for _, value in points] + list(span or ())
    rounds = [turn for turn, _ in points] + ([] if last_round is None else [last_round])
    shown = [short(name, 17) for name, series in lines if series] if labels else []
    left, right, top, bottom = 46.0, width - 10 - _CHARACTER * max(map(len, shown), default=0), 30.0, height - 24.0
    y_ticks = ticks(min(values, default=0.0), max(values, default=1.0), around=True, count=5 if height > 170 else 3)
    x_ticks = ticks(min(rounds, default=0), max(rounds, default=0), least=1, count=max(2, int((right - left) / 55)))
    y = _scale((y_ticks[0], y_ticks[-1]), (bottom, top))
    x = _scale((min(rounds, default=0), max(rounds, default=0)), (left + 4, right - 4))
    parts = [text_at(title, 2, 14, kind="title")]
    for tick, shown_tick in zip(y_ticks, tick_labels(y_ticks), strict=True):
        parts.append(f'<path class="rule" d="M{left:.1f} {y(tick):.1f}H{right:.1f}"/>')
        parts.append(text_at(shown_tick, left - 6, y(tick) + 4, anchor="end"))
    for tick, shown_tick in zip(x_ticks, tick_labels(x_ticks), strict=True):
        parts.append(text_at(shown_tick, x(tick), bottom + 16, anchor="middle"))
    if not points:
        parts.append(text_at("nothing measured yet", (left + right) / 2, (top + bottom) / 2, anchor="middle"))
    ends = [(i, y(series[-1][1])) for i, (_, series) in enumerate(lines) if series]
    heights = dict(zip((i for i, _ in ends), _apart([at for _, at in ends], 13, top, bottom), strict=True))
    for i, (name, series) in enumerate(lines):
        if not series:
            continue
        path = "L".join(f"{x(turn):.1f} {y(value):.1f}" for turn, value in series)
        parts.append(f'<path class="line {colour(i)}" d="M{path}"/>')
        for turn, value in series if len(series) <= _MAX_MARKS else series[-1:]:
            tip = f"<title>{clean(f'{name}, round {turn}: {number(value)}')}</title>"
            parts.append(f'<circle class="{colour(i)}" cx="{x(turn):.1f}" cy="{y(value):.1f}" r="2.6">{tip}</circle>')
        if labels:
            if x(series[-1][0]) < right - 30:
                leader = f"M{x(series[-1][0]):.1f} {y(series[-1][1]):.1f}L{right:.1f} {heights[i]:.1f}"
                parts.append(f'<path class="leader {colour(i)}" d="{leader}"/>')
            parts.append(text_at(short(name, 17), right + 4, heights[i] + 4, kind=f"name {colour(i)}"))
    return svg(title, width, height, parts)


def bar_pairs(
    rows: Sequence[tuple[str, float | None, float | None]],
    *,
    title: str,
    series: int = 0,
    width: int = 460,
    span: tuple[float, float] | None = None,
) -> str:
    """A pale bar (start) over a full one (end) for each (name, start, end), and both numbers beside them.

    The axis holds zero, all values and `span`; `series` chooses the colour. None has no bar and reads as a dash.
    """
    values = [value for _, *pair in rows for value in pair if value is not None] + list(span or ())
    axis = ticks(min([0.0, *values]), max([0.0, *values]) or 1.0, around=True, count=4)
    shown = [short(name, 20) for name, _, _ in rows]
    left, right, top = 14 + _CHARACTER * max(map(len, shown), default=0), width - 96.0, 30.0
    x = _scale((axis[0], axis[-1]), (left, right))
    bottom = top + 24 * len(rows)
    parts = [text_at(title, 2, 14, kind="title")]
    for tick, shown_tick in zip(axis, tick_labels(axis), strict=True):
        parts.append(f'<path class="rule" d="M{x(tick):.1f} {top:.1f}V{bottom:.1f}"/>')
        parts.append(text_at(shown_tick, x(tick), bottom + 14, anchor="middle"))
    for i, (name, start, end) in enumerate(rows):
        above = top + 24 * i
        parts.append(text_at(shown[i], left - 6, above + 16, anchor="end", tip=name))
        for value, offset, kind in ((start, 3, "start "), (end, 12, "")):
            if value is not None:
                begin, size = min(x(0), x(value)), abs(x(value) - x(0))
                box = f'x="{begin:.1f}" y="{above + offset:.1f}" width="{size:.1f}" height="8"'
                parts.append(f'<rect class="{kind}{colour(series)}" {box}/>')
        parts.append(text_at(f"{number(start)} → {number(end)}", right + 8, above + 16, kind="figure"))
    return svg(title, width, int(bottom + 22), parts)


def ticks(low: float, high: float, *, count: int = 5, least: float = 0.0, around: bool = False) -> list[float]:
    """Round numbers, about `count` of them, in steps of 1, 2 or 5 times a power of ten and of `least` at the least.

    Within [low, high], or `around` it: then the first and the last enclose it, also where both are equal.
    """
    if around and high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-30):
        pad = 0.1 * abs(low) if abs(low) > 1e-30 else 0.5
        low, high = low - pad, high + pad
    rough = max((high - low) / count, least)
    if rough == 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((size * power for size in (1, 2, 5) if size * power >= rough * 0.999), 10 * power)
    if around:
        first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    else:
        first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [i * step for i in range(first, last + 1)] or [low]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The ticks as text, all with as many decimals as their step needs."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    if not 1e-6 < step < 1e6:
        return [f"{value:.2g}".replace("-", "−") for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-6))
    return [f"{value + 0.0:,.{decimals}f}".replace("-", "−") for value in values]


def colour(i: int) -> str:
    """The classes of line i."""
    return f"s{i % NUM_COLOURS}" + (" again" if i // NUM_COLOURS % 2 else "")


def short(name: str, length: int) -> str:
    """`name`, cut to `length` characters."""
    return name if len(name) <= length else name[: length - 1] + "…"


def text_at(content: str, x: float, y: float, *, anchor: str = "start", kind: str = "tick", tip: str = "") -> str:
    """`content` at a point, `anchor` telling which end is there; `tip` shows in full what was cut."""
    title = f"<title>{clean(tip)}</title>" if tip else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{clean(content)}{title}</text>'


def svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    """The chart itself, around its parts."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{clean(title)}">'
    return "".join([head, *parts, "</svg>"])


def clean(text: str) -> str:
    """`text` for an attribute or an element: escaped, without controls and without what XML cannot hold."""
    return escape(_NO_XML.sub("\ufffd", printable(text)))


def _scale(source: tuple[float, float], target: tuple[float, float]) -> Callable[[float], float]:
    """Maps one interval on another, an empty one on the middle."""
    (low, high), (begin, end) = source, target
    return lambda value: begin + (end - begin) * ((value - low) / (high - low) if high > low else 0.5)


def _apart(places: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """`places` moved so that they lie `gap` apart, in the same order and where there is room above `bottom`."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for above, i in pairwise(order):
        moved[i] = max(moved[i], moved[above] + gap)
    limit = max(bottom, top + gap * (len(places) - 1))
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved
