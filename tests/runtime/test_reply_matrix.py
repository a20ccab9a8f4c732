"""One bad reply in a round: what becomes of the aggregate, by the whole way of a reply, and what is noted.

Of n admitted replies b are bad. c(x) is a change x of the adapter, clipped to the round's limit T; s are the shares; M
is the mean of the honest c(x) alone. While nobody honest has more than 2 / n of the honest weight, the cap lowers the
honest only by what the bad take, all in proportion. So the aggregate is (1 - s_bad) M + sum over the bad of s c(x), and
is off M by no more than

    b (2 / n) (T + |M|), which is at most b (4 / n) T.

T is twice the lower median of the norms, which b bad ones shift by at most b places among the honest. So T is at most
twice the largest honest norm; and where honest norms are within a factor of two and the bad are a minority of three or
more, nobody honest is clipped, and M is the mean that the honest replies give alone. A reply that is refused moves
nothing, to the last bit.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from benchmarks.robust import (
    HONEST,
    RULES,
    SENT,
    A,
    Answer,
    B,
    Outcome,
    Sent,
    answer,
    bad_replies,
    everyone,
    filled,
    ours,
)
from fedpact.core.lora import flatten, unflatten
from fedpact.messages import Scored
from fedpact.runtime.codec import encode
from fedpact.runtime.envelope import wrap
from fedpact.runtime.transport import Failure
from fedpact.seeding import generator
from fedpact.types import Adapter

SHAPES = {name: (tensor.shape[0], tensor.shape[1]) for name, tensor in SENT.items()}
D = flatten(SENT).numel()
HONEST_ANSWERS = {name: answer(Sent(filled(value))) for name, value in HONEST.items()}
SIZES = st.floats(-44, 38).map(lambda exponent: 10.0**exponent)
WEIGHTS = st.one_of(
    st.floats(1e-3, 1e9), st.sampled_from([0.0, -1.0, math.nan, math.inf, 5e-324, 1e9, 1.0000001e9, 1e12, 1e308])
)
BAD = st.builds(
    lambda seed, size, weight, copies: Sent(random_adapter(seed, size), weight, copies),
    st.integers(0, 99),
    st.one_of(SIZES, st.sampled_from([0.0, 3.4e38, math.inf, math.nan])),
    WEIGHTS,
    st.integers(1, 3),
)


@cache
def alone() -> Outcome:
    """What the honest four give without a fifth."""
    return ours(HONEST_ANSWERS, SENT)


def random_adapter(seed: int, size: float) -> Adapter:
    """Entries of `size` with random signs."""
    signs = torch.randint(2, (D,), generator=generator(seed, "signs")).double() * 2 - 1
    return unflatten((signs * size).float(), SHAPES)


def norm(adapter: Adapter) -> float:
    return float(flatten(adapter).double().norm())


def distance(one: Adapter, other: Adapter) -> float:
    return float((flatten(one).double() - flatten(other).double()).norm())


def limit(norms: list[float]) -> float:
    """Twice the lower median of the norms above zero."""
    return 2 * sorted(norms)[(len(norms) - 1) // 2] if norms else math.inf


def refused(ledger: Any) -> list[tuple[str, str]]:
    return [(line["peer"], line["reason"]) for line in ledger if line.get("decision") == "refused"]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("NaN", f"adapter {A}: 2 of 2 entries are not finite"),
        ("Inf", f"adapter {A}: 2 of 2 entries are not finite"),
        ("shape (1,)", f"adapter {A}: found (1,) torch.float32, expected (1, 2) torch.float32"),
        ("float64", f"adapter {A}: found (1, 2) torch.float64, expected (1, 2) torch.float32"),
        ("weight 1e12", "weight: found 1000000000000.0, expected a number in [1e-09, 1e+09]"),
        ("weight -39", "weight: found -39.0, expected a number in [1e-09, 1e+09]"),
        ("weight 5e-324", "weight: found 5e-324, expected a number in [1e-09, 1e+09]"),
        ("weight NaN", "Trained: cannot be decoded: "),
        ("missing key", f"adapter: {B!r} is missing"),
        ("extra key", "adapter: 'more' is unexpected"),
    ],
)
def test_a_malformed_reply_changes_no_bit_and_is_named_and_noted_with_its_reason(what: str, reason: str) -> None:
    found = ours(everyone(bad_replies()[what]), SENT)
    assert flatten(found.adapter).tolist() == flatten(alone().adapter).tolist()
    assert list(found.dropped) == ["bad"] and found.dropped["bad"].startswith(reason)
    assert refused(found.ledger) == [("bad", reason.partition(":")[0])]


@pytest.mark.parametrize("what", ["values 1e6", "values 3e38", "three times"])
def test_a_giant_counts_as_twice_the_median_norm_at_its_own_share(what: str) -> None:
    # Median of 1.00, 1.01, 1.02, 1.03 and the giant: 1.02. So (4.06 + 2.04) / 5.
    found = ours(everyone(bad_replies()[what]), SENT)
    assert flatten(found.adapter).tolist() == pytest.approx([1.22] * D, rel=1e-6)


def test_a_giant_weight_counts_as_two_members_of_five() -> None:
    found = ours(everyone(bad_replies()["weight 1e9"]), SENT)
    assert flatten(found.adapter).tolist() == pytest.approx([0.6 * 1.015 + 0.4 * 2.04] * D, rel=1e-6)


def test_a_member_that_answers_three_times_has_one_vote_and_the_others_are_noted() -> None:
    found = ours(everyone(bad_replies()["three times"]), SENT)
    assert refused(found.ledger) == [("bad", "duplicate")] * 2
    assert [line["decision"] for line in found.ledger].count("admitted") == 5


def test_a_member_whose_first_reply_was_bad_has_no_second_try() -> None:
    first, second = answer(bad_replies()["NaN"]), answer(Sent(filled(50.0)))
    found = ours({**HONEST_ANSWERS, "bad": lambda envelope: [*first(envelope), *second(envelope)]}, SENT)
    assert flatten(found.adapter).tolist() == flatten(alone().adapter).tolist()
    assert [reason for _, reason in refused(found.ledger)] == [f"adapter {A}", "duplicate"]


NOT_REPLIES: dict[str, Answer] = {
    "nothing": lambda envelope: [b""],
    "noise": lambda envelope: [bytes(range(256)) * 40],
    "a header that claims 2^62 bytes": lambda envelope: [(2**62).to_bytes(8, "little") + b"{}"],
    "JSON nested too deeply": lambda envelope: [(60_000).to_bytes(8, "little") + b"[" * 60_000],
    "too much": lambda envelope: [b"\0" * 2**21],
    "another kind": lambda envelope: [wrap(envelope, encode(Scored(torch.zeros(1, 1))))],
    "the request": lambda envelope: [encode(envelope)],
    "half": lambda envelope: [b"".join(answer(Sent(filled(1.0)))(envelope))[:-7]],
    "an answer to another": lambda envelope: answer(Sent(filled(50.0)))(replace(envelope, nonce="0" * 32)),
    "another run's": lambda envelope: answer(Sent(filled(50.0)))(replace(envelope, run="other")),
    "silence": lambda envelope: [Failure("no reply")],
    "no message at all": lambda envelope: [],
}


@pytest.mark.parametrize("what", sorted(NOT_REPLIES))
def test_what_is_no_reply_changes_no_bit_and_does_not_end_the_round(what: str) -> None:
    found = ours({**HONEST_ANSWERS, "bad": NOT_REPLIES[what]}, SENT)
    assert flatten(found.adapter).tolist() == flatten(alone().adapter).tolist()
    assert list(found.dropped) == ([] if what == "no message at all" else ["bad"])


def test_a_damaged_byte_is_refused_unless_the_reply_is_whole() -> None:
    # The member's ledger head travels beside the reply, and a digit of it may become another.
    draw = generator("damaged bytes")
    bytes_ = torch.stack([torch.randint(2**31, (60,), generator=draw), torch.randint(1, 256, (60,), generator=draw)], 1)
    damaged = {f"x{i}": Sent(filled(1.00), damage=(where, added)) for i, (where, added) in enumerate(bytes_.tolist())}
    found = ours({**HONEST_ANSWERS, **{name: answer(one) for name, one in damaged.items()}}, SENT)
    digests = {line["peer"]: line["reply"] for line in found.ledger if line["decision"] == "admitted"}
    assert all(digests[name] == digests["a"] for name in digests.keys() & damaged.keys())
    assert found.dropped.keys() == damaged.keys() - digests.keys() and len(found.dropped) > 50
    assert sorted(peer for peer, _ in refused(found.ledger)) == sorted(found.dropped)


@given(
    st.lists(st.tuples(st.integers(0, 99), st.floats(1, 2), st.floats(1, 1.5)), min_size=5, max_size=5),
    st.lists(BAD, min_size=1, max_size=2),
    st.sampled_from([1.0, 1e-3, 1e-7]),
)
@settings(deadline=None, max_examples=8, phases=[Phase.explicit, Phase.generate])
@example([(1, 1.2, 1.0)] * 5, [Sent(random_adapter(1, -3.4e38), 1e9)], 1e-7)  # T / norm is half of float32's least
def test_bad_replies_move_the_mean_by_their_shares_of_the_limit(
    honest: list[tuple[int, float, float]], bad: list[Sent], unit: float
) -> None:
    # Norms within a factor of two, and weights between 1 and 1.5, so at most 1.5 / 5.5 < 2 / 7 of the honest weight.
    kept = {f"h{i}": Sent(random_adapter(seed, unit * size), weight) for i, (seed, size, weight) in enumerate(honest)}
    without = ours({name: answer(one) for name, one in kept.items()}, SENT)
    mean = sum((flatten(one.adapter).double() * one.weight for one in kept.values()), torch.zeros(D).double())
    mean /= sum(one.weight for one in kept.values())
    assert distance(without.adapter, unflatten(mean.float(), SHAPES)) <= 1e-6 * unit

    found = ours({name: answer(one) for name, one in {**kept, **{f"x{i}": o for i, o in enumerate(bad)}}.items()}, SENT)
    counted = [one for i, one in enumerate(bad) if f"x{i}" not in found.dropped]
    for one in counted:
        assert math.isfinite(norm(one.adapter)) and 0 < one.weight <= 1e9
    if not counted:
        assert flatten(found.adapter).tolist() == flatten(without.adapter).tolist()
    norms = [size for size in map(norm, (one.adapter for one in [*kept.values(), *counted])) if size > 0]
    bound = len(counted) * 2 / (len(kept) + len(counted)) * (limit(norms) + norm(without.adapter))
    assert limit(norms) <= 4 * unit * math.sqrt(D) * (1 + 1e-6)
    assert distance(found.adapter, without.adapter) <= bound * (1 + 1e-5)


@given(BAD, st.sampled_from(list(RULES)))
@settings(deadline=None, max_examples=8, phases=[Phase.explicit, Phase.generate])
def test_whatever_the_rule_the_aggregate_is_finite_and_near_the_honest(bad: Sent, rule: str) -> None:
    found = ours(everyone(bad), SENT, **RULES[rule])
    assert all(bool(tensor.isfinite().all()) and tensor.dtype == torch.float32 for tensor in found.adapter.values())
    assert {name: tensor.shape for name, tensor in found.adapter.items()} == {n: x.shape for n, x in SENT.items()}
    assert norm(found.adapter) <= limit([norm(filled(value)) for value in HONEST.values()]) * 1.02


def test_a_bad_member_cannot_raise_the_limit_over_rounds() -> None:
    norms: Any = {}
    for _ in range(3):
        found = ours(everyone(bad_replies()["values 1e6"]), SENT, norms)
        norms = json.loads(json.dumps(found.norms))
    assert flatten(found.adapter).tolist() == pytest.approx([1.22] * D, rel=1e-6)


def test_the_absolute_limit_holds_for_all() -> None:
    assert norm(ours(HONEST_ANSWERS, SENT, clip_norm=0.5).adapter) == pytest.approx(0.5)
    assert norm(ours(everyone(Sent(filled(-1e6))), SENT, clip_norm=0.5).adapter) == pytest.approx(0.3)
