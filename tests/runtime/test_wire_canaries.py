"""A full run of every algorithm between sites, and every byte that members sent, searched for what must not leave."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpact.algorithms import algorithm_class, table
from fedpact.algorithms.fedavg import FedAvg
from fedpact.edge.local import LocalTransport
from fedpact.errors import TooFewRepliesError
from fedpact.messages import Reply, Train, Trained
from fedpact.protocols import Client
from fedpact.runtime.client_config import load_client
from fedpact.runtime.codec import decode
from fedpact.runtime.config import RunConfig, load_run
from fedpact.runtime.contract import contract_hash, contract_of
from fedpact.runtime.engines import Engines
from fedpact.runtime.envelope import Answer, unwrap
from fedpact.runtime.launch import start
from fedpact.runtime.member import Member
from fedpact.runtime.run import Start
from fedpact.types import Adapter
from tests.cli.conftest import MEMBERS, files, model, settings, write_project
from tests.runtime.watched import Watched

__all__ = ["model"]

pytestmark = pytest.mark.slow

RARE = [44, 16, 55, 32, 11, 36, 50]
"""Token ids that follow each other in every prompt: the words w41, w13, ... of the test's vocabulary."""
ONE, OTHER = 0.7310585786300049, 0.26894142136999510
"""What single completions are rewarded with."""
REWARDS = f"""
from pathlib import Path

RUBRIC = "canary of a rubric"


class CanaryJudge:
    def __init__(self, *, home, setting):
        self.home, self.setting = home, setting

    def __call__(self, prompts, completions, answer, **columns):
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.home / "canary of a file").write_text(f"canary of a note: {{self.setting}} {{prompts}} {{answer}}")
        return [{ONE!r} if sum(map(ord, text)) % 2 else {OTHER!r} for text in completions]

    def fit(self):
        return 0.75


def canary_of_brevity(completions, **columns):
    return [{ONE!r} for _ in completions]
"""


def needles() -> dict[str, bytes]:
    """What to look for, by what it would betray."""
    found = {f"text in {code}": "canary".encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")}
    found |= {
        f"token ids as {kind}": np.array(RARE, kind).tobytes() for kind in ("<i8", "<i4", "<i2", "u1", "<f4", "<f8")
    }
    found |= {f"{x} as {kind}": np.array([x], kind).tobytes() for x in (ONE, OTHER) for kind in ("<f8", "<f4")}
    return found | {f"{x} as text": repr(x)[:8].encode() for x in (ONE, OTHER)}


PRODUCT = {"score", "fit"}
"""Verbs whose replies are what a judge says of the server's own candidates, to the last digit."""


def leaks(watched: Watched) -> dict[str, str]:
    """What was found in the members' answers, and in the answer to which verb."""
    found: dict[str, str] = {}
    for _, envelope, data in watched.answers:
        reply = unwrap(envelope, data)
        carried = [data.lower(), decode(Answer, data).reply.lower(), *(raw(tensor) for tensor in tensors_of(reply))]
        for name, needle in needles().items():
            if envelope.verb in PRODUCT and name.startswith("0."):
                continue
            if any(needle in one for one in carried):
                found[name] = envelope.verb
    return found


def tensors_of(reply: Reply) -> Iterator[Tensor]:
    for one in fields(reply):
        value: Any = getattr(reply, one.name)
        yield from (t for t in (value.values() if isinstance(value, Mapping) else [value]) if isinstance(t, Tensor))


def raw(tensor: Tensor) -> bytes:
    """Its bytes; of floats, those as float64 too, as a reader of numbers would see them."""
    plain = tensor.detach().contiguous()
    wide = plain.double().numpy().tobytes() if plain.is_floating_point() else b""
    return plain.flatten().view(torch.uint8).numpy().tobytes() + b"|" + wide


# --- a project in which everything that a member has is marked ------------------------------------------------------


class Project:
    """Members between sites, that share all that a site may share, and no minimum hides what they send."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.run_file, self.engines = write_project(folder / "project", model=model, rounds=1), Engines()
        clients = self.run_file.parent / "clients"
        (clients / "canary_rewards.py").write_text(REWARDS)
        rare = " ".join(f"w{number - 3}" for number in RARE)
        prompts = [
            {
                "prompt": f"canary {rare} w{i}",
                "answer": f"canary of answer {i}",
                "hint": "canary of a hint",
                "domain": d,
            }
            for i, d in enumerate(["odd", "even"] * 10)
        ]
        lines = (self.run_file.parent / "questions.jsonl").read_text().splitlines()
        known = [{**json.loads(line), "answer": f"canary of answer {i}"} for i, line in enumerate(lines)]
        for name, rows in (("canary prompts", prompts), ("canary answers", known)):
            (clients / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in MEMBERS:
            path = clients / f"{name}.toml"
            text = path.read_text().replace("rewards.py:brief", "canary_rewards.py:canary_of_brevity")
            text = text.replace(
                'use = "rewards.py:low"', 'use = "canary_rewards.py:CanaryJudge"\nkwargs = { setting = "canary" }'
            )
            text = text.replace(f'path = "{name}.jsonl"', 'path = "canary prompts.jsonl"').replace("audit = true", "")
            path.write_text(text + '\n[answers]\npath = "canary answers.jsonl"\nid = "id"\n')

    def run(self, algorithm: str, name: str = "", watched: Watched | None = None) -> tuple[Watched, Path]:
        out, watched = self.run_file.parent / "runs" / (name or algorithm), watched or Watched()
        changes = ["rollout.num_generations=2", "rollout.max_completion_length=4", "evaluation.num_prompts=3"]
        options = [*settings(algorithm)[1::2], *changes, "evaluation.num_generations=2", "evaluation.every=1"]

        def make(config: RunConfig, folder: Path, out: Path, begin: Start) -> Watched:
            return watched.over(LocalTransport(self.members(config, out, begin)))

        start(
            load_run(self.run_file, options), self.run_file.parent, out, where="run.toml", make=make, observer=watched
        )
        return watched, out

    def members(self, config: RunConfig, out: Path, begin: Start) -> dict[str, Member]:
        accept = contract_hash(contract_of(config, model=begin.model.sha256).canonical())
        share = ("rewards", "accuracy", "metrics", "gradients")
        site = {"accept": accept, "share": share, "min_samples": 1}
        found = {}
        for name in MEMBERS:
            clients, home = self.run_file.parent / "clients", out / "clients" / name
            own = load_client(clients / f"{name}.toml")
            found[name] = Member(
                own.model_copy(update={"site": own.site.model_copy(update=site)}),
                folder=clients,
                home=home,
                where=f"{clients}/canary/{name}.toml",
                engines=self.engines,
                model=begin.model.path,
            )
            (home / "log.jsonl").write_text('{"note": "canary of a log"}\n')
        return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Project]:
    os.environ["CANARY"] = "canary of the environment"
    yield Project(tmp_path_factory.mktemp("canary"), model)
    del os.environ["CANARY"]


@pytest.mark.parametrize("algorithm", sorted(table()))
def test_nothing_that_is_a_members_own_leaves_it(project, algorithm):
    watched, out = project.run(algorithm)
    assert watched.losses == {}
    assert leaks(watched) == {}
    asked = {envelope.verb for _, envelope, _ in watched.answers}
    trains = "server" not in algorithm_class(algorithm).needs
    assert asked >= (
        {"hello", "train", "evaluate"} if trains else {"hello"} if algorithm == "grpo" else {"hello", "score"}
    )
    if algorithm != "grpo":  # the marks were there to be found
        own = b"".join(files(out / "clients" / "east").values())
        assert b"canary of a note: canary" in own and b"canary of answer" in own
    if trains:
        means = [unwrap(e, data).rewards for _, e, data in watched.answers if e.verb in ("train", "evaluate")]
        assert any(abs(float(x) - ONE) < 1e-3 for mean in means for x in mean)  # rounded, or the scan had found it


def test_the_scan_finds_each_mark_that_a_leaky_algorithm_sends(project, monkeypatch):
    sound = FedAvg.train

    def leaky(self: FedAvg, request: Train, client: Client) -> Trained:
        reply = sound(self, request, client)
        adapter: Adapter = dict(reply.adapter)
        largest = sorted(adapter, key=lambda name: -adapter[name].numel())
        for name, mark in zip(largest, needles().values(), strict=False):
            flat = adapter[name].clone().flatten()
            flat.view(torch.uint8)[: len(mark)] = torch.tensor(list(mark), dtype=torch.uint8)
            adapter[name] = flat.view(adapter[name].shape)
        return Trained(reply.weight, adapter, reply.rewards, reply.accuracy, reply.metrics)

    monkeypatch.setattr(FedAvg, "train", leaky)
    watched = Watched()
    with pytest.raises(TooFewRepliesError):  # marks make no good adapter, and its evaluation fails
        project.run("fedavg", "leaky", watched)
    assert leaks(watched) == dict.fromkeys(needles(), "train")
