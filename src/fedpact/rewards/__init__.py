"""Rewards: the built-in ones by name, and what loads a member's own.

`fedpact.rewards:exact_answer` works as an import path in a member's file. Importing this package loads neither torch
nor httpx nor math-verify: the built-ins are plain Python, and the loader and the judges come on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedpact.rewards.builtin import (
    exact_answer,
    forbidden,
    format_tags,
    math_correct,
    numeric_answer,
    reasoning_steps,
    regex_match,
    repetition,
    tag_count,
    text_of,
)
from fedpact.rewards.length import (
    brevity,
    cosine_length,
    kimi_length,
    length_count,
    target_length,
    well_formed_brevity,
)

if TYPE_CHECKING:
    from fedpact.rewards.agreement import Agreement
    from fedpact.rewards.answers import AnswerKey
    from fedpact.rewards.code import CodeTests, code_tests
    from fedpact.rewards.http import HttpJudge
    from fedpact.rewards.load import LoadedReward, RewardSet, load_reward
    from fedpact.rewards.outcome import Outcome
    from fedpact.rewards.reward_model import RewardModel

__all__ = [
    "Agreement",
    "AnswerKey",
    "CodeTests",
    "HttpJudge",
    "LoadedReward",
    "Outcome",
    "RewardModel",
    "RewardSet",
    "brevity",
    "code_tests",
    "cosine_length",
    "exact_answer",
    "forbidden",
    "format_tags",
    "kimi_length",
    "length_count",
    "load_reward",
    "math_correct",
    "numeric_answer",
    "reasoning_steps",
    "regex_match",
    "repetition",
    "tag_count",
    "target_length",
    "text_of",
    "well_formed_brevity",
]


_LATER = {
    "Agreement": "agreement",
    "AnswerKey": "answers",
    "CodeTests": "code",
    "HttpJudge": "http",
    "LoadedReward": "load",
    "Outcome": "outcome",
    "RewardModel": "reward_model",
    "RewardSet": "load",
    "code_tests": "code",
    "load_reward": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
