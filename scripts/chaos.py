"""Kills runs at every fault point and at random times, goes on with them, and compares every byte with unbroken ones.

`python -m scripts.chaos [--kills 25] [--seed 0]`; exit code 6 if a byte differs, a ledger's chain breaks, or a
temporary file is left.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.cli.conftest import results
from tests.runtime.broken_runs import (
    ALGORITHMS,
    Project,
    begun,
    counted,
    deaths,
    differences,
    ended,
    printed,
    project,
)

WHOM = ("all", "server", "both", "east", "again")
"""Server and members in one process; the server alone; it and then its members at once; one member; and all of a
finished run that is gone on with, which writes its exports again."""


@dataclass(frozen=True)
class Kill:
    """One kill: of whom, and where. Without a point after `share` of the time that an unbroken run takes."""

    algorithm: str
    whom: str
    point: str = ""
    count: int = 1
    share: float = 0.0

    @property
    def where(self) -> str:
        return f"{self.point}:{self.count}" if self.point else f"after {100 * self.share:.0f} %"


@dataclass
class Reference:
    """An unbroken run: its files, how often each process reached each point, and how long it took."""

    out: Path
    files: dict[str, bytes]
    counts: dict[str, dict[str, int]]
    seconds: dict[bool, float]


def reference(made: Project, algorithm: str, folder: Path) -> Reference:
    """The same run, with the members in its process and apart, and gone on with. All must come to the same bytes."""
    seconds: dict[bool, float] = {}
    counts: dict[str, dict[str, int]] = {}
    for apart in (False, True):
        out = folder / ("apart" if apart else "together") / "run"
        began = time.monotonic()
        code = ended(begun(made, algorithm, out, apart=apart, counts=True))
        seconds[apart] = time.monotonic() - began
        if code:
            raise SystemExit(f"{algorithm}: the unbroken run ended with {code}: {printed(out)}")
        counts |= counted(out) if apart else {"all": counted(out)["server"]}
    files = results(folder / "together" / "run")
    if wrong := differences(folder / "apart" / "run", files):
        raise SystemExit(f"{algorithm}: members in processes of their own give other bytes: {wrong[:3]}")
    again = folder / "together" / "run"
    code = ended(begun(made, algorithm, again, counts=True))
    if wrong := [f"it ended with {code}"] if code else differences(again, files):
        raise SystemExit(f"{algorithm}: a finished run that was gone on with is not as before: {wrong[:3]}")
    counts["again"] = counted(again)["server"]
    return Reference(again, files, counts, seconds)


def planned(references: dict[str, Reference], draw: random.Random, only: str = "") -> Iterator[Kill]:
    """Every point in turn, at everyone who reaches it, by an algorithm and at a time of it that are drawn; and a fifth
    of the kills at random times. Without an end."""
    algorithms = list(references)
    reached = {
        whom: {point for one in references.values() for point in one.counts["server" if whom == "both" else whom]}
        for whom in WHOM
    }
    places = [(whom, point) for whom in WHOM for point in sorted(reached[whom]) if only in point]
    draw.shuffle(places)
    first = {point: place for place in reversed(places) for point in place[1:]}  # each point once, before any twice
    places = [*first.values(), *(place for place in places if place not in first.values())]
    for number in count():
        if number % 5 == 4 and not only:
            whom = WHOM[number // 5 % len(WHOM)]
            yield Kill(draw.choice(algorithms), whom, share=draw.uniform(0.02, 0.98))
            continue
        whom, point = places[(number if only else number - number // 5) % len(places)]
        who = "server" if whom == "both" else whom
        able = [name for name in algorithms if references[name].counts[who].get(point)]
        algorithm = draw.choice(able)
        yield Kill(algorithm, whom, point, draw.randint(1, references[algorithm].counts[who][point]))


def killed(made: Project, kill: Kill, one: Reference, out: Path) -> tuple[int, int]:
    """Kills the run in `out` once and goes on until it is finished; (deaths, resumptions). Raises if it never is."""
    apart, fault = kill.whom not in ("all", "again"), f"{kill.point}:{kill.count}=kill" if kill.point else ""
    at_member = kill.whom not in ("all", "server", "both", "again")
    if kill.whom == "again":
        shutil.copytree(one.out, out)
    armed = {kill.whom: fault} if at_member else {}
    child = begun(made, kill.algorithm, out, apart=apart, server="" if at_member else fault, members=armed)
    if not kill.point:
        time.sleep(kill.share * (0.1 if kill.whom == "again" else 1) * one.seconds[apart])
        victims = _children(child) if at_member else [child]
        for victim in victims[:1]:
            os.kill(victim, signal.SIGKILL)
    if kill.whom == "both":
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    code = ended(child)
    died, resumed = deaths(out) + (code == -signal.SIGKILL), 0
    while code:
        if code != -signal.SIGKILL or resumed > 3:
            raise RuntimeError(f"ended with {code}: {printed(out)[-600:]}")
        resumed += 1
        code = ended(begun(made, kill.algorithm, out, apart=apart))
    return died, resumed


def _children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a new folder for what each run left")
    parser.add_argument("--only", default="", help="only points with this in their name, and none at random times")
    options = parser.parse_args()
    began, draw = time.monotonic(), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="fedpact-chaos-") as scratch:
        folder = options.keep or Path(scratch)
        made = project(folder)
        references = {name: reference(made, name, folder / "unbroken" / name) for name in ALGORITHMS}
        for name, one in references.items():
            adapter = hashlib.sha256(one.files["final/adapter_model.safetensors"]).hexdigest()
            print(f"{name}: final adapter {adapter[:16]}, {len(one.files)} files, {one.seconds[False]:.2f} s")
        print(f"{'':4} {'algorithm':9} {'whom':6} {'where':22} {'deaths':>6} {'resumed':>7} {'s':>5}  bytes")
        wrong, tally, points, total = [], Counter[str](), set[str](), 0
        for number, kill in enumerate(planned(references, draw, options.only), start=1):
            if total >= options.kills or number > 2 * options.kills:
                break
            started, out = time.monotonic(), folder / "kills" / f"{number:04d}" / "run"
            try:
                one = references[kill.algorithm]
                died, resumed = killed(made, kill, one, out)
                differs = differences(out, one.files)
            except (RuntimeError, TimeoutError) as error:
                died, resumed, differs = 0, 0, [str(error)]
            took = time.monotonic() - started
            verdict = "same" if not differs else f"DIFFERENT: {'; '.join(differs[:4])}"
            place = f"{number:4} {kill.algorithm:9} {kill.whom:6} {kill.where:22}"
            print(f"{place} {died:6} {resumed:7} {took:5.1f}  {verdict}", flush=True)
            tally[f"{kill.whom} {'missed' if not died else 'killed'}"] += 1
            total += died > 0
            points |= {kill.point} if kill.point and died else set()
            wrong += [f"{number} {kill.where}: {one}" for one in differs]
    for whom in WHOM:
        print(f"{whom:6} {tally[whom + ' killed']:4} killed, {tally[whom + ' missed']} ended before")
    reachable = {point for one in references.values() for counts in one.counts.values() for point in counts}
    came = "all bytes the same" if not wrong else f"{len(wrong)} differences"
    print(f"{total} kills at {len(points)} of {len(reachable)} points and at random times: {came}")
    print(f"{time.monotonic() - began:.0f} s")
    return 6 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
