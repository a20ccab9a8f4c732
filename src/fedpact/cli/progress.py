"""What a run shows while it goes: a line a round, wherever the output goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fedpact.types import ClientId


class Progress:
    """Prints each committed round. `primary` is the objective whose held-out mean comes first."""

    def __init__(self, rounds: int, *, primary: str, label: str = "") -> None:
        self.rounds, self.primary, self.label = rounds, primary, label
        self.began = time.monotonic()

    def round_done(self, round: int, metrics: Sequence[Mapping[str, Any]]) -> None:
        """`runtime.run.Observer`."""
        heldout = {m["key"]: m["value"] for m in metrics if m["who"] == "all" and m["key"].startswith("heldout/")}
        training = [m["value"] for m in metrics if m["key"] == f"train/reward/{self.primary}"]
        parts = [
            f"{key.removeprefix('heldout/')} {value:.3f}" for key, value in heldout.items() if "accuracy" not in key
        ]
        text = "held out: " + ", ".join(parts) if parts else ""
        if not parts and training:
            text = f"training: {self.primary} {sum(training) / len(training):.3f}"
        prefix = f"{self.label}  " if self.label else ""
        seconds = time.monotonic() - self.began
        print(f"{prefix}round {round:>3}/{self.rounds}  {seconds:6.1f} s  {text}", flush=True)

    def dropped(self, client: ClientId, reason: str) -> None:
        """`runtime.run.Observer`."""
        print(f"dropped {client}: {reason}", file=sys.stderr, flush=True)
