"""Neighbours, competence on them, and who is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedpact.core.confidence import chosen_experts, competence, edge_weights, neighbours
from fedpact.seeding import uniforms

NAN = math.nan


def on_the_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def test_the_nearest_auxiliary_questions_come_first():
    index, similarity = neighbours(on_the_circle(0), on_the_circle(90, 60, 180, 0), 3)
    assert index.tolist() == [[3, 1, 0]] and index.dtype == torch.int64
    assert_close(similarity, torch.tensor([[1.0, 0.5, 0.0]]), rtol=0, atol=1e-6)


def test_similarity_has_a_sign():
    index, similarity = neighbours(on_the_circle(0), on_the_circle(180, 100), 2)
    assert index.tolist() == [[1, 0]]
    assert_close(similarity[0, 1], torch.tensor(-1.0))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 200))
def test_of_equally_similar_ones_the_first_is_taken(seed, rows, width):
    draw = torch.Generator().manual_seed(seed)
    distinct = torch.nn.functional.normalize(torch.randn(rows, width, generator=draw), dim=-1)
    twice = torch.cat((distinct, distinct))
    questions = torch.nn.functional.normalize(torch.randn(3, width, generator=draw), dim=-1)
    index, similarity = neighbours(questions, twice, 2 * rows)
    equal = similarity[:, 1:] == similarity[:, :-1]
    assert equal.sum() >= 3 * rows  # each twin ties with its other
    assert (index[:, 1:] > index[:, :-1])[equal].all()
    assert (similarity[:, 1:] <= similarity[:, :-1]).all()


def test_a_questions_neighbours_do_not_depend_on_what_else_is_asked():
    draw = torch.Generator().manual_seed(1)
    questions, auxiliary = (torch.nn.functional.normalize(torch.randn(50, 64, generator=draw), dim=-1) for _ in "qa")
    index, similarity = neighbours(questions, auxiliary, 20)
    for i in range(len(questions)):
        alone = neighbours(questions[i : i + 1], auxiliary, 20)
        assert torch.equal(alone[0][0], index[i]) and torch.equal(alone[1][0], similarity[i])


def test_asking_for_more_neighbours_than_there_are_gives_all():
    index, similarity = neighbours(on_the_circle(0, 1), on_the_circle(0, 90), 20)
    assert index.shape == similarity.shape == (2, 2)


def test_embeddings_of_two_encoders_are_refused():
    with pytest.raises(ValueError, match="questions have 2 features, auxiliary ones 3"):
        neighbours(torch.eye(2), torch.eye(3), 1)
    with pytest.raises(ValueError, match="num is 0"):
        neighbours(torch.eye(2), torch.eye(2), 0)


def test_without_a_temperature_all_neighbours_count_alike():
    assert edge_weights(torch.tensor([[0.9, 0.1, -0.5, 0.0]]), None).tolist() == [[0.25] * 4]


def test_a_temperature_divides_the_similarity():
    # A gap of 0.1 ln 3 at temperature 0.1 makes the nearer one three times as heavy.
    weights = edge_weights(torch.tensor([[0.5, 0.5 - 0.1 * math.log(3)]]), 0.1)
    assert_close(weights, torch.tensor([[0.75, 0.25]]))
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        edge_weights(torch.ones(1, 2), 0.0)


def test_competence_is_the_hit_rate_on_the_neighbours():
    correct = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]])  # two members, four auxiliary questions
    index = torch.tensor([[0, 1], [1, 2], [2, 3]])
    rates = competence(correct, index, edge_weights(torch.zeros(3, 2), None))
    assert rates.tolist() == [[1.0, 0.5], [0.5, 1.0], [0.0, 1.0]]


def test_a_heavier_neighbour_counts_for_more():
    rates = competence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]]))
    assert rates.tolist() == [[0.75]]


def test_questions_a_member_was_not_examined_on_are_left_out():
    correct = torch.tensor([[1.0, NAN, 0.0, NAN]])
    weights = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])
    rates = competence(correct, torch.tensor([[0, 1], [2, 0], [1, 3]]), weights)
    assert rates[:2].tolist() == [[1.0], [0.75]]
    assert rates[2].isnan().all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_members_with_equally_many_hits_tie_exactly(seed, num):
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    hits = seed % (num + 1)
    first = (torch.arange(num) < hits).double()
    # Doubles, because float32 weights happen to add up exactly.
    weights = edge_weights(torch.zeros(1, num, dtype=torch.float64), None)
    rates = competence(torch.stack((first, first[order])), torch.arange(num).unsqueeze(0), weights)
    assert rates[0, 0] == rates[0, 1] == torch.tensor(hits / num)


def test_the_most_competent_members_are_chosen():
    rates = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.2, 0.3]])
    chosen = chosen_experts(rates, 2, draws=torch.rand(2, 3, generator=torch.Generator().manual_seed(0)))
    assert chosen.tolist() == [[False, True, True], [True, False, True]]


def test_a_member_that_was_never_examined_is_not_chosen():
    rates = torch.tensor([[NAN, 0.0, NAN]])
    assert chosen_experts(rates, 2, draws=torch.tensor([[0.9, 0.1, 0.8]])).tolist() == [[False, True, False]]
    assert not chosen_experts(torch.full((1, 3), NAN), 2, draws=torch.zeros(1, 3)).any()


@pytest.mark.parametrize("floor", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_member_exactly_at_the_floor_passes_and_one_below_does_not(floor):
    correct = (torch.arange(10) < torch.tensor([[round(10 * floor)], [round(10 * floor) - 1]])).float()
    rates = competence(correct, torch.arange(10).unsqueeze(0), edge_weights(torch.zeros(1, 10), None))
    assert chosen_experts(rates, 2, floor=floor, draws=torch.zeros(1, 2)).tolist() == [[True, False]]


def test_draws_decide_between_equals_and_between_equals_only():
    rates = torch.tensor([[0.5, 0.5, 0.9, 0.5]])
    draws = torch.tensor([[0.2, 0.7, 0.0, 0.6]])
    assert chosen_experts(rates, 1, draws=draws).tolist() == [[False, False, True, False]]
    assert chosen_experts(rates, 2, draws=draws).tolist() == [[False, True, True, False]]
    assert chosen_experts(rates, 3, draws=draws).tolist() == [[False, True, True, True]]


def test_equals_are_chosen_equally_often():
    num_questions = 10_000
    draws = uniforms(7, num_questions, 5)
    often = chosen_experts(torch.full((num_questions, 5), 0.4), 2, draws=draws).sum(0)
    # Binomial(10000, 2/5): standard deviation 49.
    assert ((often - 4_000).abs() < 5 * 49).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 8))
def test_never_more_than_asked_for_and_nobody_left_out_is_better(seed, k, num):
    draw = torch.Generator().manual_seed(seed)
    rates = torch.randint(0, 4, (9, k), generator=draw) / 3
    rates[torch.rand(9, k, generator=draw) < 0.3] = NAN
    chosen = chosen_experts(rates, num, floor=0.3, draws=torch.rand(9, k, generator=draw))
    able = rates >= 0.3
    assert chosen.sum(-1).tolist() == able.sum(-1).clamp(max=num).tolist()
    worst_chosen = rates.masked_fill(~chosen, 2.0).amin(-1)
    best_left = rates.masked_fill(chosen | ~able, -1.0).amax(-1)
    assert (best_left <= worst_chosen).all()


def test_draws_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"draws are \[1, 2\]"):
        chosen_experts(torch.zeros(1, 3), 1, draws=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="num is 0"):
        chosen_experts(torch.zeros(1, 3), 0, draws=torch.zeros(1, 3))
