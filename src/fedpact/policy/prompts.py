"""Prompts as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedpact.errors import DataError
from fedpact.types import Message, Text


def encoded_prompts(tokenizer: Any, texts: Sequence[Text], *, limit: int | None, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask of texts and chats, padded on the left: [p, s] int64, [p, s] bool.

    Chats go through the tokenizer's template. Of a prompt longer than `limit` the end is kept. Raises DataError.
    """
    rows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"] if isinstance(text, str) else _chat_ids(tokenizer, text)
        if not ids:
            raise DataError(f"prompt {str(text)[:60]!r} has no tokens; give the model something to continue")
        rows.append(ids if limit is None else ids[-limit:])
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = True
    return ids, mask


def _chat_ids(tokenizer: Any, chat: list[Message]) -> list[int]:
    if tokenizer.chat_template is None:
        raise DataError("the prompts are chats and the model has no chat template; give it plain texts, or a template")
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template may raise on roles that it does not know
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"prompt {str(chat)[:60]!r} does not fit the model's chat template ({reason[:160]}); change its roles"
        ) from error
    return ids
