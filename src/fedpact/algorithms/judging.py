"""What the algorithms that train at the server have in common: ratings of candidates by members, and the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpact.algorithms.steps import Aggregation, combined_advantages, judged
from fedpact.messages import Score, Scored
from fedpact.protocols import Client, Server
from fedpact.types import Adapter, ClientId, Prompts, Rollout

Judge = Callable[[Rollout, int], Tensor]
"""(rollout, step of the round) -> rewards [m, n], NaN: no reward."""


def train_at_server(
    adapter: Adapter,
    server: Server,
    judge: Judge,
    *,
    steps: int,
    how: Aggregation,
    prompts: Callable[[int], Prompts] | None = None,
) -> Adapter:
    """`steps` steps of GRPO on the server's prompts: the next adapter.

    The optimiser goes on from round to round. A batch without any signal makes no step. `prompts` gives those of a step
    of the run; None: the server's.
    """
    optimizer = {name: value for name, value in server.memory.items() if name.startswith("optimizer/")}
    server.policy.load(adapter, optimizer=optimizer or None)
    rewards, lengths, truncated, taken = [], [], [], 0
    for step in range(steps):
        number = (server.round - 1) * steps + step
        rollout = server.policy.generate((prompts or server.prompts)(number), draw=step)
        for batch in judged(server, rollout, judge(rollout, step)):
            advantages = combined_advantages(batch, server.default_weights, how, server.scale_rewards)
            if bool((advantages != 0).any()):
                server.policy.step(server.policy.gradients(rollout, advantages).combine(torch.ones(1)))
                taken += not batch.repeated
            if not batch.repeated:
                rewards.append(batch.rewards)
                lengths.append(rollout.lengths.float().cpu())
                truncated.append(rollout.truncated.float().cpu())
    server.memory.update(server.policy.optimizer())
    means = torch.cat(rewards, dim=1).nanmean(1).tolist()
    server.log(
        **{f"train/reward/{name}": value for name, value in zip(server.objectives, means, strict=True)},
        **{
            "train/steps": float(taken),
            "train/completion_length": float(torch.cat(lengths).mean()),
            "train/truncated": float(torch.cat(truncated).mean()),
        },
    )
    return server.policy.adapter()


@dataclass
class Raters:
    """The members of a cohort as raters of candidates, for one round."""

    server: Server
    names: Sequence[ClientId]
    asked: int = 0
    answered: int = 0
    figures: dict[str, list[float]] = field(default_factory=dict)

    def rate(self, rollout: Rollout, who: Tensor, *, last: bool = False) -> Tensor:
        """One exchange: `who` [k, n] says who rates what; ratings [k, m, n], NaN where there is none.

        Each rater gets one message, with its questions and their candidates only. One that does not answer, or wrongly,
        is missing from this exchange; nobody else notices. In the `last` exchange of a round in which nobody has
        answered so far, somebody must: it fails while it is open, so that a resumed run asks again.
        """
        columns = {name: mask.nonzero()[:, 0] for name, mask in zip(self.names, who, strict=True) if bool(mask.any())}
        requests = {name: self._request(rollout, places) for name, places in columns.items()}
        replies: Mapping[ClientId, Scored] = self.server.ask(requests, min_replies=int(last and not self.answered))
        self.asked, self.answered = self.asked + len(requests), self.answered + len(replies)
        ratings = torch.full((len(self.names), len(self.server.objectives), len(rollout.completions)), torch.nan)
        for name, reply in replies.items():
            ratings[self.names.index(name)][:, columns[name]] = reply.rewards
        return ratings

    def note(self, **figures: float) -> None:
        """Keep a step's figures for the round's mean."""
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    def close(self) -> None:
        """Log the round's means."""
        kept = {name: [value for value in values if value == value] for name, values in self.figures.items()}
        self.server.log(**{f"train/{name}": sum(values) / len(values) for name, values in kept.items() if values})

    def _request(self, rollout: Rollout, places: Tensor) -> Score:
        questions = places // rollout.group_size
        different, rows = torch.unique(questions, return_inverse=True)
        asked = rollout.prompts.select((different * rollout.group_size).tolist())
        return Score(public(asked), rows, [rollout.completions[place] for place in places.tolist()])


def public(prompts: Prompts) -> Prompts:
    """What of the server's questions goes to members: their text, and their public ids if they have any."""
    columns = {name: values for name, values in prompts.columns.items() if name == "id"}
    return Prompts(text=prompts.text, ids=torch.arange(len(prompts)), columns=columns)


def questions_of(rollout: Rollout) -> Prompts:
    """The questions of a rollout, each once: [p]."""
    return rollout.prompts.select(range(0, len(rollout.completions), rollout.group_size))


def with_own(ratings: Tensor, own: Tensor, primary: int | None, group_size: int) -> Tensor:
    """Members' combined ratings [m, n], and the server's rewards [m, n] where it has some of its own.

    A candidate that no member rated on the primary objective (on any, if there is none) counts for nothing at all: form
    alone must not move the policy on questions that nobody can judge. Another objective counts on a question only if
    all of its rated candidates have it: a missing reward would otherwise count as 0.
    """
    unrated = ratings.isnan().all(0) if primary is None else ratings[primary].isnan()  # [n]
    rewards = torch.where(own.isnan(), ratings, own).masked_fill(unrated, torch.nan)
    partial = (rewards.isnan() & ~unrated).view(len(rewards), -1, group_size).any(-1)  # [m, p]
    return rewards.masked_fill(partial.repeat_interleave(group_size, dim=1), torch.nan)


def score(request: Score, client: Client) -> Scored:
    """The client half of a rating."""
    return Scored(client.judge(request.prompts.select(request.rows.tolist()), request.completions))
