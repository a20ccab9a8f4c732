"""Whole runs in which the server trains and the members judge: what bad members can do, and what is remembered."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpact.algorithms.fedgrpo import FedGRPO
from fedpact.edge.local import local_transport
from fedpact.messages import (
    Examine,
    Examined,
    Fit,
    Introduced,
    Reply,
    Score,
    Scored,
)
from fedpact.runtime.config import load_run
from fedpact.runtime.envelope import Envelope, unwrap
from fedpact.runtime.launch import start
from fedpact.runtime.transport import Failure
from fedpact.types import Adapter
from tests.cli.conftest import MEMBERS, edit, in_process, model, results, run_file, settings, write_project
from tests.runtime.watched import NAN, Tamper, Watched, fedgrpo, figures, final, launched

pytestmark = pytest.mark.slow

__all__ = ["model", "run_file"]

# --- members that fail ----------------------------------------------------------------------------------------------


FLAKY = '''


CALLS = []


def flaky(completions, **columns):
    """Late in its second call, and fails in its third; the first is the dry run."""
    CALLS.append(len(completions))
    time.sleep(4.5 * (len(CALLS) == 2))
    assert len(CALLS) != 3
    return low(completions)
'''


def silent(who: str, verb: str = "score", rounds: Sequence[int] = (1, 2, 3)) -> Tamper:
    def tamper(name: str, envelope: Envelope, reply: Reply) -> Reply | Failure:
        gone = name == who and envelope.verb == verb and envelope.round in rounds
        return Failure("gone fishing") if gone else reply

    return tamper


def rewritten(change: Callable[[torch.Tensor], torch.Tensor], who: str = "east") -> Tamper:
    def tamper(name: str, envelope: Envelope, reply: Reply) -> Reply | Failure:
        return Scored(change(reply.rewards)) if isinstance(reply, Scored) and name == who else reply

    return tamper


BAD = {
    "silent": (silent("east"), "gone fishing"),
    "NaN": (rewritten(lambda r: r * NAN), None),
    "infinite": (rewritten(lambda r: r + torch.inf), "not finite"),
    "huge": (rewritten(lambda r: r - 2e6), "expected at most 1e+06"),
    "short": (rewritten(lambda r: r[:, 1:]), "rewards: found"),
    "long": (rewritten(lambda r: torch.cat([r, r], 1)), "rewards: found"),
    "one objective": (rewritten(lambda r: r[:1]), "rewards: found"),
    "integers": (rewritten(lambda r: r.nan_to_num().long()), "int64"),
    "another kind": (lambda n, e, r: Examined(torch.ones(1).bool()) if n == "east" and e.verb == "score" else r, ""),
}


def test_a_member_that_answers_badly_costs_its_own_vote_and_is_named(run_file):
    kinds = list(BAD)  # one kind of bad answer in each round
    losses: dict[int, str] = {}

    class Noting(Watched):
        def dropped(self, client: str, reason: str) -> None:
            assert client == "east"
            losses[self.sent[-1][1].round] = reason

    def badly(name: str, envelope: Envelope, reply: Reply) -> Reply | Failure:
        return BAD[kinds[envelope.round - 1]][0](name, envelope, reply) if envelope.round else reply

    options = [*fedgrpo(server_steps=1), "--set", f"rounds={len(kinds)}"]
    _, out = launched(run_file, *options, watched=Noting(badly))
    for number, (_, reason) in enumerate(BAD.values(), 1):
        assert (number in losses) is (reason is not None), kinds[number - 1]
        assert (reason or "") in losses.get(number, ""), kinds[number - 1]
    _, without = launched(run_file, *options, watched=Watched(silent("east")), name="without")
    assert {name: data for name, data in results(out).items() if "adapter_model" in name} == {
        name: data for name, data in results(without).items() if "adapter_model" in name
    }
    assert sum(figures(out, "train/steps").values()) > 5
    first, second = figures(out, "train/reward/low"), figures(without, "train/reward/low")
    assert first == second and len(first) == len(kinds)


@pytest.mark.slow
def test_a_member_that_raises_or_is_late_costs_its_own_vote_and_is_named(run_file):
    clients = run_file.parent / "clients"
    edit(clients / "east.toml", "rewards.py:low", "rewards.py:flaky")
    with (clients / "rewards.py").open("a") as stream:
        stream.write(FLAKY)
    options = [*fedgrpo(server_steps=1), "--set", "rounds=3", "--set", "federation.timeout_s=4"]
    reasons = []
    watched = Watched()
    watched.dropped = lambda client, reason: reasons.append((client, reason))
    _, out = launched(run_file, *options, watched=watched)
    assert [client for client, _ in reasons] == ["east"] * 2
    assert reasons[0][1] == "no reply within 4 s (federation.timeout_s)"
    assert "rewards.low: rewards.py:flaky: raised AssertionError" in reasons[1][1]
    steady = clients / "east.toml"
    steady.write_text(steady.read_text().replace("flaky", "low"))
    _, without = launched(run_file, *options, watched=Watched(silent("east", rounds=[1, 2])), name="without")
    assert final(out) == final(without)


@pytest.fixture
def moody(run_file: Path) -> Path:
    """A project whose members all fail from when a checkpoint exists, until the file `moody` is gone."""
    clients = run_file.parent / "clients"
    for name in MEMBERS:
        edit(clients / f"{name}.toml", "rewards.py:low", "rewards.py:moody")
    (clients / "moody").write_text(str(run_file.parent / "runs" / "run" / "rounds" / "0001"))
    return run_file


@pytest.mark.parametrize(
    ("experts", "first", "exchange"), [("all", 1, "round 2, exchange 1"), ("confidence", 0, "round 1, exchange 0")]
)
def test_with_all_members_silent_a_run_stops_and_goes_on_once_they_are_back(moody, capfd, experts, first, exchange):
    options = [*fedgrpo(experts=experts), "--set", "rounds=3"]
    out, flag = moody.parent / "runs" / "run", moody.parent / "clients" / "moody"
    flag.write_text(str(out / "rounds" / f"{first:04d}"))
    capfd.readouterr()
    assert in_process("run", moody, *options) == 5
    lines = capfd.readouterr().err.splitlines()
    assert {line.split(":")[0] for line in lines[:-1]} == {f"dropped {name}" for name in MEMBERS}
    assert lines[-1].startswith(f"fedpact: {exchange}: 0 of 3 members replied, expected at least 1")
    assert len([line for line in lines if line.startswith("fedpact: ")]) == 1
    flag.unlink()
    assert in_process("resume", out) == 0
    assert sorted(figures(out, "train/steps")) == [1, 2, 3]
    assert figures(out, "train/steps")[3] > 0


def test_fitting_that_nobody_answers_stops_a_run_and_it_goes_on_once_they_are_back(moody, capfd):
    out, flag = moody.parent / "runs" / "run", moody.parent / "clients" / "moody"
    flag.write_text(str(out / "rounds" / "0000"))
    assert in_process("run", moody, *settings("mor")) == 5
    assert capfd.readouterr().err.splitlines()[-1].startswith("fedpact: round 1, exchange 0: 0 of 3 members replied")
    flag.unlink()
    assert in_process("resume", out) == 0


def test_a_member_that_introduces_itself_wrongly_is_dropped_and_the_others_go_on(run_file):
    def twice(who: str, envelope: Envelope, reply: Reply) -> Reply | Failure:
        odd = who == "east" and isinstance(reply, Introduced)
        return replace(reply, objectives=("low", "low")) if odd else reply

    watched, out = launched(run_file, *fedgrpo(), watched=Watched(twice))
    assert watched.losses == {"east": "objectives: found ('low', 'low'), expected each once"}
    assert {who for _, who, _ in watched.asked(Score)} == {"north", "south"}
    assert (out / "final").exists()


# --- liars ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def five(tmp_path: Path, model: Path) -> Path:
    """A project of five members that rate alike, questions without ids."""
    path = write_project(tmp_path / "project", model=model)
    clients = path.parent / "clients"
    text = (clients / "north.toml").read_text()
    for name in (*MEMBERS, "west", "zenith"):
        (clients / f"{name}.toml").write_text(text.replace('name = "north"', f'name = "{name}"'))
    rows = [{"prompt": f"w{number} w{number * 3 % 58}"} for number in range(20)]
    (path.parent / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_liar_among_five_moves_the_reward_by_less_than_two_fifths(five):
    options = fedgrpo(aggregation="trimmed_mean", server_steps=1)
    _, honest = launched(five, *options, name="honest")
    liar = Watched(rewritten(lambda r: torch.full_like(r, -1e6), who="west"))
    _, attacked = launched(five, *options, watched=liar, name="attacked")
    before, after = (figures(out, "train/reward/low")[1] for out in (honest, attacked))
    assert liar.losses == {}
    assert abs(before - after) < 2 / 5
    _, mean = launched(five, *fedgrpo(server_steps=1), watched=liar, name="mean")
    assert abs(figures(mean, "train/reward/low")[1] - before) > 1000


def test_canaries_find_a_liar_and_it_is_asked_no_more(five):
    liar = Watched(rewritten(lambda r: (r <= 0.5).float(), who="west"))
    options = fedgrpo(min_canary=0.6, server_steps=11, aggregation="median", canaries=2)  # 66 candidates
    watched, out = launched(five, *options, "--set", "rounds=2", watched=liar)
    asked = [{who for number, who, _ in watched.asked(Score) if number == round} for round in (1, 2)]
    honest = {*MEMBERS, "zenith"}
    assert asked == [honest | {"west"}, honest]
    assert figures(out, "canary/west")[1] == 0
    assert [figures(out, f"canary/{name}")[1] for name in honest] == [1.0] * 4


# --- what the server remembers --------------------------------------------------------------------------------------


class Forgetful(FedGRPO):
    """Starts the optimiser afresh in every round."""

    def server(self, adapter: Adapter, server: Any) -> Adapter:
        for name in [name for name in server.memory if name.startswith("optimizer/")]:
            del server.memory[name]
        return super().server(adapter, server)


def test_the_optimisers_moments_matter_from_round_to_round(run_file):
    options = [*fedgrpo(), "--set", "rounds=2"]
    _, whole = launched(run_file, *options)
    config = load_run(run_file, options[1::2])
    forgetful = config.model_copy(update={"algorithm": Forgetful(**config.algorithm.model_dump())})
    watched, out = Watched(), run_file.parent / "runs" / "forgetful" / "run"
    start(forgetful, run_file.parent, out, where="", make=lambda *one: watched.over(local_transport(*one)),
          observer=watched)  # fmt: skip
    kept = [(one / "rounds" / "0001" / "adapter_model.safetensors").read_bytes() for one in (whole, out)]
    assert kept[0] == kept[1]
    assert final(whole) != final(out)


def test_newcomers_are_examined_when_they_appear_and_nobody_twice(run_file):
    watched, _ = launched(run_file, *settings("fedgrpo", participation=0.5), "--set", "rounds=4")
    asked = [(number, who) for number, who, _ in watched.asked(Examine)]
    assert sorted(who for _, who in asked) == list(MEMBERS)
    assert len({number for number, _ in asked}) > 1  # two of three in round 1


@pytest.mark.parametrize(("algorithm", "kind"), [("fedgrpo", Examine), ("mor", Fit)])
def test_who_missed_its_examination_is_examined_in_the_next_round(run_file, algorithm, kind):
    watched = Watched(silent("east", kind.verb, rounds=[1]))
    launched(run_file, *settings(algorithm), "--set", "rounds=2", watched=watched)
    assert [(number, who) for number, who, _ in watched.asked(kind)] == [
        (1, "east"),
        (1, "north"),
        (1, "south"),
        (2, "east"),
    ]
    assert "east" not in {who for number, who, _ in watched.asked(Score) if number == 1}


def test_one_expert_that_tells_the_truth_is_worth_central_training(run_file):
    for name in ("east", "south"):
        (run_file.parent / "clients" / f"{name}.toml").unlink()
    lonely = ["--set", "federation.min_replies=1", "--set", "rounds=2"]
    watched, federated = launched(run_file, *settings("fedgrpo"), *fedgrpo()[-4:-2], *lonely, name="federated")
    _, central = launched(run_file, *settings("grpo"), *lonely, name="central")
    assert watched.asked(Score)
    assert figures(federated, "train/steps") == figures(central, "train/steps")
    assert figures(central, "train/steps")[2] > 0
    assert final(federated) == final(central)


def test_in_a_simulation_the_runs_seed_determines_the_noise_and_members_have_their_own(run_file):
    for name in MEMBERS:
        path = run_file.parent / "clients" / f"{name}.toml"
        edit(path, "rewards.py:low", "rewards.py:even")
        path.write_text(path.read_text() + "\n[site]\nepsilon_per_prompt = 3.0\n")
        path.write_text(path.read_text().replace('[rewards.brief]\nuse = "rewards.py:brief"\naudit = true', ""))
        path.write_text(path.read_text().replace('[rewards.brief]\nuse = "rewards.py:brief"\n', ""))
    with (run_file.parent / "clients" / "rewards.py").open("a") as stream:
        stream.write(
            "\n\ndef even(completions, **columns):\n    return [float(len(t) % 2 == 0) for t in completions]\n"
        )
    told = []
    for name in ("one", "two"):  # the same seed: the same questions and candidates in the first step
        watched, out = launched(run_file, *fedgrpo(server_steps=1), name=name)
        replies = [unwrap(envelope, data) for who, envelope, data in watched.answers if envelope.verb == "score"]
        told.append(torch.cat([reply.rewards[0] for reply in replies]))
        assert len(told[-1].unique()) == 2 and not set(told[-1].tolist()) & {0.0, 1.0}
        by_member = {
            who: unwrap(envelope, data).rewards for who, envelope, data in watched.answers if envelope.verb == "score"
        }
        assert not all(torch.equal(one, by_member["east"]) for one in by_member.values())
        assert not list((out / "clients").glob("*/secret"))
    assert torch.equal(*told)  # between sites it is keyed by a secret: tests/runtime/test_ratings_at_the_gate.py
