from __future__ import annotations

import zlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpact.tasks import opchains
from fedpact.tasks.opchains import OPS
from fedpact.types import Prompts


def test_there_are_eight_operations():
    assert OPS == ("add", "sub", "dif", "avg", "mul", "max", "flp", "neg")


@pytest.mark.parametrize(
    ("op", "digits", "states"),
    [
        ("add", (5, 0, 3, 3), (5, 8, 1)),  # 5, 8, 11
        ("sub", (5, 8, 3, 9), (7, 4, 5)),  # -3, 4, -5
        ("dif", (2, 9, 4, 4), (7, 3, 1)),
        ("avg", (5, 8, 3, 9), (6, 4, 6)),  # 6.5, 4.5, 6.5 rounded down
        ("mul", (7, 8, 3, 9), (6, 8, 2)),  # 56, 18, 72
        ("max", (2, 7, 3, 9), (7, 7, 9)),
        ("flp", (2, 7, 4, 9), (7, 7, 2)),  # turned over by 7 and 9, not by 4
        ("neg", (5, 8, 3, 9), (3, 0, 9)),
    ],
)
def test_the_states_are_the_fold_worked_out_by_hand(op, digits, states):
    assert opchains.solve(op, digits) == (states, states[-1])


@given(st.sampled_from(OPS), st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_every_state_is_a_digit_and_the_last_is_the_answer(op, digits):
    states, answer = opchains.solve(op, digits)
    assert len(states) == 3
    assert set(states) <= set(range(10))
    assert answer == states[-1]


def test_a_prompt_is_a_chat_with_its_answer_and_its_chain():
    batch = opchains.prompts({"add": 1.0}, 50, seed=1)
    (message,) = batch.text[0]
    op, *digits = message["content"].split()
    states, answer = opchains.solve(op, list(map(int, digits)))
    assert message["role"] == "user"
    assert batch.columns["answer"][0] == str(answer)
    assert batch.columns["chain"][0] == " ".join(map(str, states))
    assert batch.columns["op"][0] == "add"
    assert batch.ids[0].item() == int("".join(digits))  # `add` is operation 0


def test_the_pool_and_the_heldout_prompts_share_nothing_and_together_are_everything():
    for op in OPS:
        train, heldout = set(opchains.pool(op)), set(opchains.pool(op, heldout=True))
        assert not train & heldout
        assert len(train | heldout) == 10_000
        assert len(heldout) == pytest.approx(2_000, abs=100)


def test_heldout_prompts_are_those_with_a_crc_that_five_divides():
    assert all(zlib.crc32(text.encode()) % 5 == 0 for text in _questions(opchains.heldout("neg")))
    assert all(zlib.crc32(text.encode()) % 5 for text in _questions(opchains.member_prompts("neg", 2000, seed=0)))


def test_a_smaller_heldout_set_is_part_of_a_larger_one():
    assert set(_questions(opchains.heldout("mul", 10))) < set(_questions(opchains.heldout("mul")))
    assert len(opchains.heldout("mul")) == 96


def test_operations_come_in_the_proportion_asked_for():
    batch = opchains.prompts({"add": 2.0, "max": 1.0, "sub": 0.0}, 10, seed=0)
    assert Counter(batch.columns["op"]) == {"add": 7, "max": 3}  # 6.67 and 3.33


def test_a_member_gets_its_own_share_and_an_eighth_of_the_rest():
    counts = Counter(opchains.member_prompts("flp", 400, own_share=0.8, seed=0).columns["op"])
    assert counts == {op: 330 if op == "flp" else 10 for op in OPS}


@given(st.integers(1, 300), st.integers(0, 2**31), st.floats(0, 1))
def test_a_draw_has_the_size_asked_for_and_repeats_no_prompt(size, seed, own_share):
    batch = opchains.member_prompts("avg", size, own_share=own_share, seed=seed)
    assert len(batch) == size
    assert len(set(batch.ids.tolist())) == size


def test_the_seed_decides_the_draw():
    draws = [_questions(opchains.prompts({"add": 1.0}, 20, seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert set(draws[0]) != set(draws[2])


def test_members_with_one_seed_do_not_draw_the_same_foreign_prompts():
    first, second = (_questions(opchains.member_prompts(op, 400, seed=0)) for op in ("add", "sub"))
    shared = {text for text in first if text.startswith("mul")} & set(second)
    assert len(shared) < 5


@pytest.mark.parametrize(
    ("weights", "size", "message"),
    [
        ({"div": 1.0}, 5, "unknown operation `div`; expected one of add"),
        ({"add": -1.0, "sub": 2.0}, 5, "expected non-negative numbers"),
        ({}, 5, "not all zero"),
        ({"add": float("nan")}, 5, "not all zero"),
        ({"add": 1.0}, 0, "expected at least 1"),
        ({"add": 1.0}, 9_000, "9000 prompts of `add` asked for, 8041 exist"),
    ],
)
def test_a_draw_that_cannot_be_made_is_refused(weights, size, message):
    with pytest.raises(ValueError, match=message):
        opchains.prompts(weights, size, seed=0)


def test_an_own_share_above_one_is_refused():
    with pytest.raises(ValueError, match=r"own_share is 1\.5"):
        opchains.member_prompts("add", 10, own_share=1.5, seed=0)


def _questions(batch: Prompts) -> list[str]:
    return [chat[0]["content"] for chat in batch.text]
