"""The client files, and what a run file has in common with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fedpact.errors import ConfigError
from fedpact.messages import REQUESTS
from fedpact.runtime.toml import Place, read_toml, validated
from fedpact.settings import Settings

Name = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class ModelSettings(Settings):
    """How a member runs the model: never what it computes."""

    path: Place | None = None
    """The member's own copy of the contract's model. None: the run file's (in a simulation only)."""
    device: str = "auto"
    """"auto" takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the frozen base; the adapter is float32."""
    micro_batch_tokens: int = Field(default=4096, ge=1, le=2**31 - 1)
    """Tokens in one forward and backward pass, and a sixteenth of those in one batch of sampling: bounds the memory."""
    gradient_checkpointing: bool = False
    """Recompute activations: less memory, about a third more time."""
    fused_decoder: bool = True
    """Sample with the fused decoder where the model has the Llama layout; otherwise with transformers."""


class MemberModelSettings(ModelSettings):
    """What a member alone decides: in no run file and no contract."""

    trust_remote_code: bool = False
    """Run the Python files of the model folder, with this member's rights, when the model is loaded. Recorded in its
    ledger. The contract's hash covers these files."""


class PromptSettings(Settings):
    """A member's prompts."""

    path: Place
    """JSONL, JSON, CSV or Parquet relative to the client file, a `datasets` id, or gym:NAME."""
    heldout: Place | None = None
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
    """A column of the file to its new name, as in { solution = "answer" }."""
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
    otherwise: RewardSettings | None = None
    """A second reward, for just those completions to which the first does not apply (None): ground truth first, a judge
    elsewhere."""


class AnswerSettings(PromptSettings):
    """A member's trusted answers, joined to the server's questions: their columns reach the rewards, None elsewhere."""

    id: str | None = None
    """The column with the questions' public ids; questions without one are joined by their normalised text."""


class SiteSettings(Settings):
    """The gate: what this member lets in and out. A ceiling refuses; it never changes a request."""

    accept: str | None = None
    """The contract's hash. None: any contract (in a simulation only)."""
    verbs: tuple[str, ...] = tuple(REQUESTS)
    """Which requests are answered, of those that the accepted algorithm sends."""
    share: tuple[Literal["rewards", "accuracy", "metrics", "gradients"], ...] | None = None
    """What may leave beside the adapter; "gradients" are the compressed ones that fedcmoo and the conflict map ask for.
    None: rewards and accuracy; everything in a simulation."""
    metrics: tuple[str, ...] = ("*",)
    """Names of the figures that "metrics" shares, with * and ?."""
    min_samples: PositiveInt | None = None
    """Report no means that rest on fewer completions. None: 20; 1 in a simulation."""
    public_sampling: bool = False
    """Draw completions from the run's public seed, as a simulation does, so that its bytes can be compared. The server
    could then draw a prompt that it has guessed in the same way. Otherwise draws depend on this member's secret too."""
    clip_norm: PositiveFloat | None = None
    """Shorten a larger change of the adapter to this norm."""
    noise_multiplier: PositiveFloat | None = None
    """Add Gaussian noise of this many times `clip_norm` to every number of the adapter's change. Then nothing else
    leaves by default: what `share` names is not covered by epsilon."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """At which epsilon is counted."""
    epsilon: PositiveFloat | None = None
    """Stop training before what has left exceeds this, over all runs of this folder. None: it is only counted."""
    max_weight: PositiveFloat | None = None
    """Cap of what this member counts in an average."""
    max_local_steps: PositiveInt | None = None
    """Ceiling, like the following ones: local_steps times num_iterations."""
    max_completion_length: PositiveInt | None = None
    max_learning_rate: PositiveFloat | None = None
    max_rounds: PositiveInt | None = None
    max_candidates: PositiveInt = 4096
    """Completions to judge in one request."""
    max_text_length: PositiveInt = 100_000
    """Characters of a question or an answer to judge."""
    epsilon_per_prompt: PositiveFloat | None = None
    """Randomised response on 0/1 rewards: each request spends this on each question, evenly over its candidates; being
    asked about a question again adds up. None: exact rewards leave."""

    @model_validator(mode="after")
    def _noise_needs_a_norm(self) -> SiteSettings:
        if self.noise_multiplier is not None and self.clip_norm is None:
            raise ValueError("site.noise_multiplier: found without site.clip_norm, whose multiple it is; set both")
        if self.epsilon is not None and self.noise_multiplier is None:
            raise ValueError("site.epsilon: found without site.noise_multiplier, whose spending it limits; set both")
        return self


class ServiceSettings(Settings):
    """The site service: where it keeps things, and who may speak to it. A simulation takes no notice."""

    home: Place | None = None
    """Private folder of memory, ledger, secret and accepted contract, relative to the client file. None: the client
    file's name with .site instead of .toml."""
    socket: Place | None = None
    """Unix socket of the service. Its folder is made if need be, for this user and its group alone. None: site.sock in
    a folder named like the client file, with .socket instead of .toml."""
    peers: tuple[str, ...] = ()
    """Names or numbers of users, beside the service's own, who may speak to it: that of `fedpact site connect`, or of
    the SuperNode."""
    num_threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of the mathematics. None: torch's choice."""


class ClientConfig(Settings):
    """A client file: a member's own, it never leaves."""

    name: str = Field(pattern=Name, max_length=64)
    """Letters, digits, ".", "_" and "-"."""
    task: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*)?$", max_length=64)
    """Members of one task have comparable accuracies."""
    model: MemberModelSettings = MemberModelSettings()
    rank: PositiveInt | None = None
    """Train the adapter at this rank, smaller than the run's; the run needs `federation.averaging = "products"`."""
    prompts: PromptSettings | None = None
    """What it trains on; a member that only judges has none."""
    answers: AnswerSettings | None = None
    """What it knows of the server's questions."""
    rewards: dict[str, RewardSettings] = Field(min_length=1)
    site: SiteSettings = SiteSettings()
    service: ServiceSettings = ServiceSettings()

    @model_validator(mode="after")
    def _own_name(self) -> ClientConfig:
        if self.name in ("all", "server"):
            raise ValueError(f"name: {self.name!r} stands for others in the metrics; choose another")
        return self


def load_client(path: Path) -> ClientConfig:
    """The client file at `path`. Raises ConfigError, one line."""
    return validated(ClientConfig, read_toml(path), where=str(path))


def client_files(folder: Path) -> list[Path]:
    """The client files of a simulation, by name. Raises ConfigError if there are none."""
    files = sorted(folder.glob("*.toml")) if folder.is_dir() else []
    if not files:
        raise ConfigError(f"{folder}: no client files; expected one NAME.toml for each member")
    return files
