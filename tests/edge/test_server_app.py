"""What a ServerApp reads from its run configuration and its environment, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

from fedpact.edge.server_app import run_folders, serve, wanted
from fedpact.edge.simulated import paired
from fedpact.edge.submission import error_in, exit_line, round_line, run_name
from fedpact.errors import CheckFailedError, ConfigError, FedPactError, StoreError
from fedpact.runtime.config import RunConfig, load_run
from fedpact.runtime.launch import _digest

RUN = """\
rounds = 3
objectives = { right = { primary = true }, brief = {} }
policy = { model = "model" }
algorithm = { name = "fedavg" }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """FEDPACT_FOLDER, with two run files in it."""
    (tmp_path / "sub").mkdir()
    for file in ("run.toml", "sub/run.toml"):
        (tmp_path / file).write_text(RUN)
    monkeypatch.setenv("FEDPACT_FOLDER", str(tmp_path))
    before = os.umask(0o022)
    yield tmp_path
    os.umask(before)


def values(**changed: Any) -> dict[str, Any]:
    return {"run-name": "demo", "run-file": "", "run": "", "rounds": 0} | changed


def refused(folder: Path, **changed: Any) -> str:
    """What Flower would show to the submitter."""
    given = values(**{key.replace("_", "-"): value for key, value in changed.items()})
    with pytest.raises(RuntimeError) as caught:
        serve(None, SimpleNamespace(run_id=1, run_config=given))  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("name", ["a", "0", "demo", "a.b_c-d", "x" * 64])
def test_a_plain_name_is_a_run_name(name: str) -> None:
    assert run_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "A", "a b", "a\n", "é", "x" * 65, None, 7])
def test_a_name_that_could_be_a_path_or_an_option_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="run-name: found"):
        run_name(name)


def test_a_refusal_reaches_the_submitter_as_one_line_with_its_exit_code(folder: Path) -> None:
    said = refused(folder, run_name="../up")
    assert said.startswith("fedpact exit 2: run-name: found '../up'; expected ")
    assert isinstance(error_in(f"ServerApp failed with exception: {said}"), ConfigError)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("file", ["/etc/x.toml", "../x.toml", "sub/../../x.toml", "x.txt", "a\0.toml"])
def test_a_run_file_outside_the_folder_is_refused(folder: Path, file: str) -> None:
    assert refused(folder, run_file=file).startswith("fedpact exit 2: run-file: found ")


def test_a_run_file_that_is_missing_says_so(folder: Path) -> None:
    assert refused(folder, run_file="no.toml") == f"fedpact exit 2: {folder / 'no.toml'}: no such file"


def test_a_run_file_and_a_run_together_are_refused(folder: Path) -> None:
    assert "found both" in refused(folder, run="{}", run_file="run.toml")


@pytest.mark.parametrize("rounds", [-1, 1.5, True, "2"])
def test_rounds_that_are_no_number_of_rounds_are_refused(folder: Path, rounds: object) -> None:
    assert "rounds: found" in refused(folder, rounds=rounds, run_file="run.toml")


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 100_000])
def test_a_run_that_is_no_configuration_is_refused(folder: Path, text: str) -> None:
    assert refused(folder, run=text).startswith("fedpact exit 2: run: ")


def test_the_paths_of_a_run_file_start_beside_it(folder: Path) -> None:
    assert wanted(values(**{"run-file": "sub/run.toml"}), folder).folder == folder / "sub"


def test_the_paths_of_a_submitted_configuration_start_at_the_folder(folder: Path) -> None:
    config = load_run(folder / "run.toml")
    found = wanted(values(run=json.dumps(config.dump())), folder)
    assert (found.folder, found.config.dump()) == (folder, config.dump())


@pytest.mark.parametrize("way", ["run", "run-file"])
def test_rounds_above_zero_replace_those_of_the_configuration(folder: Path, way: str) -> None:
    text = json.dumps(load_run(folder / "run.toml").dump()) if way == "run" else "run.toml"
    assert wanted(values(**{way: text}), folder).config.rounds == 3
    assert wanted(values(**{way: text, "rounds": 5}), folder).config.rounds == 5


def test_with_neither_it_is_the_demo_written_once(folder: Path) -> None:
    first = wanted(values(rounds=2), folder)
    assert (first.folder, first.config.rounds) == (folder / "demo", 2)
    (folder / "demo" / "mine").touch()
    assert wanted(values(), folder).config.rounds == 16
    assert (folder / "demo" / "mine").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["demo", "run.toml", "sub"]


def test_the_folder_is_the_environments_and_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPACT_FOLDER", "runs")
    with pytest.raises(ConfigError, match="FEDPACT_FOLDER: found 'runs'; expected an absolute path"):
        run_folders()
    monkeypatch.setenv("FEDPACT_FOLDER", "/srv/fedpact")
    assert run_folders() == Path("/srv/fedpact")
    monkeypatch.delenv("FEDPACT_FOLDER")
    assert run_folders() == Path.home() / ".fedpact"


def began(folder: Path, config: RunConfig) -> None:
    """A run.json of a run that began with `config`."""
    out = folder / "runs" / "demo"
    out.mkdir(parents=True)
    dump = config.dump()
    (out / "run.json").write_text(
        json.dumps({"config": dump, "config_sha256": _digest(dump), "folder": str(folder), "threads": 1})
    )


def test_a_run_that_began_otherwise_is_not_gone_on_with(folder: Path) -> None:
    began(folder, load_run(folder / "run.toml"))
    said = refused(folder, run_file="run.toml", rounds=4)
    assert said.startswith(f"fedpact exit 2: {folder / 'runs/demo'}: this run began with another configuration ")
    assert "(rounds: not the same)" in said


def test_the_order_of_objectives_is_part_of_a_configuration(folder: Path) -> None:
    began(folder, load_run(folder / "run.toml"))
    swapped = RUN.replace("right = { primary = true }, brief = {}", "brief = {}, right = { primary = true }")
    (folder / "run.toml").write_text(swapped)
    assert "the order of keys: not the same" in refused(folder, run_file="run.toml")


def test_the_same_configuration_goes_on(folder: Path) -> None:
    began(folder, load_run(folder / "run.toml"))
    said = refused(folder, run_file="run.toml")
    assert said.startswith(f"fedpact exit 2: {folder / 'runs/demo/run.json'}: policy.model")  # so far had it come


def test_what_it_writes_is_its_own_users_alone(folder: Path) -> None:
    refused(folder, run_file="no.toml")
    assert os.umask(0o022) == 0o077


def test_a_bug_leaves_its_traceback_in_the_folder_and_one_masked_line(folder: Path) -> None:
    try:
        raise KeyError("hf_abcdefghijklmnop")
    except KeyError as error:
        line = exit_line(error, folder)
    (log,) = folder.glob("fedpact-*.log")
    assert line == f"fedpact exit 1: internal error (KeyError: '***'); the traceback is in {log}"
    assert "raise KeyError" in log.read_text() and "hf_abc" not in log.read_text()


@pytest.mark.parametrize(
    ("code", "kind"), [(1, FedPactError), (2, ConfigError), (4, StoreError), (6, CheckFailedError), (99, FedPactError)]
)
def test_an_exit_line_comes_back_as_the_error_that_it_was(code: int, kind: type[FedPactError]) -> None:
    found = error_in(f"ServerApp failed with exception: fedpact exit {code}: here: found\nthis")
    assert type(found) is kind
    assert str(found) == "here: found this"


def test_other_text_is_no_exit_line() -> None:
    assert error_in("No heartbeat received from the task") is None


def test_a_rounds_line_has_the_means_of_what_was_held_out() -> None:
    row = {"who": "all", "key": "heldout/right", "value": 0.5}
    others = [{**row, "value": 0.25}, {**row, "who": "add"}, {**row, "key": "heldout/accuracy"}]
    assert round_line(2, 8, [row, *others]) == "round 2 of 8; held out: right 0.375"
    assert round_line(3, 8, []) == "round 3 of 8"


def test_the_smallest_node_stands_for_the_first_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert paired(["west", "east"], [30, 20]) == {"east": 20, "west": 30}
    assert capsys.readouterr().out == ""


def test_with_fewer_nodes_the_first_members_take_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert paired(["c", "a", "b"], [9, 5]) == {"a": 5, "b": 9}
    assert capsys.readouterr().out.startswith("SuperNodes: 2, members: 3; only a, b take part, ")


def test_with_more_nodes_the_last_stay_idle(capsys: pytest.CaptureFixture[str]) -> None:
    assert paired(["a"], [9, 5, 7]) == {"a": 5}
    assert capsys.readouterr().out == "SuperNodes: 3, members: 1; 2 of the SuperNodes stay idle\n"
