"""Rewards for answers and for form, in TRL's signature: completions and columns in, one number a completion out.

A completion is a string or a list of chat messages. `None` means that the reward does not apply: no signal. Parameters
after the star are settings, bound by `kwargs` in the member's file; the others before it are columns of the data set.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from fedpact.errors import ConfigError

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
        verdicts = [_VERIFIER.ask(_boxed(text), _boxed(said) if tag else said, limit_s) for text in _accepted(gold)]
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


class _Verifier:
    """A child process that runs math-verify: a power tower holds the interpreter lock, and no thread could stop it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, gold: str, said: str, limit_s: float) -> float | None:
        """Whether the two are equal; None if `gold` is no mathematics; 0.0 if that took too long."""
        with self._lock:
            if self._child is None or self._owner != os.getpid():  # a fork must not share the pipes
                self._child, self._owner = _start_child(), os.getpid()
            timer = threading.Timer(limit_s, self._child.kill)
            timer.start()
            line = _exchange(self._child, json.dumps([gold, said]))
            timer.cancel()
            timer.join()  # so that a late kill is seen here, not by the next question
            if not line or self._child.poll() is not None:
                self._child.communicate()
                self._child = None
            return json.loads(line) if line else 0.0


_VERIFIER = _Verifier()


def _start_child() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from fedpact.rewards.builtin import _answer_lines; _answer_lines()"]
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
    if not _exchange(child, ""):  # imports before the first clock starts
        raise ConfigError("math_correct could not start math-verify; see the error above, then check its installation")
    return child


def _exchange(child: subprocess.Popen[str], line: str) -> str:
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(line + "\n")
        child.stdin.flush()
        return child.stdout.readline()
    except OSError:
        return ""


def _answer_lines() -> None:
    """The child's loop: after a first empty line, a JSON pair a line in, a verdict a line out."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable()
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    print(sys.stdin.readline(), end="", flush=True)
    for line in sys.stdin:
        gold, said = json.loads(line)
        verdict = None
        with contextlib.suppress(Exception):
            if expected := parse(gold, kinds, parsing_timeout=None):
                verdict = 0.0
                found = parse(said, kinds, extraction_mode="first_match", parsing_timeout=None)
                verdict = float(verify(expected, found, timeout_seconds=None))
        print(json.dumps(verdict), flush=True)
