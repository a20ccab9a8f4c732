"""The arithmetic of the transport benchmark. How fast an exchange is, is for the benchmark itself to say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

pytest.importorskip("cryptography", reason="needs the extra flower")

from benchmarks.transport import Echo, exchange_s, ratio, seconds, table, turns
from fedpact.runtime.transport import Failure

TIMES = {
    ("direct", 5.0): [9.0, 1.0, 2.0],
    ("shim", 5.0): [90.0, 9.0, 18.0],
    ("torch", 5.0): [900.0, 10.0, 20.0],
    ("direct", 50.0): [9.0, 6.0, 6.0],
    ("shim", 50.0): [90.0, 20.0, 30.0],
    ("torch", 50.0): [900.0, 10.0, 30.0],
}
"""The first of each is far off: wherever it counted, it would show."""


class Wire:
    """A transport to members that return as many bytes, but for those whose answers are given."""

    def __init__(self, **given: bytes | Failure) -> None:
        self.given = given
        self.sent: list[bytes] = []

    def clients(self) -> list[str]:
        return ["a", "b"]

    def exchange(
        self, envelopes: Mapping[str, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        self.sent += envelopes.values()
        return iter([(name, self.given.get(name, Echo().handle(data))) for name, data in envelopes.items()])


def test_the_first_exchange_counts_neither_in_a_mean_nor_in_its_range() -> None:
    assert seconds(TIMES, "torch", 5.0) == (15.0, 10.0, 20.0)


def test_a_ratio_is_mean_over_mean_and_its_range_is_that_of_single_rounds() -> None:
    assert ratio(TIMES, "shim", "torch", 50.0) == (1.25, 1.0, 2.0)


def test_every_kind_takes_its_turn_at_every_size_before_any_is_measured_again() -> None:
    order = list(turns(2, [5.0, 50.0]))
    assert order[:3] == [("direct", 5.0), ("shim", 5.0), ("torch", 5.0)]
    assert len(order) == 18
    assert order[:6] == order[6:12] == order[12:]
    assert len(set(order)) == 6


def test_the_table_has_a_line_for_each_kind_and_size_with_the_first_exchange_apart() -> None:
    line = next(line for line in table(TIMES) if line.startswith("stock SuperNode, shim") and "50 MB" in line)
    assert line.split()[-6:] == ["50", "MB", "25.00", "(20.00-30.00)", "2", "90.00"]


def test_goals_are_met_or_missed_by_means() -> None:
    goals = [line.split("  ")[0] + line.rpartition("goal")[2] for line in table(TIMES) if "goal" in line]
    assert goals == [
        "direct link, site service <= 2: met",
        "direct / torch <= 1/5: met",
        "shim / torch < 1: met",
        "direct / torch <= 1/5: missed",
        "shim / torch < 1: missed",
    ]


def test_no_two_members_and_no_two_exchanges_are_sent_the_same_bytes() -> None:
    wire = Wire()
    assert exchange_s(wire, ["a", "b"], 32) >= 0
    exchange_s(wire, ["a", "b"], 32)
    assert [len(data) for data in wire.sent] == [32] * 4
    assert len(set(wire.sent)) == 4


def test_a_stand_in_answers_with_other_bytes_than_it_was_sent() -> None:
    assert Echo().handle(b"x" * 32) != b"x" * 32


def test_an_exchange_that_a_member_fails_is_not_timed() -> None:
    with pytest.raises(RuntimeError, match="b: not connected; expected 32 bytes"):
        exchange_s(Wire(b=Failure("not connected")), ["a", "b"], 32)


def test_an_exchange_with_a_short_answer_is_not_timed() -> None:
    with pytest.raises(RuntimeError, match="a: answered 3 bytes; expected 32 bytes"):
        exchange_s(Wire(a=b"abc"), ["a", "b"], 32)
