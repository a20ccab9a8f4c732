"""How a command ends: one line and an exit code, whatever went wrong."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from types import FrameType
from typing import Any

from fedpact.screen import say
from fedpact.secrets import masked


class Stopped(BaseException):
    """SIGINT or SIGTERM. No KeyboardInterrupt: Typer turns that into a return value."""

    remedy = "`fedpact resume`"


def usage_or_bug(error: Exception) -> None:
    """Ends the process with what Click says, or with where the traceback of our bug lies."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int) and hasattr(error, "format_message"):  # click's own errors, from whichever click
        fail(" ".join(str(error.format_message()).split()), code)
    if type(error).__name__ == "Abort":
        fail("interrupted", 130)
    with tempfile.NamedTemporaryFile("w", prefix="fedpact-", suffix=".log", delete=False) as log:
        log.write(masked(traceback.format_exc()))
    fail(f"internal error ({type(error).__name__}: {masked(str(error))[:120]}); the traceback is in {log.name}", 1)


def fail(message: str, code: int) -> None:
    """Ends the process with one line on standard error and this exit code."""
    if message:  # none where help was all there is to say
        say(f"fedpact: {message}", to=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def stop(number: int, frame: FrameType | None) -> Any:
    """The handler of SIGINT and SIGTERM."""
    for other in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(other) is stop:
            signal.signal(other, _stop_now)
    raise Stopped(number)


def _stop_now(number: int, frame: FrameType | None) -> Any:
    """The second time: at once, for what is on the disk is whole. The first may have come where Python drops it."""
    os.write(
        2, b"fedpact: interrupted again; ended at once, and the same command or `fedpact resume` goes on from there\n"
    )
    os._exit(128 + number)
