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
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.models import (
    GROUP_SIZE,
    LENGTH,
    NUM_PROMPTS,
    SIZES,
    Bench,
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
from fedpact.core.losses import GroupLoss
from fedpact.core.pareto import regularised_min_norm
from fedpact.policy.lora_policy import LoraPolicy

MANY = 8
"""Objectives in the comparison at equal information."""


def characters(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def distinct_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def ones(completions: list[str], **_: Any) -> list[float]:
    return [float(text.count("1")) for text in completions]


REWARDS: list[Callable[..., list[float]]] = [characters, distinct_words, ones]


def measure(size: str, *, rounds: int) -> dict[str, Ratio]:
    """Ratios by name. CPU only."""
    policy = make_policy(random_model(SIZES[size]))
    with TemporaryDirectory() as folder:
        trainer = make_trainer(size, folder, steps=rounds + 1)
        turns = _Turns(policy, trainer)
        trainer.add_callback(turns)
        trainer.train()
    ratios = {"TRL step / our step, M=3": turns.timings.ratio("trl", "ours M=3")}
    backward = turns.timings.laps["backward"]
    turns.timings.laps["trl M=8"] = [
        lap._replace(whole=lap.whole + (MANY - 1) * other.marked)
        for lap, other in zip(turns.timings.laps["trl"], backward, strict=True)
    ]
    name = f"(TRL step + {MANY - 1} PEFT backwards) / our step, M={MANY}"
    return ratios | {name: turns.timings.ratio("trl M=8", f"ours M={MANY}")}


def make_trainer(size: str, folder: str, *, steps: int) -> GRPOTrainer:
    """TRL as fast as its settings make it here: one batch of 64, no checkpointing, no logging."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return GRPOTrainer(
        model=random_model(SIZES[size]),
        reward_funcs=REWARDS,
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


def our_step(policy: LoraPolicy, *, num_objectives: int) -> None:
    """Sample, judge, the gradients of all objectives, minimum-norm weights, AdamW."""
    rollout = policy.generate(prompts(), draw=0)
    assert rollout.mask.all(), "a completion ended early: the token budgets differ"
    chosen = [REWARDS[m % len(REWARDS)] for m in range(num_objectives)]
    rewards = torch.tensor([reward(list(rollout.completions)) for reward in chosen])
    rewards += 1e-3 * torch.arange(num_objectives)[:, None] * rollout.completion_ids[:, 0]  # all rows differ
    jacobian = policy.gradients(rollout, group_advantages(rewards, rollout.group_size))
    uniform = torch.full((num_objectives,), 1 / num_objectives)
    weights = regularised_min_norm(jacobian.gramian, uniform, 0.01, jacobian.present)
    policy.step(jacobian.combine(weights))


class _Turns(TrainerCallback):  # type: ignore[misc]
    """Times TRL's step from end to end, and between two of them ours. The first round does not count."""

    def __init__(self, policy: LoraPolicy, trainer: GRPOTrainer) -> None:
        self.policy, self.trainer = policy, trainer
        self.timings = Timings()
        self.warm = False
        self.clock = Clock("cpu")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock = Clock("cpu")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        laps = {"trl": self.clock.lap()}
        for num_objectives in (len(REWARDS), MANY):
            clock = Clock("cpu")
            our_step(self.policy, num_objectives=num_objectives)
            laps[f"ours M={num_objectives}"] = clock.lap()
        clock = Clock("cpu")
        self._backward(clock)
        laps["backward"] = clock.lap()
        if self.warm:
            for name, lap in laps.items():
                self.timings.laps.setdefault(name, []).append(lap)
        self.warm = True
        self.clock = Clock("cpu")
