"""The second demo, as ordinary files: a server with questions and no answers, and eight members that can only judge.

Each member has a model that knows one operation of the op chains and is mostly wrong on the others; it says of a
candidate whether its answer is the one that this model would give. How much the server learns depends on whom it asks.
With `truth` a member also has trusted answers to the server's questions of its operation, and judges by its model
elsewhere; with `weak` the members' models are beginners, wrong even on most of their own operations.

`server/labelled.jsonl` has the answers that nobody in the demo trains with: what federation is measured against.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpact.tasks import experts, opchains
from fedpact.tasks.demo import REWARDS
from fedpact.types import Prompts

Row = dict[str, Any]
"""A line of a file."""

NUM_AUXILIARY = 20
"""Labelled examples of each operation."""

EXPERTS: Mapping[str, tuple[str, ...]] = {
    "confidence": (),
    "random": ('algorithm.experts="random"',),
    "all": ('algorithm.experts="all"',),
    "oracle": ('algorithm.experts="oracle"',),
    "grpo": (
        'algorithm={ name = "grpo", server_steps = 8 }',
        'server.prompts.path="server/labelled.jsonl"',
        "server.rewards.correct.audit=false",
    ),
}
"""The demo's runs: name to what it sets in the run file."""

LABELS: Mapping[str, str] = {
    "confidence": "FedGRPO",
    "random": "random experts",
    "grpo": "central GRPO",
}
"""Those that `fedpact demo` shows."""

_RUN = """\
# FedPact's second demo: the server trains a model of 84,000 parameters on questions without answers, and members with
# private models of their own rate its candidates.
# Ask anybody instead of those who know:  fedpact run run.toml --set 'algorithm.experts="random"'
seed = {seed}
rounds = {rounds}

[objectives]
correct = {{ primary = true, weight = 8.0 }}
format = {{ weight = 1.0 }}

[policy]
model = {model}
lora = {{ r = 8, lora_alpha = 16 }}

[rollout]
num_generations = 8
max_completion_length = 12

[loss]
loss_type = "grpo"

[optimizer]
learning_rate = 2e-3
adam_beta2 = 0.99

[training]
prompts_per_step = 8

[algorithm]
name = "fedgrpo"
server_steps = 8
num_experts = 1
num_neighbours = 8

[server]
encoder = "tokens"
reference = "<answer> {{answer}} </answer>"

[server.prompts]
path = "server/questions.jsonl"
heldout = "server/heldout.jsonl"

[server.auxiliary]
path = "server/auxiliary.jsonl"

[server.rewards.correct]
use = "fedpact.rewards:numeric_answer"
kwargs = {{ tag = "answer" }}
audit = true

[server.rewards.format]
{format}

[evaluation]
every = 2
greedy = true

[simulation]
num_threads = 1
"""

_CLIENT = """\
# A member of the second demo. Its model stays with it; what it sends is one number for each candidate.
name = "{op}"
task = "{op}"
"""

_JUDGE = """\
use = "fedpact.rewards:Agreement"
kwargs = {{ model = "../experts/{op}", compare = "numeric", tag = "answer", max_completion_length = 12 }}
"""

_TRUTH = """
[answers]
path = "../answers/{op}.jsonl"

[rewards.correct]
use = "fedpact.rewards:numeric_answer"
kwargs = {{ tag = "answer" }}

[rewards.correct.otherwise]
"""


def write_judged_demo(
    folder: Path,
    *,
    model: Path,
    seed: int = 0,
    rounds: int = 10,
    num_questions: int = 1280,
    truth: bool = False,
    weak: bool = False,
    expert_steps: int | None = None,
) -> Path:
    """Write run.toml, clients/, server/ and experts/ into `folder`, training the experts; returns the run file's path.

    The questions and the auxiliary ones are training prompts of all operations evenly, and have none in common.
    `expert_steps`: None is enough for an expert, and too few for a beginner.
    """
    questions, auxiliary = questions_and_auxiliary(num_questions, seed=seed)
    heldout = [row for op in opchains.OPS for row in rows(opchains.heldout(op))]
    (folder / "clients").mkdir(parents=True, exist_ok=True)
    _write(folder / "server" / "questions.jsonl", [_without_answer(row) for row in questions])
    _write(folder / "server" / "labelled.jsonl", questions)
    _write(folder / "server" / "auxiliary.jsonl", auxiliary)
    _write(folder / "server" / "heldout.jsonl", heldout)
    for op in opchains.OPS:
        judge = _JUDGE.format(op=op)
        rewards = _TRUTH.format(op=op) + judge if truth else "\n[rewards.correct]\n" + judge
        (folder / "clients" / f"{op}.toml").write_text(_CLIENT.format(op=op) + rewards, encoding="utf-8")
        if truth:
            _write(folder / "answers" / f"{op}.jsonl", [row for row in questions if row["domain"] == op])
        if weak:
            experts.train_beginner(op, folder / "experts" / op, steps=expert_steps or experts.BEGINNER_STEPS, seed=seed)
        else:
            experts.train_expert(
                op, folder / "experts" / op, steps=expert_steps or experts.STEPS, seed=seed, base=model
            )
    path = folder / "run.toml"
    text = _RUN.format(seed=seed, rounds=rounds, model=json.dumps(str(model)), format=REWARDS["format"])
    path.write_text(text, encoding="utf-8")
    return path


def questions_and_auxiliary(num_questions: int, *, seed: int) -> tuple[list[Row], list[Row]]:
    """`num_questions` training prompts of all operations evenly, and 20 others of each operation."""
    size = num_questions + NUM_AUXILIARY * len(opchains.OPS)
    drawn = rows(opchains.prompts(dict.fromkeys(opchains.OPS, 1.0), size, seed=seed))
    by_op = [[row for row in drawn if row["domain"] == op] for op in opchains.OPS]
    auxiliary = [row for same in by_op for row in same[:NUM_AUXILIARY]]
    return [row for row in drawn if row not in auxiliary], auxiliary


def rows(prompts: Prompts) -> list[Row]:
    """Op-chain prompts as lines of a file: `prompt`, `domain` (the operation) and `answer`."""
    columns = zip(prompts.text, prompts.columns["op"], prompts.columns["answer"], strict=True)
    return [{"prompt": text, "domain": op, "answer": answer} for text, op, answer in columns]


def _without_answer(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "answer"}


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
