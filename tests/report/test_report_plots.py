"""Charts are well-formed, escaped, and put values where they belong."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedpact.report.plots import bar_pairs, colour, line_chart, tick_labels, ticks

SVG = "{http://www.w3.org/2000/svg}"
VALUES = st.floats(-1e30, 1e30)
SERIES = st.dictionaries(st.integers(0, 10**6), VALUES, max_size=5).map(lambda points: sorted(points.items()))


def parsed(svg: str) -> ElementTree.Element:
    """The chart; a coordinate that is not a number would be seen here."""
    root = ElementTree.fromstring(svg)
    assert "nan" not in svg.replace(root.get("aria-label", ""), "") and "inf" not in svg
    return root


def texts(root: ElementTree.Element, kind: str) -> list[str]:
    return [node.text or "" for node in root.iter(f"{SVG}text") if kind in node.get("class", "").split()]


@given(st.lists(st.tuples(st.sampled_from(["a", "<b>", "&'\""]), SERIES), max_size=8), st.booleans())
def test_a_line_chart_is_well_formed_for_all_figures(lines, labels):
    assert parsed(line_chart(lines, title="any", labels=labels)).tag == f"{SVG}svg"


@given(st.lists(st.tuples(st.just("x"), st.none() | VALUES, st.none() | VALUES), max_size=6))
def test_a_bar_chart_is_well_formed_for_all_figures(rows):
    widths = [float(node.get("width", "")) for node in parsed(bar_pairs(rows, title="any")).iter(f"{SVG}rect")]
    assert len(widths) == sum(value is not None for _, *pair in rows for value in pair)
    assert all(0 <= width <= 460 for width in widths)


@given(st.text())
def test_any_name_can_stand_in_a_chart(name):
    ElementTree.fromstring(line_chart([(name, [(0, 1.0)])], title=name))
    ElementTree.fromstring(bar_pairs([(name, 0.1, 0.2)], title=name))


def test_names_are_text_and_not_markup():
    root = parsed(line_chart([("<script>", [(0, 1.0), (1, 2.0)])], title='"><script>alert(1)</script>'))
    assert texts(root, "title") == ['"><script>alert(1)</script>']
    assert texts(root, "name") == ["<script>"]
    assert not list(root.iter(f"{SVG}script"))


def test_a_line_goes_through_its_points_with_larger_values_higher():
    (path,) = [
        node.get("d", "")
        for node in parsed(line_chart([("x", [(0, 0.0), (5, 1.0), (10, 0.5)])], title="t")).iter(f"{SVG}path")
        if node.get("class") == "line s0"
    ]
    (x0, y0), (x1, y1), (x2, y2) = [map(float, pair.split()) for pair in path[1:].split("L")]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 < y2 < y0
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.1)


def test_a_single_point_is_drawn_in_the_middle():
    (circle,) = parsed(line_chart([("x", [(0, 0.5)])], title="t", labels=False)).iter(f"{SVG}circle")
    assert 200 < float(circle.get("cx", "")) < 300
    assert 80 < float(circle.get("cy", "")) < 160


def test_a_chart_without_points_says_so():
    assert "nothing measured yet" in line_chart([("x", [])], title="t")


def test_an_empty_series_keeps_its_colour_free():
    root = parsed(line_chart([("gone", []), ("here", [(0, 1.0), (1, 2.0)])], title="t"))
    assert [node.get("class") for node in root.iter(f"{SVG}circle")] == ["s1", "s1"]
    assert texts(root, "name") == ["here"]


def test_labels_of_lines_that_end_together_do_not_overlap():
    root = parsed(line_chart([(f"run {i}", [(0, 0.0), (1, 1.0)]) for i in range(5)], title="t"))
    heights = sorted(float(node.get("y", "")) for node in root.iter(f"{SVG}text") if "name" in node.get("class", ""))
    assert all(below - above >= 12.9 for above, below in pairwise(heights))
    assert heights[0] >= 30  # below the title, although all lines end at the top


def test_bars_are_as_long_as_their_values():
    rects = list(parsed(bar_pairs([("a", 0.25, 0.5), ("b", None, 1.0)], title="t")).iter(f"{SVG}rect"))
    widths = [float(rect.get("width", "")) for rect in rects]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(4 * widths[0], abs=0.4)


def test_a_negative_bar_ends_at_zero():
    negative, positive = parsed(bar_pairs([("a", -1.0, 1.0)], title="t")).iter(f"{SVG}rect")
    end = float(negative.get("x", "")) + float(negative.get("width", ""))
    assert end == pytest.approx(float(positive.get("x", "")), abs=0.2)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.529, 0.785, ["0.5", "0.6", "0.7", "0.8"]),
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-8.0, -5.38, ["−8", "−7", "−6", "−5"]),
        (0.5, 0.5, ["0.44", "0.46", "0.48", "0.50", "0.52", "0.54", "0.56"]),
        (0.0, 25000.0, ["0", "5,000", "10,000", "15,000", "20,000", "25,000"]),
    ],
)
def test_value_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert tick_labels(ticks(low, high, around=True)) == expected


def test_round_ticks_are_whole_and_lie_within():
    assert ticks(0, 3, least=1) == [0, 1, 2, 3]
    assert ticks(0, 16, least=1, count=5) == [0, 5, 10, 15]
    assert ticks(7, 7, least=1) == [7]


@given(VALUES, VALUES)
@example(0.0, 5e-324)
def test_ticks_enclose_any_interval_in_few_steps(one, other):
    low, high = sorted((one, other))
    found = ticks(low, high, around=True)
    slack = 1e-5 * (found[-1] - found[0])
    assert 2 <= len(found) <= 12
    assert found[0] - slack <= low and high <= found[-1] + slack


def test_colours_come_again_dashed():
    assert [colour(i) for i in (0, 5, 6, 12)] == ["s0", "s5", "s0 again", "s0"]
