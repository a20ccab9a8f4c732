"""Small random models, made once a session: the architectures that the policy treats differently."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

torch.set_num_threads(1)

VOCABULARY = 61


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def config(kind: str) -> PretrainedConfig:
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    match kind:
        case "llama":
            return LlamaConfig(**shape, num_key_value_heads=4)
        case "qwen2":
            return Qwen2Config(**shape, num_key_value_heads=2, tie_word_embeddings=True)
        case "qwen3":
            return Qwen3Config(**shape, num_key_value_heads=2, head_dim=8)
        case "gpt2":
            return GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, pad_token_id=0, eos_token_id=1,
                bos_token_id=None,
            )  # fmt: skip
    raise ValueError(kind)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind of architecture, with weights large enough for the logits to differ."""
    folders = {}
    for kind in ("llama", "qwen2", "qwen3", "gpt2"):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config(kind))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(6 if "gpt2" in kind else 8)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        folders[kind] = folder
    return folders
