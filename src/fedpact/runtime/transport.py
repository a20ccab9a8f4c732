"""The one thing that the runtime needs of a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedpact.screen import shown
from fedpact.types import ClientId


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a member sent no reply, in one line."""

    reason: str
    refused: bool = False
    """The member said no itself: it may be under another contract by now, or another run's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", shown(self.reason))


class Transport(Protocol):
    """Carries envelopes to members and answers back."""

    def clients(self) -> Sequence[ClientId]:
        """Who can be asked, sorted."""
        ...

    def exchange(
        self, envelopes: Mapping[ClientId, bytes], *, timeout_s: float | None
    ) -> Iterator[tuple[ClientId, bytes | Failure]]:
        """Send each its envelope; yield answers as they arrive, a Failure for each that sent none in time."""
        ...
