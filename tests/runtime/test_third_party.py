from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from fedpact.algorithms import table
from tests.cli.conftest import in_process, in_subprocess, model, run_file

__all__ = ["model", "run_file"]

ALGORITHM = '''\
from typing import Literal

import torch
from pydantic import PositiveInt

from fedpact.algorithms.base import Algorithm
from fedpact.algorithms.steps import Tally, local_batches
from fedpact.messages import Train


class Median(Algorithm):
    """The middle of what the members send, entry by entry."""

    name: Literal["median"] = "median"
    local_steps: PositiveInt = 1

    def server(self, adapter, server):
        replies = server.ask(Train(adapter))
        server.memory["count"] = torch.tensor([len(replies)])
        return {name: torch.stack([reply.adapter[name] for reply in replies.values()]).median(0).values
                for name in adapter}

    def train(self, request, client):
        tally = Tally(client)
        for batch in local_batches(client, request.adapter, self.local_steps):
            client.policy.step(client.policy.gradients(batch.rollout, batch.advantages).combine(client.default_weights))
            tally.add(batch, client.default_weights)
        return tally.trained(client.policy.adapter())
'''

REWARDS = """\
import asyncio


async def slow_low(completions, *, above: int, **columns):
    await asyncio.sleep(0.01)
    return [float(sum(int(word[1:]) < above for word in text.split() if word[0] == "w")) for text in completions]


class Brief:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, prompts, completions):
        return [None if not text else -self.scale * len(text.split()) for text in completions]
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with packages of others, installed: algorithms and rewards."""
    folder = tmp_path / "site"
    (folder / "steady").mkdir(parents=True)
    (folder / "steady" / "__init__.py").write_text(ALGORITHM)
    (folder / "shop_rewards.py").write_text(REWARDS)
    about = folder / "steady-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: steady\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[fedpact.algorithms]\nmedian = steady:Median\nbroken = steady.absent:Broken\nodd = steady:Literal\n"
        "fedavg = steady:Median\n"
    )
    monkeypatch.syspath_prepend(folder)
    table.cache_clear()
    yield folder
    table.cache_clear()
    for name in ("steady", "shop_rewards"):
        sys.modules.pop(name, None)


def test_a_package_that_registers_an_algorithm_is_listed_and_replaces_no_built_in_one(site):
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    listed = in_subprocess("algorithms", "--json", environment={"PYTHONPATH": path})
    assert (listed.returncode, listed.stderr) == (0, "")
    table = json.loads(listed.stdout)
    assert table["median"]["target"] == "steady:Median" and table["median"]["summary"] == "from steady"
    assert table["fedavg"]["target"] == "fedpact.algorithms.fedavg:FedAvg"


@pytest.mark.usefixtures("site")
def test_a_registered_algorithm_runs_and_its_server_half_decides(run_file, capfd):
    options = ["--set", 'algorithm={ name = "median", local_steps = 1 }', "--set", "rounds=1"]
    assert in_process("run", run_file, *options) == 0
    assert capfd.readouterr().err == ""
    out = run_file.parent / "runs" / "run"
    assert json.loads((out / "run.json").read_text())["config"]["algorithm"] == {"name": "median", "local_steps": 1}
    assert_close(load_file(out / "rounds/0001/memory.safetensors"), {"count": torch.tensor([3])})
    first, final = (
        load_file(out / "rounds/0000/adapter_model.safetensors"),
        load_file(out / "final/adapter_model.safetensors"),
    )
    assert any(not torch.equal(first[name], final[name]) for name in first)


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("broken", "algorithm.name: 'broken' does not load (ModuleNotFoundError: No module named 'steady.absent')"),
        ("odd", "algorithm.name: 'odd' does not load (TypeError: algorithm 'odd': steady:Literal is no subclass of "),
    ],
)
def test_a_registered_algorithm_that_does_not_load_is_one_line(run_file, capfd, name, expected):
    assert in_process("run", run_file, "--set", f'algorithm={{ name = "{name}" }}') == 2
    line = capfd.readouterr().err
    assert line.startswith(f"fedpact: {run_file}: {expected}") and line.count("\n") == 1


@pytest.mark.usefixtures("site")
def test_rewards_of_an_installed_package_are_found_by_import_path(run_file, capfd):
    client = run_file.parent / "clients" / "north.toml"
    text = client.read_text().replace("rewards.py:low", "shop_rewards:slow_low")
    text = text.replace("rewards.py:brief", "shop_rewards:Brief")
    text = text.replace("[rewards.brief]", "[rewards.low.kwargs]\nabove = 58\n\n[rewards.brief]")
    client.write_text(text + "\n[rewards.brief.kwargs]\nscale = 0.5\n")
    assert in_process("check", run_file) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    figures = shown.out.splitlines()[1].split("completions: ")[1]
    low, brief = (float(figure.split()[1]) for figure in figures.split(", "))
    assert low == pytest.approx(-2 * brief, abs=0.02)  # every word is one of w0 to w57
