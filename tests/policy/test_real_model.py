"""A model that somebody trained: the 260 thousand parameters of stories260K, if they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedpact.policy.llama import LlamaDecoder
from fedpact.policy.lora_policy import LoraPolicy
from fedpact.policy.model import load_model, lora_layers
from fedpact.settings import LoraSettings, LossSettings, OptimizerSettings, RolloutSettings
from fedpact.types import Prompts
from tests.policy.helpers import random_adapter, random_advantages

PLACES = [os.environ.get("FEDPACT_STORIES", ""), str(Path(__file__).parents[3] / "shared/models/stories260K")]
FOLDER = next((Path(place) for place in PLACES if place and Path(place, "config.json").exists()), None)
pytestmark = pytest.mark.skipif(FOLDER is None, reason="stories260K is not here; set FEDPACT_STORIES to its folder")
OPENINGS = ["Once upon a time", "Lily and her dog", "The big red ball"]


@pytest.fixture(scope="module")
def policy() -> LoraPolicy:
    assert FOLDER is not None
    base = load_model(FOLDER, where="test")
    found = LoraPolicy(
        base,
        lora_layers(base.model, LoraSettings(r=8, lora_alpha=16)),
        rollout=RolloutSettings(num_generations=4, max_completion_length=24),
        loss=LossSettings(loss_type="grpo"),
        optimizer=OptimizerSettings(learning_rate=1e-3),
    )
    found.begin(0, "stories")
    return found


PROMPTS = Prompts(text=OPENINGS, ids=torch.arange(3), columns={})


def test_it_is_decoded_by_the_fused_stack_and_agrees_with_itself(policy: LoraPolicy) -> None:
    assert isinstance(policy.decoder, LlamaDecoder)
    policy.load(random_adapter(policy, size=0.02))
    rollout = policy.generate(PROMPTS, draw=0)
    policy.gradients(rollout, random_advantages(2, 12))
    assert policy.sampler_gap < 1e-4


def test_it_still_writes_words(policy: LoraPolicy) -> None:
    policy.load(random_adapter(policy, size=0.0))
    texts = policy.generate(PROMPTS, draw=0, greedy=True).completions
    assert all(any(word in text for word in (" the ", " a ", " was ", " and ")) for text in texts), texts


def test_its_logits_under_peft_are_ours(policy: LoraPolicy) -> None:
    adapter = random_adapter(policy, seed=3, size=0.05)
    policy.load(adapter)
    rollout = policy.generate(PROMPTS, draw=1)
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(model, config).eval()
    state = {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter.items()}
    missing = peft.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    for row, ids, mask in zip(rollout.prompt_ids, rollout.completion_ids, rollout.mask, strict=True):
        if not rollout.prompt_mask[0].all():
            continue
        tokens = torch.cat([row, ids[mask]])[None]
        with torch.no_grad():
            theirs, ours = peft(tokens).logits, policy.base.model(tokens).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_few_steps_make_it_say_a_word_more_often(policy: LoraPolicy) -> None:
    policy.load(
        random_adapter(policy, size=0.0)
        | {
            name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.1
            for name, tensor in policy.adapter().items()
            if "lora_A" in name
        }
    )
    from fedpact.core.advantages import group_advantages

    def share(step: int) -> tuple[float, torch.Tensor]:
        rollout = policy.generate(PROMPTS.repeat(8), draw=step)
        rewards = torch.tensor([[float(" she " in text.lower()) for text in rollout.completions]])
        if step < 100:
            policy.step(policy.gradients(rollout, group_advantages(rewards, 4))[0])
        return float(rewards.mean()), rewards

    first = sum(share(step)[0] for step in range(4)) / 4
    for step in range(4, 24):
        share(step)
    last = sum(share(step)[0] for step in range(100, 104)) / 4
    assert last > first + 0.15, (first, last)
