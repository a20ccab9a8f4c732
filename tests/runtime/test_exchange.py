"""One exchange: who is asked, who is dropped, what is averaged, what a restart does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpact.errors import TooFewRepliesError
from fedpact.messages import Evaluated, Train, Trained
from fedpact.runtime.admission import Limits
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.envelope import Envelope, wrap
from fedpact.runtime.exchange import Round, mean_reply
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.measure import pooled
from fedpact.runtime.spool import Spool
from fedpact.runtime.transport import Failure

A = "base_model.model.x.weight"
NAN = float("nan")


def trained(value: float, *, weight: float = 1.0, **changes: Any) -> Trained:
    fields = {"rewards": torch.tensor([float(value)]), "accuracy": value, "metrics": {"weight/a": value}, **changes}
    return Trained(weight=weight, adapter={A: torch.full((1, 1), float(value))}, **fields)


class ScriptedTransport:
    """Members answer what is written down; who was asked is kept."""

    def __init__(self, answers: Mapping[str, Trained | Failure | Callable[[Envelope], bytes]]) -> None:
        self.answers, self.asked = answers, list[str]()

    def clients(self) -> Sequence[str]:
        return sorted(self.answers)

    def exchange(
        self, envelopes: Mapping[str, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for client, data in reversed(list(envelopes.items())):  # arrival order is not the members' order
            self.asked.append(client)
            answer, envelope = self.answers[client], decode(Envelope, data)
            if isinstance(answer, Failure):
                yield client, answer
            else:
                yield client, wrap(envelope, encode(answer)) if isinstance(answer, Trained) else answer(envelope)


def one_round(transport: ScriptedTransport, folder: Path, *, min_replies: int = 1, dropped: Any = None) -> Round:
    return Round(
        run="r",
        contract="c",
        number=3,
        transport=transport,
        ledger=Ledger(folder / "ledger.jsonl"),
        limits=Limits(1),
        spool=lambda exchange: Spool(folder / f"{exchange:02d}"),
        since={},
        min_replies=min_replies,
        timeout_s=None,
        dropped=dropped or (lambda client, reason: None),
    )


def requests(*clients: str) -> dict[str, Train]:
    return dict.fromkeys(clients, Train({A: torch.zeros(1, 1)}))


def test_replies_come_sorted_whatever_the_order_of_arrival(tmp_path: Path) -> None:
    transport = ScriptedTransport({"b": trained(2), "a": trained(1), "c": trained(3)})
    replies = one_round(transport, tmp_path).ask(requests("c", "a", "b"))
    assert [(name, reply.accuracy) for name, reply in replies.items()] == [("a", 1), ("b", 2), ("c", 3)]


def test_bad_replies_are_named_and_dropped_and_the_rest_counts(tmp_path: Path) -> None:
    answers = {
        "a": trained(1),
        "nan": trained(NAN, accuracy=None, metrics={}),
        "silent": Failure("no reply"),
        "garbage": lambda envelope: b"\x00" * 40,
        "replay": lambda envelope: wrap(replace(envelope, round=2), encode(trained(1))),
    }
    reasons: dict[str, str] = {}
    one = one_round(ScriptedTransport(answers), tmp_path, dropped=reasons.__setitem__)
    assert list(one.ask(requests(*answers))) == ["a"]
    assert sorted(reasons) == ["garbage", "nan", "replay", "silent"]
    assert "not finite" in reasons["nan"]
    assert one.since == {"a": (3, 0)}


def test_too_few_replies_fail_the_exchange_and_say_why(tmp_path: Path) -> None:
    one = one_round(ScriptedTransport({"a": trained(1), "b": Failure("gone fishing")}), tmp_path, min_replies=2)
    with pytest.raises(TooFewRepliesError, match=r"1 of 2 members replied, expected at least 2 .*b: gone fishing"):
        one.ask(requests("a", "b"))


def test_after_a_crash_only_missing_members_are_asked(tmp_path: Path) -> None:
    broken = one_round(ScriptedTransport({"a": trained(1), "b": Failure("crash")}), tmp_path, min_replies=2)
    with pytest.raises(TooFewRepliesError):
        broken.ask(requests("a", "b"))
    transport = ScriptedTransport({"a": trained(99), "b": trained(2)})
    replies = one_round(transport, tmp_path, min_replies=2).ask(requests("a", "b"))
    assert transport.asked == ["b"]
    assert [reply.accuracy for reply in replies.values()] == [1, 2]


def test_a_closed_exchange_is_not_repeated(tmp_path: Path) -> None:
    one_round(ScriptedTransport({"a": trained(1), "b": Failure("late")}), tmp_path).ask(requests("a", "b"))
    transport = ScriptedTransport({"a": trained(9), "b": trained(9)})
    assert list(one_round(transport, tmp_path).ask(requests("a", "b"))) == ["a"]
    assert transport.asked == []


def test_every_exchange_of_a_round_has_its_own_number(tmp_path: Path) -> None:
    one = one_round(ScriptedTransport({"a": trained(1)}), tmp_path)
    one.ask(requests("a"))
    one.ask(requests("a"))
    assert one.since == {"a": (3, 1)}
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["00", "01"]


def test_the_ledger_says_who_was_asked_and_what_came_of_it(tmp_path: Path) -> None:
    one_round(ScriptedTransport({"a": trained(1), "b": Failure("no")}), tmp_path).ask(requests("a", "b"))
    text = (tmp_path / "ledger.jsonl").read_text()
    assert [text.count(f'"decision":"{what}"') for what in ("asked", "admitted", "failed")] == [2, 1, 1]
    assert Ledger.verify(tmp_path / "ledger.jsonl") == 4


def test_a_mean_weighs_every_field() -> None:
    mean = mean_reply([trained(1.0, weight=1), trained(5.0, weight=3)])
    assert (mean.weight, mean.accuracy, mean.metrics["weight/a"]) == (4.0, 4.0, 4.0)
    assert mean.adapter[A].tolist() == [[4.0]]


def test_what_a_member_did_not_measure_is_left_out_of_the_mean() -> None:
    mean = mean_reply(
        [trained(1.0), trained(3.0, rewards=torch.tensor([NAN]), accuracy=None, metrics={"weight/b": 7.0})]
    )
    assert mean.rewards.tolist() == [1.0]
    assert mean.accuracy == 1.0
    assert mean.metrics == {"weight/a": 1.0, "weight/b": 7.0}
    nobody = mean_reply([trained(1.0, accuracy=None)])
    assert nobody.accuracy is None


def test_counts_are_added() -> None:
    one = Evaluated(weight=2.0, rewards=torch.tensor([1.0]), counts=torch.tensor([2]), accuracy=1.0)
    two = Evaluated(weight=6.0, rewards=torch.tensor([0.0]), counts=torch.tensor([6]), accuracy=0.0)
    mean = mean_reply([one, two])
    assert (mean.counts.tolist(), mean.rewards.tolist(), mean.accuracy) == ([8], [0.25], 0.25)


def test_figures_that_are_not_finite_stay_out_of_the_metrics(tmp_path: Path) -> None:
    one = one_round(ScriptedTransport({}), tmp_path)
    one.log("a", {"x": 1.0, "y": NAN, "z": float("inf")})
    assert one.metrics == [{"round": 3, "who": "a", "key": "x", "value": 1.0}]


def test_held_out_means_are_pooled_by_what_each_member_measured() -> None:
    one = Evaluated(weight=100.0, rewards=torch.tensor([1.0, 1.0]), counts=torch.tensor([100, 1]), accuracy=1.0)
    two = Evaluated(weight=100.0, rewards=torch.tensor([0.0, 0.0]), counts=torch.tensor([100, 99]), accuracy=0.0)
    silent = Evaluated(weight=50.0, rewards=torch.tensor([NAN, NAN]), counts=torch.tensor([0, 0]), accuracy=None)
    mean = pooled([one, two, silent])
    torch.testing.assert_close(mean.rewards, torch.tensor([0.5, 0.01]))
    assert pooled([silent]).rewards.isnan().all()
