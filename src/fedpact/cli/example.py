"""The files that `fedpact init` writes: the smallest run that trains on something."""

from __future__ import annotations

import json

RUN_FILE = "run.toml"

_RUN = """\
# The coordinator's file. Every key is explained in docs/configuration.md.
seed = 7
rounds = 20

[objectives]
correct = { primary = true }
format = {}

[policy]
model = "Qwen/Qwen2.5-0.5B-Instruct"     # a Hugging Face id, or a folder
lora = { r = 16, lora_alpha = 32 }

[rollout]
num_generations = 8
max_completion_length = 256

[loss]
loss_type = "dapo"

[optimizer]
learning_rate = 2e-5

[training]
prompts_per_step = 4

[algorithm]
name = "firm"
local_steps = 4
beta = 0.1
preference = { correct = 0.6 }

[evaluation]
every = 5
"""

_CLIENT = """\
# A member's file: it never leaves the member.
name = "{name}"
task = "arithmetic"

[prompts]
path = "../data/{name}.jsonl"
heldout_share = 0.25
as_chat = true

[rewards.correct]
use = "fedpact.rewards:numeric_answer"

[rewards.format]
use = "{format}"
"""

_REWARDS = '''\
"""A reward of one's own, in TRL's signature: one number for each completion."""


def short(prompts, completions, **columns):
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if len(text) <= 200 else 0.0 for text in texts]
'''


def example_files() -> dict[str, str]:
    """Path to text."""
    files = {RUN_FILE: _RUN, "clients/rewards.py": _REWARDS}
    for name, sign in {"north": "+", "south": "-"}.items():
        reward = "fedpact.rewards:format_tags" if name == "north" else "rewards.py:short"
        files[f"clients/{name}.toml"] = _CLIENT.format(name=name, format=reward)
        rows = [
            {
                "prompt": f"What is {a} {sign} {b}? Think inside <think></think>, answer inside <answer></answer>.",
                "answer": str(a + b if sign == "+" else a - b),
            }
            for a in range(12, 32)
            for b in (3, 7)
        ]
        files[f"data/{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    return files
