"""The gate on the member's side, admission on the server's, and the envelope between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpact.errors import ConfigError, InadmissibleError, RefusedError
from fedpact.messages import (
    Count,
    Counted,
    Differentiate,
    Differentiated,
    Evaluate,
    Evaluated,
    Hello,
    Introduced,
    Reply,
    Request,
    Train,
    Trained,
)
from fedpact.runtime.admission import Limits, admit
from fedpact.runtime.client_config import ClientConfig, SiteSettings
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.config import FederationSettings, RunConfig, parse_algorithm
from fedpact.runtime.contract import contract_hash, contract_of
from fedpact.runtime.engines import Engines
from fedpact.runtime.envelope import Answer, Envelope, seal, unwrap, wrap
from fedpact.runtime.gate import Gate
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.member import Member
from fedpact.runtime.server import ServerSide
from tests.runtime.test_exchange import ScriptedTransport, one_round

A = "base_model.model.x.lora_A.weight"
B = "base_model.model.x.lora_B.weight"
LIMITS = Limits(num_objectives=2)
SENT = {A: torch.zeros(2, 3), B: torch.zeros(3, 2)}
NAN = float("nan")


def reply(**changes: Any) -> Trained:
    good = Trained(
        weight=4.0,
        adapter={A: torch.ones(2, 3), B: torch.ones(3, 2)},
        rewards=torch.tensor([0.5, NAN]),
        accuracy=0.5,
        metrics={"weight/correct": 0.123456},
    )
    return replace(good, **changes)


def gate(*, simulation: bool = False, home: Path = Path("unused"), **site: Any) -> Gate:
    made = Gate(SiteSettings(**site), where="north.toml", home=home, simulation=simulation)
    made.trained_on = 64  # as after accepting a contract
    return made


def canonical(**changes: Any) -> str:
    config = {
        "rounds": 3,
        "objectives": {"correct": {}},
        "policy": {"model": "m"},
        "algorithm": {"name": "firm"},
        **changes,
    }
    return contract_of(RunConfig.model_validate(config), model="hash").canonical()


def test_a_sound_reply_is_admitted() -> None:
    admit(reply(), LIMITS, Train(SENT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {A: torch.ones(2, 3)}}, "lora_B.weight' is missing"),
        ({"adapter": {**reply().adapter, "private/x": torch.ones(1)}}, "'private/x' is unexpected"),
        ({"adapter": {A: torch.ones(3, 2), B: torch.ones(3, 2)}}, r"found \(3, 2\) .* expected \(2, 3\)"),
        ({"adapter": {A: torch.ones(2, 3).double(), B: torch.ones(3, 2)}}, "float64"),
        ({"adapter": {A: torch.full((2, 3), NAN), B: torch.ones(3, 2)}}, "6 of 6 entries are not finite"),
        ({"adapter": {A: torch.full((2, 3), torch.inf), B: torch.ones(3, 2)}}, "not finite"),
        ({"weight": -1.0}, "weight: found -1.0"),
        ({"weight": 0.0}, "weight: found 0.0"),  # nothing but zeros would average to NaN
        ({"weight": NAN}, "weight: found nan"),
        ({"weight": 1e12}, "weight: found 1000000000000.0"),
        ({"rewards": torch.zeros(3)}, "rewards: found"),
        ({"rewards": torch.tensor([torch.inf, 0.0])}, "rewards: 1 of 2 entries are not finite"),
        ({"accuracy": NAN}, "accuracy: found nan"),
    ],
)
def test_a_bad_reply_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InadmissibleError, match=message):
        admit(reply(**changes), LIMITS, Train(SENT))


PROJECTED = Differentiate(SENT, rank=4, seed=0)
FACTORED = Differentiate(SENT, rank=2, seed=0, compression="svd")


def gradients(compression: str = "projection", **changes: Any) -> Differentiated:
    """Of two objectives and 12 parameters, the second objective not measured here; near-square that is 6 x 4."""
    gramian, rewards = torch.tensor([[1.0, NAN], [NAN, NAN]]), torch.tensor([0.5, NAN])
    if compression == "svd":
        factors = {"left": torch.ones(6, 2), "right": torch.ones(2, 4)}
        good = Differentiated(4.0, gramian, torch.zeros(2, 0), factors, rewards)
    else:
        good = Differentiated(4.0, gramian, torch.tensor([[1.0] * 4, [NAN] * 4]), {}, rewards)
    return replace(good, **changes)


def test_sound_gradients_are_admitted_with_nan_where_there_is_no_objective() -> None:
    admit(gradients(), LIMITS, PROJECTED)
    admit(gradients("svd"), LIMITS, FACTORED)
    admit(
        gradients("svd", factors={"left": torch.zeros(6, 4), "right": torch.zeros(4, 4)}),
        LIMITS,
        replace(FACTORED, rank=9),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sketch": torch.zeros(2, 3)}, r"sketch: found \(2, 3\) .* expected \(2, 4\)"),
        ({"sketch": torch.zeros(1, 4)}, r"sketch: found \(1, 4\)"),
        ({"sketch": torch.zeros(2, 4).double()}, "float64"),
        ({"sketch": torch.full((2, 4), torch.inf)}, "sketch: 8 of 8 entries are not finite"),
        ({"gramian": torch.zeros(2)}, r"gramian: found \(2,\)"),
        ({"gramian": torch.full((2, 2), -torch.inf)}, "gramian: 4 of 4"),
        ({"rewards": torch.zeros(3)}, r"rewards: found \(3,\)"),
        ({"weight": 0.0}, r"weight: found 0\.0"),
        ({"factors": {"left": torch.zeros(1)}}, r"factors: found \['left'\], expected \[\]"),  # it was not asked for
        ({"sketch": torch.full((2, 4), -2e9)}, r"sketch: found -2e\+09, expected between -1e\+09 and 1e\+09"),
        ({"gramian": torch.tensor([[1.0, 2e9], [2e9, 1.0]])}, r"gramian: found 2e\+09"),
        ({"gramian": torch.tensor([[NAN, NAN], [NAN, -1.0]])}, "gramian's diagonal: found -1, expected between 0"),
    ],
)
def test_bad_gradients_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InadmissibleError, match=message):
        admit(gradients(**changes), LIMITS, PROJECTED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": {}}, r"factors: found \[\], expected \['left', 'right'\]"),
        ({"factors": {"left": torch.zeros(6, 2)}}, r"found \['left'\]"),
        ({"factors": {"left": torch.zeros(6, 3), "right": torch.zeros(2, 4)}}, r"left: found \(6, 3\) .* \(6, 2\)"),
        ({"factors": {"left": torch.zeros(6, 2), "right": torch.zeros(4, 2)}}, r"right: found \(4, 2\) .* \(2, 4\)"),
        ({"factors": {"left": torch.full((6, 2), NAN), "right": torch.zeros(2, 4)}}, "left: 12 of 12 entries"),
        ({"factors": {"left": torch.zeros(6, 2), "right": torch.full((2, 4), 2e9)}}, r"right: found 2e\+09"),
        ({"sketch": torch.zeros(2, 4)}, r"sketch: found \(2, 4\) .* expected \(2, 0\)"),  # it was not asked for
    ],
)
def test_bad_factors_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InadmissibleError, match=message):
        admit(gradients("svd", **changes), LIMITS, FACTORED)


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        (torch.tensor([1, 2, 3]), r"domains: found \(3,\)"),
        (torch.tensor([1.0, 2.0]), "float32"),
        (torch.tensor([-1, 2]), "domains: found -1, expected between 0"),
        (torch.tensor([0, 2 * 10**9]), "domains: found 2e\\+09"),
    ],
)
def test_bad_counts_are_named(domains: torch.Tensor, message: str) -> None:
    request = Count(("odd", "even"))
    admit(Counted(3.0, torch.tensor([1, 2])), LIMITS, request)
    with pytest.raises(InadmissibleError, match=message):
        admit(Counted(3.0, domains), LIMITS, request)


def left(reply: Reply, request: Any, **site: Any) -> Any:
    return gate(**site).leave(request, reply)


def test_gradients_may_point_against_each_other_however_small() -> None:
    admit(gradients(gramian=torch.tensor([[1e-9, -1e8], [-1e8, 0.0]])), LIMITS, PROJECTED)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (replace(PROJECTED, rank=0), "rank is 0, expected between 1 and 65536"),
        (replace(PROJECTED, rank=65537), "rank is 65537, expected between 1 and 65536"),
        (replace(FACTORED, rank=65537), "rank is 65537, expected between 1 and 65536"),
        (replace(PROJECTED, compression="zip"), "compression is 'zip', expected projection or svd"),
    ],
)
def test_a_measurement_beyond_what_there_is_to_measure_is_refused(request_: Differentiate, message: str) -> None:
    sharing = gate(share=("gradients",))
    sharing.open(replace(PROJECTED, rank=12))
    sharing.open(replace(FACTORED, rank=12))
    with pytest.raises(RefusedError, match=rf"^north\.toml: malformed request: {message}"):
        sharing.open(request_)


def test_factors_are_refused_by_who_shares_no_gradients_and_sketches_are_let_in() -> None:
    with pytest.raises(RefusedError, match=r"^north\.toml: site\.share: gradients are asked for, and .* not in it$"):
        gate().open(FACTORED)
    gate().open(PROJECTED)  # of the conflict map: it is answered with nothing
    gate(simulation=True).open(FACTORED)


def test_only_the_domains_of_the_contract_are_counted() -> None:
    disco = parse_algorithm({"name": "disco", "domains": ["odd", "even"]})
    gate().open(Count(("odd", "even")), disco)
    for other in (("odd",), ("odd", "secret"), ("even", "odd")):
        with pytest.raises(RefusedError, match=r"malformed request: its domains are not those of the contract"):
            gate().open(Count(other), disco)


def test_shared_gradients_leave_as_they_are_and_rewards_only_if_these_are_shared_too() -> None:
    shared = left(gradients(), PROJECTED, share=("gradients", "rewards"))
    assert torch.equal(shared.sketch[0], torch.ones(4)) and float(shared.rewards[0]) == 0.5
    assert float(left(gradients(), PROJECTED, simulation=True).gramian[0, 0]) == 1.0
    alone = left(gradients(), PROJECTED, share=("gradients",))
    assert torch.equal(alone.sketch[0], torch.ones(4)) and bool(alone.rewards.isnan().all())
    assert left(gradients(), PROJECTED, share=("gradients",), max_weight=2.0).weight == 2.0


def test_an_algorithm_that_needs_gradients_is_refused_by_who_does_not_share_them() -> None:
    text = canonical(algorithm={"name": "fedcmoo"})
    accept = contract_hash(text)
    with pytest.raises(RefusedError, match=r'north\.toml: site\.share: .* add "gradients", or decline'):
        gate(accept=accept).accept(text)
    with pytest.raises(RefusedError, match=r"site\.share"):
        gate(simulation=True, share=("rewards",)).accept(text)
    assert gate(accept=accept, share=("gradients",)).accept(text).rounds == 3
    assert gate(simulation=True).accept(text).rounds == 3
    gate(simulation=True, share=("rewards",)).accept(canonical())  # firm does not need them


def test_small_counts_leave_as_zero_between_sites() -> None:
    request, counts = Count(("a", "b", "c", "d")), Counted(40.0, torch.tensor([0, 9, 10, 21]))
    assert left(counts, request).domains.tolist() == [0, 0, 10, 21]
    assert left(counts, request).domains.dtype == torch.int64
    assert left(counts, request, simulation=True).domains.tolist() == [0, 9, 10, 21]
    assert counts.domains.tolist() == [0, 9, 10, 21]


@pytest.mark.parametrize(("factor", "kept"), [("all", [A, B]), ("A", [A]), ("B", [B])])
def test_only_the_factor_that_was_trained_leaves(factor: Any, kept: list[str]) -> None:
    found = gate(simulation=True).leave(Train(SENT), reply(), factor=factor)
    assert isinstance(found, Trained)
    assert sorted(found.adapter) == kept


def test_between_sites_nothing_leaves_but_adapter_rewards_and_accuracy() -> None:
    left = gate().leave(Train(SENT), reply())
    assert isinstance(left, Trained)
    assert left.metrics == {}
    assert left.accuracy == 0.5
    left = gate(share=()).leave(Train(SENT), reply())
    assert isinstance(left, Trained)
    assert left.accuracy is None
    assert bool(left.rewards.isnan().all())


def test_shared_metrics_are_rounded_between_sites_and_whole_in_a_simulation() -> None:
    shared = gate(share=("metrics",)).leave(Train(SENT), reply())
    whole = gate(simulation=True).leave(Train(SENT), reply())
    assert isinstance(shared, Trained) and isinstance(whole, Trained)
    assert shared.metrics == {"weight/correct": 0.123}
    assert whole.metrics == {"weight/correct": 0.123456}


def test_a_share_list_holds_in_a_simulation_too() -> None:
    left = gate(simulation=True, share=("accuracy",)).leave(Train(SENT), reply())
    assert isinstance(left, Trained)
    assert left.metrics == {}
    assert bool(left.rewards.isnan().all())


def test_private_tensors_never_leave_whatever_the_algorithm_returns() -> None:
    left = gate(simulation=True).leave(Train(SENT), reply(adapter={**reply().adapter, "private/x": torch.ones(1)}))
    assert isinstance(left, Trained)
    assert sorted(left.adapter) == [A, B]


def test_a_change_that_is_too_large_is_shortened() -> None:
    left = gate(clip_norm=1.0).leave(Train(SENT), reply())
    assert isinstance(left, Trained)
    total = torch.cat([tensor.flatten() for tensor in left.adapter.values()])
    torch.testing.assert_close(total.norm(), torch.tensor(1.0))  # was sqrt(12)
    torch.testing.assert_close(total, torch.full((12,), 12**-0.5))


def test_control_variates_are_changes_themselves_and_a_group_of_their_own() -> None:
    sent = {A: torch.tensor([[5.0, 5.0]]), "control/A": torch.tensor([100.0, 100.0]), "control/B": torch.tensor([7.0])}
    kept = {A: torch.tensor([[8.0, 9.0]]), "control/A": torch.tensor([2.0, 3.0]), "control/B": torch.tensor([6.0])}
    left = gate(clip_norm=3.5).leave(Train(sent), reply(adapter=kept))
    assert isinstance(left, Trained)
    # the change (3, 4) of norm 5 is shortened to 0.7 of it, the variates (2, 3, 6) of norm 7 to half
    assert left.adapter[A][0].tolist() == pytest.approx([5 + 2.1, 5 + 2.8])
    assert left.adapter["control/A"].tolist() == pytest.approx([1.0, 1.5])
    assert left.adapter["control/B"].tolist() == pytest.approx([3.0])


def test_what_is_within_the_clip_leaves_as_it_is_beside_a_group_that_is_not() -> None:
    sent = {A: torch.zeros(1, 2), "control/A": torch.zeros(2)}
    for first, second in (([0.1, 0.2], [3.0, 4.0]), ([3.0, 4.0], [0.1, 0.2])):
        kept = {A: torch.tensor([first]), "control/A": torch.tensor(second)}
        left = gate(clip_norm=1.0).leave(Train(sent), reply(adapter=kept))
        assert isinstance(left, Trained)
        lengths = [float(left.adapter[name].norm()) for name in (A, "control/A")]
        assert sorted(lengths) == pytest.approx([0.05**0.5, 1.0])


def test_held_out_means_that_rest_on_too_little_stay() -> None:
    few = Evaluated(weight=9.0, rewards=torch.tensor([0.5, 0.25]), counts=torch.tensor([9, 3]), accuracy=0.5)
    whole = gate(min_samples=3).leave(Evaluate(SENT), few)
    assert isinstance(whole, Evaluated)
    assert (whole.rewards.tolist(), whole.accuracy) == ([0.5, 0.25], 0.5)
    left = gate(min_samples=4).leave(Evaluate(SENT), few)
    assert isinstance(left, Evaluated)
    assert (left.rewards[0], left.counts.tolist(), left.accuracy) == (0.5, [9, 0], None)
    assert bool(left.rewards[1].isnan())


def test_between_sites_means_rest_on_twenty_completions_unless_the_member_says_otherwise() -> None:
    for count, kept in ((19, False), (20, True)):
        found = Evaluated(weight=1.0, rewards=torch.ones(2), counts=torch.tensor([count, count]), accuracy=None)
        left = gate().leave(Evaluate(SENT), found)
        assert isinstance(left, Evaluated)
        assert bool(left.rewards.isfinite().all()) == kept
    site = gate()
    site.trained_on = 19
    left = site.leave(Train(SENT), reply())
    assert isinstance(left, Trained)
    assert left.accuracy is None and bool(left.rewards.isnan().all())


def test_a_change_that_cannot_be_measured_is_not_let_past_the_clip() -> None:
    with pytest.raises(RefusedError, match="control/x has no counterpart"):
        gate(clip_norm=1.0).leave(Train(SENT), reply(adapter={**reply().adapter, "control/x": torch.ones(1)}))


def test_a_members_weight_is_capped_by_its_gate() -> None:
    assert gate(max_weight=2.0).leave(Train(SENT), reply()).weight == 2.0  # type: ignore[attr-defined]


def test_a_site_accepts_the_pinned_contract_only(tmp_path: Path) -> None:
    text = canonical()
    assert gate(accept=contract_hash(text)).accept(text).rounds == 3
    with pytest.raises(RefusedError, match=r"site\.accept"):
        gate(accept=contract_hash(text), home=tmp_path).accept(canonical(rounds=4))
    with pytest.raises(RefusedError, match="no contract is accepted"):
        gate(home=tmp_path).accept(text)
    assert gate(simulation=True).accept(text).rounds == 3


TWO: dict[str, Any] = {"objectives": {"correct": {}, "brief": {}}}


def test_steps_on_all_objectives_at_once_count_once() -> None:
    assert gate(simulation=True, max_local_steps=4).accept(canonical(**TWO)).rounds == 3


@pytest.mark.parametrize(
    ("ceiling", "contract", "message"),
    [
        ({"max_rounds": 2}, {}, "site.max_rounds: the run asks for 3, allowed are 2"),
        ({"max_local_steps": 1}, {}, "site.max_local_steps: the run asks for 4, allowed are 1"),
        ({"max_completion_length": 9}, {}, "site.max_completion_length: the run asks for 256"),
        ({"max_learning_rate": 1e-6}, {}, "site.max_learning_rate: the run asks for 1e-05"),
        ({"max_local_steps": 7}, {"training": {"num_iterations": 2}}, "the run asks for 8, allowed are 7"),
        ({"max_local_steps": 7}, {**TWO, "algorithm": {"name": "soups"}}, "the run asks for 8, allowed are 7"),
        ({"max_local_steps": 7}, {**TWO, "algorithm": {"name": "fsmgda"}}, "the run asks for 8, allowed are 7"),
    ],
)
def test_a_ceiling_refuses_and_names_itself(ceiling: dict[str, Any], contract: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        gate(simulation=True, **ceiling).accept(canonical(**contract))


def test_a_contract_with_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(RefusedError, match="contract not understood"):
        gate(simulation=True).accept(canonical().replace('"firm"', '"unknown"'))


def test_a_verb_or_a_contract_that_was_not_chosen_does_not_enter() -> None:
    with pytest.raises(RefusedError, match=r"site\.verbs: 'train' is not allowed"):
        gate(verbs=("hello",)).enter("train", "c", "c")
    with pytest.raises(RefusedError, match="request under contract"):
        gate().enter("train", "other", "c")
    gate().enter("train", "c", "c")


def envelope(**changes: Any) -> Envelope:
    return replace(sealed(Train(SENT)), **changes)


def sealed(request: Request[Any], contract: str = "c") -> Envelope:
    return seal(request, run="r", contract=contract, round=1, exchange=0, nonce="n")


def test_a_reply_comes_back_as_it_was() -> None:
    back = unwrap(envelope(), wrap(envelope(), encode(reply())))
    assert isinstance(back, Trained)
    assert torch.equal(back.adapter[A], reply().adapter[A])
    assert back.metrics == reply().metrics


@pytest.mark.parametrize(
    "changes",
    [{"run": "x"}, {"contract": "x"}, {"round": 2}, {"exchange": 1}, {"nonce": "x"}],
    ids=lambda c: next(iter(c)),
)
def test_a_reply_to_another_envelope_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InadmissibleError, match=next(iter(changes))):
        unwrap(envelope(), wrap(envelope(**changes), encode(reply())))


def test_a_reply_to_another_request_in_the_same_place_is_refused() -> None:
    other = sealed(Train(reply().adapter))
    with pytest.raises(InadmissibleError, match="answers another request"):
        unwrap(envelope(), wrap(other, encode(reply())))


def test_a_second_attempt_asks_the_same() -> None:
    assert envelope().digest() == envelope(attempt=1, nonce="m").digest()
    assert envelope().digest() != envelope(since=(0, 0)).digest()


def test_an_unknown_verb_is_refused() -> None:
    with pytest.raises(InadmissibleError, match="unknown verb 'obey'"):
        envelope(verb="obey").open()


# --- a member -------------------------------------------------------------------------------------------------------


def member(folder: Path, **site: Any) -> Member:
    """One that trains, between sites; its model's folder is empty, so that nothing can be computed with it."""
    (folder / "rewards.py").write_text("def one(completions, **columns):\n    return [1.0] * len(completions)\n")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(40)))
    (folder / "model").mkdir()
    config = ClientConfig.model_validate(
        {
            "name": "north",
            "prompts": {"path": "prompts.jsonl"},
            "rewards": {"correct": {"use": "rewards.py:one"}},
            "site": site,
        }
    )
    return Member(
        config, folder=folder, home=folder / "h", where="north.toml", engines=Engines(), model=folder / "model"
    )


def test_a_member_that_shares_no_gradients_answers_the_conflict_map_without_computing_anything(tmp_path: Path) -> None:
    text = canonical(**TWO)
    one = member(tmp_path, accept=contract_hash(text))
    one.hello(Hello(text))
    asked = sealed(PROJECTED, contract_hash(text))
    answer = decode(Differentiated, decode(Answer, one.handle(encode(asked))).reply)
    assert (tuple(answer.gramian.shape), tuple(answer.sketch.shape), answer.factors) == ((2, 2), (2, 4), {})
    assert all(bool(tensor.isnan().all()) for tensor in (answer.gramian, answer.sketch, answer.rewards))
    admit(answer, LIMITS, PROJECTED)
    one.gate.share = ("gradients",)
    with pytest.raises(ConfigError, match=r"north\.toml: .*model"):  # with a policy, which this one cannot make
        one.handle(encode(replace(asked, round=2)))


def test_a_contract_whose_algorithm_does_not_go_with_its_objectives_is_refused_by_the_member(tmp_path: Path) -> None:
    text = canonical(algorithm={"name": "soups", "preference": {"correct": 1.0}})
    forged = text.replace('"preference":{"correct":', '"preference":{"kind":')
    assert forged != text
    one = member(tmp_path, accept=contract_hash(forged))
    with pytest.raises(
        ConfigError, match=r"^north\.toml: algorithm\.preference: \['kind'\] are no objectives.*$"
    ) as refused:
        one.hello(Hello(forged))
    assert "\n" not in str(refused.value)
    assert one.contract is None


# --- what the server writes down of a reply --------------------------------------------------------------------------


def logged(folder: Path, algorithm: str, weights: list[float] | None) -> list[str]:
    """The figures of one reply to a request to train with these objective weights."""
    one = one_round(ScriptedTransport({"a": reply(rewards=torch.tensor([0.5, 0.25]))}), folder)
    one.limits = LIMITS
    contract = contract_of(
        RunConfig.model_validate({"rounds": 3, **TWO, "policy": {"model": "m"}, "algorithm": {"name": algorithm}}),
        model="hash",
    )
    clients = {"a": Introduced("a", "", ("correct", "brief"), 20, 16, {})}
    side = ServerSide(
        one, contract=contract, clients=clients, memory={}, trainer=None, num_members=1, federation=FederationSettings()
    )
    side.ask(Train(SENT, weights=None if weights is None else torch.tensor(weights, dtype=torch.float64)))
    assert {row["who"] for row in one.metrics} == {"a"}
    return [f"{row['key']} {row['value']:g}" for row in one.metrics if not row["key"].startswith("update/")]


@pytest.mark.parametrize("algorithm", ["soups", "fsmgda"])
def test_a_training_on_one_objective_is_logged_with_its_reward_alone(tmp_path: Path, algorithm: str) -> None:
    assert logged(tmp_path / "first", algorithm, [1.0, 0.0]) == ["train/reward/correct 0.5"]
    assert logged(tmp_path / "second", algorithm, [0.0, 1.0]) == ["train/reward/brief 0.25"]


@pytest.mark.parametrize(("algorithm", "weights"), [("firm", None), ("fedcmoo", [0.5, 0.5]), ("fedcmoo", [1.0, 0.0])])
def test_any_other_training_is_logged_whole_even_where_one_objective_has_all_the_weight(
    tmp_path: Path, algorithm: str, weights: list[float] | None
) -> None:
    assert logged(tmp_path, algorithm, weights) == [
        "train/reward/correct 0.5",
        "train/reward/brief 0.25",
        "train/accuracy 0.5",
        "train/weight/correct 0.123456",
    ]


def test_between_sites_a_members_sampling_is_keyed_by_its_own_secret(tmp_path: Path) -> None:
    def seed(home: str, *, simulation: bool = False) -> int:
        site = Gate(SiteSettings(), where="north.toml", home=tmp_path / home, simulation=simulation)
        return site.sampling_seed(7)

    assert seed("north") == seed("north")  # the same again, after a restart too
    assert len({7, seed("north"), seed("south")}) == 3
    assert seed("north", simulation=True) == 7


def test_a_mean_that_rests_on_too_few_rewards_stays_whatever_the_batch() -> None:
    trained = reply(rewards=torch.tensor([0.5, 0.25]))
    left = gate(min_samples=4).leave(Train(SENT), trained, measured=torch.tensor([4, 3]))
    assert isinstance(left, Trained)
    assert left.rewards.isnan().tolist() == [False, True]
    assert left.accuracy is None
    whole = gate(min_samples=3).leave(Train(SENT), trained, measured=torch.tensor([4, 3]))
    assert isinstance(whole, Trained)
    assert whole.accuracy == 0.5 and bool(whole.rewards.isfinite().all())


def test_an_epsilon_that_is_infinite_is_not_sent(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    Ledger(tmp_path / "ledger.jsonl").append(verb="train", decision="sent", reply="ab")  # left without noise
    site = SiteSettings(clip_norm=1.0, noise_multiplier=1.0)
    left = Gate(site, where="north.toml", home=tmp_path, simulation=True).leave(Train(SENT), reply())
    assert isinstance(left, Trained)
    assert left.metrics == {}
    encode(left)  # a message holds no infinity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation": {"aggregation": "trimmed_mean"}, "algorithm": {"name": "scaffold"}}, "federation.aggregation"),
        ({"federation": {"aggregation": "trimmed_mean", "averaging": "products"}}, "federation.aggregation"),
        ({"evaluation": {"rollback": 0.1}, "server_optimizer": {"name": "adam"}}, "evaluation.rollback"),
    ],
)
def test_ways_of_averaging_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    config = {"rounds": 1, "objectives": {"a": {}}, "policy": {"model": "m"}, "algorithm": {"name": "fedavg"}}
    sgd = {"optimizer": {"name": "sgd"}} if changes.get("algorithm") else {}
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        RunConfig.model_validate({**config, **sgd, **changes})
