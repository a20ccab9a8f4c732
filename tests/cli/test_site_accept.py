"""`fedpact site accept` pins the contract that was read, and nothing else; one site has one service."""

from __future__ import annotations

import io
import json
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpact.cli import site_service
from fedpact.edge.site import alone, site_home
from fedpact.errors import RefusedError, StoreError
from fedpact.runtime import acceptance
from fedpact.runtime.client_config import load_client
from fedpact.runtime.config import load_run
from fedpact.runtime.contract import contract_hash, contract_of
from tests.cli.conftest import files, in_process, refusal, write_project

Screen = pytest.CaptureFixture[str]


class Accepting:
    """A member's client file and a contract's file beside it."""

    def __init__(self, folder: Path) -> None:
        run_file = write_project(folder / "project", model=folder)
        self.client = run_file.parent / "clients" / "east.toml"
        self.home = site_home(load_client(self.client), self.client)
        self.canonical = contract_of(load_run(run_file, []), model="m" * 64).canonical()
        self.hash = contract_hash(self.canonical)
        self.file = folder / "contract.json"
        self.file.write_text(self.canonical + "\n")

    def set(self, line: str) -> None:
        """Adds a line under [site]."""
        self.client.write_text(f"{self.client.read_text()}\n[site]\n{line}\n")


@pytest.fixture
def site() -> Iterator[Accepting]:
    with tempfile.TemporaryDirectory(prefix="fp-") as folder:  # short: a socket's path has 100 bytes
        yield Accepting(Path(folder))


def types(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_what_is_accepted_is_kept_for_its_owner_alone_and_shown_in_words(site: Accepting, capfd: Screen) -> None:
    assert in_process("site", "accept", site.client, site.file, "--yes") == 0
    assert (site.home / "accepted.json").read_text() == site.canonical
    assert stat.S_IMODE((site.home / "accepted.json").stat().st_mode) == 0o600
    said = capfd.readouterr().out
    assert said.splitlines()[-1].startswith(f"east: accepted {site.hash}; ")
    assert "fedavg" in said and "3 rounds" in said


def test_without_a_file_what_was_offered_last_is_asked_about_and_y_accepts_it(
    site: Accepting, monkeypatch: pytest.MonkeyPatch
) -> None:
    acceptance.offer(site.home, site.canonical)
    types(monkeypatch, "y\n")
    assert in_process("site", "accept", site.client) == 0
    assert acceptance.accepted(site.home) == site.hash
    assert acceptance.offered_contract(site.home) is None


@pytest.mark.parametrize("answer", ["n\n", "\n"])
def test_n_or_nothing_changes_nothing(
    site: Accepting, monkeypatch: pytest.MonkeyPatch, capfd: Screen, answer: str
) -> None:
    acceptance.offer(site.home, site.canonical)
    before = files(site.home)
    types(monkeypatch, answer)
    assert in_process("site", "accept", site.client) == 3
    assert capfd.readouterr().err == f"fedpact: {site.client}: not accepted; nothing has changed\n"
    assert files(site.home) == before


def test_without_a_file_and_nothing_offered_it_says_where_to_get_one(site: Accepting, capfd: Screen) -> None:
    code, line = refusal(capfd, "site", "accept", site.client)
    assert code == 2 and line.startswith(f"{site.client}: no contract was offered yet; name the file ")
    assert not site.home.exists()


def test_yes_without_a_file_is_refused_for_nobody_has_read_what_was_offered(site: Accepting, capfd: Screen) -> None:
    acceptance.offer(site.home, site.canonical)
    code, line = refusal(capfd, "site", "accept", site.client, "--yes")
    assert code == 2 and line.startswith("--yes: only with the file of a contract that was read before")
    assert acceptance.accepted(site.home) is None


@pytest.mark.parametrize("indent", [1, None])
def test_a_reformatted_file_is_refused(site: Accepting, capfd: Screen, indent: int | None) -> None:
    site.file.write_text(json.dumps(json.loads(site.canonical), indent=indent))
    code, line = refusal(capfd, "site", "accept", site.client, site.file, "--yes")
    assert code == 2 and line.startswith(f"{site.file}: was reformatted, and its hash is now no run's; ")
    assert acceptance.accepted(site.home) is None


def test_what_is_no_contract_is_refused(site: Accepting, capfd: Screen) -> None:
    site.file.write_text("{}")
    code, line = refusal(capfd, "site", "accept", site.client, site.file, "--yes")
    assert code == 3 and line.startswith("contract not understood: ")


def test_a_ceiling_of_the_client_file_refuses(site: Accepting, capfd: Screen) -> None:
    site.set("max_rounds = 2")
    code, line = refusal(capfd, "site", "accept", site.client, site.file, "--yes")
    assert (code, line) == (3, f"{site.client}: site.max_rounds: the run asks for 3, allowed are 2")
    assert acceptance.accepted(site.home) is None


def test_another_contract_than_the_client_file_names_is_refused(site: Accepting, capfd: Screen) -> None:
    site.set(f'accept = "{"0" * 64}"')
    code, line = refusal(capfd, "site", "accept", site.client, site.file, "--yes")
    assert (
        code == 3 and line == f"{site.client}: site.accept: {'0' * 64} is accepted there; this contract is {site.hash}"
    )
    assert acceptance.accepted(site.home) is None


def test_the_contract_that_the_client_file_names_is_accepted(site: Accepting) -> None:
    site.set(f'accept = "{site.hash}"')
    assert in_process("site", "accept", site.client, site.file, "--yes") == 0


def test_one_folder_has_one_service_at_a_time(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with alone(home), pytest.raises(RefusedError, match="another site service works here; stop it first"), alone(home):
        raise AssertionError("both are in")
    with alone(home):
        assert stat.S_IMODE((home / "lock").stat().st_mode) == 0o600


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic links"), alone(home):
        raise AssertionError("in")
    assert not (tmp_path / "elsewhere").exists()


def test_a_second_service_is_refused_before_it_opens_a_socket(site: Accepting, capfd: Screen) -> None:
    with alone(site.home):
        code, line = refusal(capfd, "site", "serve", site.client)
    assert (code, line) == (3, f"{site.home}: another site service works here; stop it first")
    assert not site.client.with_suffix(".socket").exists()


def test_a_service_says_under_which_contract_it_works(
    site: Accepting, monkeypatch: pytest.MonkeyPatch, capfd: Screen
) -> None:
    monkeypatch.setattr(site_service, "load_site", lambda path: None)
    monkeypatch.setattr(site_service, "serve_members", lambda members, peers, ready: ready())
    acceptance.accept(site.home, site.canonical)
    site_service.serve(site.client)
    assert f"contract {site.hash[:16]} accepted" in capfd.readouterr().out
