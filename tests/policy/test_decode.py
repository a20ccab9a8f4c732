"""Sampling: the right distribution, the right rows, the right end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpact.policy.llama import LlamaDecoder, supports
from fedpact.policy.lora_policy import EngineOptions
from fedpact.policy.sampling import inverse_cdf_sample, token_logprobs
from fedpact.seeding import uniforms
from fedpact.types import Prompts
from tests.policy.helpers import PROMPTS, make_policy, random_adapter


def test_inverse_cdf_picks_the_first_token_whose_sum_exceeds_u() -> None:
    logprobs = torch.tensor([0.5, 0.25, 0.25]).log().expand(4, 3)
    assert inverse_cdf_sample(logprobs, torch.tensor([0.0, 0.49, 0.5, 0.99])).tolist() == [0, 0, 1, 2]


@given(st.integers(2, 200), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_no_draw_leaves_the_vocabulary_or_takes_an_impossible_token(size: int, seed: int) -> None:
    logits = torch.randn(64, size, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, -1] = -torch.inf
    logits[:, 0] = -torch.inf if size > 2 else 0.0
    logprobs = logits.log_softmax(-1)
    for u in (0.0, 1 - 2**-24):
        tokens = inverse_cdf_sample(logprobs, torch.full((64,), u))
        assert bool((logprobs.gather(1, tokens[:, None]) > -torch.inf).all())


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.05, 0.15, 0.3, 0.5])
    tokens = inverse_cdf_sample(probabilities.log().expand(20_000, 4), uniforms(1, 20_000, 1)[:, 0])
    expected = probabilities * 20_000
    chi_square = float(((torch.bincount(tokens, minlength=4) - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 3 degrees of freedom, 0.1 %


def test_temperature_and_the_banned_token_shape_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 5.0])
    logprobs = token_logprobs(logits, temperature=0.5, banned=2)
    torch.testing.assert_close(logprobs[1] - logprobs[0], torch.tensor(2.0))
    assert logprobs[2] == -torch.inf
    torch.testing.assert_close(logprobs[:2].exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_fused_decoder_draws_what_the_model_itself_draws(model_folders: dict[str, Path], kind: str) -> None:
    fused = make_policy(model_folders[kind])
    plain = make_policy(model_folders[kind], options=EngineOptions(fused_decoder=False))
    assert isinstance(fused.decoder, LlamaDecoder)
    assert not isinstance(plain.decoder, LlamaDecoder)
    adapter = random_adapter(fused)
    rollouts = []
    for policy in (fused, plain):
        policy.load(adapter)
        rollouts.append(policy.generate(PROMPTS, draw=0))
    assert torch.equal(rollouts[0].completion_ids, rollouts[1].completion_ids)
    torch.testing.assert_close(rollouts[0].logprobs, rollouts[1].logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_recorded_logprobs_are_the_models_own(model_folders: dict[str, Path], kind: str) -> None:
    policy = make_policy(model_folders[kind], temperature=0.8)
    policy.load(random_adapter(policy))
    rollout = policy.generate(PROMPTS, draw=0)
    torch.testing.assert_close(rollout.logprobs, policy.logprobs(rollout), atol=2e-5, rtol=0)


def test_gpt2_is_left_to_transformers(model_folders: dict[str, Path]) -> None:
    assert not supports(make_policy(model_folders["gpt2"]).base.model)


def test_a_completion_ends_with_its_end_token_or_is_truncated(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"], num_generations=40, length=30)
    rollout = policy.generate(PROMPTS, draw=0)
    assert 0 < int(rollout.truncated.sum()) < len(rollout.truncated)
    for ids, mask, cut in zip(rollout.completion_ids, rollout.mask, rollout.truncated, strict=True):
        tokens = ids[mask].tolist()
        assert (1 not in tokens and len(tokens) == 30) if cut else (tokens.index(1) == len(tokens) - 1)
        assert 0 not in tokens  # PAD is never sampled
        assert (ids[~mask] == 0).all()


def test_the_same_draw_samples_the_same_and_another_draw_differs(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    first, second, other = (policy.generate(PROMPTS, draw=draw) for draw in (0, 0, 1))
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert first.completions != other.completions
    policy.begin(1, "test")
    assert policy.generate(PROMPTS, draw=0).completions != first.completions


def test_greedy_takes_the_likeliest_token_once_a_prompt(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    rollout = policy.generate(PROMPTS, draw=0, greedy=True)
    assert len(rollout.completions) == len(PROMPTS)
    ids = torch.tensor([policy.base.tokenizer("w1 w2 w3")["input_ids"]])
    expected = policy.base.model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0, suppress_tokens=[0])
    assert rollout.completion_ids[0][rollout.mask[0]].tolist() == expected[0, 3:].tolist()


def test_groups_are_contiguous_and_carry_their_columns(model_folders: dict[str, Path]) -> None:
    rollout = make_policy(model_folders["llama"]).generate(PROMPTS, draw=0)
    assert rollout.prompts.columns["answer"] == [answer for answer in "abcd" for _ in range(3)]
    assert torch.equal(rollout.prompt_ids[0], rollout.prompt_ids[2])


def test_a_prompt_alone_samples_what_it_samples_in_a_batch_first(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    alone = policy.generate(PROMPTS.select([0]), draw=0)
    assert alone.completions == policy.generate(PROMPTS, draw=0).completions[:3]


def test_a_prompt_without_tokens_is_named(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    with pytest.raises(Exception, match="has no tokens"):
        policy.generate(Prompts(text=[""], ids=torch.zeros(1), columns={}), draw=0)


def test_the_prompt_keeps_its_end_when_it_is_too_long(model_folders: dict[str, Path]) -> None:
    policy = make_policy(model_folders["llama"])
    policy.rollout_settings = policy.rollout_settings.model_copy(update={"max_prompt_length": 2})
    rollout = policy.generate(PROMPTS, draw=0)
    assert policy.base.tokenizer.decode(rollout.prompt_ids[0].tolist()) == "w2 w3"
    assert replace(rollout).prompt_ids.shape[1] == 2


def test_sampling_in_small_batches_draws_the_same(model_folders: dict[str, Path]) -> None:
    whole = make_policy(model_folders["llama"])
    small = make_policy(model_folders["llama"], options=EngineOptions(micro_batch_tokens=1))
    adapter = random_adapter(whole)
    rollouts = []
    for policy in (whole, small):
        policy.load(adapter)
        rollouts.append(policy.generate(PROMPTS, draw=0))
    assert rollouts[0].completions == rollouts[1].completions
    assert torch.equal(rollouts[0].mask, rollouts[1].mask)
    torch.testing.assert_close(rollouts[0].logprobs, rollouts[1].logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_small_adapter_is_not_rounded_away_in_bfloat16(model_folders: dict[str, Path], kind: str) -> None:
    policy = make_policy(model_folders[kind], dtype="bfloat16")
    policy.load(random_adapter(policy, size=1e-2))
    ids, mask = torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.bool)
    with torch.no_grad():
        policy.decoder.prefill(ids, mask, 1)
        assert isinstance(policy.decoder, LlamaDecoder)
        layer, x = policy.decoder.layers[0].down, torch.randn(1, 1, 48).bfloat16()
        module = policy.bank.modules["model.layers.0.mlp.down_proj"]
        low_rank = (layer.low_rank[0][0], layer.low_rank[0][1])
        expected = x.float() @ (module.b[0] * module.scale[0] @ module.a[0]).T
        torch.testing.assert_close(x.float() @ low_rank[0].T @ low_rank[1].T, expected)
        torch.testing.assert_close(layer(x), module(x), atol=0.05, rtol=0.02)
