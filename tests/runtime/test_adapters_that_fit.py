"""Whole runs with private adapters, single factors, mixed ranks and server optimisers."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedpact.core.lora import LoraLayer, initial_adapter
from fedpact.core.low_rank import product
from fedpact.errors import InadmissibleError
from fedpact.messages import Evaluate, Hello, Introduced, Reply, Train, Trained
from fedpact.runtime.adapters import at_rank, completed, for_rank, refuse_rank, trained_factor
from fedpact.runtime.admission import Limits, admit
from fedpact.runtime.codec import decode
from fedpact.runtime.config import load_run
from fedpact.runtime.envelope import Envelope, unwrap
from fedpact.seeding import key
from fedpact.settings import TrainingSettings
from fedpact.types import Adapter
from tests.cli.conftest import (
    MEMBERS,
    edit,
    files,
    in_process,
    model,
    refusal,
    results,
    stop_in_round,
    write_project,
)
from tests.runtime.watched import Watched, figures, launched

__all__ = ["model"]

PRIVATE = "policy.private={ r = 1, lora_alpha = 3 }"
RUNS = {
    "plain": [],
    "momentum": ['server_optimizer={ name = "momentum", beta1 = 0.5 }'],
    "yogi": ['server_optimizer={ name = "yogi", learning_rate = 1e-2 }'],
    "personal": [
        PRIVATE,
        'training.trainable="B"',
        'server_optimizer={ name = "adam", learning_rate = 1e-2 }',
        "evaluation.greedy=true",
    ],
    "alternating": [
        'training.trainable="alternating"',
        'loss.surrogate="ppo"',
    ],
    "products": ['federation.averaging="products"', PRIVATE],
}
"""Overrides of a run of two rounds; in "products" the member east has rank 1 of 2."""


class Runs:
    """Each of `RUNS`, made when it is first asked for."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.found: dict[str, tuple[Watched, Path]] = {}
        self.run_files = {kind: write_project(folder / kind, model=model, rounds=2) for kind in ("alike", "mixed")}
        east = self.run_files["mixed"].parent / "clients" / "east.toml"
        edit(east, 'task = "odd"', 'task = "odd"\nrank = 1')

    def run_file(self, name: str) -> Path:
        return self.run_files["mixed" if name == "products" else "alike"]

    def options(self, name: str) -> list[str]:
        overrides = ["evaluation.conflicts=false", "evaluation.num_prompts=2", *RUNS[name]]
        return [part for one in overrides for part in ("--set", one)]

    def __getitem__(self, name: str) -> tuple[Watched, Path]:
        if name not in self.found:
            watched = Secrets() if name in ("personal", "products") else Watched()
            self.found[name] = launched(self.run_file(name), *self.options(name), watched=watched, name=name)
            assert watched.losses == {}
        return self.found[name]


class Secrets(Watched):
    """It also collects the bytes of every private tensor that a member has, and all that the server writes."""

    def __init__(self) -> None:
        super().__init__(self.look)
        self.secrets, self.spooled = set[bytes](), list[tuple[str, bytes]]()

    def look(self, who: str, envelope: Envelope, reply: Reply) -> Reply:
        transport: Any = self.inner
        home = transport.members[who].store
        remembered = home.load((envelope.round, envelope.exchange)) if envelope.verb != "hello" else {}
        self.secrets |= {raw(tensor) for name, tensor in remembered.items() if name.startswith("private/")}
        self.spooled += files(home.folder.parents[2] / "rounds").items()
        return reply


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), model)


def raw(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def replies(watched: Watched, round: int) -> dict[str, Trained]:
    """What the members sent when they were asked to train in that round."""
    found = {who: (one, data) for who, one, data in watched.answers if (one.round, one.verb) == (round, "train")}
    opened = {who: unwrap(one, data) for who, (one, data) in found.items()}
    return {who: reply for who, reply in opened.items() if isinstance(reply, Trained)}


def checkpoint(out: Path, round: int) -> Adapter:
    found: Adapter = load_file(out / "rounds" / f"{round:04d}" / "adapter_model.safetensors")
    return found


def server_memory(out: Path, round: int) -> dict[str, Tensor]:
    path = out / "rounds" / f"{round:04d}" / "memory.safetensors"
    found: dict[str, Tensor] = load_file(path) if path.exists() else {}
    return found


def layer_of(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")


def rows(out: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, (out / "metrics.jsonl").read_text().splitlines())


def factors(adapter: Adapter) -> set[str]:
    return {"A" if ".lora_A." in name else "B" for name in adapter}


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("personal", marks=pytest.mark.slow), "alternating", "products"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(runs: Runs, name: str) -> None:
    expected = results(runs[name][1])
    run_file = runs.run_file(name)
    out = run_file.parent / "runs" / "run"
    stop_in_round(run_file, 2, calls=4, number=signal.SIGTERM)
    assert in_process("run", run_file, *runs.options(name)) == 143
    assert list((out / "rounds" / "0002.partial").glob("*/*.safetensors"))
    assert in_process("resume", out) == 0
    assert results(out) == expected
    shutil.rmtree(out)


# --- private adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["personal", "products"])
def test_a_private_adapter_never_leaves_its_member(runs: Runs, name: str) -> None:
    watched, out = runs[name]
    assert isinstance(watched, Secrets)
    assert len({secret for secret in watched.secrets if any(secret)}) > 50  # of three members, in two rounds
    server_side = [(path, data) for path, data in files(out).items() if not path.startswith("clients/")]
    messages = [(f"to {who}", data) for who, _, data in watched.sent]
    messages += [(f"from {who}", data) for who, _, data in watched.answers]
    assert {path.split("/")[0] for path, _ in watched.spooled} > {"0001.partial", "0002.partial"}
    everything = [*messages, *server_side, *watched.spooled]
    assert [where for where, data in everything if b"private/" in data] == []
    whole = b"".join(data for _, data in everything)
    assert not any(secret in whole for secret in watched.secrets if any(secret))
    assert all(raw(tensor) in whole for tensor in checkpoint(out, 1).values())  # such a search finds what is there


def test_a_member_remembers_its_private_adapter_and_trains_both_factors_of_it(runs: Runs) -> None:
    _, out = runs["personal"]
    names = checkpoint(out, 2).keys()
    found = {}
    for who in MEMBERS:
        memory = load_file(max((out / "clients" / who / "memory").glob("0002-*.safetensors")))
        found[who] = {name.removeprefix("private/"): t for name, t in memory.items() if name.startswith("private/")}
        assert found[who].keys() == names
        assert ranks(found[who]) == {1}
        a = {name: tensor for name, tensor in found[who].items() if ".lora_A." in name}
        layers = [LoraLayer(layer_of(name), tensor.shape[1], 1, r=1, scale=1.0) for name, tensor in a.items()]
        start = initial_adapter(layers, key(7, who, "private adapter"))
        assert all(0 < float((tensor - start[name]).abs().max()) < 0.1 for name, tensor in a.items())
        assert all(float(tensor.abs().max()) > 0 for tensor in found[who].values())
    assert not any(torch.equal(found["east"][name], found["north"][name]) for name in names)


def test_held_out_results_are_measured_with_and_without_the_private_adapter(runs: Runs) -> None:
    found: dict[tuple[int, str, str], float] = {}
    for row in rows(runs["personal"][1]):
        if row["key"].startswith("heldout"):
            found[row["round"], row["who"], row["key"]] = row["value"]
    for round in (0, 2):
        for who in (*MEMBERS, "all"):
            for kind in ("heldout", "heldout_greedy", "heldout_personal", "heldout_personal_greedy"):
                assert (round, who, f"{kind}/low") in found
    for who in MEMBERS:  # a fresh private adapter changes nothing
        assert found[0, who, "heldout_personal_greedy/brief"] == found[0, who, "heldout_greedy/brief"]
    assert not any("personal" in row["key"] for row in rows(runs["plain"][1]))


def test_only_personal_requests_meet_the_private_adapter(runs: Runs) -> None:
    watched, _ = runs["personal"]
    asked = [(round, request.greedy, request.personal) for round, _, request in watched.asked(Evaluate)]
    assert asked.count((2, False, True)) == asked.count((2, False, False)) == len(MEMBERS)


# --- single factors -------------------------------------------------------------------------------------------------


def test_with_b_alone_no_a_is_sent_back_and_a_keeps_its_bits(runs: Runs) -> None:
    watched, out = runs["personal"]
    for round in (1, 2):
        assert [factors(reply.adapter) for reply in replies(watched, round).values()] == [{"B"}] * 3
    before, after = checkpoint(out, 0), checkpoint(out, 2)
    assert {name for name in before if torch.equal(before[name], after[name])} == {n for n in before if "lora_A" in n}


def test_with_b_alone_the_uplink_is_half(runs: Runs) -> None:
    def uplink(name: str) -> int:
        ledger = (runs[name][1] / "ledger.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in ledger]
        return sum(one["bytes_in"] for one in lines if one["decision"] == "admitted" and one["verb"] == "train")

    assert 0.45 < uplink("personal") / uplink("plain") < 0.6  # the tiny layers' B is a little larger than their A


def test_alternating_sends_b_in_odd_rounds_and_a_in_even_ones(runs: Runs) -> None:
    watched, out = runs["alternating"]
    for round, factor in ((1, {"B"}), (2, {"A"})):
        assert [factors(reply.adapter) for reply in replies(watched, round).values()] == [factor] * 3
    before, after = checkpoint(out, 0), checkpoint(out, 1)
    assert factors({name: after[name] for name in after if not torch.equal(before[name], after[name])}) == {"B"}


def test_alternating_trains_b_before_the_first_round_since_a_has_no_gradient_there() -> None:
    alternating = TrainingSettings(trainable="alternating")
    assert [alternating.factor(round) for round in range(5)] == ["B", "B", "A", "B", "A"]


def test_the_mean_of_single_factors_is_exact_and_that_of_both_is_not(runs: Runs) -> None:
    for name in ("personal", "alternating"):
        found = figures(runs[name][1], "averaging_error")
        assert sorted(found) == [1, 2]
        assert max(found.values()) <= 1e-6, name
    assert all(1e-4 < error < 1 for error in figures(runs["plain"][1], "averaging_error").values())


def test_the_averaging_error_is_that_of_the_products(runs: Runs) -> None:
    watched, out = runs["plain"]
    found = replies(watched, 1)
    total = sum(reply.weight for reply in found.values())
    missed = whole = 0.0
    mean = checkpoint(out, 1)
    for layer in product(mean):
        exact = torch.stack([reply.weight / total * product(reply.adapter)[layer] for reply in found.values()]).sum(0)
        missed += float((exact - product(mean)[layer]).square().sum())
        whole += float(exact.square().sum())
    assert figures(out, "averaging_error")[1] == pytest.approx((missed / whole) ** 0.5, rel=1e-4)


A, B = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"


def small(a: float, b: float, *, r: int = 2) -> Adapter:
    return {A: torch.full((r, 3), a), B: torch.full((4, r), b)}


def trained(adapter: Adapter) -> Trained:
    return Trained(weight=1.0, adapter=adapter, rewards=torch.zeros(1), accuracy=None)


@pytest.mark.parametrize(("factor", "sent", "other"), [("B", B, A), ("A", A, B)])
def test_the_factor_that_was_not_trained_is_completed_as_it_was_sent(factor: Any, sent: str, other: str) -> None:
    left = trained_factor(small(1, 2), factor)
    assert list(left) == [sent]
    whole = completed(trained(left), Train(small(5, 6)), factor)
    assert isinstance(whole, Trained)
    assert torch.equal(whole.adapter[sent], small(1, 2)[sent])
    assert torch.equal(whole.adapter[other], small(5, 6)[other])


def test_a_member_that_sends_the_frozen_factor_back_is_refused(runs: Runs) -> None:
    def both(who: str, envelope: Envelope, reply: Reply) -> Reply:
        if not (who == "east" and isinstance(reply, Trained)):
            return reply
        request = envelope.open()
        assert isinstance(request, Train)
        return trained({**request.adapter, **reply.adapter})

    options = [*runs.options("plain"), "--set", 'training.trainable="B"', "--set", "rounds=1"]
    watched, out = launched(runs.run_file("plain"), *options, watched=Watched(both), name="both")
    assert list(watched.losses) == ["east"]
    assert "was not to be trained (training.trainable), and came back" in watched.losses["east"]
    assert [factors(reply.adapter) for who, reply in replies(watched, 1).items()] == [{"B"}] * 3
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [(one["peer"], one["verb"]) for one in ledger if one["decision"] == "refused"] == [("east", "train")]


def test_a_member_that_sends_the_other_factor_alone_is_not_admitted() -> None:
    with pytest.raises(InadmissibleError, match=r"lora_A\.weight' was not to be trained"):
        completed(trained({A: torch.zeros(2, 3)}), Train(small(0, 0)), "B")
    nothing = completed(trained({}), Train(small(0, 0)), "B")
    with pytest.raises(InadmissibleError, match=r"lora_B\.weight' is missing"):
        admit(nothing, Limits(1), Train(small(0, 0)))


# --- mixed ranks ----------------------------------------------------------------------------------------------------


def ranks(adapter: Adapter) -> set[int]:
    return {tensor.shape[0] if ".lora_A." in name else tensor.shape[1] for name, tensor in adapter.items()}


def test_a_member_of_smaller_rank_is_sent_and_sends_that_rank(runs: Runs) -> None:
    watched, out = runs["products"]
    for kind in (Train, Evaluate):
        for _, who, request in watched.asked(kind):
            assert ranks(request.adapter) == {1 if who == "east" else 2}, (kind, who)
    for round in (1, 2):
        found = {who: ranks(reply.adapter) for who, reply in replies(watched, round).items()}
        assert found == {"east": {1}, "north": {2}, "south": {2}}
    assert ranks(load_file(out / "final" / "adapter_model.safetensors")) == {2}
    assert isinstance(watched, Secrets)
    kept = {path: data for path, data in watched.spooled if path.endswith("partial/00/east.safetensors")}
    del kept["0000.partial/00/east.safetensors"]  # held-out results
    assert [ranks(decode(Trained, data).adapter) for _, data in sorted(kept.items())] == [{2}, {2}]  # made whole


def test_the_round_ends_at_the_best_adapter_for_the_mean_product(runs: Runs) -> None:
    watched, out = runs["products"]
    found = replies(watched, 1)
    total = sum(reply.weight for reply in found.values())
    ours = product(checkpoint(out, 1))
    missed = whole = 0.0
    for layer in ours:
        exact = torch.stack([reply.weight / total * product(reply.adapter)[layer] for reply in found.values()]).sum(0)
        u, s, vh = torch.linalg.svd(exact)
        best = u[:, :2] * s[:2] @ vh[:2]
        assert float((ours[layer] - best).norm()) <= 1e-6 * float(best.norm())
        missed, whole = missed + float((exact - best).square().sum()), whole + float(exact.square().sum())
    assert figures(out, "averaging_error")[1] == pytest.approx((missed / whole) ** 0.5, rel=1e-4)


def test_what_a_smaller_rank_is_sent_is_the_closest_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    adapter = {A: torch.randn(2, 3, generator=generator), B: torch.randn(4, 2, generator=generator)}
    sent = for_rank(Train(adapter), 1)
    assert isinstance(sent, Train)
    u, s, vh = torch.linalg.svd(product(adapter)["x"])
    torch.testing.assert_close(product(sent.adapter)["x"], s[0] * u[:, :1] @ vh[:1], rtol=0, atol=1e-6)
    whole = Train(adapter)
    assert for_rank(whole, 2) is whole
    reply = at_rank(trained(sent.adapter), 2)
    assert isinstance(reply, Trained)
    assert ranks(reply.adapter) == {2}
    assert torch.equal(product(reply.adapter)["x"], product(sent.adapter)["x"])


def test_smaller_ranks_need_products(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    code, line = refusal(capfd, "run", runs.run_file("products"))
    assert code == 2
    east = runs.run_file("products").parent / "clients" / "east.toml"
    assert line == (
        f'{east}: rank: found 1 with federation.averaging = "factors"; the run has 2, and smaller ones need "products"'
    )
    assert not (runs.run_file("products").parent / "runs" / "run").exists()


def test_a_rank_above_the_runs_is_refused(tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_file = write_project(tmp_path, model=model)
    north = run_file.parent / "clients" / "north.toml"
    edit(north, 'task = "even"', 'task = "even"\nrank = 3')
    code, line = refusal(capfd, "run", run_file, "--set", 'federation.averaging="products"')
    assert (code, line) == (2, f"{north}: rank: found 3; the run's adapter has 2")


def test_a_member_whose_rank_does_not_fit_is_dropped_and_the_others_go_on(runs: Runs) -> None:
    def smaller(who: str, envelope: Envelope, reply: Reply) -> Reply:
        return replace(reply, rank=1) if who == "east" and isinstance(reply, Introduced) else reply

    options = [*runs.options("plain"), "--set", "rounds=1"]
    watched, out = launched(runs.run_file("plain"), *options, watched=Watched(smaller), name="smaller")
    line = 'rank: found 1 with federation.averaging = "factors"; the run has 2, and smaller ones need "products"'
    assert watched.losses == {"east": line}
    assert sorted(replies(watched, 1)) == ["north", "south"]
    assert (out / "final").exists()


@pytest.mark.parametrize(("averaging", "fits"), [("factors", [False, True, False]), ("products", [True, True, False])])
def test_smaller_ranks_fit_under_products_and_larger_ones_never(runs: Runs, averaging: str, fits: list[bool]) -> None:
    config = load_run(runs.run_file("plain"), [f'federation.averaging="{averaging}"'])
    for rank, fit in zip((1, 2, 3), fits, strict=True):
        if fit:
            refuse_rank(rank, config)
        else:
            with pytest.raises(
                InadmissibleError, match=f'^rank: found {rank} with federation.averaging = "{averaging}"'
            ):
                refuse_rank(rank, config)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_is_none_is_not_admitted(rank: int) -> None:
    reply = Introduced("east", "", ("low",), 20, rank, {})
    with pytest.raises(InadmissibleError, match=f"rank: found {rank}, expected 1 or more"):
        admit(reply, Limits(1), Hello(""))


# --- server optimisers ----------------------------------------------------------------------------------------------


def mean(found: dict[str, Trained]) -> Adapter:
    total = sum(reply.weight for reply in found.values())
    names = next(iter(found.values())).adapter
    return {
        name: sum((reply.weight / total * reply.adapter[name].double() for reply in found.values()), torch.tensor(0.0))
        for name in names
    }


def assert_close(found: Adapter, expected: Callable[[str], Tensor]) -> None:
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected(name).double(), rtol=0, atol=1e-7)


def test_without_a_server_optimiser_a_round_ends_at_the_mean(runs: Runs) -> None:
    watched, out = runs["plain"]
    for round in (1, 2):
        assert_close(checkpoint(out, round), mean(replies(watched, round)).__getitem__)
    assert not any("server_optimizer" in name for name in server_memory(out, 2))


def test_momentum_adds_half_of_the_last_step(runs: Runs) -> None:
    watched, out = runs["momentum"]
    start, first = checkpoint(out, 0), mean(replies(watched, 1))
    assert_close(checkpoint(out, 1), first.__getitem__)
    second = mean(replies(watched, 2))
    assert_close(checkpoint(out, 2), lambda name: second[name] + 0.5 * (first[name] - start[name]))
    assert int(server_memory(out, 2)["server_optimizer/step"]) == 2


@pytest.mark.parametrize("name", ["personal", "yogi"])
def test_the_first_adaptive_step_divides_by_the_size_of_the_update(runs: Runs, name: str) -> None:
    watched, out = runs[name]
    start, found = checkpoint(out, 0), mean(replies(watched, 1))

    def expected(tensor: str) -> Tensor:
        delta = found[tensor] - start[tensor].double()
        v = 0.99 * 1e-6 + 0.01 * delta**2 if name == "personal" else 1e-6 - 0.01 * delta**2 * (1e-6 - delta**2).sign()
        rate = 1e-2 * ((1 - 0.99) ** 0.5 / (1 - 0.9) if name == "personal" else 1.0)  # Adam corrects for its start
        return start[tensor] + rate * 0.1 * delta / (v.sqrt() + 1e-3)

    after = checkpoint(out, 1)
    assert_close({tensor: after[tensor] for tensor in found}, expected)
