"""Two prompts of a member, rewarded before anything is sent: what is wrong with its file shows at once."""

from __future__ import annotations

import torch

from fedpact.errors import DataError
from fedpact.runtime.member import Member
from fedpact.types import Prompts


def dry_run(member: Member, examples: Prompts) -> str:
    """Dry-run two prompts, after `hello`; what there is to say, in a line.

    A member that trains completes two of its own prompts with the untrained model and rewards them; one that only
    judges rates the references of two of the server's `examples`, of its own task if there are any.
    """
    client = member.side(round=0, exchange=0, since=None)
    if "server" in member.algorithm().needs:
        own = [i for i, d in enumerate(examples.columns.get("domain", ())) if d == member.config.task]
        two = examples.select((own or list(range(len(examples))))[:2])
        texts = two.columns.get("reference", ["" for _ in two.text])
        fits = hasattr(member.algorithm(), "fit")  # then there is nothing to judge with yet
        rewards = client.judge(two, texts) if len(two) and not fits else torch.zeros(len(client.objectives), 0)
        facts, judged = f"{member.config.name}: a judge", f"{len(texts)} reference answers"
    else:
        two = member.train_prompts.select([0, min(1, len(member.train_prompts) - 1)])
        try:
            rollout = client.policy.generate(two, draw=0)
        except DataError as error:
            raise DataError(f"{member.where}: prompts: {error}") from error
        rewards = client.audit(rollout.prompts, rollout.completions)
        facts = f"{member.config.name}: {len(member.train_prompts)} prompts, {len(member.heldout)} held out"
        judged = f"{len(rollout.completions)} completions"
    figures = ", ".join(
        f"{name} {float(row.nanmean()):.2f}"
        for name, row in zip(client.objectives, rewards, strict=True)
        if name in member.rewards and row.numel()
    )
    return f"{facts}; mean rewards of {judged}: {figures}" if figures else facts
