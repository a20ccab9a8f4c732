"""Runs in forked processes, with everything loaded already, that can be killed and gone on with, and what they left.

Import this before anything of fedpact: it switches the fault points on.
"""

from __future__ import annotations

import os

os.environ.setdefault("FEDPACT_FAULT", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ctypes
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fedpact import faults
from fedpact.cli.main import main
from fedpact.edge.local import local_members, local_transport, resumed_transport
from fedpact.errors import FedPactError
from fedpact.runtime import launch
from fedpact.runtime.config import RunConfig, load_run
from fedpact.runtime.engines import Engines
from fedpact.runtime.ledger import Ledger
from fedpact.runtime.run import Start
from fedpact.runtime.store import RunFolder
from fedpact.runtime.transport import Transport
from tests.cli.conftest import MEMBERS, results, settings, write_project
from tests.conftest import config as model_config
from tests.conftest import tokenizer
from tests.runtime.process_members import ProcessMembers

ALGORITHMS = ("fedavg", "fedmoa", "scaffold", "fedgrpo")
"""Plain; with memory at the server; with memory at the members; with training at the server."""
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Project:
    """One project on the disk, and the configuration of its run by each algorithm."""

    run_file: Path
    configs: dict[str, RunConfig]


class Quiet:
    """Watches a run, and prints who was dropped."""

    def round_done(self, round: int, metrics: Any) -> None: ...
    def dropped(self, client: str, reason: str) -> None:
        print(f"dropped {client}: {reason}", flush=True)


def project(folder: Path, *options: str, rounds: int = 3) -> Project:
    """A random Llama of two layers and three members in `folder`; loads all that a run needs."""
    torch.set_num_threads(1)  # the children are forked
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(model_config("llama"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    run_file = write_project(folder / "project", model=folder / "model", rounds=rounds)
    configs = {name: load_run(run_file, [*settings(name)[1::2], *options]) for name in ALGORITHMS}
    made = Project(run_file, configs)
    begin = launch.prepared(configs["fedgrpo"], run_file.parent, home=folder / "warm", where="warm")
    local_transport(configs["fedgrpo"], run_file.parent, folder / "warm", begin)
    shutil.rmtree(folder / "warm")
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a killed server leaves comes to us
    return made


def begun(
    made: Project,
    algorithm: str,
    out: Path,
    *,
    apart: bool = False,
    server: str = "",
    members: dict[str, str] | None = None,
    counts: bool = False,
    uid: int | None = None,
    command: Sequence[str | Path] = (),
) -> int:
    """Starts the run in `out`, or goes on with it, in a process group of its own; its pid.

    `apart`: members are processes too. `server` and `members` say what fault each is armed with, a member at each of
    its starts: "first;second". `uid`: of the user who runs it. `command`: run this command of fedpact instead.
    Beside `out`, `log` gets what is printed, `deaths` a line for each member that died, and with `counts` the folder
    `counts` how often each process reached each point.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(out.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.umask(0o077)
        if uid is not None:
            os.setgid(uid)
            os.setuid(uid)
        faults.arm(server)
        if command:
            main([str(argument) for argument in command])
            os._exit(0)
        transports: list[ProcessMembers] = []
        left = (lambda who: _count(out, who)) if counts else lambda who: None

        def members_apart(config: RunConfig, folder: Path, out: Path, begin: Start) -> Transport:
            made = _apart(config, folder, out, begin, members or {}, left)
            transports.append(made)
            return made

        if (out / "run.json").exists():
            launch.resume(out, make=members_apart if apart else resumed_transport, observer=Quiet())
        else:
            config, folder = made.configs[algorithm], made.run_file.parent
            make = members_apart if apart else local_transport
            launch.start(config, folder, out, where=str(made.run_file), make=make, observer=Quiet())
        left("server")
        for transport in transports:
            transport.close()
        code = 0
    except FedPactError as error:
        print(f"fedpact: {error}", flush=True)
        code = error.exit_code
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def ended(child: int, *, within: float = 120.0) -> int:
    """The exit code of `child`, negative for a signal, once nothing that it started is left."""
    deadline, code = time.monotonic() + within, None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            assert code is not None
            return code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
        elif not pid:
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                raise TimeoutError(f"process {child} or one that it started did not end within {within:g} s")
            time.sleep(0.002)


def counted(out: Path) -> dict[str, dict[str, int]]:
    """How often the server and each member reached each point."""
    return {path.stem: json.loads(path.read_text()) for path in (out.parent / "counts").glob("*.json")}


def deaths(out: Path) -> int:
    """How many member processes died and were started again."""
    path = out.parent / "deaths"
    return len(path.read_text().splitlines()) if path.exists() else 0


def printed(out: Path) -> str:
    path = out.parent / "log"
    return path.read_text() if path.exists() else ""


def differences(out: Path, expected: dict[str, bytes]) -> list[str]:
    """What is not as in an unbroken run: bytes, chains, and files that nobody needs."""
    found = results(out)
    wrong = [
        f"{name} differs" for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)
    ]
    wrong += [
        f"{path.relative_to(out)} was left" for path in out.rglob("*") if path.suffix in (".tmp", ".old", ".partial")
    ]
    try:
        folder = RunFolder(out)
        for round in range(1 + (folder.latest_round() or 0)):
            folder.load(round)
        for path in [out / "ledger.jsonl", *(out / "clients").glob("*/ledger.jsonl")]:
            Ledger.verify(path)
    except FedPactError as error:
        wrong.append(str(error))
    return wrong


def _count(out: Path, who: str) -> None:
    path = out.parent / "counts" / f"{who}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(faults.reached))


def _apart(
    config: RunConfig, folder: Path, out: Path, begin: Start, armed: dict[str, str], left: Callable[[str], None]
) -> ProcessMembers:
    clients = folder / config.simulation.clients

    def died(name: str, status: int) -> None:
        with (out.parent / "deaths").open("a") as stream:
            stream.write(f"{name} {status}\n")

    return ProcessMembers(
        MEMBERS,
        lambda name: local_members(clients, home=out / "clients", model=begin.model.path, engines=Engines())[name],
        locks=out.parent / "locks",
        arm=lambda name, starts: faults.arm("".join(armed.get(name, "").split(";")[starts - 1 : starts])),
        died=died,
        left=left,
    )
