"""Random Qwen 2 models, in FedPact and in PEFT, with one adapter and one batch: 8 prompts, 8 completions each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fedpact.core.lora import adapter_shapes
from fedpact.policy.lora_policy import LoraPolicy
from fedpact.policy.model import BaseModel, lora_layers
from fedpact.policy.sampling import token_logprobs
from fedpact.settings import LoraSettings, LossSettings, OptimizerSettings, RolloutSettings
from fedpact.types import Adapter, Prompts, Rollout

NUM_PROMPTS, GROUP_SIZE, LENGTH = 8, 8, 48
LORA = LoraSettings(r=16, lora_alpha=32)


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    dtype: torch.dtype = torch.float32


SIZES = {
    "nano": Size(64, 2, 4, 2, 192, 2048),
    "tiny": Size(192, 4, 6, 2, 512, 2048),
    "0.5b": Size(896, 24, 14, 2, 4864, 151936, torch.bfloat16),
    "1.5b": Size(1536, 28, 12, 2, 8960, 151936, torch.bfloat16),
}


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """The same model twice: ours, and a PEFT model that has never seen our code."""

    policy: LoraPolicy
    peft: Any
    rollout: Rollout
    device: str

    @property
    def num_parameters(self) -> int:
        """Base and adapter."""
        return sum(parameter.numel() for parameter in self.peft.parameters())


def make_bench(size: str, device: str = "cpu") -> Bench:
    """Both models with the same weights and adapter, and a batch sampled from them."""
    shape = SIZES[size]
    base = random_model(shape).to(device)
    twin = copy.deepcopy(base)
    policy = make_policy(base)
    adapter = random_adapter(policy)
    policy.load(adapter)
    peft = get_peft_model(twin, peft_config(), autocast_adapter_dtype=True)
    set_peft_model_state_dict(peft, adapter)
    return Bench(policy, peft.eval(), policy.generate(prompts(), draw=0), device)


def random_model(shape: Size) -> Any:
    """A frozen Qwen 2 with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config).to(shape.dtype).requires_grad_(False).eval()


def make_policy(base: Any) -> LoraPolicy:
    """FedPact's policy over `base`, with TRL's default loss.

    The end-of-sequence token lies outside the vocabulary, so that no completion ends early and token budgets are equal.
    """
    vocabulary = int(base.config.vocab_size)
    policy = LoraPolicy(
        BaseModel(Path("random"), base, tokenizer(vocabulary), pad_id=0, eos_ids=(vocabulary,)),
        lora_layers(base, LORA),
        rollout=RolloutSettings(num_generations=GROUP_SIZE, max_completion_length=LENGTH),
        loss=LossSettings(loss_type="dapo"),
        optimizer=OptimizerSettings(),
    )
    policy.begin(0, "benchmark")
    return policy


def peft_config() -> LoraConfig:
    """The same adapter for PEFT."""
    return LoraConfig(r=LORA.r, lora_alpha=LORA.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def random_adapter(policy: LoraPolicy) -> Adapter:
    """An adapter whose B is not zero: a fresh one would have zero gradients in A."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=draw) * 0.05 for name, shape in adapter_shapes(policy.bank.layers).items()
    }


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word a token, and an end-of-sequence token that the model cannot emit: its number is `vocabulary`."""
    words = ["<pad>", *(f"w{i}" for i in range(1, vocabulary)), "<eos>"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def prompts() -> Prompts:
    """Eight prompts of 20 to 24 tokens."""
    draw = torch.Generator().manual_seed(2)
    texts = [
        " ".join(f"w{int(word)}" for word in torch.randint(1, 2048, (20 + i % 5,), generator=draw))
        for i in range(NUM_PROMPTS)
    ]
    return Prompts(text=texts, ids=torch.arange(NUM_PROMPTS), columns={})


def completion_logprobs(model: nn.Module, rollout: Rollout, rows: Tensor, *, banned: int | None) -> Tensor:
    """Log-probs of the completion tokens through the model's own forward, as any trainer takes them: [n, t]."""
    attention = torch.cat([rollout.prompt_mask[rows], rollout.mask[rows]], dim=1).long()
    logits = model(
        input_ids=torch.cat([rollout.prompt_ids[rows], rollout.completion_ids[rows]], dim=1),
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=rollout.mask.shape[1] + 1,
    ).logits[:, :-1]
    logprobs = token_logprobs(logits, temperature=1.0, banned=banned)
    return logprobs.gather(-1, rollout.completion_ids[rows][..., None])[..., 0]


def trainable(peft: Any) -> Sequence[nn.Parameter]:
    """The adapter's tensors."""
    return [parameter for parameter in peft.parameters() if parameter.requires_grad]
