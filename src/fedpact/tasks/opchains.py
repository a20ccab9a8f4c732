"""Op chains: the embedded task, small enough for a model of 84,000 parameters to learn on a laptop.

A prompt names an operation and four digits; the answer folds the operation over them from the left. The chain of
thought is the three running states, each one table look-up, where a direct answer must compose three: length against
correctness is a real conflict here, not a scripted one.

    prompt       add 5 0 3 3
    completion   <think> 5 8 1 </think> <answer> 1 </answer>

Eight operations stand for the domains of eight members. They differ in difficulty: `max` is nearly known before any
reinforcement learning; `sub` and `neg`, whose operands cannot be swapped, are the hard ones and stay below half sampled
accuracy after it, where the other six end between .7 and 1 (one central GRPO run of 250 steps).

Always giving an operation's most frequent answer is right for 10 % of the prompts of `add`, `sub`, `neg` and `flp`,
19 % of `dif`, 20 % of `avg`, 34 % of `max`, and 55 % of `mul`, where most products end in 0. `flp` always answers with
its first digit or nine minus it, so that guessing between the two is right half of the time.

A prompt is held out if its CRC-32 is a multiple of 5; no training pool contains it. Held-out prompts are not foreign to
the pool in any other way: `add 5 0 3 3` may be held out while `add 0 5 3 3` is trained on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate, product
from math import floor

import torch

from fedpact.seeding import key, permutation
from fedpact.types import Message, Prompts, Text

Digits = tuple[int, ...]

NUM_DIGITS = 4

_TABLES: Mapping[str, Callable[[int, int], int]] = {
    "add": lambda s, x: (s + x) % 10,
    "sub": lambda s, x: (s - x) % 10,
    "dif": lambda s, x: abs(s - x),
    "avg": lambda s, x: (s + x) // 2,
    "mul": lambda s, x: s * x % 10,
    "max": max,
    "flp": lambda s, x: 9 - s if x % 2 else s,
    "neg": lambda s, x: (x - s) % 10,
}
OPS: tuple[str, ...] = tuple(_TABLES)


def solve(op: str, digits: Sequence[int]) -> tuple[Digits, int]:
    """The running states of the fold, and its answer, which is the last of them: `add`, 5 0 3 3 -> (5, 8, 1), 1."""
    states = tuple(accumulate(digits, _TABLES[op]))[1:]
    return states, states[-1]


def question(op: str, digits: Sequence[int]) -> str:
    """What the user says: `add 5 0 3 3`."""
    return " ".join((op, *map(str, digits)))


def is_heldout(op: str, digits: Sequence[int]) -> bool:
    """Whether this prompt is kept from every training pool: one in five, by the CRC-32 of its text."""
    return zlib.crc32(question(op, digits).encode()) % 5 == 0


@cache
def pool(op: str, *, heldout: bool = False) -> tuple[Digits, ...]:
    """All digits of the training prompts of `op` (about 8,000), or of its held-out prompts (about 2,000), in order."""
    everything = product(range(10), repeat=NUM_DIGITS)
    return tuple(digits for digits in everything if is_heldout(op, digits) == heldout)


def prompts(op_weights: Mapping[str, float], size: int, *, seed: int, heldout: bool = False) -> Prompts:
    """`size` different prompts, shuffled, whose operations are in the proportion of `op_weights`.

    Columns: `answer` (a digit), `op`, and `chain` (the running states, "5 8 1"). `ids` number all 80,000 prompts of the
    task, and `domains` is the index in OPS, so both mean the same for every member.

    Raises ValueError for an unknown operation, weights that are no proportion, or more prompts than there are.
    """
    _check(op_weights, size)
    rows: list[tuple[str, Digits]] = []
    for op, count in _shares(op_weights, size).items():
        candidates = pool(op, heldout=heldout)
        if count > len(candidates):
            raise ValueError(
                f"{count} prompts of `{op}` asked for, {len(candidates)} exist; ask for fewer or mix more ops"
            )
        order = permutation(len(candidates), seed, "opchains", op, int(heldout))
        rows += [(op, candidates[i]) for i in order[:count]]
    return _prompts([rows[i] for i in permutation(size, seed, "opchains", "order")])


def heldout(op: str, size: int = 96) -> Prompts:
    """The first `size` held-out prompts of `op` in a fixed order: the same for everybody, whatever the run's seed."""
    return prompts({op: 1.0}, size, seed=0, heldout=True)


def member_prompts(op: str, size: int, *, own_share: float = 0.8, seed: int) -> Prompts:
    """The training prompts of the member whose domain is `op`: `own_share` of that op, the rest from all eight evenly.

    Eight members with `own_share` 1 share no prompt; with 0 they are identically distributed.
    """
    if not 0 <= own_share <= 1:
        raise ValueError(f"own_share is {own_share}; expected a number between 0 and 1")
    weights = dict.fromkeys(OPS, (1 - own_share) / len(OPS))
    weights[op] = weights.get(op, 0.0) + own_share
    # Keyed by the member as well: two members must not draw the same prompts of a third operation.
    return prompts(weights, size, seed=key(seed, "opchains", "member", op))


def _check(op_weights: Mapping[str, float], size: int) -> None:
    unknown = sorted(set(op_weights) - set(OPS))
    if unknown:
        raise ValueError(f"unknown operation `{unknown[0]}`; expected one of {', '.join(OPS)}")
    if min(op_weights.values(), default=0.0) < 0 or not 0 < sum(op_weights.values()) < float("inf"):
        raise ValueError(f"operation weights {dict(op_weights)}; expected non-negative numbers, not all zero")
    if size < 1:
        raise ValueError(f"{size} prompts asked for; expected at least 1")


def _shares(weights: Mapping[str, float], size: int) -> dict[str, int]:
    # Largest remainders, earlier operations first on ties: the counts are as near the proportion as whole numbers get.
    total = sum(weights.values())
    exact = {op: size * weight / total for op, weight in weights.items()}
    counts = {op: floor(share) for op, share in exact.items()}
    by_remainder = sorted(exact, key=lambda op: (counts[op] - exact[op], OPS.index(op)))
    for op in by_remainder[: size - sum(counts.values())]:
        counts[op] += 1
    return counts


def _prompts(rows: Sequence[tuple[str, Digits]]) -> Prompts:
    solutions = [solve(op, digits) for op, digits in rows]
    domains = torch.tensor([OPS.index(op) for op, _ in rows])
    numbers = torch.tensor([int("".join(map(str, digits))) for _, digits in rows])
    return Prompts(
        text=[_chat(op, digits) for op, digits in rows],
        ids=domains * 10**NUM_DIGITS + numbers,
        columns={
            "answer": [str(answer) for _, answer in solutions],
            "op": [op for op, _ in rows],
            "chain": [" ".join(map(str, states)) for states, _ in solutions],
        },
        domains=domains,
    )


def _chat(op: str, digits: Sequence[int]) -> Text:
    message: Message = {"role": "user", "content": question(op, digits)}
    return [message]
