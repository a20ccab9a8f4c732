"""Shares, clips and robust means against numbers by hand, explicit vectors and dense matrices."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedpact.core.low_rank import product
from fedpact.core.robust import (
    capped_shares,
    clip_threshold,
    cosine,
    delta_norm,
    geometric_median_weights,
    gram_of,
    product_change,
    trimmed_mean,
)
from fedpact.types import Adapter

WEIGHTS = st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=9)
SEEDS = st.integers(0, 2**31)
A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def median_of(points: Tensor, weights: list[float] | None = None) -> Tensor:
    shares = geometric_median_weights(points @ points.T, weights or [1.0] * len(points))
    return torch.tensor(shares, dtype=torch.float64) @ points


def sum_of_distances(points: Tensor, weights: list[float], at: Tensor) -> float:
    return sum(w * float((x - at).norm()) for x, w in zip(points, weights, strict=True))


def explicit_median(points: Tensor, weights: list[float]) -> Tensor:
    """Weiszfeld's own iteration on the vectors themselves, from their mean."""
    w = torch.tensor(weights, dtype=torch.float64)
    at = w @ points / w.sum()
    for _ in range(4_000):
        beta = w / (points - at).norm(dim=1).clamp_min(1e-12)
        at = beta @ points / beta.sum()
    return at


def random_adapter(seed: int, r: int, d_out: int, d_in: int) -> Adapter:
    return {A: normals(seed, r, d_in).float(), B: normals(seed + 1, d_out, r).float()}


def test_equal_weights_share_equally():
    assert capped_shares([3.0, 3.0, 3.0, 3.0], 2.0) == [0.25] * 4


def test_without_a_cap_shares_are_weights_over_their_sum():
    assert capped_shares([1.0, 2.0, 7.0], math.inf) == [1 / 10, 2 / 10, 7 / 10]


def test_a_giant_weight_gets_twice_an_even_share_and_the_rest_share_what_is_left():
    assert_close(capped_shares([1e12, 1.0, 1.0, 2.0], 2.0), [0.5, 0.125, 0.125, 0.25])


def test_one_whom_the_excess_lifts_over_the_cap_stops_at_it_too():
    # 100 : 10 : 1 : 1 : 1 with a cap of .4: first .4 for the giant; then 10/13 of .6 is .46, so .4 again; .2 for three.
    assert_close(capped_shares([1.0, 100.0, 1.0, 10.0, 1.0], 2.0), [0.2 / 3, 0.4, 0.2 / 3, 0.4, 0.2 / 3])


def test_one_weight_has_all():
    assert capped_shares([1e-9], 2.0) == [1.0]


def test_a_cap_below_an_even_share_is_an_even_share():
    assert capped_shares([5.0, 1.0, 1.0, 1.0], 0.5) == [0.25] * 4


def test_of_two_members_the_larger_may_have_all_but_a_trace():
    assert_close(capped_shares([1e12, 1.0], 2.0), [1 - 1e-12, 1e-12], atol=0, rtol=1e-9)


def test_weights_whose_sum_overflows_have_shares():
    assert capped_shares([1e308, 1e308, 1e308, 1e308], 2.0) == [0.25] * 4


@given(WEIGHTS, st.floats(0.1, 10))
@settings(deadline=None)
def test_shares_sum_to_one_below_the_cap_and_in_order(weights, max_share):
    shares = capped_shares(weights, max_share)
    assert math.fsum(shares) == pytest.approx(1, abs=1e-12)
    assert max(shares) <= max(max_share, 1) / len(weights) * (1 + 1e-12)
    ordered = [share for _, share in sorted(zip(weights, shares, strict=True))]
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(ordered))


@given(WEIGHTS, st.floats(1, 10))
@settings(deadline=None)
def test_members_below_the_cap_keep_their_proportions(weights, max_share):
    shares = capped_shares(weights, max_share)
    below = [s / w for s, w in zip(shares, weights, strict=True) if s < max_share / len(weights) * (1 - 1e-9)]
    assert all(ratio == pytest.approx(below[0], rel=1e-6) for ratio in below)


@given(WEIGHTS, st.floats(1, 10), st.integers(-30, 30))
@settings(deadline=None)
def test_the_unit_of_the_weights_does_not_matter(weights, max_share, exponent):
    assert capped_shares([math.ldexp(w, exponent) for w in weights], max_share) == capped_shares(weights, max_share)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    with pytest.raises(ValueError, match="expected at least one, all positive and finite"):
        capped_shares([1.0, weight], 2.0)


def test_no_weights_and_a_cap_of_nan_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        capped_shares([], 2.0)
    with pytest.raises(ValueError, match="max_share is nan"):
        capped_shares([1.0, 2.0], math.nan)


def test_the_clip_is_twice_the_median_norm():
    assert clip_threshold([1.0, 5.0], [3.0], factor=2.0, cap=None) == 6.0


def test_of_two_norms_the_giant_does_not_set_the_clip():
    assert clip_threshold([], [1e9, 3.0], factor=2.0, cap=None) == 6.0


def test_norms_of_zero_do_not_pull_the_clip_down():
    assert clip_threshold([0.0, 0.0, 4.0], [0.0], factor=2.0, cap=None) == 8.0


def test_the_absolute_cap_holds_below_the_median():
    assert clip_threshold([], [10.0], factor=2.0, cap=7.0) == 7.0
    assert clip_threshold([], [1.0], factor=2.0, cap=7.0) == 2.0


def test_without_a_norm_only_the_cap_is_left():
    assert clip_threshold([], [0.0], factor=2.0, cap=None) == math.inf
    assert clip_threshold([], [], factor=2.0, cap=7.0) == 7.0


def test_the_median_of_a_triangle_is_where_its_sides_look_alike():
    # Corners of an equilateral triangle: the Fermat point is the centre.
    corners = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, math.sqrt(3)]], dtype=torch.float64)
    assert_close(median_of(corners), torch.tensor([1.0, 1 / math.sqrt(3)], dtype=torch.float64))


def test_on_a_line_the_median_is_the_middle_vector_itself():
    points = torch.tensor([[0.0], [1.0], [100.0]], dtype=torch.float64)
    assert geometric_median_weights(points @ points.T, [1.0, 1.0, 1.0]) == [0.0, 1.0, 0.0]


def test_a_vector_with_most_of_the_weight_is_the_median():
    assert geometric_median_weights(torch.eye(3).double(), [1.0, 5.0, 1.0]) == [0.0, 1.0, 0.0]


def test_copies_of_the_median_share_its_weight():
    points = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [9.0, 9.0]], dtype=torch.float64)
    assert_close(geometric_median_weights(points @ points.T, [1.0, 2.0, 1.0, 3.0]), [0.25, 0.5, 0.25, 0.0])


def test_the_median_of_equal_vectors_is_that_vector():
    assert_close(geometric_median_weights(torch.full((3, 3), 7.0), [1.0, 1.0, 2.0]), [0.25, 0.25, 0.5])
    assert_close(geometric_median_weights(torch.zeros(2, 2), [1.0, 1.0]), [0.5, 0.5])


def test_two_vectors_of_equal_weight_are_averaged():
    assert_close(geometric_median_weights(torch.eye(2).double(), [3.0, 3.0]), [0.5, 0.5])


@given(SEEDS, st.integers(3, 8), st.integers(1, 6))
@settings(deadline=None, max_examples=25)
def test_no_nearby_point_has_less_distance_to_all(seed, k, d):
    points, weights = normals(seed, k, d), (0.2 + normals(seed + 1, k).abs()).tolist()
    found = median_of(points, weights)
    least = sum_of_distances(points, weights, found)
    for step in normals(seed + 2, 40, d):
        for size in (1e-3, 1e-2, 1e-1, 1.0):
            assert least <= sum_of_distances(points, weights, found + size * step) + 1e-9
    assert all(least <= sum_of_distances(points, weights, x) + 1e-9 for x in points)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_median_is_that_of_the_iteration_on_the_vectors(seed):
    points, weights = normals(seed, 7, 5), (0.5 + normals(seed + 1, 7).abs()).tolist()
    assert_close(median_of(points, weights), explicit_median(points, weights), atol=1e-7, rtol=0)


@given(SEEDS, st.sampled_from([0.0, 1.0, 1e3, 1e6, 1e9, 1e15]), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
@example(0, 1e15, 3)
def test_a_minority_moves_the_median_a_bounded_way(seed, distance, num_bad):
    # Honest vectors in a ball about c, a share b elsewhere. The median's sum of distances is at most that of c, and by
    # the triangle inequality at least (1 - b)(|median - c| - 2 radius) - b |median - c| more.
    centre, honest = normals(seed, 4), normals(seed + 1, 4, 4)
    bad = distance * normals(seed + 2, num_bad, 4)
    radius, share = float(honest.norm(dim=1).max()), num_bad / (4 + num_bad)
    moved = float((median_of(torch.cat([honest, bad]) + centre) - centre).norm())
    assert moved <= 2 * (1 - share) / (1 - 2 * share) * radius * (1 + 1e-6)


@pytest.mark.parametrize("nearer", [0, 30])
def test_nearly_half_far_away_do_not_take_the_median_along(nearer):
    points = torch.cat([normals(5, 51, 4), torch.full((nearer, 4), 1e6), torch.full((50 - nearer, 4), 1e15)]).double()
    assert float(median_of(points).norm()) <= 102 * float(points[:51].norm(dim=1).max())  # b = 50/101


def test_copies_of_a_median_that_is_no_majority_share_it_too():
    points = torch.tensor([[-1.0], [0.0], [0.0], [1.0]], dtype=torch.float64)
    assert_close(geometric_median_weights(points @ points.T, [3.0, 1.0, 2.0, 3.0]), [0.0, 1 / 3, 2 / 3, 0.0])


def test_of_two_vectors_the_heavier_is_the_median_even_by_the_last_digit():
    assert geometric_median_weights(torch.eye(2).double(), [1.0, 1.5]) == [0.0, 1.0]
    assert geometric_median_weights(torch.eye(2).double(), [1.0, 1.0 + 1e-15]) == [0.0, 1.0]


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_a_common_shift_moves_the_median_with_it(seed):
    points = normals(seed, 5, 3)
    assert_close(median_of(points + 100), median_of(points) + 100, atol=1e-6, rtol=0)


def test_median_weights_are_shares_and_the_same_every_time():
    points = normals(4, 6, 9)
    shares = geometric_median_weights(points @ points.T, [1.0] * 6)
    assert math.fsum(shares) == pytest.approx(1, abs=1e-15) and min(shares) >= 0
    assert shares == geometric_median_weights(points @ points.T, [1.0] * 6)


def test_a_vector_without_weight_does_not_count():
    points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [50.0, 50.0]], dtype=torch.float64)
    assert_close(geometric_median_weights(points @ points.T, [1.0, 1.0, 0.0]), [0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("gram", "weights", "message"),
    [
        (torch.eye(2), [1.0], "for 1 weights"),
        (torch.zeros(0, 0), [], "at least one"),
        (torch.full((1, 1), math.nan), [1.0], "not finite"),
        (torch.eye(2), [1.0, -1.0], "expected finite numbers >= 0"),
        (torch.eye(2), [0.0, 0.0], "at least one above 0"),
    ],
)
def test_a_median_of_nothing_sensible_is_refused(gram, weights, message):
    with pytest.raises(ValueError, match=message):
        geometric_median_weights(gram, weights)


def test_the_trimmed_mean_drops_each_coordinates_ends():
    values = [torch.tensor([x, y]) for x, y in [(1.0, 9.0), (2.0, -1e6), (3.0, 7.0), (6.0, 8.0), (1e6, 12.0)]]
    # Left: 2, 3, 6 and 7, 8, 9.
    assert_close(trimmed_mean(values, 0.2), torch.tensor([11 / 3, 8.0]))


def test_nothing_is_dropped_below_one_whole_value():
    assert_close(
        trimmed_mean([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([6.0])], 0.3), torch.tensor([3.0])
    )


def test_a_half_trimmed_is_the_median_with_two_left_of_an_even_number():
    values = [torch.tensor([x]) for x in (9.0, 1.0, 2.0, 4.0)]
    assert_close(trimmed_mean(values, 0.5), torch.tensor([3.0]))
    assert_close(trimmed_mean(values[:3], 0.5), torch.tensor([2.0]))


def test_a_share_that_floats_round_down_is_still_the_whole_number():
    # .29 * 100 is 28.999999999999996: 29 of the thirty giants are dropped, one is left among 42 values.
    values = [torch.tensor([0.0])] * 70 + [torch.tensor([42.0])] * 30
    assert_close(trimmed_mean(values, 0.29), torch.tensor([1.0]))


def test_the_trimmed_mean_sums_in_float64_and_keeps_the_type():
    values = [torch.tensor([x]) for x in (2.0**25, 1.0, 1.0, -(2.0**25))]  # between the large ones float32 steps by 2
    assert_close(trimmed_mean(values, 0.0), torch.tensor([0.5]), atol=0, rtol=0)
    assert trimmed_mean([torch.ones(1, dtype=torch.bfloat16)], 0.1).dtype == torch.bfloat16


def test_the_trimmed_mean_refuses_shapes_that_would_broadcast_types_and_trims_without_sense():
    with pytest.raises(ValueError, match="all of one shape and type"):
        trimmed_mean([torch.ones(2), torch.ones(1)], 0.1)
    with pytest.raises(ValueError, match="all of one shape and type"):
        trimmed_mean([torch.ones(2), torch.ones(2).double()], 0.1)
    with pytest.raises(ValueError, match="at least one"):
        trimmed_mean([], 0.1)
    for trim in (-0.1, 0.6, math.nan):
        with pytest.raises(ValueError, match=r"expected a number in \[0, 0.5\]"):
            trimmed_mean([torch.ones(2)], trim)


def test_inner_products_run_over_all_tensors_whatever_their_order():
    one = {A: torch.tensor([[1.0, 2.0]]), B: torch.tensor([[3.0]])}
    two = {B: torch.tensor([[-1.0]]), A: torch.tensor([[4.0, 0.0]])}
    assert_close(gram_of([one, two]), torch.tensor([[14.0, 1.0], [1.0, 17.0]], dtype=torch.float64))


def test_inner_products_are_summed_in_float64():
    tiny = {A: torch.tensor([[4096.0, 1.0]])}
    assert float(gram_of([tiny])[0, 0]) == 16777217.0


def test_inner_products_refuse_other_names_shapes_and_nothing():
    for other in ({A: torch.ones(1)}, {B: torch.ones(2)}, {A: torch.ones(2), B: torch.ones(2)}):
        with pytest.raises(ValueError, match=r"different tensors|expected \[2\]"):
            gram_of([{A: torch.ones(2)}, other])
    with pytest.raises(ValueError, match="no deltas"):
        gram_of([])


def test_a_norm_is_of_the_change_over_the_named_tensors_only():
    sent = {A: torch.tensor([[1.0, 1.0]]), B: torch.tensor([[1.0]])}
    found = {A: torch.tensor([[4.0, 5.0]]), B: torch.tensor([[13.0]])}
    assert delta_norm(sent, found, [A]) == 5.0
    assert delta_norm(sent, found, [A, B]) == 13.0
    assert delta_norm(sent, found, []) == 0.0


def test_a_norm_is_worked_out_in_float64():
    assert delta_norm({A: torch.tensor([-1.0])}, {A: torch.tensor([16777216.0])}, [A]) == 16777217.0


def test_a_norm_refuses_a_shape_that_would_broadcast_and_a_missing_tensor():
    with pytest.raises(ValueError, match=r"is \[1\]; expected \[2\]"):
        delta_norm({A: torch.ones(2)}, {A: torch.ones(1)}, [A])
    with pytest.raises(ValueError, match="is missing"):
        delta_norm({A: torch.ones(2)}, {}, [A])


@given(SEEDS, st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None, max_examples=25)
def test_the_change_of_products_is_that_of_the_dense_matrices(seed, r, d_out, d_in):
    sent, found = random_adapter(seed, r, d_out, d_in), random_adapter(seed + 2, r, d_out, d_in)
    dense = (product(found)["q_proj"] - product(sent)["q_proj"]).norm()
    assert product_change(sent, found) == pytest.approx(float(dense), rel=1e-9, abs=1e-9)


def test_the_change_runs_over_all_layers():
    other = {name.replace("q_proj", "up"): tensor for name, tensor in random_adapter(5, 2, 4, 3).items()}
    sent, found = random_adapter(1, 2, 5, 6) | other, random_adapter(3, 2, 5, 6) | {n: 2 * x for n, x in other.items()}
    parts = [(product(found)[layer] - product(sent)[layer]).norm() ** 2 for layer in ("q_proj", "up")]
    assert product_change(sent, found) == pytest.approx(math.sqrt(sum(map(float, parts))), rel=1e-9)


def test_factors_that_only_swap_their_scale_change_nothing():
    sent = random_adapter(1, 3, 6, 7)
    assert product_change(sent, {A: 2 * sent[A], B: sent[B] / 2}) < 1e-12


def test_a_small_change_of_large_factors_is_not_lost_to_rounding():
    sent = {A: torch.full((1, 1), 1e6).double(), B: torch.full((1, 1), 1e6).double()}
    assert product_change(sent, {A: sent[A], B: sent[B] + 2**-20}) == pytest.approx(1e6 * 2**-20, rel=1e-9)


def test_the_change_refuses_other_shapes_and_a_lone_factor():
    with pytest.raises(ValueError, match="expected"):
        product_change(random_adapter(1, 2, 3, 4), random_adapter(1, 1, 3, 4))
    with pytest.raises(ValueError, match="is missing"):
        product_change({A: torch.ones(1, 2)}, {A: torch.ones(1, 2)})


def test_cosines_by_hand():
    one, two = {A: torch.tensor([3.0]), B: torch.tensor([4.0])}, {A: torch.tensor([4.0]), B: torch.tensor([3.0])}
    assert cosine(one, two) == pytest.approx(24 / 25)
    assert cosine(one, {name: -1e6 * tensor for name, tensor in one.items()}) == -1.0
    assert math.isnan(cosine(one, {A: torch.zeros(1), B: torch.zeros(1)}))
