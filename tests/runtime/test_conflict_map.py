"""The conflict map of whole runs: what is measured, against exact gradients, and that measuring changes nothing."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedpact.algorithms.steps import local_batches
from fedpact.messages import Differentiate, Differentiated, Introduced, Reply
from fedpact.runtime.admission import Limits
from fedpact.runtime.codec import encode
from fedpact.runtime.config import RunConfig, load_run
from fedpact.runtime.envelope import Envelope, unwrap, wrap
from fedpact.runtime.exchange import Round
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.measure import MAPPED, SKETCH_RANK, conflicts, maps_conflicts
from fedpact.runtime.spool import Spool
from fedpact.runtime.transport import Failure
from tests.cli.conftest import MEMBERS, edit, in_process, model, results, settings, stop_in_round, write_project
from tests.runtime.test_exchange import ScriptedTransport
from tests.runtime.watched import Watched, launched

pytestmark = pytest.mark.slow

__all__ = ["model"]

OPTIONS = [*settings("fedmoa"), "--set", 'loss.surrogate="ppo"', "--set", "policy.private={ r = 1 }"]
"""Everything that members can remember: weights, a critic and a private adapter."""

Cosines = dict[int, dict[tuple[str, str], float]]
"""Round, and two gradients named `member/objective` in order, to their cosine."""


def cosines(out: Path) -> Cosines:
    found: Cosines = {}
    for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        if row["key"].startswith("cosine/"):
            _, objective, other = row["key"].split("/", 2)
            pair = (f"{row['who']}/{objective}", other)
            pairs = found.setdefault(row["round"], {})
            assert pair not in pairs and pair[::-1] not in pairs and pair[0] != pair[1]
            pairs[pair] = row["value"]
    return found


def trained(out: Path) -> dict[str, bytes]:
    """The adapters and the server's memory of all rounds, and what members remember in the end."""
    return {name: data for name, data in results(out).items() if name.endswith(".safetensors")}


def remembered(out: Path, who: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(max((out / "clients" / who / "memory").glob("*.safetensors")))
    return found


def project(folder: Path, model: Path) -> Path:
    """The run file of a project in which brief says something in every batch (few words with w1), as short as they are:
    rewards that are all equal have no gradient to map."""
    run_file = write_project(folder, model=model, rounds=2)
    edit(run_file.parent / "clients" / "rewards.py", "-float(len(text.split()))", '-float(text.count("w1"))')
    return run_file


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return project(tmp_path_factory.mktemp("conflicts"), model)


@pytest.fixture(scope="module")
def mapped(run_file: Path) -> tuple[Watched, Path]:
    return launched(run_file, *OPTIONS, name="mapped")


def test_every_pair_has_one_figure_at_the_start_the_middle_and_the_end(mapped: tuple[Watched, Path]) -> None:
    watched, out = mapped
    found = cosines(out)
    assert sorted(found) == [0, 1, 2]
    names = ["east/brief", "east/low", "north/brief", "north/low", "south/low"]  # south audits brief
    for pairs in found.values():
        assert sorted(pairs) == list(combinations(names, 2))
        assert all(-1 <= value <= 1 for value in pairs.values())
    asked = [(round, who, request.rank) for round, who, request in watched.asked(Differentiate)]
    assert asked == [(round, who, SKETCH_RANK) for round in (0, 1, 2) for who in MEMBERS]
    assert len({request.seed for _, _, request in watched.asked(Differentiate)}) == 3  # one for each round


def test_the_figures_are_the_cosines_of_the_real_gradients(mapped: tuple[Watched, Path]) -> None:
    watched, out = mapped
    transport: Any = watched.inner
    rows: dict[str, Tensor] = {}
    for who, envelope, data in watched.answers:
        if (envelope.verb, envelope.round) != ("differentiate", 0):
            continue
        request, reply = envelope.open(), unwrap(envelope, data)
        assert isinstance(request, Differentiate) and isinstance(reply, Differentiated)
        client = transport.members[who].side(0, envelope.exchange, None)  # nothing is remembered yet
        batch = next(iter(local_batches(client, request.adapter, 1)))
        jacobian = client.policy.gradients(batch.rollout, batch.advantages, loss=batch.loss)
        for m, objective in enumerate(("low", "brief")):
            rows[f"{who}/{objective}"] = jacobian[m][jacobian.shared].double()
            if client.present[m]:
                assert float(reply.gramian[m, m]) == pytest.approx(float(jacobian.gramian[m, m]), rel=1e-6)
    pairs = cosines(out)[0]
    exact = {pair: float(torch.cosine_similarity(rows[pair[0]], rows[pair[1]], dim=0)) for pair in pairs}
    errors = [abs(exact[pair] - value) for pair, value in pairs.items()]
    assert max(errors) < 4 / SKETCH_RANK**0.5
    assert max(exact.values()) - min(exact.values()) > 0.5  # they differ by more than that


def test_measuring_changes_neither_training_nor_what_anybody_remembers(
    run_file: Path, mapped: tuple[Watched, Path]
) -> None:
    _, without = launched(run_file, *OPTIONS, "--set", "evaluation.conflicts=false", name="without")
    assert cosines(without) == {}
    assert trained(without) == trained(mapped[1])
    for who in MEMBERS:
        ours, theirs = remembered(mapped[1], who), remembered(without, who)
        assert ours.keys() == theirs.keys() > {"log_weights", "critic/heads"}
        assert any(name.startswith("private/") for name in ours)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    heldout = [
        [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"heldout' in line]
        for out in (mapped[1], without)
    ]
    assert heldout[0] == heldout[1] != []


def test_a_member_that_does_not_answer_is_left_out_of_the_map_and_the_run_goes_on(
    tmp_path: Path, model: Path, mapped: tuple[Watched, Path]
) -> None:
    run_file = project(tmp_path, model)
    south = run_file.parent / "clients" / "south.toml"
    edit(south, "[prompts]", 'site = { share = ["rewards", "accuracy", "metrics"] }\n\n[prompts]')

    def silent(who: str, envelope: Envelope, reply: Reply) -> Reply | Failure:
        gone = who == "east" if envelope.round == 0 else envelope.round == 1
        return Failure("gone fishing") if gone and envelope.verb == "differentiate" else reply

    watched, out = launched(run_file, *OPTIONS, watched=Watched(silent))
    found = cosines(out)
    assert sorted(found) == [0, 2]
    assert sorted(found[0]) == [("north/brief", "north/low")]  # south shares no gradients
    assert sorted(found[2]) == list(combinations(["east/brief", "east/low", "north/brief", "north/low"], 2))
    assert sorted(watched.losses) == ["east", "north", "south"]
    assert trained(out) == trained(mapped[1])
    for who, envelope, data in watched.answers:
        reply = unwrap(envelope, data)
        if who == "south" and isinstance(reply, Differentiated):
            assert reply.sketch.isnan().all() and reply.gramian.isnan().all() and reply.rewards.isnan().all()


@pytest.mark.slow
def test_a_run_that_is_stopped_within_the_map_ends_with_the_same_figures(
    run_file: Path, mapped: tuple[Watched, Path]
) -> None:
    out = run_file.parent / "runs" / "run"
    # round 2: 3 x 2 local steps, 3 + 3 held-out batches, and the second of 3 members is at its gradients
    stop_in_round(run_file, 2, calls=14, number=signal.SIGTERM)
    assert in_process("run", run_file, *OPTIONS) == 143
    assert [path.name for path in (out / "rounds" / "0002.partial" / "03").iterdir()] == ["east.safetensors"]
    assert in_process("resume", out) == 0
    assert results(out) == results(mapped[1])


# --- when, and of whom ----------------------------------------------------------------------------------------------


def introduced(rank: int = 2, members: Sequence[str] = MEMBERS) -> dict[str, Introduced]:
    return {name: Introduced(name, "", ("low", "brief"), 20, rank, {}) for name in members}


def rounds_with_a_map(config: RunConfig, rank: int = 2) -> list[int]:
    return [number for number in range(config.rounds + 1) if maps_conflicts(config, introduced(rank), number)]


@pytest.mark.parametrize(("rounds", "expected"), [(1, [0, 1]), (2, [0, 1, 2]), (5, [0, 3, 5]), (30, [0, 15, 30])])
def test_the_middle_is_the_round_after_half(run_file: Path, rounds: int, expected: list[int]) -> None:
    assert rounds_with_a_map(load_run(run_file, [f"rounds={rounds}"])) == expected


@pytest.mark.parametrize("algorithm", ["fedgrpo", "mor", "grpo"])
def test_members_that_do_not_train_have_no_map(run_file: Path, algorithm: str) -> None:
    assert rounds_with_a_map(load_run(run_file, settings(algorithm)[1::2])) == []


def test_it_can_be_switched_off_and_members_of_other_ranks_have_none(run_file: Path) -> None:
    assert rounds_with_a_map(load_run(run_file, ["evaluation.conflicts=false"])) == []
    assert rounds_with_a_map(load_run(run_file), rank=1) == []


def test_of_many_members_some_are_drawn_and_what_they_send_is_compared(run_file: Path, tmp_path: Path) -> None:
    names = [f"m{i:02d}" for i in range(20)]
    lacking = names[::3]

    def gradients(name: str) -> Any:
        """low points along the first number, for odd members backwards; brief along the second, if they have it."""

        def answer(envelope: Envelope) -> bytes:
            sketch = torch.zeros(2, SKETCH_RANK)
            sketch[0, 0] = (-1.0) ** int(name[1:]) * (1 + int(name[1:]))
            sketch[1, 1] = torch.nan if name in lacking else 3.0
            empty = torch.full((2, 2), torch.nan)
            return wrap(envelope, encode(Differentiated(1.0, empty, sketch, {}, torch.zeros(2))))

        return answer

    transport = ScriptedTransport({name: gradients(name) for name in names})
    one = Round(
        run="r",
        contract="c",
        number=0,
        transport=transport,
        ledger=Ledger(tmp_path / "ledger.jsonl"),
        limits=Limits(2),
        spool=lambda exchange: Spool(tmp_path / f"{exchange:02d}"),
        since={},
        min_replies=20,
        timeout_s=None,
        dropped=lambda client, reason: None,
    )
    conflicts(one, load_run(run_file), {}, introduced(members=names))
    drawn = sorted(transport.asked)
    assert len(set(drawn)) == len(drawn) == MAPPED
    found = {(row["who"], *row["key"].split("/")[1:]): row["value"] for row in one.metrics}
    for first, second in combinations(drawn, 2):
        same = (int(first[1:]) - int(second[1:])) % 2 == 0
        assert found[first, "low", second, "low"] == (1.0 if same else -1.0)
        assert found.get((first, "low", second, "brief"), 0.0) == 0.0
        assert found.get((first, "brief", second, "brief"), 1.0) == 1.0
    size = 2 * MAPPED - len(set(drawn) & set(lacking))
    assert MAPPED < size < 2 * MAPPED
    assert len(found) == size * (size - 1) / 2
