"""A server that asks for more than was agreed on: each request is refused, or harmless.

Only harmless, and not refused, because no rule of one request can tell them from an honest server's:

- an evaluation of any adapter, again and again: its answer is a mean over at least `min_samples` held-out completions,
  to three digits. A server that builds adapters for it learns about means, one small step at a time.
- a second training in a round by a member that sets no ceiling of steps: a third-party algorithm may do so. Its steps
  are those of a longer run, and where there is noise each of them is counted.
- a sketch as long as the adapter, of a member that shares gradients: `share` says that these leave.
- ratings of the member's own training prompts: ratings are the product, and the same for prompts that it never saw. A
  member with trusted answers does show by them which questions it has answers to.
- "since" of nothing: the member starts from an empty memory, as at the beginning of a run.
- texts that name code, paths or URLs in what is rated: they are rated, as texts.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpact.algorithms.fedavg import FedAvg
from fedpact.core.lora import flatten
from fedpact.errors import ConfigError, FedPactError, RefusedError, StoreError
from fedpact.messages import (
    Count,
    Differentiate,
    Evaluate,
    Evaluated,
    Examine,
    Fit,
    Hello,
    Reply,
    Score,
    Train,
    Trained,
)
from fedpact.runtime.budget import Budget, released
from fedpact.runtime.client_config import SiteSettings
from fedpact.runtime.codec import decode, encode
from fedpact.runtime.contract import contract_hash
from fedpact.runtime.envelope import Answer
from fedpact.runtime.gate import Gate
from fedpact.runtime.gaussian import gaussian
from fedpact.runtime.ledger import Ledger
from fedpact.types import Adapter, Prompts
from tests.cli.conftest import model
from tests.runtime.test_hostile_messages import Site, Sites

__all__ = ["model"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Sites:
    return Sites(tmp_path_factory.mktemp("sites"), model)


@pytest.fixture(scope="module")
def trains(sites: Sites) -> Site:
    return sites.make("fedavg")


@pytest.fixture(scope="module")
def judges(sites: Sites) -> Site:
    return sites.make("fedgrpo")


def refused(site: Site, request: Any, kind: type[FedPactError] = RefusedError, **where: Any) -> str:
    """The line of a refusal, after looking at its exit code, the ledger's line and what was kept."""
    before, lines = site.state(), len(Ledger.entries(site.member.ledger.path))
    with pytest.raises(kind) as error:
        site.send(request, **where)
    assert error.value.exit_code == {RefusedError: 3, ConfigError: 2, StoreError: 4}[kind]
    entries = Ledger.entries(site.member.ledger.path)
    last = entries[-1]
    assert len(entries) == lines + 1
    assert (last["decision"], last["reason"], last["verb"]) == ("refused", type(error.value).__name__, request.verb)
    assert "reply" not in last and site.state() == before
    return str(error.value)


def moved(adapter: Adapter, by: float = 0.01) -> Adapter:
    return {name: tensor + by for name, tensor in adapter.items()}


# --- code, paths, URLs ----------------------------------------------------------------------------------------------

MARK = "evil_mark"
EVIL = [f"{MARK}.module:run", f"/{MARK}/etc/passwd", f"../../{MARK}", f"http://{MARK}.example/x", f"$({MARK})"]
EVIL += [f"__import__('{MARK}')", f"file:///{MARK}", f"{MARK}.py:reward", f"gym:{MARK}", f"datasets:{MARK}"]
_heard: list[str] = []
_listening = [False]


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening[0] and event.split(".")[0] in {
        "open",
        "import",
        "exec",
        "compile",
        "subprocess",
        "socket",
        "os",
        "urllib",
    }:
        _heard.append(f"{event} {arguments!r:.2000}")


@pytest.fixture(scope="module")
def heard() -> list[str]:
    """What Python was made to open, import, run or connect to."""
    sys.addaudithook(_listen)
    return _heard


@pytest.mark.parametrize("evil", EVIL)
def test_no_text_of_the_server_is_opened_imported_run_or_connected_to(trains, judges, heard, evil):
    heard.clear()
    _listening[0] = True
    asked = Prompts(
        [evil, [{"role": "user", "content": evil}]], torch.arange(2), {"id": [evil, evil], evil: [evil, evil]}
    )
    contract = trains.contract
    forged = contract.replace('"model":"', f'"model":"{evil}')
    answered = []
    try:
        for site, request, where in [
            (trains, Hello(forged), {}),
            (trains, Hello(evil), {}),
            (trains, Train({**trains.adapter, evil: torch.zeros(1)}), {}),
            (trains, Train(trains.adapter, None, {evil: 1.0}), {}),
            (trains, Train(trains.adapter), {"run": evil}),
            (trains, Train(trains.adapter), {"contract": evil}),
            (trains, Evaluate({evil: torch.zeros(1)}), {}),
            (trains, Differentiate({evil: torch.zeros(1)}, 1, 1, evil), {}),
            (trains, Count((evil,)), {}),
            (judges, Score(asked.select([0]), torch.tensor([0]), [evil]), {}),
            (judges, Examine(asked.select([0]), [evil], [evil]), {}),
        ]:  # fmt: skip
            try:
                answered.append(type(site.send(request, **where)).__name__)
            except RefusedError as error:
                assert "\n" not in str(error)
    finally:
        _listening[0] = False
    assert answered == ["Scored", "Examined"]
    assert any("ledger.jsonl" in one for one in heard)  # it does listen
    assert [one for one in heard if MARK in one] == []


def test_a_contract_cannot_bring_keys_that_name_code_even_where_any_contract_is_accepted(trains):
    gate = Gate(SiteSettings(), where="north.toml", home=Path("unused"), simulation=True)
    text = trains.contract
    gate.accept(text)
    for old, new in [
        ('"seed":', '"trust_remote_code":true,"seed":'),
        ('"seed":', '"rewards":{"low":{"use":"os:system"}},"seed":'),
        ('"seed":', '"prompts":{"path":"/etc/passwd"},"seed":'),
        ('"name":"fedavg"', '"name":"os.system"'),
        ('"name":"fedavg"', '"name":"fedavg","path":"http://evil.example"'),
        ('"low":{', '"low":{"use":"evil:run",'),
    ]:
        assert old in text
        with pytest.raises(RefusedError, match="contract not understood") as error:
            gate.accept(text.replace(old, new, 1))
        assert "\n" not in str(error.value)


# --- more than was agreed on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "ceiling", "says"),
    [
        ("rollout.max_completion_length=3", {"max_completion_length": 2}, "max_completion_length: the run asks for 3"),
        ("training.num_iterations=3", {"max_local_steps": 5}, "max_local_steps: the run asks for 6, allowed are 5"),
        ("optimizer.learning_rate=0.5", {"max_learning_rate": 0.1}, "max_learning_rate: the run asks for 0.5"),
        ("rounds=4", {"max_rounds": 3}, "max_rounds: the run asks for 4, allowed are 3"),
    ],
)
def test_a_contract_above_a_ceiling_is_refused(sites, override, ceiling, says):
    with pytest.raises(RefusedError, match=says) as error:
        sites.make("fedavg", override, **ceiling)
    assert error.value.exit_code == 3


def test_rounds_beyond_the_contract_are_refused(trains):
    assert "a request of round 4; the accepted contract has 3" in refused(trains, Train(trains.adapter), round=4)


def test_more_trainings_in_a_round_share_the_ceiling_of_its_steps(sites):
    site = sites.make("fedavg", max_local_steps=2)  # what the contract asks for
    first = site.send(Train(site.adapter), round=1)
    for where in ({"exchange": 1}, {"exchange": 0, "since": (1, 0)}, {"exchange": 7}):
        if "since" not in where:
            says = refused(site, Train(site.adapter), round=1, **where)
            assert "site.max_local_steps: round 1 asks for 4, allowed are 2" in says
    assert "round 1 asks for 4" in refused(site, Train(moved(site.adapter)), round=1)
    again = site.send(Train(site.adapter), round=1, attempt=1, nonce="again")
    assert flatten(again.adapter).equal(flatten(first.adapter))  # asked again, not trained again
    site.send(Train(site.adapter), round=2, since=(1, 0))


def test_another_run_has_to_say_hello_first_and_the_ledger_has_it(sites):
    site = sites.make("fedavg")
    assert "hello was said by run 'r'" in refused(site, Train(site.adapter), run="second")
    site.send(Hello(site.contract), run="second", round=0)
    assert (site.last()["verb"], site.last()["run"], site.last()["decision"]) == ("hello", "second", "sent")
    site.send(Train(site.adapter), run="second")


def test_a_contract_that_changes_in_mid_run_is_refused_and_the_accepted_one_stays(trains):
    trains.send(Train(trains.adapter), round=1)
    other = trains.contract.replace('"rounds":3', '"rounds":2')
    assert other != trains.contract
    assert "site.accept" in refused(trains, Hello(other), round=0)
    under = contract_hash(other)
    assert "request under contract" in refused(trains, Train(trains.adapter), contract=under)
    spaced = trains.contract.replace(":", ": ")  # the same contract, in another text
    assert "site.accept" in refused(trains, Hello(spaced), round=0)
    # The hash that an envelope claims is not believed: the text's own is compared.
    assert "site.accept" in refused(trains, Hello(other), round=0, contract=contract_hash(trains.contract))
    assert trains.member.accepted == contract_hash(trains.contract)


# --- what is private ------------------------------------------------------------------------------------------------


def test_a_private_adapter_is_not_asked_for_by_name_and_shows_in_means_only(sites):
    site = sites.make("fedavg", "policy.private={ r = 1, lora_alpha = 3 }", min_samples=1)
    trained = site.send(Train(site.adapter), round=1)
    assert sorted(trained.adapter) == sorted(site.adapter)
    kept = site.member.store.load((1, 0))
    private = {name: tensor for name, tensor in kept.items() if name.startswith("private/")}
    assert len(private) == len(site.adapter)
    blank = {name: torch.zeros_like(tensor) for name, tensor in private.items()}
    for request in (Train({**site.adapter, **blank}), Evaluate({**site.adapter, **blank}, personal=True)):
        assert "'private/" in refused(site, request, since=(1, 0))
    reply = site.send(Evaluate(site.adapter, personal=True), since=(1, 0))
    assert isinstance(reply, Evaluated) and reply.rewards.shape == (2,)
    raw = encode(reply)
    assert not any(tensor.numpy().tobytes() in raw for tensor in private.values())


def test_a_member_that_trains_gives_no_rewards_of_single_completions(trains):
    asked = Prompts(["w1", "w2"], torch.arange(2), {})
    for request in (
        Score(asked, torch.tensor([0, 1]), ["w3", "w4"]),
        Fit(asked, torch.tensor([0, 1]), ["w3", "w4"]),
        Examine(asked, ["w3", "w4"], ["w5", "w6"]),
    ):
        assert f"fedavg sends no '{request.verb}' requests" in refused(trains, request)


def test_any_adapter_may_be_evaluated_and_only_means_of_enough_come_back_to_three_digits(sites):
    few = sites.make("fedavg", "evaluation.num_generations=1")
    many = sites.make("fedavg", "evaluation.num_generations=9")
    for exchange, by in enumerate((0.0, 0.3, 1.0)):
        reply = few.send(Evaluate(moved(few.adapter, by)), exchange=exchange)
        assert bool(reply.rewards.isnan().all()) and reply.accuracy is None and reply.counts.tolist() == [0, 0]
        reply = many.send(Evaluate(moved(many.adapter, by)), exchange=exchange)
        assert reply.counts.min() >= 20
        assert all(float(f"{float(value):.3g}") == pytest.approx(float(value), rel=1e-6) for value in reply.rewards)


@pytest.mark.parametrize("compression", ["projection", "svd"])
def test_a_whole_gradient_is_only_for_those_who_share_gradients(sites, trains, compression):
    d = sum(tensor.numel() for tensor in trains.adapter.values())
    request = Differentiate(trains.adapter, rank=d, seed=0, compression=compression)
    if compression == "svd":
        assert "site.share" in refused(trains, request)
    else:
        reply = trains.send(request, exchange=4)
        assert all(bool(t.isnan().all()) for t in (reply.gramian, reply.sketch, reply.rewards)) and reply.weight == 1
    shares = sites.make("fedavg", "rollout.num_generations=8", "rollout.max_completion_length=5", share=("gradients",))
    reply = shares.send(request)
    assert bool(reply.rewards.isnan().all())  # not shared
    assert bool(reply.gramian.isfinite().any())


def test_the_mean_reward_beside_gradients_is_rounded_and_rests_on_enough(sites):
    share = ("gradients", "rewards")
    for site, told in (
        (sites.make("fedcmoo", share=share, min_samples=1), True),
        (sites.make("fedcmoo", share=share), False),
    ):
        reply = site.send(Differentiate(site.adapter, rank=4, seed=0))
        kept = reply.rewards[~reply.rewards.isnan()].tolist()
        assert bool(kept) == told
        assert all(value == pytest.approx(float(f"{value:.3g}"), rel=1e-6) for value in kept)


def test_ratings_do_not_tell_whether_a_prompt_was_trained_on(judges):
    own = list(judges.member.train_prompts.text[:3])
    strange = ["w57 w56", "never seen", "w0"]
    completions = ["w1 w58", "w40", "w2 w3 w44"]
    told: list[Tensor] = []
    for exchange, texts in enumerate((own, strange)):
        asked = Prompts(texts, torch.arange(3), {"answer": ["CANARY"] * 3, "canary": [True] * 3})
        told.append(judges.send(Score(asked, torch.arange(3), completions), exchange=exchange).rewards)
    assert told[0].equal(told[1])


# --- asked again ----------------------------------------------------------------------------------------------------


def test_the_same_request_again_gets_the_same_bytes(trains):
    envelope = trains.envelope(Train(trains.adapter), round=3)
    first = decode(Answer, trains.member.handle(encode(envelope)))
    line = trains.last()
    again = decode(Answer, trains.member.handle(encode(envelope)))
    assert again.reply == first.reply and again.head != first.head
    assert (trains.last()["reply"], trains.last()["request"]) == (line["reply"], line["request"])


def test_an_older_memory_is_kept_no_longer_than_the_server_may_need_it(sites):
    site = sites.make("scaffold")
    control = {f"control/{name}": torch.zeros_like(tensor) for name, tensor in site.adapter.items()}
    request = Train({**site.adapter, **control})
    for round in (1, 2, 3):
        site.send(request, round=round, since=(round - 1, 0) if round > 1 else None)
    assert "kept are: 2-0, 3-0" in refused(site, request, StoreError, round=3, exchange=1, since=(1, 0))
    reply = site.send(request, round=3, exchange=1, since=None)  # from nothing, as at first
    assert isinstance(reply, Trained)


# --- noise ----------------------------------------------------------------------------------------------------------

NOISE: dict[str, Any] = {"clip_norm": 0.5, "noise_multiplier": 2.0}


def noise_in(site: Site, bare: Site, request: Train, **where: Any) -> Tensor:
    """What noise a member added: its reply less that of its twin, which only clips."""
    pytest.importorskip("dp_accounting")
    told, clean = (flatten(one.send(request, **where).adapter).double() for one in (site, bare))
    return told - clean


def alike(one: Tensor, other: Tensor) -> float:
    """The cosine of two noises; by chance about 0.02 here."""
    return abs(float(one @ other / (one.norm() * other.norm())))


def test_a_server_that_knows_all_that_is_public_cannot_remove_the_noise(sites):
    noisy, twin, bare = (
        sites.make("fedavg", **NOISE),
        sites.make("fedavg", **NOISE),
        sites.make("fedavg", clip_norm=0.5),
    )
    request = Train(noisy.adapter)
    found = noise_in(noisy, bare, request)
    assert float(found.std()) == pytest.approx(1.0, abs=0.05)  # 2 * 0.5, over 3,000 numbers
    # The server plays the whole member, with the same data even, under a secret of its own.
    assert alike(found, noise_in(twin, bare, request, exchange=0)) < 0.1
    envelope, d = noisy.envelope(request), len(found)
    contract = noisy.contract
    for guess in (contract, contract_hash(contract), envelope.digest(), str(noisy.member.contract.seed), "r", "east"):
        secret = guess.encode().ljust(32, b"\0")
        for parts in (["r", 2, 0, envelope.digest()], [contract_hash(contract)], []):
            assert alike(found, gaussian(secret, parts, d)) < 0.1
    # With the member's secret, and only with it, the noise is known: this test can fail.
    copied = sites.make("fedavg", **NOISE)
    shutil.copy(noisy.member.home / "secret", copied.member.home / "secret")
    assert alike(found, noise_in(copied, bare, request)) > 0.999


def test_the_same_round_with_another_adapter_has_fresh_noise_and_counts_twice(sites):
    noisy, bare = sites.make("fedavg", **NOISE, epsilon=100.0), sites.make("fedavg", clip_norm=0.5)
    first = noise_in(noisy, bare, Train(noisy.adapter))
    again = flatten(noisy.send(Train(noisy.adapter), attempt=1).adapter)
    other = noise_in(noisy, bare, Train(moved(noisy.adapter, 1e-6)))
    assert alike(first, other) < 0.1
    ledger = noisy.member.ledger.path
    assert released(ledger) == {2.0: 2}
    sent = [one for one in Ledger.entries(ledger) if one["decision"] == "sent" and one["verb"] == "train"]
    assert len(sent) == 3 and len({one["reply"] for one in sent}) == 2  # the retry told nothing new
    assert len(again) == len(first)


def test_the_budget_stops_it_and_a_retry_of_what_was_paid_for_is_free(sites):
    pytest.importorskip("dp_accounting")
    spent = Budget(2.0, 1e-5).after_next(sites.make("fedavg").member.ledger.path)
    noisy = sites.make("fedavg", **NOISE, epsilon=spent * 1.1)
    noisy.send(Train(noisy.adapter))
    says = refused(noisy, Train(moved(noisy.adapter)))
    assert "site.epsilon" in says and "is spent on 1 adapters" in says
    assert "site.epsilon" in refused(noisy, Train(noisy.adapter), exchange=1)
    assert isinstance(noisy.send(Train(noisy.adapter), attempt=2), Trained)
    assert released(noisy.member.ledger.path) == {2.0: 1}


def test_under_noise_nothing_exact_leaves_beside_the_adapter(sites):
    pytest.importorskip("dp_accounting")
    noisy = sites.make("fedavg", "evaluation.num_generations=9", **NOISE)
    reply = noisy.send(Train(noisy.adapter))
    assert (reply.weight, reply.accuracy, list(reply.metrics)) == (1.0, None, ["epsilon"])
    assert bool(reply.rewards.isnan().all())
    held = noisy.send(Evaluate(noisy.adapter), exchange=1)
    assert held.weight == 1.0 and bool(held.rewards.isnan().all()) and held.accuracy is None
    judge = sites.make("fedgrpo", **NOISE)
    one = Prompts(["w1"], torch.arange(1), {})
    assert "its epsilon does not cover ratings" in refused(judge, Score(one, torch.tensor([0]), ["w2"]))
    assert "does not cover" in refused(judge, Examine(one, ["w2"], ["w3"]))


# --- an algorithm that is not what it says --------------------------------------------------------------------------


def single_rewards(reply: Trained) -> Reply:
    return replace(reply, rewards=torch.rand(400))


def more_tensors(reply: Trained) -> Reply:
    return replace(reply, adapter={**reply.adapter, "prompts": torch.arange(50)})


def longer_tensors(reply: Trained) -> Reply:
    return replace(reply, adapter={name: torch.cat([t, t]) for name, t in reply.adapter.items()})


def other_kind(reply: Trained) -> Reply:
    return Evaluated(1.0, torch.rand(2), torch.arange(2), None)


def in_names(reply: Trained) -> Reply:
    return replace(reply, metrics={"the prompt is " + "w1 " * 100: 1.0})


@pytest.mark.parametrize("leak", [single_rewards, more_tensors, longer_tensors, other_kind, in_names])
def test_what_was_not_asked_for_stays_at_the_member_whatever_the_algorithm_returns(sites, monkeypatch, leak):
    sound: Any = FedAvg.train
    monkeypatch.setattr(FedAvg, "train", lambda self, request, client: leak(sound(self, request, client)))
    site = sites.make("fedavg", share=("rewards", "accuracy", "metrics"), min_samples=1)
    with pytest.raises(RefusedError) as error:
        site.send(Train(site.adapter))
    assert (site.last()["decision"], "reply" in site.last()) == ("refused", False)
    assert "\n" not in str(error.value)


def test_private_tensors_that_an_algorithm_returns_are_stripped(sites, monkeypatch):
    sound: Any = FedAvg.train

    def leaky(self: FedAvg, request: Train, client: Any) -> Trained:
        reply = sound(self, request, client)
        return replace(reply, adapter={**reply.adapter, "private/prompts": torch.arange(3.0)})

    monkeypatch.setattr(FedAvg, "train", leaky)
    site = sites.make("fedavg")
    assert sorted(site.send(Train(site.adapter)).adapter) == sorted(site.adapter)
