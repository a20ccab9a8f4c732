"""What must not stand in a log, a record or on a screen: keys and tokens, by their shape or by where they are kept."""

from __future__ import annotations

import json
import os
import re
from urllib.parse import quote

MASK = "***"

_NAMES = re.compile("TOKEN|SECRET|KEY|PASS", re.IGNORECASE)
_SHORTEST = 8
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{10,}|sk-[A-Za-z0-9_-]{10,}|AKIA[A-Z0-9]{12,})"
    r"|eyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]*"  # a JSON web token
    r"|(?<=://)[^\s/]+(?=@)"  # user and password of a URL
    r"|(?<=Bearer )\S{8,}"
)


def masked(text: str) -> str:
    """`text` with `***` for whatever looks like a secret: hf_..., sk-..., AKIA..., JWTs, and the user of a URL.

    So is every value of 8 characters or more of an environment variable whose name has TOKEN, SECRET, KEY or PASS in
    it, also as `repr`, JSON and URLs write it, and each long line of one. Cut a text after this, never before: half a
    secret is not recognised.
    """
    for value in _values():
        text = text.replace(value, MASK)
    return _SHAPES.sub(MASK, text)


def _values() -> list[str]:
    """What the environment keeps under such names, the longest first, so that none is left in part."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if _NAMES.search(name):
            whole = value.strip()
            for one in {whole, " ".join(whole.split()), *map(str.strip, whole.splitlines())}:
                if len(one) >= _SHORTEST:
                    found |= {one, repr(one)[1:-1], json.dumps(one)[1:-1], quote(one, safe="")}
    return sorted(found, key=lambda one: (-len(one), one))
