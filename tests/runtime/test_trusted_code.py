"""A model's own Python files run where the member says so, in its own file; then it is recorded and told."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from fedpact.rewards import verifier
from fedpact.runtime.engines import hash_of
from fedpact.runtime.ledger import Ledger
from tests.cli.conftest import edit, in_process, model, refusal, write_project

__all__ = ["model"]

CODE = """\
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

with (Path.home() / "ran").open("a") as stream:
    stream.write("x")


class OwnModel(LlamaForCausalLM):
    config_class = LlamaConfig
"""


@pytest.fixture
def project(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose model is a plain Llama with a class of its own beside it, which leaves a mark where it is loaded."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = shutil.copytree(model, tmp_path / "model")
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.OwnModel"}}))
    (own / "own.py").write_text(CODE)
    hash_of.cache_clear()
    return write_project(tmp_path / "project", model=own, rounds=1)


def trust(project: Path, name: str) -> None:
    path = project.parent / "clients" / f"{name}.toml"
    path.write_text(path.read_text() + "\n[model]\ntrust_remote_code = true\n")


def test_by_default_nobody_runs_a_models_code(project, tmp_path, capfd):
    assert in_process("run", project) == 0
    assert not (tmp_path / "home" / "ran").exists()
    assert "warning" not in capfd.readouterr().out


def test_who_trusts_it_is_warned_and_it_is_in_its_ledger_and_nobody_elses(project, tmp_path, capfd):
    trust(project, "east")
    assert in_process("check", project) == 0
    lines = capfd.readouterr().out.splitlines()
    warned = [line for line in lines if line.endswith("warning: model.trust_remote_code runs the model folder's code")]
    assert [line.partition(":")[0] for line in warned] == ["east"]
    assert (tmp_path / "home" / "ran").exists()
    assert in_process("run", project) == 0
    clients = project.parent / "runs" / "run" / "clients"
    for name, count in (("east", 1), ("north", 0)):
        path = clients / name / "ledger.jsonl"
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        trusted = [one for one in entries if one.get("reason") == "model.trust_remote_code"]
        assert len({one["contract"] for one in trusted}) == count and bool(trusted) == bool(count)
        assert Ledger.verify(path) == len(entries)


def test_changed_code_is_another_model(project, capfd):
    trust(project, "east")
    assert in_process("run", project) == 0
    edit(project.parents[1] / "model" / "own.py", "config_class", "config_klass")
    hash_of.cache_clear()
    code, line = refusal(capfd, "resume", project.parent / "runs" / "run")
    assert code == 4 and "this base model hashes to" in line


@pytest.mark.parametrize("table", ["policy", "simulation", "federation", "rollout"])
def test_a_run_file_cannot_trust_it_for_its_members(project, tmp_path, capfd, table):
    code, line = refusal(capfd, "check", project, "--set", f"{table}.trust_remote_code=true")
    assert code == 2 and f"{table}.trust_remote_code: unknown key" in line
    assert not (tmp_path / "home" / "ran").exists()


def test_the_child_that_reads_what_a_policy_wrote_gets_no_secret(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setenv("JUDGE_API_KEY", "canary-in-the-environment")
    child = verifier._start_child()
    try:
        environment = Path(f"/proc/{child.pid}/environ")
        if not environment.exists():
            pytest.skip("needs /proc")
        found = {entry.partition(b"=")[0].decode() for entry in environment.read_bytes().split(b"\0") if entry}
    finally:
        child.kill()
        child.communicate()
    assert "JUDGE_API_KEY" not in found and found <= {"PYTHONPATH", "PATH", "LC_ALL"}
    assert "JUDGE_API_KEY" in os.environ
