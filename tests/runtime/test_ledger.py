from __future__ import annotations

import hashlib
import json
import re
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpact.errors import StoreError
from fedpact.runtime.ledger import START, Ledger

TIME = "2026-01-01T12:00:00Z"


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "north" / "ledger.jsonl")
    for round in range(3):
        made.append(time=TIME, round=round, verb="train", request="a" * 64, bytes_out=100, decision="sent")
    return made


def lines(ledger: Ledger) -> list[str]:
    return ledger.path.read_text().splitlines()


def test_each_line_holds_the_digest_of_the_one_before_and_its_own(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.head == START == "0" * 64
    first = ledger.append(time=TIME, verb="train")
    second = ledger.append(time=TIME, verb="evaluate", counts={"prompts": 20}, fields=["weight", "rewards"])
    by_hand = hashlib.sha256(f'{{"prev":"{START}","time":"{TIME}","verb":"train"}}\n'.encode()).hexdigest()
    assert first == by_hand
    assert lines(ledger)[0] == f'{{"prev":"{START}","sha256":"{first}","time":"{TIME}","verb":"train"}}'
    assert json.loads(lines(ledger)[1])["prev"] == first
    assert ledger.head == second
    assert Ledger.verify(ledger.path) == 2


def test_a_ledger_opened_again_goes_on_where_it_stopped(ledger):
    again = Ledger(ledger.path)
    assert again.head == ledger.head
    again.append(round=3)
    assert Ledger.verify(ledger.path) == 4


def test_the_time_is_utc_in_whole_seconds(ledger):
    ledger.append(round=3)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", json.loads(lines(ledger)[3])["time"])


@pytest.mark.parametrize(
    "fields",
    [
        {"reward": 1},
        {"prompt": "What is wrong with me?"},
        {"prev": START},
        {"sha256": START},
        {"torn": START},
        {"counts": {"reward": 0.5}},
        {"bytes_in": 0.5},
        {"reply": b"bytes"},
        {"fields": [["nested"]]},
        {"counts": {"a": {"b": 1}}},
    ],
)
def test_values_and_unknown_fields_are_refused_and_nothing_is_written(ledger, fields):
    before = lines(ledger)
    with pytest.raises(ValueError, match="the ledger"):
        ledger.append(round=3, **fields)
    assert lines(ledger) == before


def test_text_is_one_short_line_and_a_reason_holds_no_path(ledger):
    ledger.append(reason="cannot read /home/ada/patients.jsonl\nor C:\\data at all", run="x" * 10_000)
    entry = json.loads(lines(ledger)[3])
    assert entry["reason"] == "cannot read ... or ... at all"
    assert entry["run"] == "x" * 200


def break_line(number: int):
    def change(text: list[str]) -> list[str]:
        text[number] = text[number].replace('"bytes_out":100', '"bytes_out":1')
        return text

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (break_line(0), 1),
        (break_line(2), 3),
        (lambda text: text[1:], 1),
        (lambda text: [text[0], text[2]], 2),
        (lambda text: [text[1], text[0], text[2]], 1),
        (lambda text: [text[0], text[0], *text[1:]], 2),
        (lambda text: [text[0], "", *text[1:]], 3),
        (lambda text: [text[0], text[1][:50], text[2]], 3),
        (lambda text: [text[0], " " + text[1], text[2]], 2),
        (lambda text: [*text, "{}"], 4),
        (lambda text: [*text, "[]"], 4),
    ],
)
def test_a_changed_missing_or_added_line_is_found(ledger, change, line):
    ledger.path.write_text("\n".join(change(lines(ledger))) + "\n")
    with pytest.raises(StoreError, match=f"line {line} breaks the chain"):
        Ledger.verify(ledger.path)
    with pytest.raises(StoreError, match=f"line {line} breaks the chain"):
        Ledger(ledger.path)


@settings(max_examples=60, deadline=None)
@given(keep=st.integers(1, 300))
def test_a_torn_line_stays_as_evidence_and_the_chain_goes_on(tmp_path_factory, keep):
    path = tmp_path_factory.mktemp("torn") / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append(time=TIME, round=0)
    first = path.read_bytes()
    ledger.append(time=TIME, round=1)
    torn = path.read_bytes()[: len(first) + keep]
    path.write_bytes(torn)
    complete = json.loads(torn.splitlines()[1]) if torn.rstrip(b"\n").endswith(b"}") else None
    assert Ledger.verify(path) == (2 if complete else 1)
    Ledger(path).append(time=TIME, round=2)
    assert path.read_bytes().startswith(torn)
    assert Ledger.verify(path) == 3
    marker = json.loads(path.read_bytes().splitlines()[-2])
    assert marker.get("torn") == (None if complete else hashlib.sha256(torn[len(first) :]).hexdigest())


def test_a_fragment_cannot_be_changed_afterwards(ledger):
    with ledger.path.open("a") as file:
        file.write('{"prev":"abc')
    Ledger(ledger.path).append(round=3)
    assert Ledger.verify(ledger.path) == 5
    ledger.path.write_text(ledger.path.read_text().replace('"abc', '"abd'))
    with pytest.raises(StoreError, match="line 5 breaks the chain"):
        Ledger.verify(ledger.path)


@pytest.mark.parametrize("tail", ['{"a\n', '{"a\n{"pr', "\n", "\n\n", "\x00\x00\xff", '{"a":NaN}', "[" * 5000])
def test_a_line_torn_again_while_it_was_being_marked_is_taken_in_whole(ledger, tail):
    with ledger.path.open("ab") as file:
        file.write(tail.encode("latin-1"))
    before = ledger.path.read_bytes()
    Ledger(ledger.path).append(round=3)
    assert ledger.path.read_bytes().startswith(before)
    assert Ledger.verify(ledger.path) == 5


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_the_next_entry_goes_on(ledger):
    size, head = ledger.path.stat().st_size, ledger.head
    with pytest.raises(StoreError) as raised, file_size_limit(size + 20):
        ledger.append(round=3)
    remedy = "raise the file-size limit (`ulimit -f`), then start again"
    assert str(raised.value) == f"{ledger.path}: File too large; {remedy}"
    assert (ledger.path.stat().st_size, ledger.head) == (size + 20, head)
    ledger.append(round=3)
    assert Ledger.verify(ledger.path) == 5


def test_only_the_owner_can_read_it(ledger):
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(ledger.path.parent.stat().st_mode) == 0o700
