"""Noise that protects a member: keyed by a secret that only the member has, and by what it is answering."""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path

import torch
from torch import Tensor

from fedpact.core.privacy import keep_probability, per_candidate, randomised_response
from fedpact.messages import Examine, Score
from fedpact.rewards.answers import question
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


def secret_uniform(secret: bytes, *what: str | int) -> float:
    """A number in [0, 1) that depends on the secret and on what is answered: SHAKE-256.

    Whoever lacks the secret cannot tell it from random. The same thing asked again, in whatever request, round or run,
    gets the same noise, so that asking again tells nothing new.
    """
    stream = hashlib.shake_256(secret + json.dumps(what).encode()).digest(8)
    return (int.from_bytes(stream, "big") >> 11) / 2**53


def noisy_ratings(request: Score, rewards: Tensor, epsilon_per_prompt: float, secret: bytes) -> Tensor:
    """Randomised response on 0/1 ratings: [m, n] -> [m, n].

    One question's budget is shared evenly by all numbers that answer it in this request: its candidates times the
    objectives rated. Raises ValueError for ratings other than 0, 1 and NaN.
    """
    rows = same_questions(request.prompts)[request.rows]  # asked twice in one request: one budget
    objectives = int((~rewards.isnan()).any(1).sum())
    counts = (rows.bincount()[rows] * max(1, objectives)).tolist()  # [n] numbers told about each one's question
    asked = [question(request.prompts.text[row]) for row in request.rows.tolist()]
    told = list(zip(asked, request.completions, counts, strict=True))
    draws = torch.tensor(
        [[secret_uniform(secret, "score", m, *one) for one in told] for m in range(len(rewards))], dtype=torch.float64
    ).view(rewards.shape)
    result = torch.full_like(rewards, torch.nan)
    for count in sorted(set(counts)):
        same = torch.tensor(counts) == count
        epsilon = per_candidate(epsilon_per_prompt, count)
        result[:, same] = randomised_response(rewards[:, same], epsilon, draws[:, same])
    return result


def noisy_bits(request: Examine, bits: Tensor, epsilon_per_prompt: float, secret: bytes) -> Tensor:
    """Randomised response on [p] bits, which stay bits: nothing is debiased. Bits of one question share its budget."""
    rows = same_questions(request.prompts)
    counts = rows.bincount()[rows].tolist()
    told = zip(map(question, request.prompts.text), request.first, request.second, counts, strict=True)
    draws = [secret_uniform(secret, "examine", *one) for one in told]
    flip = [1 - keep_probability(per_candidate(epsilon_per_prompt, count)) for count in counts]
    return bits ^ torch.tensor([draw < rate for draw, rate in zip(draws, flip, strict=True)], dtype=torch.bool)


def same_questions(prompts: Prompts) -> Tensor:
    """Numbers for questions, [p] int64, equal for those with one public id or, normalised, one last user message.

    That is how trusted answers are joined to them.
    """
    group: list[int] = []
    first: dict[tuple[str, str], int] = {}
    ids = prompts.columns.get("id", [None] * len(prompts))
    for place, (text, public_id) in enumerate(zip(prompts.text, ids, strict=True)):
        keys = [("text", question(text)), *([] if public_id is None else [("id", str(public_id))])]
        known = {group[first[key]] for key in keys if key in first}
        if len(known) > 1:  # its id and its text had been met apart
            group = [min(known) if number in known else number for number in group]
        group.append(min(known, default=place))
        for key in keys:
            first.setdefault(key, place)
    return torch.tensor(group, dtype=torch.int64)
