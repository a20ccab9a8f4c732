"""FIRM: the weights of the regularised minimum-norm problem, member by member."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fedpact.algorithms.firm import FIRM
from fedpact.messages import Train
from tests.algorithms.stage import StageClient, StagePolicy, adapter

NAN = float("nan")
SCORES = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
ROWS = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # squared norms 4 and 1, orthogonal


def weights(algorithm: FIRM, scores: torch.Tensor = SCORES, rows: torch.Tensor = ROWS) -> torch.Tensor:
    client = StageClient(StagePolicy([rows]), scores)
    reply = algorithm.train(Train(adapter(0.0, 0.0)), client)
    return torch.tensor([reply.metrics.get(f"weight/{name}", 0.0) for name in client.objectives])


def test_without_regularisation_the_shortest_combination_wins() -> None:
    assert_close(weights(FIRM(local_steps=1, beta=0)), torch.tensor([0.2, 0.8]))  # G22 / (G11 + G22)


def test_the_closed_form_for_two_objectives() -> None:
    # trace-normalised: G11 = 0.8, G22 = 0.2; (G22 + beta p) / (1 + beta) with beta 1, p 0.5
    assert_close(weights(FIRM(local_steps=1, beta=1)), torch.tensor([0.35, 0.65]))


def test_a_large_beta_fixes_the_weights_at_the_preference() -> None:
    found = weights(FIRM(local_steps=1, beta=1e6, preference={"correct": 0.7}))
    assert_close(found, torch.tensor([0.7, 0.3]), atol=1e-5, rtol=0)


def test_unit_rows_weigh_orthogonal_objectives_alike() -> None:
    client = StageClient(StagePolicy([ROWS]), SCORES)
    FIRM(local_steps=1, beta=0, normalise="rows").train(Train(adapter(0.0, 0.0)), client)
    step = client.policy.steps[0]
    assert_close(step, torch.tensor([1.0, 1.0]))  # half of each unit row, times the longest norm 2


def test_a_member_with_one_objective_trains_on_it_alone() -> None:
    scores = torch.stack([torch.full((4,), NAN), SCORES[1]])
    assert weights(FIRM(local_steps=1, beta=1), scores).tolist() == [0.0, 1.0]


def test_an_objective_without_signal_gets_no_weight() -> None:
    scores = torch.stack([SCORES[0], torch.ones(4)])  # all tied
    rows = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert weights(FIRM(local_steps=1, beta=0), scores, rows).tolist() == [1.0, 0.0]


def test_when_every_group_is_tied_the_preference_stands_and_nothing_moves() -> None:
    client = StageClient(StagePolicy([torch.zeros(2, 2)]), torch.ones(2, 4))
    reply = FIRM(local_steps=1, beta=0).train(Train(adapter(0.0, 0.0)), client)
    assert float(client.policy.steps[0].abs().max()) == 0.0
    assert all(0 <= value <= 1 for name, value in reply.metrics.items() if name.startswith("weight/"))


@pytest.mark.parametrize(
    ("preference", "expected"),
    [(None, [0.5, 0.5]), ({"correct": 0.8}, [0.8, 0.2]), ({"correct": 1.0, "brief": 3.0}, [0.25, 0.75])],
)
def test_the_preference_is_completed_and_normalised(preference: dict[str, float] | None, expected: list[float]) -> None:
    client = StageClient(StagePolicy([ROWS]), SCORES)
    assert FIRM(preference=preference).prior(client).tolist() == pytest.approx(expected)


def test_dropped_objectives_are_logged_at_the_member() -> None:
    client = StageClient(StagePolicy([torch.tensor([[1.0, 0.0], [0.0, 1e-5]])]), SCORES)
    FIRM(local_steps=1, beta=0).train(Train(adapter(0.0, 0.0)), client)
    assert client.logged == [{"dropped_objectives": 1.0}]
