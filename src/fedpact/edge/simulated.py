"""The members of Flower's simulation: one process beside the ServerApp holds them all, behind a socket for each node.

Ray's actors hold shims that know no member; its i-th node, by id, stands for the i-th member, by name. The process is
started afresh, not forked from one that has Ray's threads, and ends when its standard input does, with whatever
becomes of the ServerApp.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

import torch

from fedpact.edge import flower_private
from fedpact.edge.grid import GridTransport
from fedpact.edge.local import check_members, local_members
from fedpact.edge.service import serve
from fedpact.edge.submission import error_in, exit_line
from fedpact.errors import FedPactError, StoreError, TooFewRepliesError
from fedpact.runtime.client_config import client_files, load_client
from fedpact.runtime.config import RunConfig
from fedpact.runtime.engines import Engines
from fedpact.runtime.files import storing
from fedpact.runtime.launch import prepared
from fedpact.runtime.run import Start
from fedpact.screen import say
from fedpact.types import ClientId
from fedpact_app.simulation import simulated_folder, simulated_socket

if TYPE_CHECKING:
    from flwr.serverapp import Grid

_READY = "ready"
_NODES_S = 60.0
_END_S = 10.0
"""How long the members' process may take to end before it is killed."""


@contextmanager
def simulated_transport(
    grid: Grid, run_id: int, config: RunConfig, folder: Path, out: Path, begin: Start, *, check: bool, log: Path
) -> Iterator[GridTransport]:
    """A transport to simulated members, which are there until the block ends; `check` is the dry run of each.

    `log` is where what they print goes. Raises ConfigError or RewardError, as `local_transport` does.
    """
    names = sorted(load_client(path).name for path in client_files(folder / config.simulation.clients))
    ids = _settled(lambda: [node.id for node in flower_private.nodes(grid)])
    members = paired(names, ids)
    order: dict[str, Any] = {
        "run_id": run_id,
        "config": config.dump(),
        "folder": str(folder),
        "out": str(out),
        "model": str(begin.model.path),
        "members": members,
        "check": check,
        "threads": torch.get_num_threads(),
    }
    by_id = {number: name for name, number in members.items()}

    def nodes() -> list[flower_private.Node]:
        found = flower_private.nodes(grid)
        return [dataclasses.replace(node, name=by_id[node.id]) for node in found if node.id in by_id]

    with _process(order, log):
        yield GridTransport(grid, nodes)


def paired(names: Sequence[ClientId], ids: Sequence[int]) -> dict[ClientId, int]:
    """The node of each member that takes part: the first name's is the smallest id. What is left over stays out."""
    counted = f"SuperNodes: {len(ids)}, members: {len(names)}"
    if len(ids) < len(names):
        part = ", ".join(sorted(names)[: len(ids)])
        say(f'{counted}; only {part} take part, all with --federation-config "num-supernodes={len(names)}"')
    elif len(ids) > len(names):
        say(f"{counted}; {len(ids) - len(names)} of the SuperNodes stay idle")
    return dict(zip(sorted(names), sorted(ids), strict=False))


def _settled(look: Callable[[], list[int]], *, pause_s: float = 0.5) -> list[int]:
    """The nodes, once two looks show the same: Flower registers them while the ServerApp runs already."""
    end, before = time.monotonic() + _NODES_S, look()
    while time.monotonic() < end:
        time.sleep(pause_s)
        now = look()
        if now and now == before:
            return now
        before = now
    raise TooFewRepliesError(
        f"found no settled set of simulated SuperNodes within {_NODES_S:g} s; look at Flower's log"
    )


@contextmanager
def _process(order: Mapping[str, Any], log: Path) -> Iterator[None]:
    """The members' process, ready to answer. What went wrong before it was ready is raised here."""
    with storing(log), log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        said = process.stdout.readline()
        if said.strip() != _READY:
            raise error_in(said) or FedPactError(f"the simulated members' process ended before it was ready; see {log}")
        yield
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        shutil.rmtree(simulated_folder(order["run_id"]), ignore_errors=True)  # left over if it was killed


def main() -> None:
    """The members' process: an order on standard input, `ready` or an `exit_line` on standard output."""
    os.umask(0o077)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as report:
        os.dup2(2, 1)  # what members print goes to the log
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the ServerApp, whose end is this one's
        signal.signal(signal.SIGTERM, _stop)
        order = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with, args=(sys.stdin, order["run_id"]), daemon=True).start()
        try:
            _serve(order, lambda: say(_READY, to=report))
        except Exception as error:
            say(exit_line(error, Path(order["out"]).parents[1]), to=report)
            sys.exit(1)


def _serve(order: Mapping[str, Any], ready: Callable[[], None]) -> None:
    folder, out = Path(order["folder"]), Path(order["out"])
    config = RunConfig.model_validate(order["config"])
    clients = folder / config.simulation.clients
    members = local_members(clients, home=out / "clients", model=Path(order["model"]), engines=Engines())
    members = {name: members[name] for name in order["members"]}
    if order["check"]:
        scratch = Path(tempfile.mkdtemp(prefix="fedpact-"))
        try:
            check_members(config, members, prepared(config, folder, home=scratch, where=str(out)))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    torch.set_num_threads(order["threads"])  # another number would give other bytes
    place = _own_folder(order["run_id"])
    try:
        sockets = {name: simulated_socket(order["run_id"], node) for name, node in order["members"].items()}
        serve(
            {path: members[name] for name, path in sockets.items() if path}, peers=frozenset({os.getuid()}), ready=ready
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _own_folder(run_id: int) -> Path:
    """The new folder of the run's sockets. Raises StoreError if another user was there first."""
    path = simulated_folder(run_id)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError as error:
        if simulated_socket(run_id, 0) is None:
            raise StoreError(
                f"{path}: found somebody else's; expected none, remove it and submit the run again"
            ) from error
        shutil.rmtree(path)  # of a run with the same id that was killed
        path.mkdir(mode=0o700)
    return path


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the cleaning up is not interrupted
    sys.exit(0)


def _end_with(order: IO[str], run_id: int) -> None:
    """Ends this process when nobody holds the other end any more."""
    order.read()
    end = time.monotonic() + _END_S
    while time.monotonic() < end:  # a signal that comes just before the main thread falls asleep does not wake it
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(0.2)
    shutil.rmtree(simulated_folder(run_id), ignore_errors=True)
    os._exit(1)  # it is in one long operation, within which no handler runs


if __name__ == "__main__":
    main()
