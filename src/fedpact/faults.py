"""Named places where a test can make this process die, or the disk fail under it.

Unless FEDPACT_FAULT is set when this module is imported, `fault_point` is an empty function and nothing else is here.
FEDPACT_FAULT says what happens where, "NAME[:COUNT]=kill|enospc|eacces|erofs|delay:SECONDS|raise": at the COUNT-th time
that NAME is reached, by default the first. Empty, it only counts, until a forked child calls `arm`.
"""

from __future__ import annotations

import os

POINTS: tuple[str, ...] = (
    # runtime.files: where a disk can fail
    "append.open",
    "append.synced",
    "append.written",
    "files.open",
    "files.renamed",
    "files.synced",
    "files.written",
    "folder.aside",
    "folder.begin",
    "folder.made",
    "folder.renamed",
    "folder.written",
    # runtime.store
    "store.cleared",
    "store.commit",
    "store.committed",
    "store.final",
    "store.made",
    "store.metrics",
    "store.recover",
    "store.run",
    # runtime.spool
    "spool.close",
    "spool.closed",
    "spool.kept",
    "spool.put",
    # runtime.memory
    "memory.replied",
    "memory.save",
    "memory.saved",
    # runtime.ledger
    "ledger.append",
    "ledger.appended",
    # runtime.member
    "member.noted",
    "member.opened",
    # runtime.exchange
    "exchange.admitted",
    "exchange.asked",
    "exchange.closed",
    # runtime.run
    "run.aggregated",
    "run.committed",
    "run.evaluated",
    "run.finished",
    "run.introduced",
)
"""Every name that `fault_point` is called with."""

if "FEDPACT_FAULT" in os.environ:
    import errno
    import signal
    import time
    from collections import Counter

    from fedpact.errors import ConfigError

    ERRORS = {"enospc": errno.ENOSPC, "eacces": errno.EACCES, "erofs": errno.EROFS}
    reached: Counter[str] = Counter()
    """How often each point was reached since `arm`."""
    _plan: tuple[str, int, str] = ("", 0, "")

    def arm(text: str) -> None:
        """From here on the fault that `text` describes, as FEDPACT_FAULT does. Raises ConfigError."""
        global _plan
        reached.clear()
        where, _, action = text.partition("=")
        name, _, count = where.partition(":")
        kind, _, seconds = action.partition(":")
        timed = kind == "delay" and seconds.replace(".", "", 1).isdecimal()
        known = timed or (not seconds and kind in {"kill", "raise", *ERRORS})
        if text and not (name in POINTS and known and (count or "1").isdecimal()):
            raise ConfigError(
                f"FEDPACT_FAULT: found {text[:80]!r}, expected "
                "NAME[:COUNT]=kill|enospc|eacces|erofs|delay:SECONDS|raise, with a name in fedpact.faults.POINTS"
            )
        _plan = (name, int(count or 1), action)

    def fault_point(name: str) -> None:
        """Reach a point: what is planned for it happens."""
        reached[name] += 1
        where, count, action = _plan
        if name != where or reached[name] != count:
            return
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "raise":
            raise RuntimeError(f"fault at {name}")
        elif action.startswith("delay:"):
            time.sleep(float(action.removeprefix("delay:")))
        else:
            raise OSError(ERRORS[action], os.strerror(ERRORS[action]))

    arm(os.environ["FEDPACT_FAULT"])
else:

    def fault_point(name: str) -> None:
        """Nothing: no fault is planned."""
