"""Advantages, by numbers that can be checked by hand and by what must hold for any rewards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedpact.core.advantages import group_advantages, weighted_rewards

NAN = math.nan
DEVIATION = 0.5 + 1e-4  # the sample deviation of 1, 0, 0, 0 is exactly one half


def test_the_only_success_of_four_stands_out():
    expected = [[0.75 / DEVIATION, -0.25 / DEVIATION, -0.25 / DEVIATION, -0.25 / DEVIATION]]
    assert_close(group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 4), torch.tensor(expected))


def test_each_group_and_each_objective_is_compared_with_itself_alone():
    rewards = torch.tensor([[1.0, 0.0, 9.0, 8.0], [3.0, 5.0, 0.0, 0.0]])
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = torch.tensor([[half, -half, half, -half], [-1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(2) + 1e-4), 0, 0]])
    assert_close(group_advantages(rewards, 2), expected)


def test_without_scaling_rewards_are_only_centred():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0, 10.0, 20.0, 20.0, 30.0]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25, -10.0, 0.0, 0.0, 10.0]])
    assert_close(group_advantages(rewards, 4, scale="none"), expected)


def test_batch_scaling_divides_all_groups_by_one_deviation():
    # Over the batch 0, 2, 4, 6 the mean is 3 and the sample variance (9 + 1 + 1 + 9) / 3.
    deviation = math.sqrt(20 / 3) + 1e-4
    expected = torch.tensor([[-1.0, 1.0, -1.0, 1.0]]) / deviation
    assert_close(group_advantages(torch.tensor([[0.0, 2.0, 4.0, 6.0]]), 2, scale="batch"), expected)


def test_batch_scaling_keeps_objectives_apart():
    rewards = torch.tensor([[0.0, 2.0, 4.0, 6.0], [0.0, 200.0, 400.0, 600.0]])
    both = group_advantages(rewards, 2, scale="batch")
    assert_close(both[0], group_advantages(rewards[:1], 2, scale="batch")[0])
    assert_close(both[0], both[1], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_equal_rewards_gets_exact_zeros(scale):
    # Three times 0.1 does not average to 0.1 in floating point.
    rewards = torch.tensor([[0.1, 0.1, 0.1, 0.0, 1.0, 0.5]])
    advantages = group_advantages(rewards, 3, scale=scale)
    assert advantages[0, :3].tolist() == [0.0, 0.0, 0.0]
    assert advantages[0, 4] > 0


def test_an_absent_reward_gets_zero_and_does_not_shift_the_others():
    advantages = group_advantages(torch.tensor([[1.0, NAN, 0.0, NAN]]), 4)
    half = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert_close(advantages, torch.tensor([[half, 0.0, -half, 0.0]]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_single_measured_reward_is_no_signal(scale):
    rewards = torch.tensor([[NAN, 1.0, NAN, NAN], [NAN, NAN, NAN, NAN]])
    assert group_advantages(rewards, 4, scale=scale).tolist() == [[0.0] * 4] * 2


def test_groups_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="6 completions do not divide into groups of 4"):
        group_advantages(torch.zeros(1, 6), 4)
    with pytest.raises(ValueError, match="groups of 0"):
        group_advantages(torch.zeros(1, 6), 0)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="expected 'group', 'batch' or 'none'"):
        group_advantages(torch.zeros(1, 2), 2, scale="std")


def rewards_in_groups() -> st.SearchStrategy[tuple[Tensor, int]]:
    """Rewards in steps of 1/8 (exact in binary), some absent, and their group size."""
    reward = st.one_of(st.integers(-80, 80).map(lambda i: i / 8), st.just(NAN))

    def table(shape: tuple[int, int, int]) -> st.SearchStrategy[tuple[Tensor, int]]:
        m, p, size = shape
        row = st.lists(reward, min_size=p * size, max_size=p * size)
        return st.lists(row, min_size=m, max_size=m).map(lambda rows: (torch.tensor(rows), size))

    return st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6)).flatmap(table)


@settings(deadline=None, max_examples=150)
@given(rewards_in_groups(), st.sampled_from(["group", "batch", "none"]))
def test_every_groups_advantages_are_finite_and_sum_to_zero(case, scale):
    rewards, size = case
    advantages = group_advantages(rewards, size, scale=scale)
    assert advantages.dtype == torch.float32 and advantages.shape == rewards.shape
    assert advantages.isfinite().all()
    assert_close(advantages.reshape(len(rewards), -1, size).sum(-1).abs().max(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert (advantages[rewards.isnan()] == 0).all()


@settings(deadline=None, max_examples=100)
@given(rewards_in_groups(), st.sampled_from(["group", "batch", "none"]), st.integers(-8, 8))
def test_an_offset_to_all_rewards_changes_nothing(case, scale, offset):
    rewards, size = case
    moved = group_advantages(rewards + offset, size, scale=scale)
    assert_close(moved, group_advantages(rewards, size, scale=scale), atol=1e-6, rtol=1e-5)


@settings(deadline=None, max_examples=100)
@given(rewards_in_groups())
def test_scaled_advantages_hardly_see_the_rewards_unit(case):
    rewards, size = case
    assert_close(group_advantages(100 * rewards, size), group_advantages(rewards, size), atol=0.01, rtol=0.01)


def test_weighted_rewards_are_the_weighted_sum():
    rewards = torch.tensor([[1.0, 0.0], [4.0, 2.0]])
    assert weighted_rewards(rewards, torch.tensor([0.5, 0.25])).tolist() == [1.5, 0.5]


def test_an_absent_reward_adds_nothing_but_a_completion_without_any_stays_absent():
    rewards = torch.tensor([[1.0, NAN, NAN], [2.0, 3.0, NAN]])
    total = weighted_rewards(rewards, torch.tensor([10.0, 1.0]))
    assert total[:2].tolist() == [12.0, 3.0]
    assert total[2].isnan()
