"""The run file and the client files: what they may say, and one line for what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from fedpact.algorithms import algorithm_class, table
from fedpact.algorithms.base import Algorithm
from fedpact.errors import ConfigError
from fedpact.runtime.toml import read_toml, toml_value, validated
from fedpact.settings import (
    LoraSettings,
    LossSettings,
    OptimizerSettings,
    RolloutSettings,
    Settings,
    TrainingSettings,
)

Name = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class ObjectiveSettings(Settings):
    """One objective of the run; the rewards that measure it are each member's own."""

    primary: bool = False
    """The objective that is called accuracy."""
    weight: NonNegativeFloat | None = None
    """For algorithms with fixed weights. None: an equal share of what the named weights leave of 1."""


class PolicySettings(Settings):
    """The model that is aligned."""

    model: str
    """A model folder (relative to the run file) or a Hugging Face id."""
    adapter: str | None = None
    """A PEFT adapter folder to start from. None: a fresh one, drawn from the seed."""
    lora: LoraSettings = LoraSettings()


class FederationSettings(Settings):
    """Who takes part in a round, and when it ends."""

    participation: float = Field(default=1.0, gt=0, le=1)
    """Share of the members in a round, drawn afresh each round."""
    min_replies: PositiveInt = 1
    """An exchange with fewer admitted replies fails."""
    timeout_s: PositiveFloat | None = None
    """An exchange closes after this time; in a simulation, where members take turns, each has it for itself. None: it
    waits for all."""
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


class SimulationSettings(Settings):
    """For runs on one machine."""

    clients: str = "clients"
    """Folder of client files, relative to the run file."""
    num_threads: PositiveInt | None = None
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
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()
    federation: FederationSettings = FederationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    simulation: SimulationSettings = SimulationSettings()

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
        self.algorithm.check(list(self.objectives))
        return self

    def dump(self) -> dict[str, Any]:
        """The resolved configuration; `RunConfig.model_validate` reads it back."""
        return {
            **self.model_dump(mode="json", exclude={"algorithm"}),
            "algorithm": self.algorithm.model_dump(mode="json"),
        }


class ModelSettings(Settings):
    """How a member runs the model: never what it computes."""

    path: str | None = None
    """The member's own copy of the contract's model. None: the run file's (in a simulation only)."""
    device: str = "auto"
    """"auto" takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the frozen base; the adapter is float32."""
    micro_batch_tokens: PositiveInt = 4096
    """Tokens in one forward and backward pass, and a sixteenth of those in one batch of sampling: bounds the memory."""
    gradient_checkpointing: bool = False
    """Recompute activations: less memory, about a third more time."""
    fused_decoder: bool = True
    """Sample with the fused decoder where the model has the Llama layout; otherwise with transformers."""


class PromptSettings(Settings):
    """A member's prompts."""

    path: str
    """JSONL, JSON, CSV or Parquet relative to the client file, a `datasets` id, or gym:NAME."""
    heldout: str | None = None
    """Prompts that are never trained on. None: `heldout_share` of `path`."""
    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    """By a hash of the prompt, so that equal prompts lie on one side."""
    prompt: str = "prompt"
    """The column that holds a text or a chat."""
    template: str | None = None
    """Builds the prompt from columns instead, as in "Question: {question}"."""
    system: str | None = None
    """A system message to put first."""
    as_chat: bool = False
    """Make a plain text the user's message of a chat."""
    rename: dict[str, str] = Field(default_factory=dict)
    """New name of a column to the one in the file, as in { answer = "solution" }."""
    split: str | None = None
    """Of a `datasets` id."""
    limit: PositiveInt | None = None
    """Read this many prompts at the most."""


class RewardSettings(Settings):
    """One of a member's reward functions."""

    use: str
    """`package.module:function`, or `file.py:function` beside the client file."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Its settings."""
    timeout_s: PositiveFloat = 60.0
    """A call that takes longer fails."""
    audit: bool = False
    """Measure it when evaluating, never train on it."""


class SiteSettings(Settings):
    """The gate: what this member lets in and out. A ceiling refuses; it never changes a request."""

    accept: str | None = None
    """The contract's hash. None: any contract (in a simulation only)."""
    verbs: tuple[str, ...] = ("hello", "train", "evaluate")
    """Which requests are answered."""
    share: tuple[Literal["rewards", "accuracy", "metrics"], ...] | None = None
    """What may leave beside the adapter. None: rewards and accuracy; everything in a simulation."""
    min_samples: PositiveInt = 1
    """Refuse to report held-out means that rest on fewer completions."""
    clip_norm: PositiveFloat | None = None
    """Shorten a larger change of the adapter to this norm."""
    max_weight: PositiveFloat | None = None
    """Cap of what this member counts in an average."""
    max_local_steps: PositiveInt | None = None
    """Ceiling, like the following ones: local_steps times num_iterations."""
    max_completion_length: PositiveInt | None = None
    max_learning_rate: PositiveFloat | None = None
    max_rounds: PositiveInt | None = None


class ClientConfig(Settings):
    """A client file: a member's own, it never leaves."""

    name: str = Field(pattern=Name, max_length=64)
    """Letters, digits, ".", "_" and "-"."""
    task: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*)?$", max_length=64)
    """Members of one task have comparable accuracies."""
    model: ModelSettings = ModelSettings()
    prompts: PromptSettings
    rewards: dict[str, RewardSettings] = Field(min_length=1)
    site: SiteSettings = SiteSettings()

    @model_validator(mode="after")
    def _own_name(self) -> ClientConfig:
        if self.name in ("all", "server"):
            raise ValueError(f"name: {self.name!r} stands for others in the metrics; choose another")
        return self


def parse_algorithm(data: Mapping[str, Any]) -> Algorithm:
    """The algorithm that an `[algorithm]` table describes. Raises ConfigError."""
    name = data.get("name")
    if name not in table():
        raise ConfigError(f"algorithm.name: found {name!r}; expected one of {', '.join(table())}")
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


def load_client(path: Path) -> ClientConfig:
    """The client file at `path`. Raises ConfigError, one line."""
    return validated(ClientConfig, read_toml(path), where=str(path))


def client_files(folder: Path) -> list[Path]:
    """The client files of a simulation, by name. Raises ConfigError if there are none."""
    files = sorted(folder.glob("*.toml")) if folder.is_dir() else []
    if not files:
        raise ConfigError(f"{folder}: no client files; expected one NAME.toml for each member")
    return files
