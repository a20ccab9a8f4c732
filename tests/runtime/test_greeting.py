"""Who comes into a run, and when: a run over four rounds in which members come late, are lost, hang and are wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpact.edge.local import LocalTransport
from fedpact.messages import Hello
from fedpact.runtime import acceptance, launch
from fedpact.runtime.client_config import load_client
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import RunConfig, load_run
from fedpact.runtime.contract import contract_hash, contract_of
from fedpact.runtime.engines import Engines, hash_of
from fedpact.runtime.envelope import Envelope, seal
from fedpact.runtime.greeting import Greeting
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.member import Member
from fedpact.runtime.transport import Failure
from tests.cli.conftest import model, write_project

__all__ = ["model"]

OPTIONS = [
    "evaluation.conflicts=false",
    "evaluation.every=9",
    "rollout.num_generations=2",
    "rollout.max_completion_length=2",
    "training.prompts_per_step=1",
    "federation.timeout_s=500",
]
LATE = Failure("no reply in time")


@dataclass(frozen=True)
class Said:
    """One exchange, as its transport was given it."""

    round: int
    """That was going on."""
    verb: str
    clients: frozenset[str]
    timeout_s: float | None


class Told(LocalTransport):
    """Members in this process, some of whom are not there in every round, and some never answer in time."""

    def __init__(self, members: Mapping[str, Member], since: Mapping[str, int]) -> None:
        super().__init__(members)
        self.since, self.late, self.round = since, {("hangs", n) for n in range(9)}, 0
        self.said: list[Said] = []

    def clients(self) -> Sequence[str]:
        there = [*self.members, "hangs"]
        return sorted(name for name in there if self.since.get(name, 0) <= self.round)

    def exchange(
        self, envelopes: Mapping[str, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        verb = decode(Envelope, next(iter(envelopes.values()))).verb
        self.said.append(Said(self.round, verb, frozenset(envelopes), timeout_s))
        late = [name for name in envelopes if (name, self.round) in self.late]
        yield from ((name, LATE) for name in late)
        yield from super().exchange({n: data for n, data in envelopes.items() if n not in late}, timeout_s=timeout_s)


class Happening:
    """A finished run of some members: east, whom another run's hello takes after round 1; north, who is late in round
    3; south, who comes in round 2; "wrong", whose client file calls it south; and "hangs", who never answers."""

    def __init__(self, folder: Path, model: Path) -> None:
        torch.set_num_threads(1)
        run_file = write_project(folder / "project", model=model, rounds=4)
        config = load_run(run_file, OPTIONS)
        self.contract = contract_of(config, model=hash_of(model)).canonical()
        engines, self.dropped_ones = Engines(), list[tuple[int, str, str]]()
        members = {}
        for name in ("east", "north", "south", "wrong"):
            file = run_file.parent / "clients" / f"{name if name != 'wrong' else 'south'}.toml"
            home = folder / name
            config_of = load_client(file)
            members[name] = Member(config_of, folder=file.parent, home=home, where=name, engines=engines, model=model)
            acceptance.accept(home, self.contract)
        self.transport = Told(members, {"south": 2})
        self.transport.late.add(("north", 3))
        self.out = folder / "runs" / "run"
        launch.start(config, run_file.parent, self.out, where="run.toml", make=lambda *_: self.transport, observer=self)

    def round_done(self, round: int, metrics: Sequence[Mapping[str, Any]]) -> None:
        self.transport.round = round + 1
        if round == 1:
            where = {"run": "rival", "contract": contract_hash(self.contract), "round": 0, "exchange": 0}
            self.transport.members["east"].handle(encode(seal(Hello(self.contract), **where)))

    def dropped(self, client: str, reason: str) -> None:
        self.dropped_ones.append((self.transport.round, client, reason))

    def greeted(self, round: int) -> set[str]:
        """Who was said hello to in that round; before round 0 in 0."""
        return {
            name for one in self.transport.said if (one.round, one.verb) == (round, "hello") for name in one.clients
        }

    def trained(self, round: int) -> set[str]:
        """Whose training counted in that round."""
        entries = Ledger.entries(self.out / "ledger.jsonl")
        ours = (one for one in entries if one["round"] == round and one.get("verb") == "train")
        return {one["peer"] for one in ours if one["decision"] == "admitted"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Happening:
    return Happening(tmp_path_factory.mktemp("greeting"), model)


def test_a_round_waits_30_s_for_who_is_not_in_it_and_the_start_of_the_run_as_long_as_for_any_reply(
    run: Happening,
) -> None:
    times = {(one.round > 0, one.verb): one.timeout_s for one in run.transport.said}
    assert times == {(False, "hello"): 500, (False, "evaluate"): 500, (True, "hello"): 30, (True, "train"): 500,
                     (True, "evaluate"): 500}  # fmt: skip
    assert [run.greeted(n) >= {"hangs"} for n in range(5)] == [True] * 5


def test_who_refused_in_a_round_is_greeted_again_in_the_next_and_is_back(run: Happening) -> None:
    assert [("east" in run.greeted(n), "east" in run.trained(n)) for n in range(1, 5)] == [
        (False, True),
        (False, False),
        (True, True),
        (False, True),
    ]


def test_a_member_that_comes_in_round_2_takes_part_from_then_on(run: Happening) -> None:
    assert [("south" in run.greeted(n), "south" in run.trained(n)) for n in range(1, 5)] == [
        (False, False),
        (True, True),
        (False, True),
        (False, True),
    ]


def test_who_is_late_is_not_greeted_again_and_is_asked_in_the_next_round(run: Happening) -> None:
    assert [("north" in run.greeted(n), "north" in run.trained(n)) for n in range(1, 5)] == [
        (False, True),
        (False, True),
        (False, False),
        (False, True),
    ]


def test_a_member_under_anothers_name_is_turned_away_with_one_line(run: Happening) -> None:
    assert [reason for _, name, reason in run.dropped_ones if name == "wrong"] == [
        "reply: name is 'south', expected 'wrong', under which it is registered; its client file must say the same"
    ]
    assert ["wrong" in run.trained(n) for n in range(5)] == [False] * 5


def test_why_a_member_does_not_come_in_is_told_once_and_not_every_round(run: Happening) -> None:
    told = [(round, name) for round, name, _ in run.dropped_ones]
    assert told == [(0, "hangs"), (0, "wrong"), (2, "east"), (3, "north")]


class Answering:
    """A transport of one member, "east", that fails for each of these reasons in turn."""

    def __init__(self, *reasons: str) -> None:
        self.reasons, self.times = list(reasons), list[float | None]()

    def clients(self) -> Sequence[str]:
        return ["east"]

    def exchange(
        self, envelopes: Mapping[str, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        self.times.append(timeout_s)
        yield "east", Failure(self.reasons.pop(0))


def greeting(folder: Path, transport: Answering, **federation: object) -> tuple[Greeting, list[str]]:
    table = {
        "rounds": 2,
        "objectives": {"right": {"primary": True}},
        "policy": {"model": "model"},
        "algorithm": {"name": "fedavg"},
        "federation": {"min_replies": 1, **federation},
    }
    told = list[str]()
    config = RunConfig.model_validate(table)
    canonical = contract_of(config, model="m" * 64).canonical()
    ledger = Ledger(folder / "ledger.jsonl")
    return Greeting("run", canonical, config, transport, ledger, lambda _, reason: told.append(reason)), told


@pytest.mark.parametrize(("own", "within", "waits"), [(5, 30, 5), (500, 30, 30), (500, None, 500)])
def test_a_greeting_waits_for_the_shorter_of_both_times(
    tmp_path: Path, own: int, within: int | None, waits: int
) -> None:
    transport = Answering("away")
    hello, _ = greeting(tmp_path, transport, timeout_s=own)
    assert hello.met(["east"], within_s=within) == {}
    assert transport.times == [waits]


def test_a_greeting_without_any_limit_waits(tmp_path: Path) -> None:
    transport = Answering("away", "away")
    hello, _ = greeting(tmp_path, transport)
    hello.met(["east"])
    hello.met(["east"], within_s=30)
    assert transport.times == [None, 30]


def test_another_reason_is_told(tmp_path: Path) -> None:
    hello, told = greeting(tmp_path, Answering("away", "away", "asleep", "away"))
    for _ in range(4):
        hello.met(["east"])
    assert told == ["away", "asleep", "away"]
    assert hello.excuse() == "; east: away"
