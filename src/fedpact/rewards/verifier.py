"""math-verify in a process of its own: what cannot be interrupted can only be killed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading

from fedpact.errors import ConfigError


def verdict_on(gold: str, said: str, limit_s: float) -> float | None:
    """1.0 if the two expressions are equal, else 0.0; None if `gold` is no mathematics, 0.0 if that took too long."""
    return _VERIFIER.ask(gold, said, limit_s)


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
    command = [sys.executable, "-c", "from fedpact.rewards.verifier import _answer_lines; _answer_lines()"]
    pipe = subprocess.PIPE
    # Nothing else: the child parses what a policy wrote, and needs no key.
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath, "LC_ALL": "C.UTF-8"}
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
