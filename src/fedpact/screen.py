"""Text from outside on a screen: names, reasons and file contents that others wrote must not command a terminal."""

from __future__ import annotations

import sys
import unicodedata
from typing import TextIO

from fedpact.secrets import masked

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats such as the bidirectional ones, surrogates, line ends
_JOINERS = "\u200c\u200d"  # Persian, Indic scripts and emoji need them
_SPACES = "\t\n\r\v\f\u2028\u2029"


def printable(text: str) -> str:
    """`text` as one line without control and bidirectional characters: a space for tabs and line ends, else U+FFFD."""
    if text.isprintable():
        return text
    return "".join(map(_seen, text))


def shown(text: str) -> str:
    """`text` as one line that a terminal may show: printable, and secrets masked."""
    return printable(masked(text))


def say(text: str = "", *, to: TextIO | None = None) -> None:
    """Prints `shown(text)` at once, to standard output or `to`. What people read goes through here."""
    print(shown(text), file=to or sys.stdout, flush=True)


def _seen(character: str) -> str:
    if character in _SPACES:
        return " "
    hidden = unicodedata.category(character) in _UNSEEN and character not in _JOINERS
    return "\ufffd" if hidden else character
