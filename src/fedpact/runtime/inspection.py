"""What a member's gate looks for in a request before anything is computed for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fedpact.algorithms import TABLE
from fedpact.algorithms.base import Algorithm
from fedpact.core.lora import adapter_shapes
from fedpact.messages import Count, Differentiate, Evaluate, Examine, Fit, Request, Score, Train
from fedpact.policy.lora_policy import LoraPolicy
from fedpact.runtime.envelope import Envelope

_LARGEST_SKETCH = 2**16
"""Numbers for each objective that may be asked of a small adapter; of a larger one, as many as it has."""

_MOST_EXCHANGES = 10_000
"""In one round."""
_LARGEST_WEIGHT = 1e12
"""Of the prompts of a domain; one divided by its share of all prompts is far less."""
_BESIDE = {"scaffold": "control"}
"""What an algorithm's requests to train carry beside the adapter: a tensor for each of it, under this prefix."""


def misplaced(envelope: Envelope, rounds: int, run: str | None) -> str:
    """What is wrong with where a request says that it stands; "" if nothing is. `run` said hello; None: no matter."""
    here, since = (envelope.round, envelope.exchange), envelope.since
    if run is not None and envelope.run != run:
        return f"a request of run {ascii(envelope.run)[:40]}; hello was said by run {ascii(run)[:40]}"
    if not 0 <= envelope.round <= rounds:
        return f"a request of round {envelope.round}; the accepted contract has {rounds}"
    if not 0 <= envelope.exchange < _MOST_EXCHANGES:
        return f"a request of exchange {envelope.exchange}; expected between 0 and {_MOST_EXCHANGES - 1}"
    if since is not None and (min(since) < 0 or since >= here):
        return f"a request since {since}; expected an exchange before its own, {here}"
    return ""


def overdone(request: Request[Any], algorithm: Algorithm | None) -> str:
    """What a request to measure asks beyond the contract; "" if nothing."""
    if isinstance(request, (Train, Evaluate, Differentiate)):
        for name, tensor in request.adapter.items():
            if tensor.dtype != torch.float32:
                return f"its adapter's {ascii(name)[:100]} is {tensor.dtype}, expected torch.float32"
            if not bool(tensor.isfinite().all()):
                return f"its adapter's {ascii(name)[:100]} is not finite"
    if isinstance(request, Train) and not all(0 <= one <= _LARGEST_WEIGHT for one in request.domain_weights.values()):
        return f"a domain weight is not between 0 and {_LARGEST_WEIGHT:g}"
    if isinstance(request, Differentiate):
        most = max(_LARGEST_SKETCH, sum(tensor.numel() for tensor in request.adapter.values()))
        if request.compression not in ("projection", "svd"):
            return f"compression is {request.compression[:20]!r}, expected projection or svd"
        if not 1 <= request.rank <= most:
            return f"rank is {request.rank}, expected between 1 and {most}"
    if isinstance(request, Count) and request.domains != getattr(algorithm, "domains", request.domains):
        return "its domains are not those of the contract"
    return ""


def shared_shapes(policy: LoraPolicy) -> dict[str, tuple[int, int]]:
    """The adapter that this member's policy takes, without its private part: name to shape."""
    return adapter_shapes(replace(layer, r=policy.trainable.shared_r) for layer in policy.bank.layers)


def unfit(
    request: Train | Evaluate | Differentiate,
    algorithm: Algorithm,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    num_objectives: int,
) -> str:
    """What of the tensors in a request is not the contract's, whose adapter has these `shapes`; "" if nothing."""
    name = str(algorithm.model_dump().get("name"))
    beside = _BESIDE.get(name) if isinstance(request, Train) else None
    expected = dict(shapes) | ({f"{beside}/{one}": shape for one, shape in shapes.items()} if beside else {})
    found = {one: tuple(tensor.shape) for one, tensor in request.adapter.items()}
    if name not in TABLE:  # an algorithm of others may send what it likes, but nothing private
        found = {one: shape for one, shape in found.items() if one in expected or one.startswith("private/")}
    odd = sorted(one for one in found.keys() | expected.keys() if found.get(one) != expected.get(one))
    if odd:
        shape, wanted = found.get(odd[0], "missing"), expected.get(odd[0], "no such tensor")
        return f"its adapter's {ascii(odd[0])[:100]} is {shape}, expected {wanted}"
    if not isinstance(request, Train):
        return ""
    if (weights := request.weights) is not None:
        fitting = tuple(weights.shape) == (num_objectives,) and weights.is_floating_point()
        if not (fitting and bool((weights.isfinite() & (weights >= 0)).all())):
            return f"its weights are not {num_objectives} finite numbers of at least 0"
    domains = getattr(algorithm, "domains", () if name in TABLE else request.domain_weights)
    if strange := sorted(set(request.domain_weights) - set(domains)):
        return f"it weighs the domain {ascii(strange[0])[:60]}, which the contract does not have"
    return ""


def malformed(request: Score | Fit | Examine) -> str:
    """What is wrong with a request to judge; "" if nothing is."""
    prompts, size = request.prompts, len(request.prompts)
    tensors = [prompts.ids, *([] if prompts.domains is None else [prompts.domains])]
    if any(len(values) != size for values in prompts.columns.values()) or any(t.shape != (size,) for t in tensors):
        return "its columns are not as long as its questions"
    if any(tensor.dtype != torch.int64 for tensor in tensors):
        return "its questions are not numbered by whole numbers"
    if any(isinstance(one, (list, dict)) for one in prompts.columns.get("id", ())):
        return "the public id of a question is no plain value"
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
