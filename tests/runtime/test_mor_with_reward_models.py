"""MoR from preference pairs to an adapter: two members fit reward models that like tags, and the server learns tags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedpact.tasks import opchains, warmstart
from fedpact.types import Prompts
from tests.cli.conftest import files, in_process

RUN = """\
rounds = 4
objectives = {{ liked = {{ primary = true }}, format = {{}} }}
policy = {{ model = {model}, lora = {{ r = 8, lora_alpha = 16 }} }}
rollout = {{ num_generations = 8, max_completion_length = 12 }}
loss = {{ loss_type = "grpo", beta = 0.04 }}
optimizer = {{ learning_rate = 4e-3, adam_beta2 = 0.99 }}
algorithm = {{ name = "mor", server_steps = 8 }}
evaluation = {{ every = 4 }}
simulation = {{ num_threads = 1 }}

[server]
encoder = "tokens"
prompts = {{ path = "questions.jsonl", heldout_share = 0.3 }}
auxiliary = {{ path = "auxiliary.jsonl" }}
rewards = {{ format = {{ use = "fedpact.rewards:format_tags", audit = true }} }}
"""
CLIENT = """\
name = "{op}"
task = "{op}"

[rewards.liked]
use = "fedpact.rewards:RewardModel"
kwargs = {{ model = {model}, preferences = "{op}.jsonl", learning_rate = 1e-2, heldout_share = 0.2 }}
"""
OPS = ("add", "max")


def lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(prompts: Prompts) -> list[dict[str, object]]:
    return [{"prompt": t, "domain": op} for t, op in zip(prompts.text, prompts.columns["op"], strict=True)]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.slow
def test_the_server_learns_what_the_members_pairs_prefer(tmp_path):
    model = json.dumps(str(warmstart.model_folder()))
    (tmp_path / "clients").mkdir()
    (tmp_path / "run.toml").write_text(RUN.format(model=model))
    both = dict.fromkeys(OPS, 1.0)
    lines(tmp_path / "questions.jsonl", questions(opchains.prompts(both, 80, seed=1)))
    lines(tmp_path / "auxiliary.jsonl", questions(opchains.prompts(both, 24, seed=2)))
    for op in OPS:
        (tmp_path / "clients" / f"{op}.toml").write_text(CLIENT.format(op=op, model=model))
        liked = opchains.prompts({op: 1.0}, 240, seed=3)
        columns = zip(liked.text, liked.columns["chain"], liked.columns["answer"], strict=True)
        pairs = [
            {
                "prompt": chat,
                "chosen": said(f"<think> {chain} </think> <answer> {a} </answer>"),
                "rejected": said(f"{chain} {a}"),
            }
            for chat, chain, a in columns
        ]
        lines(tmp_path / "clients" / f"{op}.jsonl", pairs)
    out = tmp_path / "run"
    assert in_process("run", tmp_path / "run.toml", "--out", out) == 0
    figures = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {(one["round"], one["key"]): one["value"] for one in figures if one["who"] == "server"}
    assert all(found[1, f"pairs/{op}/liked"] > 0.9 for op in OPS)
    assert found[4, "heldout/format"] > found[0, "heldout/format"] + 0.15
    weights = [name for name in files(out / "clients") if name.endswith(".safetensors") and "reward-model" in name]
    assert len(weights) == 2  # each member keeps its own
