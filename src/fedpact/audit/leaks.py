"""The curious server against this configuration: what one reply gives away, under each defence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from fedpact.audit.curious import Guess, guessed
from fedpact.audit.finding import Finding, mean_and_error
from fedpact.audit.trial import Bench, Heard, changed
from fedpact.errors import FedPactError
from fedpact.messages import Train, Trained
from fedpact.runtime.config import RunConfig

ATTACK = "curious server: one reply"
ATTACKED = 4
"""Members whose replies are looked into, for each seed."""
NOISES = (0.01, 1.0)
NO_PROOF = "A weak attack's failure is no proof of safety: stronger ones exist, and only epsilon bounds all of them."


@dataclass(frozen=True, slots=True)
class Setting:
    """A defence, or a weakness: changes of the run file and of the members' gates."""

    name: str
    run: Mapping[str, Any] = field(default_factory=dict)
    noise: float | None = None
    """`site.noise_multiplier`; 0 clips only, at half the length of an ordinary step."""
    site: Mapping[str, Any] | None = None
    listens: str = "train"
    """The verb whose replies are looked into."""
    seeded: bool = True

    def gate(self, norm: float) -> Mapping[str, Any] | None:
        """What every member's `[site]` gets; `norm` is the length of an ordinary step."""
        if self.noise is None:
            return self.site
        return {"clip_norm": norm / 2, "noise_multiplier": self.noise or None}


def settings(config: RunConfig) -> list[Setting]:
    """What to try. The second one is the plain single step."""
    steps = getattr(config.algorithm, "local_steps", None)
    one = {} if steps is None else {"algorithm.local_steps": 1}
    batch = config.training.prompts_per_step
    found = [Setting("as configured"), Setting("one local step", one)]
    found.append(Setting("one step, sampling keyed by a secret", one, seeded=False))
    if config.optimizer.name == "adamw":
        found.append(Setting("one step of SGD", {**one, "optimizer.name": "sgd"}))
    found.append(Setting(f"one step, {4 * batch} prompts", {**one, "training.prompts_per_step": 4 * batch}))
    if steps is not None:
        found.append(Setting(f"{4 * steps} local steps", {"algorithm.local_steps": 4 * steps}))
    found.append(Setting("one step, site.clip_norm", one, noise=0.0))
    found += [Setting(f"one step, site.noise_multiplier {noise:g}", one, noise=noise) for noise in NOISES]
    sketches = {"evaluation.conflicts": True}
    found.append(Setting("gradient sketches shared", sketches, listens="differentiate"))
    withheld = {"share": ("rewards", "accuracy")}
    found.append(Setting("gradient sketches withheld", sketches, site=withheld, listens="differentiate"))
    return found


def leaks(bench: Bench, config: RunConfig, *, seeds: int) -> Iterator[Finding]:
    """One line for each setting, over the replies of some members in all seeds."""
    norm = 1.0
    for i, setting in enumerate(settings(config)):
        guesses: list[Guess | None] = []
        try:
            for k in range(seeds):
                found, length = _guesses(bench, config, setting, seed=config.seed + k, norm=norm)
                guesses += found
                norm = length if i == 1 else norm
        except FedPactError as error:
            yield Finding(ATTACK, setting.name, "–", "", f"not possible here: {error}")
            continue
        told = [one for one in guesses if one is not None]
        yield described(setting.name, told, len(guesses) - len(told))


def described(name: str, guesses: list[Guess], silent: int) -> Finding:
    """The line of one setting: guesses, and the replies that said nothing."""
    if not guesses:
        return Finding(ATTACK, name, f"0 of {silent} replies say anything", "", "nothing to look into left")
    auc, error = mean_and_error([one.auc for one in guesses])
    precision, _ = mean_and_error([one.precision for one in guesses])
    tokens, _ = mean_and_error([one.tokens for one in guesses if one.tokens is not None])
    text = f"prompts told apart: AUC {auc:.2f} ± {2 * error:.2f}, precision {precision:.2f}"
    text += "" if math.isnan(tokens) else f"; tokens AUC {tokens:.2f}"
    leak = auc - 2 * error > 0.5
    if not leak:
        words = "no better than chance in this attack"
    elif auc > 0.9:
        words = "LEAK: nearly every prompt of the batch is recognised"
    else:
        words = "LEAK: member prompts are told from others above chance"
    values = {
        "auc": auc,
        "auc_error": error,
        "precision": precision,
        "tokens_auc": tokens,
        "replies": float(len(guesses)),
    }
    return Finding(ATTACK, name, text, "chance .50", words, leak, values)


def _guesses(
    bench: Bench, config: RunConfig, setting: Setting, *, seed: int, norm: float
) -> tuple[list[Guess | None], float]:
    """What the first replies of some members give away, and the median length of a change of the adapter."""
    changes = {
        "rounds": 1,
        "seed": seed,
        "evaluation.conflicts": False,
        "evaluation.num_prompts": 1,
        "evaluation.num_generations": 1,
        "evaluation.greedy": False,
        **setting.run,
    }
    variant = changed(config, changes, where=str(bench.path))
    outcome = bench.trial(variant, keeps={setting.listens}, site=setting.gate(norm))
    first: dict[str, Heard] = {}
    for heard in outcome.heard:
        first.setdefault(heard.who, heard)
    guesses = []
    for who in sorted(first)[:ATTACKED]:
        member = outcome.members[who]
        assert member.contract is not None
        guesses.append(guessed(first[who], member, member.contract, seeded=setting.seeded))
    lengths = [length for one in first.values() if (length := _length(one)) > 0]
    return guesses, median(lengths) if lengths else norm


def _length(heard: Heard) -> float:
    request, reply = heard.envelope.open(), heard.reply
    if not (isinstance(request, Train) and isinstance(reply, Trained)):
        return 0.0
    return float(sum(float((x - request.adapter[n]).square().sum()) for n, x in reply.adapter.items()) ** 0.5)
