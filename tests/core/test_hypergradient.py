"""The steps of weight adaptation, by hand and by what must hold for any input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedpact.core.hypergradient import (
    cosine_hypergradient,
    exponentiated_log_weights,
    floored_softmax,
    shortfall,
)

ALL = torch.ones(3, dtype=torch.bool)


def test_a_step_moves_log_weights_by_rate_times_hypergradient_and_centres_them():
    moved = exponentiated_log_weights(torch.zeros(3), torch.tensor([3.0, 0.0, 0.0]), rate=0.1, present=ALL)
    assert_close(moved, torch.tensor([0.2, -0.1, -0.1]))


def test_a_hypergradient_that_is_the_same_for_all_changes_nothing():
    start = torch.tensor([0.5, -0.2, -0.3])
    assert_close(exponentiated_log_weights(start, torch.full((3,), 7.0), rate=0.3, present=ALL), start)


def test_log_weights_stay_within_their_bound():
    moved = exponentiated_log_weights(torch.zeros(3), torch.tensor([100.0, 0.0, -100.0]), rate=1.0, present=ALL)
    assert_close(moved, torch.tensor([2.2, 0.0, -2.2]))


def test_an_absent_objective_stays_at_zero_and_is_left_out_of_the_mean():
    present = torch.tensor([True, False, True])
    hypergradient = torch.tensor([1.0, math.nan, -1.0])
    moved = exponentiated_log_weights(torch.tensor([0.5, 9.0, 0.5]), hypergradient, rate=0.1, present=present)
    assert_close(moved, torch.tensor([0.1, 0.0, -0.1]))


def test_equal_log_weights_give_equal_weights():
    assert_close(floored_softmax(torch.zeros(3), ALL, 0.05), torch.full((3,), 1 / 3))


def test_the_floor_is_kept_and_the_rest_is_shared_out():
    # Odds of 3 to 1 over the half that two floors of a quarter leave.
    weights = floored_softmax(torch.tensor([math.log(3.0), 0.0]), torch.ones(2, dtype=torch.bool), 0.25)
    assert_close(weights, torch.tensor([0.25 + 0.375, 0.25 + 0.125]))


def test_an_absent_objective_has_no_weight():
    assert_close(floored_softmax(torch.tensor([0.0, 5.0]), torch.tensor([True, False]), 0.1), torch.tensor([1.0, 0.0]))
    assert floored_softmax(torch.zeros(2), torch.zeros(2, dtype=torch.bool), 0.1).tolist() == [0.0, 0.0]


def test_floors_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="below 1/3"):
        floored_softmax(torch.zeros(3), ALL, 0.34)
    with pytest.raises(ValueError, match=r"floor is -0\.1"):
        floored_softmax(torch.zeros(3), ALL, -0.1)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.floats(-50, 50, width=32), st.floats(-1, 1, width=32), st.booleans()), min_size=1, max_size=6)
)
def test_weights_always_sum_to_one_and_respect_the_floor(rows):
    start, hypergradient = (torch.tensor(column) for column in list(zip(*rows, strict=True))[:2])
    present = torch.tensor([row[2] for row in rows])
    log_weights = exponentiated_log_weights(start, hypergradient, rate=0.5, present=present)
    assert (log_weights.abs() <= 2.2 + 1e-6).all()
    weights = floored_softmax(log_weights, present, 0.05)
    assert (weights[~present] == 0).all()
    if present.any():
        assert_close(weights.sum(), torch.tensor(1.0))
        assert (weights[present] >= 0.05).all()


def test_repeated_steps_carry_the_weight_to_what_the_hypergradient_favours():
    log_weights = torch.zeros(3)
    for _ in range(300):
        log_weights = exponentiated_log_weights(log_weights, torch.tensor([1.0, 0.0, 0.0]), rate=0.03, present=ALL)
    # Bounds of 2.2 each way: odds of exp(4.4) at the most, and never beyond.
    best = 0.05 + 0.85 / (1 + 2 * math.exp(-4.4))
    assert 0.8 < float(floored_softmax(log_weights, ALL, 0.05)[0]) <= best + 1e-6


def test_the_cosine_divides_by_both_norms():
    cosine = cosine_hypergradient(torch.tensor([6.0, -4.0]), torch.tensor(2.0), torch.tensor([3.0, 4.0]))
    assert cosine.tolist() == [1.0, -0.5]


def test_the_cosine_with_a_zero_gradient_is_zero():
    assert cosine_hypergradient(torch.zeros(2), torch.tensor(2.0), torch.tensor([0.0, 1.0])).tolist() == [0.0, 0.0]
    assert cosine_hypergradient(torch.zeros(2), torch.tensor(0.0), torch.ones(2)).tolist() == [0.0, 0.0]


def test_the_cosine_survives_norms_whose_product_underflows():
    tiny = torch.tensor(1e-30)
    assert_close(cosine_hypergradient(torch.tensor([0.0]), tiny, tiny.unsqueeze(0)), torch.zeros(1))
    small = torch.tensor(1e-25, dtype=torch.float32)
    dots = torch.tensor([1e-38], dtype=torch.float32)
    assert cosine_hypergradient(dots, small, torch.tensor([1.0])).isfinite().all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_the_cosine_does_not_see_the_scale_of_gradients(seed, scale):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, 5, generator=draw, dtype=torch.float64)
    outer = torch.randn(5, generator=draw, dtype=torch.float64)

    def cosine(rows: Tensor) -> Tensor:
        return cosine_hypergradient(rows @ outer, outer.norm(), rows.norm(dim=-1))

    assert_close(cosine(rows * scale), cosine(rows))
    assert_close(cosine(rows), torch.cosine_similarity(rows, outer.unsqueeze(0)))


def test_the_dot_product_is_the_loss_saved_per_unit_of_weight():
    # Baydin et al.: after theta - lr * sum_k w_k g_k, dF/dw_k = -lr <grad F, g_k>; here F = |theta|^2 / 2.
    gradients = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([1.0, -1.0], dtype=torch.float64) - 0.1 * weights @ gradients
    (by_autograd,) = torch.autograd.grad(theta.square().sum() / 2, weights)
    assert_close(-0.1 * gradients @ theta.detach(), by_autograd)


def test_the_shortfall_is_what_lacks_to_one():
    rewards = torch.tensor([0.25, 1.0, 1.5, -2.0, math.nan])
    assert shortfall(rewards).tolist() == [0.75, 0.0, 0.0, 1.0, 0.0]
