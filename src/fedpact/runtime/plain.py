"""A contract and a member's gate in plain words, for whoever has to say yes: `fedpact site accept` and `site check`.

What came from the network is quoted, screened and cut: it can neither command a terminal nor pass for words of ours.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedpact.algorithms import table
from fedpact.algorithms.base import Algorithm
from fedpact.errors import ConfigError
from fedpact.messages import REQUESTS
from fedpact.runtime.budget import epsilon_after
from fedpact.runtime.client_config import SiteSettings
from fedpact.runtime.config import parse_algorithm
from fedpact.runtime.contract import Contract, default_weights
from fedpact.runtime.disclosure import DIGITS, FEWEST_COUNTED
from fedpact.runtime.gate import Gate
from fedpact.runtime.wording import WIDTH, count, figure, joined, line, listed, named, product

__all__ = ["WIDTH", "in_words", "leaves"]

_MOST_COUNTED = 10**6
"""Adapters whose epsilon is worked out in advance."""

_CROSSES = {
    "hello": "this contract comes; your name, task, objectives, number of prompts, rank and package versions go",
    "train": "an adapter comes; the adapter as you trained it, its weight in the mean, and figures go",
    "evaluate": "an adapter comes; mean held-out rewards and the number of completions behind them go",
    "differentiate": 'an adapter comes; compressed gradients of one batch go, if site.share has "gradients"',
    "count": "names of domains come; how many of your training prompts are in each goes",
    "examine": "questions with two answers each come; one bit for each goes: whether your judge puts the first above",
    "score": "questions and candidate answers come; your rewards' ratings of them go",
    "fit": "questions and answers come; mean and spread of your reward models' ratings of them go",
}
"""Verb to what comes and goes, as fedpact.messages has it."""

_FACTORS = {"all": "both factors", "B": "factor B alone", "alternating": "factor B in odd rounds, A in even ones"}


def in_words(contract: Contract, found: str) -> list[str]:
    """What a run under `contract` asks of a member, a line of `WIDTH` characters at most each; `found` is its hash.

    Raises ConfigError if its algorithm is not known here.
    """
    algorithm = parse_algorithm(contract.algorithm)
    name = str(contract.algorithm["name"])
    lines = [f"algorithm: {named(name)}: {table()[name].summary}"]
    lines += listed([f"  {name} = {value}" for name, value in _settings(algorithm)], "settings")
    lines += _training(contract) if _trains(algorithm) else ["what is trained: nothing at members; the server trains"]
    lines += _work(contract, algorithm)
    lines += listed(_objectives(contract), "objectives")
    lines += [f"request {verb}: {_CROSSES[verb]}" for verb in _sent(contract, algorithm)]
    lines.append(f"what leaves a member, in short: {table()[name].leaves}")
    lines.append(f"base model: the one whose files have the SHA-256 {named(contract.model, 64)}; it is never changed")
    lines.append(f"seed: {count(contract.seed)}, for adapters, the order of prompts and sampling; never for noise")
    lines.append(f"hash of this contract: {found}")
    return [line(one) for one in lines]


def leaves(site: SiteSettings, contract: Contract | None) -> list[str]:
    """What may leave a member with these `[site]` settings, and its ceilings; under `contract`, or under any for None.

    Of every request that the member would answer, whether or not an honest server sends it, as between sites; in a
    simulation more leaves by default. Raises ConfigError if the algorithm is not known here.
    """
    gate = Gate(site, where="[site]", home=Path(), simulation=False)
    algorithm = None if contract is None else parse_algorithm(contract.algorithm)
    answered = [verb for verb in _answered(algorithm) if verb in site.verbs]
    silent = gate.budget is not None
    number = "1 in place of the number of prompts" if silent else "number of prompts"
    lines = [f"answers to: {', '.join(answered) or 'nothing'}"]
    lines.append(f"always: name, task, names of objectives, {number}, rank, package versions")
    if "train" in answered:
        lines += _adapter(site, contract, algorithm)
    if {"train", "evaluate"} & set(answered):
        lines += _means(gate)
    if "evaluate" in answered:
        lines.append(f"held-out completions behind each objective's mean: {'1, whatever it is' if silent else 'yes'}")
    if "differentiate" in answered:
        lines.append(_gradients(gate, algorithm))
    if "count" in answered:
        few = f"yes, below {FEWEST_COUNTED} as 0"
        lines.append(f"numbers of prompts by domain: {'refused; epsilon does not cover them' if silent else few}")
    if {"score", "examine", "fit"} & set(answered):
        lines += _ratings(gate, answered)
    if site.public_sampling:
        lines.append("sampling: from the run's public seed; the server could draw a guessed prompt's completions again")
    lines.append("never: prompts, completions of them, answers, rewards' code, private adapter, memory")
    return [line(one) for one in [*lines, *_ceilings(site, contract, algorithm)]]


# --- the contract -------------------------------------------------------------------------------------------------


def _trains(algorithm: Algorithm) -> bool:
    """Whether it is the members who train."""
    return "server" not in algorithm.needs


def _sent(contract: Contract, algorithm: Algorithm) -> list[str]:
    """The requests that a run under this contract sends to members."""
    measured = "gradients" in algorithm.needs or (_trains(algorithm) and contract.evaluation.conflicts)
    return [verb for verb in _answered(algorithm) if verb != "differentiate" or measured]


def _answered(algorithm: Algorithm | None) -> list[str]:
    """The requests that a member answers under this algorithm; None: under any."""
    if algorithm is None:
        return list(REQUESTS)
    always = {"hello", "evaluate"} if _trains(algorithm) else {"hello"}
    return [verb for verb in REQUESTS if verb in always or callable(getattr(algorithm, verb, None))]


def _settings(algorithm: Algorithm) -> list[tuple[str, str]]:
    """The algorithm's own settings, as JSON."""
    dumped = {name: value for name, value in algorithm.model_dump(mode="json").items() if name != "name"}
    return [(named(name), json.dumps(value, ensure_ascii=False)) for name, value in dumped.items()]


def _objectives(contract: Contract) -> list[str]:
    weights = default_weights(contract.objectives)
    return [
        f"objective {named(name)}: weight {weight:g}, if the algorithm takes fixed ones"
        + ("; the primary one, whose mean is called accuracy" if objective.primary else "")
        for (name, objective), weight in zip(contract.objectives.items(), weights, strict=True)
    ]


def _work(contract: Contract, algorithm: Algorithm) -> list[str]:
    """How much there is to do for a member that is asked in every round."""
    rounds = (contract.rounds, "rounds")
    prompts, group = contract.training.prompts_per_step, contract.rollout.num_generations
    if not _trains(algorithm):
        if not {"score", "examine", "fit"} & set(_answered(algorithm)):
            return ["work: none; members are asked for nothing"]
        steps, asked = getattr(algorithm, "server_steps", None), prompts + getattr(algorithm, "canaries", 0)
        factors = (rounds, (steps, "server steps"), (asked, "questions"), (group, "candidates"))
        return ["work: " + product(*factors, of="candidates to rate at most")]
    each = [rounds, (getattr(algorithm, "local_steps", None), "local steps")]
    each += [(len(contract.objectives), "objectives, each by itself")] if algorithm.per_objective else []
    lines = ["work: " + product(*each, (prompts, "prompts"), (group, "completions"), of="completions at most")]
    if (again := contract.training.num_iterations) > 1:
        each.append((again, "steps on each batch"))
    lines.append("optimiser steps: " + product(*each, of="steps at most"))
    if "gradients" in algorithm.needs:
        more = product(rounds, (prompts, "prompts"), (group, "completions"), of="completions more")
        lines.append(f"gradients: of one batch before each training: {more}")
    if contract.evaluation.conflicts:
        *first, last = map(count, sorted({0, (contract.rounds + 1) // 2, contract.rounds}))
        batch = f"{count(prompts * group)} completions"
        lines.append(f"conflict map: in rounds {', '.join(first)} and {last}, gradients of one batch of {batch}")
    return [*lines, _evaluation(contract)]


def _evaluation(contract: Contract) -> str:
    asked, rounds = contract.evaluation, contract.rounds
    times = rounds // asked.every + 1 + (rounds % asked.every > 0)
    on = "all held-out prompts" if asked.num_prompts is None else f"{count(asked.num_prompts)} held-out prompts at most"
    more = ", and the likeliest completion" if asked.greedy else ""
    more += "; the same with your private adapter" if contract.private is not None else ""
    often = f"{count(times)} times (at the start, every {count(asked.every)} rounds, at the end)"
    return f"evaluation: {often}, on {on}, {count(asked.num_generations)} sampled for each{more}"


def _training(contract: Contract) -> list[str]:
    lora, rollout, loss = contract.lora, contract.rollout, contract.loss
    named = lora.target_modules
    where = "all linear layers" if isinstance(named, str) else f"{len(named)} kinds of layers: {joined(named)}"
    lines = [
        f"what is trained: a LoRA adapter of rank {count(lora.r)}, alpha {lora.lora_alpha:g}, on {where}",
        f"trained and sent back: {_FACTORS[contract.training.trainable]} of it; its output is scaled by {lora.scale:g}",
    ]
    if contract.private is not None:
        one = contract.private
        lines.append(f"private adapter: rank {one.r}, alpha {one.lora_alpha:g}, beside the shared one; it never leaves")
    lines.append(f"learning rate: {contract.optimizer.learning_rate:g} ({contract.optimizer.name})")
    ppo = loss.surrogate == "ppo"
    kind = "PPO with a critic that stays with you" if ppo else f"{loss.loss_type}, KL weight {loss.beta:g}"
    lines.append(f"loss: {kind}, ratios clipped at {loss.epsilon:g}")
    limit = rollout.max_prompt_length
    prompts = "of any length" if limit is None else f"cut to their last {count(limit)} tokens"
    lines.append(
        f"lengths: completions of {count(rollout.max_completion_length)} tokens at most, prompts {prompts}; "
        f"temperature {rollout.temperature:g}"
    )
    return lines


# --- the gate -----------------------------------------------------------------------------------------------------


def _adapter(site: SiteSettings, contract: Contract | None, algorithm: Algorithm | None) -> list[str]:
    if site.clip_norm is None:
        return ["adapter: as trained; no noise, so no formal privacy: its change can reveal training data"]
    clip = f"its change shortened to norm {site.clip_norm:g}"
    if site.noise_multiplier is None:
        return [f"adapter: {clip}; no noise, so no formal privacy: it can reveal training data"]
    lines = [f"adapter: {clip}, with Gaussian noise of {site.noise_multiplier * site.clip_norm:g} on every number"]
    end = "only counted, no limit" if site.epsilon is None else f"training stops before {site.epsilon:g} is exceeded"
    lines.append(f"epsilon: {end}; at delta {site.delta:g}, for all of this member's data, over all runs")
    if contract is not None and algorithm is not None:
        adapters = contract.rounds * (len(contract.objectives) if algorithm.per_objective else 1)
        if (spent := _epsilon(adapters, site)) is not None:
            lines.append(f"epsilon of {count(adapters)} adapters, one a training request of this run: {spent:.4g}")
    return lines


def _epsilon(adapters: int, site: SiteSettings) -> float | None:
    """None if it is not known: too many to count, or no accountant installed."""
    try:
        return None if adapters > _MOST_COUNTED else epsilon_after(adapters, site.noise_multiplier or 0.0, site.delta)
    except ConfigError:
        return None


def _means(gate: Gate) -> list[str]:
    told = [name for name in ("rewards", "accuracy") if name in gate.share]
    uncovered = "; epsilon does not cover them" if gate.budget is not None else ""
    few = f"{DIGITS} significant digits, each only if {count(gate.min_samples)} completions or more are behind it"
    means = f"{' and '.join(told)}, {few}{uncovered}" if told else "none"
    names = ", ".join(gate.site.metrics)
    figures = f"those named {names}, {DIGITS} significant digits{uncovered}" if "metrics" in gate.share else "none"
    if gate.budget is not None:
        figures += ", and epsilon itself"
    cap = "as computed" if gate.site.max_weight is None else f"as computed, {gate.site.max_weight:g} at most"
    weight = "1, whatever it is" if gate.budget is not None else cap
    return [f"means: {means}", f"figures of the algorithm: {figures}", f"weight in a mean: {weight}"]


def _gradients(gate: Gate, algorithm: Algorithm | None) -> str:
    if gate.shares_gradients:
        return "compressed gradients: yes; they tell about as much of the prompts as anything that can leave"
    refused = algorithm is not None and "gradients" in algorithm.needs
    return "compressed gradients: none" + ("; the algorithm needs them, so this contract is refused" if refused else "")


def _ratings(gate: Gate, answered: list[str]) -> list[str]:
    spent = gate.site.epsilon_per_prompt
    lines = []
    if spent is not None:
        lines.append(
            f"ratings: randomised 0/1 answers, epsilon {spent:g} for each question and request; asking adds up"
        )
    elif gate.budget is not None:
        lines.append("ratings: refused; the noise's epsilon does not cover them without site.epsilon_per_prompt")
    else:
        lines.append("ratings: exact; who asks often enough can find a private answer with them")
    if "fit" in answered:
        lines.append("calibration of reward models: " + ("exact" if spent is None and not gate.budget else "refused"))
    return lines


def _ceilings(site: SiteSettings, contract: Contract | None, algorithm: Algorithm | None) -> list[str]:
    asked: dict[str, float | None] = {}
    if contract is not None and algorithm is not None:
        asked["max_rounds"] = contract.rounds
        if _trains(algorithm):
            steps = getattr(algorithm, "local_steps", None)
            turns = len(contract.objectives) if algorithm.per_objective else 1
            asked["max_local_steps"] = steps and steps * contract.training.num_iterations * turns
            asked["max_completion_length"] = contract.rollout.max_completion_length
            asked["max_learning_rate"] = contract.optimizer.learning_rate
    lines = []
    for name in ("max_rounds", "max_local_steps", "max_completion_length", "max_learning_rate"):
        limit, wanted = getattr(site, name), asked.get(name)
        run = f"; this run asks for {figure(wanted)}" if name in asked else ""
        over = limit is not None and name in asked and (wanted is None or wanted > limit)
        lines.append(f"ceiling {name}: {figure(limit)}{run}{', so it is refused' if over else ''}")
    if algorithm is None or not _trains(algorithm):
        lines.append(f"ceiling max_candidates: {count(site.max_candidates)} in one request")
        lines.append(f"ceiling max_text_length: {count(site.max_text_length)} characters")
    return lines
