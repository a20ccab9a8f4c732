"""Policies and rollouts for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedpact.core.lora import adapter_shapes
from fedpact.policy.lora_policy import EngineOptions, LoraPolicy
from fedpact.policy.model import Dtype, load_model, lora_layers
from fedpact.settings import LoraSettings, LossSettings, OptimizerSettings, RolloutSettings
from fedpact.types import Adapter, Prompts
from tests.conftest import tokenizer

LORA = LoraSettings(r=4, lora_alpha=8)
PROMPTS = Prompts(
    text=["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12"],
    ids=torch.arange(4),
    columns={"answer": ["a", "b", "c", "d"]},
)


def make_policy(
    folder: Path,
    *,
    dtype: Dtype = "float32",
    loss: LossSettings | None = None,
    optimizer: OptimizerSettings | None = None,
    options: EngineOptions | None = None,
    num_generations: int = 3,
    length: int = 9,
    temperature: float = 1.0,
) -> LoraPolicy:
    base = replace(load_model(folder, where="test", dtype=dtype), tokenizer=tokenizer())  # whatever Auto picks by kind
    policy = LoraPolicy(
        base,
        lora_layers(base.model, LORA),
        rollout=RolloutSettings(num_generations=num_generations, max_completion_length=length, temperature=temperature),
        loss=loss or LossSettings(loss_type="grpo"),
        optimizer=optimizer or OptimizerSettings(learning_rate=1e-2),
        options=options,
    )
    policy.begin(0, "test")
    return policy


def random_adapter(policy: LoraPolicy, *, seed: int = 0, size: float = 0.2) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * size
        for name, shape in adapter_shapes(policy.bank.layers).items()
    }


def random_advantages(m: int, n: int, *, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
