"""What algorithms that train at the server share: who gets which message, what a vote is, when a step is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedpact.algorithms.fedgrpo import FedGRPO
from fedpact.algorithms.grpo import GRPO
from fedpact.algorithms.judging import Raters, public, with_own
from fedpact.algorithms.record import add_to_record, rate_on_record
from fedpact.errors import TooFewRepliesError
from fedpact.types import Memory, Rollout
from tests.algorithms.stage import StageJudge, StageTrainer, adapter, questions

NAN = float("nan")


def last_digit(texts: Any, completions: Any) -> list[list[float]]:
    """The number of the completion in its rollout, and no opinion on brevity."""
    return [[float(text.split()[1]) for text in completions], [NAN] * len(completions)]


def stage(**changes: Any) -> StageTrainer:
    judges = {name: StageJudge(last_digit) for name in ("ann", "bob", "cat")}
    asked = questions("apple", "bread", id=["q1", "q2"], answer=["7", "8"], reference=["r7", "r8"])
    return replace(StageTrainer(FedGRPO(experts="all"), judges, asked), **changes)


def rollout_of(server: StageTrainer) -> Rollout:
    return server.policy.generate(server.questions, draw=0)  # apple: 0 and 1, bread: 2 and 3


def test_a_rater_gets_its_own_questions_and_candidates_and_nothing_else():
    server = stage()
    raters = Raters(server, ["ann", "bob", "cat"])
    raters.rate(rollout_of(server), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool())
    [sent] = server.asked
    assert sorted(sent) == ["ann", "bob"]  # one exchange, one message each, none to who has nothing to rate
    assert (list(sent["ann"].prompts.text), sent["ann"].rows.tolist()) == (["apple"], [0, 0])
    assert (list(sent["bob"].prompts.text), sent["bob"].rows.tolist()) == (["bread"], [0])
    assert list(sent["bob"].completions) == ["completion 3 of draw 0"]
    assert dict(sent["bob"].prompts.columns) == {"id": ["q2"]}
    assert (sent["bob"].prompts.ids.tolist(), sent["bob"].prompts.domains) == ([0], None)


def test_ratings_come_back_to_the_candidates_that_they_are_of():
    server = stage()
    ratings = Raters(server, ["ann", "bob"]).rate(rollout_of(server), torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool())
    expected = torch.tensor([[0.0, NAN, NAN, 3.0], [NAN, 1.0, 2.0, NAN]])
    assert_close(ratings[:, 0], expected, equal_nan=True)
    assert ratings[:, 1].isnan().all()


def test_a_silent_rater_costs_its_own_ratings_only():
    server = stage(away={"ann"})
    raters = Raters(server, ["ann", "bob"])
    ratings = raters.rate(rollout_of(server), torch.ones(2, 4).bool())
    assert ratings[0].isnan().all()
    assert ratings[1, 0].tolist() == [0, 1, 2, 3]
    raters.close()


def test_the_last_exchange_fails_itself_if_nobody_has_answered_yet():
    everybody = torch.ones(2, 4).bool()
    server = stage(away={"ann", "bob"})
    raters = Raters(server, ["ann", "bob"])
    raters.rate(rollout_of(server), everybody)
    with pytest.raises(TooFewRepliesError):
        raters.rate(rollout_of(server), everybody, last=True)
    server.away = {"bob"}
    raters.rate(rollout_of(server), everybody)
    server.away = {"ann", "bob"}
    assert raters.rate(rollout_of(server), everybody, last=True).isnan().all()
    raters.close()


def test_a_round_in_which_nobody_is_asked_sends_nothing_and_does_not_fail():
    server = stage()
    raters = Raters(server, ["ann"])
    assert raters.rate(rollout_of(server), torch.zeros(1, 4).bool()).isnan().all()
    raters.close()
    assert server.asked == []


def test_figures_are_means_over_the_steps_that_have_them():
    server = stage()
    raters = Raters(server, ["ann"])
    for value in (1.0, NAN, 3.0):
        raters.note(experts=value, other=NAN)
    raters.close()
    assert server.figures == {"train/experts": 2.0}


def test_only_the_text_and_the_public_id_of_a_question_are_public():
    known = replace(questions("a", "b", id=["1", "2"], answer=["x", "y"], domain=["d", "e"]), ids=torch.tensor([40, 7]))
    shown = public(known)
    assert (list(shown.text), dict(shown.columns)) == (["a", "b"], {"id": ["1", "2"]})
    assert shown.ids.tolist() == [0, 1]  # not the rows of the server's file
    assert dict(public(questions("a", canary=[True])).columns) == {}


def test_own_rewards_take_the_place_of_ratings_and_count_only_where_somebody_rated():
    ratings = torch.tensor([[1.0, 0.0, NAN], [NAN, 0.5, NAN]])
    own = torch.tensor([[NAN, NAN, NAN], [0.25, 0.25, 0.25]])
    expected = torch.tensor([[1.0, 0.0, NAN], [0.25, 0.25, NAN]])
    assert_close(with_own(ratings, own, 0, 3), expected, equal_nan=True)
    unrated = torch.tensor([[NAN, NAN], [0.5, NAN]])
    both = torch.tensor([[1.0, 1.0], [NAN, NAN]])
    assert with_own(unrated, both, 0, 2).isnan().all()  # nobody rated the primary objective
    assert_close(with_own(unrated, torch.full((2, 2), NAN), None, 1)[1], torch.tensor([0.5, NAN]), equal_nan=True)


def test_an_objective_that_some_candidates_of_a_question_lack_does_not_count_there():
    ratings = torch.tensor([[1.0, 0.0, 1.0, NAN], [1.0, NAN, 1.0, NAN]])  # two questions of two candidates
    expected = torch.tensor([[1.0, 0.0, 1.0, NAN], [NAN, NAN, 1.0, NAN]])
    assert_close(with_own(ratings, torch.full((2, 4), NAN), 0, 2), expected, equal_nan=True)


def test_a_record_says_nothing_before_there_is_enough_of_it():
    memory: Memory = {}
    add_to_record(memory, "canary", ["ann", "bob"], torch.tensor([30, 0]), torch.tensor([60, 0]))
    assert rate_on_record(memory, "canary", "ann") is None
    assert rate_on_record(memory, "canary", "ann", enough=60) == 0.5
    assert rate_on_record(memory, "canary", "bob", enough=1) is None
    add_to_record(memory, "canary", ["ann"], torch.tensor([2]), torch.tensor([4]))
    assert rate_on_record(memory, "canary", "ann") == 0.5
    assert rate_on_record(memory, "canary", "eve") is None


# --- steps ----------------------------------------------------------------------------------------------------------


def test_a_batch_without_signal_makes_no_step():
    flat = stage(algorithm=GRPO(server_steps=3), own=lambda texts, completions: [[1.0] * 4, [0.5] * 4])
    flat.play()
    assert (flat.policy.steps, flat.figures["train/steps"], flat.figures["train/reward/correct"]) == ([], 0.0, 1.0)
    unequal = stage(algorithm=GRPO(server_steps=3), own=last_digit)
    unequal.play()
    assert (len(unequal.policy.steps), unequal.figures["train/steps"]) == (3, 3.0)


def test_the_optimiser_goes_on_where_the_last_round_left_it():
    server = stage(algorithm=GRPO(server_steps=3), own=last_digit)
    server.play(2)
    (_, first), (loaded, second) = server.policy.loaded
    assert first is None
    assert second == {"optimizer/step": torch.tensor(3.0)}
    assert loaded.keys() == adapter(0.0).keys()


def test_steps_of_a_run_are_counted_on_from_round_to_round():
    seen: list[int] = []
    server = stage(algorithm=GRPO(server_steps=2), own=last_digit)
    server.prompts = lambda step: seen.append(step) or server.questions
    server.play(2)
    assert seen == [0, 1, 2, 3]


def test_centralised_training_asks_nobody():
    server = stage(algorithm=GRPO(server_steps=2), own=last_digit)
    server.play(2)
    assert server.asked == []


def test_weighted_raw_rewards_make_one_group_or_each_objective_is_standardised_first():
    own = [[0.0, 1.0, 0.0, 1.0], [10.0, 0.0, 0.0, 10.0]]
    steps = {
        how: stage(algorithm=GRPO(server_steps=1, multi_objective_aggregation=how), own=lambda t, c: own)
        for how in ("sum_then_normalize", "normalize_then_sum")
    }
    signs = {}
    for how, server in steps.items():
        server.play()
        signs[how] = server.policy.advantages[0][0].sign().tolist()
    assert signs["sum_then_normalize"] == [1, -1, -1, 1]  # the larger scale wins
    assert signs["normalize_then_sum"][2:] == [-1, 1]
    assert abs(float(steps["normalize_then_sum"].policy.advantages[0][0, 0])) < 1e-3  # one for, one against
