"""Losses and advantages against TRL's own GRPOTrainer, on a tiny random Llama and frozen tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedpact.core.advantages import group_advantages, weighted_rewards
from fedpact.core.losses import GroupLoss
from fedpact.types import Prompts, Rollout

trl = pytest.importorskip("trl", minversion="1.16")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

M, N, S, T, VOCABULARY = 3, 8, 4, 7, 50
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]


@dataclass
class Bench:
    """A real trainer, and the reward table that its two reward functions read."""

    trainer: trl.GRPOTrainer
    rewards: list[list[float | None]]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    rewards: list[list[float | None]] = [[], []]

    def first(completions: list[str], **_: object) -> list[float | None]:
        return rewards[0]

    def second(completions: list[str], **_: object) -> list[float | None]:
        return rewards[1]

    trainer = trl.GRPOTrainer(
        model=transformers.LlamaForCausalLM(config),
        reward_funcs=[first, second],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            report_to=[],
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=N,
            num_generations=4,
            max_completion_length=T,
            reward_weights=[0.7, 0.3],
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w3 w4"}] * N),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
        ),
    )
    trainer.current_gradient_accumulation_steps = 1
    return Bench(trainer, rewards)


def frozen_rollout(old: Tensor | None = None) -> Rollout:
    draw = torch.Generator().manual_seed(7)
    prompt_mask = torch.arange(S) >= torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]).unsqueeze(-1)
    mask = torch.arange(T) < torch.tensor([7, 1, 3, 5, 7, 2, 6, 4]).unsqueeze(-1)
    return Rollout(
        prompts=Prompts(text=["?"] * N, ids=torch.zeros(N, dtype=torch.long), columns={}),
        completions=["!"] * N,
        prompt_ids=torch.randint(2, VOCABULARY, (N, S), generator=draw).masked_fill(~prompt_mask, 0),
        prompt_mask=prompt_mask,
        completion_ids=torch.randint(2, VOCABULARY, (N, T), generator=draw).masked_fill(~mask, 0),
        mask=mask,
        logprobs=torch.zeros(N, T) if old is None else old.masked_fill(~mask, 0.0),
        truncated=torch.zeros(N, dtype=torch.bool),
        group_size=4,
    )


def score(model: torch.nn.Module, rollout: Rollout) -> Tensor:
    """Log-probs of the completion tokens, straight from the logits: [n, t]."""
    tokens = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
    attention = torch.cat([rollout.prompt_mask, rollout.mask], dim=1).long()
    logits = model(input_ids=tokens, attention_mask=attention).logits[:, -T - 1 : -1]
    return logits.log_softmax(-1).gather(-1, rollout.completion_ids.unsqueeze(-1)).squeeze(-1)


def gradient(model: torch.nn.Module, scalar: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, list(model.parameters()), retain_graph=True)])


@pytest.mark.parametrize(
    ("loss_type", "level", "beta"), list(itertools.product(LOSS_TYPES, ["token", "sequence"], [0.0, 0.04]))
)
def test_losses_and_gradients_are_trls(bench, loss_type, level, beta):
    trainer, model = bench.trainer, bench.trainer.model.eval()
    draw = torch.Generator().manual_seed(11)
    rollout = frozen_rollout()
    with torch.no_grad():
        start = score(model, rollout)
    rollout = frozen_rollout(start + 0.3 * torch.randn(N, T, generator=draw))
    reference = start + 0.3 * torch.randn(N, T, generator=draw)
    advantages = torch.randn(M, N, generator=draw)
    # Unequal bounds; CISPO's is absolute, so below 1 everything would be clipped.
    loss = GroupLoss(loss_type, 0.1, 1.1 if loss_type == "cispo" else 0.15, beta, level, max_completion_length=T)

    logprobs = score(model, rollout)
    values = loss.values(rollout, logprobs, reference, advantages)
    passes = loss.passes(rollout, logprobs.detach(), reference, advantages)
    if level == "token" and loss_type != "cispo":
        assert len(passes) == 2 + (beta != 0), "the case should have clipped tokens"

    trainer.loss_type, trainer.importance_sampling_level, trainer.beta = loss_type, level, beta
    trainer.epsilon_low, trainer.epsilon_high = loss.epsilon, loss.epsilon_high
    for m in range(M):
        theirs = trainer._compute_loss(
            model,
            {
                "prompt_ids": rollout.prompt_ids,
                "prompt_mask": rollout.prompt_mask.long(),
                "completion_ids": rollout.completion_ids,
                "completion_mask": rollout.mask.long(),
                "advantages": advantages[m],
                "old_per_token_logps": rollout.logprobs,
                "ref_per_token_logps": reference,
                "num_items_in_batch": rollout.mask.sum(),
            },
        )
        assert_close(values[m], theirs, rtol=1e-6, atol=1e-6)
        surrogate = torch.stack([p.coefficients[m] @ (p.tokens * logprobs).sum(-1) for p in passes]).sum()
        expected, found = gradient(model, theirs), gradient(model, surrogate)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_the_advantages_of_one_summed_reward_are_trls(bench, scale):
    bench.rewards[:] = [[1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, None], [0.5, 0.5, None, 0.1, None, 0.3, 0.2, None]]
    bench.trainer.scale_rewards, bench.trainer.beta = scale, 0.0
    bench.trainer.model.train()
    inputs = [{"prompt": "w3 w4"}] * 4 + [{"prompt": "w5 w6 w7"}] * 4
    expected = bench.trainer._generate_and_score_completions(inputs)["advantages"]
    rewards = torch.tensor([[torch.nan if r is None else r for r in row] for row in bench.rewards])
    total = weighted_rewards(rewards, torch.tensor([0.7, 0.3]))
    assert_close(group_advantages(total.unsqueeze(0), 4, scale=scale)[0], expected, rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 0.1
