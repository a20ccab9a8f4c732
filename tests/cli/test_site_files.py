"""A member's folder: what `fedpact site init` writes, and what `fedpact site check` finds in it."""

from __future__ import annotations

import getpass
import importlib.util
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from fedpact.cli import site_files
from fedpact.edge.site import site_home, site_peers, site_socket
from fedpact.errors import ConfigError, RewardError
from fedpact.policy.model import model_hash
from fedpact.rewards.load import load_reward
from fedpact.runtime.acceptance import accept
from fedpact.runtime.client_config import load_client
from fedpact.runtime.config import RunConfig
from fedpact.runtime.contract import contract_of
from fedpact.runtime.files import make_private
from fedpact.runtime.prompts import split_prompts
from tests.cli.conftest import edit, files, model
from tests.conftest import tokenizer

__all__ = ["model"]

flower = pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="needs flwr")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A member's folder as it was written, with a model whose tokenizer takes chats; to be copied."""
    folder = tmp_path_factory.mktemp("sites") / "north"
    site_files.init(folder, "north")
    shutil.copytree(model, folder / "model")
    words = tokenizer()
    words.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    words.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def client(written: Path, tmp_path: Path) -> Path:
    """The client file of a folder of one's own."""
    folder = tmp_path / "s"
    shutil.copytree(written, folder)
    folder.chmod(0o700)
    return folder / "north.toml"


def accepted(client: Path, **changes: object) -> str:
    """Accept a contract over the folder's model; its canonical text."""
    table = {
        "rounds": 4,
        "objectives": {"correct": {"primary": True}, "format": {}},
        "policy": {"model": "model", "lora": {"r": 2}},
        "rollout": {"num_generations": 2, "max_completion_length": 3},
        "algorithm": {"name": "fedavg", "local_steps": 2},
        **changes,
    }
    canonical = contract_of(RunConfig.model_validate(table), model=model_hash(client.parent / "model")).canonical()
    accept(site_home(load_client(client), client), canonical)
    return canonical


def said(client: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """What `check` says."""
    capfd.readouterr()
    site_files.check(client)
    return capfd.readouterr().out.splitlines()


def warnings(lines: list[str]) -> list[str]:
    """The warnings, but for the one that a test may run as root."""
    return [line for line in lines if line.startswith("warning: ") and "this is root" not in line]


# --- init ---------------------------------------------------------------------------------------------------------


def test_what_init_writes_loads_as_a_member(written: Path) -> None:
    client = written / "north.toml"
    config = load_client(client)
    assert (config.name, list(config.rewards), config.model.path) == ("north", ["correct", "format"], "./model")
    assert config.prompts is not None
    train, heldout = split_prompts(config.prompts, written, where="prompts")
    assert len(train) + len(heldout) == 40 and len(heldout) > 4
    assert site_home(config, client) == written / "north.site"
    assert site_socket(config, client) == written / "north.socket" / "site.sock"
    assert site_peers(config, "north.toml") == {os.getuid()}
    assert None not in (config.site.max_rounds, config.site.max_local_steps, config.site.max_learning_rate)


def test_its_own_reward_is_called_as_trl_calls_one(written: Path) -> None:
    reward = load_reward("rewards.py:short", {}, where="rewards.format", folder=written)
    chats = [[{"role": "assistant", "content": text}] for text in ("brief", "long " * 100)]
    assert reward(["a", "b"], chats, answer=["1", "2"]) == [1.0, 0.0]


def test_only_its_owner_can_read_what_init_writes(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        site_files.init(tmp_path / "new", "east")
    finally:
        os.umask(umask)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]}
    assert {path.name: mode for path, mode in modes.items() if mode & 0o077} == {}
    assert len((tmp_path / "new" / "east.site" / "secret").read_bytes()) == 32


@flower
def test_the_key_is_one_that_a_supernode_takes(written: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

    key = load_ssh_private_key((written / "node" / "key").read_bytes(), password=None)
    public = load_ssh_public_key((written / "node" / "key.pub").read_bytes())
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert key.public_key().public_numbers() == public.public_numbers()


def test_two_members_have_different_secrets(written: Path, tmp_path: Path) -> None:
    site_files.init(tmp_path / "new", "north")
    assert (tmp_path / "new/north.site/secret").read_bytes() != (written / "north.site/secret").read_bytes()


def test_init_says_in_order_what_comes_next(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    site_files.init(tmp_path / "new", "east")
    lines = capfd.readouterr().out.splitlines()
    assert 4 <= len(lines) <= 7 and lines[0].startswith(f"wrote {tmp_path / 'new'}")
    steps = ["under the name east", "site check", "site accept", "site serve", "site connect --superlink"]
    assert [n for n, step in enumerate(steps) if step in " ".join(lines)] == list(range(5))
    places = [" ".join(lines).index(step) for step in steps]
    assert places == sorted(places)
    connect = lines[-1].split()
    assert connect[connect.index("--key") + 1] == str(tmp_path / "new" / "node" / "key")
    assert connect[connect.index("--socket") + 1] == str(tmp_path / "new" / "east.socket" / "site.sock")


def test_without_flwr_init_says_how_a_key_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fedpact.edge.flower_private", None)
    site_files.init(tmp_path / "new", "east")
    assert f"ssh-keygen -t ecdsa -b 384 -N '' -f {tmp_path}/new/node/key" in capfd.readouterr().out
    assert list((tmp_path / "new" / "node").iterdir()) == []


@pytest.mark.parametrize("name", ["", "../x", "a b", "all", "server", "x" * 65, "-x", "north\n", "a/b", 'x"'])
def test_a_name_that_no_member_can_have_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--name: found "):
        site_files.init(tmp_path / "new", name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for place in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ConfigError, match="not empty; give a new folder"):
            site_files.init(place, "north")
    assert files(tmp_path) == {"mine": b"mine"}


# --- check --------------------------------------------------------------------------------------------------------


def test_check_without_a_contract_says_what_may_leave_and_what_is_missing(
    client: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = said(client, capfd)
    counted = lines[0].split()
    assert counted[0] == "prompts:" and lines[0].endswith("rewards: correct, format")
    assert lines[1] == f"model: {client.parent / 'model'}, SHA-256 {model_hash(client.parent / 'model')}"
    assert f"socket: {client.parent / 'north.socket' / 'site.sock'}, for the users {os.getuid()}" in lines
    assert "what may leave, whatever contract is accepted:" in lines
    assert any("no formal privacy" in line for line in lines)
    assert "  ceiling max_rounds: 200" in lines
    assert len(warnings(lines)) == 1 and "no contract is accepted" in warnings(lines)[0]


def test_with_an_accepted_contract_two_prompts_are_completed_and_rewarded(
    client: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    accepted(client)
    lines = said(client, capfd)
    assert any("; mean rewards of 4 completions: correct 0.00, format 1.00" in line for line in lines)
    assert "what may leave:" in lines and "  ceiling max_rounds: 200; this run asks for 4" in lines
    assert warnings(lines) == []
    assert lines[-1].startswith(f"{client}: ready, ")


def test_check_writes_nothing(client: Path, capfd: pytest.CaptureFixture[str]) -> None:
    accepted(client)
    before = files(client.parent)
    said(client, capfd)
    assert files(client.parent) == before


def test_a_reward_that_fails_on_the_first_completions_shows(client: Path) -> None:
    accepted(client)
    edit(client.parent / "rewards.py", "return [1.0 if", "return [1.0] if len(texts) > 99 else [1.0 / 0 if")
    with pytest.raises(RewardError, match=r"rewards\.format.*ZeroDivisionError"):
        site_files.check(client)


def test_another_model_than_the_contracts_shows(client: Path) -> None:
    accepted(client)
    config = json.loads((client.parent / "model" / "generation_config.json").read_text())
    (client.parent / "model" / "generation_config.json").write_text(json.dumps({**config, "top_k": 7}))
    with pytest.raises(ConfigError, match=r"hashes to .*, the contract's model to "):
        site_files.check(client)


def test_a_run_above_a_ceiling_is_refused(client: Path) -> None:
    accepted(client, rounds=201)
    with pytest.raises(Exception, match=r"site\.max_rounds: the run asks for 201, allowed are 200"):
        site_files.check(client)


@pytest.mark.parametrize(
    ("place", "mode", "bits"),
    [
        ("north.site", 0o750, "go-rwx"),
        ("north.site/secret", 0o640, "go-rwx"),
        ("node/key", 0o644, "go-rwx"),
        ("north.toml", 0o620, "go-w"),
        ("rewards.py", 0o602, "go-w"),
        (".", 0o770, "go-w"),
        ("north.socket", 0o770, "0750"),
        ("north.socket", 0o751, "0750"),
    ],
)
def test_what_is_open_to_others_is_warned_of_with_the_remedy(
    place: str, mode: int, bits: str, client: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    accepted(client)
    path = client.parent / place
    if not path.exists():
        path.mkdir(mode=0o700) if place != "node/key" else path.write_text("key")
    path.chmod(mode)
    assert warnings(said(client, capfd)) == [f"warning: {path}: open to others (mode {mode:04o}); chmod {bits} {path}"]


def test_a_socket_folder_for_a_group_is_as_it_should_be(client: Path, capfd: pytest.CaptureFixture[str]) -> None:
    accepted(client)
    (client.parent / "north.socket").mkdir()
    (client.parent / "north.socket").chmod(0o750)
    assert warnings(said(client, capfd)) == []


def test_a_socket_path_that_the_system_does_not_take_is_refused(client: Path) -> None:
    edit(client, "north.socket/site.sock", f"{'d' * 100}/site.sock")
    with pytest.raises(ConfigError, match=r"service\.socket: \d+ bytes long, expected at most 100"):
        site_files.check(client)


def test_a_peer_that_does_not_exist_is_refused_and_one_that_does_is_listed(
    client: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(client, "peers = []", 'peers = ["4242"]')
    assert any(line.startswith("socket: ") and "4242" in line for line in said(client, capfd))
    edit(client, 'peers = ["4242"]', 'peers = ["no-such-user-here"]')
    with pytest.raises(ConfigError, match=r"service\.peers: no user 'no-such-user-here' here"):
        site_files.check(client)


def test_missing_ceilings_and_a_missing_model_are_warned_of(client: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(client, "max_rounds = 200\n", "")
    edit(client, "max_learning_rate = 1e-3\n", "public_sampling = true\n")
    edit(client, 'path = "./model"', "trust_remote_code = true")
    found = " ".join(warnings(said(client, capfd)))
    for what in ("no ceiling max_rounds, max_learning_rate:", "public_sampling", "trust_remote_code", "model.path is"):
        assert what in found


def test_another_users_folder_is_warned_of(client: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() != 0:
        pytest.skip(f"{getpass.getuser()} cannot give a file away")
    accepted(client)
    home = client.parent / "north.site"
    os.chown(home, 4242, -1)
    assert warnings(said(client, capfd)) == [
        f"warning: {home}: belongs to user 4242, this is 0; run this as the service's user"
    ]
    make_private(home)


def test_texts_of_a_client_file_cannot_command_a_terminal(client: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(client, 'share = ["rewards", "accuracy"]', 'share = ["metrics"]\nmetrics = ["\\u001b[2Jx"]')
    lines = said(client, capfd)
    assert any("those named" in line for line in lines) and not any("\x1b" in line for line in lines)
