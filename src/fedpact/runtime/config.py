"""The run file: what it may say, and one line for what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from fedpact.algorithms import algorithm_class, table
from fedpact.algorithms.base import Algorithm
from fedpact.errors import ConfigError
from fedpact.runtime.client_config import ModelSettings, PromptSettings, RewardSettings
from fedpact.runtime.contradictions import refuse_contradictions
from fedpact.runtime.toml import Place, read_toml, toml_value, validated
from fedpact.settings import (
    LoraSettings,
    LossSettings,
    OptimizerSettings,
    PPOSettings,
    PrivateSettings,
    RolloutSettings,
    ServerOptimizerSettings,
    Settings,
    TrainingSettings,
)

_MISSING = {
    "server": "server: missing; algorithm {!r} trains at the server: give it [server.prompts] and [server.rewards]",
    "reference": "loss.beta: found 0; algorithm {!r} needs a KL to the reference model, such as 0.04",
}


class ObjectiveSettings(Settings):
    """One objective of the run; the rewards that measure it are each member's own."""

    primary: bool = False
    """The objective that is called accuracy."""
    weight: NonNegativeFloat | None = None
    """For algorithms with fixed weights. None: an equal share of what the named weights leave of 1."""


class PolicySettings(Settings):
    """The model that is aligned."""

    model: Place
    """A model folder (relative to the run file) or a Hugging Face id."""
    adapter: Place | None = None
    """A PEFT adapter folder to start from. None: a fresh one, drawn from the seed."""
    lora: LoraSettings = LoraSettings()
    private: PrivateSettings | None = None
    """A `[policy.private]` table gives every member an adapter of its own beside the shared one; it never leaves."""


class FederationSettings(Settings):
    """Who takes part in a round, and when it ends."""

    participation: float = Field(default=1.0, gt=0, le=1)
    """Share of the members in a round, drawn afresh each round."""
    min_replies: PositiveInt = 1
    """An exchange with fewer admitted replies fails. Where members only judge, one reply in a round is enough."""
    timeout_s: PositiveFloat | None = None
    """An exchange closes after this time; in a simulation, where members take turns, each has it for itself. None: it
    waits for all."""
    averaging: Literal["factors", "products"] = "factors"
    """"factors" averages A and B by themselves, which is not the mean of BA; "products" (FlexLoRA) averages BA and cuts
    it to the run's rank, and lets members have smaller ranks."""
    aggregation: Literal["mean", "geometric_median", "trimmed_mean"] = "mean"
    """How members' adapters become one, after admission, cap and clip. "geometric_median" (RFA) outvotes any minority
    of the weight; "trimmed_mean" drops the extremes of every coordinate and knows no weights."""
    trim: float = Field(default=0.2, gt=0, lt=0.5)
    """For "trimmed_mean": the share of members dropped at each end."""
    max_share: float = Field(default=2.0, ge=1)
    """No member counts for more than this many times 1/n in a mean of n replies. A large number: no cap."""
    clip_factor: PositiveFloat = 2.0
    """A member's change of the adapter is shortened to this many times the median norm of those accepted lately. A
    large number: no clip."""
    clip_norm: PositiveFloat | None = None
    """And to this norm at the most."""
    trust: Literal["robust"] = "robust"
    """"robust": the server sees single replies. Secret sums are not in this version."""


class EvaluationSettings(Settings):
    """Held-out measurements."""

    every: PositiveInt = 5
    """Rounds between evaluations; the start and the end are always evaluated."""
    num_prompts: PositiveInt | None = None
    """Held-out prompts per member. None: all."""
    num_generations: PositiveInt = 1
    """Sampled completions per prompt."""
    greedy: bool = False
    """Also measure the likeliest completion."""
    rollback: PositiveFloat | None = None
    """Return to the adapter of the evaluation before if the primary objective's held-out mean (without one, that of all
    objectives by their weights) has fallen by more than this: the server's own, else the median of the members'. None:
    never."""
    conflicts: bool = True
    """At the start, middle and end also measure how the gradients of all members' objectives agree, from sketches, for
    the report's conflict map. A member takes part if its `site.share` has "gradients"."""


class ServerSettings(Settings):
    """What the server has of its own, for algorithms that train there.

    Some columns mean something: `id` is a question's public id and travels with it; `domain` is compared with members'
    tasks; `answer` is an auxiliary or held-out question's reference answer. Use `rename` where yours are called
    otherwise. Nothing else of a row leaves the server but the question itself.
    """

    prompts: PromptSettings
    """Questions to train on, and held-out ones."""
    auxiliary: PromptSettings | None = None
    """Labelled examples: on them the members' judges are examined."""
    reference: str = "{answer}"
    """How a reference answer would stand in a completion, such as "<answer> {answer} </answer>"."""
    encoder: Place = "policy"
    """What embeds the questions: "policy" (its hidden states, adapter off), "tokens" (hashed words), or a model folder
    of the sentence-transformers kind."""
    model: ModelSettings = ModelSettings()
    rewards: dict[str, RewardSettings] = Field(default_factory=dict)
    """The server's own, by objective; with `audit` they are measured on held-out prompts only."""

    @field_validator("reference")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if "{answer}" not in value:
            raise ValueError(f"found {value!r:.80}; expected a text with {{answer}} in it")
        return value


class SimulationSettings(Settings):
    """For runs on one machine."""

    clients: Place = "clients"
    """Folder of client files, relative to the run file."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of the mathematics; part of what "the same bytes" depends on. None: torch's choice."""


class RunConfig(Settings):
    """A run file."""

    seed: int = Field(default=0, ge=0)
    """Of adapters, cohorts, prompts and sampling: the same seed gives the same bytes on the same machine."""
    rounds: PositiveInt
    """How often the adapters are averaged."""
    objectives: dict[str, ObjectiveSettings] = Field(min_length=1)
    policy: PolicySettings
    algorithm: Algorithm
    rollout: RolloutSettings = RolloutSettings()
    loss: LossSettings = LossSettings()
    ppo: PPOSettings = PPOSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()
    federation: FederationSettings = FederationSettings()
    server_optimizer: ServerOptimizerSettings = ServerOptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    simulation: SimulationSettings = SimulationSettings()
    server: ServerSettings | None = None
    """For algorithms that train at the server."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_algorithm(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("algorithm"), dict):
            data = {**data, "algorithm": parse_algorithm(data["algorithm"])}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        primaries = [name for name, objective in self.objectives.items() if objective.primary]
        if len(primaries) > 1:
            raise ValueError(f"objectives: {primaries} are all primary; expected one at most")
        if "accuracy" in self.objectives:
            raise ValueError(
                "objectives: 'accuracy' is what the primary objective's mean is called; choose another name"
            )
        if "primary" in self.algorithm.needs and not primaries:
            name = getattr(self.algorithm, "name", "")
            raise ValueError(f"objectives: algorithm {name!r} needs a primary objective; mark one with primary = true")
        for need, missing in (("server", self.server is None), ("reference", self.loss.beta == 0)):
            if need in self.algorithm.needs and missing:
                raise ValueError(_MISSING[need].format(getattr(self.algorithm, "name", "")))
        refuse_contradictions(self)
        for name in self.server.rewards if self.server else ():
            if name not in self.objectives:
                raise ValueError(f"server.rewards.{name}: no such objective; there are {', '.join(self.objectives)}")
        self.algorithm.check(list(self.objectives))
        return self

    def dump(self) -> dict[str, Any]:
        """The resolved configuration; `RunConfig.model_validate` reads it back."""
        return {
            **self.model_dump(mode="json", exclude={"algorithm"}),
            "algorithm": self.algorithm.model_dump(mode="json"),
        }


def parse_algorithm(data: Mapping[str, Any]) -> Algorithm:
    """The algorithm that an `[algorithm]` table describes. Raises ConfigError."""
    name = data.get("name")
    if not isinstance(name, str) or name not in table():
        raise ConfigError(f"algorithm.name: found {name!r:.80}; expected one of {', '.join(table())}")
    try:
        found = algorithm_class(str(name))
    except Exception as error:  # a third party's module may raise anything on import
        raise ConfigError(f"algorithm.name: {name!r} does not load ({type(error).__name__}: {error})") from error
    return validated(found, data, prefix="algorithm")


def load_run(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The run file at `path`, changed by `a.b=value` overrides. Raises ConfigError, one line."""
    data = read_toml(path)
    for override in overrides:
        dotted, found, value = override.partition("=")
        if not found:
            raise ConfigError(f"--set {override}: expected key=value, such as algorithm.beta=0.1")
        *parents, last = dotted.strip().split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {override}: {parent} is not a table")
        place[last] = toml_value(value.strip())
    return validated(RunConfig, data, where=str(path))
