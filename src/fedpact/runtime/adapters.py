"""How adapters travel: a member may train a smaller rank or one factor alone, and the server makes them whole again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fedpact.core.low_rank import averaging_error, product_mean, rank_of, truncated, widened
from fedpact.errors import InadmissibleError
from fedpact.messages import Differentiate, Evaluate, Reply, Request, Train, Trained
from fedpact.types import Adapter

if TYPE_CHECKING:
    from fedpact.runtime.config import RunConfig

Factor = Literal["all", "A", "B"]
"""Which factors of the shared adapter members train in a round."""


def for_rank(request: Request[Any], r: int) -> Request[Any]:
    """The request for a member whose adapter has rank `r`: the best approximation of that rank, if ours is larger."""
    if isinstance(request, (Train, Evaluate, Differentiate)) and rank_of(lora_part(request.adapter)) > r:
        return replace(request, adapter=truncated(request.adapter, r))
    return request


def refuse_rank(rank: int, config: RunConfig) -> None:
    """Raise InadmissibleError if a member cannot take part with an adapter of this rank."""
    r, averaging = config.policy.lora.r, config.federation.averaging
    if rank > r or (rank < r and averaging != "products"):
        raise InadmissibleError(
            f'rank: found {rank} with federation.averaging = "{averaging}"; the run has {r}, and smaller ones need '
            '"products"'
        )


def trained_factor(adapter: Adapter, factor: Factor) -> Adapter:
    """What a member sends back of an adapter of which it has trained `factor`."""
    if factor == "all":
        return adapter
    return {name: tensor for name, tensor in adapter.items() if f".lora_{_other(factor)}." not in name}


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of tensors by what they are, sorted: "adapter", or the prefix of what travels beside it."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        group = name.split("/", 1)[0] if "/" in name else "adapter"
        groups.setdefault(group, []).append(name)
    return groups


def delta_start(sent: Adapter) -> Adapter:
    """What a reply's tensors are compared with: those that were sent, but 0 for `control/`, which returns a change."""
    return {n: torch.zeros_like(tensor) if n.startswith("control/") else tensor for n, tensor in sent.items()}


def shortened(start: Tensor, end: Tensor, scale: float) -> Tensor:
    """The change from `start` to `end` at this scale, in float64: float32 has no scale from 3e38 down to 1e-7."""
    return (start.double() + (end.double() - start.double()) * scale).to(end.dtype)


def private_part(tensors: Mapping[str, Tensor]) -> Adapter:
    """Those tensors that never leave a member."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith("private/")}


def as_taken(request: Request[Any], own: int | None, r: int) -> Request[Any]:
    """The request as a member of rank `own` took it (None: the run's), its adapter padded to the run's rank `r`."""
    if own is None or not isinstance(request, Train):
        return request
    taken = for_rank(request, own)
    assert isinstance(taken, Train)
    return replace(taken, adapter={**taken.adapter, **widened(lora_part(taken.adapter), r)})


def completed(reply: Reply, request: Request[Any], factor: Factor) -> Reply:
    """The reply with the factor that its member was not to train, as the server sent it.

    Raises InadmissibleError if the reply has that factor after all.
    """
    if not (isinstance(reply, Trained) and isinstance(request, Train)) or factor == "all":
        return reply
    frozen = {name: tensor for name, tensor in request.adapter.items() if f".lora_{_other(factor)}." in name}
    odd = sorted(frozen.keys() & reply.adapter.keys())
    if odd:
        raise InadmissibleError(f"adapter: {odd[0]!r} was not to be trained (training.trainable), and came back")
    return replace(reply, adapter={**reply.adapter, **frozen})


def at_rank(reply: Reply, r: int) -> Reply:
    """The reply with its adapter padded to rank `r`; nothing that it computes changes."""
    if isinstance(reply, Trained) and rank_of(lora_part(reply.adapter)) < r:
        return replace(reply, adapter=widened(reply.adapter, r))
    return reply


def mean_of_products(replies: Mapping[str, Trained], mean: Adapter, r: int) -> Adapter:
    """`mean` with its LoRA factors replaced by those of the mean product, cut to rank `r`."""
    return {**mean, **product_mean([(lora_part(reply.adapter), reply.weight) for reply in replies.values()], r)}


def error_of_mean(replies: Mapping[str, Trained], mean: Adapter) -> float:
    """How far the product of `mean`'s factors is from the mean of the replies' products, relative to it."""
    return averaging_error([(lora_part(reply.adapter), reply.weight) for reply in replies.values()], lora_part(mean))


def lora_part(adapter: Adapter) -> Adapter:
    """The adapter without what travels beside it, such as `control/`."""
    return {name: tensor for name, tensor in adapter.items() if name.startswith("base_model.")}


def _other(factor: Factor) -> str:
    return "A" if factor == "B" else "B"
