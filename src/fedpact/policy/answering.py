"""Answers of a causal language model to questions, for judges that need a second opinion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fedpact.errors import ConfigError
from fedpact.policy.decode import TransformersDecoder, complete
from fedpact.policy.model import Dtype, load_model
from fedpact.policy.prompts import encoded_prompts
from fedpact.seeding import key, uniforms
from fedpact.types import Text


class Answer(NamedTuple):
    """What the model wrote."""

    text: str
    finished: bool
    """False: cut at the length limit."""


class Answerer:
    """A frozen model that answers. `device` may be "auto": CUDA where there is one.

    `max_batch_tokens` bounds the memory: prompt and completion tokens whose keys and values are held at once; a single
    question may exceed it. Raises ConfigError if the folder holds no model.
    """

    def __init__(
        self,
        path: Path,
        *,
        where: str,
        device: str = "auto",
        dtype: Dtype = "float32",
        max_batch_tokens: int = 32_768,
    ) -> None:
        if max_batch_tokens < 1:
            raise ConfigError(f"{where}: max_batch_tokens is {max_batch_tokens}; expected at least 1")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base = load_model(path, where=where, dtype=dtype, device=device)
        self.decoder = TransformersDecoder(self.base.model)
        self.device = next(self.base.model.parameters()).device
        self.max_batch_tokens = max_batch_tokens

    def answers(
        self,
        texts: Sequence[Text],
        *,
        num: int,
        temperature: float | None,
        max_length: int,
        max_prompt_length: int | None = None,
        seed: int = 0,
    ) -> list[list[Answer]]:
        """`num` answers to every question, in their order; with `temperature` None the most probable one, `num` times.

        Draw i of a question is keyed by `seed`, the question's own text and i: neither the other questions, nor their
        order, nor `num` matter, up to the rounding of batched products. Raises DataError for a prompt that the model's
        template does not take.
        """
        if not texts:
            return []
        pad_id, eos_ids = self.base.pad_id, self.base.eos_ids
        prompt_ids, prompt_mask = encoded_prompts(self.base.tokenizer, texts, limit=max_prompt_length, pad_id=pad_id)
        lengths = prompt_mask.sum(-1)
        group_size = 1 if temperature is None else num
        room = max(1, self.max_batch_tokens // (group_size * (prompt_ids.shape[1] + max_length)))
        result: dict[int, list[Answer]] = {}
        for rows in torch.split(lengths.argsort(stable=True), room):  # prompts of like length: little padding
            start = int(prompt_ids.shape[1] - lengths[rows].max())
            draws = None
            if temperature is not None:
                keys = [key(seed, "answer", json.dumps(texts[row], sort_keys=True)) for row in rows.tolist()]
                draws = torch.cat([uniforms(own, group_size, max_length) for own in keys])
            done = complete(
                self.decoder,
                prompt_ids[rows, start:].to(self.device),
                prompt_mask[rows, start:].to(self.device),
                group_size=group_size,
                max_length=max_length,
                temperature=1.0 if temperature is None else temperature,
                uniforms=draws,
                pad_id=pad_id,
                eos_ids=eos_ids,
            )
            said = self.base.tokenizer.batch_decode(
                [ids[mask].tolist() for ids, mask in zip(done.ids, done.mask, strict=True)], skip_special_tokens=True
            )
            written = [Answer(text, not cut) for text, cut in zip(said, done.truncated.tolist(), strict=True)]
            for place, row in enumerate(rows.tolist()):
                own = written[place * group_size : (place + 1) * group_size]
                result[row] = own * num if temperature is None else own
        return [result[row] for row in range(len(texts))]
