"""Text from outside on a screen: names, reasons and file contents that others wrote must not command a terminal."""

from __future__ import annotations

import sys
from typing import IO

from fedpact.secrets import masked

_JOINERS = "\u200c\u200d"  # Persian, Indic scripts and emoji need them


def printable(text: str) -> str:
    """`text` as one line without what cannot be seen: controls, bidirectional and unassigned characters are U+FFFD.

    Every kind of space and line end is a plain space.
    """
    if text.isprintable():
        return text
    return "".join(map(_seen, text))


def shown(text: str) -> str:
    """`text` as one line that a terminal may show: printable, and secrets masked."""
    return printable(masked(text))


def say(text: str = "", *, to: IO[str] | None = None) -> None:
    """Prints `shown(text)` at once, to standard output or `to`. What people read goes through here."""
    print(shown(text), file=to or sys.stdout, flush=True)


def _seen(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    return " " if character.isspace() else "\ufffd"
