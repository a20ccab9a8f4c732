from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str, *options: str) -> list[str]:
    """The lines that `python -m scripts.NAME` prints; it has to end with 0."""
    command = [sys.executable, "-m", f"scripts.{name}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_five_kills_cost_no_byte():
    lines = script("chaos", "--kills", "25")
    kills = [line for line in lines if line.endswith("  same")]
    assert len(kills) >= 25
    total = next(line for line in lines if "points and at random times" in line)
    assert total.startswith("25 kills at ") and total.endswith(": all bytes the same")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_forty_rounds_of_faults_leave_nothing_behind():
    assert script("soak", "--rounds", "40")[-1] == "nothing leaked, nothing lost"
