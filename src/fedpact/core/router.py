"""A small learned router: which members' reward models should have a say about a question, and how much."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpact.seeding import generator


def fit_router(
    embeddings: Tensor,
    labels: Tensor,
    num_labels: int,
    *,
    hidden: int = 32,
    steps: int = 300,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A router that learnt which label an embedding has: [p, h], [p] int64 -> "w1", "b1", "w2", "b2", float32.

    Its logits are `w2 relu(w1 e + b1) + b2`; w1 is [hidden, h] and w2 [num_labels, hidden]. Cross-entropy over all rows
    at once, `steps` steps of AdamW, on the CPU, so that neither the device nor an order of batches shows in the result.

    Raises ValueError if there is nothing to learn from, or a label is not in 0 .. num_labels - 1.
    MoR, arXiv:2605.03426, attests a learned routing by input. Its form, and learning it from the domain that each
    question belongs to, are our reading.
    """
    if len(embeddings) == 0 or len(labels) != len(embeddings):
        raise ValueError(f"{len(embeddings)} embeddings and {len(labels)} labels; expected as many, and at least one")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_labels:
        raise ValueError(f"labels run from {lowest} to {highest}; expected numbers from 0 to {num_labels - 1}")
    inputs, labels = embeddings.detach().to("cpu", torch.float32), labels.to("cpu", torch.int64)
    draw = generator("router", seed)
    router = {
        "w1": torch.randn(hidden, inputs.shape[1], generator=draw) / inputs.shape[1] ** 0.5,
        "b1": torch.zeros(hidden),
        "w2": torch.randn(num_labels, hidden, generator=draw) / hidden**0.5,
        "b2": torch.zeros(num_labels),
    }
    parameters = [value.requires_grad_() for value in router.values()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(_logits(router, inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return {name: value.detach() for name, value in router.items()}


def route(
    router: Mapping[str, Tensor], embeddings: Tensor, *, temperature: float = 1.0, top: int | None = None
) -> Tensor:
    """Each label's share in each question: [p, h] -> [p, c] float32, rows that sum to 1.

    A small temperature sends a question to its likeliest label, a large one to all alike. With `top` all but the
    largest shares (of equal ones those with the lower index) are zero, and these are scaled to sum to 1.

    Raises ValueError if `temperature` or `top` is not positive, or the embeddings are not as wide as the router's.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    if top is not None and top < 1:
        raise ValueError(f"top is {top}; expected at least one, or None for all")
    if embeddings.shape[-1] != router["w1"].shape[-1]:
        raise ValueError(
            f"embeddings have {embeddings.shape[-1]} features, the router expects {router['w1'].shape[-1]}; "
            "use the encoder that it was fitted with"
        )
    logits = _logits(router, embeddings.to(router["w1"])) / temperature
    if top is not None:
        order = logits.argsort(dim=-1, descending=True, stable=True)
        # Before the softmax, where no share can vanish by rounding.
        logits = logits.scatter(-1, order[:, top:], -torch.inf)
    return logits.softmax(-1)


def _logits(router: Mapping[str, Tensor], embeddings: Tensor) -> Tensor:
    hidden = (embeddings @ router["w1"].mT + router["b1"]).relu()
    return hidden @ router["w2"].mT + router["b2"]
