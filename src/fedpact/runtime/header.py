"""The JSON header of a message: one text for one value, and refused before it costs anything to look at."""

from __future__ import annotations

import json
import re
from typing import Any

KEY = "fedpact"
"""Where it stands among the metadata of a safetensors blob."""

_MOST_TENSORS = 2**15
_MOST_VALUES = 2**17
"""The texts of one list count as one. So many take a second or two; a message of millions would take minutes."""
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_MOST_DIGITS = 40
"""Of a whole number. Reading thousands of them takes time that grows with their square."""


def dumps(value: Any) -> str:
    """The one text of `value`. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def refuse_swarms(data: bytes) -> None:
    """Raises ValueError for a safetensors blob of more tensors than any adapter has, before any of them is made."""
    outer = _outer(data)
    # A tensor is an object. In texts a brace is just a brace; leaving them out is for where there are very many.
    if outer.count(b"{") > _MOST_TENSORS + 2 and _TEXT.sub(b"", outer).count(b"{") > _MOST_TENSORS + 2:
        raise ValueError(f"more than {_MOST_TENSORS} tensors")


def read_header(data: bytes) -> dict[str, Any]:
    """The header in a safetensors blob whose lengths have been checked.

    Raises ValueError for anything that `dumps` would not have written, and for more values than any message has.
    """
    metadata = json.loads(_outer(data), parse_int=_whole)["__metadata__"]
    if set(metadata) != {KEY}:
        raise ValueError(f"the metadata hold {ascii(' '.join(metadata))[:80]}, expected {KEY}")
    header: Any = json.loads(metadata[KEY], parse_int=_whole)
    _refuse_many(header)
    # Refuses NaN, infinity and repeated keys, which `json.loads` takes without a word.
    if not isinstance(header, dict) or dumps(header) != metadata[KEY]:
        raise ValueError("the header is not canonical JSON")
    return header


def _outer(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse_many(header: Any) -> None:
    rest, found = [header], 0
    while rest:
        one, found = rest.pop(), found + 1
        if isinstance(one, dict):
            rest.extend(one.values())
        elif isinstance(one, list) and not set(map(type, one)) <= {str}:
            rest.extend(one)
        if found + len(rest) > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values")
