"""`fedpact compare`: variants of one run file times seeds, each an ordinary run folder, and one table about them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fedpact import errors
from fedpact.cli import commands
from fedpact.cli.ending import Stopped
from fedpact.cli.plan import PLAN, locked, planned, read_plan
from fedpact.cli.progress import Progress
from fedpact.cli.variants import split_values
from fedpact.edge.local import local_transport
from fedpact.errors import ConfigError, FedPactError, StoreError
from fedpact.report.compare import Comparison, Runs, compared, comparison_markdown, comparison_table
from fedpact.report.page import write_report
from fedpact.report.read import read_run
from fedpact.runtime import launch
from fedpact.runtime.config import RunConfig
from fedpact.runtime.files import atomic_write, json_bytes, make_private, storing
from fedpact.runtime.toml import validated
from fedpact.screen import say, shown
from fedpact.secrets import masked


@dataclass(frozen=True, slots=True)
class Failed:
    """A run that did not reach its end."""

    variant: str
    seed: int
    code: int
    reason: str


def compare(
    path: Path, out: Path, named: Mapping[str, Any], *, seeds: int, jobs: int, baseline: str | None, front: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Run what is missing of the variants `named`, print and save the table. Failed runs are told last.

    Raises ConfigError before anything runs if a variant is wrong, or is not what the runs in `out` began with.
    """
    configs = {name: validated(RunConfig, data, where=f"{path}: {name}") for name, data in named.items()}
    names = list(configs)
    for i, name in enumerate(names):
        twin = next((other for other in names[:i] if configs[other].dump() == configs[name].dump()), None)
        if twin is not None:
            raise ConfigError(f"variants {twin!r} and {name!r} are one configuration; leave one of them out")
    baseline = next(iter(configs)) if baseline is None else baseline
    if baseline not in configs:
        raise ConfigError(f"--baseline {baseline}: no such variant; there are: {'; '.join(configs)}")
    settings = {key: one for config in reversed(configs.values()) for key, one in config.objectives.items()}
    objectives = sorted(settings, key=lambda name: not settings[name].primary)
    axes = objectives if front is None else split_values(front)
    if unknown := [name for name in axes if name not in objectives]:
        raise ConfigError(f"--front {front}: {unknown[0]!r} is no objective; there are {', '.join(objectives)}")
    first = configs[baseline].seed
    with locked(out):
        _compare(path, out, configs, range(first, first + seeds), objectives, axes, baseline, jobs, as_json)


def _compare(
    path: Path,
    out: Path,
    configs: Mapping[str, RunConfig],
    seeds: range,
    objectives: list[str],
    axes: list[str],
    baseline: str,
    jobs: int,
    as_json: bool,
) -> None:
    plan = planned(path, out, configs, seeds)
    slugs = {one["name"]: one["slug"] for one in plan["variants"]}
    folders = {(name, k): out / slugs[name] / f"seed-{k}" for k in seeds for name in configs}
    failed = _run_all(out, folders, jobs, to=sys.stderr if as_json else sys.stdout)
    done = {key: read_run(folder) for key, folder in folders.items() if (folder / "final").exists()}
    runs = [
        Runs(name, config.algorithm.model_dump()["name"], {k: run for (whose, k), run in done.items() if whose == name})
        for name, config in configs.items()
    ]
    found = compared(runs, objectives=objectives, leading=objectives[0], baseline=baseline, axes=axes)
    figures = {**asdict(found), "failed": [asdict(one) for one in failed]}
    atomic_write(out / PLAN, json_bytes({**plan, "comparison": figures}, sort_keys=False))
    atomic_write(out / "compare.md", comparison_markdown(found).encode())
    if as_json:
        print(json.dumps({"folder": str(out), **figures}, indent=2))
    else:
        _print_table(found)
        say(f"table: {out / 'compare.md'}; figures: {out / PLAN}")
    if failed:
        kinds = (errors.ConfigError, errors.RefusedError, errors.StoreError, errors.TooFewRepliesError)
        kind = next((kind for kind in kinds if kind.exit_code == failed[0].code), FedPactError)
        which = "; ".join(f"{one.variant}, seed {one.seed}: {one.reason}" for one in failed)
        raise kind(f"{len(failed)} of {len(folders)} runs failed; the same command tries them again: {which}")


def one_run(out: Path, slug: str, name: str) -> None:
    """Begin or go on with one run of the plan in `out`; its folder's name is seed-<k>."""
    if not re.fullmatch(r"seed-[0-9]{1,18}", name):
        raise ConfigError(f"{name!r:.80}: expected seed- and a number")
    plan, folder, seed = read_plan(out), out / slug / name, int(name.removeprefix("seed-"))
    variant = next((one for one in plan["variants"] if one["slug"] == slug), None)
    if variant is None:
        raise StoreError(f"{out / PLAN}: no variant {slug!r}; run the same `fedpact compare` again")
    if (folder / "run.json").exists():
        commands.resume(folder)
        return
    config = validated(RunConfig, {**variant["config"], "seed": seed}, where=str(out / PLAN))
    home, where, label = Path(plan["folder"]), plan["run_file"], variant["name"]
    observer = Progress(config.rounds)
    launch.start(config, home, folder, where=where, make=local_transport, observer=observer, label=label)
    write_report([folder], folder / "report.html", title=f"{label}, seed {seed}")


def _run_all(out: Path, folders: Mapping[tuple[str, int], Path], jobs: int, *, to: IO[str]) -> list[Failed]:
    """Each run in a process of its own, `jobs` at once; those that are finished are left alone."""
    waiting = [key for key, folder in folders.items() if not (folder / "final").exists()]
    running: dict[tuple[str, int], tuple[subprocess.Popen[bytes], float]] = {}
    failed: list[Failed] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                key = waiting.pop(0)
                running[key] = _begin(out, folders[key]), time.monotonic()
            for key, (child, began) in list(running.items()):
                if child.poll() is not None:
                    del running[key]
                    ended = len(folders) - len(waiting) - len(running)
                    lines = folders[key].with_suffix(".log").read_text(errors="replace").splitlines()
                    state = f"done, {time.monotonic() - began:.0f} s"
                    if child.returncode != 0:
                        reason = masked(lines[-1]).removeprefix("fedpact: ") if lines else "it said nothing"
                        reason = reason if child.returncode > 0 else f"ended by signal {-child.returncode}"
                        failed.append(Failed(*key, child.returncode, reason))
                        state = f"failed: {reason}"
                    say(f"[{ended}/{len(folders)}] {key[0]}, seed {key[1]}: {state}", to=to)
                    for line in lines:
                        if line.startswith("dropped "):
                            say(f"{key[0]}, seed {key[1]}: {line}", to=sys.stderr)
            time.sleep(0.02)
    except Stopped as stop:
        stop.remedy = "the same command"
        raise
    finally:
        for child, _ in running.values():
            child.terminate()
        for child, _ in running.values():
            child.wait()
    return failed


def _begin(out: Path, folder: Path) -> subprocess.Popen[bytes]:
    log = folder.with_suffix(".log")
    with storing(log):
        make_private(folder.parent)
        with log.open("wb") as output:
            command = [sys.executable, "-m", "fedpact", "compare-one", "--", str(out), folder.parent.name, folder.name]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _print_table(found: Comparison) -> None:
    console = Console()
    if console.is_terminal:
        header, rows = comparison_table(found)
        table = Table(*(Column(_plain(name)) for name in header), title="held-out means at the end")
        for row in rows:
            table.add_row(*map(_plain, row))
        console.print("\n", table, *map(_plain, found.notes), sep="\n", highlight=False)
    else:
        print(comparison_markdown(found), end="")


def _plain(text: str) -> Text:
    """A name or a figure as it stands: no markup, no emoji codes, no control characters."""
    return Text(shown(text))
