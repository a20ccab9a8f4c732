"""The files that `fedpact init` and `fedpact site init` write: the smallest run that trains on something."""

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

_SITE = """\
# A member's file: it never leaves the member. Every key is explained in docs/configuration.md.
name = "{name}"                          # as its key is registered with the coordinator
task = "arithmetic"

[model]
path = "./model"                         # your own copy of the run's base model; the contract holds its hash

[prompts]
path = "data/{name}.jsonl"
heldout_share = 0.25
as_chat = true

# One table for each of the run's objectives that you can measure.
[rewards.correct]
use = "fedpact.rewards:numeric_answer"

[rewards.format]
use = "rewards.py:short"

[site]
# What may leave beside the adapter; "metrics" and "gradients" tell more. `fedpact site check` spells it out.
share = ["rewards", "accuracy"]
# Ceilings: a run that asks for more is refused, never trimmed.
max_rounds = 200
max_local_steps = 16
max_completion_length = 1024
max_learning_rate = 1e-3
# Noise with a guarantee (pip install 'fedpact[dp]'); what it costs is in docs/results.md:
# clip_norm = 1.0
# noise_multiplier = 4.0
# epsilon = 8.0

[service]
home = "{name}.site"                     # memory, ledger, secret, accepted contract: for the service's user alone
socket = "{name}.socket/site.sock"       # where another user's front end must reach it: /run/fedpact/{name}/site.sock
peers = []                               # users who may speak to it beside the service's own, such as ["fpnode-{name}"]
"""


def example_files() -> dict[str, str]:
    """A run's files: path to text."""
    files = {RUN_FILE: _RUN, "clients/rewards.py": _REWARDS}
    for name, sign in {"north": "+", "south": "-"}.items():
        reward = "fedpact.rewards:format_tags" if name == "north" else "rewards.py:short"
        files[f"clients/{name}.toml"] = _CLIENT.format(name=name, format=reward)
        files[f"data/{name}.jsonl"] = _questions(sign)
    return files


def site_example(name: str) -> dict[str, str]:
    """A member's files: path to text. Its objectives are those of the example run."""
    return {f"{name}.toml": _SITE.format(name=name), "rewards.py": _REWARDS, f"data/{name}.jsonl": _questions("+")}


def _questions(sign: str) -> str:
    """Additions or subtractions with their answers, as JSONL."""
    rows = [
        {
            "prompt": f"What is {a} {sign} {b}? Think inside <think></think>, answer inside <answer></answer>.",
            "answer": str(a + b if sign == "+" else a - b),
        }
        for a in range(12, 32)
        for b in (3, 7)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)
