"""Objective weights: known answers, optimality conditions, brute force, and TorchJD."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedpact.core.pareto import kept_rows, min_norm_weights, regularised_min_norm


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def everyone(m: int) -> Tensor:
    return torch.ones(m, dtype=torch.bool)


def uniform(m: int) -> Tensor:
    return torch.full((m,), 1 / m, dtype=torch.float64)


def random_gramian(seed: int, m: int, kind: str, log_scale: float = 0.0) -> Tensor:
    """Gram matrices that are easy, singular, repeated, opposed, lopsided or nearly parallel."""
    draw = torch.Generator().manual_seed(seed)
    columns = {"singular": 2, "rank one": 1}.get(kind, m + 3)
    rows = torch.randn(m, columns, generator=draw, dtype=torch.float64)
    if kind == "repeated":
        rows[-1] = rows[0]
    elif kind == "opposed":
        rows[-1] = -2 * rows[0]
    elif kind == "lopsided":
        rows = rows * torch.logspace(0, -2.5, m, dtype=torch.float64).unsqueeze(-1)
    elif kind == "parallel":
        rows = rows[:1] + 1e-5 * rows
    return rows @ rows.T * 10.0**log_scale


KINDS = ["easy", "singular", "rank one", "repeated", "opposed", "lopsided", "parallel"]


def broken_by(weights: Tensor, gramian: Tensor, prior: Tensor, beta: float) -> float:
    """How much is gained, to first order, by moving all weight to the best row, the problem's scale being one."""
    gradient = (2 * gramian / gramian.trace() @ weights + beta * (weights - prior)) / (1 + beta)
    return float(weights @ gradient - gradient.min())


def test_conflicting_objectives_share_the_weight_equally():
    gramian = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert_close(min_norm_weights(gramian), doubles(0.5, 0.5))


def test_orthogonal_gradients_are_weighted_by_their_inverse_squares():
    assert_close(min_norm_weights(torch.diag(torch.tensor([1.0, 4.0]))), doubles(0.8, 0.2))
    assert_close(min_norm_weights(torch.diag(torch.tensor([1.0, 2.0, 4.0]))), doubles(4 / 7, 2 / 7, 1 / 7))


def test_of_two_parallel_gradients_the_shorter_takes_all():
    assert_close(min_norm_weights(torch.tensor([[1.0, 2.0], [2.0, 4.0]])), doubles(1.0, 0.0))


def test_among_equal_gradients_the_weights_are_equal():
    assert_close(min_norm_weights(torch.ones(4, 4)), uniform(4))


def test_a_zero_gradient_is_the_shortest_of_all():
    assert_close(min_norm_weights(torch.diag(torch.tensor([1.0, 0.0, 2.0]))), doubles(0.0, 1.0, 0.0))
    assert_close(min_norm_weights(torch.zeros(3, 3)), uniform(3))


def test_a_saturated_objective_is_dropped_rather_than_given_everything():
    gramian = torch.diag(torch.tensor([1.0, 0.5e-6, 1.0]))  # the middle row is 0.0007 times as long
    assert kept_rows(gramian, everyone(3)).tolist() == [True, False, True]
    assert_close(regularised_min_norm(gramian, uniform(3), 0.01, everyone(3)), doubles(0.5, 0.0, 0.5))


def test_the_threshold_is_on_norms_not_on_their_squares():
    gramian = torch.diag(torch.tensor([1.0, 4e-6]))  # 0.002 times as long
    assert kept_rows(gramian, everyone(2), 1e-3).all()
    assert kept_rows(gramian, everyone(2), 3e-3).tolist() == [True, False]


def test_an_absent_row_neither_takes_part_nor_sets_the_scale():
    gramian = torch.diag(torch.tensor([1e12, 1.0, 4.0]))
    present = torch.tensor([False, True, True])
    assert kept_rows(gramian, present).tolist() == [False, True, True]
    assert_close(regularised_min_norm(gramian, uniform(3), 0.0, present), doubles(0.0, 0.8, 0.2))


def test_without_any_gradient_the_answer_is_the_prior():
    prior, present = doubles(0.5, 0.25, 0.25), torch.tensor([True, False, True])
    zero = torch.zeros(3, 3)
    assert not kept_rows(zero, present).any()
    assert_close(regularised_min_norm(zero, prior, 0.1, present), doubles(2 / 3, 0.0, 1 / 3))
    assert regularised_min_norm(zero, prior, 0.1, ~everyone(3)).tolist() == [0.0, 0.0, 0.0]


def test_the_prior_keeps_its_proportions_among_the_rows_that_are_kept():
    gramian = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    weights = regularised_min_norm(gramian, doubles(0.6, 0.2, 0.2), 1e9, everyone(3))
    assert_close(weights, doubles(0.75, 0.25, 0.0))


def test_a_prior_that_wants_none_of_the_rows_counts_as_uniform():
    gramian = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    assert_close(regularised_min_norm(gramian, doubles(0.0, 0.0, 1.0), 0.5, everyone(3)), doubles(0.5, 0.5, 0.0))


def test_a_large_beta_gives_the_preference_and_a_small_one_the_shortest_vector():
    gramian, prior = torch.diag(torch.tensor([1.0, 4.0])), doubles(0.3, 0.7)
    assert_close(regularised_min_norm(gramian, prior, 1e9, everyone(2)), prior)
    assert_close(regularised_min_norm(gramian, prior, 1e-10, everyone(2)), doubles(0.8, 0.2))


def test_among_equal_gradients_the_prior_decides():
    assert_close(regularised_min_norm(torch.ones(2, 2), doubles(0.3, 0.7), 0.0, everyone(2)), doubles(0.3, 0.7))


def test_row_normalisation_ignores_lengths():
    gramian = torch.tensor([[1.0, 0.0], [0.0, 1e4]])
    assert_close(regularised_min_norm(gramian, uniform(2), 0.01, everyone(2), normalise="rows"), uniform(2))


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="beta is -1"):
        regularised_min_norm(torch.eye(2), uniform(2), -1.0, everyone(2))
    with pytest.raises(ValueError, match="not finite"):
        regularised_min_norm(torch.full((2, 2), math.nan), uniform(2), 0.0, everyone(2))


@settings(deadline=None, max_examples=200)
@given(
    first=st.floats(0.01, 10),
    second=st.floats(0.01, 10),
    cosine=st.floats(-1, 1),
    preference=st.floats(0, 1),
    beta=st.sampled_from([0.0, 0.01, 0.1, 1.0, 100.0]),
    log_scale=st.sampled_from([-12, 0, 6]),
)
def test_two_objectives_follow_the_closed_form(first, second, cosine, preference, beta, log_scale):
    gramian = torch.tensor(
        [[first**2, cosine * first * second], [cosine * first * second, second**2]], dtype=torch.float64
    )
    (g11, g12), (_, g22) = (gramian / gramian.trace()).tolist()
    denominator = g11 + g22 - 2 * g12 + beta
    assume(denominator > 1e-6)  # equal gradients and no regulariser have no closed form
    expected = min(max((g22 - g12 + beta * preference) / denominator, 0.0), 1.0)
    prior = doubles(preference, 1 - preference)
    weights = regularised_min_norm(gramian * 10.0**log_scale, prior, beta, everyone(2), threshold=0.0)
    assert_close(weights, doubles(expected, 1 - expected), atol=1e-9, rtol=0)


@settings(deadline=None, max_examples=250)
@given(
    seed=st.integers(0, 2**31),
    m=st.integers(2, 8),
    kind=st.sampled_from(KINDS),
    beta=st.sampled_from([0.0, 1e-8, 0.01, 1.0, 1e3]),
    log_scale=st.sampled_from([-12, -3, 0, 6]),
)
def test_no_move_of_weight_improves_the_answer(seed, m, kind, beta, log_scale):
    gramian = random_gramian(seed, m, kind, log_scale)
    prior = torch.randn(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(min=0.0)
    prior = prior / prior.sum() if prior.sum() > 0 else torch.full((m,), 1 / m, dtype=torch.float64)  # corners too
    weights = regularised_min_norm(gramian, prior, beta, everyone(m), threshold=0.0)
    assert weights.dtype == torch.float64
    assert weights.min() >= 0
    assert abs(float(weights.sum()) - 1) <= 1e-12
    assert broken_by(weights, gramian, prior, beta) <= 1e-9


@pytest.mark.parametrize(("m", "kind", "beta"), list(itertools.product([11, 16, 40], KINDS, [0.0, 0.01])))
def test_many_objectives_meet_the_same_conditions(m, kind, beta):
    gramian = random_gramian(1, m, kind)
    weights = regularised_min_norm(gramian, uniform(m), beta, everyone(m), threshold=0.0)
    assert abs(float(weights.sum()) - 1) <= 1e-12
    assert weights.min() >= 0
    assert broken_by(weights, gramian, uniform(m), beta) <= 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_no_point_of_a_fine_grid_does_better(kind):
    steps = 100
    grid = torch.tensor(
        [(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)], dtype=torch.float64
    )
    grid = grid / steps
    for seed, beta in itertools.product(range(5), [0.0, 0.1]):
        gramian, prior = random_gramian(seed, 3, kind), doubles(0.5, 0.3, 0.2)
        scaled = gramian / gramian.trace()

        def cost(w: Tensor, scaled: Tensor = scaled, beta: float = beta, prior: Tensor = prior) -> Tensor:
            return ((w @ scaled) * w).sum(-1) + beta / 2 * (w - prior).square().sum(-1)

        weights = regularised_min_norm(gramian, prior, beta, everyone(3), threshold=0.0)
        best = grid[cost(grid).argmin()]
        assert cost(weights) <= cost(best) + 1e-12
        assert cost(best) <= cost(weights) + 1e-3  # the grid does come near, so the comparison means something


@pytest.mark.parametrize("kind", ["singular", "rank one", "repeated"])
def test_of_many_minimisers_the_one_nearest_to_the_prior_is_taken(kind):
    prior = doubles(0.4, 0.3, 0.2, 0.1)
    for seed in range(20):
        gramian = random_gramian(seed, 4, kind)
        limit = regularised_min_norm(gramian, prior, 1e-7, everyone(4), threshold=0.0)
        chosen = regularised_min_norm(gramian, prior, 0.0, everyone(4), threshold=0.0)
        assert_close(chosen, limit, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31), st.integers(2, 6), st.sampled_from([0.01, 0.1, 1.0]))
def test_similar_gradients_get_similar_weights(seed, m, beta):
    # beta-strong convexity: |w - w'| <= (2 / beta) |G - G'|.
    one = random_gramian(seed, m, "easy")
    other = random_gramian(seed + 1, m, "easy") * 1e-3 + one
    weights = [regularised_min_norm(g, uniform(m), beta, everyone(m), threshold=0.0) for g in (one, other)]
    distance = torch.linalg.matrix_norm(one / one.trace() - other / other.trace(), 2)
    assert (weights[0] - weights[1]).norm() <= 2 / beta * distance + 1e-12


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(2, 6), st.sampled_from(["easy", "lopsided", "opposed"]))
def test_the_order_of_objectives_does_not_matter(seed, m, kind):
    gramian = random_gramian(seed, m, kind)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    weights = regularised_min_norm(gramian, uniform(m), 0.01, everyone(m))
    shuffled = regularised_min_norm(gramian[order][:, order], uniform(m), 0.01, everyone(m))
    assert_close(shuffled, weights[order], atol=1e-9, rtol=0)


def test_two_objectives_get_the_weights_of_torchjd():
    mgda = pytest.importorskip("torchjd.aggregation").MGDAWeighting(epsilon=1e-12, max_iters=100)
    for seed in range(20):
        gramian = random_gramian(seed, 2, "easy")
        assert_close(min_norm_weights(gramian), mgda(gramian), atol=1e-9, rtol=0)


def test_the_vector_is_never_longer_than_torchjds_and_hardly_shorter():
    mgda = pytest.importorskip("torchjd.aggregation").MGDAWeighting(epsilon=1e-12, max_iters=1500)
    for seed, m in enumerate([3, 4, 5, 8]):
        gramian = random_gramian(seed, m, "easy")
        gramian = gramian / gramian.trace()
        ours, theirs = min_norm_weights(gramian), mgda(gramian)
        assert ours @ gramian @ ours <= theirs @ gramian @ theirs + 1e-12
        assert theirs @ gramian @ theirs <= ours @ gramian @ ours + 1e-3  # as near as Frank-Wolfe gets
