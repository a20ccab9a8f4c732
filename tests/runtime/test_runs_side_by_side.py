"""Runs that share a site: each has its own memory, and neither's name nor contract gets in the other's way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fedpact.errors import RefusedError, StoreError, UnacceptedError
from fedpact.messages import Trained
from fedpact.runtime import acceptance
from fedpact.runtime.codec import encode
from fedpact.runtime.contract import contract_hash
from fedpact.runtime.envelope import unwrap
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.member import Member
from tests.runtime.test_acceptance import Site, hello, model, site, train

__all__ = ["model", "site"]


def entered(site: Site, member: Member, run: str, contract: str) -> None:
    """The run says hello under a contract that the site has just accepted."""
    acceptance.accept(site.home, contract)
    member.handle(encode(hello(contract, run)))


def remembers(member: Member, value: float) -> None:
    """Keeps a number as the memory of round 1."""
    member.store.save((1, 0), {"log_weights": torch.tensor([value])}, "digest", b"reply")


def remembered(member: Member) -> float:
    return float(member.store.load((1, 0))["log_weights"])


def test_another_runs_memory_under_the_same_contract_is_not_taken_for_ones_own(site: Site) -> None:
    contract, member = site.contract(), site.start()
    entered(site, member, "a", contract)
    remembers(member, 1.0)
    entered(site, member, "b", contract)
    with pytest.raises(StoreError, match="kept are: none"):
        remembered(member)
    remembers(member, 2.0)
    entered(site, member, "a", contract)
    assert remembered(member) == 1.0
    entered(site, member, "b", contract)
    assert remembered(member) == 2.0


def test_the_memory_of_the_same_name_under_another_contract_is_not_taken_for_ones_own(site: Site) -> None:
    ours, other, member = site.contract(), site.contract("seed=99"), site.start()
    entered(site, member, "a", ours)
    remembers(member, 1.0)
    entered(site, member, "a", other)
    with pytest.raises(StoreError, match="kept are: none"):
        remembered(member)
    remembers(member, 2.0)
    entered(site, member, "a", ours)
    assert remembered(member) == 1.0


def test_a_run_that_was_put_aside_for_another_is_answered_from_its_own_store_after_a_restart(site: Site) -> None:
    contract, adapter, first = site.contract(), site.adapter(), site.start()
    entered(site, first, "a", contract)
    asked = train(adapter, contract, run="a")
    before = unwrap(asked, first.handle(encode(asked)))
    entered(site, first, "b", contract)
    theirs = train(adapter, contract, run="b")
    first.handle(encode(theirs))
    site.model = site.home / "gone"  # working it out again would need the model
    again = site.start()
    again.handle(encode(hello(contract, "a")))
    after = unwrap(asked, again.handle(encode(asked)))
    assert isinstance(before, Trained) and isinstance(after, Trained)
    assert all(torch.equal(before.adapter[name], after.adapter[name]) for name in adapter)


def test_a_site_is_in_the_run_that_said_hello_last(site: Site) -> None:
    contract, member = site.contract(), site.start()
    entered(site, member, "a", contract)
    entered(site, member, "b", contract)
    with pytest.raises(RefusedError):
        member.handle(encode(train(site.adapter(), contract, run="a")))


def test_a_new_run_under_an_old_name_may_train_as_much_as_the_old_one_did(site: Site) -> None:
    old, new, adapter = site.contract(), site.contract("seed=99"), site.adapter()
    member = site.start(max_local_steps=2)
    for contract in (old, new):  # each trains two steps in round 1 of a run "r"
        entered(site, member, "r", contract)
        member.handle(encode(train(adapter, contract)))
        with pytest.raises(RefusedError, match="max_local_steps"):
            member.handle(encode(train(adapter, contract, exchange=1)))


def test_a_site_keeps_the_models_of_one_contract_alone(site: Site) -> None:
    member, adapter = site.start(), site.adapter()
    for seed in range(3):
        contract = site.contract(f"seed={seed}")
        entered(site, member, f"r{seed}", contract)
        member.handle(encode(train(adapter, contract, run=f"r{seed}")))
    assert len(member.engines._policies) == 1


@pytest.mark.parametrize(
    "run",
    ["", "x\ny", "x\x1b[2J", "x" * 201, "x" * 300, "\u202e"],
    ids=["empty", "two lines", "escape", "201 characters", "300 characters", "right to left"],
)
def test_a_runs_name_that_cannot_be_seen_is_refused_and_leaves_a_short_line(site: Site, run: str) -> None:
    contract, member = site.contract(), site.start()
    entered(site, member, "r", contract)
    kept = (site.home / "memory" / "hello").read_bytes()
    with pytest.raises(RefusedError, match=r"east.toml: run: found .*; expected 1 to 200 characters") as caught:
        member.handle(encode(hello(contract, run)))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 120
    assert (site.home / "memory" / "hello").read_bytes() == kept
    assert [member.gate.run, site.start().gate.run] == ["r", "r"]
    last = Ledger.entries(member.ledger.path)[-1]
    assert (last["decision"], len(last["run"])) == ("refused", min(200, len(run)))
    assert len(json.dumps(last)) < 1500


def test_a_runs_name_of_200_characters_is_kept_and_gone_on_with(site: Site) -> None:
    contract = site.contract()
    entered(site, site.start(), "é" * 200, contract)
    assert site.start().gate.run == "é" * 200


def memories(site: Site) -> dict[str, Path]:
    """The folders of runs' memories."""
    return {path.name: path for path in (site.home / "memory").iterdir() if path.is_dir()}


def test_the_memories_of_the_last_four_runs_are_kept(site: Site) -> None:
    contract, member = site.contract(), site.start()
    folders = []
    for number in range(6):
        entered(site, member, f"r{number}", contract)
        remembers(member, number)
        folders.append(member.store.folder)
        os.utime(member.store.folder, ns=(number, number))  # a disk's clock may not tell these apart
    assert set(memories(site).values()) == set(folders[2:])
    entered(site, member, "r2", contract)
    assert remembered(member) == 2.0
    entered(site, member, "r6", contract)
    assert set(memories(site).values()) == {folders[2], *folders[4:], member.store.folder}, "r3 was here longest ago"


def test_a_restart_does_not_offer_the_contract_that_was_there_before(site: Site) -> None:
    old, new = site.contract(), site.contract("seed=99")
    entered(site, site.start(), "r", old)
    acceptance.accept(site.home, new)
    assert site.start().accepted is None
    assert acceptance.offered_contract(site.home) is None


def test_a_restart_does_not_put_an_old_contract_in_the_place_of_the_one_offered(site: Site) -> None:
    old, new, member = site.contract(), site.contract("seed=99"), site.start()
    entered(site, member, "r", old)
    (site.home / "accepted.json").unlink()  # withdrawn
    with pytest.raises(UnacceptedError):
        member.handle(encode(hello(new, "s")))
    site.start()
    assert acceptance.offered_contract(site.home) == new
    assert contract_hash(new) != contract_hash(old)
