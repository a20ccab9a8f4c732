"""Kills each part of a running federation in the middle of a round, and compares what becomes of the run.

`python -m scripts.outages [--case NAME]... [--keep DIR]`: one federation on this machine, three members, one
undisturbed run, then a run for each case. Every member's reward can be held, so that a kill comes while it trains.
Exit code 6 if a case does not hold. The cases are in `scripts.outage_cases`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.federation import NAMES, difference, join, run_here, tell, write_run
from scripts.loopback import LINK, Federation, Member
from scripts.processes import LoopbackError, Part

ROUNDS = 4
HELD_ROUND = 2
"""In which members are held: they remember something from the round before, and two rounds build on it."""
_GATE = '''"""The demo's reward for answers, which waits while the file `hold` is there, and counts its calls."""

import time
from pathlib import Path

from fedpact.rewards import numeric_answer

HERE = Path(__file__).parent


def answers(completions, answer, **columns):
    while (HERE / "hold").exists():
        (HERE / "held").touch()
        time.sleep(0.02)
    with (HERE / "calls").open("a") as calls:
        calls.write(".")
    return numeric_answer(completions, answer)
'''


def require(fact: object, otherwise: str) -> None:
    """Raises LoopbackError with this text unless `fact` holds."""
    if not fact:
        raise LoopbackError(otherwise)


def calls(member: Member) -> int:
    """How often its reward for answers was called."""
    counted = member.client.with_name("calls")
    return counted.stat().st_size if counted.exists() else 0


def same_bytes(out: Path, reference: Path) -> str:
    """Raises LoopbackError unless two runs have ended with the same adapter, byte for byte."""
    ours, theirs = (run / "final" / "adapter_model.safetensors" for run in (out, reference))
    by = f"by up to {difference(ours, theirs):.3g}"
    require(ours.read_bytes() == theirs.read_bytes(), f"{out.name}: the final adapters differ {by}")
    return "bytes equal"


class Hold:
    """Keeps a member that trains at its first reward, until it is released."""

    def __init__(self, member: Member) -> None:
        self._hold, self._held = (member.client.with_name(name) for name in ("hold", "held"))
        self._held.unlink(missing_ok=True)
        self._hold.touch()

    def reached(self) -> bool:
        """Whether the member waits."""
        return self._held.exists()

    def release(self) -> None:
        self._hold.unlink(missing_ok=True)


class Outing:
    """One run of this federation: submitted, watched in its folder, and judged."""

    def __init__(self, federation: Federation, name: str, *sets: str) -> None:
        self.federation, self.name = federation, name
        self.out = federation.project / "runs" / name
        self.began = time.monotonic()
        self._before = {member.name: calls(member) for member in federation.members.values()}
        run = str(federation.project / "run.toml")
        settings = [word for one in sets for word in ("--set", one)]
        self.part = self.command("run", run, "--out", str(self.out), "--transport", "flower", *settings).start()

    def command(self, *arguments: str) -> Part:
        """One of FedPact's commands at the server, not started."""
        number = sum(1 for _ in (self.federation.folder / "logs").glob(f"{self.name}-*.log"))
        command = ["fedpact", *arguments, "--superlink", LINK]
        return self.federation.part(f"{self.name}-{number}", command, self.federation.superlink.user)

    def committed(self, number: int) -> bool:
        return (self.out / "rounds" / f"{number:04d}" / "MANIFEST").exists()

    def wait_round(self, number: int, timeout_s: float = 240.0) -> None:
        """Until this round is committed."""
        self.part.wait(lambda: self.committed(number), f"in round {number + 1}", timeout_s, poll_s=0.02)

    @contextmanager
    def hold(self, member: Member) -> Iterator[Hold]:
        """Within, the member trains in round HELD_ROUND, unless it is released."""
        self.wait_round(HELD_ROUND - 1)
        hold = Hold(member)
        try:
            self.part.wait(hold.reached, f"held at {member.name}", 120, poll_s=0.02)
            require(not self.committed(HELD_ROUND), f"{self.name}: {member.name} was held too late")
            yield hold
        finally:
            hold.release()

    def end(self, part: Part | None = None, timeout_s: float = 400.0) -> int:
        """The exit status of `fedpact run`, or of another command about this run."""
        part = part or self.part
        assert part.process is not None
        try:
            return part.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise part.failure(f"not finished within {timeout_s:g} s") from None

    def finish(self, part: Part | None = None, timeout_s: float = 400.0) -> float:
        """Waits for its success: seconds since it was submitted."""
        part = part or self.part
        if self.end(part, timeout_s):
            raise part.failure("failed")
        return time.monotonic() - self.began

    def calls(self, member: Member) -> int:
        """How often a member's reward for answers was called since the run was submitted."""
        return calls(member) - self._before[member.name]

    def missing(self) -> dict[int, dict[str, str]]:
        """Who did not answer, by round, and why at first."""
        found: dict[int, dict[str, str]] = {}
        for number in range(ROUNDS + 1):
            for exchange in self.state(number)["exchanges"]:
                found[number] = {**exchange["failures"], **found.get(number, {})}
        return {number: failures for number, failures in found.items() if failures}

    def state(self, number: int) -> dict[str, Any]:
        """A committed round's state.json."""
        path = self.out / "rounds" / f"{number:04d}" / "state.json"
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def gaps_s(self) -> list[float]:
        """How long each round took after the one before, from the second on."""
        marks = [self.out / "rounds" / f"{n:04d}" / "MANIFEST" for n in range(ROUNDS + 1)]
        times = [mark.stat().st_mtime for mark in marks]
        return [after - before for before, after in pairwise(times)]


class Stage:
    """A federation whose members have all joined, and its undisturbed run."""

    def __init__(self, federation: Federation, demo: Path) -> None:
        self.federation, self.demo = federation, demo
        self.reference: Outing
        self.reference_s = 0.0
        self.reference_calls: dict[str, int] = {}

    def open(self) -> None:
        """Starts everything and runs once, undisturbed."""
        contract = self.federation.folder / "contract.json"
        run_here(self.federation, "contract", str(self.demo / "run.toml"), "--out", str(contract))
        self.federation.open()
        for name in NAMES:
            member = join(self.federation, name, self.demo, contract)
            member.client.with_name("gate.py").write_text(_GATE, encoding="utf-8")
            member.site.user.own(member.client.with_name("gate.py"))
        shutil.copy(self.demo / "run.toml", self.federation.project)
        self.ready()
        self.reference = Outing(self.federation, "undisturbed")
        self.reference_s = self.reference.finish()
        self.reference_calls = {one.name: self.reference.calls(one) for one in self.members()}
        tell(f"undisturbed: {self.reference_s:.1f} s, rounds took {self.seconds(self.reference)}")

    def members(self) -> list[Member]:
        return [self.federation.members[name] for name in NAMES]

    def ready(self, fronts: Mapping[str, str] | None = None) -> None:
        """Every part runs, members with the direct link unless `fronts` says "supernode" or "none"; nobody is held."""
        self.federation.open()
        wanted = {}
        for member in self.members():
            member.client.with_name("hold").unlink(missing_ok=True)
            kind = (fronts or {}).get(member.name, "link")
            parts = {"link": member.link, "supernode": member.supernode}
            for other in (part for one, part in parts.items() if one != kind and part.running):
                other.stop()
            if kind != "none":
                wanted[member.name] = parts[kind]
                for part in (member.site, parts[kind]):
                    if not part.running:
                        part.start()
        for member in (one for one in self.members() if one.name in wanted):
            member.site.wait(member.listens, "listening", 120)
        began = time.monotonic()
        while (online := self.federation.online()) != set(wanted):
            for name, part in wanted.items():
                if not part.running or time.monotonic() - began > 120:
                    raise part.failure(f"not online ({name}; online: {', '.join(sorted(online)) or 'none'})")
            time.sleep(0.3)

    def took(self, run: Outing, seconds: float) -> str:
        """How long a run and the round of its outage took, beside the undisturbed ones."""
        ours, theirs = (one.gaps_s()[HELD_ROUND - 1] for one in (run, self.reference))
        return f"that round {ours:.1f} s (undisturbed {theirs:.1f}), the run {seconds:.1f} s ({self.reference_s:.1f})"

    def seconds(self, run: Outing) -> str:
        return ", ".join(f"{seconds:.1f}" for seconds in run.gaps_s()) + " s"


def prepare(folder: Path) -> Path:
    """The demo's run file, with members whose reward for answers can be held: its folder."""
    path = write_run(folder, ROUNDS)
    text = path.read_text(encoding="utf-8").replace("every = 2", "every = 100")
    path.write_text(text + "\n[federation]\nmin_replies = 2\n", encoding="utf-8")
    for client in (folder / "clients").glob("*.toml"):
        text = client.read_text(encoding="utf-8")
        gated = text.replace('use = "fedpact.rewards:numeric_answer"', 'use = "gate.py:answers"\ntimeout_s = 900')
        require(gated != text, f"{client.name}: has no reward that could be held")
        client.write_text(gated, encoding="utf-8")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    from scripts.outage_cases import CASES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only these")
    parser.add_argument("--keep", type=Path, help="a new folder for everything that is written, logs included")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cases: Mapping[str, Callable[[Stage], str]] = {name: CASES[name] for name in options.case or CASES}
    held = 0
    with tempfile.TemporaryDirectory(prefix="fedpact-") as scratch:
        folder = (options.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)
        project = folder / "server" / "project"
        project.mkdir(parents=True)
        demo = prepare(folder / "demo")
        try:
            with Federation(folder, project) as federation:
                stage = Stage(federation, demo)
                stage.open()
                for name, case in cases.items():
                    held += _holds(stage, name, case)
        except (LoopbackError, subprocess.TimeoutExpired) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    tell(f"{held} of {len(cases)} cases hold")
    return 0 if held == len(cases) else 6


def _holds(stage: Stage, name: str, case: Callable[[Stage], str]) -> bool:
    """Runs one case, and prints its line."""
    try:
        tell(f"{name}: {case(stage)}")
    except (LoopbackError, subprocess.TimeoutExpired, OSError) as error:
        tell(f"{name}: DOES NOT HOLD: {error}")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
