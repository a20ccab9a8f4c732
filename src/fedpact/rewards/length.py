"""Rewards for length, in words or characters. Settings and columns as in `fedpact.rewards.builtin`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fedpact.rewards.builtin import (
    TAGS,
    Completion,
    Rewards,
    exact_answer,
    math_correct,
    numeric_answer,
    text_of,
    well_formed,
)

Unit = Literal["words", "characters"]

_CORRECTNESS: Mapping[str, Callable[..., Rewards]] = {
    "exact_answer": exact_answer,
    "numeric_answer": numeric_answer,
    "math_correct": math_correct,
}


def brevity(completions: Sequence[Completion], *, limit: float = 100, unit: Unit = "words", **columns: Any) -> Rewards:
    """1 - length / `limit`, but at least 0: in [0, 1].

    An empty completion earns the most, so that alone, or weighted too high, it teaches silence.
    """
    return [_brevity(text_of(completion), limit, unit) for completion in completions]


def well_formed_brevity(
    completions: Sequence[Completion],
    *,
    limit: float = 100,
    unit: Unit = "words",
    tags: Sequence[str] = TAGS,
    strict_newlines: bool = False,
    **columns: Any,
) -> Rewards:
    """`brevity` where the tags are right (as `format_tags` has it), else 0: silence earns nothing."""
    texts = [text_of(completion) for completion in completions]
    return [_brevity(text, limit, unit) if well_formed(text, tags, strict_newlines) else 0.0 for text in texts]


def length_count(
    completions: Sequence[Completion], *, unit: Unit = "words", scale: float = 1.0, **columns: Any
) -> Rewards:
    """-`scale` * length, without bound.

    Degenerate on purpose: summed with rewards in [0, 1] it drowns them, and completions shrink to nothing. It is here
    to show what a raw sum of rewards does; use `well_formed_brevity` to train with.
    """
    return [-scale * _length(text_of(completion), unit) for completion in completions]


def target_length(completions: Sequence[Completion], *, target: float, unit: Unit = "words", **columns: Any) -> Rewards:
    """1 at `target`, falling linearly to 0 at nothing and at twice the target."""
    _positive("target", target)
    lengths = [_length(text_of(completion), unit) for completion in completions]
    return [max(0.0, 1.0 - abs(length - target) / target) for length in lengths]


def kimi_length(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    correct: str | Callable[..., Rewards] = "exact_answer",
    correct_kwargs: Mapping[str, Any] | None = None,
    unit: Unit = "characters",
    **columns: Any,
) -> Rewards:
    """From 0.5 for the shortest completion to -0.5 for the longest; a wrong one earns at most 0.

    Shortest and longest of all completions handed over, as open-r1 has it (Kimi k1.5, arXiv:2501.12599, section 2.3.3,
    compares within one prompt), so that the reward depends on the batch. All equally long: 0. `correct` names
    `exact_answer`, `numeric_answer` or `math_correct`, with their settings in `correct_kwargs`; where it gives no
    signal, neither does this.
    """
    lengths = [_length(text_of(completion), unit) for completion in completions]
    shortest, longest = min(lengths, default=0), max(lengths, default=0)

    def reward(length: int, right: float | None) -> float | None:
        if right is None:
            return None
        value = 0.5 - (length - shortest) / (longest - shortest) if longest > shortest else 0.0
        return value if right >= 1.0 else min(0.0, value)

    rights = _correctness(correct, correct_kwargs, completions, answer)
    return [reward(length, right) for length, right in zip(lengths, rights, strict=True)]


def cosine_length(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    limit: float = 1000,
    correct_short: float = 1.0,
    correct_long: float = 0.5,
    wrong_short: float = 0.0,
    wrong_long: float = -0.5,
    correct: str | Callable[..., Rewards] = "exact_answer",
    correct_kwargs: Mapping[str, Any] | None = None,
    unit: Unit = "characters",
    **columns: Any,
) -> Rewards:
    """Along half a cosine from the `..._short` value at length 0 to the `..._long` value at `limit`, and no further.

    The wrong side is a choice. Its defaults are those of open-r1's training script, by which a long wrong attempt
    earns less than a short one; that contradicts the description of the function there, and Yeo et al. 2025
    (arXiv:2502.03373, appendix C.1), who penalise the long ones less so that a model keeps trying. For theirs, set
    `wrong_short = -1.0`, `wrong_long = -0.5`. `correct` and `correct_kwargs` as in `kimi_length`.
    """
    _positive("limit", limit)

    def reward(length: int, right: float | None) -> float | None:
        if right is None:
            return None
        short, long = (correct_short, correct_long) if right >= 1.0 else (wrong_short, wrong_long)
        return long + (short - long) * (1.0 + math.cos(math.pi * min(1.0, length / limit))) / 2.0

    lengths = [_length(text_of(completion), unit) for completion in completions]
    rights = _correctness(correct, correct_kwargs, completions, answer)
    return [reward(length, right) for length, right in zip(lengths, rights, strict=True)]


def _length(text: str, unit: str) -> int:
    if unit not in ("words", "characters"):
        raise ValueError(f"unit must be 'words' or 'characters', not {unit!r}")
    return len(text.split()) if unit == "words" else len(text)


def _brevity(text: str, limit: float, unit: str) -> float:
    _positive("limit", limit)
    return max(0.0, 1.0 - _length(text, unit) / limit)


def _positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} must be positive, not {value}")


def _correctness(
    correct: str | Callable[..., Rewards],
    settings: Mapping[str, Any] | None,
    completions: Sequence[Completion],
    answer: Sequence[Any],
) -> Rewards:
    if isinstance(correct, str):
        if correct not in _CORRECTNESS:
            raise ValueError(f"correct must be one of {', '.join(_CORRECTNESS)}, not {correct!r}")
        correct = _CORRECTNESS[correct]
    return correct(completions, answer, **(settings or {}))
