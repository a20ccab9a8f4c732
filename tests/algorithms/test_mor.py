"""MoR: reward models are calibrated once, questions are routed, and the mixture is the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedpact.algorithms.mor import MoR, mixture
from fedpact.core.router import route
from fedpact.errors import DataError, TooFewRepliesError
from fedpact.messages import Fit, Score
from tests.algorithms.stage import StageJudge, StageTrainer, adapter, questions

NAN = float("nan")
KNOWN = questions("ask", "art", "bid", "bet", domain=["a", "a", "b", "b"], reference=["1", "2", "3", "4"])


def number(text: str) -> int:
    return int(text.split()[1])


def judge(task: str, scale: float = 1.0, shift: float = 0.0, *, sign: int = 1, accuracy: float = 0.8) -> StageJudge:
    """Prefers even candidates (odd ones with `sign` -1), on a scale of its own."""

    def rate(texts: Sequence[Any], completions: Sequence[str]) -> list[list[float]]:
        scores = [scale * sign * (1.0 - number(text) % 2) + shift for text in completions]
        return [scores, [NAN] * len(completions)]

    return StageJudge(rate, accuracy=(accuracy, NAN), task=task)


def stage(judges: dict[str, StageJudge], **changes: Any) -> StageTrainer:
    algorithm = MoR(**{"server_steps": 1, "temperature": 0.1, **changes.pop("settings", {})})
    return replace(StageTrainer(algorithm, judges, questions("apple", "bread", id=["1", "2"]), known=KNOWN), **changes)


def of_kind(server: StageTrainer, kind: type) -> list[dict[str, Any]]:
    return [one for one in server.asked if isinstance(next(iter(one.values())), kind)]


def shown(server: StageTrainer) -> dict[str, list[str]]:
    return {name: list(request.prompts.text) for name, request in server.asked[-1].items()}


def test_only_the_members_of_the_likeliest_domains_are_asked():
    judges = {"ann": judge("a"), "bob": judge("b"), "cat": judge("c"), "dan": judge("")}
    server = stage(judges, settings={"num_experts": 1})
    server.play()
    assert shown(server) == {"ann": ["apple"], "bob": ["bread"]}
    every = stage(judges, settings={"num_experts": None})
    every.play()
    assert shown(every) == {"ann": ["apple", "bread"], "bob": ["apple", "bread"]}  # c is no domain of the server's


@pytest.mark.parametrize("number_of_experts", [1, 2])
def test_members_of_one_task_do_not_all_rate_where_fewer_are_wanted(number_of_experts):
    judges = {name: judge("a") for name in ("ann", "bob", "cat")}
    server = stage(judges, settings={"num_experts": number_of_experts, "server_steps": 12})
    server.play()
    rated = [[len(one[name].prompts) for name in one] for one in of_kind(server, Score)]
    assert [sum(counts) for counts in rated] == [number_of_experts * 2] * 12
    asked = {name for one in of_kind(server, Score) for name in one}
    assert asked == set(judges)  # not always the first by name


def test_the_weights_of_a_question_sum_to_one_or_to_nothing():
    judges = {"ann": judge("a"), "bob": judge("a"), "cat": judge("b"), "dan": judge("")}
    server = stage(judges)
    domains = server.algorithm.fit_newcomers(adapter(0.0), server)
    for names, total in ((["ann", "bob", "cat", "dan"], 1.0), (["dan"], 0.0)):
        for num_experts in (None, 1, 2):
            weights = MoR(temperature=0.1, num_experts=num_experts).routed(server, server.questions, names, domains, 0)
            assert_close(weights.sum(1), torch.full((2,), total))
    names = ["ann", "bob", "cat", "dan"]
    weights = MoR(temperature=0.1, num_experts=None).routed(server, server.questions, names, domains, 0)
    assert_close(weights[0, 0], weights[0, 1])  # members of one task share its weight
    assert weights[0, :2].sum() > 0.9 and weights[1, 2] > 0.9
    weights = MoR(temperature=1e6, num_experts=None).routed(server, server.questions, names, domains, 0)
    assert_close(weights[0], torch.tensor([0.25, 0.25, 0.5, 0.0]))  # undecided: a domain counts once, not its members


def test_a_members_own_scale_does_not_count():
    for scale, shift in ((1.0, 0.0), (100.0, 7.0)):
        against = {"ann": judge("a"), "bob": judge("a", scale, shift, sign=-1)}
        server = stage(against, settings={"num_experts": None})
        server.play()
        assert server.policy.steps == []  # one for and one against, with the same influence
    plain, loud = stage({"ann": judge("a")}), stage({"ann": judge("a", 100.0, 7.0)})
    plain.play()
    loud.play()
    assert_close(plain.policy.advantages[0], loud.policy.advantages[0])
    assert (plain.memory["mean/ann"][0], plain.memory["std/ann"][0]) == (0.5, 0.5)
    assert (loud.memory["mean/ann"][0], loud.memory["std/ann"][0]) == (57.0, 50.0)


def test_a_reward_that_did_not_vary_on_the_base_model_does_not_drown_the_others():
    def rate(texts: Sequence[Any], completions: Sequence[str]) -> list[list[float]]:
        probing = len(texts) == 8  # four known questions of two completions: all wrong, as a weak model's are
        return [[0.0 if probing else float(number(text) % 2) for text in completions], [NAN] * len(completions)]

    judges = {"ann": judge("a"), "bob": judge("a"), "eve": StageJudge(rate, task="a")}
    server = stage(judges, settings={"num_experts": None})
    server.play()
    assert server.memory["std/eve"][0] == 0
    assert server.policy.advantages[0].sign().tolist() == [[1, -1, 1, -1]]  # two against one


def test_a_missing_rater_leaves_its_share_to_the_others():
    ratings = torch.tensor([[[2.0, NAN, NAN]], [[4.0, 4.0, NAN]], [[9.0, 9.0, 9.0]]])  # [k, m, n]
    weights = torch.tensor([[0.25, 0.25, 0.25], [0.75, 0.75, 0.75], [0.0, 0.0, 0.0]])
    assert_close(mixture(ratings, weights), torch.tensor([[3.5, 4.0, NAN]]), equal_nan=True)


def test_a_silent_rater_costs_its_own_share():
    judges = {"ann": judge("a"), "bob": judge("a", sign=-1)}
    server = stage(judges, settings={"num_experts": None, "server_steps": 1})
    server.play()
    assert server.policy.steps == []
    server.away = {"bob"}
    server.play()
    assert server.policy.advantages[-1].sign().tolist() == [[1, -1, 1, -1]]


def test_newcomers_are_fitted_when_they_appear_and_nobody_twice():
    server = stage({"ann": judge("a"), "bob": judge("b"), "cat": judge("b", accuracy=0.5)}, away={"bob"})
    everybody = server.clients
    server.clients = {name: one for name, one in everybody.items() if name != "cat"}
    server.play()
    router = {name: value for name, value in server.memory.items() if name.startswith("router/")}
    server.away, server.clients = set(), everybody
    server.play(2)
    assert [sorted(one) for one in of_kind(server, Fit)] == [["ann", "bob"], ["bob", "cat"]]
    assert server.figures["pairs/cat/correct"] == 0.5
    assert router and all(server.memory[name] is value for name, value in router.items())  # taught once


def test_the_probe_comes_from_the_base_model_and_shows_no_columns():
    server = stage({"ann": judge("a")})
    server.play()
    [sent] = of_kind(server, Fit)
    assert dict(sent["ann"].prompts.columns) == {}
    assert sent["ann"].rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    first = server.policy.loaded[0 if len(server.policy.loaded) == 2 else 1][0]
    assert all(not tensor.any() for tensor in first.values())


def test_a_round_in_which_nobody_can_be_fitted_fails():
    server = stage({"ann": judge("a"), "bob": judge("b")}, away={"ann", "bob"})
    with pytest.raises(TooFewRepliesError):
        server.play()


def test_a_router_needs_domains():
    with pytest.raises(ValueError, match=r"server.auxiliary: no column 'domain'"):
        MoR().check_data(questions("ask"), questions("ask", reference=["1"]))


def test_domains_that_are_nobodys_task_are_refused():
    with pytest.raises(DataError, match=r"its domains \['a', 'b'\] are nobody's task; the members' are \['odd'\]"):
        stage({"ann": judge("odd")}).play()


def test_a_question_that_nobody_rates_moves_nothing_whatever_the_server_says_itself():
    def own(texts: Sequence[Any], completions: Sequence[str]) -> list[list[float]]:
        return [[NAN] * len(completions), [float(number(text) % 2) for text in completions]]

    server = stage({"ann": judge("a"), "dan": judge("")}, own=own, away={"ann"})
    server.play()
    assert (server.policy.steps, of_kind(server, Score)) == ([], [])


def test_the_likeliest_domain_is_asked_however_many_members_share_it():
    judges = {name: judge("a") for name in ("ann", "art", "ava")} | {"bob": judge("b")}
    server = stage(judges)
    server.play()  # the router has been taught
    likely = route(
        {name.removeprefix("router/"): value for name, value in server.memory.items() if name.startswith("router/")},
        server.embed(server.questions),
    )
    assert likely[0, 0] > likely[0, 1]  # an apple is of domain a
    names = sorted(judges)
    for num, asked in ((1, 1), (3, 3), (4, 4)):
        weights = MoR(num_experts=num).routed(server, server.questions, names, ["a", "b"], 0)[0]
        assert int((weights > 0).sum()) == asked
        ours = weights[:3][weights[:3] > 0]
        assert len(ours) == min(num, 3)
        assert_close(ours, ours.mean().expand(len(ours)))  # they share their domain's weight
    assert_close(weights[:3].sum() / weights[3], likely[0, 0] / likely[0, 1])
