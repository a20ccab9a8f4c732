"""Noise that protects a member: keyed by a secret that only the member has, and by what it is answering."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

import torch
from torch import Tensor

from fedpact.core.privacy import keep_probability, per_candidate, randomised_response
from fedpact.rewards.answers import normalised
from fedpact.runtime.files import atomic_write, make_private, storing
from fedpact.types import Prompts


def member_secret(home: Path) -> bytes:
    """32 random bytes, made once and kept in the member's private folder."""
    path = home / "secret"
    with storing(path):
        make_private(home)
        if not path.exists():
            atomic_write(path, secrets.token_bytes(32))
        return path.read_bytes()


def secret_uniforms(secret: bytes, digest: str, size: int) -> Tensor:
    """[size] float64 in [0, 1): SHAKE-256 of the secret and of the digest of what is answered.

    Whoever lacks the secret cannot tell them from random; the same request asked again gets the same noise.
    """
    stream = hashlib.shake_256(secret + digest.encode()).digest(8 * size)
    words = torch.frombuffer(bytearray(stream), dtype=torch.int64) if size else torch.zeros(0, dtype=torch.int64)
    return ((words >> 11) & (2**53 - 1)).double() / 2**53


def noisy_ratings(rewards: Tensor, rows: Tensor, epsilon_per_prompt: float, draws: Tensor) -> Tensor:
    """Randomised response on 0/1 ratings: [m, n] -> [m, n]; `rows` [n] says which question a completion answers.

    One question's budget is shared evenly by all numbers that answer it: its candidates times the objectives rated.
    Raises ValueError for ratings other than 0, 1 and NaN.
    """
    rated = ~rewards.isnan()
    objectives = int(rated.any(1).sum())
    counts = rows.bincount()[rows] * max(1, objectives)  # [n] numbers told about each completion's question
    result = torch.full_like(rewards, torch.nan)
    for count in sorted(set(counts.tolist())):
        same = counts == count
        epsilon = per_candidate(epsilon_per_prompt, count)
        result[:, same] = randomised_response(rewards[:, same], epsilon, draws[:, same])
    return result


def noisy_bits(bits: Tensor, rows: Tensor, epsilon_per_prompt: float, draws: Tensor) -> Tensor:
    """Randomised response on [p] bits, which stay bits: nothing is debiased. Bits with one row are of one question."""
    counts = rows.bincount()[rows].tolist()
    flip = [1 - keep_probability(per_candidate(epsilon_per_prompt, count)) for count in counts]
    return bits ^ (draws < torch.tensor(flip, dtype=torch.float64))


def same_questions(prompts: Prompts) -> Tensor:
    """Numbers for questions, [p] int64, equal for those with one public id or one normalised text."""
    group: list[int] = []
    first: dict[tuple[str, str], int] = {}
    ids = prompts.columns.get("id", [None] * len(prompts))
    for place, (text, public_id) in enumerate(zip(prompts.text, ids, strict=True)):
        said = text if isinstance(text, str) else " ".join(m["content"] for m in text if m["role"] == "user")
        keys = [("text", normalised(said)), *([] if public_id is None else [("id", str(public_id))])]
        known = {group[first[key]] for key in keys if key in first}
        if len(known) > 1:  # its id and its text had been met apart
            group = [min(known) if number in known else number for number in group]
        group.append(min(known, default=place))
        for key in keys:
            first.setdefault(key, place)
    return torch.tensor(group, dtype=torch.int64)
