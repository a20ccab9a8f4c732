"""A site works under the contract that it has accepted, and goes on under it when its service starts again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedpact.core.lora import initial_adapter
from fedpact.errors import RefusedError, UnacceptedError
from fedpact.messages import Differentiate, Differentiated, Hello, Introduced, Train, Trained
from fedpact.runtime import acceptance
from fedpact.runtime.client_config import ClientConfig, load_client
from fedpact.runtime.codec import encode
from fedpact.runtime.config import load_run
from fedpact.runtime.contract import contract_hash, contract_of
from fedpact.runtime.engines import Engines, hash_of, skeleton
from fedpact.runtime.envelope import Envelope, seal, unwrap
from fedpact.runtime.member import Member
from fedpact.types import Adapter
from tests.cli.conftest import model, write_project

__all__ = ["model"]

SMALL = ["rollout.num_generations=2", "rollout.max_completion_length=2", "training.prompts_per_step=1"]


class Site:
    """A member's files, from which its service can be started again and again."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.run_file, self.model, self.home = write_project(folder, model=model), model, folder / "home"
        self.config: ClientConfig = load_client(self.run_file.parent / "clients" / "east.toml")

    def start(self, **site: object) -> Member:
        config = self.config.model_copy(update={"site": self.config.site.model_copy(update=site)})
        folder = self.run_file.parent / "clients"
        engines = Engines()
        member = Member(config, folder=folder, home=self.home, where="east.toml", engines=engines, model=self.model)
        member.restore()
        return member

    def contract(self, *overrides: str) -> str:
        config = load_run(self.run_file, [*SMALL, *overrides])
        return contract_of(config, model=hash_of(self.model)).canonical()

    def adapter(self) -> Adapter:
        policy = load_run(self.run_file, SMALL).policy
        return initial_adapter(skeleton(policy, where="run.toml", folder=self.run_file.parent).layers, 1)


@pytest.fixture
def site(tmp_path: Path, model: Path) -> Site:
    return Site(tmp_path, model)


def hello(contract: str, run: str = "r") -> Envelope:
    return seal(Hello(contract), run=run, contract=contract_hash(contract), round=0, exchange=0)


def train(adapter: Adapter, contract: str, run: str = "r", **where: object) -> Envelope:
    at = {"run": run, "contract": contract_hash(contract), "round": 1, "exchange": 0, "nonce": "n"}
    return seal(Train(adapter), **{**at, **where})


def test_a_contract_is_refused_until_it_is_accepted_and_then_taken_without_a_restart(site: Site) -> None:
    contract, member = site.contract(), site.start()
    with pytest.raises(UnacceptedError, match=r"no contract is accepted; .* `fedpact site accept`"):
        member.handle(encode(hello(contract)))
    assert acceptance.offered_contract(site.home) == contract
    acceptance.accept(site.home, contract)
    assert acceptance.offered_contract(site.home) is None
    envelope = hello(contract)
    introduced = unwrap(envelope, member.handle(encode(envelope)))
    assert isinstance(introduced, Introduced) and introduced.name == "east"


def test_another_contract_than_the_accepted_one_is_refused_with_both_named(site: Site) -> None:
    ours, other = site.contract(), site.contract("seed=99")
    acceptance.accept(site.home, ours)
    with pytest.raises(UnacceptedError) as caught:
        site.start().handle(encode(hello(other)))
    assert contract_hash(ours) in str(caught.value) and contract_hash(other) in str(caught.value)


def test_what_the_client_file_accepts_stands_above_what_was_accepted_by_command(site: Site) -> None:
    ours, other = site.contract(), site.contract("seed=99")
    acceptance.accept(site.home, other)
    with pytest.raises(UnacceptedError):
        site.start(accept=contract_hash(ours)).handle(encode(hello(other)))


def test_a_malformed_contract_is_not_kept_to_be_read(site: Site) -> None:
    member = site.start()
    for text in ("{}", "x" * 300_000, '{"seed": "\\ud800"}', site.contract()[:-1] + ',"more":1}'):
        with pytest.raises(RefusedError):
            member.handle(encode(seal(Hello(text), run="r", contract="c" * 64, round=0, exchange=0)))
    assert acceptance.offered_contract(site.home) is None


def test_a_service_that_starts_again_goes_on_under_its_contract_and_answers_from_its_store(site: Site) -> None:
    contract, adapter = site.contract(), site.adapter()
    acceptance.accept(site.home, contract)
    first = site.start()
    first.handle(encode(hello(contract)))
    asked = train(adapter, contract)
    before = unwrap(asked, first.handle(encode(asked)))
    site.model = site.home / "gone"  # working it out again would need the model
    again = site.start()
    assert again.accepted == contract_hash(contract)
    after = unwrap(asked, again.handle(encode(asked)))
    assert isinstance(before, Trained) and isinstance(after, Trained)
    assert all(torch.equal(before.adapter[name], after.adapter[name]) for name in adapter)


def test_a_restarted_service_takes_requests_of_the_run_that_said_hello_alone(site: Site) -> None:
    contract, adapter = site.contract(), site.adapter()
    acceptance.accept(site.home, contract)
    site.start().handle(encode(hello(contract)))
    again = site.start()
    with pytest.raises(RefusedError):
        again.handle(encode(train(adapter, contract, run="another")))


def test_a_restarted_service_whose_settings_no_longer_allow_the_contract_has_none(site: Site) -> None:
    contract = site.contract()
    acceptance.accept(site.home, contract)
    site.start().handle(encode(hello(contract)))
    assert site.start(max_completion_length=1).accepted is None


def test_gradients_are_not_given_to_a_run_whose_contract_asks_for_none(site: Site) -> None:
    with_map, without = site.contract(), site.contract("evaluation.conflicts=false")
    for contract in (with_map, without):
        acceptance.accept(site.home, contract)
        member = site.start(share=("rewards", "gradients"))
        member.handle(encode(hello(contract)))
        where = {"run": "r", "contract": contract_hash(contract), "round": 1, "exchange": 0}
        asked = seal(Differentiate(site.adapter(), 4, 7), **where)
        if contract == with_map:
            assert isinstance(unwrap(asked, member.handle(encode(asked))), Differentiated)
        else:
            with pytest.raises(RefusedError, match="the accepted contract asks for none"):
                member.handle(encode(asked))


def test_a_simulation_keeps_no_acceptance(site: Site) -> None:
    contract = site.contract()
    folder = site.run_file.parent / "clients"
    member = Member(
        site.config,
        folder=folder,
        home=site.home,
        where="east.toml",
        engines=Engines(),
        model=site.model,
        simulation=True,
    )
    member.handle(encode(hello(contract)))
    assert not (site.home / "memory" / "hello").exists()
