"""What hides a member in the numbers that leave it: a clip, and noise where its settings ask for some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fedpact.core.robust import delta_norm
from fedpact.errors import RefusedError
from fedpact.messages import Examine, Examined, Request, Score, Scored
from fedpact.runtime.adapters import delta_start, grouped, shortened
from fedpact.runtime.client_config import SiteSettings
from fedpact.runtime.gaussian import noised
from fedpact.runtime.noise import noisy_bits, noisy_ratings
from fedpact.types import Adapter


def covered(
    sent: Adapter,
    adapter: Adapter,
    site: SiteSettings,
    secret: Callable[[], bytes],
    *,
    what: Sequence[str | int],
    where: str,
) -> Adapter:
    """The trained adapter as it may leave: with noise on all of its change, or each group of it clipped.

    `what` names the question; with the secret it is the key of the noise. Raises RefusedError.
    """
    if site.clip_norm is None:
        return adapter
    if adapter.keys() != sent.keys():
        odd = sorted(adapter.keys() ^ sent.keys())
        raise RefusedError(f"{where}: site.clip_norm: {odd[0]} has no counterpart; expected the tensors asked for")
    if site.noise_multiplier is None:
        return _clipped(sent, adapter, site.clip_norm)
    try:
        return noised(
            sent,
            adapter,
            clip_norm=site.clip_norm,
            noise_multiplier=site.noise_multiplier,
            secret=secret(),
            what=what,
        )
    except ValueError as error:
        raise RefusedError(f"{where}: site.noise_multiplier: {error}; nothing was sent") from error


def with_noise(
    request: Request[Any], reply: Scored | Examined, epsilon: float, secret: bytes, *, where: str
) -> Scored | Examined:
    """Ratings or bits after randomised response. Raises RefusedError for ratings other than 0 and 1."""
    if isinstance(reply, Examined) and isinstance(request, Examine):
        return Examined(noisy_bits(request, reply.prefers_first, epsilon, secret))
    assert isinstance(reply, Scored) and isinstance(request, Score)
    try:
        return replace(reply, rewards=noisy_ratings(request, reply.rewards, epsilon, secret))
    except ValueError as error:
        raise RefusedError(
            f"{where}: site.epsilon_per_prompt: {error}; use rewards of 0 and 1, or send exact ones"
        ) from error


def _clipped(sent: Adapter, adapter: Adapter, clip_norm: float) -> Adapter:
    start, result = delta_start(sent), dict(adapter)
    for names in grouped(adapter).values():
        norm = delta_norm(start, adapter, names)
        if norm > clip_norm:
            result |= {name: shortened(start[name], adapter[name], clip_norm / norm) for name in names}
    return result
