"""A run between real sites on one machine: a SuperLink, three members, each with a site service, all over TLS.

`python -m scripts.federation [--keep DIR]`, or `make federation`. Two members use the direct link, one a SuperNode
of Flower's with the shim. The same client files also run as a simulation; exit code 6 if the adapters differ.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from safetensors.numpy import load_file

from fedpact.tasks.demo import METHODS, write_demo
from fedpact.tasks.opchains import OPS
from fedpact.tasks.warmstart import model_folder
from scripts.loopback import LINK, Federation, Member
from scripts.processes import LoopbackError, Part, User

TOLERANCE = 1e-5
"""Of the largest difference between the two final adapters."""
NAMES = OPS[:3]
SHIMMED = NAMES[2]
"""The member with a stock SuperNode."""
PATIENCE_S = 480
"""With the run between sites."""
_ADAPTER = "adapter_model.safetensors"
_SITE = """
[model]
path = "../model"

[site]
public_sampling = true

"""
"""What a site's client file has beside the simulation's, and [service]: draws that can be compared."""

_began = time.monotonic()


def tell(text: str) -> None:
    """A line, with the seconds since the beginning."""
    print(f"{time.monotonic() - _began:6.1f} s  {text}", flush=True)


def write_run(folder: Path, rounds: int) -> Path:
    """The demo's first three members and its run by FIRM, in `folder`: the run file."""
    path = write_demo(folder, model=model_folder(), rounds=rounds)
    for client in (folder / "clients").glob("*.toml"):
        if client.stem not in NAMES:
            client.unlink()
    firm = "".join(setting.removeprefix("algorithm.") + "\n" for setting in METHODS["firm"])
    text = path.read_text(encoding="utf-8").replace('name = "fedavg"\n', firm).replace("every = 4", "every = 2")
    path.write_text(text, encoding="utf-8")
    return path


def run_here(federation: Federation, *command: str, user: User | None = None) -> str:
    """The output of one of FedPact's commands. Raises LoopbackError if it fails."""
    code, text = federation.run(["fedpact", *command], user)
    if code:
        raise LoopbackError(f"fedpact {' '.join(command)}: ended with {code}: {' '.join(text.split())[-900:]}")
    return text


def follow(part: Part) -> None:
    """Starts it and prints what it says, to its end. Raises LoopbackError if it fails."""
    began, shown, running = time.monotonic(), 0, part.start().running
    while running:
        running = part.running
        lines = part.text().splitlines(keepends=True)
        whole = [line for line in lines[shown:] if line.endswith("\n")]
        for line in whole:
            tell(f"  {line.rstrip()}")
        shown += len(whole)
        if time.monotonic() - began > PATIENCE_S:
            raise part.failure(f"not finished within {PATIENCE_S} s")
        time.sleep(0.2)
    if part.reap():
        raise part.failure("failed")


def join(federation: Federation, name: str, demo: Path, contract: Path | None) -> Member:
    """A member with the simulation's client file and prompts, its own copy of the model, and this contract accepted."""

    def write(folder: Path, service: str) -> Path:
        for below in ("clients", "prompts"):
            (folder / below).mkdir()
        for prompts in (demo / "prompts").glob(f"{name}[.-]*"):
            shutil.copy(prompts, folder / "prompts")
        shutil.copytree(model_folder(), folder / "model")
        if contract is not None:
            shutil.copy(contract, folder / "contract.json")
        client = folder / "clients" / f"{name}.toml"
        text = (demo / "clients" / client.name).read_text(encoding="utf-8")
        client.write_text(text + _SITE + service, encoding="utf-8")
        return client

    member = federation.join(name, write)
    if contract is not None:
        accepted = str(member.site.user.home / "contract.json")
        run_here(federation, "site", "accept", str(member.client), accepted, "--yes", user=member.site.user)
    return member


def federated(folder: Path, demo: Path, federation: Federation) -> Path:
    """The run over the SuperLink, from its start to its end: the run folder."""
    contract = folder / "contract.json"
    run_here(federation, "contract", str(demo / "run.toml"), "--out", str(contract))
    tell(f"SuperLink on {federation.address} after {federation.open():.1f} s: TLS, node keys, sqlite")
    apart = "site and front end of each are users of their own" if federation.separate else federation.reason
    for name in NAMES:
        member = join(federation, name, demo, contract)
        member.site.start()
        (member.supernode if name == SHIMMED else member.link).start()
        front = "stock SuperNode and shim" if name == SHIMMED else "direct link"
        tell(f"{name} registered, contract accepted, {front} started")
    tell(f"users: {apart}")
    for member in federation.members.values():
        member.site.wait(member.listens, "listening", 120)
    federation.wait_online(*NAMES)
    tell("three site services listen, three nodes are online")
    project = federation.project
    shutil.copy(demo / "run.toml", project)
    command = ["fedpact", "run", str(project / "run.toml"), "--transport", "flower", "--superlink", LINK]
    follow(federation.part("run", command, federation.superlink.user))
    return project / "runs" / "run"


def difference(one: Path, other: Path) -> float:
    """The largest absolute difference of two adapters; infinite if they have not the same tensors."""
    a, b = load_file(one), load_file(other)
    if {name: x.shape for name, x in a.items()} != {name: x.shape for name, x in b.items()}:
        return float("inf")
    return max(float(abs(x - b[name]).max()) for name, x in a.items())


def compared(ours: Path, local: Path) -> int:
    """Prints a table of rounds and what came of it: the exit code."""
    times = [_seconds(out) for out in (ours, local)]
    print(f"\n{'round':>5}  {'sites, s':>8}  {'simulated, s':>12}  adapter")
    for number, (a, b) in enumerate(zip(*times, strict=True)):
        files = [out / "rounds" / f"{number:04d}" / _ADAPTER for out in (ours, local)]
        same = "the same bytes" if files[0].read_bytes() == files[1].read_bytes() else "other bytes"
        print(f"{number:>5}  {a:8.1f}  {b:12.1f}  {same}")
    final = [out / "final" / _ADAPTER for out in (ours, local)]
    largest, equal = difference(*final), final[0].read_bytes() == final[1].read_bytes()
    verdict = "equal" if largest <= TOLERANCE else "DIFFERENT"
    print(
        f"\nfinal adapters are {verdict}: largest difference {largest:.3g}, at most {TOLERANCE:g} allowed; "
        f"bytes {'equal' if equal else 'differ'}"
    )
    return 0 if largest <= TOLERANCE else 6


def _seconds(out: Path) -> list[float]:
    """How long each round took, by when its folder was finished; round 0 from when the run was."""
    marks = [out / "run.json", *sorted(out.glob("rounds/[0-9]*/MANIFEST"))]
    ends = [mark.stat().st_mtime for mark in marks]
    return [after - before for before, after in pairwise(ends)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="a new folder for everything that is written, logs included")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="fedpact-") as scratch:
        folder = (options.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)
        project, demo, code = folder / "server" / "project", folder / "demo", 1
        project.mkdir(parents=True)
        write_run(demo, options.rounds)
        try:
            with Federation(folder, project) as federation:
                tell(f"a simulation of {', '.join(NAMES)}: {options.rounds} rounds of FIRM")
                run_here(federation, "run", str(demo / "run.toml"), "--out", str(demo / "runs" / "run"))
                ours = federated(folder, demo, federation)
            tell("every process has ended")
            code = compared(ours, demo / "runs" / "run")
        except (LoopbackError, subprocess.TimeoutExpired) as error:
            print(f"error: {error}", file=sys.stderr)
            if options.keep is None:
                print("`--keep DIR` keeps every log", file=sys.stderr)
    print(f"{time.monotonic() - _began:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
