"""What a member's gate looks for in a request before anything is computed for it."""

from __future__ import annotations

from typing import Any

import torch

from fedpact.algorithms.base import Algorithm
from fedpact.messages import Count, Differentiate, Examine, Fit, Request, Score

_LARGEST_SKETCH = 2**16
"""Numbers for each objective that may be asked of a small adapter; of a larger one, as many as it has."""


def overdone(request: Request[Any], algorithm: Algorithm | None) -> str:
    """What a request to measure asks beyond the contract; "" if nothing."""
    if isinstance(request, Differentiate):
        most = max(_LARGEST_SKETCH, sum(tensor.numel() for tensor in request.adapter.values()))
        if request.compression not in ("projection", "svd"):
            return f"compression is {request.compression[:20]!r}, expected projection or svd"
        if not 1 <= request.rank <= most:
            return f"rank is {request.rank}, expected between 1 and {most}"
    if isinstance(request, Count) and request.domains != getattr(algorithm, "domains", request.domains):
        return "its domains are not those of the contract"
    return ""


def malformed(request: Score | Fit | Examine) -> str:
    """What is wrong with a request to judge; "" if nothing is."""
    prompts, size = request.prompts, len(request.prompts)
    tensors = [prompts.ids, *([] if prompts.domains is None else [prompts.domains])]
    if any(len(values) != size for values in prompts.columns.values()) or any(t.shape != (size,) for t in tensors):
        return "its columns are not as long as its questions"
    chats = [text for text in prompts.text if not isinstance(text, str)]
    if not all(message.keys() >= {"role", "content"} for chat in chats for message in chat):
        return "a message of a chat lacks its role or its content"
    if isinstance(request, Examine):
        if {len(request.first), len(request.second)} != {size}:
            return "expected two answers to each question"
        return ""
    rows = request.rows
    if rows.shape != (len(request.completions),) or rows.dtype != torch.int64:
        return "rows do not say which question each completion answers"
    if not bool(((rows >= 0) & (rows < size)).all()):
        return "rows do not say which question each completion answers"
    return ""


def longest_text(request: Score | Fit | Examine) -> int:
    """Characters of the longest question or answer in a request to judge."""
    answers = [*request.first, *request.second] if isinstance(request, Examine) else request.completions
    chats = [[one] if isinstance(one, str) else [m["content"] for m in one] for one in request.prompts.text]
    return max((len(text) for text in (*answers, *(text for chat in chats for text in chat))), default=0)
