"""How long an exchange takes with a direct link, with the shim, and with a ClientApp that imports torch.

`python -m benchmarks.transport [--rounds 6] [--sizes 5,50] [--members 2]`: one SuperLink (TLS, node keys, process
isolation, sqlite) on this machine and so many members of each kind, which take turns in one run. All stay online:
idle, they cost a tenth of a core together, mostly in the SuperLink for the polls of two links. An exchange is from the
first push to the last answer; every member is sent, and sends, SIZE random bytes, fresh ones since Flower stores equal
chunks once. Sites are stand-ins that do nothing else. It writes only to a temporary folder. Exit code 1: it could not
be measured; a missed goal is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import fedpact_app
from benchmarks.timing import surroundings
from fedpact.runtime.transport import Failure, Transport
from fedpact.types import ClientId
from scripts.loopback import LINK, Federation
from scripts.processes import LoopbackError

KINDS = {
    "direct": "direct link, site service",
    "shim": "stock SuperNode, shim, site service",
    "torch": "stock SuperNode, ClientApp that imports torch",
}
"""The last one has no site service: its ClientApp answers by itself, as such a ClientApp would."""
_SETTLE_S = 5.0
"""Before each exchange: on one machine the processes of the one before would still be ending in it."""
Times = Mapping[tuple[str, float], Sequence[float]]
"""Seconds of each exchange by kind and megabytes, in rounds."""
_TIMEOUT_S, _QUIET_S = 300.0, 30.0
"""Of one exchange; and without news until Flower is asked whether the run has ended, which costs a second of a core."""
_CHOICE = "FEDPACT_BENCHMARK"
"""In the environment of a SuperNode that is to run the torch client. Both ClientApps travel in one Flower app."""
_APP = {
    "pyproject.toml": """\
[project]
name = "fedpact-transport"
version = "0.1.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedpact"
fab-include = ["fedpact_app/**/*.py", "measured/**/*.py"]

[tool.flwr.app.components]
serverapp = "measured.server:app"
clientapp = "measured.client:app"
""",
    "measured/__init__.py": "",
    "measured/server.py": """\
from benchmarks.transport import measure
from flwr.serverapp import ServerApp

app = ServerApp()
app.main()(lambda grid, context: measure(grid))
""",
    "measured/client.py": f"""\
import os

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedpact_app.client_app import app
from fedpact_app.records import carried, uncarried


def answer(message, context):
    return Message(carried(os.urandom(len(uncarried(message.content)))), reply_to=message)


if "{_CHOICE}" in os.environ:
    import peft, torch, transformers

    app = ClientApp()
    app.query("fedpact")(answer)
""",
}


class Spread(NamedTuple):
    """A mean, or a ratio of means, with the lowest and highest of a single round."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:6.2f}  ({self.low:.2f}-{self.high:.2f})"


def turns(rounds: int, sizes: Sequence[float]) -> Iterator[tuple[str, float]]:
    """(kind, megabytes) in the order of measuring: every kind in turn, so that a drift meets all alike."""
    return ((kind, size) for _ in range(rounds + 1) for size in sizes for kind in KINDS)


def exchange_s(transport: Transport, clients: Sequence[ClientId], num_bytes: int) -> float:
    """Seconds until all have answered. Raises RuntimeError if one does not, or not with as many bytes."""
    envelopes = {client: os.urandom(num_bytes) for client in clients}
    began = time.perf_counter()
    answers = dict(transport.exchange(envelopes, timeout_s=_TIMEOUT_S))
    took = time.perf_counter() - began
    for client, answer in answers.items():
        found = answer.reason if isinstance(answer, Failure) else f"answered {len(answer)} bytes"
        if found != f"answered {num_bytes} bytes":
            raise RuntimeError(f"{client}: {found}; expected {num_bytes} bytes")
    return took


def measure(grid: Any) -> None:
    """The ServerApp, with Flower's Grid: all turns of FEDPACT_FOLDER/plan.json; a line in times.jsonl for each."""
    from fedpact.edge.flower_private import nodes
    from fedpact.edge.grid import GridTransport

    folder = Path(os.environ["FEDPACT_FOLDER"])
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    transport = GridTransport(grid, lambda: nodes(grid))
    transport.wait_for(len(KINDS) * plan["members"], timeout_s=60.0)
    with (folder / "times.jsonl").open("a", buffering=1, encoding="utf-8") as file:
        for kind, size in turns(plan["rounds"], plan["sizes"]):
            time.sleep(_SETTLE_S)
            took = exchange_s(transport, names(kind, plan["members"]), round(size * 1e6))
            file.write(json.dumps([kind, size, took]) + "\n")


def names(kind: str, members: int) -> list[ClientId]:
    return [f"{kind}-{number}" for number in range(members)]


class Echo:
    """A stand-in for a member: as many random bytes as it was sent."""

    def handle(self, data: bytes) -> bytes:
        return os.urandom(len(data))


def stand_in(socket: str, peer: str) -> None:
    """Serves an `Echo` to one user, by number."""
    from fedpact.edge.service import serve

    serve({Path(socket): Echo()}, peers=frozenset({int(peer)}))


def seconds(times: Times, kind: str, size: float) -> Spread:
    """Of the exchanges that count: all but the first."""
    found = times[kind, size][1:]
    return Spread(sum(found) / len(found), min(found), max(found))


def ratio(times: Times, above: str, below: str, size: float) -> Spread:
    """Mean over mean of the exchanges that count."""
    numerators, denominators = (times[kind, size][1:] for kind in (above, below))
    rounds = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return Spread(sum(numerators) / sum(denominators), min(rounds), max(rounds))


def table(times: Times) -> list[str]:
    """Lines: every kind's seconds at every size, then the ratios to the torch client, each with its goal."""
    sizes = sorted({size for _, size in times})
    lines = [f"{'seconds of an exchange':46} {'size':>6}  {'mean':>6}  (range){'':8} {'n':>2}  {'first':>5}"]
    for size, kind in ((size, kind) for size in sizes for kind in KINDS):
        found, first, count = seconds(times, kind, size), times[kind, size][0], len(times[kind, size]) - 1
        goal = _goal("<= 2", found.value <= 2) if (kind, size) == ("direct", 5) else ""
        lines.append(f"{KINDS[kind]:46} {size:3g} MB  {found!s:24} {count:2}  {first:5.2f}  {goal}".rstrip())
    lines += ["", "mean over mean (range of a round)"]
    for size in sizes:
        direct, shim = (ratio(times, kind, "torch", size) for kind in ("direct", "shim"))
        lines.append(f"{'direct / torch':46} {size:3g} MB  {direct!s:24} {_goal('<= 1/5', direct.value <= 0.2)}")
        lines.append(f"{'shim / torch':46} {size:3g} MB  {shim!s:24} {_goal('< 1', shim.value < 1)}")
    return lines


def _goal(goal: str, met: bool) -> str:
    return f"goal {goal}: {'met' if met else 'missed'}"


def _write_app(folder: Path) -> None:
    """The Flower app, with FedPact's own shim in it."""
    shim = {f"fedpact_app/{file.name}": file.read_text("utf-8") for file in Path(fedpact_app.__path__[0]).glob("*.py")}
    for name, text in {**_APP, **shim}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _start(federation: Federation, kind: str, name: str) -> None:
    """Starts a member of this kind: its front end, and its stand-in's service."""
    member = federation.join(name, lambda folder, _: folder)  # a stand-in needs no client file
    front = member.link if kind == "direct" else member.supernode
    if kind != "torch":
        peer = os.getuid() if front.user.uid is None else front.user.uid
        command = ["fedpact-echo", str(member.socket), str(peer)]
        federation.part(f"{name}-echo", command, member.site.user).start().wait(member.listens, "listening", 120)
    front.start(**({_CHOICE: "1"} if kind == "torch" else {}))


def _write_stand_in(path: Path) -> None:
    """A command for `stand_in`, by the Python of the command fedpact beside it."""
    interpreter = path.with_name("fedpact").read_text(encoding="utf-8").splitlines(keepends=True)[:3]
    program = ["import sys\n", "from benchmarks.transport import stand_in\n", "stand_in(*sys.argv[1:])\n"]
    path.write_text("".join(interpreter + program), encoding="utf-8")
    path.chmod(0o755)


def _told(federation: Federation, run_id: str, count: int) -> Iterator[tuple[str, float, float]]:
    """(kind, megabytes, seconds) as they are measured. Raises LoopbackError if the run ends before `count`."""
    path, seen, heard, ended = federation.project / "times.jsonl", 0, time.monotonic(), ""
    while seen < count:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)[seen:]:
            if line.endswith("\n"):
                seen, heard = seen + 1, time.monotonic()
                yield tuple(json.loads(line))
        if ended and seen < count:
            raise LoopbackError(f"{ended} after {seen} of {count} exchanges")
        if time.monotonic() - heard > _QUIET_S:
            row, heard = federation.flwr("ls", LINK, "--run-id", run_id)["runs"][0], time.monotonic()
            if row["status"].startswith("finished"):  # what it wrote before is read once more
                ended = f"{row['status']} ({row.get('status-details')})"
        time.sleep(0.5)


def run(folder: Path, rounds: int, sizes: Sequence[float], members: int) -> Times:
    """Brings a federation up in `folder`, measures, printing each exchange, and takes it down."""
    project, plan = folder / "server" / "project", {"rounds": rounds, "sizes": list(sizes), "members": members}
    project.mkdir(parents=True)
    (project / "times.jsonl").touch()
    (project / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    _write_app(folder / "app")
    times: dict[tuple[str, float], list[float]] = {}
    with Federation(folder, project) as federation:
        _write_stand_in(folder / "bin" / "fedpact-echo")
        federation.open()
        for kind in KINDS:
            for name in names(kind, members):
                _start(federation, kind, name)
        federation.wait_online(*federation.members)
        print(f"{members} of each kind are online, {'as users of their own' if federation.separate else 'as one user'}")
        run_id = str(federation.flwr("run", str(folder / "app"), LINK)["run-id"])
        for kind, size, took in _told(federation, run_id, (rounds + 1) * len(sizes) * len(KINDS)):
            times.setdefault((kind, size), []).append(took)
            print(f"  {kind:6}  {size:3g} MB  {took:6.2f} s", flush=True)
    return times


def _sizes(text: str) -> list[float]:
    return [float(size) for size in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6, help="that count; one more comes before them (default: 6)")
    parser.add_argument("--sizes", type=_sizes, default="5,50", help="MB of 10**6 bytes each way (default: 5,50)")
    parser.add_argument("--members", type=int, default=2, help="of each kind (default: 2)")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.members, *options.sizes) <= 0:
        parser.error("--rounds, --members and --sizes must be positive")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that every process is ended
    facts = surroundings("cpu") | {"cores": str(os.cpu_count()), "flwr": version("flwr")}
    print(*(f"{name:13} {value}" for name, value in facts.items() if name not in ("trl", "torchjd")), sep="\n")
    try:
        with tempfile.TemporaryDirectory(prefix="fedpact-") as folder:
            times = run(Path(folder), options.rounds, options.sizes, options.members)
    except (LoopbackError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("", *table(times), sep="\n")
    print(f"\nload {facts['load']}, {os.getloadavg()[0]:.1f} after; these processes are part of the latter")
    return 0


if __name__ == "__main__":
    sys.exit(main())
