"""The systemd units: they parse, their commands and options exist, and each service is shut in as its comments say."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer

from fedpact.cli.main import app

ROOT = Path(__file__).parents[2]
UNITS = sorted(path.name for path in (ROOT / "deploy").glob("*.service"))
MEMBERS = ["fedpact-connect@.service", "fedpact-site@.service", "fedpact-supernode@.service"]
COORDINATORS = ["fedpact-superexec.service", "fedpact-superlink.service"]
FLOWERS = [name for name in UNITS if name not in ("fedpact-site@.service", "fedpact-connect@.service")]


def unit(name: str) -> configparser.ConfigParser:
    """The unit's sections; of a repeated key the last value."""
    found = configparser.ConfigParser(
        strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",), empty_lines_in_values=False
    )
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read(ROOT / "deploy" / name)
    return found


def words(name: str) -> list[str]:
    """The words of what it starts, the program's name first."""
    program, *rest = shlex.split(unit(name)["Service"]["ExecStart"])
    assert Path(program).parent == Path("/opt/fedpact/bin")
    return [Path(program).name, *rest]


def value_of(name: str, option: str) -> str:
    """What follows that option."""
    found = words(name)
    return found[found.index(option) + 1]


def environment(name: str) -> set[str]:
    """Every variable that it sets, as NAME=VALUE."""
    lines = (ROOT / "deploy" / name).read_text().splitlines()
    return {one for line in lines if line.startswith("Environment=") for one in line[12:].split()}


def fedpact_command(names: list[str]) -> click.Command:
    """The command behind `fedpact NAMES`."""
    command: click.Command = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]  # type: ignore[attr-defined]
    return command


def test_there_is_a_unit_for_every_process() -> None:
    assert sorted(MEMBERS + COORDINATORS) == UNITS


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_has_its_three_sections_and_starts_at_boot(name: str) -> None:
    assert unit(name).sections() == ["Unit", "Service", "Install"]
    assert unit(name)["Install"]["WantedBy"] == "multi-user.target"
    assert ("%i" in unit(name)["Service"]["User"]) == ("@" in name)


def test_the_site_service_is_started_as_its_command_takes_it() -> None:
    program, group, command, *rest = words("fedpact-site@.service")
    assert (program, group, command, rest) == ("fedpact", "site", "serve", ["%S/fedpact/%i/%i.toml"])
    arguments = [one for one in fedpact_command(["site", "serve"]).params if one.param_type_name == "argument"]
    assert len(arguments) == 1


def test_the_direct_link_is_started_with_options_that_its_command_has_and_all_that_it_needs() -> None:
    program, group, command, *rest = words("fedpact-connect@.service")
    assert (program, group, command) == ("fedpact", "site", "connect")
    parameters = fedpact_command(["site", "connect"]).params
    known = {option for one in parameters for option in one.opts}
    needed = {one.opts[0] for one in parameters if one.required}
    given = set(rest[::2])
    assert given == {"--superlink", "--root-certificates", "--key", "--socket"}
    assert needed <= given <= known and "--insecure" in known


@pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="needs flwr")
@pytest.mark.parametrize("name", FLOWERS)
def test_a_flower_process_is_started_with_options_that_flower_has(name: str) -> None:
    spec = importlib.util.find_spec("flwr")
    assert spec is not None and spec.origin is not None
    program, *rest = words(name)
    layers = {"flower-superexec": "supercore", "flower-superlink": "superlink", "flower-supernode": "supernode"}
    own = f"{layers[program]}/cli/{program.replace('-', '_')}.py"
    declared = [own, "common/args.py", "supercore/auth/superexec_secret.py"]  # `--help` would take seconds
    source = "".join((Path(spec.origin).parent / path).read_text() for path in declared)
    options = [word for word in rest if word.startswith("--")]
    assert len(options) >= 3
    assert [option for option in options if f'"{option}"' not in source] == []
    assert "--insecure" not in options


@pytest.mark.parametrize("name", UNITS)
def test_a_service_gains_no_rights_and_writes_its_own_folders_alone(name: str) -> None:
    service = unit(name)["Service"]
    for key in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "ProtectKernelTunables"):
        assert service[key] == "yes"
    assert (service["ProtectSystem"], service["UMask"], service["CapabilityBoundingSet"]) == ("strict", "0077", "")
    assert service["StateDirectoryMode"] == "0700" and service["User"] != "root"
    assert service["KillSignal"] == "SIGTERM"


def test_the_site_service_has_no_network_and_may_compile_kernels() -> None:
    service = unit("fedpact-site@.service")["Service"]
    assert (service["PrivateNetwork"], service["RestrictAddressFamilies"]) == ("yes", "AF_UNIX")
    assert "MemoryDenyWriteExecute" not in service
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", "2")


def test_only_the_sockets_group_is_shared_by_the_two_users_of_a_member() -> None:
    site = unit("fedpact-site@.service")["Service"]
    assert (site["User"], site["Group"]) == ("fpsite-%i", "fpnode-%i")
    assert (site["RuntimeDirectory"], site["RuntimeDirectoryMode"]) == ("fedpact/%i", "0750")
    for name in ("fedpact-connect@.service", "fedpact-supernode@.service"):
        front = unit(name)["Service"]
        assert (front["User"], front["Group"]) == ("fpnode-%i", site["Group"])
        assert front["StateDirectory"] != site["StateDirectory"] and front["InaccessiblePaths"] == "-%S/fedpact"


def test_both_front_ends_look_for_the_socket_where_the_site_service_has_its_folder() -> None:
    folder = unit("fedpact-site@.service")["Service"]["RuntimeDirectory"]
    assert value_of("fedpact-connect@.service", "--socket") == f"%t/{folder}/site.sock"
    key, _, path = value_of("fedpact-supernode@.service", "--node-config").partition("=")
    assert path == f'"%t/{folder}/site.sock"'
    assert f'"{key}"' in (ROOT / "fedpact_app" / "client_app.py").read_text()


def test_the_front_ends_use_one_key_and_never_run_together() -> None:
    connect, supernode = (f"fedpact-{name}@.service" for name in ("connect", "supernode"))
    key = value_of(connect, "--key")
    assert key == value_of(supernode, "--auth-supernode-private-key")
    assert key.startswith(f"%S/{unit(connect)['Service']['StateDirectory']}/")  # its lock and ID are written beside it
    assert unit(connect)["Unit"]["Conflicts"] == supernode.replace("@", "@%i")
    assert unit(supernode)["Unit"]["Conflicts"] == connect.replace("@", "@%i")


def test_a_supernode_starts_again_only_when_its_key_is_taken_again() -> None:
    service = unit("fedpact-supernode@.service")["Service"]
    assert service["Restart"] == "always" and int(service["RestartSec"]) > 60
    assert int(unit("fedpact-connect@.service")["Service"]["RestartSec"]) == 5
    for name in ("fedpact-connect@.service", "fedpact-supernode@.service"):
        assert unit(name)["Unit"]["StartLimitIntervalSec"] == "0"  # it tries for as long as it takes


@pytest.mark.parametrize("name", FLOWERS)
def test_flower_neither_phones_home_nor_installs_anything(name: str) -> None:
    off = {"FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1"}
    assert off <= environment(name)


def test_the_superlink_takes_registered_nodes_and_keeps_runs_out_of_its_process() -> None:
    given = words("fedpact-superlink.service")
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(given)
    assert value_of("fedpact-superlink.service", "--isolation") == "process"
    secret = value_of("fedpact-superlink.service", "--superexec-auth-secret-file")
    assert secret == value_of("fedpact-superexec.service", "--superexec-auth-secret-file")
    port = value_of("fedpact-superlink.service", "--port")
    assert value_of("fedpact-superexec.service", "--runtime-api-address") == f"127.0.0.1:{port}"
    server, runs = (unit(name)["Service"] for name in ("fedpact-superlink.service", "fedpact-superexec.service"))
    assert server["User"] != runs["User"] and runs["InaccessiblePaths"] == f"-%S/{server['StateDirectory']}"


def test_the_serverapp_has_its_folder_of_runs() -> None:
    folder = unit("fedpact-superexec.service")["Service"]["StateDirectory"]
    assert f"FEDPACT_FOLDER=%S/{folder}" in environment("fedpact-superexec.service")
    assert '"FEDPACT_FOLDER"' in (ROOT / "src/fedpact/edge/server_app.py").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_finds_nothing_to_complain_of(tmp_path: Path) -> None:
    for name in UNITS:
        text = (ROOT / "deploy" / name).read_text()
        text = re.sub(r"/opt/fedpact/bin/\S+", "/bin/true", text)  # what is not installed here
        (tmp_path / name.replace("@", "@north")).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
