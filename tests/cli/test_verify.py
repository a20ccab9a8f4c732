"""`fedpact verify`, `fedpact status` and `fedpact site ledger`: what can be checked of a run afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from fedpact.edge.replay import replayed
from fedpact.errors import CheckFailedError
from fedpact.runtime.ledger import Ledger
from tests.cli.conftest import edit, in_process


@pytest.fixture
def copy(tmp_path: Path, finished: Path) -> Path:
    """A finished run to change. Its name is the run's: it is part of what members were asked."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


def refused(capsys: pytest.CaptureFixture[str], code: int, *command: object) -> str:
    capsys.readouterr()
    assert in_process(*command) == code
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


def test_a_run_that_nobody_touched_is_verified(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process("verify", finished) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ledger") for line in lines) == 4
    assert "rounds: 4, every file as its MANIFEST says" in lines
    messages = [one for one in Ledger.entries(finished / "ledger.jsonl") if one["decision"] != "committed"]
    assert (
        f"heads: {len(messages)} that one side kept of the other are where they were" in lines
    )  # half sent, half received
    assert lines[-1].endswith("verified")


@pytest.mark.parametrize("line", [0, 3, -1])
def test_a_changed_line_of_a_ledger_is_found(copy: Path, line: int, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = copy / "clients" / "north" / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    lines[line] = lines[line].replace('"bytes_in":', '"bytes_in":1')
    ledger.write_text("".join(lines))
    assert f"line {line % len(lines) + 1} breaks the chain" in refused(capsys, 4, "verify", copy)


def test_an_end_that_was_cut_off_is_found_by_the_head_that_the_other_side_kept(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    member, server = copy / "clients" / "north" / "ledger.jsonl", copy / "ledger.jsonl"
    for name, whose, cut in (
        (member, "north", 1),
        (server, None, 8),
    ):  # the last exchange's six and the commit no member has seen
        whole = name.read_text()
        name.write_text("".join(whole.splitlines(keepends=True)[:-cut]))
        assert Ledger.verify(name) > 0  # the chain alone does not show it
        error = refused(capsys, 4, "verify", copy)
        assert "lacks the line" in error and (whose is None or "north" in error)
        name.write_text(whole)


def test_a_changed_file_of_a_round_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy / "rounds" / "0002" / "state.json", '"round": 2', '"round": 3')
    assert "0002/state.json: changed since it was written" in refused(capsys, 4, "verify", copy)


def test_a_round_that_was_taken_out_is_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "rounds" / "0001")
    assert "rounds/0001: missing" in refused(capsys, 4, "verify", copy)


def test_figures_that_were_changed_are_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(text.replace('"round":1', '"round":2', 1))
    assert "metrics.jsonl: is not that of the rounds" in refused(capsys, 4, "verify", copy)


def test_any_round_done_again_comes_to_the_same_bytes(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process("verify", finished, "--replay", "3", "--replay", "1") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("replayed")]
    assert len(lines) == 2
    manifest = hashlib.sha256((finished / "rounds" / "0001" / "MANIFEST").read_bytes()).hexdigest()
    assert lines[1].endswith(f"the same bytes, MANIFEST {manifest[:16]}")


@pytest.mark.slow
def test_a_round_that_was_changed_together_with_its_manifest_is_found(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy / "rounds" / "0003"
    adapter = bytearray((folder / "adapter_model.safetensors").read_bytes())
    before = hashlib.sha256(adapter).hexdigest()
    adapter[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(adapter)
    edit(folder / "MANIFEST", before, hashlib.sha256(adapter).hexdigest())
    assert "0003: its MANIFEST is not the one in the ledger" in refused(capsys, 4, "verify", copy)
    with pytest.raises(CheckFailedError, match="done again it came to other bytes"):
        replayed(copy, 3)


def test_a_round_that_does_not_exist_cannot_be_done_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--replay 9: committed are the rounds up to 3" in refused(capsys, 2, "verify", finished, "--replay", "9")


@pytest.mark.slow
def test_replaying_leaves_the_run_as_it_is(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert in_process("verify", finished, "--replay", "3") == 0
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_status_reads_the_ledger(finished: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process("status", finished, "--json") == 0
    found = json.loads(capsys.readouterr().out)["ledger"]
    assert found == {
        "entries": len(Ledger.entries(finished / "ledger.jsonl")),
        "head": Ledger(copy / "ledger.jsonl").head,
    }
    with (copy / "ledger.jsonl").open("a") as file:
        file.write('{"decision":"admitted"}\n')
    assert "breaks the chain" in refused(capsys, 4, "status", copy)


def test_a_members_ledger_can_be_read(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished / "clients" / "north"
    assert in_process("site", "ledger", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = Ledger.entries(folder / "ledger.jsonl")
    assert len(lines) == len(entries) + 1
    assert "round 1.0 attempt 0  train sent" in "".join(lines)
    assert in_process("site", "ledger", folder / "ledger.jsonl", "--json") == 0
    assert json.loads(capsys.readouterr().out)["entries"] == entries
    assert "no such ledger" in refused(capsys, 2, "site", "ledger", finished / "clients" / "nobody")
