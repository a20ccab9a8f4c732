"""Settings of a run file that do not go together, each with its one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedpact.runtime.config import RunConfig


def refuse_contradictions(config: RunConfig) -> None:
    """Raise ValueError, naming the setting, at the first contradiction."""
    for message in _contradictions(config):
        raise ValueError(message)


def _contradictions(config: RunConfig) -> Iterator[str]:
    algorithm, needs = getattr(config.algorithm, "name", ""), config.algorithm.needs
    at_server, ppo = "server" in needs, config.loss.surrogate == "ppo"
    if ppo and needs & {"server", "groups"}:
        yield f'loss.surrogate: found "ppo"; algorithm {algorithm!r} compares completions of one prompt: use "grpo"'
    if ppo and config.loss.beta:
        yield f"loss.beta: found {config.loss.beta:g}; PPO's KL is part of the reward: use 0, and set ppo.kl_coef"
    if ppo and getattr(config.algorithm, "multi_objective_aggregation", "") == "sum_then_normalize":
        yield (
            'algorithm.multi_objective_aggregation: found "sum_then_normalize"; PPO has a critic for each objective: '
            'use "normalize_then_sum"'
        )
    completions = config.training.prompts_per_step * config.rollout.num_generations
    if ppo and config.ppo.target_kl is not None and config.ppo.kl_horizon <= 0.2 * completions:
        yield (
            f"ppo.kl_horizon: found {config.ppo.kl_horizon:g} for {completions} completions a step; "
            f"use more than {0.2 * completions:g}"
        )
    if ppo and config.rollout.num_generations * config.training.prompts_per_step < 2:
        yield "training.prompts_per_step: found 1 with one completion a prompt; PPO compares a batch: use 2"
    if not ppo and config.rollout.num_generations < 2:
        yield 'rollout.num_generations: found 1; GRPO compares completions of one prompt: use 2 or more, or "ppo"'
    if "sgd" in needs and config.optimizer.name != "sgd":
        yield f'optimizer.name: found "{config.optimizer.name}"; algorithm {algorithm!r} needs "sgd"'
    products, trainable = config.federation.averaging == "products", config.training.trainable
    if products and needs & {"server", "factors"}:
        yield f'federation.averaging: found "products"; algorithm {algorithm!r} cannot average so: use "factors"'
    if products and config.federation.aggregation != "mean":
        kind = config.federation.aggregation
        yield f'federation.aggregation: found "{kind}" with federation.averaging = "products": use "mean"'
    if config.federation.aggregation != "mean" and "server" in needs:
        yield f"federation.aggregation: found with algorithm {algorithm!r}, whose members do not train; remove it"
    if config.federation.aggregation != "mean" and "sgd" in needs:
        yield f"federation.aggregation: found with algorithm {algorithm!r}, which takes means of its own; remove it"
    if config.evaluation.rollback is not None and config.server_optimizer.name != "none":
        yield "evaluation.rollback: found with server_optimizer, whose momentum knows no way back; remove it"
    if products and trainable != "all":
        yield f'training.trainable: found "{trainable}", whose mean is exact: use federation.averaging = "factors"'
    if config.server_optimizer.name != "none" and (products or needs & {"server", "step"}):
        other = 'federation.averaging = "products"' if products else f"algorithm {algorithm!r}"
        yield f'server_optimizer.name: found "{config.server_optimizer.name}" with {other}: use "none"'
    if "sgd" in needs and (config.policy.private or trainable != "all"):
        setting = "policy.private" if config.policy.private else "training.trainable"
        yield f"{setting}: found with algorithm {algorithm!r}, which corrects the whole adapter and no more; remove it"
    if config.server_optimizer.name != "none" and trainable == "alternating":
        found = config.server_optimizer.name
        yield f'server_optimizer.name: found "{found}", whose momentum moves the factor that is not trained: use "none"'
    if config.algorithm.per_objective and (ppo or config.policy.private):
        setting = "loss.surrogate" if ppo else "policy.private"
        yield f"{setting}: found with algorithm {algorithm!r}, whose members train several adapters at once; remove it"
    if at_server and (config.policy.private or trainable != "all"):
        setting = "policy.private" if config.policy.private else "training.trainable"
        yield f"{setting}: found with algorithm {algorithm!r}, whose members do not train; remove it"
