"""`fedpact audit`: attack one's own configuration, and print the damage and the leak."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpact.audit.finding import HEADER, Finding, plain_line
from fedpact.audit.hacks import hacked
from fedpact.audit.judges import judged
from fedpact.audit.leaks import NO_PROOF, leaks
from fedpact.audit.poison import poisoned
from fedpact.audit.trial import Bench
from fedpact.cli.ending import Stopped
from fedpact.errors import ConfigError
from fedpact.runtime.config import RunConfig, load_run
from fedpact.runtime.files import atomic_write, json_bytes, make_private
from fedpact.screen import say, shown

RESULT = "audit.json"


def audit(path: Path, overrides: Sequence[str], *, rounds: int, seeds: int, out: Path | None, as_json: bool) -> None:
    """Play every attack; nothing but `out` is written, where the trials' run folders and audit.json then stay.

    Raises ConfigError if the configuration cannot run, or `out` holds anything.
    """
    config = load_run(path, overrides)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: not empty; give a new folder with --out")
    if out is not None:
        make_private(out)
    scratch = Path(tempfile.mkdtemp(prefix="fedpact-audit-")) if out is None else out
    began = time.monotonic()
    live = not as_json and not Console().is_terminal
    found: list[Finding] = []
    try:
        for finding in _attacks(Bench(path, scratch, keep=out is not None), config, rounds, seeds):
            found.append(finding)
            if live:
                say(plain_line(finding))
            else:
                say(f"{time.monotonic() - began:5.0f} s  {finding.attack} | {finding.defence}", to=sys.stderr)
        seconds = time.monotonic() - began
        about = {"run_file": str(path), "rounds": rounds, "seeds": seeds, "seconds": round(seconds, 1)}
        result = {**about, "notes": _notes(rounds, seeds), "findings": [one.dump() for one in found]}
        if out is not None:
            shutil.rmtree(out / "replies", ignore_errors=True)
            atomic_write(out / RESULT, json_bytes(result, sort_keys=False))
    except Stopped as stopped:
        stopped.remedy = "the same command"
        raise
    finally:
        if out is None:
            shutil.rmtree(scratch, ignore_errors=True)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    if not live:
        _print_table(found)
    harm = sum(one.harm for one in found)
    say(f"{harm} of {len(found)} lines show harm; {rounds} rounds, {seeds} seeds, {seconds:.0f} s")
    for note in _notes(rounds, seeds):
        say(note)


def _attacks(bench: Bench, config: RunConfig, rounds: int, seeds: int) -> Iterator[Finding]:
    primary = next((name for name, one in config.objectives.items() if one.primary), None)
    leading = primary or next(iter(config.objectives))
    yield from hacked(bench, config, bench.scratch / "rewards")
    if "server" in config.algorithm.needs:
        yield Finding("poison", "any", "–", "", "does not apply: members send no adapters under this algorithm")
        if hasattr(config.algorithm, "score"):
            yield from judged(bench, config, rounds=rounds, seeds=seeds, leading=leading)
        yield Finding("curious server", "any", "–", "", "does not apply: no adapter leaves a member")
        return
    yield from poisoned(bench, config, rounds=rounds, seeds=seeds, leading=leading)
    yield Finding("lying judge", "any", "–", "", "does not apply: nobody is asked to rate under this algorithm")
    yield from leaks(bench, config, seeds=seeds)


def _notes(rounds: int, seeds: int) -> list[str]:
    return [
        f"Poison and lies: {seeds} seeds of {rounds} rounds show the direction, not a whole run's damage. Figures are "
        "changes of held-out means against honest runs under the same defence; how far the adapter is off is in "
        "lengths of the honest run's way.",
        "Reward hacker: means over held-out prompts; a hack that pays is one that training may find.",
        "Curious server: which prompts were in the batch of the first local step, and which were held out? It has one "
        "reply, the public model, and the contract's seed, by which it draws the very completions that the member did. "
        "Adam's first step leaves it hardly more than the signs of the gradient, SGD all of it.",
        NO_PROOF,
    ]


def _print_table(found: Sequence[Finding]) -> None:
    table = Table(*HEADER, title="audit", show_lines=False)
    for one in found:
        table.add_row(*(escape(shown(cell)) for cell in one.row()), style="bold" if one.harm else None)
    Console().print("\n", table, sep="")
