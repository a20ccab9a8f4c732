"""The losses: small numbers by hand, and every pass against autograd through the loss itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedpact.core.losses import GroupLoss
from fedpact.protocols import Loss
from fedpact.types import Pass, Prompts, Rollout

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]


def make_rollout(logprobs: Tensor, mask: Tensor) -> Rollout:
    n = len(logprobs)
    return Rollout(
        prompts=Prompts(text=["?"] * n, ids=torch.zeros(n, dtype=torch.long), columns={}),
        completions=["!"] * n,
        prompt_ids=torch.ones(n, 1, dtype=torch.long),
        prompt_mask=torch.ones(n, 1, dtype=torch.bool),
        completion_ids=torch.ones(logprobs.shape, dtype=torch.long),
        mask=mask,
        logprobs=logprobs,
        truncated=torch.zeros(n, dtype=torch.bool),
        group_size=1,
    )


def summed(passes: list[Pass]) -> Tensor:
    """The gradient that the passes stand for: [m, n, t]."""
    return torch.stack([p.coefficients.unsqueeze(-1) * p.tokens for p in passes]).sum(0)


def by_autograd(loss: GroupLoss, rollout: Rollout, logprobs: Tensor, reference: Tensor | None, advantages: Tensor):
    leaf = logprobs.clone().requires_grad_()
    values = loss.values(rollout, leaf, reference, advantages)
    return torch.stack([torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values])


def off_policy(seed: int, m: int, n: int, t: int, noise: float) -> tuple[Rollout, Tensor, Tensor, Tensor]:
    """Completions of ragged length (one of them empty), log-probs away from the old ones, advantages of all signs."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (n,), generator=draw)
    lengths[0] = 0 if n > 2 else lengths[0]
    mask = torch.arange(t) < lengths.unsqueeze(-1)
    old = -torch.rand(n, t, generator=draw, dtype=torch.float64) * 3
    logprobs = old + noise * torch.randn(n, t, generator=draw, dtype=torch.float64)
    reference = old + noise * torch.randn(n, t, generator=draw, dtype=torch.float64)
    advantages = torch.randn(m, n, generator=draw, dtype=torch.float64)
    advantages[torch.rand(m, n, generator=draw) < 0.2] = 0.0
    return make_rollout(old.masked_fill(~mask, 0.0), mask), logprobs.masked_fill(~mask, 0.0), reference, advantages


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 5),
    n=st.integers(1, 6),
    t=st.integers(1, 7),
    noise=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    loss_type=st.sampled_from(LOSS_TYPES),
    level=st.sampled_from(["token", "sequence"]),
    beta=st.sampled_from([0.0, 0.04, 1.0]),
    epsilon_high=st.sampled_from([None, 0.28, 1.5]),
)
def test_the_passes_add_up_to_the_losss_own_gradient(seed, m, n, t, noise, loss_type, level, beta, epsilon_high):
    loss = GroupLoss(loss_type, 0.2, epsilon_high, beta, level, max_completion_length=9)
    case = off_policy(seed, m, n, t, noise)
    expected = by_autograd(loss, *case)
    found = summed(loss.passes(*case))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-12 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(("loss_type", "level"), list(itertools.product(LOSS_TYPES, ["token", "sequence"])))
def test_on_policy_one_pass_serves_all_objectives(loss_type, level):
    rollout, _, _, advantages = off_policy(0, 5, 6, 7, 0.0)
    passes = GroupLoss(loss_type, importance_sampling_level=level, epsilon_high=1.5).passes(
        rollout, rollout.logprobs, None, advantages
    )
    assert len(passes) == 1
    assert_close(passes[0].coefficients, -advantages)


@pytest.mark.parametrize(("loss_type", "level"), [("cispo", "token"), ("cispo", "sequence"), ("grpo", "sequence")])
def test_cispo_and_sequence_ratios_need_one_pass_even_when_clipped(loss_type, level):
    case = off_policy(1, 3, 6, 7, 1.0)
    loss = GroupLoss(loss_type, importance_sampling_level=level)
    assert len(loss.passes(case[0], case[1], None, case[3])) == 1


def test_the_second_pass_touches_only_completions_with_a_clipped_token():
    old = torch.full((3, 2), -1.0, dtype=torch.float64)
    new = old.clone()
    new[1, 0] += math.log(2.0)
    rollout = make_rollout(old, torch.ones(3, 2, dtype=torch.bool))
    passes = GroupLoss("grpo").passes(rollout, new, None, torch.tensor([[1.0, -1.0, -1.0]], dtype=torch.float64))
    assert len(passes) == 2
    # Completion 1 became twice as likely at token 0 though it is worse than its group: pushed down at ratio 2.
    assert_close(passes[1].tokens, torch.tensor([[0.0, 0.0], [2 / 6, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert passes[1].coefficients.tolist() == [[0.0, 1.0, 1.0]]


def test_no_second_pass_if_only_winners_are_clipped():
    old = torch.full((2, 2), -1.0)
    rollout = make_rollout(old, torch.ones(2, 2, dtype=torch.bool))
    new = old + torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert len(GroupLoss("grpo").passes(rollout, new, None, torch.tensor([[1.0, -1.0]]))) == 1


def test_zero_advantages_still_give_one_pass():
    case = off_policy(2, 2, 4, 3, 0.5)
    passes = GroupLoss("dapo").passes(case[0], case[1], None, torch.zeros(2, 4))
    assert len(passes) == 1
    assert (summed(passes) == 0).all()


def test_the_kl_pass_comes_last_and_counts_the_same_for_every_objective():
    case = off_policy(3, 2, 4, 3, 0.0)
    passes = GroupLoss("grpo", beta=0.04).passes(case[0], case[1], case[1] - 0.5, case[3])
    assert len(passes) == 2
    assert_close(passes[1].coefficients, torch.full((2, 4), 0.04, dtype=torch.float64))
    # On-policy the derivative of ratio x k3 is log p - log p_ref = 1/2, shared out over each completion.
    shares = case[0].mask / case[0].mask.sum(-1, keepdim=True).clamp(min=1) / 4
    assert_close(passes[1].tokens, 0.5 * shares.double())


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # On-policy every token of a completion costs -A. Lengths 1 and 3, advantages 1 and -2.
        ("grpo", (-1 + 2) / 2),
        ("bnpo", (-1 * 1 + 2 * 3) / 4),
        ("dapo", (-1 * 1 + 2 * 3) / 4),
        ("dr_grpo", (-1 * 1 + 2 * 3) / (2 * 10)),
        # CISPO: -min(1, 0.2) A log p, with log p = -1 everywhere.
        ("cispo", 0.2 * (1 * 1 - 2 * 3) / 4),
    ],
)
def test_each_loss_type_averages_tokens_in_its_own_way(loss_type, expected):
    mask = torch.tensor([[True, False, False], [True, True, True]])
    logprobs = torch.full((2, 3), -1.0, dtype=torch.float64).masked_fill(~mask, 0.0)
    loss = GroupLoss(loss_type, max_completion_length=10)
    advantages = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    value = loss.values(make_rollout(logprobs, mask), logprobs, None, advantages)
    assert_close(value, torch.tensor([expected], dtype=torch.float64))


def test_sequence_level_uses_the_mean_log_ratio():
    mask = torch.ones(1, 2, dtype=torch.bool)
    old = torch.full((1, 2), -1.0, dtype=torch.float64)
    new = old + torch.tensor([[math.log(4.0), 0.0]], dtype=torch.float64)  # geometric mean ratio 2
    advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    loss = GroupLoss("grpo", importance_sampling_level="sequence")
    value = loss.values(make_rollout(old, mask), new, None, advantages)
    assert_close(value, torch.tensor([-1.2, 2.0], dtype=torch.float64))
    # The winner is past its clip and stands still; the loser is pushed down by 2 / 2 a token.
    gradient = summed(loss.passes(make_rollout(old, mask), new, None, advantages))
    assert_close(gradient, torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]], dtype=torch.float64))


def test_what_lies_outside_the_mask_does_not_matter():
    case = off_policy(4, 2, 5, 6, 0.4)
    rollout, logprobs, reference, advantages = case
    noise = torch.where(rollout.mask, 0.0, 50.0)
    for loss_type, level in itertools.product(LOSS_TYPES, ["token", "sequence"]):
        loss = GroupLoss(loss_type, beta=0.1, importance_sampling_level=level)
        assert_close(
            loss.values(rollout, logprobs + noise, reference - noise, advantages), loss.values(*case), rtol=0, atol=0
        )
        found = summed(loss.passes(rollout, logprobs + noise, reference - noise, advantages))
        assert_close(found, summed(loss.passes(*case)), rtol=0, atol=0)


def test_passes_hold_no_graph():
    case = off_policy(5, 2, 4, 3, 0.5)
    for p in GroupLoss("grpo", beta=0.1).passes(case[0], case[1].requires_grad_(), *case[2:]):
        assert not p.tokens.requires_grad and not p.coefficients.requires_grad


def test_a_batch_without_any_token_costs_nothing():
    rollout = make_rollout(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    for loss_type, level in itertools.product(LOSS_TYPES, ["token", "sequence"]):
        loss = GroupLoss(loss_type, importance_sampling_level=level, beta=0.1)
        args = (rollout, torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(1, 2))
        assert loss.values(*args).tolist() == [0.0]
        assert (summed(loss.passes(*args)) == 0).all()


def test_the_reference_is_wanted_only_with_a_kl_term():
    plain: Loss = GroupLoss("grpo")
    anchored: Loss = GroupLoss("grpo", beta=0.04)
    assert not plain.needs_reference
    assert anchored.needs_reference
    case = off_policy(6, 1, 2, 2, 0.1)
    with pytest.raises(ValueError, match="needs the reference model's log-probs"):
        anchored.passes(case[0], case[1], None, case[3])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'ppo'; expected one of grpo, bnpo, dr_grpo, dapo, cispo"):
        GroupLoss("ppo")
    with pytest.raises(ValueError, match="'word'; expected 'token' or 'sequence'"):
        GroupLoss("grpo", importance_sampling_level="word")
