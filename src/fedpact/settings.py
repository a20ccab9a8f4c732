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

    r: int = Field(default=16, ge=1, le=65_536)
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


class PrivateSettings(Settings):
    """An adapter of each member's own beside the shared one, on the same layers. It never leaves the member."""

    r: int = Field(default=4, ge=1, le=65_536)
    """Rank."""
    lora_alpha: PositiveFloat = 8.0
    """The private adapter's output is scaled by lora_alpha / r."""

    @property
    def scale(self) -> float:
        return float(self.lora_alpha / self.r)


class RolloutSettings(Settings):
    """How completions are sampled."""

    num_generations: int = Field(default=8, ge=1, le=65_536)
    """Completions for each prompt: the group. GRPO needs two at least."""
    max_completion_length: int = Field(default=256, ge=1, le=1_048_576)
    """Tokens."""
    max_prompt_length: PositiveInt | None = None
    """Tokens; a longer prompt loses its beginning. None: no limit."""
    temperature: PositiveFloat = 1.0
    """Log-probs in sampler and trainer are those of the tempered distribution."""


class LossSettings(Settings):
    """The policy-gradient loss."""

    surrogate: Literal["grpo", "ppo"] = "grpo"
    """"ppo" learns a value head for every objective; see `[ppo]`. Its advantages differ from token to token, so that
    the gradients of M objectives cost M backward passes instead of one. `loss_type`, `beta`, `scale_rewards` and
    `importance_sampling_level` are GRPO's alone."""
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


class PPOSettings(Settings):
    """PPO with a critic, where `loss.surrogate` is "ppo". The clip is `loss.epsilon`, the epochs `num_iterations`.

    The names are those of TRL's PPO. The critic stays at the member.
    """

    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of a later token's reward."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Of generalised advantage estimation: 0 trusts the critic, 1 the rewards."""
    kl_coef: NonNegativeFloat = 0.05
    """What a nat of KL to the reference model costs, in standard deviations of the reward; its start if adaptive."""
    target_kl: PositiveFloat | None = None
    """Nats a completion; the coefficient adapts to reach it. None: it stays as it is."""
    kl_horizon: PositiveFloat = 10000.0
    """Completions over which the adaptive coefficient moves."""
    whiten_rewards: bool = True
    """Standardise each reward by its running mean and standard deviation at this member."""
    cliprange_value: PositiveFloat = 0.2
    """How far a fit may move a value before its loss stops counting the gain."""
    value_learning_rate: PositiveFloat = 1e-2
    """Of the value heads' Adam."""
    value_steps: int = Field(default=8, ge=1, le=64)
    """Steps that the value heads take on each batch."""


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
    proximal_mu: NonNegativeFloat = 0.0
    """FedProx: weight of half the squared distance to the adapter that the round began with."""


class TrainingSettings(Settings):
    """The local batch."""

    prompts_per_step: PositiveInt = 8
    """Prompts in a local step; each gets `num_generations` completions."""
    num_iterations: PositiveInt = 1
    """Steps taken on each batch; from the second on the loss is off-policy and clips. PPO's epochs."""
    trainable: Literal["all", "B", "alternating"] = "all"
    """Which factors of the shared adapter are trained and sent back. "B" is FFA-LoRA: A stays as it was drawn, and the
    mean of the adapters is exact. "alternating" is RoLoRA: B in odd rounds, A in even ones."""

    def factor(self, round: int) -> Literal["all", "A", "B"]:
        """What is trained in that round."""
        if self.trainable == "alternating":
            return "A" if round and round % 2 == 0 else "B"  # before round 1 only B has a gradient
        return self.trainable


class ServerOptimizerSettings(Settings):
    """What the server does with the mean of the adapters, seen as a step from the last one."""

    name: Literal["none", "momentum", "adam", "yogi"] = "none"
    """"none" takes the mean itself."""
    learning_rate: PositiveFloat | None = None
    """None: 1 for momentum, 1e-2 for adam and yogi."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment."""
    tau: PositiveFloat = 1e-3
    """Added to the root of the second moment, which starts at its square."""

    @property
    def rate(self) -> float:
        """The learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.name == "momentum" else 1e-2
