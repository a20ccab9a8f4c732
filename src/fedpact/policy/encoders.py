"""What places questions near each other. Frozen, all of them: a space that drifts with the policy misleads.

Measured by the study behind FedPact's second demo: with an encoder that is trained along, one seed in three collapses.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fedpact.errors import ConfigError
from fedpact.policy.embedding import mean_hidden_states
from fedpact.policy.lora_policy import LoraPolicy
from fedpact.policy.model import resolve
from fedpact.seeding import key
from fedpact.types import Prompts, Text

_WIDTH = 1024
_WORD = re.compile(r"\w+|[^\w\s]")


class Encoder(Protocol):
    """Questions to unit rows: [p, h] float32. `policy` gives the policy of this round to whoever needs it."""

    def __call__(self, prompts: Prompts, policy: Callable[[], LoraPolicy]) -> Tensor: ...


def encoder(name: str, corpus: Prompts, *, folder: Path, where: str) -> Encoder:
    """The encoder that `server.encoder` names; `corpus` are questions to learn word frequencies from.

    Raises ConfigError for a folder that holds no encoder.
    """
    if name == "policy":
        return lambda prompts, policy: policy().embed(prompts)
    if name == "tokens":
        return HashedTokens(corpus)
    return FolderEncoder(resolve(name, where=where, folder=folder), where=where)


class HashedTokens:
    """Bags of words and marks, hashed to 1,024 places, weighed by inverse document frequency: log((1 + N) / (1 + df)).

    A word that every question of the corpus has weighs nothing. Spärck Jones 1972, without the customary + 1, which
    would let what all domains share drown what tells them apart.
    """

    def __init__(self, corpus: Prompts) -> None:
        self.total = len(corpus)
        self.documents = Counter(word for text in corpus.text for word in set(_words(text)))

    def __call__(self, prompts: Prompts, policy: Callable[[], LoraPolicy]) -> Tensor:
        rows = torch.zeros(len(prompts), _WIDTH, dtype=torch.float64)
        for row, text in zip(rows, prompts.text, strict=True):
            for word, count in Counter(_words(text)).items():
                rarity = math.log((1 + self.total) / (1 + self.documents[word]))
                row[key(word) % _WIDTH] += count * rarity
        return torch.nn.functional.normalize(rows, dim=-1).float()


class FolderEncoder:
    """A model folder of the sentence-transformers kind: mean pooling, or the first token's where its files say so."""

    def __init__(self, path: Path, *, where: str, batch_tokens: int = 4096) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model: Any = AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=False)
            self.model: Any = model.requires_grad_(False).eval()
        except Exception as error:  # transformers raises many types for a folder that is no model
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(
                f"{where}: {path} does not load as an encoder ({type(error).__name__}: {reason[:160]}); expected "
                "config.json, tokenizer files and *.safetensors, or one of the names policy and tokens"
            ) from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        pooling = path / "1_Pooling" / "config.json"
        try:
            settings = json.loads(pooling.read_bytes()) if pooling.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{where}: {pooling}: not JSON ({error}); download the model again") from error
        self.first_only = bool(settings.get("pooling_mode_cls_token", False))
        self.max_length = min(512, int(getattr(self.model.config, "max_position_embeddings", 512)))
        self.batch_tokens = batch_tokens

    def __call__(self, prompts: Prompts, policy: Callable[[], LoraPolicy]) -> Tensor:
        found = self.tokenizer(
            [plain(text) for text in prompts.text],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return mean_hidden_states(
            self.model,
            found["input_ids"],
            found["attention_mask"].bool(),
            batch_tokens=self.batch_tokens,
            first_only=self.first_only,
        )


def plain(text: Text) -> str:
    """A text, or a chat's messages under one another."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def _words(text: Text) -> list[str]:
    return _WORD.findall(plain(text).casefold())
