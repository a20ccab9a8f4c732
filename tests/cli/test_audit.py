"""`fedpact audit` on a small project: honest programs against a run file, in scratch folders that go away."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from fedpact.audit.judges import opposite
from fedpact.audit.leaks import Setting, _guesses
from fedpact.audit.poison import Damage, not_a_number, poisoned, scaled, stay_away, tampering
from fedpact.audit.trial import OFF, Bench, Outcome, changed, short
from fedpact.cli.audit import audit
from fedpact.errors import ConfigError, FedPactError
from fedpact.runtime.config import RunConfig, load_run
from tests.cli.conftest import edit, files, settings, write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The run file of a project to attack and never to change."""
    return write_project(tmp_path_factory.mktemp("attacked"), model=model)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Bench:
    return Bench(project, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def config(project: Path) -> RunConfig:
    return short(load_run(project), 1, 7, where="")


@pytest.fixture(scope="module")
def honest(bench: Bench, config: RunConfig) -> Outcome:
    return bench.trial(config)


def same(one: Outcome, other: Outcome) -> bool:
    return all(torch.equal(tensor, other.final[name]) for name, tensor in one.final.items())


def test_remembered_replies_change_nothing(honest: Outcome, bench: Bench, config: RunConfig, tmp_path: Path) -> None:
    assert any((bench.scratch / "replies").iterdir())
    assert same(honest, bench.trial(config)) and same(honest, Bench(bench.path, tmp_path).trial(config))


@pytest.mark.slow
def test_a_member_whose_first_reply_is_remembered_has_its_memory_too(bench: Bench, tmp_path: Path) -> None:
    config = short(load_run(bench.path, settings("scaffold")[1::2]), 2, 7, where="")
    fresh = bench.trial(config)
    assert not fresh.ended and same(bench.trial(config), fresh)  # round 2 begins with the control variate of round 1


def test_a_nan_is_refused_by_name_and_does_what_absence_does(honest: Outcome, bench: Bench, config: RunConfig) -> None:
    poisoned = bench.trial(config, liar="north", tamper=tampering(not_a_number))
    away = bench.trial(config, liar="north", tamper=stay_away)
    assert "not finite" in poisoned.refused["north"] and away.refused["north"] == "stays away"
    assert same(poisoned, away) and not same(poisoned, honest)
    assert poisoned.end == away.end


def test_the_clip_bounds_a_flipped_change(honest: Outcome, bench: Bench, config: RunConfig) -> None:
    free = changed(config, {"federation.clip_factor": OFF}, where="")
    lie = tampering(scaled(-10.0))
    with_clip = Damage.between([bench.trial(config, liar="north", tamper=lie)], [honest], ["north"])
    without = Damage.between([bench.trial(free, liar="north", tamper=lie)], [bench.trial(free)], ["north"])
    assert without.moved > 2 * with_clip.moved > 0


def test_a_run_that_one_absence_ends_is_told(bench: Bench, config: RunConfig) -> None:
    strict = changed(config, {"federation.min_replies": 3}, where="")
    found = bench.trial(strict, liar="north", tamper=stay_away)
    assert "federation.min_replies" in found.ended


@pytest.mark.slow
def test_shared_sketches_give_their_prompts_away_and_withheld_ones_do_not(bench: Bench) -> None:
    config, sketches = load_run(bench.path), {"evaluation.conflicts": True}
    shared, _ = _guesses(bench, config, Setting("", sketches, listens="differentiate"), seed=7, norm=1.0)
    assert [one.auc for one in shared if one is not None] == [1.0, 1.0, 1.0]
    withheld = Setting("", sketches, site={"share": ("rewards",)}, listens="differentiate")
    assert _guesses(bench, config, withheld, seed=7, norm=1.0)[0] == [None, None, None]


def test_trials_leave_nothing_but_remembered_replies(honest: Outcome, bench: Bench) -> None:
    assert [one.name for one in bench.scratch.iterdir()] == ["replies"]


@pytest.mark.slow
def test_a_lying_judge_changes_what_the_server_learns(bench: Bench, tmp_path: Path) -> None:
    config = short(load_run(bench.path, settings("fedgrpo")[1::2]), 1, 7, where="")
    fresh = Bench(bench.path, tmp_path)
    assert not same(fresh.trial(config), fresh.trial(config, liar="north", tamper=opposite))


def test_nothing_is_left_behind_by_an_error(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(run_file.parent / "clients" / "east.toml", 'use = "rewards.py:low"', 'use = "rewards.py:failing"')
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = files(run_file.parent)
    with pytest.raises(FedPactError, match="ZeroDivisionError"):
        audit(run_file, [], rounds=1, seeds=1, out=None, as_json=False)
    assert list((tmp_path / "temporary").iterdir()) == [] and files(run_file.parent) == before


def test_a_folder_that_holds_something_is_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match="not empty; give a new folder with --out"):
        audit(project, [], rounds=1, seeds=1, out=project.parent, as_json=False)


@pytest.mark.slow
def test_the_whole_command(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = files(run_file.parent)
    audit(run_file, [], rounds=1, seeds=1, out=None, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert files(run_file.parent) == before and list((tmp_path / "temporary").iterdir()) == []
    verdicts = {(one["attack"], one["defence"]): one["verdict"] for one in found["findings"]}
    assert verdicts["poison: NaN", "as configured"].startswith("refused, named: adapter")
    assert ("poison: sign-flipped change x10", "without the clip") in verdicts
    assert ("curious server: one reply", "one local step") in verdicts
    assert any("no proof of safety" in note for note in found["notes"])
    assert all("not possible here" not in verdict for verdict in verdicts.values())


@pytest.mark.slow
def test_the_whole_command_where_members_judge(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept"
    audit(run_file, settings("fedgrpo")[1::2], rounds=1, seeds=1, out=out, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    kept = json.loads((out / "audit.json").read_text())
    assert sum(line.startswith("lying judge | ") for line in lines) >= 4
    assert "poison | any | – | does not apply: members send no adapters under this algorithm" in lines
    assert len(kept["findings"]) == sum(" | " in line for line in lines)
    assert any(one.name.startswith("trial-") for one in out.iterdir()) and not (out / "replies").exists()


@pytest.mark.slow
def test_a_wrong_defence_is_a_line_and_not_the_end(bench: Bench, tmp_path: Path) -> None:
    config = load_run(bench.path, ['federation.averaging="products"'])  # goes with no other aggregation
    found = list(poisoned(Bench(bench.path, tmp_path), config, rounds=1, seeds=1, leading="low"))
    impossible = {one.defence for one in found if one.verdict.startswith("not possible here")}
    assert impossible == {"with geometric_median", "with trimmed_mean"}
