"""A run folder as figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpact.errors import StoreError
from fedpact.report.read import disagreement, method_names, number, read_run, summary_rows, summary_table


def test_figures_come_back_by_round(make_run):
    rows = [
        (4, "all", "heldout/correct", 0.5),
        (0, "all", "heldout/correct", 0.25),
        (0, "north", "heldout/correct", 1.0),
    ]
    record = read_run(make_run(rows=rows))
    assert record.series("heldout/correct") == [(0, 0.25), (4, 0.5)]
    assert record.series("heldout/correct", who="north") == [(0, 1.0)]
    assert record.series("heldout/correct", who="nobody") == []


def test_the_primary_objective_stands_first(make_run):
    record = read_run(make_run(objectives=["brief", "correct", "polite"]))
    assert record.primary == "correct"
    assert record.objectives == ("correct", "brief", "polite")


def test_the_label_is_the_methods_name_and_the_algorithms_name_without_one(make_run):
    assert read_run(make_run("a")).label == "firm"
    assert read_run(make_run("b", label="FIRM beta=1")).label == "FIRM beta=1"


def test_equal_labels_are_told_apart_by_the_runs_names(make_run):
    one, two, three = read_run(make_run("one")), read_run(make_run("two")), read_run(make_run("x", label="other"))
    assert method_names([one, two, three]) == ["firm (one)", "firm (two)", "other"]
    assert method_names([one, one]) == ["firm (one) #1", "firm (one) #2"]


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(StoreError, match=r"not a run folder \(no run.json\)") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "config": 3}', "\x00", "[" * 99999])
def test_a_run_file_that_is_none_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StoreError, match=r"run\.json: not understood") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_later_schema_is_refused(make_run):
    with pytest.raises(StoreError, match="schema 2, expected 1"):
        read_run(make_run(schema=2))


def test_a_run_without_final_is_unfinished(make_run):
    record = read_run(make_run(rows=[(3, "north", "train/accuracy", 0.5)], finished=False))
    assert (record.finished, record.done, record.state) == (False, 3, "unfinished, round 3 of 4")


def test_a_committed_round_without_figures_counts_as_done(make_run):
    folder = make_run(finished=False)
    for name in ("0002", "0003"):
        (folder / "rounds" / name).mkdir(parents=True)
    (folder / "rounds" / "0002" / "MANIFEST").touch()
    assert read_run(folder).done == 2


def test_a_line_that_is_still_being_written_is_left_out(make_run):
    folder = make_run(rows=[(0, "all", "heldout/correct", 0.25)])
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 1, "who"')
    assert read_run(folder).series("heldout/correct") == [(0, 0.25)]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"round": 1}', '{"round": 1, "who": "a", "key": "b", "value": "x"}'])
def test_a_broken_line_in_the_middle_is_named(make_run, bad):
    folder = make_run()
    (folder / "metrics.jsonl").write_text(f'\n{bad}\n{{"round":0,"who":"all","key":"k","value":1}}\n')
    with pytest.raises(StoreError, match=r"metrics\.jsonl: line 2: "):
        read_run(folder)


def test_figures_that_are_no_measurements_are_left_out(make_run):
    values = [float("nan"), float("inf"), -1e31, 10**400, 2.0]
    record = read_run(make_run(rows=[(i, "all", "heldout/correct", value) for i, value in enumerate(values)]))
    assert record.series("heldout/correct") == [(4, 2.0)]


def test_the_primary_objective_is_read_from_accuracy_where_nothing_else_is_shared(make_run):
    record = read_run(make_run(rows=[(0, "all", "heldout/accuracy", 0.5)]))
    assert record.heldout("correct") == [(0, 0.5)]
    assert record.heldout("brief") == []


def test_only_the_runs_own_objectives_count_as_weights(make_run):
    record = read_run(
        make_run(rows=[(1, "north", "train/weight/correct", 0.75), (1, "north", "train/weight/odd", 9.0)])
    )
    assert record.weights("north") == {"correct": [(1, 0.75)]}


def test_traffic_adds_up(make_run):
    ledger = [
        {"decision": "asked", "bytes_out": 100},
        {"decision": "asked", "bytes_out": 50},
        {"decision": "asked", "bytes_out": 50},
        {"decision": "admitted", "bytes_in": 30},
        {"decision": "refused", "bytes_in": 4},
        {"decision": "failed"},
        {"decision": "torn", "bytes_in": 1000},
    ]
    folder = make_run(ledger=ledger)
    with (folder / "ledger.jsonl").open("a") as stream:
        stream.write('{"decision": "as\n{"decision": "failed"}\n')
    traffic = read_run(folder).traffic
    assert (traffic.to_members, traffic.from_members) == (200, 34)
    assert (traffic.asked, traffic.admitted, traffic.failed, traffic.refused) == (3, 1, 2, 1)


def test_the_summary_has_the_first_and_the_last_evaluation_and_marks_the_best(make_run):
    low = [(0, "all", "heldout/correct", 0.1), (2, "all", "heldout/correct", 0.9), (4, "all", "heldout/correct", 0.3)]
    high = [(0, "all", "heldout/correct", 0.1), (4, "all", "heldout/correct", 0.4)]
    records = [read_run(make_run("low", rows=low, label="L")), read_run(make_run("high", rows=high, label="H"))]
    rows = [row for row in summary_rows(records) if row["objective"] == "correct"]
    assert [(row["method"], row["start"], row["end"], row["best"]) for row in rows] == [
        ("L", 0.1, 0.3, False),
        ("H", 0.1, 0.4, True),
    ]


@pytest.mark.parametrize("end", [0.3, 0.8])
def test_an_unfinished_run_is_never_the_best(make_run, end):
    rows = [(0, "all", "heldout/correct", 0.1), (4, "all", "heldout/correct", 0.3)]
    better = [(0, "all", "heldout/correct", 0.1), (2, "all", "heldout/correct", end)]
    records = [
        read_run(make_run("a", rows=rows)),
        read_run(make_run("b", rows=rows)),
        read_run(make_run("c", rows=better, finished=False)),
    ]
    assert [row["best"] for row in summary_rows(records) if row["objective"] == "correct"] == [True, True, False]


def test_the_terminal_table_has_a_row_for_each_method(make_run):
    rows = [
        (0, "all", "heldout/correct", 0.4713),
        (4, "all", "heldout/correct", 0.5),
        (0, "all", "heldout/brief", -5.378),
    ]
    records = [read_run(make_run("a", rows=rows, label="A")), read_run(make_run("b", label="B", finished=False))]
    assert summary_table(records) == (
        ["method", "correct start → end", "brief start → end"],
        [["A", ".471 → .500", "−5.38 → –"], ["B (unfinished, round 0 of 4)", "– → –", "– → –"]],
    )


def test_members_that_weight_alike_do_not_disagree_and_others_do_by_their_standard_deviation(make_run):
    weights = {"north": (0.6, 0.4), "south": (0.4, 0.6), "third": (1.0, None)}
    rows = [
        (turn, member, f"train/weight/{objective}", 0.5 if turn == 1 else value)
        for turn in (1, 2)
        for member, pair in weights.items()
        for objective, value in zip(("correct", "brief"), pair, strict=True)
        if value is not None
    ]
    series = disagreement(read_run(make_run(rows=rows, members=weights)))
    assert series == [(1, 0.0), (2, pytest.approx(0.1))]


def test_sets_of_objectives_are_compared_within_themselves_and_counted_by_their_members(make_run):
    correct = {"a": 0.5, "b": 0.7, "c": 0.9, "d": 0.9, "e": 0.9}  # a and b also weight brief: deviation 0.1, others 0
    rows = [(1, member, "train/weight/correct", value) for member, value in correct.items()]
    rows += [(1, member, "train/weight/brief", 1 - correct[member]) for member in ("a", "b")]
    assert disagreement(read_run(make_run(rows=rows, members=correct))) == [(1, pytest.approx(0.1 * 2 / 5))]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0, "0"), (0.4713, ".471"), (-0.4713, "−.471"), (0.99951, "1.00"), (0.9994, ".999"),
        (1.0, "1.00"), (-5.380, "−5.38"), (99.96, "100"), (12345.0, "12,300"), (0.01, ".0100"), (0.00012345, ".000123"),
        (0.000012345, "1.23e-05"), (1.5e9, "1.50e+09"),
    ],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text


@given(st.floats(-1e30, 1e30))
def test_a_number_reads_back_within_half_a_percent(value):
    read = float(number(value).replace("−", "-").replace(",", ""))
    assert read == pytest.approx(value, rel=0.0051, abs=0)


def test_reading_needs_no_torch():
    code = "import sys, fedpact.report.page; print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_nothing_is_written_where_a_run_is_read(make_run):
    folder: Path = make_run(rows=[(0, "all", "heldout/correct", 0.25)])
    before = sorted(folder.rglob("*"))
    read_run(folder)
    assert sorted(folder.rglob("*")) == before
