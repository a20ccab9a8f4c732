"""What others wrote, as words and numbers of a line that a person reads: screened, quoted and cut."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

from fedpact.screen import shown

WIDTH = 200
"""Characters of a line at most; a longer one ends in "..."."""

_LONGEST_NAME = 40
_MOST_LISTED = 24
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def line(text: str) -> str:
    """`text` as one line that a terminal may show, of `WIDTH` characters at most."""
    seen = shown(text)
    return seen if len(seen) <= WIDTH else seen[: WIDTH - 3] + "..."


def named(text: str, most: int = _LONGEST_NAME) -> str:
    """A name from outside: as it is if it is one plain word, quoted otherwise, and cut to `most` characters."""
    seen = shown(text)
    cut = seen if len(seen) <= most else seen[:most] + "..."
    return cut if _PLAIN.fullmatch(seen) else json.dumps(cut, ensure_ascii=False)


def joined(names: Sequence[str]) -> str:
    """Names from outside, the first ones of very many."""
    return ", ".join([*map(named, names[:_MOST_LISTED]), *(["..."] if len(names) > _MOST_LISTED else [])])


def listed(lines: Sequence[str], what: str) -> list[str]:
    """The first lines of very many, and how many more there are."""
    rest = len(lines) - _MOST_LISTED
    more = [f"and {count(rest)} more {what}: read the contract's JSON"] if rest > 0 else []
    return [*lines[:_MOST_LISTED], *more]


def count(number: int) -> str:
    """`number` with thousands apart; a number that nobody could read by its size alone."""
    return f"{number:,}" if abs(number) < 10**15 else f"{'-' * (number < 0)}10^{math.log10(abs(number)):.0f} or so"


def figure(number: float | None) -> str:
    """A number of either kind; "none" for None."""
    if number is None:
        return "none"
    return count(number) if isinstance(number, int) else f"{number:g}"


def product(*factors: tuple[int | None, str], of: str) -> str:
    """`16 rounds x 4 local steps = 64 steps`; None is a number that is not known."""
    known = [number for number, _ in factors if number is not None]
    told = " x ".join(f"{'?' if number is None else count(number)} {what}" for number, what in factors)
    return f"{told} = {'?' if len(known) < len(factors) else count(math.prod(known))} {of}"
