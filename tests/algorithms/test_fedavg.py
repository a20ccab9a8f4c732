"""FedAvg: fixed weights, and what a raw sum does to them."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from fedpact.algorithms.fedavg import FedAvg
from fedpact.messages import Train
from tests.algorithms.stage import NAME, StageClient, StagePolicy, StageServer, adapter, introduced, trained

NAN = float("nan")
SCORES = torch.tensor([[1.0, 0.0, 1.0, 0.0], [-30.0, -10.0, -30.0, -10.0]])  # the second objective disagrees, loudly


def gradient(rows: float = 1.0) -> torch.Tensor:
    return torch.tensor([[rows, 0.0]])


def train(algorithm: FedAvg, scores: torch.Tensor, **client: object) -> tuple[StageClient, object]:
    stage = StageClient(StagePolicy([gradient()] * algorithm.local_steps), scores, **client)
    return stage, algorithm.train(Train(adapter(0.0, 0.0)), stage)


def test_a_raw_sum_follows_the_objective_with_the_largest_scale() -> None:
    client, _ = train(FedAvg(local_steps=1, multi_objective_aggregation="sum_then_normalize"), SCORES)
    advantages = client.policy.advantages[0]
    assert advantages.shape == (1, 4)
    assert advantages[0, 0] < 0 < advantages[0, 1]


def test_standardised_objectives_of_equal_weight_cancel_when_they_disagree() -> None:
    client, _ = train(FedAvg(local_steps=1), SCORES)
    assert_close(client.policy.advantages[0], torch.zeros(1, 4), atol=1e-3, rtol=0)


def test_weights_decide_between_standardised_objectives() -> None:
    client, _ = train(FedAvg(local_steps=1), SCORES, weights=torch.tensor([0.6, 0.4], dtype=torch.float64))
    half = 0.5 / (0.5**0.5 + 1e-4)  # (1 - 0.5) / sample std of (0, 1)
    assert_close(client.policy.advantages[0][0, 0], torch.tensor(0.2 * half), atol=1e-4, rtol=0)


def test_an_objective_that_a_member_lacks_gets_no_weight() -> None:
    scores = torch.stack([SCORES[0], torch.full((4,), NAN)])
    client, reply = train(FedAvg(local_steps=1), scores)
    assert client.policy.advantages[0][0, 0] > 0
    assert reply.metrics["weight/correct"] == 1.0
    assert "weight/brief" not in reply.metrics


def test_each_local_step_moves_the_adapter_that_goes_up() -> None:
    _, reply = train(FedAvg(local_steps=3), SCORES)
    assert reply.adapter[NAME].tolist() == [[-3.0, 0.0]]
    assert reply.weight == 12.0  # completions
    assert reply.accuracy == 0.5


def test_every_batch_is_used_num_iterations_times() -> None:
    algorithm = FedAvg(local_steps=2)
    client = StageClient(StagePolicy([gradient()] * 6), SCORES, num_iterations=3)
    reply = algorithm.train(Train(adapter(0.0, 0.0)), client)
    assert len(client.policy.steps) == 6
    assert reply.weight == 8.0


def test_the_server_averages_by_completions() -> None:
    server = StageServer({"a": trained(1, 0.0, 4.0), "b": trained(3, 4.0, 0.0)}, {n: introduced(n) for n in "ab"})
    assert FedAvg().server(adapter(9.0, 9.0), server)[NAME].tolist() == [[3.0, 1.0]]
