"""What a run measures of an adapter beside training it: held-out rewards, and how members' gradients agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from fedpact.core.compress import sketched_cosines
from fedpact.messages import Differentiate, Evaluate, Evaluated, Introduced
from fedpact.runtime.bounds import capped
from fedpact.runtime.config import RunConfig
from fedpact.runtime.contract import default_weights
from fedpact.runtime.exchange import Round, mean_reply
from fedpact.runtime.trainer import Trainer
from fedpact.seeding import key, permutation
from fedpact.types import Adapter, ClientId

SKETCH_RANK = 1024
"""Numbers for each gradient: the standard error of a cosine is about .03."""
MAPPED = 16
"""Members in a conflict map; of more, so many are drawn."""


def evaluate(
    one: Round, config: RunConfig, adapter: Adapter, clients: Mapping[ClientId, Introduced], trainer: Trainer | None
) -> float:
    """Held-out results: the server's where it has held-out prompts, and the members' where those train.

    Returns the score that `evaluation.rollback` goes by, of sampled completions: the server's own if it has one, else
    the median of the members', since a liar can put a mean where it likes.
    """
    score = float("nan")
    for greedy in (False, True) if config.evaluation.greedy else (False,):
        prefix = "heldout_greedy" if greedy else "heldout"
        if trainer is not None:
            found = trainer.evaluate(Evaluate(adapter, greedy), round=one.number)
            one.log("server", figures(config, prefix, found))
            score = score if greedy else _score(config, found)
            if "server" in config.algorithm.needs:
                one.log("all", figures(config, prefix, found))
                continue
        replies = _ask(one, config, clients, Evaluate(adapter, greedy), prefix)
        score = _middle(config, replies) if score != score and not greedy else score
        if config.policy.private is not None:
            _ask(one, config, clients, Evaluate(adapter, greedy, personal=True), prefix.replace("out", "out_personal"))
    return score


def _score(config: RunConfig, found: Evaluated) -> float:
    """The primary objective's mean; without one, that of the objectives measured, by their weights."""
    primary = next((m for m, objective in enumerate(config.objectives.values()) if objective.primary), None)
    rewards = found.rewards.double()
    if primary is not None:
        return float(rewards[primary])
    weights = torch.tensor(default_weights(config.objectives), dtype=torch.float64) * ~rewards.isnan()
    return float((rewards.nan_to_num() * weights).sum() / weights.sum())


def _middle(config: RunConfig, replies: Iterable[Evaluated]) -> float:
    """The lower median of the members' scores; NaN if nobody tells one."""
    scores = sorted(score for reply in replies if (score := _score(config, reply)) == score)
    return scores[(len(scores) - 1) // 2] if scores else float("nan")


def _ask(
    one: Round, config: RunConfig, clients: Mapping[ClientId, Introduced], request: Evaluate, prefix: str
) -> list[Evaluated]:
    """The replies; they and what they pool to are logged."""
    replies = one.ask(dict.fromkeys(clients, request))
    for client, reply in replies.items():
        one.log(client, figures(config, prefix, reply))
    found = list(replies.values())
    one.log("all", figures(config, prefix, pooled(found, max_share=one.rules.max_share)))
    return found


def figures(config: RunConfig, prefix: str, reply: Evaluated) -> dict[str, float]:
    """A reply as metrics."""
    found = {f"{prefix}/{name}": v for name, v in zip(config.objectives, reply.rewards.tolist(), strict=True)}
    return found if reply.accuracy is None else {**found, f"{prefix}/accuracy": reply.accuracy}


def pooled(replies: Iterable[Evaluated], *, max_share: float = 2.0) -> Evaluated:
    """Held-out means over all members' completions: each objective weighs a member by what it was measured on.

    No member counts for more than `max_share` / n of it.
    """
    found = list(replies)
    mean = mean_reply(found)
    counts = torch.stack([reply.counts for reply in found]).double()  # [k, m]
    rewards = torch.stack([reply.rewards for reply in found]).double()
    counts = counts * ~rewards.isnan()
    for column in counts.T:
        named = {str(k): float(count) for k, count in enumerate(column) if count > 0}
        for k, count in capped(named, max_share).items():
            column[int(k)] = count
    return replace(mean, rewards=((rewards.nan_to_num() * counts).sum(0) / counts.sum(0)).float())


def maps_conflicts(config: RunConfig, clients: Mapping[ClientId, Introduced], round: int) -> bool:
    """Whether this round has a conflict map: the start, the middle and the end of runs whose members train alike."""
    if not config.evaluation.conflicts or "server" in config.algorithm.needs:
        return False
    alike = all(one.rank == config.policy.lora.r for one in clients.values())
    return alike and round in (0, (config.rounds + 1) // 2, config.rounds)


def conflicts(one: Round, config: RunConfig, adapter: Adapter, clients: Mapping[ClientId, Introduced]) -> None:
    """The cosine of every two gradients of a member's objective, at this adapter: the metrics of the conflict map."""
    names = sorted(clients)
    drawn = sorted(names[i] for i in permutation(len(names), config.seed, "conflict map")[:MAPPED])
    request = Differentiate(adapter, rank=SKETCH_RANK, seed=key(config.seed, "conflict map", one.number))
    replies = one.ask(dict.fromkeys(drawn, request), min_replies=0)
    owners = [(client, objective) for client in replies for objective in config.objectives]
    if not owners:
        return
    cosines = sketched_cosines(torch.cat([replies[client].sketch for client in replies]))
    order = sorted(range(len(owners)), key=owners.__getitem__)
    for place, i in enumerate(order):
        client, objective = owners[i]
        row = {"/".join(owners[j]): float(cosines[i, j]) for j in order[place + 1 :]}
        one.log(client, {f"cosine/{objective}/{other}": value for other, value in row.items()})
