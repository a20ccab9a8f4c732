"""One whole training step: three rewards, three gradients and AdamW, against TRL's GRPOTrainer, at equal tokens.

TRL's step gives one gradient, of the summed reward. Its bfloat16 and gradient checkpointing are off. Our step runs
between its steps, in the same process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks.models import (
    GROUP_SIZE,
    LENGTH,
    NUM_PROMPTS,
    SIZES,
    completion_logprobs,
    make_policy,
    peft_config,
    prompts,
    random_model,
    tokenizer,
    trainable,
)
from benchmarks.timing import Clock, Ratio, Timings
from fedpact.core.advantages import group_advantages
from fedpact.core.lora import initial_adapter
from fedpact.core.losses import GroupLoss
from fedpact.core.pareto import regularised_min_norm
from fedpact.policy.lora_policy import LoraPolicy
from fedpact.types import Rollout

FEW, MANY = 3, 8
"""Objectives in the comparison with one TRL step, and at equal information: with the backward passes TRL would need."""


def counts(digit: str) -> Callable[..., list[float]]:
    """A reward that costs next to nothing: how often `digit` occurs."""

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(text.count(digit)) for text in completions]

    reward.__name__ = f"digit_{digit}"
    return reward


REWARDS = [counts(str(digit)) for digit in range(MANY)]


def measure(size: str, *, rounds: int) -> dict[str, Ratio]:
    """Ratios by name. CPU only."""
    policy = make_policy(random_model(SIZES[size]))
    policy.load(initial_adapter(policy.bank.layers, seed=0))
    with TemporaryDirectory() as folder:
        trainer = make_trainer(size, folder, steps=rounds)
        turns = _Turns(policy, trainer)
        trainer.add_callback(turns)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    ratios = {f"TRL step / our step, M={FEW}": turns.timings.ratio("trl", f"ours M={FEW}")}
    turns.timings.laps["trl M=8"] = [
        lap._replace(whole=lap.whole + (MANY - 1) * other.marked)
        for lap, other in zip(turns.timings.laps["trl"], turns.timings.laps["backward"], strict=True)
    ]
    name = f"(TRL step + {MANY - 1} PEFT backwards) / our step, M={MANY}"
    return ratios | {name: turns.timings.ratio("trl M=8", f"ours M={MANY}")}


def make_trainer(size: str, folder: str, *, steps: int) -> GRPOTrainer:
    """TRL as fast as its settings make it here: one batch of 64, no checkpointing, no logging."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return GRPOTrainer(
        model=random_model(SIZES[size]),
        reward_funcs=REWARDS[:FEW],
        args=GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=NUM_PROMPTS * GROUP_SIZE,
            num_generations=GROUP_SIZE,
            max_completion_length=LENGTH,
            max_steps=steps,
            logging_steps=steps + 1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts().text] * 8),
        processing_class=tokenizer(SIZES[size].vocabulary),
        peft_config=peft_config(),
    )


def our_step(policy: LoraPolicy, *, num_objectives: int) -> Rollout:
    """Sample, judge, the gradients of all objectives, minimum-norm weights, AdamW."""
    rollout = policy.generate(prompts(), draw=0)
    assert rollout.mask.all(), "a completion ended early: the token budgets differ"
    rewards = torch.tensor([reward(list(rollout.completions)) for reward in REWARDS[:num_objectives]])
    jacobian = policy.gradients(rollout, group_advantages(rewards, rollout.group_size))
    uniform = torch.full((num_objectives,), 1 / num_objectives)
    weights = regularised_min_norm(jacobian.gramian, uniform, 0.01, jacobian.present)
    policy.step(jacobian.combine(weights))
    return rollout


def peft_backward(model: Any, rollout: Rollout, clock: Clock) -> None:
    """One more objective's gradient in the model that TRL trains; the backward pass is the marked part."""
    rows = torch.arange(len(rollout.mask))
    logprobs = completion_logprobs(model, rollout, rows, banned=None)
    clock.mark()
    advantages = torch.ones(1, len(rows))
    loss = GroupLoss("dapo").values(rollout, logprobs, None, advantages)[0]
    torch.autograd.grad(loss, trainable(model))


class _Turns(TrainerCallback):  # type: ignore[misc]
    """Times TRL's step from end to end, and between two of them ours. The first step warms up and does not count."""

    def __init__(self, policy: LoraPolicy, trainer: GRPOTrainer) -> None:
        self.policy, self.trainer = policy, trainer
        self.timings = Timings()
        self.warm = False
        self.clock = Clock("cpu")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        laps = {"trl": self.clock.lap()}
        for num_objectives in (FEW, MANY):
            clock = Clock("cpu")
            rollout = our_step(self.policy, num_objectives=num_objectives)
            laps[f"ours M={num_objectives}"] = clock.lap()
        clock = Clock("cpu")
        peft_backward(self.trainer.model, rollout, clock)
        laps["backward"] = clock.lap()
        if self.warm:
            for name, lap in laps.items():
                self.timings.laps.setdefault(name, []).append(lap)
        self.warm = True
        self.clock = Clock("cpu")
