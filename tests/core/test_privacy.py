"""Randomised response: how often it lies, that it is right on average, and what a prompt costs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedpact.core.privacy import keep_probability, per_candidate, randomised_response
from fedpact.seeding import uniforms

NAN = math.nan
NUM = 100_000


def draws(seed: int) -> torch.Tensor:
    return uniforms(seed, 1, NUM)[0]


@pytest.mark.parametrize(("epsilon", "percent"), [(1.0, 26.9), (2.0, 11.9), (4.0, 1.8)])
def test_how_often_a_bit_is_flipped(epsilon, percent):
    flipped = 1 - keep_probability(epsilon)
    assert round(100 * flipped, 1) == percent
    zeros = randomised_response(torch.zeros(NUM), epsilon, draws(1))
    ones = randomised_response(torch.ones(NUM), epsilon, draws(2))
    spread = math.sqrt(NUM * flipped * (1 - flipped))
    assert abs((zeros > 0.5).sum() - NUM * flipped) < 5 * spread
    assert abs((ones < 0.5).sum() - NUM * flipped) < 5 * spread


@settings(deadline=None)
@given(st.floats(1e-3, 30))
def test_no_answer_is_more_than_e_to_the_epsilon_likelier_under_one_truth_than_under_the_other(epsilon):
    # P(say 1 | 1) / P(say 1 | 0); by symmetry also of saying 0.
    keep = keep_probability(epsilon)
    assert math.isclose(math.log(keep) - math.log(math.exp(-epsilon) * keep), epsilon, rel_tol=1e-9)
    assert math.isclose(keep, math.exp(epsilon) / (1 + math.exp(epsilon)), rel_tol=1e-12)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("bit", [0.0, 1.0])
def test_the_average_answer_is_the_truth(epsilon, bit):
    told = randomised_response(torch.full((NUM,), bit), epsilon, draws(3)).double()
    keep = keep_probability(epsilon)
    error = math.sqrt(keep * (1 - keep) / NUM) / (2 * keep - 1)
    assert abs(told.mean() - bit) < 5 * error


def test_what_is_told_has_two_values_that_show_epsilon():
    told = randomised_response(torch.tensor([0.0, 1.0, 0.0, 1.0]), math.log(3), torch.tensor([0.9, 0.9, 0.1, 0.1]))
    # Kept three times of four: (1 - 1/4) / (1/2) and (0 - 1/4) / (1/2).
    assert_close(told, torch.tensor([-0.5, 1.5, 1.5, -0.5]))


def test_what_is_told_says_no_more_than_the_noisy_bit():
    told = randomised_response(torch.arange(NUM) % 2, 1.0, draws(4))
    assert len(told.unique()) == 2 and told.dtype == torch.float32


def test_draws_on_the_grid_flip_at_least_as_often_as_promised():
    step = 2.0**-24
    for epsilon in (1.0, 4.0, 12.0, 16.0, 20.0, 40.0):
        flip = math.exp(-epsilon) * keep_probability(epsilon)
        last = (math.ceil(flip / step) - 1) * step  # the largest draw on the grid that lies below `flip`
        told = randomised_response(torch.zeros(2), epsilon, torch.tensor([last, last + step]))
        assert told[0] > 0.5 > told[1]


def test_a_missing_rating_stays_missing_whatever_is_drawn():
    told = randomised_response(torch.tensor([NAN, NAN, 1.0]), 2.0, torch.tensor([0.0, 0.99, 0.99]))
    assert told.isnan().tolist() == [True, True, False]


def test_infinite_epsilon_tells_the_truth():
    bits = torch.tensor([0.0, 1.0])
    assert torch.equal(randomised_response(bits, math.inf, torch.zeros(2)), bits)


@pytest.mark.parametrize("rating", [0.5, -1.0, 2.0, math.inf])
def test_a_rating_that_is_not_yes_or_no_is_refused(rating):
    with pytest.raises(ValueError, match=f"a rating is {rating}; randomised response takes 0, 1 and NaN only"):
        randomised_response(torch.tensor([0.0, NAN, rating]), 1.0, torch.zeros(3))


@pytest.mark.parametrize("epsilon", [0.0, -1.0, NAN])
def test_an_epsilon_that_says_nothing_is_refused(epsilon):
    with pytest.raises(ValueError, match="expected a positive number"):
        randomised_response(torch.zeros(1), epsilon, torch.zeros(1))
    with pytest.raises(ValueError, match="expected a positive number"):
        per_candidate(epsilon, 8)


def test_one_draw_for_many_bits_is_refused():
    with pytest.raises(ValueError, match=r"draws are \[1\]; expected one a bit, \[2\]"):
        randomised_response(torch.zeros(2), 1.0, torch.zeros(1))


def test_the_candidates_of_a_prompt_share_its_budget():
    assert per_candidate(8.0, 8) == 1.0
    with pytest.raises(ValueError, match="num_candidates is 0"):
        per_candidate(8.0, 0)


def test_a_prompt_spends_no_more_than_its_budget():
    # Four candidates: the likelihood ratio of any four answers under all-ones and all-zeros is within e^2.
    keep = keep_probability(per_candidate(2.0, 4))
    ratios = [(keep / (1 - keep)) ** (ones - (4 - ones)) for ones in range(5)]
    assert math.isclose(max(ratios), math.exp(2.0)) and math.isclose(min(ratios), math.exp(-2.0))
