"""`fedpact demo`: the same members and rewards under three algorithms, side by side."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpact.cli.progress import Progress
from fedpact.edge.local import local_transport
from fedpact.errors import ConfigError
from fedpact.report.page import write_report
from fedpact.report.read import read_run, summary_table
from fedpact.runtime import launch
from fedpact.runtime.config import load_run
from fedpact.tasks.demo import LABELS, METHODS, write_demo
from fedpact.tasks.warmstart import model_folder


def demo(*, algorithm: str | None, seed: int, rounds: int | None, out: Path | None) -> None:
    """Write the demo's files, run its algorithms, print the table and write the page."""
    if algorithm is not None and algorithm not in METHODS:
        raise ConfigError(f"--algorithm {algorithm}: not in the demo; expected one of {', '.join(METHODS)}")
    folder = out or _free(Path("runs/demo"))
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: not empty; give a new folder with --out")
    began = time.monotonic()
    path = write_demo(folder, model=model_folder(), seed=seed, **({} if rounds is None else {"rounds": rounds}))
    print(f"Eight members, four private rewards, one model of 84,000 parameters. The files are in {folder}.\n")
    done = []
    for name in [algorithm] if algorithm else METHODS:
        config = load_run(path, METHODS[name])
        progress = Progress(config.rounds, label=f"{LABELS[name]:<15}")
        run = folder / "runs" / name
        launch.start(config, folder, run, where=str(path), make=local_transport, observer=progress, label=LABELS[name])
        write_report([run], run / "report.html", title=LABELS[name])
        done.append(run)
    header, rows = summary_table([read_run(run) for run in done])
    table = Table(*header, title="held-out means, start → end")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print("\n", table, sep="")
    page = write_report(done, folder / "report.html", title="FedPact demo")
    print(
        "correct: right answers (the primary objective); format: well-formed tags; brief: minus the number of words;\n"
        "polite: no forbidden word. This shows that the algorithms work and differ, not that so small a model reasons."
    )
    print(f"{time.monotonic() - began:.0f} s; report: {page}")


def _free(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
