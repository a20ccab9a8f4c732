"""What a run shows while it goes: a line a round, wherever the output goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fedpact.report.read import RunRecord
from fedpact.screen import say
from fedpact.types import ClientId


class Progress:
    """Prints each committed round: held-out means where it was evaluated, else training means over the members."""

    def __init__(self, rounds: int, *, label: str = "") -> None:
        self.rounds, self.label = rounds, label
        self.began = time.monotonic()

    def round_done(self, round: int, metrics: Sequence[Mapping[str, Any]]) -> None:
        """`runtime.run.Observer`."""
        heldout = [m for m in metrics if m["who"] == "all" and m["key"].startswith("heldout/")]
        training = [m for m in metrics if m["key"].startswith("train/reward/")]
        text = "held out: " + _means(heldout) if heldout else "training: " + _means(training)
        prefix = f"{self.label}  " if self.label else ""
        if spent := [m["value"] for m in metrics if m["key"].startswith("train/epsilon")]:
            text += f"; epsilon up to {max(spent):.3g}"
        seconds = time.monotonic() - self.began
        say(f"{prefix}round {round:>3}/{self.rounds}  {seconds:6.1f} s  {text}")

    def dropped(self, client: ClientId, reason: str) -> None:
        """`runtime.run.Observer`."""
        say(f"dropped {client}: {reason}", to=sys.stderr)


def traffic(record: RunRecord) -> str:
    """What crossed the network, both ways, as one would say it."""
    out, back = record.traffic.to_members / 1e6, record.traffic.from_members / 1e6
    return f"{out:.2f} MB to members, {back:.2f} MB back, in {record.traffic.asked} messages"


def _means(metrics: Sequence[Mapping[str, Any]]) -> str:
    values: dict[str, list[float]] = {}
    for metric in metrics:
        values.setdefault(metric["key"].rpartition("/")[2], []).append(metric["value"])
    values.pop("accuracy", None)  # the primary objective's mean under another name
    return ", ".join(f"{name} {sum(found) / len(found):.3f}" for name, found in values.items())
