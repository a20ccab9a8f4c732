"""How far one member can move a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedpact.errors import InadmissibleError, TooFewRepliesError
from fedpact.messages import Differentiate, Differentiated, Hello, Introduced, Train, Trained
from fedpact.runtime.admission import Limits, admit, max_bytes
from fedpact.runtime.bounds import Rules, bounds_of, capped, capped_prompts, robust_mean
from fedpact.runtime.codec import encode
from fedpact.runtime.envelope import wrap
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.transport import Failure
from tests.runtime.test_exchange import ScriptedTransport, one_round, requests

A = "base_model.model.x.lora_A.weight"
B = "base_model.model.x.lora_B.weight"
SENT = {A: torch.zeros(1, 2), B: torch.zeros(2, 1)}
NAN = float("nan")


def trained(change: float, *, weight: float = 1.0, **more: torch.Tensor) -> Trained:
    """A reply whose adapter's change has this norm, all of it in A."""
    adapter = {A: torch.tensor([[change, 0.0]]), B: torch.zeros(2, 1), **more}
    return Trained(weight=weight, adapter=adapter, rewards=torch.tensor([NAN]), accuracy=None)


def bounded(replies: dict[str, Trained], norms: dict[str, list[float]] | None = None, **rules: Any) -> dict[str, Any]:
    """member -> (weight, change in A) as they count."""
    norms = {} if norms is None else norms
    asked = dict.fromkeys(replies, Train(SENT))
    bounds = bounds_of(replies, asked, Rules(**rules), norms, exchange=0, log=lambda who, figures: None)
    found = {name: bounds[name].apply(reply) for name, reply in replies.items()}
    return {name: (one.weight, float(one.adapter[A][0, 0])) for name, one in found.items() if isinstance(one, Trained)}


def test_among_five_nobody_counts_for_more_than_two_fifths() -> None:
    weights = capped({"liar": 1e12, "a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, 2.0)
    total = sum(weights.values())
    assert weights["liar"] / total == pytest.approx(0.4)
    assert weights["a"] / total == pytest.approx(0.15)


def test_weights_within_the_cap_stay_as_they_are_to_the_last_bit() -> None:
    weights = {"a": 0.1, "b": 0.2, "c": 0.3}
    assert capped(weights, 2.0) == weights
    assert capped({}, 2.0) == {}


def test_a_change_is_shortened_to_twice_the_median_of_all() -> None:
    found = bounded({"a": trained(1.0), "b": trained(1.5), "giant": trained(1e6)})
    assert {name: change for name, (_, change) in found.items()} == {"a": 1.0, "b": 1.5, "giant": pytest.approx(3.0)}


def test_of_two_members_the_giant_does_not_set_its_own_limit() -> None:
    assert bounded({"a": trained(1.0), "giant": trained(1e6)})["giant"][1] == pytest.approx(2.0)


def test_members_that_stood_still_do_not_lower_the_limit() -> None:
    still = {name: trained(0.0) for name in ("a", "b", "c")}
    assert bounded({**still, "worked": trained(1.0)})["worked"][1] == 1.0


def test_earlier_rounds_bound_a_round_in_which_most_are_bad() -> None:
    replies = {"a": trained(1.0), "bad": trained(100.0), "worse": trained(100.0)}
    assert bounded(replies)["bad"][1] == pytest.approx(100.0)
    assert bounded(replies, {"0/adapter": [1.0] * 10})["bad"][1] == pytest.approx(2.0)


def test_what_is_remembered_is_what_counted() -> None:
    norms: dict[str, list[float]] = {"0/adapter": [1.0] * 100}
    bounded({"a": trained(1.0), "b": trained(0.0), "giant": trained(50.0)}, norms)
    assert norms["0/adapter"][-2:] == pytest.approx([1.0, 2.0])
    assert len(norms["0/adapter"]) == 100


def test_an_absolute_cap_holds_from_the_first_round() -> None:
    assert bounded({"a": trained(5.0)}, clip_norm=0.5)["a"][1] == pytest.approx(0.5)


def test_what_travels_beside_the_adapter_has_a_limit_of_its_own() -> None:
    control = f"control/{A}"
    replies = {
        name: trained(1.0, **{control: torch.tensor([[size, 0.0]])})
        for name, size in (("a", 3.0), ("b", 3.0), ("c", 60))
    }
    asked = dict.fromkeys(replies, Train({**SENT, control: torch.full((1, 2), 7.0)}))
    bounds = bounds_of(replies, asked, Rules(), {}, exchange=0, log=lambda who, figures: None)
    found = bounds["c"].apply(replies["c"])
    assert isinstance(found, Trained)
    assert found.adapter[control].tolist() == [[pytest.approx(6.0), 0.0]]  # a change, compared with nothing
    assert float(found.adapter[A][0, 0]) == 1.0


def test_claimed_numbers_of_prompts_are_capped_as_well() -> None:
    def one(count: int) -> Introduced:
        return Introduced("n", "t", ("a",), count, 1, {})

    found = capped_prompts({"liar": one(10**12), "a": one(10), "b": one(10), "judge": one(0)}, 2.0)
    counts = {name: who.num_prompts for name, who in found.items()}
    assert counts["liar"] / sum(counts.values()) == pytest.approx(2 / 3)
    assert (counts["a"], counts["judge"]) == (counts["b"], 0)


def test_a_geometric_median_stays_with_the_majority_and_a_mean_does_not() -> None:
    replies = {"a": trained(1.0), "b": trained(1.1), "c": trained(0.9), "bad": trained(-1e6)}
    assert abs(float(robust_mean(replies, "geometric_median", 0.2)[A][0, 0]) - 1.0) < 0.2


def test_a_trimmed_mean_drops_the_ends_of_each_coordinate() -> None:
    replies = {name: trained(value) for name, value in zip("abcde", (1.0, 2.0, 3.0, 4.0, 1e6), strict=True)}
    assert float(robust_mean(replies, "trimmed_mean", 0.2)[A][0, 0]) == 3.0


def test_each_update_is_described_by_its_norm_its_product_its_cosine_and_what_counted() -> None:
    logged: dict[str, dict[str, float]] = {}
    replies = {"a": trained(1.0), "b": trained(1.0), "c": trained(1.0), "d": trained(1.0), "against": trained(-4.0)}
    asked = dict.fromkeys(replies, Train({A: torch.zeros(1, 2), B: torch.tensor([[3.0], [4.0]])}))
    for reply in replies.values():
        reply.adapter[B] = torch.tensor([[3.0], [4.0]])
    bounds_of(replies, asked, Rules(), {}, exchange=0, log=lambda who, figures: logged.update({who: dict(figures)}))
    assert logged["against"]["update/norm"] == 4.0
    assert logged["against"]["update/product_norm"] == pytest.approx(20.0)  # |B| is 5
    assert logged["against"]["update/kept"] == 0.5
    cosines = {name: one["update/cosine"] for name, one in logged.items()}
    assert cosines == pytest.approx({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "against": -1.0})


def test_an_answer_that_is_too_large_is_not_decoded(tmp_path: Path) -> None:
    request = Train(SENT)
    limit = max_bytes(request, Limits(1))
    assert len(encode(trained(1.0))) < limit < 200_000
    reasons: dict[str, str] = {}
    answers: dict[str, Any] = {"a": lambda envelope: b"\0" * (10**6), "b": trained_like_sent()}
    one = one_round(ScriptedTransport(answers), tmp_path, dropped=reasons.__setitem__)
    assert list(one.ask(requests("a", "b"))) == ["b"]
    assert reasons["a"].startswith("Answer: 1000000 bytes, at most ")


def trained_like_sent() -> Trained:
    sent = next(iter(requests("a").values())).adapter
    return Trained(weight=1.0, adapter=dict(sent), rewards=torch.tensor([NAN]), accuracy=None)


class Chatty(ScriptedTransport):
    """Delivers every answer three times, and one of somebody who was not asked."""

    def exchange(self, envelopes: Any, *, timeout_s: float | None) -> Any:
        for client, answer in super().exchange(envelopes, timeout_s=timeout_s):
            yield client, answer
            yield client, answer
            yield "stranger", answer
            yield client, Failure("and then it failed")


def test_one_member_has_one_vote_however_often_it_answers(tmp_path: Path) -> None:
    one = one_round(Chatty({"a": trained_like_sent(), "b": trained_like_sent()}), tmp_path)
    assert list(one.ask(requests("a", "b"))) == ["a", "b"]
    reasons = [entry.get("reason") for entry in Ledger.entries(tmp_path / "ledger.jsonl")]
    assert (reasons.count("duplicate"), reasons.count("nobody asked")) == (4, 2)


def test_a_reply_whose_bytes_were_damaged_is_named(tmp_path: Path) -> None:
    def damaged(envelope: Any) -> bytes:
        whole = bytearray(wrap(envelope, encode(trained_like_sent())))
        whole[-1] ^= 1  # the last byte of a tensor
        return bytes(whole)

    reasons: dict[str, str] = {}
    one = one_round(ScriptedTransport({"a": damaged}), tmp_path, dropped=reasons.__setitem__)
    with pytest.raises(TooFewRepliesError):
        one.ask(requests("a"))
    assert "SHA-256" in reasons["a"] or "cannot be decoded" in reasons["a"]


def test_the_round_records_whose_replies_counted_and_why_others_did_not(tmp_path: Path) -> None:
    one = one_round(ScriptedTransport({"a": trained_like_sent(), "b": Failure("gone fishing")}), tmp_path)
    one.ask(requests("a", "b"))
    assert one.record == [{"verb": "train", "roster": ["a"], "failures": {"b": "gone fishing"}}]


def measured(scale: float) -> Differentiated:
    """Gradients of this length, of one objective."""
    sketch = torch.tensor([[scale, 0.0]])
    return Differentiated(1.0, sketch @ sketch.T, sketch, {}, torch.tensor([0.5]))


def test_a_members_gradients_are_shortened_like_its_change_of_the_adapter() -> None:
    replies = {"a": measured(1.0), "b": measured(1.0), "liar": measured(1e4)}
    asked = dict.fromkeys(replies, Differentiate(SENT, rank=2, seed=1))
    bounds = bounds_of(replies, asked, Rules(), {}, exchange=0, log=lambda who, figures: None)
    found = {name: bounds[name].apply(reply) for name, reply in replies.items()}
    lengths = {name: float(one.sketch.norm()) for name, one in found.items() if isinstance(one, Differentiated)}
    assert lengths == pytest.approx({"a": 1.0, "b": 1.0, "liar": 2.0})
    liar = found["liar"]
    assert isinstance(liar, Differentiated)
    assert float(liar.gramian[0, 0]) == pytest.approx(4.0)


@pytest.mark.parametrize("task", ["a b", "x/y", "../z", ".", "x" * 65])
def test_a_task_that_could_not_name_what_is_exported_is_not_admitted(task: str) -> None:
    with pytest.raises(InadmissibleError, match="task: found"):
        admit(Introduced("north", task, ("a",), 1, 1, {}), Limits(1), Hello("{}"))
    admit(Introduced("north", "maths.2", ("a",), 1, 1, {}), Limits(1), Hello("{}"))
