"""What a run does with members, replies and disks that fail: it goes on with the rest, or stops and can be gone on
with.

One row for each kind of fault. Every run has three members and three rounds, and north fails in round 2.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpact.cli.progress import Progress
from fedpact.edge.local import resumed_transport
from fedpact.errors import TooFewRepliesError
from fedpact.messages import Trained
from fedpact.runtime import launch
from fedpact.runtime.codec import encode
from fedpact.runtime.envelope import Envelope, unwrap, wrap
from fedpact.runtime.store import RunFolder
from fedpact.runtime.transport import Failure
from tests.cli.conftest import MEMBERS, model, results, write_project
from tests.runtime.watched import Watched, launched

pytestmark = pytest.mark.slow

__all__ = ["model"]

OPTIONS = ("--set", "evaluation.every=3", "--set", "evaluation.conflicts=false")
Twist = Callable[[str, Envelope, bytes], list[bytes | Failure]]


class Twisted(Watched):
    """A transport in which `twist` puts other bytes, none, or several in the place of an answer."""

    def __init__(self, twist: Twist) -> None:
        super().__init__()
        self.twist = twist

    def exchange(
        self, envelopes: Mapping[str, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        plain = Watched()
        for who, answer in plain.over(self.inner).exchange(envelopes, timeout_s=timeout_s):
            assert not isinstance(answer, Failure)
            envelope = next(one for name, one, _ in plain.sent if name == who)
            self.answers.append((who, envelope, answer))
            for twisted in self.twist(who, envelope, answer):
                yield who, twisted


def in_round_2(change: Callable[[Envelope, bytes], list[bytes | Failure]]) -> Twist:
    """Changes north's answer to the training of round 2."""

    def twist(who: str, envelope: Envelope, answer: bytes) -> list[bytes | Failure]:
        hit = who == "north" and envelope.round == 2 and envelope.verb == "train"
        return change(envelope, answer) if hit else [answer]

    return twist


def reply(change: Callable[[Trained], Trained]) -> Twist:
    """Changes the reply in that answer; what wraps it is right."""

    def changed(envelope: Envelope, answer: bytes) -> list[bytes | Failure]:
        found = unwrap(envelope, answer)
        assert isinstance(found, Trained)
        return [wrap(envelope, encode(change(found)))]

    return in_round_2(changed)


def first_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Trained], Trained]:
    def changed(trained: Trained) -> Trained:
        name = min(trained.adapter)
        return replace(trained, adapter={**trained.adapter, name: change(trained.adapter[name])})

    return changed


def one_nan(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.flatten()[3] = torch.nan
    return changed


def kept(seen: list[bytes]) -> Twist:
    """North answers round 2 with what it said in round 1, in the envelope of then."""

    def twist(who: str, envelope: Envelope, answer: bytes) -> list[bytes | Failure]:
        if who != "north" or envelope.verb != "train":
            return [answer]
        seen.append(answer)
        return [seen[0] if envelope.round == 2 else answer]

    return twist


def flipped(answer: bytes) -> bytes:
    """One bit of the reply, in the middle of its numbers, is another."""
    middle = len(answer) * 3 // 4
    return answer[:middle] + bytes([answer[middle] ^ 0x40]) + answer[middle + 1 :]


REFUSED: dict[str, tuple[Twist, str]] = {
    "no reply": (in_round_2(lambda envelope, answer: [Failure("connection lost")]), "connection lost"),
    "NaN": (reply(first_tensor(one_nan)), "not finite"),
    "infinity": (reply(first_tensor(lambda tensor: tensor + torch.inf)), "not finite"),
    "wrong shape": (reply(first_tensor(lambda tensor: tensor[:1])), "expected"),
    "wrong type": (reply(first_tensor(lambda tensor: tensor.double())), "expected"),
    "a key more": (reply(lambda one: replace(one, adapter={**one.adapter, "x": torch.zeros(1)})), "x"),
    "cut": (in_round_2(lambda envelope, answer: [answer[: len(answer) // 2]]), ""),
    "empty": (in_round_2(lambda envelope, answer: [b""]), ""),
    "noise": (in_round_2(lambda envelope, answer: [bytes(range(256)) * 9]), ""),
    "a bit flipped": (in_round_2(lambda envelope, answer: [flipped(answer)]), ""),
    "stale round": (kept([]), "round is 1, expected 2"),
    "another's": (
        in_round_2(lambda envelope, answer: [wrap(replace(envelope, nonce="0" * 32), b"")]),
        "nonce",
    ),
}
QUICK = {"NaN", "stale round"}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_project(tmp_path_factory.mktemp("matrix"), model=model)


@pytest.fixture(scope="module")
def whole(run_file: Path) -> dict[str, bytes]:
    """What the run comes to if nothing fails."""
    return results(launched(run_file, *OPTIONS, name="whole")[1])


@pytest.fixture(scope="module")
def without_north(run_file: Path) -> dict[str, bytes]:
    """What it comes to if north is silent in round 2."""
    twist = in_round_2(lambda envelope, answer: [Failure("silent")])
    return made(launched(run_file, *OPTIONS, watched=Twisted(twist), name="without")[1])


def made(out: Path) -> dict[str, bytes]:
    """What was worked out: everything that two equal runs have in common but the record of who failed, and why."""
    return {name: data for name, data in results(out).items() if Path(name).name not in ("state.json", "MANIFEST")}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def who_trained(out: Path) -> set[tuple[int, str]]:
    return {(row["round"], row["who"]) for row in lines(out / "metrics.jsonl") if row["key"] == "train/reward/low"}


@pytest.mark.parametrize("fault", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in REFUSED])
def test_a_bad_reply_is_as_good_as_none_and_is_named(run_file, without_north, fault):
    twist, reason = REFUSED[fault]
    watched, out = launched(run_file, *OPTIONS, watched=Twisted(twist), name=fault.replace(" ", "-"))
    assert set(watched.losses) == {"north"} and reason in watched.losses["north"]
    assert who_trained(out) == {(r, who) for r in (1, 2, 3) for who in MEMBERS} - {(2, "north")}
    assert made(out) == without_north
    record = RunFolder(out).load(2).state["exchanges"]
    assert [(one["roster"], set(one["failures"])) for one in record] == [(["east", "south"], {"north"})]
    assert reason in record[0]["failures"]["north"]
    entries = [one for one in lines(out / "ledger.jsonl") if one["decision"] in ("failed", "refused")]
    assert [(one["round"], one["peer"]) for one in entries] == [(2, "north")]
    assert entries[0]["decision"] == ("failed" if fault == "no reply" else "refused")


HARMLESS: dict[str, Twist] = {
    "the same twice": in_round_2(lambda envelope, answer: [answer, answer]),
    "the same, and then another": in_round_2(
        lambda envelope, answer: [answer, wrap(envelope, encode(doubled(envelope, answer)))]
    ),
    "the same, and then noise": in_round_2(lambda envelope, answer: [answer, b"noise"]),
    "the same, and then a failure": in_round_2(lambda envelope, answer: [answer, Failure("connection lost")]),
}


def doubled(envelope: Envelope, answer: bytes) -> Trained:
    found = unwrap(envelope, answer)
    assert isinstance(found, Trained)
    return replace(found, adapter={name: 2 * tensor for name, tensor in found.adapter.items()})


@pytest.mark.slow
@pytest.mark.parametrize("fault", HARMLESS)
def test_one_vote_per_member_whatever_comes_after_it(run_file, whole, fault):
    watched, out = launched(run_file, *OPTIONS, watched=Twisted(HARMLESS[fault]), name=fault.replace(" ", "-"))
    assert results(out) == whole
    assert watched.losses == {}


@pytest.mark.slow
def test_a_reply_that_comes_a_round_late_costs_its_round_and_no_other(run_file, without_north):
    late: list[bytes | Failure] = []

    def twist(who: str, envelope: Envelope, answer: bytes) -> list[bytes | Failure]:
        if who == "north" and envelope.verb == "train" and envelope.round == 2:
            late.append(answer)
            return [Failure("no reply within 1 s (federation.timeout_s)")]
        if who == "north" and envelope.verb == "train" and envelope.round == 3:
            return [late.pop(), answer]
        return [answer]

    _, out = launched(run_file, *OPTIONS, watched=Twisted(twist), name="late")
    assert late == []
    assert made(out) == without_north


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, -1.0, 1e12])
def test_a_weight_out_of_bounds_is_refused(run_file, without_north, weight):
    twist = reply(lambda one: replace(one, weight=weight))
    watched, out = launched(run_file, *OPTIONS, watched=Twisted(twist), name=f"weight{weight:g}")
    assert "weight" in watched.losses["north"]
    assert made(out) == without_north


@pytest.mark.slow
def test_a_lying_weight_is_worth_two_equal_shares(run_file):
    twist = reply(lambda one: replace(one, weight=1e6))
    watched, out = launched(run_file, *OPTIONS, watched=Twisted(twist), name="liar")
    said = {who: unwrap(one, data) for who, one, data in watched.answers if (one.round, one.verb) == (2, "train")}
    east, north, south = (said[who] for who in MEMBERS)
    assert isinstance(east, Trained) and isinstance(north, Trained) and isinstance(south, Trained)
    honest = east.weight + south.weight
    for name, tensor in RunFolder(out).load(2).adapter.items():
        others = (east.weight * east.adapter[name] + south.weight * south.adapter[name]) / honest
        torch.testing.assert_close(tensor, north.adapter[name] * 2 / 3 + others / 3, rtol=0, atol=1e-6)
    assert who_trained(out) == {(r, who) for r in (1, 2, 3) for who in MEMBERS}
    assert watched.losses == {}


@pytest.mark.slow
def test_too_few_good_replies_end_the_round_with_5_and_the_adapter_as_it_was(run_file, whole, capfd):
    def twist(who: str, envelope: Envelope, answer: bytes) -> list[bytes | Failure]:
        bad = who != "east" and envelope.round == 2 and envelope.verb == "train"
        return [answer[:40] if who == "north" else Failure("gone")] if bad else [answer]

    watched = Twisted(twist)
    with pytest.raises(TooFewRepliesError, match=r"round 2, exchange 0: 1 of 3 members replied.*north: ") as raised:
        launched(run_file, *OPTIONS, watched=watched, name="few")
    assert raised.value.exit_code == 5
    assert set(watched.losses) == {"north", "south"}
    out = run_file.parent / "runs" / "few" / "run"
    for name in ("rounds/0000/", "rounds/0001/"):
        assert {k: v for k, v in results(out).items() if k.startswith(name)} == {
            k: v for k, v in whole.items() if k.startswith(name)
        }
    assert RunFolder(out).latest_round() == 1 and not (out / "final").exists()
    launch.resume(out, make=resumed_transport, observer=Progress(3))
    assert results(out) == whole


@pytest.mark.slow
def test_no_time_of_day_is_in_the_bytes_or_in_a_deadline(run_file, whole, monkeypatch):
    """Clocks that jump: back by a year at each look at them. Only the ledger says what time it was."""
    looks = iter(range(10**9))

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime(2500, 1, 1, tzinfo=tz) - datetime.timedelta(days=365 * (next(looks) % 400))

    monkeypatch.setattr(time, "time", lambda: 4e9 - 3.15e7 * next(looks))
    monkeypatch.setattr("fedpact.runtime.ledger.datetime", Jumping)
    _, out = launched(run_file, *OPTIONS, "--set", "federation.timeout_s=60", name="clock")
    assert next(looks) > 20
    assert results(out)["final/adapter_model.safetensors"] == whole["final/adapter_model.safetensors"]


@pytest.mark.parametrize("left", [set(), {"clients"}, {"clients", "ledger.jsonl", "server"}])
def test_a_run_that_never_began_is_discarded_and_one_that_was_half_discarded_is_begun_again(tmp_path, left):
    with RunFolder.create(tmp_path / "run") as folder:
        (folder.path / "clients" / "east").mkdir(parents=True)
        (folder.path / "ledger.jsonl").touch()
        folder.discard()
        assert not folder.path.exists()
    with RunFolder.create(tmp_path / "run") as folder:  # its discard was cut short: the lock goes last
        for name in left:
            (folder.path / name).mkdir()
    with RunFolder.create(tmp_path / "run") as folder:
        folder.write_run({})


def test_a_discard_that_is_cut_short_has_left_the_lock(tmp_path, monkeypatch):
    def stopped(path: Path, ignore_errors: bool = False) -> None:
        raise KeyboardInterrupt

    with RunFolder.create(tmp_path / "run") as folder:
        (folder.path / "clients").mkdir()
        (folder.path / "ledger.jsonl").touch()
        monkeypatch.setattr("fedpact.runtime.store.shutil.rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            folder.discard()
        assert (folder.path / ".lock").exists()
    monkeypatch.undo()
    RunFolder.create(tmp_path / "run").close()


# --- what needs processes of its own --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty() -> dict[str, list[dict[str, Any]]]:
    """The rows of faulty_runs, by kind."""
    command = [sys.executable, "-m", "tests.runtime.faulty_runs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in done.stdout.splitlines():
        one = json.loads(line)
        rows.setdefault(one["kind"], []).append(one)
    return rows


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("kind", "count"), [("disk", 23), ("full", 5), ("permission", 3), ("members", 3), ("interrupted", 8)]
)
def test_every_row_ends_as_it_should_and_can_be_gone_on_with(faulty, kind, count):
    rows = faulty[kind]
    if rows[-1].get("skipped"):
        pytest.skip(rows[-1]["skipped"])
    assert {one["row"]: one["wrong"] for one in rows if one["wrong"]} == {}
    assert len(rows) == count
