"""FedCMOO: what the server learns of the members' gradients, and the one set of weights that it answers with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedpact.algorithms.fedcmoo import Conflict, FedCMOO, from_factors
from fedpact.core.compress import unfactored
from fedpact.core.fedcmoo import descended_weights
from fedpact.messages import Differentiate, Differentiated, Train
from fedpact.seeding import generator
from tests.algorithms.stage import SEPARATE, StageClient, StageFederation, StagePolicy, adapter, mover

NAN = float("nan")
EXACT = {"compression": "svd", "upload": 100.0}
SKETCH = {"compression": "projection", "rank": 2048}


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradients(members: int = 3, d: int = 80) -> Tensor:
    """[k, m, d]; of different lengths, and the two of a member in conflict."""
    rows = torch.randn(members, 2, d, generator=generator("fedcmoo"))
    rows[:, 1] = 0.5 * rows[:, 1] - rows[:, 0]
    return rows


def federation(settings: dict[str, Any], rows: Tensor, lacking: dict[str, list[int]] | None = None) -> StageFederation:
    """Members a, b, c, ... with these gradients."""
    members = {
        name: mover(*(-row).tolist(), lacks=(lacking or {}).get(name, ()))
        for name, row in zip("abcdefgh"[: len(rows)], rows, strict=True)
    }
    return StageFederation(FedCMOO(local_steps=1, **settings), members)


def known(stage: StageFederation, d: int = 80) -> Tensor:
    return stage.algorithm.conflict(adapter(*[0.0] * d), stage).gramian


def off_by(found: Tensor, exact: Tensor) -> float:
    """The largest error, in units of the product of the two lengths."""
    lengths = exact.diagonal().sqrt()
    return float(((found - exact) / lengths / lengths[:, None]).abs().max())


def test_at_full_rank_the_factors_give_the_gram_matrix_of_the_mean_gradients() -> None:
    rows = gradients()
    mean = rows.double().mean(0)
    assert off_by(known(federation(EXACT, rows)), mean @ mean.mT) < 1e-6


def test_sketches_give_it_to_within_their_error() -> None:
    rows = gradients()
    mean = rows.double().mean(0)
    error = off_by(known(federation(SKETCH, rows)), mean @ mean.mT)
    assert error < 4 / 2048**0.5


@pytest.mark.parametrize(("settings", "tolerance"), [(EXACT, 1e-6), (SKETCH, 4 / 2048**0.5)])
def test_an_objective_is_averaged_over_the_members_that_have_it(settings: dict[str, Any], tolerance: float) -> None:
    rows = gradients()
    stage = federation(settings, rows, {"c": [1]})
    mean = torch.stack([rows[:, 0].double().mean(0), rows[:2, 1].double().mean(0)])
    assert off_by(known(stage), mean @ mean.mT) < tolerance


@pytest.mark.parametrize("settings", [EXACT, SKETCH])
def test_members_count_by_their_completions(settings: dict[str, Any]) -> None:
    stage = federation(settings, torch.tensor([[[4.0, 0.0], [0.0, 0.0]]]))  # 4 completions
    still = StagePolicy(pushes=torch.zeros(12, 2), group_size=6)
    stage.members = {
        **stage.members,
        "b": StageClient(still, SEPARATE.repeat_interleave(3, dim=1), scale_rewards="none"),
    }
    found = stage.algorithm.conflict(adapter(0.0, 0.0), stage)
    assert_close(found.gramian, torch.diag(doubles(1.0, 0.0)), atol=1e-5, rtol=0)  # (4 / 4) squared


def test_what_a_member_lacks_is_not_in_its_factors_even_if_a_kl_term_pulls() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])  # the second is the KL's alone
    scores = torch.stack([SEPARATE[0], torch.full((4,), NAN)])
    request = Differentiate(adapter(0.0, 0.0, 0.0), rank=9, seed=1, compression="svd")
    reply = FedCMOO().differentiate(request, StageClient(StagePolicy([rows]), scores))
    jacobian = unfactored(reply.factors["left"], reply.factors["right"], 2, 3)
    assert_close(jacobian, torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), atol=1e-5, rtol=0)
    assert reply.gramian.isnan().tolist() == [[False, True], [True, True]]


def test_rows_of_factors_do_not_count_for_an_objective_that_the_reply_calls_absent() -> None:
    rows = torch.tensor([[2.0, 0.0], [5.0, 7.0]])  # near-square that is 2 x 2
    factors = {"left": rows, "right": torch.eye(2)}
    own = torch.tensor([[4.0, NAN], [NAN, NAN]])
    one = Differentiated(1.0, own, torch.zeros(2, 0), factors, torch.tensor([0.5, NAN]))
    found = from_factors({"a": one, "b": one}, num_objectives=2, num_parameters=2)
    assert_close(found.gramian, torch.diag(doubles(4.0, 0.0)))
    assert found.present.tolist() == [True, False]


ORTHOGONAL = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])


@pytest.mark.parametrize("settings", [EXACT, SKETCH])
def test_the_servers_weights_go_to_everybody_and_into_its_memory(settings: dict[str, Any]) -> None:
    stage = federation(settings, ORTHOGONAL.repeat(2, 1, 1))
    stage.play(adapter(0.0, 0.0))
    measured, trained = stage.asked
    assert {type(one) for one in measured.values()} == {Differentiate}
    expected = descended_weights(torch.diag(doubles(4.0, 1.0)), doubles(0.5, 0.5))
    assert expected[1] > 0.6
    for request in trained.values():
        assert isinstance(request, Train)
        assert_close(request.weights, expected, atol=1e-6, rtol=0)
    assert_close(stage.memory["weights"], expected, atol=1e-6, rtol=0)
    assert stage.figures["weight/brief"] == float(stage.memory["weights"][1])


def test_a_round_goes_on_from_the_last_ones_weights() -> None:
    stage = federation({**EXACT, "weight_steps": 100}, ORTHOGONAL)
    stage.play(adapter(0.0, 0.0), rounds=2)
    gramian = torch.diag(doubles(4.0, 1.0))
    assert_close(stage.memory["weights"], descended_weights(gramian, doubles(0.5, 0.5), steps=200), atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", [EXACT, SKETCH])
def test_an_objective_that_nobody_has_weighs_nothing_and_keeps_its_share_for_later(settings: dict[str, Any]) -> None:
    stage = federation(settings, ORTHOGONAL, {"a": [1]})
    stage.memory["weights"] = doubles(0.3, 0.7)
    stage.play(adapter(0.0, 0.0))
    assert stage.asked[-1]["a"].weights.tolist() == [1.0, 0.0]
    assert_close(stage.memory["weights"], doubles(0.3, 0.7))


@pytest.mark.parametrize("settings", [EXACT, SKETCH])
def test_where_no_objective_says_anything_the_last_weights_stand(settings: dict[str, Any]) -> None:
    stage = federation(settings, ORTHOGONAL)
    stage.members["a"].scores = torch.ones(2, 4)
    stage.memory["weights"] = doubles(0.3, 0.7)
    stage.play(adapter(0.0, 0.0))
    assert stage.asked[-1]["a"].weights.tolist() == stage.memory["weights"].tolist() == [0.3, 0.7]


@pytest.mark.parametrize("settings", [EXACT, SKETCH])
@pytest.mark.parametrize(("preference", "expected"), [({"correct": 3.0}, [0.9, 0.1]), ({"brief": 3.0}, [0.1, 0.9])])
def test_the_preferred_objective_gets_what_is_not_shared_out(
    settings: dict[str, Any], preference: dict[str, float], expected: list[float]
) -> None:
    stage = federation({**settings, "preference": preference}, ORTHOGONAL)
    stage.play(adapter(0.0, 0.0))  # both losses are 3/4: the preferred one is to be lowered; 0.8 + 0.2 / 2
    assert stage.memory["weights"].tolist() == pytest.approx(expected)


def test_the_objective_with_the_larger_loss_is_pulled_by_an_equal_preference() -> None:
    stage = federation({**EXACT, "preference": {}}, ORTHOGONAL)
    stage.members["a"].scores = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])  # losses 1/4 and 3/4
    stage.play(adapter(0.0, 0.0))
    assert stage.memory["weights"].tolist() == pytest.approx([0.1, 0.9])


def test_an_objective_without_preference_is_trained_where_there_is_nothing_else() -> None:
    stage = federation({**EXACT, "preference": {"correct": 1.0, "brief": 0.0}}, ORTHOGONAL, {"a": [0]})
    stage.play(adapter(0.0, 0.0))
    assert stage.asked[-1]["a"].weights.tolist() == [0.0, 1.0]


def test_a_member_trains_with_the_servers_weights_over_what_it_has() -> None:
    whole, part = mover([2.0, 0.0], [0.0, 1.0]), mover([2.0, 0.0], [0.0, 1.0], lacks=[1])
    request = Train(adapter(0.0, 0.0), weights=doubles(0.25, 0.75))
    for client in (whole, part):
        FedCMOO(local_steps=1).train(request, client)
    assert_close(whole.policy.steps[0], torch.tensor([-0.5, -0.75]))
    assert_close(part.policy.steps[0], torch.tensor([-2.0, 0.0]))


def test_a_preference_for_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"algorithm.preference: \['kind'\] are no objectives"):
        FedCMOO(preference={"kind": 1.0}).check(["correct", "brief"])


def test_a_preference_takes_eight_objectives_at_most() -> None:
    names = [f"o{i}" for i in range(9)]
    FedCMOO(preference={"o1": 2.0}).check(names[:8])
    FedCMOO().check(names)
    with pytest.raises(ValueError, match=r"algorithm\.preference: found with 9 objectives; expected at most 8"):
        FedCMOO(preference={"o1": 2.0}).check(names)


def test_a_preference_without_rewards_that_members_share_leaves_the_weights_as_they_are() -> None:
    stage = federation({**EXACT, "preference": {}}, ORTHOGONAL)
    gramian = torch.diag(doubles(4.0, 1.0))
    whole = Conflict(gramian, torch.tensor([True, True]), doubles(0.5, NAN))
    assert stage.algorithm.weights(whole, stage).tolist() == [0.5, 0.5]
    part = Conflict(gramian, torch.tensor([True, False]), doubles(0.5, NAN))  # nobody has it: nothing is to be known
    assert stage.algorithm.weights(part, stage).tolist() == [1.0, 0.0]


def test_a_lie_about_rewards_is_cut_to_what_rewards_can_be() -> None:
    stage = federation({**EXACT, "preference": {}}, ORTHOGONAL)
    gramian, both = torch.diag(doubles(4.0, 1.0)), torch.tensor([True, True])
    told = [stage.algorithm.weights(Conflict(gramian, both, doubles(0.5, lie)), stage).tolist() for lie in (5.0, 1.0)]
    assert told[0] == told[1]
