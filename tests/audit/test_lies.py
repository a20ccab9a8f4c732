"""What liars say, and what is called damage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedpact.audit.curious import Guess
from fedpact.audit.hacks import HACKS, Tally, findings
from fedpact.audit.judges import opposite, silent
from fedpact.audit.leaks import Setting, described
from fedpact.audit.poison import Damage, doubt_of, not_a_number, scaled, stay_away, tampering, verdict, weighing
from fedpact.audit.trial import Outcome
from fedpact.messages import Evaluate, Evaluated, Reply, Scored, Train, Trained
from fedpact.runtime.envelope import Envelope, seal
from fedpact.runtime.transport import Failure


def trained(**tensors: list[float]) -> Trained:
    adapter = {name.replace("_", "/"): torch.tensor(values) for name, values in tensors.items()}
    return Trained(weight=8.0, adapter=adapter, rewards=torch.tensor([0.5]), accuracy=0.5)


def asked(request: Any) -> Envelope:
    return seal(request, run="run", contract="c", round=1, exchange=0, head="")


SENT = Train({"a": torch.tensor([1.0, 2.0])})


def test_a_flipped_change_starts_from_what_was_sent() -> None:
    found = scaled(-10.0)(trained(a=[1.5, 2.0]), SENT)
    assert_close(found.adapter["a"], torch.tensor([-4.0, 2.0]))
    assert found.weight == 8.0


def test_a_control_variate_is_a_change_already() -> None:
    request = Train({"control/a": torch.tensor([5.0])})
    assert_close(scaled(-2.0)(trained(control_a=[1.0]), request).adapter["control/a"], torch.tensor([-2.0]))


def test_only_what_was_sent_back_is_changed() -> None:
    request = Train({"a": torch.tensor([0.0]), "b": torch.tensor([0.0])})
    assert set(scaled(-1.0)(trained(b=[1.0]), request).adapter) == {"b"}


def test_the_heavy_one_lies_about_its_weight_too() -> None:
    found = weighing(1e12)(trained(a=[1.5, 2.0]), SENT)
    assert found.weight == 1e12
    assert_close(found.adapter["a"], torch.tensor([-4.0, 2.0]))


def test_one_entry_of_every_tensor_is_no_number_and_the_reply_itself_is_left_alone() -> None:
    reply = trained(a=[1.5, 2.0])
    assert not_a_number(reply, SENT).adapter["a"].isnan().tolist() == [True, False]
    assert reply.adapter["a"].tolist() == [1.5, 2.0]


def test_poison_touches_training_replies_alone() -> None:
    evaluated = Evaluated(1.0, torch.tensor([0.5]), torch.tensor([4]), 0.5)
    envelope = asked(Evaluate(SENT.adapter))
    assert tampering(scaled(-10.0))(envelope, evaluated) is evaluated
    assert stay_away(envelope, evaluated) is evaluated
    changed = tampering(scaled(-10.0))(asked(SENT), trained(a=[1.5, 2.0]))
    assert isinstance(changed, Trained) and changed.adapter["a"].tolist() == [-4.0, 2.0]
    assert isinstance(stay_away(asked(SENT), trained(a=[1.0, 2.0])), Failure)


@pytest.mark.parametrize(("told", "lie"), [([1.0, 0.0, 1.0], [0.0, 1.0, 0.0]), ([0.5, -2.0, 1.0], [-0.5, 2.0, -1.0])])
def test_a_lying_judge_says_the_opposite(told: list[float], lie: list[float]) -> None:
    found = opposite(asked(SENT), Scored(torch.tensor([told])))
    assert isinstance(found, Scored) and found.rewards.tolist() == [lie]


def test_a_lying_judge_has_no_opinion_where_it_had_none() -> None:
    found: Reply | Failure = opposite(asked(SENT), Scored(torch.tensor([[1.0, torch.nan]])))
    assert isinstance(found, Scored) and found.rewards[0, 0] == 0 and bool(found.rewards[0, 1].isnan())
    assert isinstance(silent(asked(SENT), Scored(torch.tensor([[1.0]]))), Failure)


def damage(change: float = 0.0, moved: float = 0.0, refused: str = "", ended: str = "") -> Damage:
    return Damage({"correct": change}, moved, refused, ended)


@pytest.mark.parametrize(
    ("found", "words", "harm"),
    [
        (damage(ended="too few"), "ENDED THE RUN: too few", True),
        (damage(change=-0.9, refused="NaN"), "refused, named: NaN", False),
        (damage(change=-0.2, moved=9.0), "DAMAGE", True),
        (damage(change=-0.04, moved=0.9), "no loss shown yet, but the adapter is 3.0 times as far off", False),
        (damage(change=-0.04, moved=0.6), "contained", False),
        (damage(moved=float("nan")), "no loss shown yet", False),
    ],
)
def test_verdicts(found: Damage, words: str, harm: bool) -> None:
    text, bad = verdict(found, "correct", doubt=0.05, absence=0.3)
    assert text.startswith(words) and bad == harm


def outcome(end: float, final: float, *, first: float = 0.0, **refused: str) -> Outcome:
    made = Outcome(end={"correct": end}, refused=refused, completions=100)
    made.first, made.final = {"a": torch.tensor([first])}, {"a": torch.tensor([final])}
    return made


def test_damage_is_the_mean_over_seeds_in_lengths_of_the_honest_way() -> None:
    honest = [outcome(0.5, 2.0), outcome(0.7, 4.0)]
    attacked = [outcome(0.4, -2.0, east="a lie"), outcome(0.4, 4.0)]
    found = Damage.between(attacked, honest, ["east", "east"])
    assert found.change["correct"] == pytest.approx(-0.2)
    assert found.moved == pytest.approx(1.0)  # (4 / 2 + 0 / 4) / 2
    assert found.refused == "a lie"
    assert doubt_of(honest) == pytest.approx(0.1)  # 2 sqrt(0.5 / 200)


def test_a_rolled_back_round_is_told_by_the_servers_figures() -> None:
    found = Outcome()
    found.round_done(0, [{"who": "all", "key": "heldout/low", "value": 0.5}])
    assert found.start == found.end == {"low": 0.5} and not found.rolled_back
    found.round_done(1, [{"who": "server", "key": "rolled_back_to", "value": 0}])
    assert found.end == {"low": 0.5} and found.rolled_back


def test_hacks_that_pay_are_told_apart_from_those_that_do_not() -> None:
    tally = Tally(honest={"east": 0.5, "west": 0.5}, references={"east": 1.0})
    tally.hacks = {"empty": {"east": 0.0, "west": 0.75}, ":": {"east": 0.5, "west": 0.25}}
    tally.failed = {"very long": "it raised"}
    pays, fails, rest = findings("correct", tally)
    assert pays.harm and "'empty'" in pays.figure and "west (+0.250)" in pays.verdict
    assert "1 of 2 hacks" in pays.verdict and "1 of 2 members" in pays.verdict
    assert pays.baseline == "honest 0.500, bare references 1.000"
    assert fails.harm and "it raised" in fails.verdict
    assert not rest.harm and rest.figure == "':' 0.375"


def test_hacks_are_short_texts_made_of_the_prompt_and_honest_completions() -> None:
    made = {name: hack("add 1 2", ["yes no", "no"]) for name, hack in HACKS.items()}
    assert made["empty"] == "" and made["the prompt again"] == "add 1 2" and made[":"] == ":"
    assert made["one word, repeated"] == " ".join(["no"] * 12)
    assert len(made["very long"].split()) == 400


def test_a_leak_is_one_beyond_doubt() -> None:
    sure = described("one", [Guess(0.95, 0.9, None), Guess(0.97, 0.9, 0.7)], 0)
    assert sure.harm and "nearly every" in sure.verdict and "tokens AUC 0.70" in sure.figure
    unsure = described("one", [Guess(0.9, 0.9, None), Guess(0.3, 0.2, None)], 0)
    assert not unsure.harm and unsure.verdict == "no better than chance in this attack"
    alone = described("one", [Guess(1.0, 1.0, None)], 0)
    assert not alone.harm  # one reply has no error
    nothing = described("one", [], 3)
    assert nothing.figure == "0 of 3 replies say anything" and not nothing.harm


def test_noise_comes_with_the_clip_that_it_needs() -> None:
    assert Setting("n", noise=0.5).gate(4.0) == {"clip_norm": 2.0, "noise_multiplier": 0.5}
    assert Setting("n", noise=0.0).gate(4.0) == {"clip_norm": 2.0, "noise_multiplier": None}
    assert Setting("n").gate(4.0) is None
