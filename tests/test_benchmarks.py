"""The benchmarks run. How fast they are is for `make bench` to say: a test must not depend on the machine's load."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.__main__ import TARGETS, main


@pytest.mark.slow
def test_the_gradient_benchmark_writes_a_finite_ratio_for_every_number_of_objectives(tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    assert main(["--quick", "--only", "gradients", "--size", "nano", "--json", str(report)]) == 0
    ratios = json.loads(report.read_text(encoding="utf-8"))["figures"]["nano"]
    expected = {f"M={m} / PEFT, {part}" for m in (1, 2, 3, 8, 16) for part in ("backward", "forward + backward")}
    expected |= {f"torchjd {how} / ours, M=8, backward" for how in ("one by one", "vmap")}
    assert expected <= ratios.keys()
    for name, ratio in ratios.items():
        assert all(math.isfinite(value) and value > 0 for value in ratio.values()), name
        assert ratio["low"] <= ratio["value"] * (1 + 1e-9), name
    assert {target.name for target in TARGETS if "PEFT, backward" in target.name} <= ratios.keys()
