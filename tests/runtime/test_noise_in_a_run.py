"""A whole run whose members add noise: what is printed, what stops, and that it is the same again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedpact.runtime.budget import Budget, epsilon_after
from fedpact.runtime.ledger import Ledger
from tests.cli.conftest import MEMBERS, in_process, model, results, run_file

__all__ = ["model", "run_file"]

pytest.importorskip("dp_accounting")
pytestmark = pytest.mark.slow


def noisy(run_file: Path, **site: float) -> None:
    lines = "".join(
        f"{name} = {value}\n" for name, value in {"clip_norm": 0.1, "noise_multiplier": 4.0, **site}.items()
    )
    for name in MEMBERS:
        path = run_file.parent / "clients" / f"{name}.toml"
        path.write_text(path.read_text() + "\n[site]\n" + lines)


def test_epsilon_is_printed_every_round_and_is_the_accountants(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy(run_file)
    assert in_process("run", run_file) == 0
    expected = [epsilon_after(rounds, 4.0, 1e-5) for rounds in (1, 2, 3)]
    printed = [line for line in capsys.readouterr().out.splitlines() if "epsilon up to" in line]
    assert [float(line.rpartition(" ")[2]) for line in printed] == pytest.approx(expected, rel=1e-2)
    out = run_file.parent / "runs" / "run"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert not [row for row in rows if row["key"].startswith(("train/reward", "heldout"))]  # nothing beside the adapter
    assert in_process("verify", out, "--replay", "2") == 0


def test_a_spent_budget_ends_the_members_training_and_the_run_says_so(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy(run_file, epsilon=epsilon_after(2, 4.0, 1e-5) + 1e-6)
    assert in_process("run", run_file) == 5
    assert "site.epsilon" in capsys.readouterr().err
    out = run_file.parent / "runs" / "run"
    assert sorted(path.name for path in (out / "rounds").glob("[0-9]*[0-9]")) == ["0000", "0001", "0002"]
    ledger = out / "clients" / "north" / "ledger.jsonl"
    assert Budget(4.0, 1e-5).spent(ledger) == pytest.approx(epsilon_after(2, 4.0, 1e-5))
    assert [one["reason"] for one in Ledger.entries(ledger) if one["decision"] == "refused"] == ["RefusedError"]


def test_the_same_seed_gives_the_same_noisy_bytes(run_file: Path) -> None:
    noisy(run_file)
    folder = run_file.parent / "runs"
    assert in_process("run", run_file, "--out", folder / "one" / "run") == 0
    assert in_process("run", run_file, "--out", folder / "two" / "run") == 0
    assert results(folder / "one" / "run") == results(folder / "two" / "run")
