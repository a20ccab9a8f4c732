"""The one-backward gradients against M separate backward passes through PEFT-free autograd."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from torch import Tensor

from fedpact.core.losses import GroupLoss
from fedpact.policy.lora_policy import EngineOptions, LoraPolicy
from fedpact.settings import LossSettings
from fedpact.types import Rollout
from tests.policy.helpers import PROMPTS, make_policy, random_adapter, random_advantages


def separate_backwards(policy: LoraPolicy, rollout: Rollout, advantages: Tensor) -> Tensor:
    """Row m: autograd of objective m's own loss value with respect to A and B, one backward each."""
    leaves = {name: tensor.to(policy.bank.theta).requires_grad_() for name, tensor in policy.adapter().items()}
    for layer in policy.bank.layers:
        module = policy.bank.modules[layer.name]
        module.a, module.b = leaves[layer.a_name][None], leaves[layer.b_name][None]
    n = len(rollout.mask)
    with torch.enable_grad():
        logprobs = policy._forward(rollout, torch.arange(n))
    reference = policy.logprobs(rollout, reference=True) if policy.loss.needs_reference else None
    assert isinstance(policy.loss, GroupLoss)
    values = policy.loss.values(rollout, logprobs, reference, advantages)
    rows = [torch.autograd.grad(value, list(leaves.values()), retain_graph=True) for value in values]
    return torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])


def off_policy(policy: LoraPolicy, rollout: Rollout) -> None:
    """Move the adapter, so that ratios leave the clip range."""
    policy.bank.load(random_adapter(policy, seed=1, size=0.25))
    policy._fresh = None


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorm rounds to float32; the float64 comparison needs it exact."""

    def forward(self: llama.LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", forward)


@pytest.mark.parametrize("num_objectives", range(1, 9))
@pytest.mark.parametrize("clipped", [False, True], ids=["on-policy", "clipped"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_backward_equals_m_backwards_in_float64(
    model_folders: dict[str, Path], exact_norm: None, num_objectives: int, clipped: bool, checkpointing: bool
) -> None:
    options = EngineOptions(gradient_checkpointing=checkpointing)
    policy = make_policy(model_folders["llama"], dtype="float64", options=options)
    policy.load(random_adapter(policy))
    rollout = policy.generate(PROMPTS, draw=0)
    if clipped:
        off_policy(policy, rollout)
    advantages = random_advantages(num_objectives, len(rollout.mask)).double()
    jacobian = policy.gradients(rollout, advantages)
    expected = separate_backwards(policy, rollout, advantages)
    if not clipped:  # the ratio is 1 by definition there; the reference sees float32 log-probs of the sampler
        expected = separate_backwards(policy, _with_own_logprobs(policy, rollout), advantages)
    assert relative_error(jacobian.rows, expected) <= 1e-12
    assert relative_error(jacobian.gramian, expected @ expected.T) <= 1e-12


def _with_own_logprobs(policy: LoraPolicy, rollout: Rollout) -> Rollout:
    from dataclasses import replace

    return replace(rollout, logprobs=policy.logprobs(rollout))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch_tokens", [16384, 40])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_one_backward_equals_m_backwards_in_float32(
    model_folders: dict[str, Path], kind: str, checkpointing: bool, micro_batch_tokens: int
) -> None:
    options = EngineOptions(micro_batch_tokens=micro_batch_tokens, gradient_checkpointing=checkpointing)
    policy = make_policy(model_folders[kind], options=options, loss=LossSettings(loss_type="dapo", beta=0.04))
    policy.load(random_adapter(policy))
    rollout = policy.generate(PROMPTS, draw=0)
    off_policy(policy, rollout)
    advantages = random_advantages(3, len(rollout.mask))
    jacobian = policy.gradients(rollout, advantages)
    assert relative_error(jacobian.rows, separate_backwards(policy, rollout, advantages)) <= 1e-5


@pytest.mark.parametrize("num_objectives", range(1, 9))
def test_any_number_of_objectives_is_exact_in_float32(model_folders: dict[str, Path], num_objectives: int) -> None:
    policy = make_policy(model_folders["llama"])
    policy.load(random_adapter(policy))
    rollout = policy.generate(PROMPTS, draw=0)
    off_policy(policy, rollout)
    advantages = random_advantages(num_objectives, len(rollout.mask))
    jacobian = policy.gradients(rollout, advantages)
    assert relative_error(jacobian.rows, separate_backwards(policy, rollout, advantages)) <= 1e-5


def test_the_batch_is_ragged_and_padded_on_the_left(model_folders: dict[str, Path]) -> None:
    rollout = make_policy(model_folders["llama"]).generate(PROMPTS, draw=0)
    assert len(set(rollout.lengths.tolist())) > 1
    assert not rollout.prompt_mask[:, 0].all()
    assert rollout.prompt_mask[:, -1].all()


def test_off_policy_batches_really_clip(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    policy.load(random_adapter(policy))
    rollout = policy.generate(PROMPTS, draw=0)
    off_policy(policy, rollout)
    ratio = (policy.logprobs(rollout) - rollout.logprobs).exp()[rollout.mask]
    assert ((ratio > 1.2) | (ratio < 0.8)).float().mean() > 0.05


def test_an_objective_without_signal_has_a_zero_row_and_is_absent(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    policy.load(random_adapter(policy))
    rollout = policy.generate(PROMPTS, draw=0)
    advantages = random_advantages(2, len(rollout.mask))
    advantages[1] = 0
    jacobian = policy.gradients(rollout, advantages)
    assert jacobian.present.tolist() == [True, False]
    assert float(jacobian[1].abs().max()) == 0.0
    assert float(jacobian[0].norm()) > 0


def test_combining_is_linear_and_dots_agree_with_the_gramian(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    policy.load(random_adapter(policy))
    rollout = policy.generate(PROMPTS, draw=0)
    jacobian = policy.gradients(rollout, random_advantages(3, len(rollout.mask)))
    weights = torch.tensor([0.5, 0.25, 0.25])
    combined = jacobian.combine(weights)
    torch.testing.assert_close(combined, 0.5 * jacobian[0] + 0.25 * jacobian[1] + 0.25 * jacobian[2])
    torch.testing.assert_close(jacobian.dots(jacobian[1]), jacobian.gramian[1])
    torch.testing.assert_close(jacobian.scaled(torch.full_like(combined, 2.0)).gramian, 4 * jacobian.gramian)


def test_a_sampler_that_draws_from_another_distribution_is_caught(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    policy.load(random_adapter(policy))
    rollout = policy.generate(PROMPTS, draw=0)
    policy.bank.theta.zero_()  # as if the sampler had used an adapter that the trainer has not
    with pytest.raises(Exception, match="sampler and trainer disagree"):
        policy.gradients(rollout, random_advantages(1, len(rollout.mask)))


def test_sampler_and_trainer_agree_to_rounding(model_folders: dict[str, Path]) -> None:
    for kind in ("llama", "qwen2", "qwen3", "gpt2"):
        policy = make_policy(model_folders[kind], temperature=0.7)
        policy.load(random_adapter(policy))
        rollout = policy.generate(PROMPTS, draw=0)
        policy.gradients(rollout, random_advantages(1, len(rollout.mask)))
        assert 0 < policy.sampler_gap < 1e-4, kind
        assert math.isfinite(policy.sampler_gap)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_bfloat16_base_trains_a_float32_adapter(model_folders: dict[str, Path], kind: str) -> None:
    policy = make_policy(model_folders[kind], dtype="bfloat16")
    policy.load(random_adapter(policy, size=0.05))
    rollout = policy.generate(PROMPTS, draw=0)
    jacobian = policy.gradients(rollout, random_advantages(2, len(rollout.mask)))
    assert jacobian.rows.dtype == torch.float32
    whole = make_policy(model_folders[kind])
    whole.load(random_adapter(policy, size=0.05))
    exact = whole.gradients(rollout, random_advantages(2, len(rollout.mask)))
    cosine = torch.nn.functional.cosine_similarity(jacobian.rows, exact.rows)
    assert bool((cosine > 0.9).all()), cosine
    policy.step(jacobian[0])
    assert policy.adapter().keys() == policy.bank.shapes.keys()
