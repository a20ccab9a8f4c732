"""What whoever submits a run to Flower and its ServerApp have in common: names, lines, and how a run fails.

Of a ServerApp Flower passes on the text of an exception, and nothing else. So that text is one line with the exit code
in it: `fedpact exit 2: run-name: found ...`. No import of Flower here.
"""

from __future__ import annotations

import re
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpact.errors import (
    CheckFailedError,
    ConfigError,
    FedPactError,
    RefusedError,
    StoreError,
    TooFewRepliesError,
)
from fedpact.screen import shown
from fedpact.secrets import masked

SWITCHES = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of all that is Flower's: it calls nobody and installs nothing. Read when Flower is imported."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LINE = re.compile(r"fedpact exit (\d{1,3}): (.+)", re.DOTALL)
_MAX_LINE = 2000
_CLASSES = (ConfigError, RefusedError, StoreError, TooFewRepliesError, CheckFailedError)


def run_name(text: object) -> str:
    """`text`, if a run may be called so. Raises ConfigError."""
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise ConfigError(
            f"run-name: found {text!r:.80}; expected a-z, 0-9, '.', '_' and '-', a letter or digit first, 64 at most"
        )
    return text


def round_line(round: int, rounds: int, metrics: Sequence[Mapping[str, Any]]) -> str:
    """What a committed round's rows of metrics come to: the means of what was held out, if it was evaluated."""
    values: dict[str, list[float]] = {}
    for row in metrics:
        if row["who"] == "all" and row["key"].startswith("heldout/") and row["key"] != "heldout/accuracy":
            values.setdefault(row["key"].removeprefix("heldout/"), []).append(row["value"])
    means = ", ".join(f"{name} {sum(found) / len(found):.3f}" for name, found in values.items())
    return f"round {round} of {rounds}" + (f"; held out: {means}" if means else "")


def exit_line(error: Exception, folder: Path) -> str:
    """The line for `error`. What is no FedPactError is our bug: its traceback goes to a new file in `folder`."""
    code, text = (error.exit_code, str(error)) if isinstance(error, FedPactError) else (1, _bug(error, folder))
    return f"fedpact exit {code}: {shown(text)}"


def error_in(text: str) -> FedPactError | None:
    """The error of which a line in `text` tells; None if it has no such line."""
    found = _LINE.search(text)
    if found is None:
        return None
    kind = next((one for one in _CLASSES if one.exit_code == int(found[1])), FedPactError)
    return kind(shown(" ".join(found[2].split())[:_MAX_LINE]))


def _bug(error: Exception, folder: Path) -> str:
    """One line about it. Without a folder to write to, the line has to do."""
    said = f"internal error ({type(error).__name__}: {masked(str(error))[:120]})"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="fedpact-", suffix=".log", dir=folder, delete=False) as log:
            log.write(masked("".join(traceback.format_exception(error))))
    except OSError:
        return said
    return f"{said}; the traceback is in {log.name}"
