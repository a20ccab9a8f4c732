"""Rewards for answers and for form, in TRL's signature: completions and columns in, one number a completion out.

A completion is a string or a list of chat messages. `None` means that the reward does not apply: no signal. Parameters
after the star are settings, bound by `kwargs` in the member's file; the others before it are columns of the data set.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedpact.errors import ConfigError
from fedpact.rewards.verifier import verdict_on

Completion = str | Sequence[Mapping[str, Any]]
Rewards = list[float | None]

TAGS = ("think", "answer")


def text_of(completion: Completion) -> str:
    """What the model wrote: the string itself, or the content of the last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def exact_answer(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    tag: str = "answer",
    ignore_case: bool = True,
    **columns: Any,
) -> Rewards:
    """1.0 where the answer is the expected one up to white space and case, or one of a list of accepted ones.

    The answer is what stands in the last `<answer>...</answer>`; without the tags the reward is 0.0. `tag = ""` takes
    the whole completion. An answer of None in the data: no signal.
    """

    def normal(text: str) -> list[str]:
        return (text.casefold() if ignore_case else text).split()

    def reward(completion: Completion, gold: Any) -> float | None:
        if gold is None:
            return None
        said = tagged(text_of(completion), tag)
        return float(said is not None and normal(said) in [normal(text) for text in _accepted(gold)])

    return [reward(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


def numeric_answer(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    tag: str = "",
    tolerance: float = 1e-6,
    **columns: Any,
) -> Rewards:
    """1.0 where the last number of the completion equals the last number of the answer.

    Reads `1,000`, `$5`, `3/4` and `\\frac{3}{4}`; a per cent sign is dropped, so that 50% is 50. What follows `####`,
    if it occurs, is the answer (GSM8K). `tolerance` is relative, and absolute below 1. With a `tag`, only the last
    `<tag>...</tag>` counts. An answer without a number: no signal.
    """

    def reward(completion: Completion, gold: Any) -> float | None:
        numbers = [number for text in _accepted(gold) if (number := _last_number(text)) is not None]
        if not numbers:
            return None
        said = _last_number(tagged(text_of(completion), tag) or "")
        return float(said is not None and any(abs(said - n) <= tolerance * max(1.0, abs(n)) for n in numbers))

    return [reward(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


def math_correct(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    *,
    tag: str = "",
    limit_s: float = 5.0,
    **columns: Any,
) -> Rewards:
    """1.0 where math-verify finds the completion's expression equal to the answer's; a boxed one is tried first.

    An answer that cannot be parsed: no signal. A comparison that fails, or takes longer than `limit_s`: 0.0. With a
    `tag`, only the last `<tag>...</tag>` counts. Needs the extra `math`. The accuracy reward of open-r1, except that
    plain expressions count as well as LaTeX.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("math_correct needs math-verify, which is not installed; run: pip install 'fedpact[math]'")

    def reward(completion: Completion, gold: Any) -> float | None:
        said = tagged(text_of(completion), tag) or ""
        verdicts = [verdict_on(_boxed(text), _boxed(said) if tag else said, limit_s) for text in _accepted(gold)]
        return max((verdict for verdict in verdicts if verdict is not None), default=None)

    return [reward(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


def format_tags(
    completions: Sequence[Completion], *, tags: Sequence[str] = TAGS, strict_newlines: bool = False, **columns: Any
) -> Rewards:
    """1.0 where the whole completion is `<think>...</think> <answer>...</answer>`, each tag once.

    Any white space, or none, may stand around the tags; `strict_newlines` demands exactly one newline between a tag
    and what is next to it, and nothing outside. open-r1's pattern lets tags repeat inside; that each stands once is
    our reading.
    """
    return [float(well_formed(text_of(completion), tags, strict_newlines)) for completion in completions]


def well_formed(text: str, tags: Sequence[str] = TAGS, strict_newlines: bool = False) -> bool:
    """Whether `text` is the tagged sections in their order, and nothing else."""
    inner, outer = (r"\n.*\n", r"\n") if strict_newlines else (".*", r"\s*")
    pattern = outer.join(rf"<{re.escape(tag)}>{inner}</{re.escape(tag)}>" for tag in tags)
    once = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in tags)
    return once and re.fullmatch(pattern, text if strict_newlines else text.strip(), re.DOTALL) is not None


def tag_count(
    completions: Sequence[Completion], *, tags: Sequence[str] = TAGS, strict_newlines: bool = False, **columns: Any
) -> Rewards:
    """The share of the opening and closing tags that occur exactly once: 0, 0.25, 0.5, 0.75 or 1 for two tags.

    `strict_newlines` counts them with their newlines, as open-r1 does: `<think>\\n`, `\\n</think>\\n`,
    `\\n<answer>\\n`, `\\n</answer>`.
    """
    newline = "\n" if strict_newlines else ""
    marks = [f"{newline}<{slash}{tag}>{newline}" for tag in tags for slash in ("", "/")]
    marks[0], marks[-1] = marks[0].lstrip(), marks[-1].rstrip()
    return [sum(text_of(completion).count(mark) == 1 for mark in marks) / len(marks) for completion in completions]


def reasoning_steps(completions: Sequence[Completion], *, steps: int = 3, **columns: Any) -> Rewards:
    """min(1, markers / `steps`): "Step 1:", "1." or a bullet at the start of a line, "First,", "Next," and the like.

    open-r1's markers; that a number counts at the start of every line, not of the first only, is our reading.
    """
    return [min(1.0, len(_STEP.findall(text_of(completion))) / steps) for completion in completions]


_STEP = re.compile(r"\bStep \d+:|^[ \t]*(?:\d+\.|[-*•])\s|\b(?:First|Second|Next|Finally),", re.MULTILINE)


def repetition(completions: Sequence[Completion], *, n: int = 3, **columns: Any) -> Rewards:
    """-(1 - distinct / total) over runs of `n` words, in (-1, 0]: 0.0 if no run occurs twice, or there is none."""

    def reward(text: str) -> float:
        words = text.lower().split()
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return len(set(runs)) / len(runs) - 1.0 if runs else 0.0

    return [reward(text_of(completion)) for completion in completions]


def forbidden(completions: Sequence[Completion], *, words: Sequence[str] | str, **columns: Any) -> Rewards:
    """1.0 where none of `words` occurs as a whole word, in any case; else 0.0."""
    listed = [words] if isinstance(words, str) else list(words)
    found = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in listed), re.IGNORECASE)
    return [float(not listed or found.search(text_of(completion)) is None) for completion in completions]


def regex_match(completions: Sequence[Completion], *, pattern: str, whole: bool = False, **columns: Any) -> Rewards:
    """1.0 where `pattern` occurs in the completion; `whole`: where it matches all of it."""
    compiled = re.compile(pattern, re.DOTALL)
    search = compiled.fullmatch if whole else compiled.search
    return [float(search(text_of(completion)) is not None) for completion in completions]


def tagged(text: str, tag: str) -> str | None:
    """What stands in the last `<tag>...</tag>`; None without one; all of `text` if `tag` is empty."""
    if not tag:
        return text
    before, closed, _ = text.rpartition(f"</{tag}>")
    _, opened, inside = before.rpartition(f"<{tag}>")
    return inside if closed and opened else None


def _accepted(gold: Any) -> list[str]:
    options = gold if isinstance(gold, list | tuple) else [gold]
    return [str(option) for option in options if option is not None]


_NUMBER = re.compile(
    r"(?<!\w)((?<!\))[-\u2212])?(?:\$(-)?)?"
    r"((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+)(?: ?/ ?(\d+(?:\.\d+)?))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(_FRACTION.sub(r"\1/\2", text.rpartition("####")[2]))
    if not found:
        return None
    outer, inner, top, bottom = found[-1]
    divisor = float(bottom or 1)
    value = float(top.replace(",", "")) / divisor if divisor else math.inf
    return None if math.isinf(value) else -value if outer or inner else value


def _boxed(text: str) -> str:
    """`text` as math-verify finds it: without a delimiter of its own it would look for plain numbers only."""
    text = text.rpartition("####")[2].strip()
    return text if re.search(r"\$|\\boxed|\\\(|\\\[", text) else rf"\boxed{{{text}}}"
