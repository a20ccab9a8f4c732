"""Canaries in the environment and in what rewards and judges say: none is in any output or file of a run."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path

import pytest

from fedpact.cli import commands
from fedpact.runtime.transport import Failure
from tests.cli.conftest import edit, in_process, in_subprocess, model, run_file, write_project

__all__ = ["model", "run_file"]

CANARIES = {
    "JUDGE_API_KEY": "canary-in-the-environment-1",
    "HF_TOKEN": "hf_canaryCanaryCanary0123456789",
    "SITE_PASSWORD": "canary three with spaces",
}
SHAPES = ("sk-canary-0123456789abcdef", "AKIACANARY0123456789", "eyJjYW5hcnki.eyJjYW5hcnki.Y2FuYXJ5Y2FuYXJ5")
URL = "https://somebody:canary-of-a-url@judge.example"

_REWARD = f"""\
import os

def low(completions, **columns):
    raise_now()
    return [float(len(text)) for text in completions]

def brief(completions, **columns):
    return [-float(len(text)) for text in completions]

class Broken:
    def __init__(self):
        raise ValueError("made with " + os.environ["JUDGE_API_KEY"])
    def __call__(self, completions, **columns):
        return [0.0] * len(completions)

calls = [0]

def raise_now():
    calls[0] += 1
    if calls[0] > {{healthy}}:
        every = [os.environ[name] for name in {list(CANARIES)!r}]
        raise RuntimeError(" ".join([*every, *{list(SHAPES)!r}, {URL!r}]))
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


def failing_project(folder: Path, model: Path, *, healthy: int) -> Path:
    """A project in which east's reward fails with everything that it knows, from its (`healthy` + 1)th call."""
    path = write_project(folder, model=model, rounds=2)
    (folder / "clients" / "loud.py").write_text(_REWARD.format(healthy=healthy))
    edit(folder / "clients" / "east.toml", "rewards.py:low", "loud.py:low")
    return path


def leaks(*texts: str, folder: Path | None = None) -> list[str]:
    """Which canaries are in the texts or in a file of `folder`, other than the reward's own code."""
    sought = ["canary", "CANARY", "Y2FuYXJ5", *CANARIES.values(), *SHAPES]
    found = [one for one in sought for text in texts if one in text]
    for path in folder.rglob("*") if folder else ():
        if path.is_file() and path.suffix != ".py":
            found += [f"{path.name}: {one}" for one in sought if one.encode() in path.read_bytes()]
    return found


@pytest.mark.parametrize("healthy", [0, 3])
def test_a_reward_that_says_what_it_knows_tells_no_secret(tmp_path, model, capfd, healthy):
    path = failing_project(tmp_path / "project", model, healthy=healthy)
    code = in_process("run", path)
    out, err = capfd.readouterr()
    assert code == (2 if healthy == 0 else 0)
    assert "RuntimeError: *** *** ***" in err  # it was told, and its words were masked
    assert leaks(out, err, folder=tmp_path) == []
    if healthy:
        for command in ("status", "evaluate", "report"):
            in_process(command, path.parent / "runs" / "run")
        assert leaks(*capfd.readouterr(), folder=tmp_path) == []


@pytest.mark.slow
def test_a_comparison_passes_no_secret_on_from_its_children(tmp_path, model, capfd):
    path = failing_project(tmp_path / "project", model, healthy=3)
    in_process("compare", path, "--seeds", "1", "--set", "federation.min_replies=3")
    out, err = capfd.readouterr()
    assert "***" in err
    assert leaks(out, err, folder=tmp_path) == []


def test_a_reward_that_cannot_be_made_or_imported_tells_no_secret(tmp_path, model, capfd):
    path = failing_project(tmp_path / "project", model, healthy=0)
    client = tmp_path / "project" / "clients" / "east.toml"
    edit(client, "loud.py:low", "loud.py:Broken")
    assert in_process("check", path) == 2
    (client.parent / "import_fails.py").write_text("import os\nraise RuntimeError(os.environ['HF_TOKEN'])\n")
    edit(client, "loud.py:Broken", "import_fails.py:low")
    assert in_process("check", path) == 2
    out, err = capfd.readouterr()
    assert err.count("***") == 2 and leaks(out, err, folder=tmp_path) == []


@pytest.mark.parametrize("place", ['seed = "{}"', '"{}" = 1', 'rounds = ["{}"]', "seed = {}"])
def test_a_secret_in_a_run_file_by_mistake_is_not_repeated(run_file, capfd, place):
    for secret in (*CANARIES.values(), *SHAPES):
        run_file.write_text(place.format(secret) + "\n")
        assert in_process("check", run_file) == 2
    assert leaks(*capfd.readouterr()) == []


def test_the_traceback_of_an_internal_error_holds_no_secret(run_file, tmp_path, monkeypatch, capfd):
    def broken(*_):
        raise RuntimeError("a bug near " + os.environ["JUDGE_API_KEY"])

    monkeypatch.setattr(commands, "check", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert in_process("check", run_file) == 1
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and "RuntimeError: a bug near ***" in err
    (log,) = tmp_path.glob("fedpact-*.log")
    assert "RuntimeError: a bug near ***" in log.read_text()
    assert leaks(out, err, log.read_text()) == []


def test_a_reason_is_masked_wherever_it_came_from():
    reason = Failure(f"the transport said {CANARIES['JUDGE_API_KEY']}\x1b[2J").reason
    assert reason == "the transport said ***\ufffd[2J"


@pytest.mark.slow
def test_a_killed_command_says_no_secret(tmp_path, model):
    path = failing_project(tmp_path / "project", model, healthy=10**6)
    (path.parent / "clients" / "stop").write_text(json.dumps(["", 3, signal.SIGTERM]))
    done = in_subprocess("run", path)
    assert done.returncode == 128 + signal.SIGTERM
    assert leaks(done.stdout, done.stderr, folder=tmp_path) == []
