"""docs/deploy.md: its commands exist with these options, and it says what the code and the units say."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import ssl
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
import typer

from fedpact.cli.example import example_files, site_example
from fedpact.cli.main import app
from fedpact.runtime.client_config import ClientConfig
from fedpact.runtime.config import RunConfig
from fedpact.runtime.contract import contract_of
from fedpact.runtime.plain import in_words, leaves

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
UNITS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "deploy").glob("*.service")}
FLOWER = importlib.util.find_spec("flwr")
needs_flower = pytest.mark.skipif(FLOWER is None, reason="needs flwr")
SOURCES = {
    "flower-superlink": "superlink/cli/flower_superlink.py",
    "flower-superexec": "supercore/cli/flower_superexec.py",
    "flower-supernode": "supernode/cli/flower_supernode.py",
    "run": "cli/run/run.py",
    "list": "cli/ls.py",
    "stop": "cli/stop.py",
    "supernode register": "cli/supernode/register.py",
    "supernode unregister": "cli/supernode/unregister.py",
    "supernode list": "cli/supernode/ls.py",
}
"""Where the options of Flower's programs, and of the commands of `flwr`, are declared."""


def blocks(language: str) -> list[str]:
    """The fenced blocks of the page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def shell_lines() -> list[str]:
    """What a reader copies."""
    return "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()


def inline_code() -> list[str]:
    """Code in the prose and the tables."""
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    return [text for text in re.findall(r"`([^`\n]+)`", prose) if re.match("fedpact |flwr |flower-", text)]


def calls(lines: list[str], program: str) -> list[list[str]]:
    """The words of each call of a program whose name matches, its name first, whatever stands before it."""
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        places = [i for i, word in enumerate(words) if re.fullmatch(rf"(/opt/fedpact/bin/)?({program})", word)]
        if places and len(words) > places[0] + 1:
            found.append([Path(words[places[0]]).name, *words[places[0] + 1 :]])
    return found


def options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if re.match("--?[a-z]", word)}


def flower_source(name: str) -> str:
    assert FLOWER is not None and FLOWER.origin is not None
    folder = Path(FLOWER.origin).parent
    return "".join((folder / path).read_text() for path in (SOURCES[name], "common/args.py"))


def fedpact_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that these words call, and what follows its name."""
    command: click.Command = typer.main.get_command(app)
    while (below := getattr(command, "commands", None)) and words:
        assert words[0] in below, f"fedpact has no command {words[0]!r}"
        command, words = below[words[0]], words[1:]
    return command, words


def split(command: click.Command, words: list[str]) -> tuple[list[str], set[str]]:
    """Positional words, and the names of the options, as the command takes them."""
    takes = {name: not getattr(one, "is_flag", False) for one in parameters(command, "option") for name in one.opts}
    positional: list[str] = []
    named, rest = set(), iter(words)
    for word in rest:
        if not word.startswith("-"):
            positional.append(word)
            continue
        assert word in takes, f"no option {word}"
        named.add(word)
        if takes[word]:
            assert not next(rest, "-").startswith("-"), f"{word} needs a value"
    return positional, named


def parameters(command: click.Command, kind: str) -> list[click.Parameter]:
    return [one for one in command.params if one.param_type_name == kind]


COPIED = [words[1:] for words in calls(shell_lines(), "fedpact")]
TOLD = [words[1:] for words in calls(inline_code(), "fedpact")]
FLOWERS = calls([*shell_lines(), *inline_code()], r"flwr|flower-[a-z]+")


def test_the_page_has_every_command_of_a_member_and_of_a_coordinator() -> None:
    copied = {" ".join(words[: 2 if words[0] == "site" else 1]) for words in COPIED}
    told = {" ".join(words[: 2 if words[0] == "site" else 1]) for words in TOLD}
    assert copied >= {f"site {name}" for name in ("init", "check", "accept", "ledger")}
    assert copied >= {"contract", "run", "status", "resume", "verify", "report", "doctor"}
    assert told >= {"site serve", "site connect"} and len(FLOWERS) >= 6


@pytest.mark.parametrize("words", TOLD, ids=" ".join)
def test_a_command_in_the_text_exists_with_its_options(words: list[str]) -> None:
    command, rest = fedpact_command(words)
    assert options(rest) <= {name for one in parameters(command, "option") for name in one.opts}


@pytest.mark.parametrize("words", COPIED, ids=" ".join)
def test_a_command_to_copy_exists_with_its_options_and_has_all_that_it_needs(words: list[str]) -> None:
    command, rest = fedpact_command(words)
    positional, named = split(command, rest)
    arguments = parameters(command, "argument")
    most = len(positional) if any(one.nargs == -1 for one in arguments) else len(arguments)
    assert sum(one.required for one in arguments) <= len(positional) <= most
    assert {one.opts[0] for one in parameters(command, "option") if one.required} <= named


@needs_flower
@pytest.mark.parametrize("words", FLOWERS, ids=" ".join)
def test_a_flower_command_on_the_page_exists_with_its_options(words: list[str]) -> None:
    program, *rest = words
    if program == "flwr":
        program = " ".join(rest[: 2 if rest[0] == "supernode" else 1])
    source = flower_source(program)
    assert [one for one in options(rest) if not re.search(rf'["/]{one}["/]', source)] == []


def test_the_settings_in_the_table_are_those_of_the_coordinators_units() -> None:
    table = PAGE[PAGE.index("| setting | why |") : PAGE.index("### 4. Close")]
    shown = re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in table.strip().splitlines()))
    units = UNITS["fedpact-superlink.service"] + UNITS["fedpact-superexec.service"]
    units = units.replace("0.0.0.0", "127.0.0.1").replace("%S", "/var/lib")  # as the page's sed does
    assert len(shown) > 8
    assert [one for one in shown if one not in units and f"{one}.service" not in UNITS] == []


def test_every_unit_is_copied_and_every_user_of_a_unit_is_made() -> None:
    for name, text in UNITS.items():
        assert f"deploy/{name}" in PAGE
        user = re.search("^User=(.*)$", text, flags=re.MULTILINE)
        assert user is not None
        assert re.search(rf"^useradd .* {user[1].replace('%i', 'north')}$", PAGE, flags=re.MULTILINE)


def test_files_lie_where_the_units_look_for_them() -> None:
    for text in UNITS.values():
        started = text[text.index("ExecStart=") :].splitlines()[0].replace("%i", "north")
        for path in re.findall(r"%[St]/\S+?(?=['\"]|\s|$)|/etc/\S+", started):
            place = path.replace("%S", "/var/lib").replace("%t", "/run").rstrip("\"'")
            assert str(Path(place).parent) in PAGE, place


def test_the_documented_service_table_is_what_the_units_expect() -> None:
    example = site_example("north")["north.toml"]
    table = next(tomllib.loads(block)["service"] for block in blocks("toml") if "[service]" in block)
    config = ClientConfig.model_validate({**tomllib.loads(example), "service": table})
    assert f"%t/fedpact/%i/{Path(table['socket']).name}" in UNITS["fedpact-connect@.service"]
    assert str(config.service.socket) == "/run/fedpact/north/site.sock"
    assert config.service.peers == ("fpnode-north",)


def test_the_excerpt_of_a_contract_is_what_is_printed() -> None:
    run = RunConfig.model_validate(tomllib.loads(example_files()["run.toml"]))
    contract = contract_of(run, model="0" * 64)
    site = ClientConfig.model_validate(tomllib.loads(site_example("north")["north.toml"])).site
    printed = [*in_words(contract, "0" * 64), *leaves(site, contract)]
    excerpt = [line for line in blocks("text")[0].splitlines() if line != "..."]
    assert len(excerpt) > 8
    assert [line for line in excerpt if line not in printed] == []


@needs_flower
def test_the_proxy_lets_through_what_a_node_calls_and_nothing_else() -> None:
    (pattern,) = re.findall(r"location ~ (\S+) \{", blocks("nginx")[0])
    assert FLOWER is not None and FLOWER.origin is not None
    folder = Path(FLOWER.origin).parent
    called = re.findall(r'path="(/v1/\S+)"', (folder / "supernode/fleet_http_client.py").read_text())
    assert len(called) > 8
    passed = {path for path in called if re.match(pattern, path)}
    assert set(called) - passed == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    routes = re.findall(r'"/([a-z-]+)"', (folder / "superlink/routers/control/router.py").read_text())
    assert len(routes) > 20
    others = [f"/v1/control/{name}" for name in routes] + [f"/v1/fleet/x/../../control/{name}" for name in routes]
    others += re.findall(r'path="(/v1/\S+)"', (folder / "supercore/runtime/runtime_http_client.py").read_text())
    assert [path for path in [*others, "/health", "/v1/fleet/"] if re.match(pattern, path)] == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_documented_certificates_are_made_and_trusted(tmp_path: Path) -> None:
    (script,) = [block for block in blocks("sh") if "openssl req" in block]
    done = subprocess.run(["sh", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "server.crt: OK" in done.stdout and "notAfter=" in done.stdout
    assert (tmp_path / "server.key").stat().st_mode & 0o077 == 0
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    for name, fits in {"fl.example.org": True, "127.0.0.1": True, "other.example.org": False}.items():
        assert handshake(client, server, name) == fits, name


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> bool:
    """Whether the client trusts the server under this name; no network."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there, server_hostname=name), server.wrap_bio(there, back, server_side=True)]
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return True


def test_run_config_keys_and_their_defaults_are_those_of_the_app() -> None:
    keys = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    shown = {f"| `{key}` | `" for key in keys}
    assert len(shown) == 4 and [row for row in shown if row not in PAGE] == []
    for key in ("run-file", "run", "rounds"):
        value = '""' if keys[key] == "" else str(keys[key])
        assert f"| `{key}` | `{value}` |" in PAGE
    assert f'| `run-name` | `"{keys["run-name"]}"` |' in PAGE


def test_waits_and_versions_on_the_page_are_those_of_the_code() -> None:
    edge = {path.stem: path.read_text() for path in (ROOT / "src/fedpact/edge").glob("*.py")}
    assert "patience_s: float = 60.0" in edge["connect"] and "waits\n60 s for a site service" in PAGE
    assert "reconnect_s: float = 90.0" in edge["grid"] and "waits 90 s for a link" in PAGE
    assert "_MAX_PUSHES = 8" in edge["grid"] and "lost its connection 8 times" in PAGE
    assert "_MEMBERS_S = 600.0" in edge["server_app"] and "ten minutes for its first `min_replies`" in PAGE
    assert "_PATIENCE_S = 600.0" in edge["submit"] and "asks again for ten minutes" in PAGE
    assert "RestartSec=65" in UNITS["fedpact-supernode@.service"] and "`RestartSec=65`" in PAGE
    assert "OLDEST, BELOW = (1, 41), (1, 43)" in edge["flower_private"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["flower"] == ["flwr>=1.41,<1.43"]
    assert "flwr at least 1.41, below 1.43; tested with 1.41.0" in PAGE
    pinned = re.findall(r"pip install (torch==\S+)", PAGE)
    assert len(pinned) == 2 and set(pinned) <= set((ROOT / "constraints.txt").read_text().splitlines())
