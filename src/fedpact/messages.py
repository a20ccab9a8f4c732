"""Everything that can leave a member, on one page: the privacy statement.

A request goes from the server to a member; its reply is all that comes back. There is no other channel. A member's gate
may still refuse a reply or remove metrics from it; it never adds to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from fedpact.types import Adapter


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What a member sends back."""


@dataclass(frozen=True, slots=True, eq=False)
class Averaged(Reply):
    """A reply whose numbers may be averaged over members."""

    weight: float
    """How much this reply counts, worked out by the member from its own numbers and capped by its gate."""


R = TypeVar("R", bound=Reply)


class Request(Generic[R]):
    """What the server asks; `R` is the reply that it gets."""

    verb: ClassVar[str]
    reply: ClassVar[type[Reply]]


@dataclass(frozen=True, slots=True, eq=False)
class Introduced(Reply):
    """Who a member is."""

    name: str
    task: str
    """The group of members whose accuracies can be compared with its own; "" if it belongs to none."""
    objectives: tuple[str, ...]
    """The objectives that it trains on."""
    num_prompts: int
    rank: int
    versions: Mapping[str, str]
    """Package name to version."""


@dataclass(frozen=True, slots=True, eq=False)
class Trained(Averaged):
    """A locally trained adapter and how the training went."""

    adapter: Adapter
    rewards: Tensor  # [m] float32, mean training reward; NaN: not measured here
    accuracy: float | None
    """Mean reward of the primary objective over the local steps; None without that objective."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Named figures; the member's `share` list decides which of them leave."""


@dataclass(frozen=True, slots=True, eq=False)
class Evaluated(Averaged):
    """Held-out results of an adapter."""

    rewards: Tensor  # [m] float32, mean held-out reward; NaN: not measured here
    counts: Tensor  # [m] int64, completions behind each mean
    accuracy: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Hello(Request[Introduced]):
    """Introduce yourself, and accept or refuse the contract of this run."""

    verb: ClassVar[str] = "hello"
    reply: ClassVar[type[Reply]] = Introduced

    contract: str
    """The contract as canonical JSON; its SHA-256 pins every later request."""


@dataclass(frozen=True, slots=True, eq=False)
class Train(Request[Trained]):
    """Train this adapter on your prompts with your rewards."""

    verb: ClassVar[str] = "train"
    reply: ClassVar[type[Reply]] = Trained

    adapter: Adapter
    weights: Tensor | None = None  # [m] objective weights, where the server chooses them


@dataclass(frozen=True, slots=True, eq=False)
class Evaluate(Request[Evaluated]):
    """Measure this adapter on your held-out prompts."""

    verb: ClassVar[str] = "evaluate"
    reply: ClassVar[type[Reply]] = Evaluated

    adapter: Adapter
    greedy: bool = False


REQUESTS: Mapping[str, type[Request[Any]]] = {request.verb: request for request in (Hello, Train, Evaluate)}
"""Every verb that can cross the network."""
