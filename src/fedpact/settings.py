"""The settings of a run that change its mathematics, under TRL's names. They travel in the contract.

One declaration each: the run file, the contract and the policy all use these classes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from fedpact.types import ScaleRewards


class Settings(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class LoraSettings(Settings):
    """The adapter's shape, under PEFT's names."""

    r: PositiveInt = 16
    """Rank."""
    lora_alpha: PositiveFloat = 32.0
    """The adapter's output is scaled by lora_alpha / r."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers to adapt, as in PEFT: a layer matches if its name ends with one of these."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""

    @property
    def scale(self) -> float:
        return float(self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r))


class RolloutSettings(Settings):
    """How completions are sampled."""

    num_generations: int = Field(default=8, ge=2)
    """Completions for each prompt: the group."""
    max_completion_length: PositiveInt = 256
    """Tokens."""
    max_prompt_length: PositiveInt | None = None
    """Tokens; a longer prompt loses its beginning. None: no limit."""
    temperature: PositiveFloat = 1.0
    """Log-probs in sampler and trainer are those of the tempered distribution."""


class LossSettings(Settings):
    """The policy-gradient loss."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "dapo"
    """How token losses are added up, as in TRL; the whole batch counts as one, so that bnpo equals dapo."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """"sequence" with loss_type "grpo" is GSPO."""
    epsilon: NonNegativeFloat = 0.2
    """Lower clip of the ratio: 1 - epsilon."""
    epsilon_high: NonNegativeFloat | None = None
    """Upper clip: 1 + epsilon_high; None: as epsilon. For cispo the bound itself."""
    beta: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the frozen model (k3 estimator)."""
    scale_rewards: ScaleRewards = "group"
    """What advantages are divided by."""


class OptimizerSettings(Settings):
    """The members' optimiser. Its moments are fresh in every round."""

    name: Literal["adamw", "sgd"] = "adamw"
    """torch's."""
    learning_rate: PositiveFloat = 1e-5
    """Constant."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled for adamw."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: PositiveFloat = 1.0
    """A longer direction is shortened to this norm before the step."""


class TrainingSettings(Settings):
    """The local batch."""

    prompts_per_step: PositiveInt = 8
    """Prompts in a local step; each gets `num_generations` completions."""
    num_iterations: PositiveInt = 1
    """Steps taken on each batch; from the second on the loss is off-policy and clips."""
