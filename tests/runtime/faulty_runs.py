"""Runs whose disk fails at every point, whose members die or are late, and which are interrupted twice; a line each.

`python -m tests.runtime.faulty_runs` prints one JSON object for each row of the fault matrix: what it is, the exit
code, the line that was printed, and what was not as it should be. A process of its own, because the fault points are
switched on in it.
"""

from __future__ import annotations

import os

os.environ.setdefault("FEDPACT_FAULT", "")

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fedpact import faults
from fedpact.errors import FedPactError
from fedpact.runtime.store import RunFolder
from tests.cli.conftest import files, results, settings
from tests.runtime.broken_runs import Project, begun, counted, deaths, differences, ended, printed, project

REMEDIES = {"enospc": "free some space", "eacces": "give this user access", "erofs": "make that disk writable"}
NOBODY = 65534
Row = dict[str, Any]


class Unbroken:
    """The run that all others are compared with."""

    def __init__(self, made: Project, folder: Path) -> None:
        self.made, self.folder, self.out = made, folder, folder / "unbroken" / "run"
        assert ended(begun(made, "fedmoa", self.out, counts=True)) == 0, printed(self.out)
        self.files, self.counts, self.names = results(self.out), counted(self.out)["server"], 0

    def another(self) -> Path:
        self.names += 1
        return self.folder / f"{self.names:03d}" / "run"

    def finish(self, out: Path, **how: Any) -> list[str]:
        """Goes on with the run in `out`; what is then not as in the unbroken one."""
        code = ended(begun(self.made, "fedmoa", out, **how))
        return [f"resume ended with {code}: {printed(out)[-300:]}"] if code else differences(out, self.files)

    def lost(self, out: Path) -> list[str]:
        """Which committed rounds of the run in `out` are not as they were."""
        found, wrong = RunFolder(out), []
        for round in range(1 + latest if (latest := found.latest_round()) is not None else 0):
            names = [name for name in self.files if name.startswith(f"rounds/{round:04d}/")]
            here = results(out)
            wrong += [f"{name} is lost" for name in names if here.get(name) != self.files[name]]
            try:
                found.load(round)
            except FedPactError as error:
                wrong.append(str(error))
        return wrong


def disk(unbroken: Unbroken) -> Iterator[Row]:
    """Every write point fails: the first time, which is before there is a run, and at a time that is drawn."""
    draw, actions = random.Random(5), list(REMEDIES)
    for number, point in enumerate(p for p in faults.POINTS if p.startswith(("files.", "append.", "folder."))):
        times = [1, draw.randint(2, max(2, unbroken.counts.get(point, 1)))] if point in unbroken.counts else [1]
        for count in times:
            action = actions[(number + count) % 3]
            out = unbroken.another()
            if point not in unbroken.counts:  # something is put aside only where a finished run is gone on with
                shutil.copytree(unbroken.out, out)
            code = ended(begun(unbroken.made, "fedmoa", out, server=f"{point}:{count}={action}"))
            yield {"row": f"{point}:{count}={action}", **row(unbroken, out, code, REMEDIES[action])}


def row(unbroken: Unbroken, out: Path, code: int, remedy: str, mend: Callable[[], object] = lambda: None) -> Row:
    """A run that ended because of its disk: what it said, what it lost, and how it goes on once the disk is mended."""
    said = printed(out)
    wrong = [] if code == 4 else [f"exit code {code}"]
    if said.count("\n") != 1 or not said.startswith(f"fedpact: {out}") or remedy not in said:
        wrong.append("expected one line that names the path and the remedy")
    wrong += unbroken.lost(out)
    mend()
    return {"code": code, "said": said, "wrong": wrong + unbroken.finish(out)}


def full(unbroken: Unbroken) -> Iterator[Row]:
    """A disk that is really full, at four sizes; one that is read-only; a folder that was taken away."""
    mount = unbroken.folder / "disk"
    mount.mkdir()
    size = sum(max(4096, -(-len(data) // 4096) * 4096) for data in files(unbroken.out).values()) + 40 * 4096
    for share in (0.02, 0.2, 0.4, 0.6):
        if not mounted(mount, f"size={int(share * size) // 4096 * 4}k"):
            yield {"row": "a full disk", "skipped": "cannot mount a tmpfs here"}
            return
        out = mount / "run" / "run"
        code = ended(begun(unbroken.made, "fedmoa", out))
        made = row(unbroken, out, code, "free some space", lambda: mounted(mount, "remount,size=64m"))
        yield {**made, "row": f"a disk of {share:g} of what the run needs"}
        subprocess.run(["umount", mount], check=True)
    mounted(mount, "size=64m")
    out = mount / "run" / "run"
    ended(begun(unbroken.made, "fedmoa", out, server="store.committed:2=kill"))
    (out.parent / "log").unlink()
    mounted(mount, "remount,ro")
    said = unbroken.folder / "read-only" / "run"  # the log cannot lie on that disk
    command = ["resume", out]
    code = ended(begun(unbroken.made, "fedmoa", said, command=command))
    lines, wrong = printed(said), unbroken.lost(out)
    mounted(mount, "remount,rw")
    if code != 4 or "make that disk writable" not in lines or lines.count("\n") != 1:
        wrong.append("expected exit code 4 and one line with the remedy")
    yield {"row": "a disk that is read-only", "code": code, "said": lines, "wrong": wrong + unbroken.finish(out)}
    subprocess.run(["umount", mount], check=True)


def permission(unbroken: Unbroken) -> Iterator[Row]:
    """A folder that may no longer be written to, for a user who is not root."""
    for name in ("rounds", "clients/east/memory", "."):
        out = unbroken.another()
        ended(begun(unbroken.made, "fedmoa", out, server="store.committed:2=kill"))
        root = os.geteuid() == 0
        if root:
            for path in [out.parent, *out.parent.rglob("*")]:
                os.chown(path, NOBODY, NOBODY)
            for path in (unbroken.folder / "model").iterdir():
                path.chmod(0o644)
        (out.parent / "log").unlink(missing_ok=True)
        place = out / name
        place.chmod(0o500)
        code = ended(begun(unbroken.made, "fedmoa", out, uid=NOBODY if root else None))
        made = row(unbroken, out, code, "give this user access", partial(place.chmod, 0o700))
        yield {**made, "row": f"no permission to write to {name}"}


def mounted(mount: Path, options: str) -> bool:
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], capture_output=True).returncode == 0


def members(unbroken: Unbroken, slow: Project) -> Iterator[Row]:
    """A member that dies each time it is asked in round 2, one that dies once, and one that is late."""
    crash = ";".join(["memory.save:4=kill", *["memory.save=kill"] * 3])  # after two measurements and round 1
    late = "memory.save:4=delay:6"
    for what, fault, reason, made in (
        ("a member crashes again and again", crash, "north: its process died 4 times", unbroken.made),
        ("a member is late", late, "north: no reply within 4 s (federation.timeout_s)", slow),
        ("a member crashes once", "memory.saved:4=kill", "", unbroken.made),
    ):
        out = unbroken.another()
        code = ended(begun(made, "fedmoa", out, apart=True, members={"north": fault}))
        lines = (out / "metrics.jsonl").read_text().splitlines() if code == 0 else []
        rows = [json.loads(line) for line in lines]
        trained = {(one["round"], one["who"]) for one in rows if one["key"] == "train/reward/low"}
        missing = {(r, who) for r in (1, 2, 3) for who in ("east", "north", "south")} - trained
        wrong = [] if missing == ({(2, "north")} if reason else set()) else [f"without {sorted(missing)}"]
        dropped = [line for line in printed(out).splitlines() if line.startswith("dropped ")]
        wrong += [] if dropped == ([f"dropped {reason}"] if reason else []) else [f"printed {dropped}"]
        if not reason:
            wrong += differences(out, unbroken.files)
            wrong += [] if deaths(out) == 1 else [f"{deaths(out)} deaths"]
        yield {"row": what, "code": code, "said": printed(out), "wrong": wrong}


def interrupted(unbroken: Unbroken) -> Iterator[Row]:
    """Ctrl-C twice, at random times and random intervals."""
    draw = random.Random(6)
    for number in range(8):
        out = unbroken.another()
        before, between = draw.uniform(0.05, 0.3 if number % 2 else 1.2), draw.choice([0.0, 0.0005, 0.002, 0.01])
        command = ["run", unbroken.made.run_file, "--out", out, *settings("fedmoa")]
        child = begun(unbroken.made, "fedmoa", out, command=command)
        while number % 2 and not out.exists():  # in the short time in which there is a folder and no run yet
            time.sleep(0.001)
        time.sleep(before)
        os.kill(child, signal.SIGINT)
        time.sleep(between)
        os.kill(child, signal.SIGINT)
        began = time.monotonic()
        code = ended(child)
        said = [line for line in printed(out).splitlines() if not line.startswith(("round", "traffic", "adapter"))]
        wrong = [] if code == 130 else [f"exit code {code}"]
        lines = [line for line in said if line.startswith("fedpact: interrupted")]
        wrong += [] if lines == said and 1 <= len(said) <= 2 else ["expected a line for each"]
        wrong += [f"it took {took:.1f} s"] if (took := time.monotonic() - began) > 10 else []
        since = "the folder" if number % 2 else "the start"
        what = f"Ctrl-C {before:.2f} s after {since} and again {1000 * between:g} ms later"
        yield {"row": what, "code": code, "said": printed(out), "wrong": wrong + unbroken.finish(out)}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fedpact-faults-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        os.umask(0o022)
        made = project(folder)
        slow = project(folder / "slow", "federation.timeout_s=4")
        unbroken = Unbroken(made, folder)
        rows: dict[str, Callable[[], Iterator[Row]]] = {
            "disk": lambda: disk(unbroken),
            "full": lambda: full(unbroken),
            "permission": lambda: permission(unbroken),
            "members": lambda: members(unbroken, slow),
            "interrupted": lambda: interrupted(unbroken),
        }
        for name in sys.argv[1:] or rows:
            for one in rows[name]():
                print(json.dumps({"kind": name, **one}), flush=True)


if __name__ == "__main__":
    main()
