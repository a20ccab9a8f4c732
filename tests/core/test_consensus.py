"""Combining ratings, liars, scales, who judges what, and agreement."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedpact.core.consensus import blocks, combined, everybody, rater_agreement, standardised

NAN = math.nan
unit = st.floats(0, 1, width=32)
lies = st.one_of(unit, st.floats(-1e30, 1e30), st.sampled_from([1e30, -1e30]))


def column(*ratings: float) -> Tensor:
    return torch.tensor(ratings).unsqueeze(-1)


def experts(*rows: str) -> Tensor:
    """A row a question, a letter a member: x is an expert."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def judges(judged: Tensor) -> list[str]:
    return ["".join("x" if cell else "." for cell in row) for row in judged.tolist()]


@pytest.mark.parametrize(
    ("how", "expected"),
    [("mean", 2.75), ("median", 1.5), ("trimmed_mean", 1.5)],
)
def test_four_ratings_one_of_them_far_off(how, expected):
    assert combined(column(1.0, 8.0, 0.0, 2.0), how).tolist() == [expected]


@pytest.mark.parametrize(
    ("how", "expected"),
    [("mean", 3.0), ("median", 2.0), ("trimmed_mean", 7 / 3)],
)
def test_five_ratings_and_one_missing(how, expected):
    assert_close(combined(column(1.0, NAN, 4.0, 8.0, 0.0, 2.0), how), torch.tensor([expected]))


def test_the_trimmed_mean_of_three_is_the_middle_one_and_of_two_their_mean():
    assert combined(column(0.0, 9.0, 1.0), "trimmed_mean").tolist() == [1.0]
    assert combined(column(0.0, 9.0), "trimmed_mean").tolist() == [4.5]
    assert combined(column(NAN, 9.0), "trimmed_mean").tolist() == [9.0]


@pytest.mark.parametrize("how", ["mean", "median", "trimmed_mean"])
def test_a_completion_that_nobody_rated_has_no_rating(how):
    result = combined(torch.tensor([[NAN, 1.0], [NAN, NAN]]), how)
    assert result[0].isnan() and result[1] == 1.0
    assert combined(torch.zeros(0, 2), how).isnan().tolist() == [True, True]


@pytest.mark.parametrize("how", ["mean", "median", "trimmed_mean"])
def test_the_order_of_raters_does_not_show(how):
    ratings = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    ratings[torch.rand(5, 40, generator=torch.Generator().manual_seed(1)) < 0.3] = NAN
    expected = combined(ratings, how)
    for order in itertools.permutations(range(5)):
        assert_close(combined(ratings[list(order)], how), expected, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, max_examples=200)
@given(st.integers(5, 9), st.data())
def test_one_liar_of_n_moves_the_trimmed_mean_by_less_than_two_nths(n, data):
    honest = column(*data.draw(st.lists(unit, min_size=n, max_size=n)))
    told = honest.clone()
    told[data.draw(st.integers(0, n - 1))] = data.draw(lies)
    moved = combined(told, "trimmed_mean") - combined(honest, "trimmed_mean")
    assert moved.abs() < 2 / n


@settings(deadline=None, max_examples=200)
@given(st.integers(3, 9), st.sampled_from(["median", "trimmed_mean"]), st.data())
def test_one_liar_cannot_move_them_out_of_the_range_of_the_others(n, how, data):
    others = data.draw(st.lists(unit, min_size=n - 1, max_size=n - 1))
    result = combined(column(*others, data.draw(lies)), how)
    assert min(others) - 1e-6 <= result <= max(others) + 1e-6


def test_the_mean_follows_a_liar_anywhere():
    honest, told = column(0.0, 0.5, 0.5, 1.0, 1.0), column(0.0, 0.5, 0.5, 1.0, 1e30)
    assert combined(told, "mean") - combined(honest, "mean") > 1e29
    assert_close(combined(told, "trimmed_mean"), combined(honest, "trimmed_mean"), rtol=0, atol=0)


def test_two_liars_of_five_are_too_many_for_the_trimmed_mean_but_not_for_the_median():
    told = column(0.0, 0.5, 1.0, 1e30, 1e30)
    assert combined(told, "trimmed_mean") > 1e29
    assert combined(told, "median") == 1.0


def test_an_unknown_way_to_combine_is_refused():
    with pytest.raises(ValueError, match="how is 'mode'"):
        combined(column(1.0), "mode")


def test_each_rater_gets_a_scale_of_its_own():
    result = standardised(torch.tensor([[0.0, 1.0, 5.0, 7.0], [0.0, -10.0, 3.0, -3.0]]), 2)
    expected = torch.tensor([[-1.0, 1.0, -1.0, 1.0], [1.0, -1.0, 1.0, -1.0]])
    assert_close(result, expected, rtol=0, atol=3e-4)  # 1e-4 is added to spreads of at least 1/2


def test_the_population_standard_deviation_is_the_measure():
    # Of 0, 0, 3 the mean is 1 and the population variance 2, the sample variance 3.
    expected = torch.tensor([[-1.0, -1.0, 2.0]]) / (math.sqrt(2) + 1e-4)
    assert_close(standardised(torch.tensor([[0.0, 0.0, 3.0]]), 3), expected)


def test_ratings_that_are_all_equal_become_exact_zeros():
    # In float64 the mean of three times 0.1 is not 0.1.
    ratings = torch.tensor([[0.1, 0.1, 0.1, 1e30, 1e30, 1e30]], dtype=torch.float64)
    assert standardised(ratings, 3).tolist() == [[0.0] * 6]


def test_missing_ratings_stay_missing_and_do_not_count():
    result = standardised(torch.tensor([[1.0, NAN, 3.0, NAN, 4.0, NAN, NAN, NAN, NAN]]), 3)
    assert_close(result[0, [0, 2]], torch.tensor([-1.0, 1.0]), rtol=0, atol=2e-4)
    assert result[0, 4] == 0.0  # one rating alone tells nothing
    assert result.isnan().tolist() == [[False, True, False, True, False, True, True, True, True]]


def test_candidates_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="5 completions do not divide into groups of 2"):
        standardised(torch.zeros(1, 5), 2)


def _gradient(scores: Tensor, advantages: Tensor) -> Tensor:
    """The gradient of `sum_kj A_kj log softmax(scores)_j`, all raters' updates added up: [c], [k, c] -> [c]."""
    scores = scores.clone().requires_grad_()
    (advantages * scores.log_softmax(-1)).sum().backward()
    assert scores.grad is not None
    return scores.grad


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(2, 5))
def test_the_rule_as_the_paper_prints_it_cannot_learn_and_grouping_over_candidates_can(seed, num_experts):
    draw = torch.Generator().manual_seed(seed)
    ratings = torch.rand(num_experts, 4, generator=draw, dtype=torch.float64)
    ratings[:, 0] += 1  # everybody likes candidate 0 best
    scores = torch.randn(4, generator=draw, dtype=torch.float64)

    # As printed: for one candidate, R_k = (r_k - mean over experts) / (std over experts + eps).
    printed = standardised(ratings.mT, num_experts).mT
    assert_close(printed.sum(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert printed.abs().amax() > 0.5  # each update alone is not small
    assert_close(_gradient(scores, printed), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)

    grouped = standardised(ratings, 4)
    uphill = _gradient(scores, grouped)
    assert uphill[0] > 0.5 and uphill[0] == uphill.amax()


def test_two_experts_updates_cancel_to_the_last_bit():
    ratings = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    printed = standardised(ratings.mT, 2).mT
    assert printed.sum(0).tolist() == [0.0, 0.0, 0.0]


def test_everybody_who_is_an_expert_judges_all_candidates_of_the_question():
    assert judges(everybody(experts("x.x", ".x."), 2)) == ["xx..", "..xx", "xx.."]


def test_experts_share_the_candidates_of_a_question_in_blocks():
    assert judges(blocks(experts("xx", "xx"), 4)) == ["xx..xx..", "..xx..xx"]
    assert judges(blocks(experts("x.x", ".x."), 4)) == ["xx......", "....xxxx", "..xx...."]


def test_blocks_are_as_even_as_they_can_be_and_surplus_experts_idle():
    assert judges(blocks(experts("xxx"), 8)) == ["xxx.....", "...xxx..", "......xx"]
    assert sum(blocks(experts("xxxx"), 2).sum(-1)) == 2
    assert not blocks(experts("..."), 4).any()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 9))
def test_every_candidate_of_a_question_with_experts_has_one_judge(seed, k, group_size):
    chosen = torch.rand(7, k, generator=torch.Generator().manual_seed(seed)) < 0.5
    judged = blocks(chosen, group_size)
    assert not (judged & ~everybody(chosen, group_size)).any()
    assert judged.sum(0).tolist() == chosen.any(-1).long().repeat_interleave(group_size).tolist()
    loads = judged.reshape(k, 7, group_size).sum(-1).mT
    for load, mine in zip(loads, chosen, strict=True):
        assert not mine.any() or load[mine].amax() - load[mine].amin() <= 1


def test_agreement_is_one_less_the_distance_to_the_median_of_the_others():
    ratings = torch.tensor([[1.0, 0.0], [1.0, 0.5], [0.25, 1.0]])
    total, count = rater_agreement(ratings)
    # Against the others: 1 - |1 - 0.625| and 1 - |0 - 0.75|; 1 - 0.375 and 1 - 0; 1 - 0.75 and 1 - 0.75.
    assert total.tolist() == [0.875, 1.625, 0.5] and total.dtype == torch.float64
    assert count.tolist() == [2, 2, 2] and count.dtype == torch.int64


def test_a_giant_lie_counts_as_no_agreement_and_costs_the_others_nothing():
    total, count = rater_agreement(column(1.0, 1.0, 1.0, -1e30))
    assert total.tolist() == [1.0, 1.0, 1.0, 0.0]
    assert count.tolist() == [1, 1, 1, 1]


def test_agreement_needs_two_others_and_a_rating_of_ones_own():
    ratings = torch.tensor([[1.0, 1.0, NAN], [1.0, 1.0, 1.0], [NAN, 1.0, 1.0], [NAN, NAN, 1.0]])
    total, count = rater_agreement(ratings)
    assert count.tolist() == [1, 2, 2, 1]
    assert total.tolist() == [1.0, 2.0, 2.0, 1.0]
    assert rater_agreement(ratings[:2])[1].tolist() == [0, 0]


def test_a_majority_that_lies_makes_the_honest_look_bad():
    total, _ = rater_agreement(column(1.0, 1.0, 0.0, 0.0, 0.0, 0.0))
    assert total.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
