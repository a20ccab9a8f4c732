"""The documentation runs, and says what the code says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedpact.algorithms import TABLE
from fedpact.rewards.code import CodeTests
from fedpact.rewards.sandbox.jail import available_jails
from fedpact.runtime.client_config import PromptSettings
from fedpact.runtime.prompts import prompts_at

ROOT = Path(__file__).parents[1]
RUN = """
rounds = 2
[objectives]
correct = { primary = true }
brief = {}
[policy]
model = "MODEL"
lora = { r = 2 }
[rollout]
num_generations = 2
max_completion_length = 6
[training]
prompts_per_step = 2
[algorithm]
name = "turn_by_turn"
local_steps = 1
"""
CLIENT = """
name = "north"
[prompts]
path = "prompts.jsonl"
heldout_share = 0.5
[rewards.correct]
use = "fedpact.rewards:exact_answer"
kwargs = { tag = "" }
"""


def blocks(language: str) -> list[str]:
    """The fenced blocks of docs/extending.md."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/extending.md").read_text(), flags=re.DOTALL)


@pytest.fixture
def site(tmp_path: Path, model_folders: dict[str, Path]) -> Path:
    """The documented reward and algorithm, installed as a reader would: beside the clients, and as a package."""
    reward, algorithm, _ = blocks("python")
    client_table, *_, entry_point = blocks("toml")
    clients = tmp_path / "clients"
    clients.mkdir()
    (clients / "rewards.py").write_text(reward)
    (clients / "north.toml").write_text(CLIENT + client_table)
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": "w3"} for i in range(20)]
    (clients / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(RUN.replace("MODEL", str(model_folders["llama"])))
    (tmp_path / "my_algorithms.py").write_text(algorithm)
    info = tmp_path / "my_algorithms-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-algorithms\nVersion: 1.0\n")
    line = entry_point.splitlines()[1].replace('"', "")
    (info / "entry_points.txt").write_text(f"[fedpact.algorithms]\n{line}\n")
    return tmp_path


def run(site: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *command], cwd=site, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_documented_algorithm_and_reward_run_without_touching_the_package(site: Path) -> None:
    assert "turn_by_turn" in run(site, "-m", "fedpact", "algorithms")
    run(site, "-m", "fedpact", "run", "run.toml", "--out", "out")
    lines = [json.loads(line) for line in (site / "out/metrics.jsonl").read_text().splitlines()]
    weights = {line["round"]: line["value"] for line in lines if line["key"] == "train/weight/brief"}
    assert weights == {1: 1.0, 2: 0.0}  # round 1 trains objective 1, round 2 objective 0
    rewards = [line["value"] for line in lines if line["key"] == "train/reward/brief"]
    assert all(0 <= reward <= 1 for reward in rewards) and rewards


@pytest.mark.slow
def test_the_documented_python_runs(site: Path) -> None:
    script = blocks("python")[2].replace("algorithm.beta=0.1", "algorithm.local_steps=1")
    (site / "script.py").write_text(script)
    assert "[(0, " in run(site, "script.py")


@pytest.mark.slow
@pytest.mark.parametrize(("block", "file", "solution"), [(1, "humaneval", "canonical_solution"), (2, "mbpp", "code")])
def test_the_documented_tables_grade_programs(tmp_path: Path, block: int, file: str, solution: str) -> None:
    if not available_jails():
        pytest.skip("no sandbox is installed")
    excerpt = ROOT / "tests" / "data" / f"{file}_excerpt.jsonl"
    shutil.copy(excerpt, tmp_path / f"{file}.jsonl")
    prompts = prompts_at(PromptSettings(**tomllib.loads(blocks("toml")[block])["prompts"]), tmp_path, where="docs")
    answers = [json.loads(line)[solution] for line in excerpt.read_text().splitlines()]
    graded = CodeTests()
    assert graded(answers, **prompts.columns) == [1.0] * 5
    assert graded(["pass"] * 5, **prompts.columns) == [0.0] * 5
    graded.close()


def test_the_configuration_page_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/make_docs.py", "--check"], check=False)
    assert done.returncode == 0, "run `python scripts/make_docs.py`"


def test_the_readme_lists_every_algorithm_as_the_table_has_it() -> None:
    readme = (ROOT / "README.md").read_text()
    for name, entry in TABLE.items():
        assert f"| `{name}` | {entry.exchanges} | {entry.leaves} |" in readme


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_nothing_committed_names_a_place_on_one_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(?:work|root)/\w")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".json", ".jinja", ".txt", ""} and path.is_file():
            assert not pattern.search(path.read_text(encoding="utf-8", errors="ignore")), name
