"""`flwr run .` in Flower's simulation, as a user types it, and the process that holds the simulated members."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Flower's simulation needs ray: pip install 'flwr[simulation]'")

from fedpact.edge.local import local_transport
from fedpact.edge.server_app import Lines
from fedpact.edge.simulated import paired
from fedpact.runtime.config import load_run
from fedpact.runtime.launch import start
from fedpact.runtime.verification import verified
from fedpact.tasks.demo import write_demo
from fedpact.tasks.warmstart import model_folder
from fedpact_app.frames import Code, ask
from fedpact_app.simulation import simulated_folder, simulated_socket

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

REPOSITORY = Path(__file__).parents[2]
BESIDE = Path(sys.executable).parent


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Flower of this test's own. The SuperLink that `flwr run` starts stays behind by design; it is ended here."""
    ports = free_ports(2)
    mine = {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FEDPACT_FOLDER": str(tmp_path / "fedpact"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BESIDE}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        yield {**os.environ, **mine}
    finally:
        end_all(mine["FLWR_HOME"])


def free_ports(count: int) -> list[int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in (one, other)][:count]


def processes(flwr_home: str) -> list[int]:
    """All that Flower started with this FLWR_HOME and that still runs, Ray's and the members' included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"FLWR_HOME={flwr_home}".encode() in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mine and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def end_all(flwr_home: str) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes(flwr_home):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue
        end = time.monotonic() + 15
        while processes(flwr_home) and time.monotonic() < end:
            time.sleep(0.2)


def flwr(environment: Mapping[str, str], *arguments: str) -> dict[str, Any]:
    command = [str(BESIDE / "flwr"), *arguments, "--format", "json"]
    done = subprocess.run(command, cwd=REPOSITORY, env=dict(environment), capture_output=True, text=True, timeout=120)
    return dict(json.loads(done.stdout[done.stdout.index("{") :]))


def ended(environment: Mapping[str, str], run_id: str) -> dict[str, Any]:
    """The run's row in `flwr ls` when it has finished."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        row = flwr(environment, "ls", "--run-id", run_id)["runs"][0]
        if row["status"].startswith("finished"):
            return dict(row)
        time.sleep(2)
    raise AssertionError(f"run {run_id} is {row['status']}")


def four_members(folder: Path) -> Path:
    """The demo's run file, with the first four of its members."""
    path = write_demo(folder, model=model_folder())
    for file in sorted((folder / "clients").glob("*.toml"))[4:]:
        file.unlink()
    return path


def test_flwr_run_gives_the_bytes_of_a_local_run_and_leaves_no_process(
    environment: dict[str, str], tmp_path: Path
) -> None:
    nodes = ("--federation-config", "num-supernodes=4")
    run = flwr(environment, "run", ".", "--run-config", "rounds=2", *nodes)
    row = ended(environment, run["run-id"])
    assert (row["status"], row["status-details"]) == ("finished:completed", "N/A")
    out = Path(environment["FEDPACT_FOLDER"]) / "runs" / "demo"
    verified(out)
    assert list(json.loads((out / "run.json").read_text())["members"]) == ["add", "avg", "dif", "flp"]
    assert not simulated_folder(int(run["run-id"])).exists()

    path = four_members(tmp_path / "local")
    config, alone = load_run(path, ["rounds=2"]), tmp_path / "alone" / "demo"
    start(config, path.parent, alone, where=str(path), make=local_transport, observer=Lines(2))
    name = "final/adapter_model.safetensors"
    assert (out / name).read_bytes() == (alone / name).read_bytes()

    end_all(environment["FLWR_HOME"])
    assert processes(environment["FLWR_HOME"]) == []


@pytest.fixture
def order(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What the members' process is told to hold: four members of the demo, for a run that nobody else has."""
    path = four_members(tmp_path / "demo")
    run_id = secrets.randbits(63)
    yield {
        "run_id": run_id,
        "config": load_run(path, ["rounds=1"]).dump(),
        "folder": str(path.parent),
        "out": str(tmp_path / "runs" / "demo"),
        "model": str(model_folder()),
        "members": paired(["add", "avg", "dif", "flp"], [7, 8, 9, 10]),
        "check": True,
        "threads": 1,
    }
    shutil.rmtree(simulated_folder(run_id), ignore_errors=True)


def members_process(order: Mapping[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedpact.edge.simulated"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    return process


def test_the_members_answer_at_their_nodes_and_end_with_whoever_started_them(order: dict[str, Any]) -> None:
    process = members_process(order)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    place = simulated_folder(order["run_id"])
    assert sorted(file.name for file in place.iterdir()) == ["7.sock", "8.sock", "9.sock", "a.sock"]
    socket_of_avg = simulated_socket(order["run_id"], 8)
    assert socket_of_avg is not None and isinstance(ask(socket_of_avg, b"no envelope"), Code)
    process.stdin.close()  # as when the ServerApp is killed
    assert process.wait(30) == 0
    assert process.stdout.read() == "" and not place.exists()


def test_a_bad_client_file_is_one_line_before_there_is_a_socket(order: dict[str, Any]) -> None:
    path = Path(order["folder"]) / "clients" / "dif.toml"
    path.write_text(path.read_text().replace("numeric_answer", "no_such"))
    process = members_process(order)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"fedpact exit 2: {path}: rewards.correct.use: fedpact.rewards has no ")
    assert process.wait(30) == 1
    assert not simulated_folder(order["run_id"]).exists()


def test_a_folder_of_another_user_is_not_used(order: dict[str, Any]) -> None:
    place = simulated_folder(order["run_id"])
    place.mkdir()
    place.chmod(0o755)  # somebody else's, or open to others
    process = members_process(order)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"fedpact exit 4: {place}: found somebody else's; expected none")
    process.wait(30)
    assert list(place.iterdir()) == []
