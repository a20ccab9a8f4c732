from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import timeit
from pathlib import Path

import pytest

from fedpact import faults

SOURCE = Path(faults.__file__).parent


def called() -> list[ast.expr]:
    """The first argument of every call of `fault_point` in the source."""
    return [
        node.args[0]
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "fault_point"
    ]


def in_a_process(code: str, fault: str | None) -> subprocess.CompletedProcess[str]:
    """`code` with FEDPACT_FAULT = `fault`."""
    environment = {name: value for name, value in os.environ.items() if name != "FEDPACT_FAULT"}
    if fault is not None:
        environment["FEDPACT_FAULT"] = fault
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_every_point_in_the_source_is_listed_and_every_listed_point_is_in_the_source():
    found = called()
    names = [node.value for node in found if isinstance(node, ast.Constant)]
    assert len(names) == len(found)  # each is a constant, so that this test can see it
    assert sorted(set(names)) == sorted(faults.POINTS)
    assert len(faults.POINTS) == len(set(faults.POINTS))


def test_every_durable_step_of_a_write_has_a_point():
    """A call that makes something durable stands in a function that has a point, or that only such ones call."""
    steps, marked, bare = {"fsync", "rename", "replace", "write_durably", "append_durably"}, set(), set()
    for node in ast.walk(ast.parse((SOURCE / "runtime" / "files.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            calls = [one.func for one in ast.walk(node) if isinstance(one, ast.Call)]
            names = {getattr(func, "id", getattr(func, "attr", "")) for func in calls}
            if "fault_point" in names:
                marked.add(node.name)
            elif names & steps:
                bare.add(node.name)
    assert marked == {"atomic_write", "write_folder", "write_durably", "append_durably"}
    assert bare == {"recover_folder", "sync_folder"}  # the store's own point is before the one; the other is their last


def test_unless_it_is_asked_for_a_point_is_an_empty_function():
    code = """
import os, sys
from fedpact import faults
os.environ["FEDPACT_FAULT"] = "files.open=kill"  # too late: it is read once, at the import
faults.fault_point("files.open")
body = faults.fault_point.__code__
print([body.co_names, [c for c in body.co_consts if c != faults.fault_point.__doc__]])
print(sorted(name for name in vars(faults) if not name.startswith("__")))
"""
    done = in_a_process(code, None)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["[(), [None]]", "['POINTS', 'annotations', 'fault_point', 'os']"]


def test_a_point_that_is_not_asked_for_costs_less_than_a_microsecond():
    if "FEDPACT_FAULT" in os.environ:
        pytest.skip("the points are switched on here")
    assert min(timeit.repeat(lambda: faults.fault_point("files.open"), number=10_000, repeat=5)) / 10_000 < 1e-6


REACHING = """
import time
from fedpact.faults import fault_point
for number in range(4):
    began = time.monotonic()
    try:
        fault_point("files.open")
        fault_point("files.synced")
    except (OSError, RuntimeError) as error:
        print(f"{number}: {type(error).__name__}: {error}")
    if time.monotonic() - began > 0.2:
        print(f"{number}: late")
"""


@pytest.mark.parametrize(
    ("fault", "printed"),
    [
        ("files.open=enospc", "0: OSError: [Errno 28] No space left on device"),
        ("files.synced:2=eacces", "1: PermissionError: [Errno 13] Permission denied"),
        ("files.open:4=erofs", "3: OSError: [Errno 30] Read-only file system"),
        ("files.open:3=raise", "2: RuntimeError: fault at files.open"),
        ("files.synced:2=delay:0.25", "1: late"),
        ("files.renamed=enospc", ""),
        ("files.open:5=enospc", ""),
        ("", ""),
    ],
)
def test_what_is_planned_happens_at_that_point_that_time_and_once(fault, printed):
    done = in_a_process(REACHING, fault)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, printed, "")


def test_a_kill_is_one_that_nobody_can_catch():
    assert in_a_process(REACHING, "files.open:2=kill").returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "fault",
    ["files.open", "files.opne=kill", "files.open=die", "files.open:x=kill", "files.open=delay", "files.open=kill:3"],
)
def test_a_fault_that_is_none_is_refused_in_one_line(fault):
    done = in_a_process("import fedpact.faults", fault)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"fedpact.errors.ConfigError: FEDPACT_FAULT: found {fault!r}, expected NAME[:COUNT]=kill|")
