"""The held-out gate: a fall returns the run to the adapter that passed last, whoever caused it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpact.messages import Evaluated, Reply, Trained
from fedpact.runtime.config import RunConfig
from fedpact.runtime.envelope import Envelope
from fedpact.runtime.measure import _middle
from fedpact.runtime.transport import Failure
from tests.cli.conftest import model, run_file, settings
from tests.runtime.watched import Watched, figures, launched

__all__ = ["model", "run_file"]

EVERY_ROUND = ["--set", "evaluation.every=1", "--set", "evaluation.conflicts=false"]
GATED = [*EVERY_ROUND, "--set", "evaluation.rollback=0.1"]


def fallen_in_round_two(who: str, envelope: Envelope, reply: Reply) -> Reply | Failure:
    """Everybody's held-out means are 0.8, and 0.5 in round 2."""
    if not isinstance(reply, Evaluated):
        return reply
    return replace(reply, rewards=torch.full_like(reply.rewards, 0.5 if envelope.round == 2 else 0.8))


def adapter(out: Path, round: int) -> dict[str, torch.Tensor]:
    return load_file(out / "rounds" / f"{round:04d}" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_fall_returns_to_the_adapter_before_and_the_run_goes_on_from_there(run_file: Path) -> None:
    watched, out = launched(run_file, *GATED, watched=Watched(fallen_in_round_two))
    assert same(adapter(out, 2), adapter(out, 1))
    assert not same(adapter(out, 3), adapter(out, 2))
    assert figures(out, "rolled_back_to") == {2: 1.0}
    state = json.loads((out / "rounds" / "0003" / "state.json").read_text())
    assert state["passed"][0] == 3
    assert watched.losses == {}


@pytest.mark.slow
def test_a_fall_within_the_limit_or_without_one_stays(run_file: Path) -> None:
    for name, options in (("wide", [*EVERY_ROUND, "--set", "evaluation.rollback=0.4"]), ("none", EVERY_ROUND)):
        _, out = launched(run_file, *options, watched=Watched(fallen_in_round_two), name=name)
        assert not same(adapter(out, 2), adapter(out, 1))
        assert figures(out, "rolled_back_to") == {}


@pytest.mark.slow
def test_means_that_nobody_shares_return_nothing(run_file: Path) -> None:
    def hidden(who: str, envelope: Envelope, reply: Reply) -> Reply | Failure:
        if isinstance(reply, Evaluated) and envelope.round == 2:
            return replace(reply, rewards=reply.rewards * torch.nan, accuracy=None)
        return reply

    _, out = launched(run_file, *GATED, watched=Watched(hidden))
    assert not same(adapter(out, 2), adapter(out, 1))


@pytest.mark.slow
def test_one_member_cannot_cause_a_return_by_claiming_a_million_completions(run_file: Path) -> None:
    def liar(who: str, envelope: Envelope, reply: Reply) -> Reply | Failure:
        if isinstance(reply, Evaluated) and who == "east":
            return replace(reply, rewards=reply.rewards - 0.1, counts=reply.counts * 10**6)
        return replace(reply, rewards=torch.full_like(reply.rewards, 0.8)) if isinstance(reply, Evaluated) else reply

    _, out = launched(run_file, *EVERY_ROUND, watched=Watched(liar))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    east = next(r["value"] for r in rows if r["key"] == "heldout/low" and r["who"] == "east" and r["round"] == 0)
    pooled = next(r["value"] for r in rows if r["key"] == "heldout/low" and r["who"] == "all" and r["round"] == 0)
    assert abs(pooled - (2 / 3 * east + 1 / 3 * 0.8)) < 1e-6  # 2/n of it, and no more


@pytest.mark.slow
def test_what_a_member_does_to_an_update_shows_in_the_figures(run_file: Path) -> None:
    def flipped(who: str, envelope: Envelope, reply: Reply) -> Reply | Failure:
        request = envelope.open()
        if not isinstance(reply, Trained) or who != "east":
            return reply
        sent = request.adapter  # type: ignore[attr-defined]
        return replace(reply, adapter={n: sent[n] - 10 * (reply.adapter[n] - sent[n]) for n in sent})

    def first_round(name: str, watched: Watched) -> dict[tuple[str, str], float]:
        _, out = launched(run_file, *EVERY_ROUND, "--set", "rounds=1", watched=watched, name=name)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return {(r["who"], r["key"]): r["value"] for r in rows if r["round"] == 1}

    honest, found = first_round("honest", Watched()), first_round("flipped", Watched(flipped))
    assert found["east", "update/cosine"] == pytest.approx(-honest["east", "update/cosine"], rel=1e-4)
    assert found["east", "update/norm"] == pytest.approx(10 * honest["east", "update/norm"], rel=1e-4)
    assert honest["east", "update/kept"] == found["north", "update/kept"] == 1.0
    assert found["east", "update/kept"] < 0.5


def scored(*values: float) -> list[Evaluated]:
    one = torch.tensor([1])
    return [Evaluated(1.0, torch.tensor([value]), one, None) for value in values]


def test_a_liar_moves_the_score_to_a_neighbour_and_no_further() -> None:
    config = RunConfig.model_validate(
        {
            "rounds": 1,
            "objectives": {"low": {"primary": True}},
            "policy": {"model": "m"},
            "algorithm": {"name": "fedavg"},
        }
    )
    honest = [0.8, 0.81, 0.82, 0.83, 0.84]
    assert _middle(config, scored(*honest)) == pytest.approx(0.82)
    assert _middle(config, scored(*honest, 1e6)) == pytest.approx(0.82)
    assert _middle(config, scored(*honest, -1e6)) == pytest.approx(0.81)
    assert math.isnan(_middle(config, scored(math.nan)))


@pytest.mark.slow
def test_what_the_server_remembered_returns_with_the_adapter(run_file: Path) -> None:
    _, out = launched(run_file, *settings("fedmoa"), *GATED, watched=Watched(fallen_in_round_two))
    memories = [(out / "rounds" / f"{n:04d}" / "memory.safetensors").read_bytes() for n in (1, 2, 3)]
    assert memories[0] == memories[1] != memories[2]
