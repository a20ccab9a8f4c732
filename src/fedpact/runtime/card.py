"""The model card beside an exported adapter."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fedpact import __version__

if TYPE_CHECKING:
    from fedpact.runtime.run import Run


def model_card(run: Run, num_members: int) -> str:
    """README.md of what the run exports: how it was made, and what it does not promise."""
    algorithm = run.config.algorithm.model_dump(mode="json")
    settings = "\n".join(f"- `{name}`: {value}" for name, value in algorithm.items())
    left, carries = (
        (
            "No member's prompts or single rewards left it.",
            "LoRA deltas, and the gradients and means that members share, carry information about what they were "
            "trained on.",
        )
        if "server" not in run.config.algorithm.needs
        else (
            "It was trained at the server; nothing but numbers about the server's own candidates left a member.",
            "Ratings carry information about the answers and models that they rest on.",
        )
    )
    base = json.dumps(run.config.policy.model)
    return (
        f"---\nbase_model: {base}\nlibrary_name: peft\ntags: [fedpact, lora, federated]\n---\n"
        f"# {run.name}\n\nA LoRA adapter aligned by {num_members} members with FedPact {__version__}: "
        f"{run.config.rounds} rounds of `{algorithm.get('name')}`. {left}\n\n"
        f"Objectives: {', '.join(run.config.objectives)}.\n\n{settings}\n\n"
        f"Base model SHA-256 `{run.start.model.sha256}`; contract `{run.hash}`.\n\n"
        f"{carries} Unless members added noise of their own, this run has no formal privacy guarantee.\n"
    )
