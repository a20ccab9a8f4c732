"""Generated tasks with checkable answers, from reasoning-gym (extra `gym`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fedpact.errors import ConfigError, DataError
from fedpact.rewards.builtin import Completion, Rewards, tagged, text_of
from fedpact.types import Prompts


def gym_prompts(name: str, size: int, seed: int, config: Mapping[str, Any], *, where: str = "reasoning-gym") -> Prompts:
    """`size` questions of the task `name`, the same for the same seed.

    Columns: `answer`, reasoning-gym's own, and `entry`, the whole item as JSON, for `gym_score`. The questions are
    written for large models; a small one wants a shorter `template`. Raises DataError.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise DataError(
            f"{where}: gym:{name} needs reasoning-gym, which is not installed; run: pip install 'fedpact[gym]'"
        ) from error
    try:
        dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **config)
        entries = [dataset[i] for i in range(size)]
    except (AssertionError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["rejected by the task"])[0][:200]
        raise DataError(f"{where}: gym:{name} with {dict(config)}: {reason}; see reasoning-gym's gallery") from error
    return Prompts(
        text=[entry["question"] for entry in entries],
        ids=torch.arange(len(entries)),
        columns={
            "answer": [entry["answer"] for entry in entries],
            "entry": [json.dumps(entry, default=str) for entry in entries],
        },
    )


def gym_score(
    completions: Sequence[Completion],
    entry: Sequence[str],
    *,
    threshold: float = 1.0,
    tag: str = "answer",
    **columns: Any,
) -> Rewards:
    """1.0 where reasoning-gym scores the answer at `threshold` or more, else 0.0.

    Its scores in between are no partial success: text that merely contains the answer gets some, which a policy learns
    to exploit; hence the threshold of 1. The answer is what stands in the last `<answer>...</answer>`, without which
    the reward is 0.0; `tag = ""` takes the whole completion.
    """

    def reward(completion: Completion, item: str) -> float:
        said = tagged(text_of(completion), tag)
        if said is None:
            return 0.0
        parsed = json.loads(item)
        score = _scorer(parsed["metadata"]["source_dataset"])(answer=said.strip(), entry=parsed)
        return float(score >= threshold)

    return [reward(completion, item) for completion, item in zip(completions, entry, strict=True)]


@functools.cache
def _scorer(name: str) -> Callable[..., float]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            "gym_score needs reasoning-gym, which is not installed; run: pip install 'fedpact[gym]'"
        ) from error
    scorer: Callable[..., float] = reasoning_gym.get_score_answer_fn(name)
    return scorer
