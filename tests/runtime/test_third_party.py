from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.cli.conftest import in_subprocess, model, run_file

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
def site(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python with packages of others installed: algorithms and rewards."""
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
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def test_a_package_that_registers_an_algorithm_is_listed_and_replaces_no_built_in_one(site):
    listed = in_subprocess("algorithms", "--json", environment=site)
    assert (listed.returncode, listed.stderr) == (0, "")
    table = json.loads(listed.stdout)
    assert table["median"]["target"] == "steady:Median" and table["median"]["summary"] == "from steady"
    assert table["fedavg"]["target"] == "fedpact.algorithms.fedavg:FedAvg"


def test_a_registered_algorithm_runs_and_its_server_half_decides(run_file, site):
    options = ["--set", 'algorithm={ name = "median", local_steps = 1 }', "--set", "rounds=1"]
    done = in_subprocess("run", run_file, *options, environment=site)
    assert (done.returncode, done.stderr) == (0, "")
    out = run_file.parent / "runs" / "run"
    assert json.loads((out / "run.json").read_text())["config"]["algorithm"] == {"name": "median", "local_steps": 1}
    assert_close(load_file(out / "rounds/0001/memory.safetensors"), {"count": torch.tensor([3])})
    first, final = (
        load_file(out / "rounds/0000/adapter_model.safetensors"),
        load_file(out / "final/adapter_model.safetensors"),
    )
    assert any(not torch.equal(first[name], final[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("broken", "algorithm.name: 'broken' does not load (ModuleNotFoundError: No module named 'steady.absent')"),
        ("odd", "algorithm.name: 'odd' does not load (TypeError: algorithm 'odd': steady:Literal is no subclass of "),
    ],
)
def test_a_registered_algorithm_that_does_not_load_is_one_line(run_file, site, name, expected):
    failed = in_subprocess("run", run_file, "--set", f'algorithm={{ name = "{name}" }}', environment=site)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith(f"fedpact: {run_file}: {expected}") and failed.stderr.count("\n") == 1


def test_rewards_of_an_installed_package_are_found_by_import_path(run_file, site):
    client = run_file.parent / "clients" / "north.toml"
    text = client.read_text().replace("rewards.py:low", "shop_rewards:slow_low")
    text = text.replace("rewards.py:brief", "shop_rewards:Brief")
    text = text.replace("[rewards.brief]", "[rewards.low.kwargs]\nabove = 58\n\n[rewards.brief]")
    client.write_text(text + "\n[rewards.brief.kwargs]\nscale = 0.5\n")
    done = in_subprocess("check", run_file, environment=site)
    assert (done.returncode, done.stderr) == (0, "")
    figures = done.stdout.splitlines()[1].split("completions: ")[1]
    low, brief = (float(figure.split()[1]) for figure in figures.split(", "))
    assert low == pytest.approx(-2 * brief, abs=0.02)  # every word is one of w0 to w57
