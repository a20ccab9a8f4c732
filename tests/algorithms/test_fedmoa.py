"""FedMOA: how the weights move, and how the server averages."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from fedpact.algorithms.fedmoa import FedMOA
from fedpact.messages import Train
from tests.algorithms.stage import NAME, StageClient, StagePolicy, StageServer, adapter, introduced, trained

NAN = float("nan")
SCORES = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
CONFLICT = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])


def log_weights(algorithm: FedMOA, rows: list[torch.Tensor], scores: torch.Tensor = SCORES) -> torch.Tensor:
    client = StageClient(StagePolicy(rows), scores)
    algorithm.train(Train(adapter(0.0, 0.0)), client)
    return client.memory["log_weights"]


def test_weight_moves_to_the_primary_when_the_other_opposes_it() -> None:
    z = log_weights(FedMOA(local_steps=2, weight_learning_rate=0.5), [CONFLICT, CONFLICT])
    assert_close(z, torch.tensor([0.5, -0.5], dtype=torch.float64))  # cosines +1 and -1, times 0.5


def test_weights_do_not_move_in_the_first_step() -> None:
    assert log_weights(FedMOA(local_steps=1), [CONFLICT]).tolist() == [0.0, 0.0]


def test_the_total_rule_rewards_what_agrees_with_the_weighted_sum() -> None:
    rows = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])  # the sum points along the second objective
    z = log_weights(FedMOA(local_steps=2, hypergradient="total"), [rows, rows])
    assert z[1] > 0 > z[0]


def test_the_gap_rule_follows_what_is_least_satisfied() -> None:
    z = log_weights(FedMOA(local_steps=2, hypergradient="gap", weight_learning_rate=1.0), [CONFLICT, CONFLICT])
    assert_close(z, torch.tensor([0.25, -0.25], dtype=torch.float64))  # gaps 0.75 and 0.25 about their mean


def test_a_member_goes_on_from_its_own_weights() -> None:
    client = StageClient(StagePolicy([CONFLICT, CONFLICT]), SCORES)
    client.memory["log_weights"] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    reply = FedMOA(local_steps=1, weight_floor=0.0).train(Train(adapter(0.0, 0.0)), client)
    assert reply.metrics["weight/correct"] == pytest.approx(1 / (1 + math.exp(-2)))


def test_no_weight_falls_below_the_floor() -> None:
    client = StageClient(StagePolicy([CONFLICT] * 30), SCORES)
    reply = FedMOA(local_steps=30, weight_floor=0.1, weight_learning_rate=2.0).train(Train(adapter(0.0, 0.0)), client)
    assert 0.1 < reply.metrics["weight/brief"] < 0.3


def test_a_step_without_primary_signal_moves_no_weight() -> None:
    silent = torch.tensor([[0.0, 0.0], [-1.0, 0.0]])
    assert log_weights(FedMOA(local_steps=2), [CONFLICT, silent]).tolist() == [0.0, 0.0]


def test_an_absent_objective_stays_out() -> None:
    scores = torch.stack([SCORES[0], torch.full((4,), NAN)])
    client = StageClient(StagePolicy([CONFLICT, CONFLICT]), scores)
    reply = FedMOA(local_steps=2).train(Train(adapter(0.0, 0.0)), client)
    assert reply.metrics["weight/correct"] == 1.0
    assert client.memory["log_weights"][1] == 0.0


def test_a_member_counts_by_its_accuracy() -> None:
    client = StageClient(StagePolicy([CONFLICT]), SCORES)  # accuracy 0.25, 4 completions
    algorithm = FedMOA(local_steps=1, accuracy_temperature=0.5)
    assert algorithm.train(Train(adapter(0.0, 0.0)), client).weight == pytest.approx(4 * math.exp(-0.75 / 0.5))
    client = StageClient(StagePolicy([CONFLICT]), SCORES)
    assert FedMOA(local_steps=1, by_accuracy=False).train(Train(adapter(0.0, 0.0)), client).weight == 4.0


def three_members() -> StageServer:
    members = {"a": introduced("a", "math", 10), "b": introduced("b", "math", 10), "c": introduced("c", "code", 20)}
    return StageServer({"a": trained(1, 0.0), "b": trained(3, 4.0), "c": trained(1, 9.0)}, members)


def test_the_global_adapter_weighs_tasks_by_their_prompts() -> None:
    server = three_members()
    result = FedMOA().server(adapter(0.0), server)
    assert result[NAME].tolist() == [[0.5 * 3.0 + 0.5 * 9.0]]  # math: (0 + 3 * 4) / 4 = 3
    assert server.memory[f"task/math/{NAME}"].tolist() == [[3.0]]


def test_a_member_starts_from_a_mix_of_its_task_and_the_global_adapter() -> None:
    server = three_members()
    server.memory[f"task/math/{NAME}"] = torch.tensor([[2.0]])
    FedMOA(task_share=0.25).server(adapter(6.0), server)
    assert server.requests["a"].adapter[NAME].tolist() == [[5.0]]  # 0.25 * 2 + 0.75 * 6
    assert server.requests["c"].adapter[NAME].tolist() == [[6.0]]  # its task has no adapter yet


def test_without_task_share_and_accuracy_it_is_fedavg_within_equal_tasks() -> None:
    server = three_members()
    server.memory[f"task/math/{NAME}"] = torch.tensor([[2.0]])
    FedMOA(task_share=0).server(adapter(6.0), server)
    assert server.requests["a"].adapter[NAME].tolist() == [[6.0]]


def test_a_task_whose_members_are_all_missing_keeps_its_adapter_and_no_vote() -> None:
    server = three_members()
    server.replies = {name: reply for name, reply in server.replies.items() if name != "c"}
    assert FedMOA().server(adapter(0.0), server)[NAME].tolist() == [[3.0]]


def test_every_task_is_exported_beside_the_global_adapter() -> None:
    server = three_members()
    final = FedMOA().server(adapter(0.0), server)
    exports = FedMOA().exports(final, server.memory)
    assert list(exports) == ["final", "task-code", "task-math"]
    assert exports["task-code"][NAME].tolist() == [[9.0]]
