"""Means over members, how much a member counts, and mixing two adapters."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedpact.core.aggregate import AdapterMean, WeightedMean, accuracy_weight, mix

NAN = math.nan


def mean_of(*pairs: tuple[list[float], float]) -> torch.Tensor:
    mean = WeightedMean()
    for values, weight in pairs:
        mean.add(torch.tensor(values), weight)
    return mean.result()


def test_values_count_by_their_weight():
    assert mean_of(([0.0, 8.0], 1.0), ([4.0, 0.0], 3.0)).tolist() == [3.0, 2.0]


def test_one_value_is_its_own_mean_whatever_its_weight():
    assert_close(mean_of(([0.1, -7.3], 1e-9)), torch.tensor([0.1, -7.3]), rtol=0, atol=0)


def test_an_entry_that_one_member_lacks_is_the_mean_of_the_others():
    result = mean_of(([1.0, 1.0], 1.0), ([NAN, 3.0], 1.0), ([5.0, NAN], 3.0))
    assert result.tolist() == [4.0, 2.0]


def test_an_entry_that_nobody_measured_stays_nan():
    result = mean_of(([NAN, 1.0], 2.0), ([NAN, 3.0], 2.0))
    assert result[0].isnan() and result[1] == 2.0


def test_a_weight_of_zero_counts_for_nothing():
    assert mean_of(([1.0], 0.0), ([3.0], 2.0)).tolist() == [3.0]
    assert mean_of(([1.0], 0.0)).isnan().all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(2, 5), st.booleans())
def test_the_order_of_arrival_does_not_show(seed, count, with_gaps):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 50, generator=draw) * 10.0 ** torch.randint(-3, 4, (count, 1), generator=draw)
    if with_gaps:
        values[torch.rand(count, 50, generator=draw) < 0.3] = NAN
    weights = (torch.rand(count, generator=draw) * 100 + 0.01).tolist()
    results = []
    for order in itertools.islice(itertools.permutations(range(count)), 24):
        mean = WeightedMean()
        for i in order:
            mean.add(values[i], weights[i])
        results.append(mean.result())
    for result in results[1:]:
        # Float64 sums: at most a tie in rounding to float32 could ever differ.
        assert_close(result, results[0], rtol=2e-7, atol=1e-12, equal_nan=True)


def test_the_result_has_the_type_of_the_values_and_sums_do_not_lose_small_ones():
    mean = WeightedMean()
    mean.add(torch.tensor([1e8], dtype=torch.float32), 1.0)
    for _ in range(4):
        mean.add(torch.tensor([1.0], dtype=torch.float32), 1.0)
    mean.add(torch.tensor([-1e8], dtype=torch.float32), 1.0)
    assert mean.result().dtype == torch.float32
    assert_close(mean.result(), torch.tensor([4 / 6]))
    half = WeightedMean()
    half.add(torch.tensor([1.0], dtype=torch.bfloat16), 1.0)
    assert half.result().dtype == torch.bfloat16


def test_the_values_added_are_left_alone():
    value = torch.tensor([1.0, NAN], dtype=torch.float64)
    mean = WeightedMean()
    mean.add(value, 2.0)
    mean.add(value, 2.0)
    assert value[0] == 1.0 and value[1].isnan()


@pytest.mark.parametrize("weight", [-1.0, NAN, math.inf])
def test_a_weight_that_is_no_weight_is_refused(weight):
    with pytest.raises(ValueError, match="expected a finite number that is not negative"):
        WeightedMean().add(torch.ones(1), weight)


def test_values_of_different_shapes_are_refused():
    mean = WeightedMean()
    mean.add(torch.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"value is \[3\] torch.float32; expected \[2\] torch.float32"):
        mean.add(torch.ones(3), 1.0)


def test_there_is_no_mean_of_nothing():
    with pytest.raises(ValueError, match="nothing was added"):
        WeightedMean().result()
    with pytest.raises(ValueError, match="nothing was added"):
        AdapterMean().result()


def test_adapters_are_averaged_tensor_by_tensor():
    mean = AdapterMean()
    mean.add({"a": torch.tensor([0.0]), "b": torch.tensor([[2.0]])}, 1.0)
    mean.add({"b": torch.tensor([[6.0]]), "a": torch.tensor([4.0])}, 3.0)
    assert {name: value.tolist() for name, value in mean.result().items()} == {"a": [3.0], "b": [[5.0]]}


def test_adapters_with_other_tensors_are_refused_and_leave_the_mean_alone():
    mean = AdapterMean()
    mean.add({"a": torch.tensor([1.0])}, 1.0)
    with pytest.raises(ValueError, match=r"\['c'\] unexpected, \['a'\] missing"):
        mean.add({"c": torch.tensor([9.0])}, 1.0)
    assert mean.result()["a"].tolist() == [1.0]


def test_a_member_counts_by_its_prompts_and_exponentially_by_its_accuracy():
    assert accuracy_weight(40, 1.0, 0.1, by_count=True) == 40.0
    assert accuracy_weight(40, 0.9, 0.1, by_count=True) == pytest.approx(40 / math.e)
    assert accuracy_weight(40, 0.9, 0.1, by_count=False) == pytest.approx(1 / math.e)


def test_at_infinite_temperature_accuracy_has_no_say():
    assert accuracy_weight(40, 0.1, math.inf, by_count=True) == 40.0
    assert accuracy_weight(40, None, math.inf, by_count=False) == 1.0


def test_shares_within_a_cohort_are_the_softmax_of_accuracies():
    accuracies = [0.2, 0.5, 0.4]
    weights = torch.tensor([accuracy_weight(1, a, 0.1, by_count=False) for a in accuracies])
    assert_close(weights / weights.sum(), torch.softmax(torch.tensor(accuracies) / 0.1, 0))


def test_a_member_gains_nothing_by_not_telling_its_accuracy():
    worst = accuracy_weight(10, 0.0, 0.1, by_count=True)
    assert accuracy_weight(10, None, 0.1, by_count=True) == worst
    assert accuracy_weight(10, NAN, 0.1, by_count=True) == worst
    assert accuracy_weight(10, -3.0, 0.1, by_count=True) == worst


def test_nobody_counts_for_more_than_a_perfect_member():
    assert accuracy_weight(10, 50.0, 0.1, by_count=True) == accuracy_weight(10, 1.0, 0.1, by_count=True)


def test_a_cohort_of_poor_members_still_has_a_mean():
    weight = accuracy_weight(5, 0.0, 1e-6, by_count=True)
    assert mean_of(([1.0], weight), ([3.0], weight)).tolist() == [2.0]


def test_impossible_weights_are_refused():
    with pytest.raises(ValueError, match="temperature is 0"):
        accuracy_weight(1, 0.5, 0.0, by_count=True)
    with pytest.raises(ValueError, match="num_samples is -1"):
        accuracy_weight(-1, 0.5, 0.1, by_count=True)


def test_mixing_gives_each_adapter_its_share():
    first, second = {"a": torch.tensor([4.0, 0.0])}, {"a": torch.tensor([0.0, 8.0])}
    assert mix(first, second, 0.25)["a"].tolist() == [1.0, 6.0]


def test_mixing_at_either_end_is_exact():
    first, second = {"a": torch.tensor([0.1, 1e30])}, {"a": torch.tensor([1e8, 0.3])}
    assert torch.equal(mix(first, second, 1.0)["a"], first["a"])
    assert torch.equal(mix(first, second, 0.0)["a"], second["a"])
    assert torch.equal(mix(first, first, 0.37)["a"], first["a"])


def test_mixing_refuses_other_tensors_and_shares():
    with pytest.raises(ValueError, match=r"\['b'\] unexpected"):
        mix({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, 0.5)
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):
        mix({}, {}, 1.5)
