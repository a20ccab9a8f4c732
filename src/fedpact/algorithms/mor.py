"""MoR: members keep reward models of their own, and the server routes every question to those that fit it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from fedpact.algorithms.base import Algorithm
from fedpact.algorithms.judging import Raters, public, questions_of, score, train_at_server, with_own
from fedpact.algorithms.steps import Aggregation
from fedpact.core.confidence import chosen_experts
from fedpact.core.router import fit_router, route
from fedpact.errors import DataError
from fedpact.messages import Fit, Fitted, Score, Scored
from fedpact.protocols import Client, Server
from fedpact.types import Adapter, ClientId, Prompts, Rollout

LARGEST = 5.0
"""Standard deviations that a calibrated rating can count for."""


class MoR(Algorithm):
    """A mixture of the members' reward models is the reward; the models stay, and rate when they are asked.

    A router over frozen embeddings, taught on the auxiliary questions' domains, weighs the members whose task is a
    question's likely domain; their rewards are first put on one scale by what they say of completions of the base
    model. Then GRPO with a KL to it (`loss.beta`; 0.04 is usual). From the abstract of arXiv:2605.03426, which names
    local reward models, routing and GRPO with KL; calibration, router and all else are our reading.
    """

    name: Literal["mor"] = "mor"
    server_steps: PositiveInt = 8
    """Steps in a round, with one exchange each."""
    temperature: PositiveFloat = 1.0
    """Of the router: the smaller, the more the likeliest domain counts."""
    num_experts: PositiveInt | None = 2
    """Ask only the members of the likeliest domains, this many of those. None: all."""
    multi_objective_aggregation: Aggregation = "sum_then_normalize"
    """As for fedgrpo."""

    needs: ClassVar[frozenset[str]] = frozenset({"server", "reference"})

    def check_data(self, prompts: Prompts, auxiliary: Prompts | None) -> None:
        if auxiliary is None or "domain" not in auxiliary.columns:
            raise ValueError("server.auxiliary: no column 'domain'; the router learns from it, use rename")

    def server(self, adapter: Adapter, server: Server) -> Adapter:
        domains = self.fit_newcomers(adapter, server)
        raters = Raters(server, sorted(name for name in server.clients if f"mean/{name}" in server.memory))
        known = {kind: [server.memory[f"{kind}/{name}"] for name in raters.names] for kind in ("mean", "std")}

        def judge(rollout: Rollout, step: int) -> Tensor:
            weights = self.routed(server, questions_of(rollout), raters.names, domains, step)  # [p, k]
            weights = weights.mT.repeat_interleave(rollout.group_size, dim=1)  # [k, n]
            ratings = raters.rate(rollout, weights > 0, last=step == self.server_steps - 1)  # [k, m, n]
            if raters.names:
                mean, std = torch.stack(known["mean"]), torch.stack(known["std"])  # [k, m]
                # All alike on the probe: that shows no scale, and dividing by next to nothing would drown the others.
                ratings = (ratings - mean[..., None]) / std.where(std > 1e-6, 1.0)[..., None]
                ratings = ratings.clamp(-LARGEST, LARGEST)  # nobody's own scale may decide alone
            mixed = mixture(ratings, weights)
            own = server.rewards(rollout.prompts, rollout.completions)
            return with_own(mixed, own, None, rollout.group_size)

        how = self.multi_objective_aggregation
        adapter = train_at_server(adapter, server, judge, steps=self.server_steps, how=how)
        raters.close()
        return adapter

    def fit_newcomers(self, adapter: Adapter, server: Server) -> list[str]:
        """Fit and calibrate whoever is new, teach the router once; the domains that it tells apart, sorted."""
        known = server.auxiliary()
        domains = sorted({str(domain) for domain in known.columns["domain"]})
        tasks = sorted({one.task for one in server.clients.values()})
        if not set(tasks) & set(domains):
            raise DataError(f"server.auxiliary: its domains {domains} are nobody's task; the members' are {tasks}")
        labels = torch.tensor([domains.index(str(domain)) for domain in known.columns["domain"]])
        if not any(name.startswith("router/") for name in server.memory):
            router = fit_router(server.embed(known), labels, len(domains))
            server.memory.update({f"router/{name}": value for name, value in router.items()})
        new = [name for name in sorted(server.clients) if f"mean/{name}" not in server.memory]
        if new:
            server.policy.load({name: torch.zeros_like(tensor) for name, tensor in adapter.items()})
            rollout = server.policy.generate(known, draw=-1)
            rows = torch.arange(len(known)).repeat_interleave(rollout.group_size)
            probe = Fit(public(known), rows, list(rollout.completions))
            needed = int(len(new) == len(server.clients))  # one at least must be known, or nobody would ever be asked
            for name, reply in server.ask(dict.fromkeys(new, probe), min_replies=needed).items():
                server.memory[f"mean/{name}"], server.memory[f"std/{name}"] = reply.mean, reply.std
                accuracies = zip(server.objectives, reply.accuracy.tolist(), strict=True)
                server.log(**{f"pairs/{name}/{objective}": value for objective, value in accuracies})
        return domains

    def routed(
        self, server: Server, questions: Prompts, names: Sequence[ClientId], domains: Sequence[str], step: int
    ) -> Tensor:
        """How much each member's rewards count for each question: [p, k]; rows sum to 1, or 0 where nobody fits.

        Members that fit a question equally well draw lots for the `num_experts` places, afresh in each step.
        """
        router = {name.removeprefix("router/"): v for name, v in server.memory.items() if name.startswith("router/")}
        likely = route(router, server.embed(questions), temperature=self.temperature)  # [p, c]
        tasks = [server.clients[name].task for name in names]
        share = torch.zeros(len(questions), len(names))  # of each member's domain
        for k, task in enumerate(tasks):
            if task in domains:
                share[:, k] = likely[:, domains.index(task)]
        asked = share > 0
        if self.num_experts is not None:
            draws = server.uniforms(f"experts/{step}", len(questions), len(names))
            asked &= chosen_experts(share, self.num_experts, draws=draws)
        same = torch.tensor([[float(one == other) for other in tasks] for one in tasks])  # [k, k]
        weights = share * asked / (asked.float() @ same).clamp(min=1)  # members of one task share its weight
        return weights / weights.sum(1, keepdim=True).clamp(min=1e-12)

    def score(self, request: Score, client: Client) -> Scored:
        return score(request, client)

    def fit(self, request: Fit, client: Client) -> Fitted:
        accuracy = client.fit_rewards()
        rewards = client.judge(request.prompts.select(request.rows.tolist()), request.completions)  # [m, n]
        mean = rewards.nanmean(1, keepdim=True)
        return Fitted(mean[:, 0], (rewards - mean).square().nanmean(1).sqrt(), accuracy)


def mixture(ratings: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of those that rated: [k, m, n], [k, n] -> [m, n], NaN where nobody did."""
    counted = weights[:, None] * ~ratings.isnan()  # [k, m, n]
    return (ratings.nan_to_num() * counted).sum(0) / counted.sum(0)
