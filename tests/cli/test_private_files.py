"""Who may read and write a run's files, and which names lead out of its folder."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from fedpact.cli.plan import slug_of
from fedpact.cli.variants import variants
from fedpact.errors import ConfigError, StoreError
from fedpact.runtime.client_config import ClientConfig
from fedpact.runtime.config import RunConfig
from fedpact.runtime.files import read_folder, write_folder
from fedpact.runtime.spool import Spool, safe_name
from fedpact.runtime.store import RunFolder
from fedpact.runtime.toml import read_toml, validated
from tests.cli.conftest import finished, in_process, model, refusal, run_file

__all__ = ["finished", "model", "run_file"]

NAMES = [
    *("..", ".", "../x", "../../x", "../../../../../../etc/passwd", "a/../../x", "a/..", "./x", "/x", "//x", "x/", "/"),
    *("..\\x", "..\\..\\x", "\\x", "\\\\host\\share", "C:\\x", "C:x", "c:/x", "D:..\\x", "\\\\?\\C:\\x", "file:///x"),
    *(
        "\0",
        "x\0",
        "\0x",
        "x\0y",
        "../x\0.toml",
        "%00",
        "x%00y",
        "%2e%2e%2fx",
        "%2e%2e/x",
        "..%2fx",
        "%252e%252e%252fx",
    ),
    *("..%c0%afx", "..%ef%bc%8fx", "．．／x", "‥/x", "…/x", "..∕x", "..⁄x", "..／x", "..⧸x", "..╱x", "․․/x", "..＼x"),
    *(
        ".x",
        "..x",
        ".ssh",
        ".git/config",
        ".lock",
        ".run.json.tmp",
        "~",
        "~/x",
        "~root/x",
        "$HOME",
        "${HOME}/x",
        "`id`",
    ),
    *(
        "$(id)",
        "x;id",
        "x|id",
        "x&id",
        "x>y",
        "x<y",
        "x*y",
        "x?y",
        "[x]",
        "{x,y}",
        "!x",
        "#x",
        "'x'",
        '"x"',
        "-x",
        "--out",
    ),
    *(
        " ",
        " x",
        "x ",
        "x y",
        "\t",
        "x\ny",
        "\nx",
        "x\r",
        "\x1b[2J",
        "x\u202ey",
        "x\u200by",
        "\ufeffx",
        "x\u2028y",
        "\ud800",
    ),
    *(
        "x" * 65,
        "x" * 256,
        "x" * 5000,
        "../" * 50 + "x",
        "../" * 1400 + "x",
        "a/" * 200,
        ".." * 40,
        "é" * 40,
        "\U0001f600",
    ),
    *(
        "CON:",
        "LPT1/",
        "aux:x",
        "x:y",
        "x::$DATA",
        "x/.",
        "x//y",
        "x/./y",
        "_x",
        "+x",
        "=x",
        "@x",
        "名前",
        "имя",
        "ａ",
    ),
    *("", "all", "server"),
]
PARTS = ("..", "...", "%2e%2e", "．．", "..\0", "..;"), ("/", "\\", "／", "%2f", "//"), ("etc", "..", "x\0", " ")
NAMES += ["".join(parts) for parts in itertools.product(*PARTS)]


def test_there_are_two_hundred_names() -> None:
    assert len(set(NAMES)) >= 200


def below(folder: Path) -> dict[str, int]:
    """Everything in a folder, and in the one above it."""
    return {str(path): path.lstat().st_mode for path in folder.parent.rglob("*")}


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_member_cannot_be_called_like_a_path(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(ClientConfig, {"name": name, "rewards": {"low": {"use": "a:b"}}}, where="clients/x.toml")
    line = str(caught.value)
    assert line.startswith("clients/x.toml: name: ") and line.isprintable() and len(line) < 500


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("all", "server", "x" * 65)])
def test_no_export_and_no_spooled_reply_has_a_path_for_a_name(tmp_path: Path, name: str) -> None:
    store, before = RunFolder.create(tmp_path / "in" / "run"), below(tmp_path / "in")
    with pytest.raises(ValueError, match="cannot be a file name"):
        safe_name(name)
    with pytest.raises(ValueError, match="cannot be a file name"):
        store.write_final(name, {}, {}, "")
    with pytest.raises(ValueError, match="cannot be a file name"):
        Spool(tmp_path / "in" / "spool").get(name)
    store.close()
    assert below(tmp_path / "in") == before


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("all", "server", "x" * 65, "=x")])
def test_soups_refuse_objectives_that_cannot_name_a_folder_before_anything_is_trained(name: str) -> None:
    data = {"rounds": 1, "objectives": {name: {}}, "policy": {"model": "m"}, "algorithm": {"name": "soups"}}
    with pytest.raises(ConfigError) as caught:
        validated(RunConfig, data, where="run.toml")
    line = str(caught.value)
    assert line.startswith("run.toml: objectives: ") and line.isprintable() and len(line) < 1100
    assert "cannot name the folder of an adapter" in line or len(name) > 200


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_variants_folder_lies_in_the_comparison(tmp_path: Path, name: str) -> None:
    slug = slug_of(name)
    assert (tmp_path / slug).resolve().parent == tmp_path.resolve()
    assert not slug.startswith((".", "-")) and slug.isascii() and slug.isprintable() and len(slug) < 100


def test_variants_of_different_names_never_share_a_folder() -> None:
    slugs: dict[str, str] = {}
    for name in dict.fromkeys(NAMES):
        assert slugs.setdefault(slug_of(name), name) == name


@pytest.mark.parametrize("name", ["", " ", "x\ny", "\x1b[2J", "x\u202ey", "\0"])
def test_a_file_of_variants_names_them_with_what_can_be_seen(tmp_path: Path, run_file: Path, name: str) -> None:
    path = tmp_path / "variants.toml"
    path.write_text(f"[{json.dumps(name)}]\nrounds = 1\n")
    with pytest.raises(ConfigError, match="expected a name and a table"):
        variants(run_file, algorithms=None, vary=[], file=path, overrides=[])


@pytest.mark.parametrize("name", [name for name in NAMES if "\0" not in name and name and not name.startswith("-")])
def test_an_export_that_is_not_there_is_one_line(finished: Path, tmp_path: Path, capfd, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        pytest.skip("no such argument can be given")
    code, line = refusal(capfd, "export", finished, "--out", tmp_path / "new", "--point", name)
    assert code == 2 and line.startswith("--point ") and line.isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", ["seed-../../x", "seed-", "../x", "seed-1/../..", "seed-\u0661", "seed-1\n", "1"])
def test_a_comparisons_child_does_not_leave_its_folder(tmp_path: Path, capfd, seed: str) -> None:
    (tmp_path / "in").mkdir()
    plan = {"schema": 1, "variants": [{"name": "a", "slug": "a", "config": {}, "files": {}}], "seeds": [1]}
    (tmp_path / "in" / "compare.json").write_text(json.dumps(plan))
    before = below(tmp_path / "in")
    code, line = refusal(capfd, "compare-one", tmp_path / "in", "a", seed)
    assert code == 2 and "expected seed- and a number" in line
    assert below(tmp_path / "in") == before


@pytest.mark.parametrize(
    "name", ["../x", "..", "/etc/passwd", "a/b", "x\0", ".", "", "MANIFEST/../../x", "x" * 300, "\ud800"]
)
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "one", {"a": b"1"})
    (tmp_path / "x").write_bytes(b"secret")
    digest = (tmp_path / "one" / "MANIFEST").read_text().split()[0]
    (tmp_path / "one" / "MANIFEST").write_bytes(f"{digest}  {name}\n".encode(errors="surrogatepass"))
    with pytest.raises(StoreError):
        read_folder(tmp_path / "one", remedy="restore it")


# --- modes -----------------------------------------------------------------------------------------------------------


def test_nobody_but_the_owner_can_read_or_enter_anything_of_a_run(run_file: Path) -> None:
    assert in_process("run", run_file, "--set", "rounds=1") == 0
    out = run_file.parent / "runs" / "run"
    assert in_process("report", out) == 0
    assert in_process("export", out, "--out", out.parent / "adapter") == 0
    assert in_process("export", out, "--out", out.parent / "model", "--merge") == 0
    found = [out.parent, *out.parent.rglob("*")]
    kinds = {stat.S_IFMT(path.lstat().st_mode) for path in found}
    assert kinds == {stat.S_IFDIR, stat.S_IFREG} and len(found) > 20
    modes = {path.relative_to(out.parent).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in found}
    odd = {name: f"{mode:04o}" for name, mode in modes.items() if mode not in (0o700, 0o600)}
    assert odd == {}
    assert all(modes[path.relative_to(out.parent).as_posix()] == (0o700 if path.is_dir() else 0o600) for path in found)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702, 0o757])
@pytest.mark.parametrize("command", ["run", "resume"])
def test_a_folder_that_everybody_can_write_is_no_place_for_a_run(
    run_file: Path, finished: Path, tmp_path: Path, capfd, mode: int, command: str
) -> None:
    out = tmp_path / "shared"
    if command == "resume":
        shutil.copytree(finished, out)
    else:
        out.mkdir()
    out.chmod(mode)
    before = below(out)
    arguments = (run_file, "--out", out) if command == "run" else (out,)
    code, line = refusal(capfd, command, *arguments)
    assert code == 4 and line.startswith(f"{out}: everybody can write there (mode {mode:04o}); `chmod 700 ")
    assert below(out) == before


def test_a_folder_in_a_shared_one_is_private_all_the_same(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)  # like /tmp
    out = tmp_path / "shared" / "deep" / "run"
    assert in_process("run", run_file, "--set", "rounds=1", "--out", out) == 0
    assert [stat.S_IMODE(path.stat().st_mode) for path in (out.parent, out)] == [0o700, 0o700]


def test_a_run_is_never_written_through_a_link(run_file: Path, tmp_path: Path, capfd) -> None:
    target = tmp_path / "victim"
    target.write_text("mine")
    out = tmp_path / "run"
    out.mkdir(mode=0o700)
    (out / ".lock").symlink_to(target)
    code, line = refusal(capfd, "run", run_file, "--out", out)
    assert code == 4 and str(out / ".lock") in line
    assert target.read_text() == "mine"


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x\u202ey", "..x", " x", "ü" * 60])
def test_a_client_file_of_an_odd_name_is_one_line(run_file: Path, capfd, name: str) -> None:
    clients = run_file.parent / "clients"
    (clients / f"{name}.toml").write_text("name = 3\n")
    before = below(clients)
    code, line = refusal(capfd, "check", run_file)
    assert code == 2 and line.isprintable() and ".toml: name: found 3; input should be a valid string" in line
    assert below(clients) == before


def test_the_paths_of_a_run_file_are_read_and_never_written(run_file: Path, capfd) -> None:
    before = below(run_file.parent)
    for key in ("simulation.clients", "policy.model", "policy.adapter"):
        for name in ("../../../..", "/etc", "/dev/null", "~", "$HOME", "/proc/self", "clients/../../../x"):
            code, line = refusal(capfd, "check", run_file, "--set", f"{key}={json.dumps(name)}")
            assert code == 2 and line.isprintable() and (key in line or "no client files" in line)
    assert below(run_file.parent) == before


def test_the_names_of_tables_reach_no_file(run_file: Path, tmp_path: Path) -> None:
    data = read_toml(run_file)
    for name in NAMES:
        if name == "accuracy":
            continue
        data["objectives"] = {name: {"primary": True}}
        validated(RunConfig, data, where="run.toml")
    assert os.listdir(tmp_path) == ["project"]  # noqa: PTH208
