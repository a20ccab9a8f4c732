"""What a change of the adapter tells of its prompts, on gradients that a person can follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fedpact.audit.guess import (
    MOST_NUMBERS,
    area_under_curve,
    centred,
    precision_at,
    presence,
    shortened,
    token_scores,
)
from fedpact.seeding import generator


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed, "audit tests"))


def test_candidates_whose_gradients_made_the_change_stand_out() -> None:
    gradients = normal(6, 2, 3, 200, seed=1)
    change = 2 * gradients[1, 0, 0] - gradients[1, 0, 2] + gradients[4, 1, 1]
    scores = presence(gradients, change, ridge=1e-6)
    assert sorted(scores.argsort(descending=True)[:2].tolist()) == [1, 4]
    assert scores[[0, 2, 3, 5]].max() < 1e-6 * scores[[1, 4]].min()


def test_only_the_sign_of_a_change_still_tells() -> None:
    gradients = normal(8, 1, 2, 4000, seed=2)
    change = (gradients[:4, 0, 0] - gradients[:4, 0, 1]).sum(0).sign()
    scores = presence(gradients, change, ridge=0.1)
    assert area_under_curve(scores[:4], scores[4:]) == 1.0


def test_a_long_gradient_is_no_evidence() -> None:
    gradients = normal(40, 1, 2, 300, seed=3)
    gradients[20:] *= 10
    scores = presence(gradients, normal(300, seed=4), ridge=0.1)
    assert 0.3 < area_under_curve(scores[20:], scores[:20]) < 0.7


def test_the_length_of_the_change_does_not_matter() -> None:
    gradients, change = normal(3, 2, 2, 50, seed=5), normal(50, seed=6)
    assert_close(presence(gradients, change, ridge=0.1), presence(gradients, 1e-4 * change, ridge=0.1))


def test_the_score_is_that_of_the_best_hypothesis() -> None:
    gradients = normal(3, 2, 2, 60, seed=7)
    change = gradients[0, 1, 0] + gradients[2, 0, 1]
    turned = gradients.flip(1)  # the same hypotheses in another order
    assert_close(presence(gradients, change, ridge=0.1), presence(turned, change, ridge=0.1), rtol=1e-4, atol=1e-6)


def test_candidates_without_gradients_score_nothing() -> None:
    gradients = normal(3, 1, 2, 40, seed=8)
    gradients[1] = 0
    scores = presence(gradients, gradients[0, 0, 0], ridge=0.1)
    assert scores[1] == 0 and bool(scores.isfinite().all())
    assert presence(torch.zeros(2, 1, 2, 9), torch.ones(9), ridge=0.1).tolist() == [0, 0]


def test_one_gradient_gives_the_ridge_solution_over_its_noise() -> None:
    # g = (3, 4), change = (1, 2): s = 11 / (25 + 25 r); contribution^2 = 25 s^2; noise: 25 / (25 + 25 r)^2 * 25 * 5/2
    found = presence(torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([1.0, 2.0]), ridge=1.0)
    s = 11 / 50
    assert_close(float(found), 25 * s**2 / (25 * 25 / 50**2 * 2.5))


def test_centred_groups_sum_to_zero() -> None:
    assert_close(centred(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])), torch.tensor([[[-1.0, -2.0], [1.0, 2.0]]]))


def test_long_gradients_are_sketched_linearly_and_short_ones_left_alone() -> None:
    short, long = normal(2, 50, seed=9), normal(2, MOST_NUMBERS + 5, seed=10)
    assert shortened(short) is short
    found = shortened(long)
    assert found.shape == (2, MOST_NUMBERS)
    assert_close(shortened(long.sum(0, keepdim=True))[0], found.sum(0), rtol=1e-3, atol=1e-3)


def test_tokens_are_found_exactly_while_there_are_fewer_than_ranks() -> None:
    inputs = torch.eye(4)  # each of four tokens has a direction of its own
    change = torch.zeros(3, 4)
    change[:, 2] = torch.tensor([3.0, 0.0, 4.0])  # an error of length 5 at token 2
    assert_close(token_scores(change, inputs, ridge=0.0), torch.tensor([0.0, 0.0, 5.0, 0.0], dtype=torch.float64))


def test_present_tokens_score_above_absent_ones_with_more_tokens_than_ranks() -> None:
    inputs, errors = normal(30, 8, seed=11), torch.zeros(16, 30)
    errors[:, :3] = normal(16, 3, seed=12)
    scores = token_scores(errors @ inputs, inputs)
    assert area_under_curve(scores[:3], scores[3:]) > 0.9


@pytest.mark.parametrize(
    ("members", "others", "area"),
    [([2.0, 3.0], [0.0, 1.0], 1.0), ([0.0], [1.0], 0.0), ([1.0, 1.0], [1.0], 0.5), ([2.0, 0.0], [1.0], 0.5)],
)
def test_the_area_counts_pairs(members: list[float], others: list[float], area: float) -> None:
    assert area_under_curve(torch.tensor(members), torch.tensor(others)) == area


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_areas_of_both_sides_add_up_to_one(members: list[int], others: list[int]) -> None:
    a, b = torch.tensor(members), torch.tensor(others)
    assert area_under_curve(a, b) + area_under_curve(b, a) == pytest.approx(1)


def test_precision_looks_at_the_highest_and_gives_ties_to_the_others() -> None:
    assert precision_at(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]), 2) == 0.5
    assert precision_at(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0]), 2) == 1.0
    assert precision_at(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), 2) == 0.0
