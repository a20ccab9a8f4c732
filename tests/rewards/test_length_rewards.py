from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpact.rewards import (
    brevity,
    cosine_length,
    kimi_length,
    length_count,
    target_length,
    well_formed_brevity,
)

DEMO = "<think> 5 8 1 </think> <answer> 1 </answer>"  # eight words
RIGHT, WRONG = "<answer>1</answer>", "<answer>2</answer>"  # 18 characters


def test_brevity_falls_from_one_at_nothing_to_zero_at_the_limit():
    assert brevity(["", "a b", "a b c d", "a b c d e"], limit=4) == [1.0, 0.5, 0.0, 0.0]
    assert brevity(["abc"], limit=4, unit="characters") == [0.25]


def test_brevity_of_a_badly_formed_completion_is_worth_nothing():
    assert well_formed_brevity([DEMO, "", "5"], limit=16) == [0.5, 0.0, 0.0]
    assert well_formed_brevity([DEMO], limit=16, strict_newlines=True) == [0.0]


def test_the_length_count_has_no_bound():
    assert length_count(["", "a b c"]) == [0.0, -3.0]
    assert length_count(["a b c"], unit="characters", scale=10) == [-50.0]


def test_the_target_length_is_best():
    assert target_length(["", "a", "a b", "a b c", "a b c d e"], target=2) == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_a_short_right_completion_earns_and_a_short_wrong_one_does_not():
    # 18, 20 and 22 characters
    completions = [RIGHT, RIGHT + "  ", RIGHT + "    ", WRONG]
    assert kimi_length(completions, ["1"] * 4) == [0.5, 0.0, -0.5, 0.0]
    assert kimi_length([RIGHT, WRONG + "  "], ["1", "1"]) == [0.5, -0.5]


def test_equally_long_completions_earn_nothing():
    assert kimi_length([RIGHT, WRONG], ["1", "1"]) == [0.0, 0.0]
    assert kimi_length([], []) == []


def test_no_signal_about_correctness_is_no_signal_about_length():
    assert kimi_length([RIGHT, RIGHT + " "], [None, "1"]) == [None, -0.5]
    assert cosine_length([RIGHT], [None]) == [None]


def test_another_correctness_can_be_named():
    assert kimi_length(["1.0", "it is 1"], ["1", "1"], correct="numeric_answer") == [0.5, -0.5]
    assert kimi_length(["1", "it"], ["1", "1"], correct_kwargs={"tag": ""}) == [0.5, -0.5]
    with pytest.raises(ValueError, match="correct must be one of exact_answer, numeric_answer, math_correct"):
        kimi_length(["1"], ["1"], correct="right")


def test_the_cosine_runs_from_the_short_value_to_the_long_one():
    lengths = [0, 9, 18, 27]
    right = [" " * n + "1" for n in lengths]  # answered without tags: 1, 10, 19 and 28 characters
    settings = {"correct_kwargs": {"tag": ""}, "limit": 20}
    assert cosine_length(right[1:2], ["1"], **settings) == pytest.approx([0.75])  # half-way
    assert cosine_length(right[1:2], ["2"], **settings) == pytest.approx([-0.25])
    assert cosine_length([""], ["1"], **settings) == [0.0]
    assert cosine_length(right[3:], ["1"], **settings) == [0.5]  # beyond the limit
    assert cosine_length(right[3:], ["2"], **settings) == [-0.5]


def test_long_wrong_attempts_can_be_made_worth_more_than_short_ones():
    settings = {"wrong_short": -1.0, "wrong_long": -0.5, "limit": 36}
    assert cosine_length([WRONG, WRONG + " " * 18], ["1", "1"], **settings) == pytest.approx([-0.75, -0.5])


def test_the_cosine_agrees_with_trl_where_both_count_the_same():
    rewards = pytest.importorskip("trl.rewards.accuracy_rewards")
    pytest.importorskip("math_verify")
    texts = [r"\boxed{1}" + "." * n for n in (0, 3, 7, 20)]
    chats = [[{"content": text}] for text in texts]
    ids = [list(text) for text in texts]  # one token a character
    for gold in ("1", "2"):
        theirs = rewards.get_cosine_scaled_reward(max_len=25)(chats, [gold] * 4, ids)
        ours = cosine_length(texts, [gold] * 4, limit=25, wrong_short=-1.0, wrong_long=-0.5, correct="numeric_answer")
        assert ours == pytest.approx(theirs)


@pytest.mark.parametrize(
    "call",
    [
        lambda: brevity(["a"], limit=0),
        lambda: target_length(["a"], target=-1),
        lambda: cosine_length(["a"], ["a"], limit=0),
        lambda: length_count(["a"], unit="tokens"),
    ],
)
def test_settings_that_make_no_sense_are_named(call):
    with pytest.raises(ValueError, match=r"must be (positive, not|'words' or 'characters', not 'tokens')"):
        call()


@given(st.lists(st.tuples(st.text(max_size=20), st.booleans()), min_size=1, max_size=6))
def test_bounds_hold_for_any_batch(batch):
    texts = [text + "<answer>1</answer>" for text, _ in batch]
    answers = ["1" if right else "2" for _, right in batch]
    assert all(-0.5 <= value <= 0.5 for value in kimi_length(texts, answers))
    assert all(0.0 <= value <= 1.0 for value in brevity(texts, limit=3))
    assert all(-0.5 <= value <= 1.0 for value in cosine_length(texts, answers, limit=30))
