"""Runs one attack in a jail and says whether it was stopped, by what was seen outside."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator

from fedpact.rewards.sandbox.attacks import COMMON_ATTACKS, Attack
from fedpact.rewards.sandbox.jail import Confined, Jail, Limits
from fedpact.rewards.sandbox.rare_attacks import RARE_ATTACKS
from fedpact.rewards.sandbox.scene import Scene, Trace

__all__ = ["ATTACKS", "ATTACK_LIMITS", "RUNNER", "Attack", "Scene", "converse", "stopped"]

ATTACKS = (*COMMON_ATTACKS, *RARE_ATTACKS)
ATTACK_LIMITS = Limits(seconds=10.0, cpu_seconds=1, memory_mb=256)

# Says that it is up, runs what it is sent (its length in decimal, a line end, the text), says that it is through, and
# waits to be killed. Before it is up its limits may not be on yet, so nothing is sent and nothing judged.
RUNNER = """
import sys
sys.stdout.buffer.write(b"up\\n")
sys.stdout.buffer.flush()
_text = sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))
_space = {"__name__": "__main__"}
try:
    exec(compile(_text, "<sent>", "exec"), _space)
except BaseException:
    pass
sys.stdout.flush()
sys.stdout.buffer.write(b"\\ndone\\n")
sys.stdout.buffer.flush()
sys.stdin.buffer.read()
"""
_UP, _DONE = b"up\n", b"\ndone\n"


def converse(confined: Confined, text: str, limits: Limits) -> bytes:
    """Everything that `RUNNER` prints while it runs `text`, cut at the limits of time and size."""
    trace = Trace(confined)
    for _ in _heard(confined, text, limits, trace):
        pass
    return trace.output.removesuffix(_DONE)[: limits.output_bytes]


def stopped(attack: Attack, jail: Jail, scene: Scene) -> bool:
    """Whether `jail` stopped the attack: nothing was seen while it ran, and no process was left after the kill.

    Raises OSError where the jail does not start or its inside cannot be looked at.
    """
    confined = jail.start(f"{RUNNER}# {scene.mark}\n", scene.limits)
    try:
        trace = Trace(confined)
        for _ in _heard(confined, scene.facts() + attack.program, scene.limits, trace):
            if attack.seen(scene, trace):
                return False
        if attack.seen(scene, trace):
            return False
    finally:
        confined.kill()
    return not _still_there(scene)


def _still_there(scene: Scene) -> bool:
    """Whether a process of the attack outlives its kill by a second: what is dying already is not counted."""
    deadline = time.monotonic() + 1.0
    while scene.processes():
        if time.monotonic() > deadline:
            return True
        time.sleep(0.01)
    return False


def _heard(confined: Confined, text: str, limits: Limits, trace: Trace) -> Iterator[None]:
    """Sends `text`, then yields at least ten times a second while output may still come."""
    sent = text.encode()
    poll = select.poll()
    poll.register(confined.stdout, select.POLLIN)
    if not poll.poll(1000 * limits.seconds) or os.read(confined.stdout.fileno(), len(_UP)) != _UP:
        raise OSError("the interpreter ended before it was given anything")
    deadline = time.monotonic() + limits.seconds
    confined.stdin.write(b"%d\n%s" % (len(sent), sent))
    while time.monotonic() < deadline and len(trace.output) <= limits.output_bytes:
        if poll.poll(100):
            part = os.read(confined.stdout.fileno(), min(65536, limits.output_bytes + 1 - len(trace.output)))
            trace.output += part
            if not part or trace.output.endswith(_DONE):
                return
        yield
