"""`fedpact demo`: eight members under several methods, side by side. They train, or with fedgrpo they only judge."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpact.cli.progress import Progress, traffic
from fedpact.edge.local import local_transport
from fedpact.errors import ConfigError
from fedpact.report.page import write_report
from fedpact.report.read import RunRecord, read_run, summary_table
from fedpact.runtime import launch
from fedpact.runtime.config import load_run
from fedpact.tasks import demo as trained
from fedpact.tasks import judged
from fedpact.tasks.warmstart import model_folder


@dataclass(frozen=True)
class Demo:
    """Files, the runs that are made of them, and what to say."""

    write: Callable[..., Path]
    methods: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, str]
    opening: str
    closing: str


TRAINED = Demo(
    trained.write_demo,
    trained.METHODS,
    trained.LABELS,
    "Eight members, four private rewards, one model of 84,000 parameters.",
    "correct: right answers (the primary objective); format: well-formed tags; brief: minus the number of words;\n"
    "polite: no forbidden word. This shows that the algorithms work and differ, not that so small a model reasons.",
)
JUDGED = Demo(
    judged.write_judged_demo,
    {name: judged.EXPERTS[name] for name in judged.LABELS},
    judged.LABELS,
    "A server with questions and no answers, and eight members with private models that each know one operation.",
    "correct: right answers; format: well-formed tags. Nobody sent an answer, a model or an adapter: only numbers.\n"
    "Whom the server asks decides what it learns; central GRPO has all the answers, and is what to compare with.",
)
CHOICES = (*trained.METHODS, "fedgrpo")


def demo(*, algorithm: str | None, seed: int, rounds: int | None, out: Path | None) -> None:
    """Write the demo's files, run its algorithms, print the table and write the page."""
    if algorithm is not None and algorithm not in CHOICES:
        raise ConfigError(f"--algorithm {algorithm}: not in the demo; expected one of {', '.join(CHOICES)}")
    folder = out or _free(Path("runs/demo"))
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: not empty; give a new folder with --out")
    began = time.monotonic()
    shown = JUDGED if algorithm == "fedgrpo" else TRAINED
    print(f"{shown.opening} The files are in {folder}.\n", flush=True)
    path = shown.write(folder, model=model_folder(), seed=seed, **({} if rounds is None else {"rounds": rounds}))
    names = [algorithm] if algorithm is not None and algorithm in shown.methods else list(shown.methods)
    runs = [_run(shown, name, path, folder) for name in names]
    records = [read_run(run) for run in runs]
    _print_table(records)
    page = write_report(runs, folder / "report.html", title="FedPact demo")
    print(shown.closing)
    for record in records:
        print(f"{record.label}: {traffic(record)}")
    print(f"{time.monotonic() - began:.0f} s; report: {page}")


def _run(shown: Demo, name: str, path: Path, folder: Path) -> Path:
    config, label, out = load_run(path, shown.methods[name]), shown.labels[name], folder / "runs" / name
    progress = Progress(config.rounds, label=f"{label:<15}")
    launch.start(config, folder, out, where=str(path), make=local_transport, observer=progress, label=label)
    write_report([out], out / "report.html", title=label)
    return out


def _print_table(records: list[RunRecord]) -> None:
    header, rows = summary_table(records)
    table = Table(*header, title="held-out means, start → end")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print("\n", table, sep="")


def _free(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
